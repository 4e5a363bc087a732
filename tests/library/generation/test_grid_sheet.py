"""Sheets: every picture is there as it is, at its place, and labels stand beside."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from library.generation.grid_axes import Axis, GridValue
from library.generation.grid_sheet import LEAST_SIDE, LONGEST_SIDE, Sheet, draw_sheet, labelled_row

COLOURS = ("red", "lime", "blue", "cyan", "magenta", "yellow")


def axis(side: str, what: str, labels: list[str]) -> Axis:
    return Axis(side=side, what=what, values=tuple(GridValue(label, label) for label in labels))


def sheet(columns: list[str], lines: list[str], size: tuple[int, int], notes: tuple[str, ...] = ("a cat",)) -> Sheet:
    colours = iter(COLOURS * len(columns) * len(lines))
    return Sheet(
        size=size,
        rows=[[Image.new("RGB", size, next(colours)) for _ in columns] for _ in lines],
        columns=columns,
        lines=lines,
        x=axis("x", "lora", columns),
        y=axis("y", "strength", lines) if len(lines) > 1 else None,
        notes=notes,
    )


def places(page: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a colour; all of what is between has it."""
    pixels = np.asarray(page)
    rows, columns = np.nonzero((pixels == np.asarray(Image.new("RGB", (1, 1), colour))).all(-1))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top)
    return left, top, right, bottom


def test_pictures_stand_in_rows_and_columns_at_their_own_size():
    page = draw_sheet(sheet(["a", "b", "c"], ["0", "1"], (320, 256)))
    boxes = [places(page, colour) for colour in COLOURS]
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(320, 256)}
    assert sorted(boxes, key=lambda box: (box[1], box[0])) == boxes
    assert len({box[0] for box in boxes}) == 3
    assert len({box[1] for box in boxes}) == 2


def test_small_pictures_are_enlarged_and_large_sheets_kept_in_bounds():
    left, top, right, bottom = places(draw_sheet(sheet(["a"], ["0"], (64, 128))), "red")
    assert (right - left, bottom - top) == (LEAST_SIDE, 2 * LEAST_SIDE)
    wide = draw_sheet(sheet([str(number) for number in range(100)], ["0"], (1024, 64)))
    assert wide.width <= LONGEST_SIDE


@pytest.mark.parametrize("name", ["run-000002", "a_run_of_a_very_long_name_" * 9 + "-000002"])
def test_labels_stay_above_their_own_pictures(name):
    page = draw_sheet(sheet([name, "b"], ["0"], (256, 256)))
    left, top, right, _ = places(page, "red")
    label = np.asarray(page.convert("L"))[top - 24 : top - 2] < 128
    inked = np.nonzero(label.any(0))[0]
    assert inked[inked < right + 4].min() >= left
    assert not label[:, right : right + 8].any()


def test_the_end_of_a_files_name_is_kept_since_it_tells_epochs_apart():
    long = "a_run_of_a_very_long_name_" * 9
    one, other = (draw_sheet(sheet([long + end], ["0"], (256, 256))) for end in ("2", "4"))
    assert one.tobytes() != other.tobytes()


def test_notes_are_wrapped_even_within_words():
    plain = draw_sheet(sheet(["a"], ["0"], (256, 256)))
    wrapped = draw_sheet(sheet(["a"], ["0"], (256, 256), ("word " * 60, "x" * 300)))
    assert wrapped.width == plain.width
    assert wrapped.height > plain.height + 100


def test_two_pictures_stand_side_by_side_as_they_are():
    page = labelled_row([(Image.new("RGB", (64, 96), "red"), "one"), (Image.new("RGB", (64, 96), "blue"), "a long " * 9)])
    first, second = places(page, "red"), places(page, "blue")
    assert (first[0], first[2] - first[0], first[3] - first[1]) == (0, 64, 96)
    assert (second[2], second[1]) == (page.width, first[1])
