"""Editing the header of a safetensors file: fields change, tensors do not, and nothing private stays."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.metadata_editing import (
    PRIVATE_FIELDS,
    with_fields,
    without_fields,
    without_private,
    write_metadata,
)
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_writing import write_tensors
from library.errors import UserError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(300_000, dtype=torch.float16),
    "empty": torch.zeros(0, 4),
    "fp8": torch.ones(5).to(torch.float8_e4m3fn),
}


def data_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.mark.parametrize("theirs", [False, True], ids=["our writer", "safetensors' own"])
def test_the_tensors_stay_byte_for_byte_and_other_programs_read_the_file(theirs, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, {"old": "x"}) if theirs else write_tensors(path, TENSORS, {"old": "x"})
    before = data_of(path)
    hashed = write_metadata(open_tensor_file(path), {"new": "ü\n" * 40}, path)
    assert data_of(path) == before
    assert hashed == hashlib.sha256(before).hexdigest() == sshs_hashes(path)["sshs_model_hash"]
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"new": "ü\n" * 40}
    assert all(torch.equal(value.float(), TENSORS[key].float()) for key, value in load_file(path).items())


def test_the_tensor_hash_stays_and_the_short_one_follows_the_training_fields(tmp_path):
    path = tmp_path / "a.safetensors"
    noise = torch.rand(700_000, generator=torch.Generator().manual_seed(0))
    write_tensors(path, {"w": noise}, {"ss_comment": "x", "title": "t"}, add_hashes=True)
    first = open_tensor_file(path).metadata
    write_metadata(open_tensor_file(path), {**first, "title": "a longer title"}, path)
    assert {**open_tensor_file(path).metadata, "title": "t"} == first
    write_metadata(open_tensor_file(path), {**first, "ss_comment": "x" * 5000}, path)
    third = open_tensor_file(path).metadata
    assert third["sshs_model_hash"] == first["sshs_model_hash"]
    assert third["sshs_legacy_hash"] != first["sshs_legacy_hash"]
    write_tensors(tmp_path / "b.safetensors", {"w": noise}, {"ss_comment": "x" * 5000, "title": "t"}, add_hashes=True)
    assert open_tensor_file(tmp_path / "b.safetensors").metadata == third


def test_a_file_without_tensors_in_order_is_refused_and_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes() + b"more")
    content = path.read_bytes()
    with pytest.raises(UserError, match="there are bytes behind the last tensor"):
        write_metadata(open_tensor_file(path), {"a": "b"}, path)
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_modelspec_fields_go_by_name_and_misspelt_ones_are_refused():
    changed = with_fields(
        {"title": "own"}, {"author": "me", "title": "t", "modelspec.tags": "a", "ss_x": "1"}, where="--set"
    )
    assert changed == {"title": "t", "modelspec.author": "me", "modelspec.tags": "a", "ss_x": "1"}
    for name, near in {"auther": "author", "modelspec.licence": "license"}.items():
        with pytest.raises(UserError, match=f"unknown field; did you mean {near}"):
            with_fields({}, {name: "me"}, where="--set")
    with pytest.raises(UserError, match="--set sshs_model_hash: is computed from the tensors"):
        with_fields({}, {"sshs_model_hash": "0"}, where="--set")


def test_removing_takes_patterns_and_refuses_what_is_not_there():
    metadata = {"ss_a": "1", "ss_b": "2", "modelspec.author": "me", "x": "y"}
    assert without_fields(metadata, ["ss_*", "author"], where="--remove") == {"x": "y"}
    with pytest.raises(UserError, match="--remove ss_c: no such field; did you mean"):
        without_fields(metadata, ["ss_c"], where="--remove")


PATHS = ("/home/anna/models/v1-5.safetensors", r"C:\Users\anna\models\v1-5.safetensors", "~/anna/v1-5.safetensors")


def test_nothing_private_stays():
    datasets = [
        {
            "resolution": [512, 512],
            "tag_frequency": {"anna": {"red hair": 3}},
            "subsets": [{"image_dir": "anna", "img_count": 3}],
        }
    ]
    metadata = {
        **{key: "anna" for key in PRIVATE_FIELDS},
        "ss_datasets": json.dumps(datasets),
        "ss_network_args": json.dumps({"preset": PATHS[0], "windows": PATHS[1], "conv_dim": "4"}),
        **{f"ss_sd_model_name_{number}": path for number, path in enumerate(PATHS)},
        "ss_vae_name": "/home/anna/my models/vae.pt",
        "note": "see /home/anna/notes/a.txt and https://example.org/models/page",
    }
    kept = without_private(metadata)
    assert "anna" not in json.dumps(kept)
    assert json.loads(kept["ss_datasets"]) == [{"resolution": [512, 512], "subsets": [{"img_count": 3}]}]
    assert json.loads(kept["ss_network_args"]) == {
        "preset": "v1-5.safetensors",
        "windows": "v1-5.safetensors",
        "conv_dim": "4",
    }
    assert {kept[f"ss_sd_model_name_{number}"] for number in range(3)} == {"v1-5.safetensors"}
    assert kept["ss_vae_name"] == "vae.pt"
    assert kept["note"] == "see a.txt and https://example.org/models/page"


def test_what_is_not_private_stays_as_it_is():
    letters = random.Random(0)
    metadata = {
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.thumbnail": "data:image/jpeg;base64,/9j/4AAQ/" + "".join(letters.choices("abc/+", k=200)),
        "modelspec.description": "red/green/blue, 1/2/3, and/or w/ more; a / b",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.999))",
        "ss_bucket_info": '{"buckets": {"0": {"resolution": [512, 512], "count": 3}}}',
    }
    assert without_private(metadata) == metadata
