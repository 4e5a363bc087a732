"""An adapter file acts in our pipeline as it does in diffusers with peft."""

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

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


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def base_models(kind) -> PipelineModels:
    return tiny_models(kind)


@pytest.fixture(scope="module")
def files(tmp_path_factory, base_models):
    """Two LoRA files with convolutions, whose every tensor acts."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = []
    for number in range(2):
        network = lora.create_network(
            1.0, 4, 2, base_models.vae, base_models.text_encoders, base_models.denoiser, conv_dim="4", conv_alpha="4"
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
def models(base_models) -> PipelineModels:
    return PipelineModels(
        **vars(base_models)
        | {"denoiser": deepcopy(base_models.denoiser), "text_encoders": deepcopy(list(base_models.text_encoders))}
    )


@pytest.fixture(scope="module")
def plain(base_models) -> np.ndarray:
    """The picture without adapters."""
    (picture,) = Pipeline(base_models).generate([ASKED])
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
def test_pictures_with_adapters_are_those_of_diffusers(kind, plain, models, files, strengths, merge):
    used = files[: len(strengths)]
    picture = draw(models, used, strengths, merge=merge)
    expected = peft_picture(tiny_models(kind), used, strengths)
    assert np.abs(plain - picture).mean() > 0.01, "the adapter must act, or this test says nothing"
    assert np.abs(picture - expected).max() <= ROUNDING


def test_a_strength_of_zero_is_the_base_model(plain, models, files):
    assert np.array_equal(plain, draw(models, files[:1], (0.0,)))


SECTIONS = {"down_blocks": 0.5, "mid_block": 0.25, "up_blocks": 0.75}
LBW = {12: "1,1,0,0.5,0,0.25,1,0,1,1,0.5,1", 17: "1,1,0,0.5,0,1,0.5,0.25,1,0,1,1,0.5,1,0,1,0.3"}


def strength_of(path: str, kind: str, argument: str) -> float:
    """By the name of a layer's module, in words of its own."""
    if argument.startswith("in="):
        return next(value for name, value in SECTIONS.items() if path.startswith(name))
    count, values = (12, LBW[12]) if kind == "sdxl" else (17, LBW[17])
    numbers = list(map(float, values.split(",")))
    named = {
        12: {
            "down": {(1, 0): 1, (1, 1): 2, (2, 0): 3, (2, 1): 4},
            "up": {(b, i): 6 + 3 * b + i for b in (0, 1) for i in range(3)},
        },
        17: {
            "down": {(b, i): 1 + 2 * b + i for b in range(3) for i in range(2)},
            "up": {(b, i): 8 + 3 * (b - 1) + i for b in (1, 2, 3) for i in range(3)},
        },
    }[count]
    if path.startswith("mid_block"):
        return numbers[5 if count == 12 else 7]
    side, block, layer = re.match(r"(down|up)_blocks\.(\d+)\.(?:resnets|attentions)\.(\d+)", path).groups()
    place = named[side].get((int(block), int(layer)))
    return 1.0 if place is None else numbers[place]


@pytest.mark.parametrize("argument", ["in=0.5:mid=0.25:out=0.75", "lbw=LBW"])
def test_blocks_have_their_own_strengths(kind, models, files, argument):
    """Against strengths that are set layer by layer; LierLa's layers, since resampling has places of its own."""
    network = lora.create_network(1.0, 4, 2, None, models.text_encoders, models.denoiser)
    network.load_state_dict(load_file(files[0]), strict=False)
    network.apply_to(models.text_encoders, models.denoiser, True, True)
    for target, adapter in network.items():
        adapter.set_strength(strength_of(target.path, kind, argument) if target.part == "denoiser" else 1.0)
    (expected,) = Pipeline(models).generate([ASKED])
    network.detach()
    network.save_weights(file := files[0].with_name("lierla.safetensors"), torch.float32, None)
    rack = load_rack(AdapterOptions(), models, find=lambda _: file)
    values = LBW[12 if kind == "sdxl" else 17]
    tag = f"<lora:lierla:1:{argument.replace('LBW', values)}>"
    (picture,) = Pipeline(models, rack=rack).generate([replace(ASKED, prompt=ASKED.prompt + tag)])
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max() <= 1


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
