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

from library.checkpoints.tokenizers import shipped_tokenizer
from library.families.family import EPSILON, NOISE_SCHEDULE, ModelFamily
from library.families.sd2 import SD2
from library.quiet import quiet_libraries

TEXT_WIDTH = 32
TEXT_LAYERS = 3
"""Layers of SD1's; SD2's has one less, as in the full size, where a single file's last layer is dropped."""


def tiny_configs(family: ModelFamily) -> dict[str, dict[str, Any]]:
    """The configurations of a family's parts ("unet", "vae", "text_encoder"), shrunk but of the same structure."""
    # SD2's heads are 64 wide where a layer is: channels to 128 let the levels differ (1, 1, 2, 2 heads).
    channels = (32, 64, 128, 128) if family is SD2 else (32, 32, 64, 64)
    unet = {
        **family.unet_config,
        "sample_size": 8,
        "block_out_channels": channels,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": family.attention_heads(channels),
    }
    text_encoder = {
        **family.text_encoder_config,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS - family.text_layers_dropped,
        "num_attention_heads": 1,
        "projection_dim": TEXT_WIDTH,
    }
    vae = {**family.vae_config, "sample_size": 64, "block_out_channels": (32, 32, 32, 32)}
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder}


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
    """The modules themselves: "unet", "vae", "text_encoder", fp32, in evaluation mode."""
    quiet_libraries()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = tiny_configs(family)
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(**configs["unet"]),
            "vae": AutoencoderKL(**configs["vae"]),
        }
    parts = {name: part.to_empty(device="cpu") for name, part in parts.items()}
    parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
    for part in parts.values():
        fill_with_signal(part, seed)
        part.eval()
    return parts


def build_tiny_folder(path: Path, family: ModelFamily, prediction_type: str = EPSILON, seed: int = 0) -> Path:
    """Write a diffusers folder with all parts, fp32 safetensors, CLIP's whole vocabulary; returns its path."""
    path = Path(path)
    for name, part in build_tiny_parts(family, seed).items():
        part.save_pretrained(path / name)  # type: ignore[operator]
    shipped_tokenizer(family).save_pretrained(path / "tokenizer")
    scheduler = {"_class_name": "DDIMScheduler", **NOISE_SCHEDULE, "prediction_type": prediction_type}
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2))
    (path / "model_index.json").write_text(json.dumps(index, indent=2))
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
