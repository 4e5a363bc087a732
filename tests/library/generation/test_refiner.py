"""The last steps by a second model: those of diffusers' pair of pipelines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from library.generation.pipeline import Pipeline
from library.generation.requests import ImageRequest
from tests.library.generation.conftest import REFINER, tiny_models
from tests.library.generation.diffusers_reference import ROUNDING, diffusers_pipeline

ASKED = ImageRequest(
    **{"prompt": "a red cat", "negative_prompt": "blurry", "width": 72, "height": 64, "seed": 1, "steps": 10, "scale": 4.0},
    refiner_start=0.6,
)


@pytest.fixture(scope="module")
def models():
    base = tiny_models("sdxl")
    return base, tiny_models(REFINER)


def drawn(models, refiner, request) -> np.ndarray:
    return np.asarray(Pipeline(models, refiner=refiner).generate([request])[0]) / 255


def test_pictures_are_those_of_diffusers_two_pipelines(models):
    base, refiner = models
    asked = {"prompt": ASKED.prompt, "negative_prompt": ASKED.negative_prompt, "num_inference_steps": ASKED.steps}
    asked |= {"guidance_scale": ASKED.scale}
    first = diffusers_pipeline(base, ASKED)
    sizes = {"width": ASKED.width, "height": ASKED.height}
    stream = torch.Generator().manual_seed(ASKED.seed)
    latents = first(**asked, **sizes, denoising_end=0.6, output_type="latent", generator=stream).images
    second = diffusers_pipeline(refiner, ASKED)
    told = {"original_size": (64, 72), "target_size": (64, 72)}
    expected = second(**asked, **told, image=latents, denoising_start=0.6, output_type="np").images[0]
    assert np.abs(drawn(base, refiner, ASKED) - expected).max() <= ROUNDING
    assert np.abs(drawn(base, None, ASKED) - expected).max() > 0.05


def test_it_makes_all_steps_or_none(models):
    base, refiner = models
    assert np.array_equal(drawn(base, refiner, replace(ASKED, refiner_start=1.0)), drawn(base, None, ASKED))
    all_steps = drawn(base, refiner, replace(ASKED, refiner_start=0.0))
    other = replace(ASKED, refiner_start=0.0, prompt_2="a house", prompt="nothing")
    assert np.array_equal(drawn(base, refiner, replace(other, prompt="a red cat")), drawn(base, refiner, other))
    assert not np.array_equal(all_steps, drawn(base, refiner, other))
