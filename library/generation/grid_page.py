"""A page for browsers with the pictures of grids: it needs nothing but the pictures beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePosixPath
from urllib.parse import quote

from library.generation.grid_axes import Axis
from library.generation.requests import ImageRequest

_STYLE = """
:root { color-scheme: light dark; --pale: #77777d; --line: #8884; }
body { margin: 2rem; font: 15px/1.5 system-ui, sans-serif; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.1rem; font-weight: 600; max-width: 60rem; }
p, figcaption, summary, .what { color: var(--pale); font-size: .85rem; }
.sheet { overflow: auto; max-height: 95vh; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 6px; }
th { background: Canvas; font-weight: 600; padding: .3rem .6rem; overflow-wrap: break-word; }
thead th { position: sticky; top: 0; z-index: 1; }
tbody th { position: sticky; left: 0; text-align: right; max-width: 14rem; }
.what { white-space: nowrap; }
td { vertical-align: top; }
figure { margin: 0; width: 16rem; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
details { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True, kw_only=True)
class PageCell:
    """One picture.

    Attributes:
        file: from the page, with "/" between its parts.
        title: what tells it from the others.
    """

    file: PurePosixPath
    title: str
    request: ImageRequest


@dataclass(frozen=True, kw_only=True)
class PageGrid:
    """One grid; see `grid_sheet.Sheet`."""

    prompt: str
    sheet: PurePosixPath
    rows: Sequence[Sequence[PageCell]]
    columns: Sequence[str]
    lines: Sequence[str]
    x: Axis | None
    y: Axis | None
    notes: Sequence[str]


def page_text(title: str, grids: Sequence[PageGrid]) -> str:
    """The page."""
    body = "\n".join(line for grid in grids for line in _grid(grid))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def settings_text(request: ImageRequest, *, varied: Sequence[Axis | None] = ()) -> str:
    """What a picture was drawn with beside its prompt, on a line.

    Args:
        varied: what to leave out, since pictures differ in it.
    """
    strengths = ", ".join(f"{strength:g}" for strength in request.network_strengths)
    parts = {
        "seed": f"seed {request.seed}",
        "steps": f"{request.steps} steps",
        "scale": f"scale {request.scale:g}",
        "sampler": request.sampler,
        "size": f"{request.width}x{request.height}",
        "clip_skip": f"clip skip {request.clip_skip}" if request.clip_skip is not None else "",
        "denoising": f"denoising {request.strength:g}" if request.image is not None else "",
        "strength": f"adapters at {strengths}" if strengths else "",
    }
    left_out = {axis.what for axis in varied if axis is not None}
    return ", ".join(text for name, text in parts.items() if text and name not in left_out)


def _grid(grid: PageGrid) -> Iterator[str]:
    yield f"<h2>{escape(grid.prompt)}</h2>"
    yield from (f"<p>{escape(note)}</p>" for note in grid.notes)
    yield f'<p><a href="{_link(grid.sheet)}">as one picture</a></p>'
    yield '<div class="sheet"><table>'
    if grid.x is not None:
        corner = f'<th><span class="what">{escape(_corner(grid))}</span></th>'
        labels = "".join(f'<th scope="col">{escape(label)}</th>' for label in grid.columns)
        yield f"<thead><tr>{corner}{labels}</tr></thead>"
    yield "<tbody>"
    for label, row in zip(grid.lines, grid.rows, strict=True):
        name = label if grid.x is not None or grid.y is None else f"{grid.y.what} {label}"
        yield f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, row))}</tr>'
    yield "</tbody></table></div>"


def _corner(grid: PageGrid) -> str:
    return " / ".join(axis.what for axis in (grid.y, grid.x) if axis is not None)


def _cell(cell: PageCell) -> str:
    request = cell.request
    negative = f"<br>negative: {escape(request.negative_prompt)}" if request.negative_prompt else ""
    link = _link(cell.file)
    return (
        f'<td><figure><a href="{link}"><img src="{link}" alt="{escape(cell.title)}" loading="lazy" '
        f'width="{request.width}" height="{request.height}"></a>'
        f"<figcaption>{escape(settings_text(request))}"
        f"<details><summary>prompt</summary>{escape(request.prompt)}{negative}</details></figcaption></figure></td>"
    )


def _link(path: PurePosixPath) -> str:
    return escape(quote(path.as_posix()))
