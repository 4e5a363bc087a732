"""One picture that shows what a LoRA has learned: training images, then the same prompts and seeds without and with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from tools.demo.lettering import font, wrapped

CELL = 192  # pixels of a picture on the sheet: the demo's 64, three times
GAP = 12
LABEL_WIDTH = 132
MARGIN = 20
PAPER, INK, FAINT = (255, 255, 255), (28, 30, 34), (104, 110, 120)


@dataclass(frozen=True)
class Picture:
    """A picture and the lines that stand by it."""

    image: Image.Image
    caption: str
    seed: str | None = None


@dataclass(frozen=True)
class Row:
    label: str
    pictures: Sequence[Picture]


def read_pictures(folder: Path) -> list[Picture]:
    """Generated pictures in the order they were made, with the prompt and seed their files carry."""
    pictures = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            pictures.append(Picture(image.convert("RGB"), str(image.info.get("prompt", path.stem)), image.info.get("seed")))
    return pictures


def read_training_pictures(folder: Path) -> list[Picture]:
    """Training images with their caption files."""
    pictures = []
    for path in sorted(folder.rglob("*.png")):
        caption = path.with_suffix(".txt")
        text = caption.read_text(encoding="utf-8").strip() if caption.exists() else path.stem
        with Image.open(path) as image:
            pictures.append(Picture(image.convert("RGB"), text))
    return pictures


def draw_contact_sheet(training: Sequence[Picture], rows: Sequence[Row]) -> Image.Image:
    """The sheet: a row of training images with their captions, then one column a prompt and one row a strength.

    Args:
        training: shown as far as they fit into the columns.
        rows: all with the same prompts and seeds.
    """
    columns = max(len(row.pictures) for row in rows)
    training = training[:columns]
    headings = [_heading(picture) for picture in rows[0].pictures]
    caption_height = _text_height([picture.caption for picture in training])
    heading_height = _text_height(headings)
    width = 2 * MARGIN + LABEL_WIDTH + columns * (CELL + GAP) - GAP
    height = 2 * MARGIN + (CELL + caption_height + 2 * GAP) + heading_height + len(rows) * (CELL + GAP)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)

    y = MARGIN
    _draw_row(sheet, draw, y, Row("training images", training))
    y += CELL + GAP // 2
    _draw_texts(draw, y, [picture.caption for picture in training])
    y += caption_height + GAP
    draw.line([(MARGIN, y - GAP // 2), (width - MARGIN, y - GAP // 2)], fill=FAINT, width=1)
    _draw_texts(draw, y, headings)
    y += heading_height
    for row in rows:
        _draw_row(sheet, draw, y, row)
        y += CELL + GAP
    return sheet


def _heading(picture: Picture) -> str:
    return picture.caption if picture.seed is None else f"{picture.caption}\nseed {picture.seed}"


def _column(index: int) -> int:
    return MARGIN + LABEL_WIDTH + index * (CELL + GAP)


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, y: int, row: Row) -> None:
    label = "\n".join(wrapped(row.label, font(17), LABEL_WIDTH - GAP))
    draw.multiline_text((MARGIN, y + CELL // 2), label, fill=INK, font=font(17), anchor="lm", spacing=6)
    for index, picture in enumerate(row.pictures):
        sheet.paste(picture.image.resize((CELL, CELL), Image.Resampling.LANCZOS), (_column(index), y))


def _draw_texts(draw: ImageDraw.ImageDraw, y: int, texts: Sequence[str]) -> None:
    for index, text in enumerate(texts):
        lines = "\n".join(wrapped(text, font(15), CELL))
        draw.multiline_text((_column(index), y), lines, fill=FAINT, font=font(15), spacing=4)


def _text_height(texts: Sequence[str]) -> int:
    lines = max((len(wrapped(text, font(15), CELL)) for text in texts), default=0)
    return lines * 20 + GAP
