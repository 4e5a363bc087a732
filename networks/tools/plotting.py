"""A picture of what a weight tool did: panels of curves and of bars, beside each other in a PNG file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.atomic import atomic_write

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

_ROOM = (560, 400)  # pixels of a panel's room for curves or bars
_MARGIN = (80, 40)  # left of it, where numbers stand; and above it, for the title
_FOOT = 110  # below it, for names of places and the legend
_BAR = 6  # the least width of a bar
_DECADES = 6  # the most of singular values that are shown below the largest
_COLOURS = ("#2a6fb0", "#c8602a", "#3a8a4a", "#8a4a9a", "#777777", "#b0a020")
_INK, _GRID = "#222222", "#dddddd"

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Falling curves, each relative to its first value, on a logarithmic scale.

    Attributes:
        title: of the panel.
        groups: name in the legend -> curves of its colour; values above 0, largest first. Zeros are not drawn.
    """

    title: str
    groups: Mapping[str, Sequence[Sequence[float]]]

    @property
    def width(self) -> int:
        """Pixels of the room for the curves."""
        return _ROOM[0]

    @property
    def legend(self) -> Sequence[str]:
        """Names, in the order of their colours."""
        return list(self.groups)

    def draw(self, draw: ImageDraw, box: Box) -> None:
        """Draw into a box of the picture."""
        whole = [curve for curves in self.groups.values() for curve in curves]
        longest = max(map(len, whole), default=1)
        decades = max(
            [1, *(min(_DECADES, math.ceil(_depth(value, curve))) for curve in whole for value in curve if value > 0)]
        )
        for decade in range(decades + 1):
            _draw_level(draw, box, decade / decades, f"1e-{decade}" if decade else "1")
        for place in sorted({1, (longest + 1) // 2, longest}):
            across = _point(box, (place - 1) / max(1, longest - 1), 1.0)
            draw.text((across[0], across[1] + 6), str(place), fill=_INK, anchor="mt")
        draw.text(_point(box, 0.5, 1.0, down_by=24), "place of the value", fill=_INK, anchor="mt")
        groups = zip(_colours(self.groups), self.groups.values(), strict=True)
        for colour, curves in sorted(groups, key=lambda group: -len(group[1])):  # few curves above many
            for curve in curves:
                _draw_curve(draw, box, curve, (longest, decades), colour)


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars from 0 up, one at each place for each series, on a linear scale.

    Attributes:
        title: of the panel.
        series: name in the legend -> place -> value, 0 or more. Places stand in the order in which they are first named.
    """

    title: str
    series: Mapping[str, Mapping[str, float]]

    @property
    def places(self) -> Sequence[str]:
        """All places, in their order."""
        return list(dict.fromkeys(place for values in self.series.values() for place in values))

    @property
    def width(self) -> int:
        """Pixels of the room for the bars: more where there are many."""
        return max(_ROOM[0], len(self.places) * (_BAR * len(self.series) + 4))

    @property
    def legend(self) -> Sequence[str]:
        """Names, in the order of their colours."""
        return list(self.series)

    def draw(self, draw: ImageDraw, box: Box) -> None:
        """Draw into a box of the picture."""
        highest = max((value for values in self.series.values() for value in values.values()), default=0.0)
        scale = _round_number_from(highest) if 0 < highest < math.inf else 1.0
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            _draw_level(draw, box, 1 - share, f"{share * scale:.3g}")
        slot = (box[2] - box[0]) / max(1, len(self.places))
        for number, place in enumerate(self.places):
            left = box[0] + number * slot
            _write_upwards(draw, (round(left + slot / 2), box[3] + 6), place)
            wide = (slot - 4) / len(self.series)
            for column, (colour, values) in enumerate(zip(_colours(self.series), self.series.values(), strict=True)):
                start = left + 2 + column * wide
                top = _point(box, 0.0, 1 - min(1.0, values.get(place, 0.0) / scale))[1]
                if top < box[3]:
                    draw.rectangle((round(start), top, max(round(start), round(start + wide) - 1), box[3]), fill=colour)


Panel = Curves | Bars


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels from left to right, each with its title above and its legend below it.

    Args:
        path: of the picture; it appears complete or not at all.

    Raises:
        UserError: a place that cannot be written to.
    """
    from PIL import Image, ImageDraw

    (beside, above), height = _MARGIN, _ROOM[1]
    lines = max((len(_legend_lines(panel)) for panel in panels), default=1)
    width = sum(panel.width + beside for panel in panels) + beside // 2
    image = Image.new("RGB", (width, above + height + _FOOT + 16 * lines), "white")
    draw = ImageDraw.Draw(image)
    left = beside
    for panel in panels:
        box = (left, above, left + panel.width, above + height)
        draw.text((left, above - 20), panel.title, fill=_INK)
        panel.draw(draw, box)
        draw.rectangle(box, outline=_INK)
        _draw_legend(draw, panel, box)
        left += panel.width + beside
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def _colours(names: Mapping[str, object]) -> list[str]:
    return [_COLOURS[place % len(_COLOURS)] for place in range(len(names))]


def _legend_lines(panel: Panel) -> list[list[tuple[str, str]]]:
    """Name and colour of each series, in lines that are no wider than the panel."""
    lines: list[list[tuple[str, str]]] = [[]]
    for place, name in enumerate(panel.legend):
        if lines[-1] and sum(_text_size(shown)[0] + 32 for shown, _ in [*lines[-1], (name, "")]) > panel.width:
            lines.append([])
        lines[-1].append((name, _COLOURS[place % len(_COLOURS)]))
    return lines


def _draw_legend(draw: ImageDraw, panel: Panel, box: Box) -> None:
    for row, line in enumerate(_legend_lines(panel)):
        left, top = box[0], box[3] + _FOOT - 6 + 16 * row
        for name, colour in line:
            draw.rectangle((left, top + 1, left + 9, top + 10), fill=colour)
            draw.text((left + 14, top), name, fill=_INK)
            left += _text_size(name)[0] + 32


def _depth(value: float, curve: Sequence[float]) -> float:
    """How many decades a value above 0 is below the first of its curve."""
    return math.log10(curve[0]) - math.log10(value)


def _round_number_from(value: float) -> float:
    """The lowest number at or above a positive one whose quarters are short to write; a hair above it counts as it."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 4, 6, 8, 10, 20) if step * unit >= value * (1 - 1e-4))


def _draw_curve(draw: ImageDraw, box: Box, curve: Sequence[float], sizes: tuple[int, int], colour: str) -> None:
    if not curve or not curve[0] > 0:
        return
    longest, decades = sizes
    points = [
        _point(box, place / max(1, longest - 1), min(1.0, _depth(value, curve) / decades))
        for place, value in enumerate(curve)
        if value > 0
    ]
    if len(points) > 1:
        draw.line(points, fill=colour)
    else:
        draw.ellipse((points[0][0] - 2, points[0][1] - 2, points[0][0] + 2, points[0][1] + 2), fill=colour)


def _draw_level(draw: ImageDraw, box: Box, down: float, label: str) -> None:
    """A level line and its label."""
    start, end = _point(box, 0.0, down), _point(box, 1.0, down)
    draw.line((start, end), fill=_GRID)
    draw.text((box[0] - 6, start[1]), label, fill=_INK, anchor="rm")


def _write_upwards(draw: ImageDraw, top: tuple[int, int], text: str) -> None:
    """Text that reads from below, its end at a place and its line centred there."""
    from PIL import Image, ImageDraw

    width, height = _text_size(text)
    label = Image.new("L", (width, height), 0)
    ImageDraw.Draw(label).text((0, 0), text, fill=255)
    turned: Image.Image = label.rotate(90, expand=True)
    draw.bitmap((top[0] - height // 2, top[1]), turned, fill=_INK)


def _text_size(text: str) -> tuple[int, int]:
    """Width and height in pixels."""
    from PIL import Image, ImageDraw

    _, _, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text)
    return math.ceil(right) + 1, math.ceil(bottom) + 2


def _point(box: Box, along: float, down: float, *, down_by: int = 0) -> tuple[int, int]:
    """Pixels of a place given as shares of a panel, and of one some pixels below it."""
    return round(box[0] + along * (box[2] - box[0])), round(box[1] + down * (box[3] - box[1])) + down_by
