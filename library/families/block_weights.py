"""Block weights (`--lbws`, `lbw=` in prompts): one factor for each of 26 places of a model.

The places are BASE (text encoders), IN00 to IN11, MID, OUT00 to OUT11. Shorter lists name some of them, the others keep 1:
12 and 20 values are the places that SDXL has, 17 those of SD1 and SD2 with attention. Names stand for lists of 17, as web
UIs have them; a place that such a list leaves out takes the value of the one before it on its side, or of the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from library.errors import UserError, near_names
from library.families.family import ModelFamily

PLACES = ("BASE", *(f"IN{place:02d}" for place in range(12)), "MID", *(f"OUT{place:02d}" for place in range(12)))


def _named(*groups: str) -> tuple[int, ...]:
    """The places named in "IN 1 2 4", "MID", ... ."""
    names = [word for group in groups for word in _words(*group.split())]
    return tuple(PLACES.index(name) for name in names)


def _words(side: str, *numbers: str) -> list[str]:
    return [f"{side}{int(number):02d}" for number in numbers] or [side]


LAYOUTS: Mapping[int, tuple[int, ...]] = {
    12: _named("BASE", "IN 4 5 7 8", "MID", "OUT 0 1 2 3 4 5"),
    17: _named("BASE", "IN 1 2 4 5 7 8", "MID", "OUT 3 4 5 6 7 8 9 10 11"),
    20: _named("BASE", "IN 0 1 2 3 4 5 6 7 8", "MID", "OUT 0 1 2 3 4 5 6 7 8"),
    26: tuple(range(26)),
}
"""Number of values -> the place of each."""

PRESETS: Mapping[str, str] = {
    "NONE": "00000000000000000",
    "ALL": "11111111111111111",
    "INS": "11110000000000000",
    "IND": "10001110000000000",
    "INALL": "11111110000000000",
    "MIDD": "10001111111100000",
    "OUTD": "10000000111100000",
    "OUTS": "10000000000011111",
    "OUTALL": "10000000111111111",
}
"""Name -> a digit for each place of the layout of 17."""


def read_block_weights(text: str, *, where: str | None = None) -> tuple[float, ...]:
    """26 factors from a JSON list, or a name in `PRESETS`.

    Args:
        where: how a sentence names the text; `--lbws` without it.

    Raises:
        UserError: another number of values, something that is no number, or an unknown name.
    """
    where = where or f"--lbws {text}"
    if not text.lstrip().startswith("["):
        if text.strip().upper() not in PRESETS:
            remedy = f"{near_names(text.strip().upper(), PRESETS)}; or give a JSON list of 12, 17, 20 or 26 numbers"
            raise UserError("is neither a JSON list nor a known name", where=where, remedy=remedy)
        return _spread(PRESETS[text.strip().upper()])
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    numbers = values if isinstance(values, list) else [None]
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e9 for value in numbers):
        raise UserError("is not a JSON list of numbers", where=where, remedy='write it like "[1,0,0.5,...]"')
    if len(numbers) not in LAYOUTS:
        counts = "12, 17, 20 or 26"
        raise UserError(
            f"has {len(numbers)} values", where=where, remedy=f"give {counts}, for the places BASE, IN, MID, OUT"
        )
    weights = [1.0] * len(PLACES)
    for place, value in zip(LAYOUTS[len(numbers)], numbers, strict=True):
        weights[place] = float(value)
    return tuple(weights)


def _spread(digits: str) -> tuple[float, ...]:
    listed = {place: float(digit) for place, digit in zip(LAYOUTS[17], digits, strict=True)}
    weights: list[float] = []
    for place, name in enumerate(PLACES):
        side = [other for other in listed if PLACES[other].rstrip("0123456789") == name.rstrip("0123456789")]
        weights.append(listed[max((other for other in side if other <= place), default=side[0])])
    return tuple(weights)


def place_of(layer: str, family: ModelFamily) -> int | None:
    """The place of a layer of our name among the 26; None for the few that are outside all blocks."""
    if not layer.startswith(family.denoiser_prefix):
        return 0
    block = family.block_index(layer)
    return None if block is None else block + 1
