"""The demo's training does what its contact sheet shows, on a run short enough for a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gen_img_diffusers
from tests.support.command_lines import ROOT, train_here
from tools.demo.mascot import concept_likeness

pytestmark = pytest.mark.filterwarnings("ignore")

DEMO = ROOT / "configs" / "demo"
PROMPTS = ["a large bibo on a white background --d 7", "a large bibo on a blue background --d 8"]


def pictures(folder: Path, *options: object) -> list[np.ndarray]:
    """The demo model's pictures of the prompts, (64, 64, 3) uint8."""
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    arguments = ["--ckpt", DEMO / "base", "--from_file", prompts, "--outdir", folder, "--W", 64, "--H", 64]
    arguments += ["--steps", 12, "--scale", 4, "--batch_size", 2, *options]
    assert gen_img_diffusers.main([str(argument) for argument in arguments]) == 0
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]


def test_a_short_training_brings_pictures_nearer_to_the_concept(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    finished = train_here(
        capsys,
        *("--config_file", DEMO / "train.toml", "--dataset_config", DEMO / "concept.toml"),
        *("--pretrained_model_name_or_path", DEMO / "base", "--output_dir", tmp_path, "--output_name", "short"),
        *("--max_train_steps", 120),
    )
    finished.require_success()
    base = concept_likeness(pictures(tmp_path / "base"))
    trained = concept_likeness(pictures(tmp_path / "trained", "--network_weights", tmp_path / "short.safetensors"))
    assert base < 0.1, "the base model has never seen the creature"
    assert trained > base + 0.2
