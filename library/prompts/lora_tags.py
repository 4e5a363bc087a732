"""Tags in prompts that name adapters and say how strongly they act: `<lora:name:0.8>`, `<lora:name:te=0.5:unet=1>`.

A tag is `<`, a kind, and pieces between colons: the name, numbers whose place says what they are, and arguments such as
`unet=0.8`. What a tag leaves out it inherits: `te` from the first number, else 1; `unet` from `te`; `in`, `mid` and `out`
from `unet`. SD.Next and A1111 agree on all of that, and differ in the numbers behind the first: see `STYLES`.

Tags are taken out of the text and nothing else is changed, so that the rest has the tokens it has in web UIs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from library.errors import UserError, attempt, near_names, raise_all
from library.families.block_weights import PRESETS, read_block_weights
from library.numbers import finite_number, whole_number
from library.prompts.strengths import ONE, ZERO, AdapterStrength, StepValues

STYLES = ("sdnext", "a1111")
KINDS = ("lora", "lyco")
SUFFIXES = (".safetensors", ".pt", ".ckpt")
"""Of adapter files."""

TAG = re.compile(r"<(\w+):([^<>]*)(>?)")

_NUMBERS: Mapping[str, tuple[str, ...]] = {"sdnext": ("te", "unet"), "a1111": ("te", "unet", "dyn")}
"""Style -> the arguments that numbers behind a name stand for, by their place. To SD.Next the second means nothing."""


@dataclass(frozen=True, kw_only=True)
class LoraTag:
    """One tag.

    Attributes:
        name: of the adapter, as written.
        rank: how many ranks of it act; None for all.
        text: the tag as written, for sentences.
    """

    name: str
    strength: AdapterStrength
    rank: int | None = None
    text: str


def read_tags(prompt: str, *, where: str, style: str = "sdnext") -> tuple[str, tuple[LoraTag, ...]]:
    """The text without its tags, and the tags in their order.

    Args:
        where: how a sentence names the prompt.
        style: a name of `STYLES`.

    Raises:
        UserError: tags of other kinds, unknown or doubled arguments, values that cannot be read; all of them at once.
    """
    problems: list[UserError] = []
    tags: list[LoraTag] = []

    def take(found: re.Match[str]) -> str:
        kind, content, end = found.groups()
        if not end and kind not in KINDS:
            return found[0]
        place = f"{where}, {found[0].strip()}"
        if not end:
            problems.append(UserError("is not closed", where=place, remedy="end the tag with >"))
        elif kind not in KINDS:
            remedy = near_names(kind, KINDS)
            problems.append(UserError(f"'{kind}' is no kind of tag", where=place, remedy=remedy))
        elif tag := attempt(partial(_read_tag, found[0], content, place, style), problems):
            tags.append(tag)
        return ""

    text = TAG.sub(take, prompt)
    raise_all(problems)
    return text, tuple(tags)


def without_tags(prompt: str) -> str:
    """A prompt with spaces in place of its tags: every other character keeps its position."""
    return TAG.sub(lambda found: " " * len(found[0]) if found[3] else found[0], prompt)


def _read_tag(text: str, content: str, where: str, style: str) -> LoraTag:
    problems: list[UserError] = []
    (name, *numbers), named = _pieces(content, where, problems)
    if not name:
        problems.append(UserError("names no adapter", where=where, remedy="write it like <lora:name:0.8>"))
    values = _numbers(numbers, where, style, problems)
    raise_all(problems)
    if style == "sdnext":
        _refuse_second_number(values.pop("unet", None), values | named, where)
    values |= named
    return LoraTag(name=name, strength=_strength(values, where), rank=values.get("dyn"), text=text)


def _pieces(content: str, where: str, problems: list[UserError]) -> tuple[list[str], dict[str, Any]]:
    """The name and the numbers of a tag, at least one text; and its arguments, read."""
    unnamed: list[str] = []
    named: dict[str, Any] = {}
    for piece in map(str.strip, content.split(":")):
        key, sign, value = map(str.strip, piece.partition("="))
        # an adapter's name may hold "=", as long as the word before it is no argument
        if not sign or (not unnamed and key not in ARGUMENTS):
            unnamed.append(piece)
        elif key not in ARGUMENTS:
            problems.append(UserError(f"'{key}' is no argument", where=where, remedy=near_names(key, ARGUMENTS)))
        elif key in named:
            problems.append(UserError(f"{key} is given twice", where=where, remedy="keep one of them"))
        else:
            named[key] = attempt(partial(ARGUMENTS[key], value, f"{where}, {key}"), problems)
    return unnamed or [""], named


def _numbers(texts: list[str], where: str, style: str, problems: list[UserError]) -> dict[str, Any]:
    """Argument -> value, of the numbers behind the name."""
    names = _NUMBERS[style]
    values = {}
    for name, text in zip(names, texts, strict=False):
        if text.upper() in PRESETS:
            problems.append(UserError(f"'{text}' is no number", where=where, remedy=f"write lbw={text} for block weights"))
        else:
            values[name] = attempt(partial(ARGUMENTS[name], text, where), problems)
    if surplus := texts[len(names) :]:
        what = f"'{surplus[0]}' stands behind all that a tag's numbers can say"
        problems.append(UserError(what, where=where, remedy=f"arguments are {', '.join(ARGUMENTS)}"))
    return values


def _refuse_second_number(number: StepValues | None, values: Mapping[str, Any], where: str) -> None:
    """Unless it says what holds without it, as in the often seen `<lora:name:1:1>`."""
    if number is not None and number != values.get("unet", values["te"]):
        what = "the second number is ignored by SD.Next and is the U-Net's strength to A1111"
        remedy = "write it as unet=, or choose --lora_tag_style a1111"
        raise UserError(what, where=where, remedy=remedy)


def _strength(values: Mapping[str, Any], where: str) -> AdapterStrength:
    """What the arguments say together, with what each inherits."""
    start, stop = values.get("start"), values.get("stop")
    if "step" in values:
        if start is not None or stop is not None:
            raise UserError("step= says what start= and stop= say", where=where, remedy="give the one or the others")
        start, stop = values["step"]
    comparable = isinstance(start, float) == isinstance(stop, float)
    if start is not None and stop is not None and comparable and start >= stop:
        raise UserError(f"from {start} up to {stop} there is no step", where=where, remedy="start before it stops")
    text_encoder = values.get("te", ONE)
    unet = values.get("unet", text_encoder)
    inputs, middle, outputs = (values.get(section, unet) for section in ("in", "mid", "out"))
    only = values.get("module")
    return AdapterStrength(
        text_encoder=ZERO if only == "unet" else text_encoder,
        inputs=ZERO if only == "te" else inputs,
        middle=ZERO if only == "te" else middle,
        outputs=ZERO if only == "te" else outputs,
        block_weights=values.get("lbw"),
        start=start,
        stop=stop,
    )


# The arguments: (text, where) -> value


def read_step_values(text: str, where: str) -> StepValues:
    """A number (`0.8`), or several with the steps they hold at (`0.1@1,0.6@6`; `;` parts them too, and `~` is `@`).

    Where no position exceeds 1, positions are shares of the run: `0.1@0,0.9@1`.

    Raises:
        UserError: no number, several without positions, a negative position, or two values at one.
    """
    points: dict[float, float] = {}
    items = re.split("[,;]", text)
    for item in items:
        value, sign, position = map(str.strip, item.replace("~", "@").partition("@"))
        number, place = finite_number(value), finite_number(position) if sign else 0.0
        if number is None:
            raise UserError(f"'{value}' is no number", where=where, remedy="write 0.8, or 0.1@1,0.6@6 with steps")
        if len(items) > 1 and not sign:
            remedy = "write each value with a step: 0.1@1,0.6@6"
            raise UserError(f"'{value}' is one of several values, at no step", where=where, remedy=remedy)
        if place is None or place < 0:
            remedy = "count steps from 0, or give shares of the run from 0 to 1"
            raise UserError(f"'{position}' is no step", where=where, remedy=remedy)
        if place in points:
            raise UserError(f"two values at step {position}", where=where, remedy="keep one of them")
        points[place] = number
    return StepValues(tuple(sorted(points.items())))


def _bound(text: str, where: str) -> int | float:
    """A step, as an int, or a share of the run, as a float."""
    step, share = whole_number(text), finite_number(text)
    if step is not None and step >= 0:
        return step
    if step is None and share is not None and 0 <= share <= 1:
        return share
    remedy = "count steps from 0, or give a share of the run from 0.0 to 1.0"
    raise UserError(f"'{text}' is no step", where=where, remedy=remedy)


def _bounds(text: str, where: str) -> tuple[int | float, int | float]:
    start, dash, stop = text.partition("-")
    if not dash:
        raise UserError(f"'{text}' is no range of steps", where=where, remedy="write step=5-10")
    return _bound(start.strip(), where), _bound(stop.strip(), where)


def _rank(text: str, where: str) -> int:
    rank = whole_number(text)
    if rank is None or rank < 1:
        raise UserError(f"'{text}' is no number of ranks", where=where, remedy="give 1 or more")
    return rank


def _module(text: str, where: str) -> str:
    if text not in MODULES:
        raise UserError(f"'{text}' is no part of a model", where=where, remedy=near_names(text, MODULES))
    return MODULES[text]


def _block_weights(text: str, where: str) -> tuple[float, ...]:
    return read_block_weights(text, where=where)


MODULES: Mapping[str, str] = {"unet": "unet", "te": "te", "text_encoder": "te"}
ARGUMENTS: Mapping[str, Callable[[str, str], Any]] = {
    "te": read_step_values,
    "unet": read_step_values,
    "in": read_step_values,
    "mid": read_step_values,
    "out": read_step_values,
    "lbw": _block_weights,
    "start": _bound,
    "stop": _bound,
    "step": _bounds,
    "dyn": _rank,
    "module": _module,
}
"""Name of an argument -> how its text is read."""
