"""Writing the demo model as a folder that `StableDiffusionPipeline.from_pretrained` reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from tools.demo.models import SCHEDULER_CONFIG, build_text_encoder, write_tokenizer
from tools.demo.train_unet import Denoiser

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a configuration, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def half_weights(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """A module's weights in fp16, names prefixed; refuses what fp16 cannot hold."""
    weights = {}
    for name, tensor in module.state_dict().items():
        half = tensor.detach().cpu().to(torch.float16).contiguous()
        if not torch.isfinite(half).all():
            raise ValueError(f"{prefix}{name} does not fit into fp16")
        weights[prefix + name] = half
    return weights


@torch.no_grad()
def widen_vocabulary(model: Denoiser, used: Tensor, vocabulary: int, seed: int) -> CLIPTextModel:
    """The trained text encoder with CLIP's whole vocabulary.

    Words it was not trained on get random rows, as large as the trained ones: a new trigger word is then told apart from
    the others before any training.
    """
    wide = build_text_encoder(vocabulary)
    weights = {name: tensor.cpu() for name, tensor in model.text_encoder.state_dict().items()}
    (name,) = [name for name in weights if name.endswith("token_embedding.weight")]
    trained = weights[name]
    rows = torch.randn(vocabulary, trained.shape[1], generator=torch.Generator().manual_seed(seed)) * trained.std()
    rows[used] = trained
    weights[name] = rows
    wide.load_state_dict(weights)
    return wide


def write_base(folder: Path, *, vae: AutoencoderKL, model: Denoiser, used: Tensor, seed: int) -> None:
    """Write every part of the pipeline in fp16."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    text_encoder = widen_vocabulary(model, used, len(tokenizer), seed)
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    # transformers writes its own keys; older programs expect them under "text_model.", and it reads both.
    prefix = "" if any(name.startswith("text_model.") for name in text_encoder.state_dict()) else "text_model."
    write_weights(folder / "text_encoder" / "model.safetensors", half_weights(text_encoder, prefix))
    # transformers computes in the type named here, diffusers in fp32 whatever the file holds; they must agree.
    config = text_encoder.config.to_dict() | {"architectures": ["CLIPTextModel"], "dtype": "float32"}
    config.pop("_name_or_path", None)
    write_json(folder / "text_encoder" / "config.json", config)
    for name, part in (("vae", vae), ("unet", model.unet)):
        write_weights(folder / name / "diffusion_pytorch_model.safetensors", half_weights(part))
        # diffusers notes here where a part came from and, in random order, which settings were left at their defaults.
        notes = ("_name_or_path", "_use_default_values")
        config = {key: value for key, value in part.config.items() if key not in notes}
        write_json(folder / name / "config.json", config)


def write_weights(file: Path, weights: dict[str, Tensor]) -> None:
    """Write a safetensors file, making its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes files that only their owner can read


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
