"""Columns of text."""

from __future__ import annotations

from collections.abc import Container, Sequence


def table(rows: Sequence[Sequence[str]], titles: Sequence[str], *, left: Container[int] = (0,)) -> list[str]:
    """Lines with columns as wide as their widest cell.

    Args:
        left: numbers of the columns that begin on the left; the others end on the right.
    """
    widths = [max(len(row[place]) for row in (titles, *rows)) for place in range(len(titles))]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (titles, *rows)
    ]
