"""Pictures on one sheet, with labels that say what each shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from library.generation.grid_axes import LORA, Axis

LEAST_SIDE, LONGEST_SIDE = 224, 16_000
"""Pixels: of a picture on a sheet, so that its label is readable, and of a sheet that programs still open."""
_PAPER, _INK, _PALE = "#ffffff", "#1c1c1e", "#77777d"
_GAP, _MARGIN = 8, 24
_LINE = 1.35  # height of a line of text, in font sizes


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What a sheet shows.

    Attributes:
        size: width and height of each picture.
        rows: of pictures, from the top; they are taken one at a time.
        columns, lines: a label for each column and row.
        x, y: what those vary; None for a single one.
        notes: texts below, the first in full ink.
    """

    size: tuple[int, int]
    rows: Iterable[Iterable[Image.Image]]
    columns: Sequence[str]
    lines: Sequence[str]
    x: Axis | None
    y: Axis | None
    notes: Sequence[str]


def draw_sheet(sheet: Sheet) -> Image.Image:
    """One picture of all: columns labelled above, rows at the left, notes below."""
    width, height = _cell_size(sheet)
    size = max(16, min(40, width // 16))
    big, small = _font(size), _font(max(13, size * 3 // 4))
    left = _width_of_lines(sheet, big, small, most=width)
    top = _MARGIN + (_height(small) + _height(big) if sheet.x is not None else 0)
    step_x, step_y = width + _GAP, height + _GAP
    inner = len(sheet.columns) * step_x - _GAP
    wrapped = [line for note in sheet.notes for line in _wrapped(note, small, left + inner - _MARGIN)]
    first_notes = len(_wrapped(sheet.notes[0], small, left + inner - _MARGIN)) if sheet.notes else 0
    below = top + len(sheet.lines) * step_y + _GAP
    page = Image.new("RGB", (left + inner + _MARGIN, below + len(wrapped) * _height(small) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    if sheet.x is not None:
        draw.text((left, _MARGIN), sheet.x.what, fill=_PALE, font=small)
        for number, label in enumerate(sheet.columns):
            text = _fitting(label, big, width, sheet.x)
            place = (left + number * step_x + width / 2, top - 1.5 * _GAP)
            draw.text(place, text, fill=_INK, font=big, anchor="ms")
    if sheet.y is not None:
        corner, anchor = (top - 1.5 * _GAP, "ls") if sheet.x is not None else (top, "la")
        draw.text((_MARGIN, corner), sheet.y.what, fill=_PALE, font=small, anchor=anchor)
        for number, label in enumerate(sheet.lines):
            text = _fitting(label, big, left - _MARGIN - 2 * _GAP, sheet.y)
            draw.text((left - 2 * _GAP, top + number * step_y + height / 2), text, fill=_INK, font=big, anchor="rm")
    for row, pictures in enumerate(sheet.rows):
        for column, picture in enumerate(pictures):
            page.paste(_resized(picture, (width, height)), (left + column * step_x, top + row * step_y))
    for number, line in enumerate(wrapped):
        ink = _INK if number < first_notes else _PALE
        draw.text((_MARGIN, below + number * _height(small)), line, fill=ink, font=small)
    return page


def labelled_row(pictures: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures of one size side by side, each as it is, with its label above it."""
    width, height = pictures[0][0].size
    size = max(12, min(32, width // 16))
    font = _font(size)
    top = _height(font) + _GAP
    page = Image.new("RGB", (len(pictures) * (width + _GAP) - _GAP, top + height), _PAPER)
    draw = ImageDraw.Draw(page)
    for number, (picture, label) in enumerate(pictures):
        place = number * (width + _GAP)
        text = _cut(label, lambda text: font.getlength(text) <= width)
        draw.text((place + width / 2, top / 2), text, fill=_INK, font=font, anchor="mm")
        page.paste(picture.convert("RGB"), (place, top))
    return page


def _cell_size(sheet: Sheet) -> tuple[int, int]:
    """(width, height) of each picture: its own where the sheet can hold it."""
    width, height = sheet.size
    factor = max(1.0, LEAST_SIDE / min(width, height))
    for side, count in ((width, len(sheet.columns)), (height, len(sheet.lines))):
        factor = min(factor, (LONGEST_SIDE / (count + 1) - _GAP) / side)  # labels and notes take no more than a picture
    return max(1, int(width * factor)), max(1, int(height * factor))


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _width_of_lines(sheet: Sheet, big: ImageFont.FreeTypeFont, small: ImageFont.FreeTypeFont, *, most: int) -> int:
    """Where pictures begin: behind the labels of the rows."""
    if sheet.y is None:
        return _MARGIN
    widest = max([*(big.getlength(label) for label in sheet.lines), small.getlength(sheet.y.what)])
    return _MARGIN + int(min(widest, most)) + 2 * _GAP


# Text


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow comes with FreeType"
    return font


def _height(font: ImageFont.FreeTypeFont) -> int:
    return int(font.size * _LINE)


def _fitting(label: str, font: ImageFont.FreeTypeFont, width: float, axis: Axis) -> str:
    """A label that fits; names of files end with what tells them apart, others begin with it."""

    def fits(text: str) -> bool:
        return font.getlength(text) <= width

    return _cut(label[::-1], lambda text: fits(text[::-1]))[::-1] if axis.what == LORA else _cut(label, fits)


def _cut(text: str, fits: Callable[[str], bool]) -> str:
    """As much of a text from its beginning as fits, with an ellipsis where that is not all."""
    if fits(text):
        return text
    while text and not fits(text + "…"):
        text = text[:-1]
    return text + "…"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines of a text, cut between words; a word that is longer than a line is cut within."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append(word)
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
            kept = _cut(lines[-1], lambda part: font.getlength(part) <= width)[:-1] or lines[-1][0]
            lines[-1:] = [kept, lines[-1][len(kept) :]]
    return [line for line in lines if line]
