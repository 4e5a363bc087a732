"""Hashes as other programs compute them, remembered while the file stays the same; ModelSpec fields; the tokenizer table."""

from __future__ import annotations

import hashlib
import os
from datetime import datetime

import pytest
import torch

from library.checkpoints import hashes
from library.checkpoints.metadata import ModelDescription, modelspec_metadata, read_modelspec
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_writing import write_tensors
from library.checkpoints.tokenizers import clip_merges, clip_vocabulary, shipped_tokenizer
from library.families.sd1 import SD1
from library.families.sd2 import SD2


def test_model_hashes_are_the_web_uis(tmp_path):
    path = tmp_path / "model.ckpt"
    content = os.urandom(0x100000 + 0x20000)
    path.write_bytes(content)
    assert hashes.legacy_model_hash(path) == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert hashes.sha256_of_file(path) == hashlib.sha256(content).hexdigest()
    path.write_bytes(b"short")
    assert hashes.legacy_model_hash(path) == "e3b0c442"
    for compute in (hashes.legacy_model_hash, hashes.sha256_of_file):
        assert compute(tmp_path) == "IsADirectory"
        assert compute(tmp_path / "none") == "NOFILE"


def test_a_file_is_hashed_once_and_again_when_it_changed(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    computed = []

    def value() -> str:
        computed.append(1)
        return f"value {len(computed)}"

    assert hashes.remembered("test", [path], value) == "value 1"
    assert hashes.remembered("test", [path], value) == "value 1"
    assert hashes.remembered("other purpose", [path], value) == "value 2"
    path.write_bytes(b"three")
    assert hashes.remembered("test", [path], value) == "value 3"


def test_a_damaged_or_forbidden_memory_is_no_obstacle(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory = tmp_path / "lora-toolkit" / "hashes.json"
    memory.parent.mkdir()
    memory.write_text("{damaged")
    assert hashes.sha256_of_file(path) == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file: no folder can be made in it
    assert hashes.sha256_of_file(path) == hashlib.sha256(b"one").hexdigest()


def test_adapter_hashes_are_recomputed_from_a_file_as_they_were_written(tmp_path):
    path, edited = tmp_path / "x.safetensors", tmp_path / "edited.safetensors"
    tensors = {"a": torch.randn(400_000), "b": torch.randn(10).half()}
    write_tensors(path, tensors, {"ss_network_dim": "4"}, add_hashes=True)
    written = {key: text for key, text in open_tensor_file(path).metadata.items() if key.startswith("sshs_")}
    assert hashes.sshs_hashes(path) == written
    write_tensors(edited, tensors, {"ss_network_dim": "4", "modelspec.title": "a title of another length"})
    assert hashes.sshs_hashes(edited) == written


def test_modelspec_fields_are_those_of_the_specification():
    fields = modelspec_metadata(
        SD2,
        "v_prediction",
        ModelDescription(title="Mascot", tags="a, b"),
        saved_at=datetime(2024, 5, 6, 7, 8, 9, 123),
        adapter=True,
        clip_skip=2,
        timestep_range=(0, 500),
    )
    assert fields == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "Mascot",
        "modelspec.resolution": "768x768",
        "modelspec.date": "2024-05-06T07:08:09",
        "modelspec.prediction_type": "v",
        "modelspec.encoder_layer": "2",
        "modelspec.timestep_range": "0,500",
        "modelspec.tags": "a, b",
    }
    assert read_modelspec(fields | {"ss_v2": "True"})["title"] == "Mascot"
    checkpoint = modelspec_metadata(SD1, "epsilon", ModelDescription(), saved_at=datetime(2024, 1, 1), resolution=(640, 512))
    assert checkpoint["modelspec.architecture"] == "stable-diffusion-v1"
    assert checkpoint["modelspec.resolution"] == "640x512"


def test_the_vocabulary_follows_from_the_merges():
    vocabulary = clip_vocabulary()
    assert len(clip_merges()) == 48_894
    assert len(vocabulary) == 49_408
    assert list(vocabulary.values()) == list(range(49_408))
    known = {"!": 0, "!</w>": 256, "in": 512, "cat</w>": 2368, "<|startoftext|>": 49_406, "<|endoftext|>": 49_407}
    assert {token: vocabulary[token] for token in known} == known


@pytest.mark.parametrize("family", [SD1, SD2], ids=["sd1", "sd2"])
def test_the_shipped_tokenizer_reads_the_published_example_and_pads_as_its_family(family):
    tokenizer = shipped_tokenizer(family.text_encoders[0])
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A  Photo\nOF a CAT").input_ids == tokenizer("a photo of a cat").input_ids
    assert tokenizer.pad_token_id == family.text_encoders[0].pad_token_id
    assert tokenizer.decode(tokenizer("Ünïcode 猫 🐈").input_ids, skip_special_tokens=True).replace(" ", "") == "ünïcode猫🐈"


def test_importing_these_rooms_is_cheap():
    """Doors import them for --help: no torch, no diffusers, no transformers. Torch's own kinds of layers come when used."""
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parents[3]
    rooms = [root / "library" / room for room in ("checkpoints", "families")]
    paths = [path for room in rooms for path in room.glob("*.py") if path.stem != "packed_weights"]
    modules = [f"library.{path.parent.name}.{path.stem}" for path in paths]
    program = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\nprint(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "numpy", "diffusers", "transformers", "huggingface_hub", "safetensors"):
        assert f"'{heavy}'" not in loaded
