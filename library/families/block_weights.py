"""Block weights (`--lbws`, `lbw=` in prompts): one factor for each of 26 places of a model.

The places are BASE (text encoders), IN00 to IN11, MID, OUT00 to OUT11. Shorter lists name some of them, the others keep 1:
12 and 20 values are the places that SDXL has, 17 those of SD1 and SD2 with attention; a single number is for all places.
Names stand for lists of 17, as web UIs have them; a place that such a list leaves out takes the value of the one before it
on its side, or of the first.
"""

from __future__ import annotations

from collections.abc import Mapping

from library.errors import UserError, counted, near_names
from library.families.family import ModelFamily
from library.numbers import finite_number

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


def _digits(digits: str) -> tuple[float, ...]:
    return tuple(map(float, digits))


PRESETS: Mapping[str, tuple[float, ...]] = {
    "NONE": _digits("00000000000000000"),
    "ALL": _digits("11111111111111111"),
    "INS": _digits("11110000000000000"),
    "IND": _digits("10001110000000000"),
    "INALL": _digits("11111110000000000"),
    "MIDD": _digits("10001111111100000"),
    "OUTD": _digits("10000000111100000"),
    "OUTS": _digits("10000000000011111"),
    "OUTALL": _digits("10000000111111111"),
    "ALL0.5": (0.5,) * 17,
}
"""Name -> the values of the layout of 17."""


def read_block_weights(text: str, *, where: str | None = None) -> tuple[float, ...]:
    """26 factors from a list of numbers between commas, in brackets or not, one number for all, or a name in `PRESETS`.

    Args:
        where: how a sentence names the text; `--lbws` without it.

    Raises:
        UserError: another number of values, something that is no number, or an unknown name.
    """
    where = where or f"--lbws {text}"
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    if inner.upper() in PRESETS:
        return _spread(PRESETS[inner.upper()])
    values = [finite_number(item) for item in inner.split(",")]
    numbers = [value for value in values if value is not None and abs(value) <= 1e9]
    if len(values) == 1 and not numbers:
        remedy = f"{near_names(inner.upper(), PRESETS)}; or give a list of {_counts()} numbers"
        raise UserError("is neither a list of numbers nor a known name", where=where, remedy=remedy)
    if len(numbers) < len(values):
        raise UserError("is not a list of numbers", where=where, remedy='write it like "[1,0,0.5,...]"')
    if inner == text.strip() and len(numbers) == 1:
        return tuple(numbers * len(PLACES))
    if len(numbers) not in LAYOUTS:
        remedy = f"give {_counts()}, for the places BASE, IN, MID, OUT"
        raise UserError(f"has {counted(len(numbers), 'value')}", where=where, remedy=remedy)
    weights = [1.0] * len(PLACES)
    for place, value in zip(LAYOUTS[len(numbers)], numbers, strict=True):
        weights[place] = value
    return tuple(weights)


def _counts() -> str:
    *fewer, most = map(str, LAYOUTS)
    return f"{', '.join(fewer)} or {most}"


def _spread(values: tuple[float, ...]) -> tuple[float, ...]:
    listed = dict(zip(LAYOUTS[17], values, strict=True))
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
    return None if block is None else family.block_places[block]
