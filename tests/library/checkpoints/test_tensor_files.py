"""Tensor files: read as saved, nothing in a file is run, and what is no tensor file is told so in one sentence."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.checkpoints.tensor_files import open_tensor_file
from library.errors import UserError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


def sample_tensors() -> dict[str, Tensor]:
    """One tensor per type, a scalar, an empty one, and views that are not contiguous."""
    stream = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=stream)
    tensors = {f"a.{dtype}": (base * 10).to(dtype) for dtype in DTYPES}
    return {**tensors, "scalar": torch.tensor(4.0), "empty": torch.empty(0, 3)}


def views() -> dict[str, Tensor]:
    base = torch.arange(48.0).reshape(6, 8)
    return {"transposed": base.t(), "slice": base[2:5, 1:7:2], "expanded": base[:1].expand(3, 8), "whole": base}


def assert_same(path: Path, expected: dict[str, Tensor]) -> None:
    file = open_tensor_file(path)
    assert set(file.keys()) == set(expected)
    for key, tensor in expected.items():
        assert file.shape(key) == tuple(tensor.shape)
        assert file.dtype(key) == tensor.dtype
        assert torch.equal(file.read(key), tensor), key


def test_safetensors_read_as_saved(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(sample_tensors(), path, metadata={"ss_v2": "False"})
    assert_same(path, sample_tensors())
    assert open_tensor_file(path).metadata == {"ss_v2": "False"}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["state_dict", "bare"])
def test_torch_checkpoints_read_as_saved_in_both_formats(tmp_path, zipped, wrapped):
    path = tmp_path / "x.ckpt"
    tensors = sample_tensors() | views() | {"parameter": nn.Parameter(torch.randn(3, 2))}
    content: Any = {"state_dict": tensors, "epoch": 7, "global_step": 123} if wrapped else tensors
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_same(path, tensors)
    assert open_tensor_file(path).counters == ({"epoch": 7, "global_step": 123} if wrapped else {})


def test_the_content_decides_and_not_the_suffix(tmp_path):
    path = tmp_path / "really_a_checkpoint.safetensors"
    torch.save(views(), path)
    assert_same(path, views())


class Callback:
    """Stands for what Lightning saves beside the weights: objects of classes that need not be installed."""

    def __init__(self) -> None:
        self.best = torch.ones(2)
        self.monitor = ["val/loss"]


Callback.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_lightning_checkpoint_with_objects_of_missing_packages_reads(tmp_path, zipped, monkeypatch):
    import sys
    import types

    import numpy as np

    module = types.ModuleType(Callback.__module__)
    module.Callback = Callback  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, Callback.__module__, module)
    path = tmp_path / "old.ckpt"
    content = {
        "state_dict": OrderedDict(views()),
        "callbacks": {Callback: Callback(), "best": np.float64(0.5)},
        "hparams": {"path": Path("/data"), "kinds": {1, 2}},
        "loops": None,
        "epoch": 3,
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, Callback.__module__)
    assert_same(path, views())


class Attack:
    """A pickle that calls something when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def attacks(sentinel: Path) -> dict[str, tuple[Any, str]]:
    write = f"open({str(sentinel)!r}, 'w')"
    return {
        "os.system": (Attack(os.system, f"touch {sentinel}"), "system"),
        "eval": (Attack(eval, write), "builtins.eval"),
        "exec": (Attack(exec, write), "builtins.exec"),
        "open": (Attack(open, str(sentinel), "w"), "open"),
        "__import__": (Attack(__import__, "os"), "builtins.__import__"),
        "subprocess": (Attack(__import__("subprocess").Popen, ["touch", str(sentinel)]), "subprocess.Popen"),
    }


@pytest.mark.parametrize("name", attacks(Path("x")))
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "beside the weights"])
def test_a_malicious_pickle_is_refused_by_name_and_runs_nothing(tmp_path, name, form):
    sentinel, path = tmp_path / "ran", tmp_path / "model.ckpt"
    attack, shown = attacks(sentinel)[name]
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(attack))
    elif form == "beside the weights":
        torch.save({"state_dict": views(), "callbacks": [attack]}, path)
    else:
        torch.save({"weight": torch.ones(2), "x": attack}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=rf"model\.ckpt: contains code \(.*{shown}\) and was not loaded"):
        open_tensor_file(path)
    assert not sentinel.exists()
    with pytest.MonkeyPatch.context() as patch:  # the attack is real: an ordinary load would have run it
        patch.chdir(tmp_path)
        if name in ("os.system", "eval", "open"):
            pickle.loads(pickle.dumps(attack))
            assert sentinel.exists()


def test_unknown_names_are_inert_even_where_no_list_knows_them(tmp_path):
    """A function of an installed package outside the standard library is never looked up."""
    import torch.hub

    sentinel, path = tmp_path / "ran", tmp_path / "model.ckpt"
    torch.save({"weight": torch.ones(2), "x": Attack(torch.save, {}, str(sentinel))}, path)
    assert_same(path, {"weight": torch.ones(2)})
    assert not sentinel.exists()


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """File, and a part of the sentence it must be answered with."""
    good = folder / "good.safetensors"
    save_file({"a": torch.randn(100, 100)}, good)
    checkpoint, legacy, program = folder / "good.ckpt", folder / "legacy.ckpt", folder / "program.pt"
    torch.save({"a": torch.randn(100, 100)}, checkpoint)
    torch.save({"a": torch.randn(100, 100)}, legacy, _use_new_zipfile_serialization=False)
    archive = folder / "archive.ckpt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "hello")

    def written(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    whole = good.read_bytes()
    torch.save({"a": 1}, program)
    return {
        "data cut off": (written("1.safetensors", whole[:-10]), "is truncated: 40,0.. bytes, but its header promises"),
        "header cut off": (written("2.safetensors", whole[:30]), "is truncated"),
        "text": (written("3.safetensors", b"hello, I am a text file\n" * 3), "is a text file"),
        "empty": (written("4.safetensors", b""), "is empty"),
        "web page": (written("5.safetensors", b"<!DOCTYPE html><html>404</html>"), "is a web page"),
        "git lfs": (written("6.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
        "noise": (written("7.ckpt", bytes(range(255, 0, -1))), "is not a tensor file"),
        "damaged header": (written("8.safetensors", whole[:8] + b"{" + b"!" * len(whole)), "damaged safetensors header"),
        "zip cut off": (written("9.ckpt", checkpoint.read_bytes()[:-200]), "is damaged, truncated"),
        "legacy cut off": (written("10.ckpt", legacy.read_bytes()[:-200]), "is truncated"),
        "other archive": (archive, "is a zip archive, but no PyTorch checkpoint"),
        "no tensors": (program, "holds no tensors"),
        "missing": (folder / "god.safetensors", r"no such file; did you mean good\.safetensors"),
        "folder": (folder, "is a folder"),
    }


def test_what_cannot_be_read_is_told_in_one_sentence(tmp_path):
    for path, sentence in broken_files(tmp_path).values():
        with pytest.raises(UserError, match=sentence) as caught:
            open_tensor_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_tensor_that_overlaps_the_end_of_its_storage_is_refused(tmp_path):
    """A file that promises more than it holds must not read its neighbour's bytes."""
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.arange(10.0)}, path)
    raw = bytearray(path.read_bytes())
    place = raw.index(b"K\x0a\x85")  # the shape (10,)
    raw[place + 1] = 200
    path.write_bytes(raw)
    with pytest.raises(UserError, match="reaches past its data|damaged"):
        open_tensor_file(path)


def test_opening_reads_no_tensor_data(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(300, 1000), "b": torch.ones(2)}, path)
    file = open_tensor_file(path)
    with open(path, "r+b") as raw:
        raw.truncate(200)
    assert file.shape("a") == (300, 1000)
    with pytest.raises(UserError, match="truncated or was replaced"):
        file.read("a")
