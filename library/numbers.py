"""Numbers in texts that users write; None where a text is none, so that the caller can say what is missing there."""

from __future__ import annotations

import math


def finite_number(text: str) -> float | None:
    """The number that a text is; infinities and "nan" are none.

    >>> finite_number(" -.5 "), finite_number("inf"), finite_number("0,5")
    (-0.5, None, None)
    """
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def whole_number(text: str) -> int | None:
    """The number without a fraction that a text is; "3.0" is none.

    >>> whole_number("12"), whole_number("3.0")
    (12, None)
    """
    try:
        return int(text)
    except ValueError:
        return None
