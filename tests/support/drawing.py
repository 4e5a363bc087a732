"""Running gen_img_diffusers.py in this process, adapters for it to draw with, and what came of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gen_img_diffusers
from library.checkpoints.base_model import open_base_model
from networks import lora

SMALL = ("--W", "64", "--H", "64", "--steps", "1")


def draw(*arguments: object) -> list[Path]:
    """The pictures of the output folder in the order of their names."""
    arguments = tuple(map(str, arguments))
    assert gen_img_diffusers.main([*arguments, *(() if "--W" in arguments else SMALL)]) == 0
    return pictures_in(Path(arguments[arguments.index("--outdir") + 1]))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the script says when it refuses a command line."""
    assert gen_img_diffusers.main(list(map(str, arguments))) == 2
    return capsys.readouterr().err


def pictures_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def write_lora(path: Path, model: Path, metadata: dict[str, str] | None = None, *, seed: int = 0, **settings) -> Path:
    """A LoRA for a tiny model, whose every tensor acts."""
    files = open_base_model(model)
    dtype_and_place = {"dtype": torch.float32, "device": "cpu"}
    text_encoders, denoiser = files.load_text_encoders(**dtype_and_place), files.load_denoiser(**dtype_and_place)
    network = lora.create_network(1.0, 4, 4, None, text_encoders, denoiser, **settings)
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters(), start=seed):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    path.parent.mkdir(parents=True, exist_ok=True)
    network.save_weights(path, torch.float32, metadata)
    return path
