"""Adapter files are found by every name that people give them, and never by one that two of them have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints.tensor_files import open_tensor_file
from library.errors import UserError
from library.generation import lora_shelf
from library.generation.lora_listing import listing_lines
from library.generation.lora_shelf import LoraShelf

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
METADATA = {
    "ss_base_model_version": "sd_v1",
    "sshs_model_hash": "0123456789abcdef0123",
    "ss_tag_frequency": '{"10_sks dog": {"sks dog": 4, "grass": 3, "sky": 1}}',
}


def lora_tensors(rank: int = 4, layer: str = KEY, width: int = 768) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.lora_down.weight": torch.ones(rank, width),
        f"{layer}.lora_up.weight": torch.ones(320, rank),
        f"{layer}.alpha": torch.tensor(float(rank)),
    }


def put(path: Path, metadata: dict[str, str] | None = None, **shape) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora_tensors(**shape), path, metadata)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a file of each kind of place."""
    put(tmp_path / "plain.safetensors")
    put(tmp_path / "styles" / "ink" / "v1.5.wash.safetensors")
    put(tmp_path / "ink-000003.safetensors", {"ss_output_name": "inkwork"})
    torch.save(lora_tensors(), tmp_path / "old.pt")
    put(tmp_path / "peft" / "mine" / "adapter_model.safetensors")
    (tmp_path / "peft" / "mine" / "adapter_config.json").write_text("{}")
    (tmp_path / "peft" / "mine" / "optimizer.pt").write_bytes(b"no adapter")
    return tmp_path


NAMES = {
    "plain": "plain.safetensors",
    "plain.safetensors": "plain.safetensors",
    "old": "old.pt",
    "v1.5.wash": "styles/ink/v1.5.wash.safetensors",
    "v1_5_wash": "styles/ink/v1.5.wash.safetensors",
    "v1.5.wash.safetensors": "styles/ink/v1.5.wash.safetensors",
    "styles/ink/v1.5.wash": "styles/ink/v1.5.wash.safetensors",
    "styles/ink/v1.5.wash.safetensors": "styles/ink/v1.5.wash.safetensors",
    "inkwork": "ink-000003.safetensors",
    "mine": "peft/mine/adapter_model.safetensors",
    "peft/mine": "peft/mine/adapter_model.safetensors",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_found_by_each_of_its_names(folder, name):
    assert LoraShelf(folder).find(name, where="the prompt") == folder / NAMES[name]


def test_headers_are_read_only_for_names_that_no_file_has(folder, monkeypatch):
    opened = []

    def open_and_note(path):
        opened.append(path)
        return open_tensor_file(path)

    monkeypatch.setattr(lora_shelf, "open_tensor_file", open_and_note)
    shelf = LoraShelf(folder)
    for name in NAMES.keys() - {"inkwork"}:
        shelf.find(name, where="the prompt")
    assert opened == []
    shelf.find("inkwork", where="the prompt")
    shelf.find("inkwork", where="the prompt")
    assert len(opened) == len(set(opened)) == len(shelf.files)


def test_paths_need_no_folder(folder, tmp_path, monkeypatch):
    shelf = LoraShelf(None)
    assert shelf.find(str(folder / "plain.safetensors"), where="here") == folder / "plain.safetensors"
    monkeypatch.chdir(folder)
    assert shelf.find("plain.safetensors", where="here") == Path("plain.safetensors")
    assert shelf.find("peft/mine", where="here") == Path("peft/mine/adapter_model.safetensors")
    for name in ("plain", "styles", "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match=r"^here: there is no adapter .*; give the path of a file, or with --lora_dir"):
            shelf.find(name, where="here")


def test_an_unknown_name_is_answered_with_the_near_ones(folder):
    shelf = LoraShelf(folder)
    with pytest.raises(UserError, match=r"^line 3: there is no adapter 'plane' in --lora_dir .*; did you mean plain\?$"):
        shelf.find("plane", where="line 3")
    with pytest.raises(UserError, match=r"did you mean inkwork\?$"):
        shelf.find("inkwerk", where="line 3")
    with pytest.raises(UserError, match="known are .*plain, styles/ink/v1.5.wash"):
        shelf.find("zzz", where="line 3")


def test_many_names_are_not_listed_in_a_sentence(tmp_path):
    for number in range(30):
        put(tmp_path / f"adapter{number}.safetensors")
    with pytest.raises(UserError, match="--list_loras shows the 30 files"):
        LoraShelf(tmp_path).find("zzz", where="here")


def test_one_name_of_two_files_is_refused_with_both_and_their_paths_work(tmp_path):
    first, second = put(tmp_path / "cat.safetensors"), put(tmp_path / "old" / "cat.safetensors")
    shelf = LoraShelf(tmp_path)
    with pytest.raises(UserError, match=r"'cat' is the name of cat.safetensors, old/cat.safetensors; write the path"):
        shelf.find("cat", where="here")
    assert shelf.find("cat.safetensors", where="here") == first
    assert shelf.find("old/cat", where="here") == second
    for number in (1, 2):
        put(tmp_path / f"e{number}.safetensors", {"ss_output_name": "run"})
    with pytest.raises(UserError, match="'run' is the ss_output_name of e1.safetensors, e2.safetensors"):
        shelf.find("run", where="here")


def test_files_that_come_later_are_found(tmp_path):
    shelf = LoraShelf(tmp_path)
    with pytest.raises(UserError, match=r"holds no .safetensors, .pt, .ckpt files"):
        shelf.find("late", where="here")
    late = put(tmp_path / "late.safetensors")
    assert shelf.find("late", where="here") == late


def test_links_are_followed_and_circles_end(tmp_path):
    put(tmp_path / "elsewhere" / "far.safetensors")
    (tmp_path / "loras").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "loras" / "more")
    os.symlink(tmp_path / "loras", tmp_path / "loras" / "circle")
    put(tmp_path / "loras" / ".hidden" / "x.safetensors")
    assert [str(file.place) for file in LoraShelf(tmp_path / "loras").files] == ["more/far.safetensors"]


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_that_is_none_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^--lora_dir .*{name}: (no such folder|is a file, not a folder)"):
        LoraShelf(tmp_path / name)


def test_the_listing_tells_what_every_file_is(tmp_path):
    put(tmp_path / "dog.safetensors", METADATA)
    put(tmp_path / "dy.safetensors", {"ss_network_module": "networks.dylora"}, rank=8)
    put(tmp_path / "xl.safetensors", layer="lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", width=2048)
    mixed = lora_tensors() | {key.replace("to_k", "to_v"): value for key, value in lora_tensors(16).items()}
    save_file(mixed | {f"{KEY}.dora_scale": torch.ones(320, 1)}, tmp_path / "mixed.safetensors")
    kron = {"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(80, 2), "lokr_w2_b": torch.ones(2, 192)}
    save_file({f"{KEY}.{name}": value for name, value in kron.items()}, tmp_path / "kron.safetensors")
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "dog.safetensors").read_bytes()[:-100])
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "token.safetensors")

    entries = LoraShelf(tmp_path).entries()
    found = {entry.name: (entry.family, entry.algorithms, entry.ranks) for entry in entries}
    sd1 = "Stable Diffusion 1.x"
    assert found == {
        "broken": ("", (), ()),
        "dog": (sd1, ("LoRA",), (4,)),
        "dy": (sd1, ("DyLoRA",), (8,)),
        "kron": (sd1, ("LoKr",), (2,)),
        "mixed": (sd1, ("DoRA on LoRA", "LoRA"), (4, 16)),
        "token": ("", (), ()),
        "xl": ("Stable Diffusion XL", ("LoRA",), (4,)),
    }
    lines = listing_lines(entries)
    assert lines[0].split() == ["name", "family", "type", "rank", "size", "hash", "trigger", "words"]
    assert "is truncated: " in lines[1]
    assert lines[2].split(sd1)[1].split() == ["LoRA", "4", "0.0", "MB", "0123456789ab", "sks", "dog,", "grass"]
    assert "4-16" in lines[5]
    assert lines[6].endswith("holds no adapter")
    assert lines[-1] == "7 files, 2 of them no adapter that can be used"


def test_every_algorithm_shows_its_rank(tmp_path, sd1_models):
    import importlib

    ranks = {"lora": (2,), "dylora": (2,), "loha": (2,), "lokr": (2,), "glora": (2,), "ia3": (), "full": (), "oft": (2,)}
    for name in ranks:
        arguments = {"factor": "4"} if name == "lokr" else {}
        network = importlib.import_module(f"networks.{name}").create_network(
            1.0, 2, 1, None, sd1_models.text_encoders, sd1_models.denoiser, **arguments
        )
        network.save_weights(tmp_path / f"{name}.safetensors", torch.float32, {"ss_base_model_version": "sd_v1"})
    entries = {entry.name: entry for entry in LoraShelf(tmp_path).entries()}
    assert all(entry.fault is None for entry in entries.values())
    assert {name: entry.ranks for name, entry in entries.items()} == ranks


def test_names_in_the_listing_find_their_files(folder):
    put(folder / "styles" / "plain.safetensors")
    shelf = LoraShelf(folder)
    entries = shelf.entries()
    assert {"plain.safetensors", "styles/plain", "v1.5.wash", "mine"} <= {entry.name for entry in entries}
    assert all(shelf.find(entry.name, where="here") == entry.file for entry in entries)


def test_an_empty_folder_has_a_listing(tmp_path):
    assert listing_lines(LoraShelf(tmp_path).entries()) == ["0 files"]
    assert LoraShelf(None).entries() == []
