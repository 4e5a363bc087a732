"""What a grid of pictures varies: axes as users write them (`x=strength:0-1:0.25`) and what a value does to a request."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import Any

from library.errors import UserError, attempt, near_names, raise_all
from library.families.block_weights import read_block_weights
from library.generation.requests import ImageRequest
from library.generation.samplers import find_sampler
from library.numbers import finite_number, whole_number
from library.prompts.tag_editing import first_tag, with_adapter, with_argument, with_strength

MAX_VALUES = 100

LORA, STRENGTH, BLOCKS, RANK, PROMPT = "lora", "strength", "lbw", "rank", "prompt"
OF_A_TAG = (BLOCKS, RANK)
"""What only a tag in a prompt can say of an adapter."""
NONE = "none"
"""In place of an adapter file: the picture without it."""

_EXAMPLES = "write x=strength:0,0.5,1 or y=seed:1-4"
_AXIS = re.compile(r"\s*([xy])\s*=\s*(\w+)\s*[:=](.*)", re.DOTALL)
_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*-\s*({_NUMBER})\s*(?::\s*({_NUMBER})\s*)?")
_OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")


@dataclass(frozen=True)
class GridValue:
    """One value of an axis.

    Attributes:
        label: as a person reads it.
        value: what it is; of `LORA`, first a file or pattern, and once it is found the name for a tag, or None for none.
    """

    label: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One side of a grid.

    Attributes:
        side: "x" for columns, "y" for rows.
        what: a name of `KINDS`.
    """

    side: str
    what: str
    values: tuple[GridValue, ...]

    @property
    def where(self) -> str:
        """How a sentence names it."""
        return f"--grid {self.side}={self.what}"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One thing that can be varied.

    Attributes:
        read: values from the text behind the colon; given how a sentence names it too.
        apply: a request with one of them; given how a sentence names it too.
    """

    read: Callable[[str, str], list[GridValue]]
    apply: Callable[[ImageRequest, Any, str], ImageRequest]


def read_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """The axes of `--grid`, columns first.

    Raises:
        UserError: no axes, unknown things, one thing twice, values that cannot be read or are out of range; all at once.
    """
    problems: list[UserError] = []
    axes = [axis for text in texts if (axis := attempt(partial(_read_axis, text), problems)) is not None]
    sides, things = [axis.side for axis in axes], [axis.what for axis in axes]
    for given, what in ((sides, "is given twice"), (things, "is on both sides")):
        twice = {each for each in given if given.count(each) > 1}
        problems += [UserError(what, where=f"--grid {each}", remedy="keep one of them") for each in sorted(twice)]
    if not texts:
        problems.append(UserError("names no axis", where="--grid", remedy=_EXAMPLES))
    raise_all(problems)
    return tuple(sorted(axes, key=lambda axis: axis.side))


def applied(request: ImageRequest, choices: Sequence[tuple[Axis, GridValue]]) -> ImageRequest:
    """A request with one value of each axis, whatever their order.

    Raises:
        UserError: values that the request cannot have.
    """
    for name, kind in KINDS.items():
        for axis, value in choices:
            if axis.what == name:
                request = kind.apply(request, value.value, axis.where)
    return request


def _read_axis(text: str) -> Axis:
    where = f"--grid {text}"
    found = _AXIS.fullmatch(text)
    if found is None:
        raise UserError("is no axis", where=where, remedy=_EXAMPLES)
    side, what, rest = found.groups()
    if what not in KINDS:
        raise UserError(f"'{what}' cannot be varied", where=where, remedy=near_names(what, KINDS))
    values = KINDS[what].read(rest, where)
    if not values:
        raise UserError("has no values", where=where, remedy=_EXAMPLES)
    if len(values) > MAX_VALUES:
        raise UserError(f"has {len(values)} values", where=where, remedy=f"give {MAX_VALUES} at most")
    twice = sorted({value.label for value in values if [each.label for each in values].count(value.label) > 1})
    if twice:
        raise UserError(f"has {', '.join(twice)} twice", where=where, remedy="give each value once")
    return Axis(side=side, what=what, values=tuple(values))


# Values


def _texts(text: str, where: str) -> list[GridValue]:
    return [GridValue(piece.strip(), piece.strip()) for piece in text.split(",") if piece.strip()]


def _numbers(text: str, where: str, *, whole: bool = False) -> list[GridValue]:
    """Numbers and ranges between commas: 1,2,5-8 or 0-1:0.25, both ends included where steps meet them."""
    values: list[GridValue] = []
    for piece in map(str.strip, text.split(",")):
        texts = _spread(piece, where) if _RANGE.fullmatch(piece) else [piece]
        for each in texts:
            number = whole_number(each) if whole else finite_number(each)
            if number is None:
                kind = "whole number" if whole else "number"
                remedy = "give values between commas, or a range with its step: 0-1:0.25"
                raise UserError(f"'{each}' is no {kind}", where=where, remedy=remedy)
            values.append(GridValue(f"{number}" if whole else f"{number:g}", number))
    return values


def _spread(piece: str, where: str) -> Iterator[str]:
    found = _RANGE.fullmatch(piece)
    assert found is not None, "the caller has seen that it is a range"
    first, last, step = Decimal(found[1]), Decimal(found[2]), Decimal(found[3] or 1)
    if step <= 0 or last < first:
        remedy = "write the lower end first, and a step above 0: 0-1:0.25"
        raise UserError(f"'{piece}' is a range without values", where=where, remedy=remedy)
    count = int((last - first) / step) + 1
    if count > MAX_VALUES:
        raise UserError(f"'{piece}' has {count} values", where=where, remedy=f"give {MAX_VALUES} at most")
    return (f"{(first + number * step).normalize():f}" for number in range(count))


def _prompts(text: str, where: str) -> list[GridValue]:
    words = [word.strip() for word in text.split("|")]
    if len(words) < 2 or not words[0]:
        remedy = "write what is in the prompt, then what takes its place: prompt:red|blue|dark green"
        raise UserError("names no words to put in place of others", where=where, remedy=remedy)
    return [GridValue(word or "(nothing)", (words[0], word)) for word in words]


def _blocks(text: str, where: str) -> list[GridValue]:
    names = [piece.strip() for piece in _OUTSIDE_BRACKETS.split(text) if piece.strip()]
    for name in names:
        read_block_weights(name, where=where)
    return [GridValue(name.strip("[]"), name) for name in names]


def _samplers(text: str, where: str) -> list[GridValue]:
    values = _texts(text, where)
    for value in values:
        find_sampler(value.value, where=where)
    return values


# What a value does


def _field(name: str, *, whole: bool = False) -> Kind:
    """A field of requests that is a number; what it may be, requests know."""

    def read(text: str, where: str) -> list[GridValue]:
        values = _numbers(text, where, whole=whole)
        for value in values:
            apply(ImageRequest(prompt="", seed=0), value.value, where)
        return values

    def apply(request: ImageRequest, value: Any, where: str) -> ImageRequest:
        return _replaced(request, where, **{name: value})

    return Kind(read=read, apply=apply)


def _with_denoising(request: ImageRequest, value: float, where: str) -> ImageRequest:
    if request.image is None and request.highres_scale is None:
        remedy = "give one with --image_path, or --highres_fix_scale"
        raise UserError("there is no picture to begin from", where=where, remedy=remedy)
    return _replaced(request, where, strength=value)


def _replaced(request: ImageRequest, where: str, **fields: Any) -> ImageRequest:
    try:
        return replace(request, **fields)
    except UserError as error:
        raise UserError(error.what, where=where, remedy=error.remedy) from None


def _reworded(request: ImageRequest, words: tuple[str, str], where: str) -> ImageRequest:
    old, new = words
    if old not in request.prompt and old not in request.negative_prompt:
        remedy = "begin with words of the prompt: they are what the others take the place of"
        raise UserError(f"'{old}' does not stand in the prompt {request.prompt!r}", where=where, remedy=remedy)
    texts = {name: getattr(request, name).replace(old, new) for name in ("prompt", "negative_prompt")}
    return _replaced(request, where, **texts)


def _with_file(request: ImageRequest, name: str | None, where: str) -> ImageRequest:
    return replace(request, prompt=with_adapter(request.prompt, name, where=where))


def _with_strength(request: ImageRequest, strength: float, where: str) -> ImageRequest:
    """Of the first tag; without one, of the command line's first adapter, whose strength the request then names."""
    if first_tag(request.prompt) is None and request.network_strengths:
        return replace(request, network_strengths=(strength, *request.network_strengths[1:]))
    return replace(request, prompt=with_strength(request.prompt, strength))


def _with_argument(key: str) -> Callable[[ImageRequest, Any, str], ImageRequest]:
    def apply(request: ImageRequest, value: Any, where: str) -> ImageRequest:
        return replace(request, prompt=with_argument(request.prompt, key, str(value)))

    return apply


def _ranks(text: str, where: str) -> list[GridValue]:
    values = _numbers(text, where, whole=True)
    if low := [value.label for value in values if value.value < 1]:
        raise UserError(f"{', '.join(low)} is no number of ranks", where=where, remedy="give 1 or more")
    return values


# In the order in which they act: words may stand in a tag, and what a tag says follows from which file it names.
KINDS: dict[str, Kind] = {
    PROMPT: Kind(read=_prompts, apply=_reworded),
    LORA: Kind(read=_texts, apply=_with_file),
    STRENGTH: Kind(read=_numbers, apply=_with_strength),
    BLOCKS: Kind(read=_blocks, apply=_with_argument("lbw")),
    RANK: Kind(read=_ranks, apply=_with_argument("dyn")),
    "seed": _field("seed", whole=True),
    "steps": _field("steps", whole=True),
    "scale": _field("scale"),
    "negative_scale": _field("negative_scale"),
    "guidance_rescale": _field("guidance_rescale"),
    "sampler": Kind(read=_samplers, apply=lambda request, value, where: _replaced(request, where, sampler=value)),
    "clip_skip": _field("clip_skip", whole=True),
    "denoising": replace(_field("strength"), apply=_with_denoising),
}
