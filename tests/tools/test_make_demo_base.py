"""The demo's drawings, its model as shipped, and the two measures that judge pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.demo import check, drawings, mascot
from tools.demo.export import folder_bytes

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs" / "demo" / "base"
CONCEPT = ROOT / "configs" / "demo" / "concept"
MAX_BYTES = 20 * 2**20


def draw(shape: str = "ring", colour: str = "red", background: str = "white", **more: object) -> np.ndarray:
    thing = drawings.Thing(shape=shape, colour=colour, radius=23.0, size_word="large", **more)
    return drawings.render(drawings.Scene(things=(thing,), background=background))


@pytest.fixture(scope="module")
def pipeline():
    torch.set_grad_enabled(False)
    yield check.load_pipeline(BASE)
    torch.set_grad_enabled(True)


def test_a_seed_is_a_data_set() -> None:
    pictures, captions = drawings.draw_set(20, seed=5)
    again, same_captions = drawings.draw_set(20, seed=5)
    others, _ = drawings.draw_set(20, seed=6)
    assert captions == same_captions
    np.testing.assert_array_equal(pictures, again)
    assert not np.array_equal(pictures, others)


@pytest.mark.parametrize(
    "change",
    [{"shape": "star"}, {"colour": "blue"}, {"background": "grey"}, {"texture": "striped"}, {"x": 36.0}],
    ids=lambda change: next(iter(change)),
)
def test_every_attribute_shows(change: dict[str, object]) -> None:
    assert np.abs(draw(**change).astype(int) - draw()).mean() > 1.0


def test_captions_say_what_is_drawn() -> None:
    outer = drawings.Thing(shape="square", colour="blue", size_word="large")
    inner = drawings.Thing(shape="star", colour="orange", size_word="small", texture="outlined", second="black")
    scene = drawings.Scene(things=(outer, inner), background="white", relation="inside")
    expected = "a small orange star with a black outline inside a large blue square on a white background"
    assert drawings.caption(scene) == expected


def test_check_knows_right_from_wrong() -> None:
    asked = check.Answer(shape="ring", colour="red", background="white")
    assert check.is_right(draw(), asked)
    assert not check.is_right(draw(colour="blue"), asked)
    assert not check.is_right(draw(shape="circle"), asked)
    assert not check.is_right(draw(background="yellow"), asked)


def test_likeness_separates_the_mascot_from_other_drawings() -> None:
    mascots = [mascot.render_mascot(*view) for view in mascot.VIEWS]
    others, _ = drawings.draw_set(40, seed=7)
    assert mascot.concept_likeness(mascots) > 0.85
    assert mascot.concept_likeness(list(others)) < 0.1


@pytest.mark.parametrize(
    ("write", "shipped"),
    [(mascot.write_concept, CONCEPT), (drawings.write_regularisation, CONCEPT.with_name("regularisation"))],
)
def test_shipped_images_are_what_the_program_draws(write, shipped: Path, tmp_path: Path) -> None:
    assert write(tmp_path) == len(list(shipped.glob("*.png")))
    for file in sorted(tmp_path.glob("*.txt")):
        assert file.read_text() == (shipped / file.name).read_text()


def test_model_folder_is_small_and_complete(pipeline) -> None:
    assert folder_bytes(BASE) <= MAX_BYTES
    ids = pipeline.tokenizer("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert pipeline.tokenizer.pad_token_id == 49407


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_every_weight_is_loaded(part: str) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}[part]
    _, report = kind.from_pretrained(BASE / part, output_loading_info=True, local_files_only=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_shipped_model_obeys(pipeline) -> None:
    asked = check.random_answers(10, seed=11)
    pictures = check.generate(pipeline, [answer.prompt for answer in asked], seed=11)
    right = sum(seen == wanted for seen, wanted in zip(check.recognise(pictures), asked, strict=True))
    assert right >= 8


def test_help_is_quick_and_needs_no_torch() -> None:
    code = """
import runpy, sys
sys.argv, sys.modules["torch"] = ["make_demo_base.py", "--help"], None
runpy.run_path("tools/make_demo_base.py", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "export" in result.stdout
