"""Writing: the bytes are safetensors' own, the hashes are what other programs compute, and a failure leaves the old file."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_writing import PlannedTensor, write_tensors
from library.errors import UserError

ALL_TYPES = {
    f"{letter}.{dtype}".replace("torch.", ""): (torch.arange(5.0) * 3).to(dtype)
    for letter in ("b", "a")
    for dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
    )
}  # fmt: skip


def data_section(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def test_the_file_is_byte_for_byte_what_safetensors_writes(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_tensors(ours, ALL_TYPES, {"é": 'a "quote"\n\t\\'})
    save_file(ALL_TYPES, theirs, metadata={"é": 'a "quote"\n\t\\'})
    assert ours.read_bytes() == theirs.read_bytes()


def test_tensors_of_every_kind_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"transposed": base.t(), "slice": base[:, ::2], "scalar": torch.tensor(3), "empty": torch.empty(0, 4)}
    write_tensors(path, tensors, None)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(loaded[key], tensor), key


@pytest.mark.parametrize("count", [10, 150_000, 400_000], ids=["under 1 MiB", "inside the window", "past the window"])
def test_adapter_hashes_are_those_of_the_reference_procedure(tmp_path, count):
    """Reference: serialise with the ss_ entries alone, hash behind the header, and 64 KiB at 1 MiB (sd-scripts)."""
    path = tmp_path / "x.safetensors"
    tensors = {"b.weight": torch.randn(count * 2).half(), "a.alpha": torch.tensor(1.0), "c": torch.randn(7).bfloat16()}
    metadata = {"ss_network_dim": "4", "ss_tag_frequency": '{"猫": {"a cat": 3}}', "modelspec.title": "x"}
    write_tensors(path, tensors, metadata, add_hashes=True)

    reference = save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    header_length = 8 + int.from_bytes(reference[:8], "little")
    expected = {
        "sshs_model_hash": hashlib.sha256(reference[header_length:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(reference[0x100000:0x110000]).hexdigest()[:8],
    }
    with safe_open(path, "pt") as file:
        assert file.metadata() == {**metadata, **expected}
    assert hashlib.sha256(data_section(path)).hexdigest() == expected["sshs_model_hash"]
    if count == 10:
        assert expected["sshs_legacy_hash"] == "e3b0c442", "the hash of nothing"
    for key, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[key])


def test_ckpt_names_get_pytorchs_format(tmp_path):
    path = tmp_path / "x.ckpt"
    write_tensors(path, {"a": torch.arange(4.0)}, {"ignored": "there is no place for it"})
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.arange(4.0))


def test_planned_tensors_are_made_one_at_a_time_and_must_keep_their_word(tmp_path):
    path, alive, most = tmp_path / "x.safetensors", [], []

    def make(number: int) -> torch.Tensor:
        tensor = torch.full((10,), float(number))
        alive.append(__import__("weakref").ref(tensor))
        most.append(sum(reference() is not None for reference in alive))
        return tensor

    write_tensors(path, {str(n): PlannedTensor((10,), "float32", lambda n=n: make(n)) for n in range(5)})
    assert max(most) <= 2
    assert [open_tensor_file(path).read(str(n))[0].item() for n in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="was planned as float32"):
        write_tensors(path, {"a": PlannedTensor((3,), "float32", lambda: torch.ones(4))})


def test_a_failure_while_writing_keeps_the_old_file_and_leaves_no_rest(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def fail() -> torch.Tensor:
        raise RuntimeError("the maths failed")

    with pytest.raises(RuntimeError, match="the maths failed"):
        write_tensors(path, {"z": torch.ones(5), "a": PlannedTensor((3,), "float32", fail)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_kill_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    program = (
        "import sys, time, torch; sys.path.insert(0, sys.argv[2])\n"
        "from library.checkpoints.tensor_writing import PlannedTensor, write_tensors\n"
        "def slow():\n    print('writing', flush=True); time.sleep(60)\n"
        "write_tensors(sys.argv[1], {'z': torch.ones(10000), 'a': PlannedTensor((3,), 'float32', slow)})\n"
    )
    root = str(Path(__file__).resolve().parents[3])
    process = subprocess.Popen([sys.executable, "-c", program, str(path), root], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "writing"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_bytes() == before
    assert open_tensor_file(path).keys() == ["a"]


def test_what_stands_in_the_way_is_told_before_anything_is_written(tmp_path, monkeypatch):
    tensors = {"a": torch.ones(1000)}
    with pytest.raises(UserError, match=r"nowhere/x\.safetensors: the folder .*nowhere does not exist"):
        write_tensors(tmp_path / "nowhere" / "x.safetensors", tensors)
    with pytest.raises(UserError, match="is a folder"):
        write_tensors(tmp_path, tensors)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(UserError, match="no right to write"):
            write_tensors(tmp_path / "x.safetensors", tensors)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 2000))
    with pytest.raises(UserError, match="needs 0.0 MB, but only 0.0 MB are free"):
        write_tensors(tmp_path / "x.safetensors", tensors)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_while_writing_is_a_sentence(tmp_path, monkeypatch):
    def full(self: object, *args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="could not be written .No space left on device"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_what_the_system_refuses_while_writing_is_a_sentence_and_the_old_file_stays(name, tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / name).write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(UserError, match=f"{name}: could not be written .File too large"):
            write_tensors(tmp_path / name, {key: torch.ones(1 << 17) for key in "abcdefgh"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"old")]


def test_a_link_keeps_pointing_to_the_new_content(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "x.safetensors", tmp_path / "link.safetensors"
    write_tensors(target, {"a": torch.zeros(2)})
    link.symlink_to(target)
    write_tensors(link, {"a": torch.ones(2)})
    assert link.is_symlink()
    assert torch.equal(open_tensor_file(target).read("a"), torch.ones(2))


def test_files_get_ordinary_rights(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_torch_files_hold_counters_where_asked(tmp_path):
    from library.checkpoints.tensor_writing import write_torch_file

    plan = {"w": PlannedTensor((2,), "float32", lambda: torch.ones(2))}
    write_torch_file(tmp_path / "x.ckpt", plan, {"epoch": 2, "global_step": 30})
    content = torch.load(io.BytesIO((tmp_path / "x.ckpt").read_bytes()), weights_only=True)
    assert content["epoch"] == 2
    assert torch.equal(content["state_dict"]["w"], torch.ones(2))
