"""A compiled U-Net draws what the plain one does, with adapters in the weights and with those that stand on it as hooks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from library.generation.compiling import CompiledDenoiser
from library.generation.loading import load_rack
from library.generation.options import AdapterOptions
from library.generation.pipeline import Pipeline, PipelineModels
from library.generation.requests import ImageRequest
from networks import lora
from tests.library.generation.conftest import tiny_models

ASKED = ImageRequest(prompt="a red cat", width=64, height=64, seed=1, steps=2, scale=3.0)
PROMPTS = ("a red cat<lora:it:0.2@0,1@1>", "a red cat", "a red cat<lora:it:1>", "a red cat<lora:it:0.5:stop=1>", "a red cat")


@pytest.fixture
def models() -> PipelineModels:
    return tiny_models("sd1")


@pytest.fixture
def file(models, tmp_path):
    network = lora.create_network(1.0, 4, 4, None, models.text_encoders, models.denoiser)
    stream = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=stream)
    network.save_weights(tmp_path / "it.safetensors", torch.float32, {})
    return tmp_path / "it.safetensors"


def draw(models, file, compiled=None, batch_size=1) -> list[np.ndarray]:
    rack = load_rack(AdapterOptions(merge_for_batches=compiled is not None), models, find=lambda _: file)
    requests = [replace(ASKED, prompt=prompt) for prompt in PROMPTS]
    pictures = Pipeline(models, rack=rack, compiled=compiled).generate(requests, batch_size=batch_size)
    return [np.asarray(picture).astype(int) for picture in pictures]


def test_every_picture_is_that_of_the_plain_denoiser(models, file):
    expected, notes, graphs = draw(models, file), [], []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = CompiledDenoiser(models.denoiser, backend=backend, note=notes.append)
    for batch_size in (1, 5):
        for one, other in zip(draw(models, file, compiled, batch_size), expected, strict=True):
            assert np.abs(one - other).max() <= 1
    assert graphs, "the blocks must be compiled, or this test says nothing"
    assert not notes
    assert all(np.abs(adapted - expected[1]).mean() > 1 for adapted in (expected[0], expected[2], expected[3]))


def test_what_cannot_be_compiled_is_told_once_and_computed_plainly(models, file):
    expected, notes = draw(models, file), []

    def backend(_graph, _inputs):
        raise RuntimeError("no compiler in\nreach")

    compiled = CompiledDenoiser(models.denoiser, backend=backend, note=notes.append)
    for one, other in zip(draw(models, file, compiled), expected, strict=True):
        assert np.abs(one - other).max() <= 1
    (note,) = notes
    assert "cannot be compiled here" in note
    assert "no compiler in" in note
    assert "\n" not in note
