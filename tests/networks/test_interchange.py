"""Other programs as judges: they read our files and arrive at the same numbers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from networks import lora
from networks.formats.keys import split_key
from networks.formats.layer_names import layer_names


@pytest.fixture
def folder(request, models):
    return request.getfixturevalue(f"tiny_{models.family.name}_folder")


def pipeline(folder):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def saved(models, perturb, tmp_path):
    """A network whose weights act, and its file."""
    network = lora.create_network(1.0, 4, 2, None, models.text_encoder, models.unet, conv_dim=4, conv_alpha=2)
    path = tmp_path / "ours.safetensors"
    perturb(network).save_weights(path, None, {"ss_network_module": "networks.lora"})
    return network, path


def outputs(models, pipe=None):
    """What the fixture's models, or a pipeline's, make of the fixture's inputs."""
    if pipe is None:
        return models.picture(), models.text()
    return models.picture(pipe.unet), models.text([getattr(pipe, encoder.part) for encoder in models.family.text_encoders])


@torch.no_grad()
def test_diffusers_reads_our_file_and_gives_the_same_outputs(models, folder, saved):
    network, path = saved
    base = outputs(models)
    network.attach()
    ours = outputs(models)
    pipe = pipeline(folder)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    theirs = outputs(models, pipe)
    for mine, other, plain in zip(ours, theirs, base, strict=True):
        assert (mine - plain).abs().max() > 0.05
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@torch.no_grad()
def test_lycoris_reads_our_file_and_gives_the_same_picture(models, saved, monkeypatch):
    lycoris = pytest.importorskip("lycoris.kohya")
    network, path = saved
    base = models.picture()
    network.attach()
    ours = models.picture()
    network.detach()
    # Its text-encoder names come from the modules in hand, which lost their text_model level in transformers 5.6.
    # Names of the U-Net's too: here diffusers'.
    weights = {}
    for key, value in load_file(path).items():
        layer = layer_names(models.family).find(split_key(key)[0])
        if layer.part == "denoiser":
            weights[f"lora_unet_{layer.path.replace('.', '_')}.{split_key(key)[1]}"] = value
    # Its list of names clashes with its list of classes on diffusers' U-Net ("duplicated lora name").
    monkeypatch.setattr(lycoris.LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [])
    theirs, _ = lycoris.create_network_from_weights(1.0, str(path), None, None, models.unet, weights_sd=weights)
    try:
        theirs.apply_to(None, models.unet, False, True)
        theirs.load_state_dict(weights, strict=False)
        picture = models.picture()
    finally:
        for layer in theirs.unet_loras:
            layer.restore()
    assert (ours - base).abs().max() > 0.05
    torch.testing.assert_close(ours, picture, rtol=1e-4, atol=1e-4 * base.abs().max().item())
    assert torch.equal(models.picture(), base)


@torch.no_grad()
def test_a_file_of_diffusers_is_read(models, folder, tmp_path):
    """diffusers' kohya export calls the only text encoder `lora_te1`."""
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    pipe = pipeline(folder)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v", "proj_in"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    expected = models.picture(pipe.unet)
    state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(pipe.unet).items()}
    kohya = convert_state_dict_to_kohya(state)
    kohya = {key: torch.tensor(2.0) if key.endswith("alpha") else value.contiguous() for key, value in kohya.items()}
    save_file(kohya, tmp_path / "theirs.safetensors")
    network, _ = lora.create_network_from_weights(
        1.0, tmp_path / "theirs.safetensors", None, models.text_encoder, models.unet
    )
    base = models.picture()
    network.attach()
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(models.picture(), expected, rtol=1e-4, atol=1e-4 * base.abs().max().item())
