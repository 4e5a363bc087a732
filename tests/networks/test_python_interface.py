"""The Python example of sd-scripts' documentation, from its imports to the picture, and what its comments promise."""

from __future__ import annotations

import sys
from itertools import permutations

import pytest
import torch
from safetensors.torch import load_file, save_file

from networks import lora
from networks.core.keys import to_original, to_peft
from networks.lora import LoRAModule, create_network_from_weights
from tests.networks.test_interchange import pipeline

STRENGTHS = (0.5, 0.7, 0.5)
OLD_NAMES = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}


@pytest.fixture
def pipe(tiny_sd1_folder):
    return pipeline(tiny_sd1_folder)


def picture(pipe) -> torch.Tensor:
    """As in the example, on the CPU."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        noise = torch.Generator().manual_seed(1)
        images = pipe("a red ball", num_inference_steps=2, generator=noise, height=64, width=64, output_type="np").images
    return torch.from_numpy(images[0])


def stored(tensors, layout, path):
    """One LoRA file in a layout, with alpha = rank; returns what `load_file` or `torch.load` gives."""
    from library.families.sd1 import SD1

    if layout == "original names":
        tensors = to_original(tensors, SD1)
    elif layout != "kohya" and layout != ".ckpt":
        tensors, _ = to_peft(tensors, SD1)
        if layout == "old diffusers":
            tensors = {
                key.replace("lora_A", OLD_NAMES["lora_A"]).replace("lora_B", OLD_NAMES["lora_B"]): value
                for key, value in tensors.items()
            }
    tensors = {key: value.to(torch.float16).contiguous() for key, value in tensors.items()}
    if layout == ".ckpt":
        torch.save(tensors, path.with_suffix(".ckpt"))
        return torch.load(path.with_suffix(".ckpt"), weights_only=True)
    save_file(tensors, path)
    return load_file(path)


@pytest.fixture(params=["kohya", ".ckpt", "PEFT", "old diffusers", "original names"])
def weights(request, sd1, perturb, tmp_path):
    """The tensors of three files."""
    found = []
    for number in (1, 2, 3):
        network = lora.create_network(1.0, 4, 4, None, sd1.text_encoder, sd1.unet, conv_dim=2, conv_alpha=2)
        tensors = {key: value.detach() for key, value in perturb(network, number, 0.08).file_tensors().items()}
        found.append(stored(tensors, request.param, tmp_path / f"lora{number}.safetensors"))
    return found


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


def test_merging_instead_gives_the_same_picture(pipe, weights):
    def attached(sd, strength):
        network, sd = create_network_from_weights(strength, None, pipe.vae, pipe.text_encoder, pipe.unet, sd)
        network.apply_to(pipe.text_encoder, pipe.unet)
        network.load_state_dict(sd)
        return network

    networks = [attached(*pair) for pair in zip(weights, STRENGTHS, strict=True)]
    expected = picture(pipe)
    for network in networks:
        network.detach()
    plain = picture(pipe)
    for sd, strength in zip(weights, STRENGTHS, strict=True):
        network, sd = create_network_from_weights(strength, None, pipe.vae, pipe.text_encoder, pipe.unet, sd)
        network.merge_to(pipe.text_encoder, pipe.unet, sd)
    merged = picture(pipe)
    assert (merged - expected).abs().mean() < 0.02 < (merged - plain).abs().mean(), "the same picture, but for bf16"


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


def test_a_files_own_tensors_can_be_loaded_without_ours(pipe, weights):
    """`load_state_dict` also takes what was read, under its names there."""
    network, ours = create_network_from_weights(1.0, None, None, pipe.text_encoder, pipe.unet, weights[0])
    again, _ = create_network_from_weights(1.0, None, None, pipe.text_encoder, pipe.unet, weights[1])
    again.load_state_dict(weights[0])
    loaded = again.state_dict()
    assert ours.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())


def test_a_file_beside_its_tensors_gives_the_metadata(sd1, perturb, tmp_path):
    from library.families.sd1 import SD1

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
