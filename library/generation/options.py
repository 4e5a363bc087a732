"""What one run of gen_img_diffusers.py does; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which base model and how it computes. `v2`, `v_parameterization` are None where the user said nothing."""

    path: str
    vae: str | None = None
    v2: bool | None = None
    v_parameterization: bool | None = None
    zero_terminal_snr: bool = False
    precision: Precision = "fp32"
    xformers: bool = False
    max_chunks: int = 3


@dataclass(frozen=True, kw_only=True)
class NetworkUse:
    """One adapter file, its strength, and the module that reads it."""

    file: Path
    strength: float = 1.0
    module: str = "networks.lora"
    args: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """What is drawn. `width` and `height` are None for the base model's own size, `seed` for one of chance.

    Attributes:
        prompt, prompt_file: exactly one of them.
        iterations: how often the whole list of prompts is drawn, each time with other seeds.
    """

    prompt: str | None = None
    prompt_file: Path | None = None
    width: int | None = None
    height: int | None = None
    steps: int = 50
    scale: float = 7.5
    sampler: str = "ddim"
    seed: int | None = None
    clip_skip: int | None = None
    images_per_prompt: int = 1
    iterations: int = 1
    batch_size: int = 1


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """One run."""

    model: ModelOptions
    pictures: PictureOptions
    output_folder: Path
    networks: tuple[NetworkUse, ...] = ()
    merge_networks: bool = False
    sequential_names: bool = False
