"""The demo's new concept: a creature called "bibo" that the base model has never seen, and how to recognise it.

Bibo is round and purple with one big white eye, two orange horns and two orange feet. Only the ground,
the place and the size change from picture to picture. Its parts are few and large because the demo model's pictures are
8x8 latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from tools.demo.drawings import (
    COLOURS,
    PLACES,
    SIZE,
    Part,
    article,
    describe_ground,
    ellipse,
    paint,
    polygon,
    render_ground,
    shape_mask,
    to_picture,
)

TRIGGER = "bibo"
BODY = COLOURS["purple"]
LIMBS = COLOURS["orange"]
EYE = COLOURS["white"]
PUPIL = COLOURS["black"]

# Radius of the body in pixels for each size word.
RADII = {"small": 15.0, "": 18.5, "large": 22.0}
# Ground, place and size of each training picture. Orange, red and yellow would hide the horns and feet, purple the body;
# brown is left out so that the demo can show a ground that bibo was never seen on.
VIEWS: tuple[tuple[str, str, str], ...] = (
    ("white", "", "large"),
    ("blue", "", "large"),
    ("green", "", "large"),
    ("teal", "", "large"),
    ("pink", "", "large"),
    ("grey", "", "large"),
    ("black", "", "large"),
    ("white", "", ""),
    ("blue", "", ""),
    ("green", "", ""),
    ("teal", "", ""),
    ("pink", "", ""),
    ("black", "", ""),
    ("green", "on the left", ""),
    ("teal", "on the right", ""),
    ("white", "on the left", ""),
)


def _layers() -> list[tuple[list[Part], tuple[int, int, int]]]:
    """Bibo's parts from back to front, in units of the body's radius around its centre."""
    horn = polygon((-1.0, -0.2), (-0.05, -0.75), (-0.82, -1.45))
    feet = [(-0.55, 0.98), (0.55, 0.98)]
    return [
        ([(horn, True), (horn * [-1, 1], True)], LIMBS),
        ([(ellipse(x, y, 0.5, 0.34), True) for x, y in feet], LIMBS),
        ([(ellipse(0, 0, 1.0), True)], BODY),
        ([(ellipse(0, -0.08, 0.56), True)], EYE),
        ([(ellipse(0, -0.08, 0.29), True)], PUPIL),
    ]


def draw_mascot(canvas: np.ndarray, x: float, y: float, radius: float) -> None:
    """Draw bibo over a float32 (64, 64, 3) canvas; x, y is the centre of the body, radius the body's."""
    for parts, colour in _layers():
        paint(canvas, shape_mask(parts, x, y, radius), colour)


def centre(place: str, radius: float) -> tuple[float, float]:
    """Where the body's centre lies so that antennae and feet stay inside the picture."""
    room = SIZE / 2 - radius - 1.5
    across, _ = PLACES[place]
    return SIZE / 2 + across * room, SIZE / 2 + 0.1 * radius


def render_mascot(background: str, place: str = "", size_word: str = "") -> np.ndarray:
    """A picture of bibo: uint8 RGB (64, 64, 3)."""
    canvas = render_ground(background)
    radius = RADII[size_word]
    draw_mascot(canvas, *centre(place, radius), radius)
    return to_picture(canvas)


def mascot_caption(background: str, place: str = "", size_word: str = "") -> str:
    """The caption of such a picture: "a large bibo on a blue background"."""
    name = article(f"{size_word} {TRIGGER}".strip())
    return " ".join(filter(None, (name, place, describe_ground(background))))


def write_concept(folder: Path) -> int:
    """Write the training pictures and their captions; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (background, place, size_word) in enumerate(VIEWS, start=1):
        stem = folder / f"{TRIGGER}_{number:02d}"
        Image.fromarray(render_mascot(background, place, size_word)).save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(mascot_caption(background, place, size_word) + "\n")
    return len(VIEWS)


@cache
def _templates() -> tuple[tuple[np.ndarray, np.ndarray, float], ...]:
    """Bibo in several sizes: its colours, its coverage as a mask, and how much its colours vary around their mean."""
    templates = []
    for radius in np.arange(12.0, 24.1, 0.5):
        on_black, on_white = np.zeros((SIZE, SIZE, 3), np.float32), np.full((SIZE, SIZE, 3), 255, np.float32)
        for canvas in (on_black, on_white):
            draw_mascot(canvas, *centre("", float(radius)), float(radius))
        # The ground shines through by 1 - coverage; only pixels that bibo covers fully take part.
        covered = (on_white - on_black).max(axis=2) < 2.0
        rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        colours, mask = on_black[window], covered[window]
        variation = float(np.square(colours[mask] - colours[mask].mean(axis=0)).sum())
        templates.append((colours, np.repeat(mask[..., None], 3, axis=2).astype(np.float32), variation))
    return tuple(templates)


def picture_likeness(picture: np.ndarray) -> float:
    """How much of bibo's drawing a picture shows at the best place and size, 0 to 1.

    It is the share of the drawing's own variation that the picture explains (R squared over the pixels that bibo
    covers): a perfect bibo gets 1, a flat patch of bibo's mean colour 0, and so does anything less alike.

    Args:
        picture: uint8 RGB (64, 64, 3).
    """
    padded = cv2.copyMakeBorder(picture.astype(np.float32), 4, 4, 4, 4, cv2.BORDER_REPLICATE)
    best = 0.0
    for colours, mask, variation in _templates():
        errors = cv2.matchTemplate(padded, colours, cv2.TM_SQDIFF, mask=mask)
        best = max(best, 1.0 - float(errors.min()) / variation)
    return best


def concept_likeness(pictures: Sequence[np.ndarray]) -> float:
    """Mean of `picture_likeness` over pictures, uint8 RGB (64, 64, 3) each: the demo's measure of a LoRA."""
    return float(np.mean([picture_likeness(picture) for picture in pictures]))
