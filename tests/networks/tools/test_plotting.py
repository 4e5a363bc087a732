"""Pictures of weight tools: what is drawn has its place, whatever the numbers."""

from __future__ import annotations

import math

import pytest
from PIL import Image

from networks.tools.plotting import Bars, Curves, draw_panels

BLUE = (0x2A, 0x6F, 0xB0)


def blue_columns(path, box) -> list[int]:
    """Pixels of the first colour in each column of a box."""
    with Image.open(path) as picture:
        part = picture.crop(box)
    return [sum(part.getpixel((x, y)) == BLUE for y in range(part.height)) for x in range(part.width)]


def test_bars_are_as_high_as_their_values(tmp_path):
    draw_panels(tmp_path / "p.png", [Bars(title="t", series={"s": {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.25}})])
    columns = blue_columns(tmp_path / "p.png", (80, 40, 640, 440))
    heights = [max(columns[140 * slot + 10 : 140 * slot + 130]) for slot in range(4)]
    assert heights == pytest.approx([400, 200, 0, 100], abs=2)


def test_names_and_series_beyond_the_usual_make_the_picture_larger(tmp_path):
    many = {f"rank {number}": dict.fromkeys(map(str, range(28)), 1.0) for number in range(20)}
    for name, series in {"few": dict(list(many.items())[:2]), "many": many}.items():
        draw_panels(tmp_path / f"{name}.png", [Bars(title=name, series=series)])
    with Image.open(tmp_path / "few.png") as few, Image.open(tmp_path / "many.png") as wide:
        assert few.width < wide.width


@pytest.mark.parametrize(
    "panel",
    [
        Bars(title="none", series={}),
        Bars(title="empty", series={"s": {}}),
        Bars(title="zeros", series={"s": {"a": 0.0}}),
        Bars(title="beyond numbers", series={"s": {"a": math.inf, "b": math.nan, "c": 1e-300}}),
        Curves(title="none", groups={}),
        Curves(title="short", groups={"g": [[], [0.0], [1.0], [2.0, 0.0], [3.0, 1e-30]]}),
    ],
    ids=lambda panel: f"{type(panel).__name__} {panel.title}",
)
def test_whatever_the_numbers_there_is_a_picture(panel, tmp_path):
    draw_panels(tmp_path / "p.png", [panel])
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width >= 600
