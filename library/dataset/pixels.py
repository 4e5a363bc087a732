"""One reading of one image: what is random about it, and the pixels that come of it.

Each choice has a stream of its own, (seed, purpose, epoch, sample), so switching one variation on leaves
all others as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from library.dataset.buckets import Fit, Size
from library.dataset.dataset import Dataset, DatasetImage, Sample
from library.dataset.images import (
    BadImageError,
    Picture,
    apply_gamma,
    latent_mask,
    read_picture,
    resize_and_crop,
    shift_hue,
)
from library.dataset.options import SubsetSettings
from library.streams import python_stream

COLOR_CHANCE = 0.33
HUE_STEPS = 8  # of two degrees
GAMMA_RANGE = (0.95, 1.05)


@dataclass(frozen=True)
class Reading:
    """How an image is read this time.

    Args:
        fit: the size it is scaled to, and the size of the cut.
        offset: (left, top) of the cut in the scaled image.
        flip: mirrored left to right, after the cut.
        hue_steps, gamma: change of colour; None for none.
    """

    fit: Fit
    offset: Size
    flip: bool = False
    hue_steps: float | None = None
    gamma: float | None = None


@dataclass(frozen=True)
class Prepared:
    """`pixels` (3, H, W) fp32 in [-1, 1]; `mask` (1, h, w) fp32 in 0..1 at the size of latents, or None."""

    pixels: Tensor
    mask: Tensor | None


def centred(image: DatasetImage, *, flip: bool) -> Reading:
    """A reading with the cut in the middle: what latents are cached of."""
    return Reading(image.fit, (image.fit.excess[0] // 2, image.fit.excess[1] // 2), flip)


def size_conditions(image: DatasetImage, reading: Reading) -> dict[str, int]:
    """What a denoiser may be told of an image's size and cut, in pixels, by the names of `families.family.SIZE_CONDITIONS`.

    The image's own size is that which viewers show; the cut is where it was made in the scaled image, mirrored like it.
    """
    left, top = reading.offset
    return {
        "original_height": image.size[1],
        "original_width": image.size[0],
        "crop_top": top,
        "crop_left": reading.fit.excess[0] - left if reading.flip else left,
        "target_height": reading.fit.bucket[1],
        "target_width": reading.fit.bucket[0],
    }


def draw_flip(dataset: Dataset, sample: Sample, *, seed: int, epoch: int) -> bool:
    """Whether this reading is mirrored: half of them, where flip_aug is on. The same with cached latents."""
    return dataset.subset_of(sample.image).flip_aug and python_stream(seed, "flip", epoch, sample.index).random() < 0.5


def draw_reading(dataset: Dataset, sample: Sample, *, seed: int, epoch: int) -> Reading:
    """All random choices about the pixels of a sample in an epoch."""
    image, subset = sample.image, dataset.subset_of(sample.image)
    flip = draw_flip(dataset, sample, seed=seed, epoch=epoch)
    in_the_middle = centred(image, flip=flip)
    fit, offset = in_the_middle.fit, in_the_middle.offset
    face = face_in_name(image.path.stem)
    if subset.face_crop_aug_range and face and not dataset.settings[image.dataset].buckets.enabled:
        fit, offset = _draw_face_crop(image, face, subset, seed=seed, epoch=epoch, index=sample.index)
    elif subset.random_crop:
        crop = python_stream(seed, "crop", epoch, sample.index)
        offset = crop.randint(0, fit.excess[0]), crop.randint(0, fit.excess[1])
    hue_steps = gamma = None
    if subset.color_aug:
        color = python_stream(seed, "color", epoch, sample.index)
        if color.random() < COLOR_CHANCE:
            if color.random() < 0.5:
                hue_steps = color.uniform(-HUE_STEPS, HUE_STEPS)
            else:
                gamma = color.uniform(*GAMMA_RANGE)
    return Reading(fit, offset, flip, hue_steps, gamma)


def load(dataset: Dataset, image: DatasetImage, reading: Reading, *, data: BinaryIO | None = None) -> Prepared:
    """Read the file (or its content, `data`) and prepare it.

    Raises:
        BadImageError: it cannot be decoded, or is not the image that was scanned.
    """
    picture = read_picture(image.path, data)
    height, width = picture.rgb.shape[:2]
    if (width, height) != image.size:
        was = f"{image.size[0]}x{image.size[1]}"
        raise BadImageError(f"has changed since the start: it is {width}x{height} now and was {was}")
    return prepare(picture, reading, dataset.subset_of(image), latent_factor=dataset.latent_factor)


def prepare(picture: Picture, reading: Reading, subset: SubsetSettings, *, latent_factor: int) -> Prepared:
    """Scale, cut, vary and flip a picture, and its alpha channel with it where the subset uses that as a mask."""
    interpolation = subset.resize_interpolation
    rgb = resize_and_crop(picture.rgb, reading.fit, reading.offset, interpolation)
    if reading.hue_steps is not None:
        rgb = shift_hue(rgb, reading.hue_steps)
    if reading.gamma is not None:
        rgb = apply_gamma(rgb, reading.gamma)
    mask = None
    if subset.alpha_mask:
        width, height = reading.fit.bucket
        alpha = np.full((height, width), 255, np.uint8)
        if picture.alpha is not None:
            alpha = resize_and_crop(picture.alpha, reading.fit, reading.offset, interpolation)
        mask = torch.from_numpy(latent_mask(alpha, latent_factor))[None]
    pixels = torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1))).float() / 127.5 - 1
    if reading.flip:
        pixels = pixels.flip(-1)
        mask = mask.flip(-1) if mask is not None else None
    return Prepared(pixels, mask)


def face_in_name(stem: str) -> tuple[int, int, int, int] | None:
    """(centre x, centre y, width, height) of the face, from a file name that ends in _cx_cy_w_h."""
    parts = stem.split("_")[-4:]
    if len(parts) < 4 or not all(part.isdecimal() for part in parts):
        return None
    x, y, width, height = (int(part) for part in parts)
    return (x, y, width, height) if width and height else None


def _draw_face_crop(
    image: DatasetImage, face: tuple[int, int, int, int], subset: SubsetSettings, *, seed: int, epoch: int, index: int
) -> tuple[Fit, Size]:
    """A cut round the face whose shorter side is `face_crop_aug_range` times the face, as far as the image reaches.

    The image is never enlarged for it beyond what covers the bucket. With random_crop the face may lie anywhere in the cut.
    """
    assert subset.face_crop_aug_range is not None
    draws = python_stream(seed, "face crop", epoch, index)
    (width, height), (target_width, target_height) = image.size, image.fit.bucket
    wanted = min(target_width, target_height) / (max(face[2:]) * draws.uniform(*subset.face_crop_aug_range))
    covering = max(target_width / width, target_height / height)
    scale = max(covering, min(1.0, wanted))
    resized = max(target_width, int(width * scale + 0.5)), max(target_height, int(height * scale + 0.5))
    offset = []
    for centre, face_side, target, side in zip(face[:2], face[2:], image.fit.bucket, resized, strict=True):
        start = centre * scale - target / 2
        if subset.random_crop:
            room = max(0.0, (target - face_side * scale) / 2)
            start += draws.uniform(-room, room)
        offset.append(max(0, min(int(start + 0.5), side - target)))
    return Fit(image.fit.bucket, resized), (offset[0], offset[1])
