"""The metadata tool as a user runs it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_writing import write_tensors
from library.cli.doors import run_door
from tests.support.command_lines import Finished, assert_refused, run_script
from tools.show_metadata import work

METADATA = {
    "ss_network_dim": "4",
    "ss_training_started_at": "1700000000.5",
    "ss_tag_frequency": json.dumps({"10_cat": {"cat": 12, "sofa": 3}}),
    "ss_dataset_dirs": json.dumps({"10_cat": {"n_repeats": 10, "img_count": 12}}),
    "ss_training_comment": "my first one",
    "modelspec.title": "Cat",
    "note": "x" * 300,
}


@pytest.fixture
def lora(tmp_path) -> Path:
    path = tmp_path / "lora.safetensors"
    weights = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    write_tensors(path, {"a.lora_up.weight": weights, "a.alpha": torch.tensor(1.0)}, METADATA, add_hashes=True)
    return path


def run(capsys, *arguments: object) -> Finished:
    capsys.readouterr()
    status = run_door("show_metadata", work, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Finished(status, captured.out, captured.err)


def test_the_table_has_sections_and_readable_values(lora, capsys):
    shown = run(capsys, "--model", lora).require_success().out
    assert f"{lora}: 0.0 MB, 2 tensors (2 float32)" in shown
    assert [line for line in shown.splitlines() if line and not line.startswith((" ", str(lora)))] == [
        "ModelSpec",
        "training",
        "hashes of the tensors",
        "other",
    ]
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines() if line.startswith("  ")}
    assert lines["title"] == "Cat"
    assert lines["tag_frequency"] == "10_cat: cat 12, sofa 3"
    assert lines["dataset_dirs"] == "10_cat: 12 images x 10"
    assert lines["training_started_at"].startswith("2023-11-1")
    assert lines["note"].endswith("x... (300 characters; --json shows all)")


def test_json_has_everything_with_nested_values_as_such(lora, capsys):
    shown = json.loads(run(capsys, "--model", lora, "--json").require_success().out)
    assert shown["ss_tag_frequency"] == {"10_cat": {"cat": 12, "sofa": 3}}
    assert shown["note"] == "x" * 300
    assert list(shown) == sorted(shown)


def test_fields_are_set_and_removed_in_place_and_the_hash_stays(lora, tmp_path, capsys):
    before = sshs_hashes(lora)["sshs_model_hash"]
    picture = tmp_path / "p.png"
    Image.new("RGB", (4, 4)).save(picture)
    done = run(
        capsys,
        *("--model", lora, "--set", "author=me", "title=My cat = best", "--set", f"thumbnail={picture}"),
        *("--remove", "ss_training_comment", "--remove=note"),
    ).require_success()
    metadata = open_tensor_file(lora).metadata
    assert (metadata["modelspec.author"], metadata["modelspec.title"]) == ("me", "My cat = best")
    assert base64.b64decode(metadata["modelspec.thumbnail"].partition(",")[2]) == picture.read_bytes()
    assert not {"ss_training_comment", "note"} & metadata.keys()
    assert metadata["sshs_model_hash"] == sshs_hashes(lora)["sshs_model_hash"] == before
    assert metadata["sshs_legacy_hash"] == sshs_hashes(lora)["sshs_legacy_hash"]
    assert "~ modelspec.title My cat = best" in done.out
    assert done.last_line == f"{lora}: 5 fields changed; the tensors are the same (SHA-256 {before})"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lora.safetensors", "p.png"]
    assert run(capsys, "--model", lora, "--set", "author=me").last_line == f"{lora}: all is so already"


def test_private_fields_are_stripped_into_another_file(lora, tmp_path, capsys):
    content = lora.read_bytes()
    clean = tmp_path / "clean.safetensors"
    run(capsys, "--model", lora, "--strip_private", "--remove", "ss_training_comment", "--save_to", clean).require_success()
    assert lora.read_bytes() == content
    assert set(open_tensor_file(clean).metadata) == {
        *("ss_network_dim", "modelspec.title", "note", "sshs_model_hash", "sshs_legacy_hash"),
    }


def test_two_files_are_compared(lora, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    write_tensors(other, {"a.lora_up.weight": torch.ones(64, 64), "b": torch.ones(1)}, {"ss_network_dim": "8"})
    shown = run(capsys, "--model", lora, "--compare", other).require_success().out
    for part in ("    - 4\n    + 8\n", "1 only in the first: a.alpha", "1 only in the second: b", "1 of other values"):
        assert part in shown
    found = json.loads(run(capsys, "--model", lora, "--compare", other, "--json").out)
    assert found["metadata"]["ss_network_dim"] == ["4", "8"]
    mine = open_tensor_file(lora).read("a.lora_up.weight").double()
    assert found["relative_difference"] == pytest.approx(((mine - 1).norm() / mine.norm()).item())
    same = json.loads(run(capsys, "--model", lora, "--compare", lora, "--json").out)
    assert (same["metadata"], same["same_tensors"], same["relative_difference"]) == ({}, 2, 0)
    write_tensors(other, {"a.lora_up.weight": torch.full((64, 64), torch.nan), "a.alpha": torch.tensor(1.0)})
    assert json.loads(run(capsys, "--model", other, "--compare", other, "--json").out)["same_tensors"] == 2


def test_checkpoints_are_edited_too_and_pytorch_files_say_that_they_hold_none(tiny_sd1_file, tmp_path, capsys):
    run(capsys, "--model", tiny_sd1_file, "--set", "license=mine", "--save_to", tmp_path / "m.safetensors").require_success()
    assert open_tensor_file(tmp_path / "m.safetensors").metadata["modelspec.license"] == "mine"
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "m.ckpt")
    shown = run(capsys, "--model", tmp_path / "m.ckpt").require_success()
    assert shown.last_line == "no metadata: only .safetensors files hold any"
    assert json.loads(run(capsys, "--model", tmp_path / "m.ckpt", "--json").out) == {}
    assert_refused(
        run(capsys, "--model", tmp_path / "m.ckpt", "--set", "author=me"), "only .safetensors files hold metadata"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "{lora}", "--set", "author"], "--set: 'author' is not key=value"),
        (["--model", "{lora}", "--set", "auther=me"], "--set auther: unknown field; did you mean author?"),
        (["--model", "{lora}", "--set", "thumbnail=none.png"], "--set thumbnail=none.png: is neither an image file"),
        (["--model", "{lora}", "--remove", "ss_dim"], "--remove ss_dim: no such field"),
        (["--model", "{lora}", "--save_to", "x.safetensors"], "--save_to x.safetensors: nothing is edited"),
        (["--model", "{lora}", "--strip_private", "--save_to", "x.ckpt"], "only .safetensors files hold metadata"),
        (["--model", "{lora}", "--strip_private", "--save_to", "{lora}"], "is the file itself"),
        (["--model", "{lora}", "--strip_private", "--compare", "{lora}"], "compares and edits exclude each other"),
        (["--model", "{lora}x"], "no such file"),
        (["--json"], "--model: name the file"),
    ],
)
def test_mistakes_are_sentences_and_the_file_stays(arguments, sentence, lora, tmp_path, capsys):
    content = lora.read_bytes()
    assert_refused(run(capsys, *(argument.format(lora=lora) for argument in arguments)), sentence)
    assert lora.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["lora.safetensors"]


def test_the_door_runs_from_any_folder(lora, tmp_path):
    finished = run_script("tools/show_metadata.py", "--model", lora.name, cwd=tmp_path).require_success()
    assert finished.err == ""
    assert "Cat" in finished.out
