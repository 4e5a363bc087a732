"""The Python example of sd-scripts' documentation, from its imports to the picture, and what its comments promise."""

from __future__ import annotations

import sys
from itertools import permutations

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.families.sd1 import SD1
from networks import lora
from networks.formats.keys import to_original, to_peft
from networks.lora import LoRAModule, create_network_from_weights
from tests.networks.test_interchange import pipeline

STRENGTHS = (0.5, 0.7, 0.5)
OLD = {"A": "lora_linear_layer.down", "B": "lora_linear_layer.up"}


@pytest.fixture
def pipe(tiny_sd1_folder):
    return pipeline(tiny_sd1_folder)


def picture(pipe, mixed_precision: bool = True) -> torch.Tensor:
    """As in the example, on the CPU."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed_precision):
        noise = torch.Generator().manual_seed(1)
        images = pipe("a red ball", num_inference_steps=2, generator=noise, height=64, width=64, output_type="np").images
    return torch.from_numpy(images[0])


def trained(models, perturb) -> list[dict[str, torch.Tensor]]:
    """The tensors of three networks, with alpha = rank."""
    networks = [
        lora.create_network(1.0, 4, 4, None, models.text_encoder, models.unet, conv_dim=2, conv_alpha=2) for _ in "abc"
    ]
    return [
        {key: value.detach().half() for key, value in perturb(network, number, 0.08).file_tensors().items()}
        for number, network in enumerate(networks)
    ]


def stored(tensors, layout, path):
    """One LoRA file in a layout; returns what `load_file` or `torch.load` gives."""
    if layout == "original names":
        tensors = to_original(tensors, SD1)
    elif layout in ("PEFT", "old diffusers"):
        tensors, _ = to_peft(tensors, SD1)
    if layout == "old diffusers":
        tensors = {key.replace("lora_A", OLD["A"]).replace("lora_B", OLD["B"]): value for key, value in tensors.items()}
    if layout == ".ckpt":
        torch.save(tensors, path)
        return torch.load(path, weights_only=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return load_file(path)


@pytest.fixture(params=["kohya", "PEFT"])
def weights(request, sd1, perturb, tmp_path):
    """The tensors of three files."""
    return [stored(tensors, request.param, tmp_path / "lora") for tensors in trained(sd1, perturb)]


def test_the_documentations_example(pipe, weights):
    device = "cpu"
    pipe = pipe.to(device)
    vae = pipe.vae
    text_encoder = pipe.text_encoder
    unet = pipe.unet
    plain = picture(pipe)

    pictures, networks = [plain], []
    for sd, strength in zip(weights, STRENGTHS, strict=True):
        network, sd = create_network_from_weights(strength, None, vae, text_encoder, unet, sd)
        network.apply_to(text_encoder, unet)
        network.load_state_dict(sd)
        network.to(device, dtype=torch.float16)
        pictures.append(picture(pipe))
        networks.append(network)
        assert isinstance(network.adapter(next(iter(network.targets))), LoRAModule)
    assert all((one - other).abs().max() > 1e-3 for one, other in permutations(pictures, 2)), "each of them acts"

    networks[0].set_multiplier(0.8)
    assert (picture(pipe) - pictures[3]).abs().max() > 1e-3
    networks[0].set_multiplier(0.5)
    assert torch.equal(picture(pipe), pictures[3])
    for network in networks:
        network.set_multiplier(0)
    assert torch.equal(picture(pipe), plain)

    for network, strength in zip(networks, STRENGTHS, strict=True):
        network.set_multiplier(strength)
    networks[1].detach()
    networks[2].detach()
    assert torch.equal(picture(pipe), pictures[1])
    networks[0].detach()
    assert torch.equal(picture(pipe), plain)


@pytest.mark.parametrize("weights", ["PEFT"], indirect=True)
def test_merging_instead_gives_the_same_picture(pipe, weights):
    def attached(sd, strength):
        network, sd = create_network_from_weights(strength, None, pipe.vae, pipe.text_encoder, pipe.unet, sd)
        network.apply_to(pipe.text_encoder, pipe.unet)
        network.load_state_dict(sd)
        return network

    networks = [attached(*pair) for pair in zip(weights, STRENGTHS, strict=True)]
    expected = picture(pipe, mixed_precision=False)
    for network in networks:
        network.detach()
    plain = picture(pipe, mixed_precision=False)
    for sd, strength in zip(weights, STRENGTHS, strict=True):
        network, sd = create_network_from_weights(strength, None, pipe.vae, pipe.text_encoder, pipe.unet, sd)
        network.merge_to(pipe.text_encoder, pipe.unet, sd)
    merged = picture(pipe, mixed_precision=False)
    assert (merged - expected).abs().max() < 1e-4 < 0.02 < (merged - plain).abs().mean()


@pytest.mark.parametrize("weights", ["kohya"], indirect=True)
def test_merged_networks_leave_the_weights_as_they_were(pipe, weights):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    plain = picture(pipe)
    networks = [create_network_from_weights(0.7, None, None, pipe.text_encoder, pipe.unet, sd)[0] for sd in weights]
    for network in networks:
        network.merge()
    assert not torch.equal(picture(pipe), plain)
    for network in reversed(networks):
        network.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert torch.equal(picture(pipe), plain)


@pytest.mark.parametrize("layout", ["kohya", ".ckpt", "PEFT", "old diffusers", "original names"])
def test_every_layout_makes_the_same_network(sd1, perturb, tmp_path, layout):
    """Also by `load_state_dict` with what was read, under its names there."""
    first, second, _ = trained(sd1, perturb)
    read = stored(first, layout, tmp_path / "lora")
    network, ours = create_network_from_weights(1.0, None, None, sd1.text_encoder, sd1.unet, read)
    other, _ = create_network_from_weights(1.0, None, None, sd1.text_encoder, sd1.unet, second)
    other.load_state_dict(read)
    for found in (ours, network.state_dict(), other.state_dict()):
        assert found.keys() == first.keys()
        assert all(torch.equal(value, first[key].float()) for key, value in found.items())


def test_a_file_beside_its_tensors_gives_the_metadata(sd1, perturb, tmp_path):
    network = perturb(lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet))
    tensors, metadata = to_peft(network.file_tensors(), SD1)
    path = tmp_path / "peft.safetensors"
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path, metadata)
    for file, scale in ((str(path), 0.25), (None, 1.0)):
        read, _ = create_network_from_weights(1.0, file, None, sd1.text_encoder, sd1.unet, load_file(path))
        assert {adapter.scale for _, adapter in read.items()} == {scale}


def test_names_of_sd_scripts_can_be_imported():
    assert issubclass(lora.LoRANetwork, torch.nn.Module)
    assert issubclass(lora.LoRAInfModule, lora.LoRAModule)
    assert "torchvision" not in sys.modules
