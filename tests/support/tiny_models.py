"""Tiny models with the real structure, so that every test drives the real code.

Weights are seeded by their names: the same on every machine, and different in every layer. They are not trained, but scaled
so that signals neither vanish nor explode and every part of a model acts on its output.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.checkpoints.model_writing import model_index
from library.checkpoints.parts import TEXT_CLASSES
from library.checkpoints.tokenizers import shipped_tokenizer
from library.families.family import EPSILON, NOISE_SCHEDULE, ModelFamily
from library.quiet import quiet_libraries

TEXT_WIDTHS = (32, 48)
"""Of a family's text encoders, different so that none stands in for another."""

TEXT_LAYERS = 3
"""Layers in a single file; SD2's module has one less, as in the full size, where the last is dropped."""

POOLED = 40
TIME_WIDTH = 8


def tiny_configs(family: ModelFamily) -> dict[str, dict[str, Any]]:
    """The configurations of a family's parts by kind, shrunk but of the same structure."""
    text_encoders = {
        encoder.part: {
            **encoder.config,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": TEXT_LAYERS - encoder.layers_dropped,
            "num_attention_heads": 1,
            "projection_dim": POOLED if encoder.gives_pooled else width,
        }
        for encoder, width in zip(family.text_encoders, TEXT_WIDTHS, strict=False)
    }
    vae = {**family.vae_config, "sample_size": 64, "block_out_channels": (32, 32, 32, 32)}
    return {"unet": _tiny_unet(family), "vae": vae, **text_encoders}


def _tiny_unet(family: ModelFamily) -> dict[str, Any]:
    full = family.unet_config
    levels = len(full["block_out_channels"])
    # Heads that are 64 wide where a layer is differ between the levels (1, 1, 2, 2) with channels to 128.
    channels = (32, 64, 128, 128)[:levels] if family.linear_projections else (32, 32, 64, 64)[:levels]
    unet = {
        **full,
        "sample_size": 8,
        "block_out_channels": channels,
        "cross_attention_dim": sum(TEXT_WIDTHS[: len(family.text_encoders)]),
        "attention_head_dim": family.attention_heads(channels),
    }
    if family.size_conditions:
        unet["addition_time_embed_dim"] = TIME_WIDTH
        unet["projection_class_embeddings_input_dim"] = POOLED + TIME_WIDTH * len(family.size_conditions)
        unet["transformer_layers_per_block"] = [min(depth, 3) for depth in full["transformer_layers_per_block"]]
    return unet


def fill_with_signal(module: nn.Module, seed: int = 0) -> None:
    """Weights that keep a signal's size: matrices with spread 1/sqrt(inputs), norms near one, small biases."""
    for name, parameter in module.named_parameters():
        stream = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=stream)
        with torch.no_grad():
            if parameter.ndim < 2:
                is_norm = "norm" in name and name.endswith("weight")
                parameter.copy_(0.1 * noise + (1.0 if is_norm else 0.0))
            elif "embedding.weight" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def build_tiny_parts(family: ModelFamily, seed: int = 0) -> dict[str, nn.Module]:
    """The modules themselves by kind, fp32, in evaluation mode."""
    quiet_libraries()
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    configs = tiny_configs(family)
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(**configs["unet"]),
            "vae": AutoencoderKL(**configs["vae"]),
        }
    parts = {name: part.to_empty(device="cpu") for name, part in parts.items()}
    for kind in TEXT_CLASSES.keys() & configs.keys():
        parts[kind] = getattr(transformers, TEXT_CLASSES[kind])(transformers.CLIPTextConfig(**configs[kind]))
    for part in parts.values():
        fill_with_signal(part, seed)
        part.eval()
    return parts


def build_tiny_folder(path: Path, family: ModelFamily, prediction_type: str = EPSILON, seed: int = 0) -> Path:
    """Write a diffusers folder with all parts, fp32 safetensors, CLIP's whole vocabulary; returns its path."""
    path = Path(path)
    for name, part in build_tiny_parts(family, seed).items():
        part.save_pretrained(path / name)  # type: ignore[operator]
    for encoder in family.text_encoders:
        shipped_tokenizer(encoder).save_pretrained(path / encoder.tokenizer)
    scheduler = {"_class_name": "DDIMScheduler", **NOISE_SCHEDULE, "prediction_type": prediction_type}
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2))
    (path / "model_index.json").write_text(json.dumps(model_index(family, "DDIMScheduler"), indent=2))
    return path


def build_tiny_control_net(unet: nn.Module, seed: int = 0) -> nn.Module:
    """A ControlNet for a tiny U-Net that acts: what training begins with as zeros has a signal, and hints count."""
    quiet_libraries()
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(unet, load_weights_from_unet=False)  # type: ignore[arg-type]
    fill_with_signal(net, seed)
    with torch.no_grad():
        net.controlnet_cond_embedding.conv_out.weight.mul_(50)  # seven activations before it have halved the signal
    return net.eval().requires_grad_(False)
