"""Does the demo model draw what it is told? Pictures are compared with the drawings of every possible answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools.demo.drawings import COLOURS, SHAPES, SIZE, Scene, Thing, caption, shape_mask, shrink

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

STEPS = 30
GUIDANCE = 5.0
BATCH_SIZE = 25
RADII = tuple(np.arange(14.0, 28.0, 1.5))
SHIFTS = tuple(np.arange(-5.0, 5.1, 2.5))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a picture shows, or should show."""

    shape: str
    colour: str
    background: str

    @property
    def prompt(self) -> str:
        thing = Thing(shape=self.shape, colour=self.colour, size_word="large")
        return caption(Scene(things=(thing,), background=self.background))


def random_answers(count: int, seed: int) -> list[Answer]:
    """Shapes, colours and backgrounds at random, the two colours different."""
    rng = np.random.default_rng(seed)
    answers = []
    for _ in range(count):
        colour, background = rng.choice(list(COLOURS), 2, replace=False)
        answers.append(Answer(shape=str(rng.choice(list(SHAPES))), colour=str(colour), background=str(background)))
    return answers


@cache
def _candidates() -> tuple[list[str], np.ndarray]:
    """Every shape in every size and place: the shapes' names and their masks, float32 (K, 4096)."""
    names, masks = [], []
    for name, make in SHAPES.items():
        parts = make()
        for radius in RADII:
            for dx in SHIFTS:
                for dy in SHIFTS:
                    names.append(name)
                    masks.append(shrink(shape_mask(parts, SIZE / 2 + dx, SIZE / 2 + dy, radius)).ravel())
    return names, np.stack(masks)


def recognise(pictures: np.ndarray) -> list[Answer]:
    """For each picture the answer whose drawing is nearest, by squared error, over all sizes and places.

    For a mask m and two colours a, b the error is sum((picture - m a - (1 - m) b)^2), which falls apart into sums over
    the picture that are shared by all pairs of colours.

    Args:
        pictures: uint8 RGB (N, 64, 64, 3).
    """
    names, masks = _candidates()
    palette = np.array(list(COLOURS.values()), dtype=np.float32) / 255.0
    products = palette @ palette.T
    shape_area, mixed = np.square(masks).sum(axis=1), (masks * (1.0 - masks)).sum(axis=1)
    ground_area = masks.shape[1] - 2.0 * masks.sum(axis=1) + shape_area
    # What does not depend on the picture, for each mask and pair of colours: (K, 12, 12).
    fixed = 2.0 * mixed[:, None, None] * products
    fixed += (shape_area[:, None] * np.diag(products))[:, :, None] + (ground_area[:, None] * np.diag(products))[:, None, :]
    fixed[:, np.arange(len(palette)), np.arange(len(palette))] = np.inf  # one colour on itself shows no shape
    found = []
    for picture in pictures:
        likeness = (picture.reshape(-1, 3).astype(np.float32) / 255.0) @ palette.T
        on_shape = masks @ likeness
        on_ground = likeness.sum(axis=0) - on_shape
        errors = fixed - 2.0 * (on_shape[:, :, None] + on_ground[:, None, :])
        mask, colour, background = np.unravel_index(int(errors.argmin()), errors.shape)
        found.append(Answer(shape=names[mask], colour=list(COLOURS)[colour], background=list(COLOURS)[background]))
    return found


def is_right(picture: np.ndarray, asked: Answer) -> bool:
    """Whether a picture shows the shape and both colours that were asked for."""
    return recognise(picture[None]) == [asked]


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The model folder as a plain diffusers pipeline, without network access."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> np.ndarray:
    """Pictures for prompts, uint8 (N, 64, 64, 3); picture i depends on its prompt and on seed + i."""
    import torch

    pictures = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = list(prompts[start : start + BATCH_SIZE])
        generators = [torch.Generator().manual_seed(seed + start + place) for place in range(len(batch))]
        result = pipeline(batch, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np")
        pictures.append(np.rint(result.images * 255.0).astype(np.uint8))
    return np.concatenate(pictures)
