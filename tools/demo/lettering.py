"""Text on pictures, in the typeface that comes with Pillow."""

from __future__ import annotations

from functools import cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def font(size: int) -> Font:
    """The built-in typeface at a size in pixels."""
    return ImageFont.load_default(size)


def wrapped(text: str, typeface: Font, width: int) -> list[str]:
    """Text in lines of at most `width` pixels; a word longer than that stays whole, and line ends stay where they are."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and typeface.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
