"""Picture files that a picture is made from: what to begin with, masks, and maps of regions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.dataset.images import BadImageError, read_header, read_picture
from library.errors import UserError
from library.generation.requests import LATENT_FACTOR


def read_pixels(path: str, width: int, height: int) -> Tensor:
    """(3, H, W) in [-1, 1], as viewers show it, scaled to a size.

    Raises:
        UserError: it is no readable picture.
    """
    return pixels_of(_read(path, width, height))


def pixels_of(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    array = torch.from_numpy(np.array(image.convert("RGB")))
    return array.permute(2, 0, 1).float() / 127.5 - 1


def picture_size(path: str) -> tuple[int, int]:
    """(width, height) of a picture as viewers show it.

    Raises:
        UserError: it is no readable picture.
    """
    try:
        return read_header(Path(path)).size
    except BadImageError as error:
        raise UserError(f"cannot be used: it {error}", where=path) from None


def read_mask(path: str, width: int, height: int) -> Tensor:
    """(1, h, w) at the size of latents: 1 where the file is rather white, 0 where it is rather black.

    Raises:
        UserError: it is no readable picture.
    """
    grey = torch.from_numpy(np.array(_read(path, width, height).convert("L")))[None, None].float() / 255
    size = (height // LATENT_FACTOR, width // LATENT_FACTOR)
    return torch.nn.functional.interpolate((grey >= 0.5).float(), size=size)[0]


def region_maps(path: str, count: int, width: int, height: int, *, colors: int | None) -> list[Tensor]:
    """For each of `count` sub-prompts, (h, w) at the size of latents: how much it counts where; they add up to 1.

    As in sd-scripts, the first three are the channels red, green and blue of the file, and further ones count everywhere;
    with `colors`, number i is where the file has the colour whose bits of red, green and blue are those of i + 1. A map
    that is empty counts everywhere. Where no map counts, all count alike.

    Raises:
        UserError: it is no readable picture, or has too few colours for the sub-prompts.
    """
    if colors is not None and count > colors:
        raise UserError(
            f"{count} sub-prompts, and the regions have {colors} colour codes", where=path, remedy="use fewer sub-prompts"
        )
    array = np.array(_read(path, width, height), dtype=np.float32) / 255
    size = (height // LATENT_FACTOR, width // LATENT_FACTOR)
    maps = [_shrunk(_region(array, number, colors), size) for number in range(count)]
    stacked = torch.stack([each if each.any() else torch.ones(size) for each in maps])
    total = stacked.sum(0)
    shared = torch.where(total > 0, stacked / total.clamp(min=1e-6), torch.full_like(stacked, 1 / count))
    return list(shared)


def _region(array: np.ndarray, number: int, colors: int | None) -> np.ndarray:
    """(H, W) of one sub-prompt; `array` is (H, W, 3) in 0..1."""
    if colors is None:
        return array[..., number] if number < 3 else np.ones_like(array[..., 0])
    code = np.array([(number + 1) >> bit & 1 for bit in range(3)])
    return ((array >= 0.5) == code).all(-1).astype(np.float32)


def _shrunk(region: np.ndarray, size: Sequence[int]) -> Tensor:
    return torch.nn.functional.interpolate(torch.from_numpy(region.copy())[None, None], size=tuple(size), mode="area")[0, 0]


def _read(path: str, width: int, height: int) -> Image.Image:
    try:
        image = Image.fromarray(read_picture(Path(path)).rgb)
    except (BadImageError, OSError) as error:
        raise UserError(f"cannot be used: it {error}", where=path) from None
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
