"""An adapter file acts in our pipeline as it does in diffusers with peft."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.generation.adapters import AdapterKey, AdapterRack
from library.generation.loading import load_rack
from library.generation.options import AdapterOptions, NetworkUse
from library.generation.pipeline import Pipeline, PipelineModels
from library.generation.requests import ImageRequest
from library.prompts.strengths import AdapterStrength
from networks import lora
from tests.library.generation.conftest import tiny_models
from tests.library.generation.diffusers_reference import ROUNDING, diffusers_picture

ASKED = ImageRequest(prompt="a red cat", negative_prompt="blurry", width=64, height=64, seed=1, steps=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory, sd1_models):
    """Two LoRA files with convolutions, whose every tensor acts."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = []
    for number in range(2):
        network = lora.create_network(
            1.0, 4, 2, sd1_models.vae, sd1_models.text_encoders, sd1_models.denoiser, conv_dim="4", conv_alpha="4"
        )
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_up" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        paths.append(folder / f"adapter{number}.safetensors")
        network.save_weights(paths[-1], torch.float32, None)
    return paths


@pytest.fixture
def models(sd1_models) -> PipelineModels:
    return PipelineModels(
        **vars(sd1_models)
        | {"denoiser": deepcopy(sd1_models.denoiser), "text_encoders": [deepcopy(sd1_models.text_encoders[0])]}
    )


@pytest.fixture(scope="module")
def plain(sd1_models) -> np.ndarray:
    """The picture without adapters."""
    (picture,) = Pipeline(sd1_models).generate([ASKED])
    return np.asarray(picture) / 255


def draw(models, files, strengths, *, merge=False):
    networks = tuple(NetworkUse(file=f, strength=s) for f, s in zip(files, strengths, strict=True))
    rack = load_rack(AdapterOptions(networks=networks, merged=len(networks) if merge else 0), models)
    (picture,) = Pipeline(models, rack=rack).generate([ASKED])
    return np.asarray(picture) / 255


def peft_picture(models, files, strengths):
    def load(pipeline):
        for number, file in enumerate(files):
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{number}")
        pipeline.set_adapters([f"a{number}" for number in range(len(files))], adapter_weights=list(strengths))
        return {}

    return diffusers_picture(models, ASKED, load)


@pytest.mark.parametrize(("strengths", "merge"), [((1.0,), False), ((-0.7,), True), ((1.0, 0.4), False), ((1.0, 0.4), True)])
def test_pictures_with_adapters_are_those_of_diffusers(plain, models, files, strengths, merge):
    used = files[: len(strengths)]
    picture = draw(models, used, strengths, merge=merge)
    expected = peft_picture(tiny_models("sd1"), used, strengths)
    assert np.abs(plain - picture).mean() > 0.01, "the adapter must act, or this test says nothing"
    assert np.abs(picture - expected).max() <= ROUNDING


def test_a_strength_of_zero_is_the_base_model(plain, models, files):
    assert np.array_equal(plain, draw(models, files[:1], (0.0,)))


class OneStrength:
    """A network as those of other packages are."""

    def __init__(self) -> None:
        self.multiplier = 1.0

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier


def test_a_network_of_one_strength_refuses_rows_of_two_every_time():
    network, key = OneStrength(), AdapterKey(Path("other.safetensors"), given=0)
    rack = AdapterRack()
    rack.add(key, network)
    half, whole = ({key: (AdapterStrength.constant(value),)} for value in (0.5, 1.0))
    rack.set_denoiser([half, half], 0, 4)
    assert network.multiplier == 0.5
    for _ in range(2):  # a picture that failed is no reason to draw the next one wrongly
        with pytest.raises(UserError, match="only one strength at a time"):
            rack.set_denoiser([half, whole], 0, 4)
    rack.set_denoiser([whole, whole], 0, 4)
    assert network.multiplier == 1.0
