"""A picture of what a weight tool kept: singular values of the layers, and the error of each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.atomic import atomic_write

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

_PANEL = (560, 400)  # pixels of the room for curves or bars
_MARGIN = (70, 40)  # left or right of a panel, above or below it
_DECADES = 6  # of singular values that are shown below the largest
_COLOURS = ("#2a6fb0", "#c8602a", "#3a8a4a", "#8a4a9a", "#777777")
_INK, _GRID = "#222222", "#dddddd"

Box = tuple[int, int, int, int]


def spectra_and_errors(path: Path, spectra: Mapping[str, Sequence[float]], errors: Mapping[str, float]) -> None:
    """Draw two panels into a PNG file.

    Left, every layer's singular values relative to its largest, logarithmic; right, every layer's relative error as a bar,
    in the order given. Layers whose names begin alike (up to the first "_" after "lora_") share a colour.

    Args:
        path: of the picture; it appears complete or not at all.
        spectra: layer -> singular values, largest first.
        errors: layer -> relative error, 0 or more.

    Raises:
        UserError: a place that cannot be written to.
    """
    from PIL import Image, ImageDraw

    (width, height), (beside, above) = _PANEL, _MARGIN
    image = Image.new("RGB", (2 * width + 3 * beside, height + 2 * above + 20), "white")
    draw = ImageDraw.Draw(image)
    parts = list(dict.fromkeys(_part(name) for name in (*spectra, *errors)))
    colours = {part: _COLOURS[place % len(_COLOURS)] for place, part in enumerate(parts)}
    left = (beside, above, beside + width, above + height)
    right = (2 * beside + width, above, 2 * beside + 2 * width, above + height)
    _draw_spectra(draw, left, spectra, colours)
    _draw_errors(draw, right, errors, colours)
    for place, part in enumerate(parts):
        draw.text((beside + 150 * place, height + above + 35), part, fill=colours[part])
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def _part(name: str) -> str:
    return "_".join(name.split("_")[:2])


def _draw_spectra(draw: ImageDraw, box: Box, spectra: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> None:
    longest = max((len(values) for values in spectra.values()), default=1)
    _draw_frame(draw, box, f"singular values relative to the largest (1 to {longest})")
    for decade in range(_DECADES + 1):
        _draw_line(draw, box, decade / _DECADES, f"1e-{decade}" if decade else "1")
    for name, values in spectra.items():
        if not values or not values[0] > 0:
            continue
        points = [
            _point(box, place / max(1, longest - 1), min(1.0, -math.log10(value / values[0]) / _DECADES))
            for place, value in enumerate(values)
            if value > 0
        ]
        if len(points) > 1:
            draw.line(points, fill=colours[_part(name)])
        else:
            draw.ellipse((points[0][0] - 2, points[0][1] - 2, points[0][0] + 2, points[0][1] + 2), fill=colours[_part(name)])


def _draw_errors(draw: ImageDraw, box: Box, errors: Mapping[str, float], colours: Mapping[str, str]) -> None:
    highest = max(errors.values(), default=0.0) or 1.0
    _draw_frame(draw, box, f"relative error of each of {len(errors)} layers")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        _draw_line(draw, box, 1 - share, f"{share * highest:.2g}")
    for place, (name, error) in enumerate(errors.items()):
        (x0, top), (x1, bottom) = (
            _point(box, place / len(errors), 1 - error / highest),
            _point(box, (place + 1) / len(errors), 1.0),
        )
        draw.rectangle((x0, min(top, bottom), max(x0, x1 - 1), bottom), fill=colours[_part(name)])


def _draw_frame(draw: ImageDraw, box: Box, title: str) -> None:
    draw.text((box[0], box[1] - 20), title, fill=_INK)
    draw.rectangle(box, outline=_INK)


def _draw_line(draw: ImageDraw, box: Box, down: float, label: str) -> None:
    """A level line and its label."""
    start, end = _point(box, 0.0, down), _point(box, 1.0, down)
    draw.line((start, end), fill=_GRID)
    draw.text((box[0] - 6, start[1]), label, fill=_INK, anchor="rm")


def _point(box: Box, along: float, down: float) -> tuple[int, int]:
    """Pixels of a place given as shares of a panel."""
    return round(box[0] + along * (box[2] - box[0])), round(box[1] + down * (box[3] - box[1]))
