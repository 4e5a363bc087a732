"""Options inside a prompt line ("a cat --n blurry --w 768 --d 1"), and the files such lines come in.

What follows a space and two dashes with a letter is an option, to the next such place. Every one is in a table; an unknown
one is an error, where sd-scripts drops it without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from library.errors import UserError, attempt, near_names, raise_all
from library.generation.requests import MAX_SEED, MAX_STEPS, MIN_SIZE
from library.generation.samplers import find_sampler
from library.text_files import read_json, read_text, read_toml


@dataclass(frozen=True, kw_only=True)
class PromptLine:
    """A prompt and what it says of its own pictures.

    Attributes:
        settings: fields of `ImageRequest`; what is not there is left to the command line.
        seeds: one per picture of this prompt, the last of them for all further pictures; empty leaves it to the command.
        file_name: of its pictures; None leaves it to the command.
        where: how a sentence names the line ("--from_file cats.txt, line 3").
        literal: braces and underscores in the prompts are text, since choices are made already.
    """

    prompt: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    file_name: str | None = None
    where: str = "prompt"
    literal: bool = False


@dataclass(frozen=True)
class PromptOption:
    """One in-prompt option: the field of a request or a line that it sets, and how its text becomes a value, with
    ValueErrors that are ends of sentences."""

    field: str
    convert: Callable[[str], Any]


def _integer(low: int, high: float, meaning: str) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise ValueError(f"{value} is out of range; {meaning}")
        return value

    return convert


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def _sampler(text: str) -> str:
    try:
        find_sampler(text)
    except UserError as error:
        raise ValueError(str(error)) from None
    return text


_size = _integer(MIN_SIZE, math.inf, f"give {MIN_SIZE} pixels or more")
_pixels = _integer(1, math.inf, "give 1 pixel or more")
_offset = _integer(0, math.inf, "give 0 pixels or more")
_steps = _integer(1, MAX_STEPS, f"give 1 to {MAX_STEPS}")
_seed = _integer(0, MAX_SEED, f"give 0 to {MAX_SEED}")


_depth = _integer(0, 8, "give 0 to 3, the downward block; for SDXL 1 to 8")
_timestep = _integer(0, 1000, "give 0 to 1000")


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(_seed(part.strip()) for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part.strip()) for part in text.split(","))


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else _number(text)


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise ValueError(f"{text} is out of range; give 0 to 1")
    return value


_OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def _file_name(text: str) -> str:
    if not text or Path(text).name != text or text in (".", ".."):
        raise ValueError(f"{text!r} is not a file name; pictures go into --outdir")
    if Path(text).suffix.lower() in _OTHER_FORMATS:
        raise ValueError(f"{text!r} is no PNG file; pictures are written as PNG, which holds their recipes")
    return text


IMAGE_OPTIONS: dict[str, PromptOption] = {
    "n": PromptOption("negative_prompt", str),
    "w": PromptOption("width", _size),
    "h": PromptOption("height", _size),
    "s": PromptOption("steps", _steps),
    "l": PromptOption("scale", _number),
    "nl": PromptOption("negative_scale", _number_or_none),
    "rescale": PromptOption("guidance_rescale", _share),
    "d": PromptOption("seeds", _seeds),
    "p2": PromptOption("prompt_2", str),
    "n2": PromptOption("negative_prompt_2", str),
    "ow": PromptOption("original_width", _pixels),
    "oh": PromptOption("original_height", _pixels),
    "nw": PromptOption("original_width_negative", _pixels),
    "nh": PromptOption("original_height_negative", _pixels),
    "ct": PromptOption("crop_top", _offset),
    "cl": PromptOption("crop_left", _offset),
    "t": PromptOption("strength", _share),
    "am": PromptOption("network_strengths", _numbers),
    "ss": PromptOption("sampler", _sampler),
    "f": PromptOption("file_name", _file_name),
    "dsd1": PromptOption("shrink_depth_1", _depth),
    "dst1": PromptOption("shrink_until_1", _timestep),
    "dsd2": PromptOption("shrink_depth_2", _depth),
    "dst2": PromptOption("shrink_until_2", _timestep),
    "dsr": PromptOption("shrink_ratio", _share),
    "glt": PromptOption("growth_below", _timestep),
    "glr": PromptOption("growth_ratio", _share),
    "gls": PromptOption("growth_step", _share),
    "gle": PromptOption("growth_every", _integer(1, MAX_STEPS, f"give 1 to {MAX_STEPS}")),
}
PREVIEW_OPTIONS = {name: IMAGE_OPTIONS[name] for name in ("n", "w", "h", "s", "l", "ss")} | {
    "d": PromptOption("seeds", lambda text: (_seed(text),)),
}

OTHER_MODELS = "it belongs to models this toolkit does not know yet"
UNAVAILABLE: dict[str, str] = {
    "c": "no library that is kept up guides pictures by CLIP",
    "glsn": "new noise always has the strength that euler_a gives it",
    "glus": "pictures that grow are not sharpened on the way",
    **dict.fromkeys(("g", "ctr", "rcfg", "fs"), OTHER_MODELS),
    "cn": "control images of previews come later",
    "controlnet_image": "control images of previews come later",
}
_TAG = re.compile(r"<\w+:[^>]*>")

_OPTION_START = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


def parse_prompt_line(line: str, *, where: str, options: Mapping[str, PromptOption] = IMAGE_OPTIONS) -> PromptLine:
    """One line of a prompt file, or the value of --prompt.

    Args:
        where: how a sentence names the line.
        options: the table in force; names are case-insensitive.

    Raises:
        UserError: unknown, unavailable, doubled or malformed options, and tags where they cannot act; all of them at once.
    """
    text, *pieces = _OPTION_START.split(line)
    values: dict[str, Any] = {}
    problems: list[UserError] = []
    for piece in pieces:
        name, *rest = piece.split(maxsplit=1)
        _set_option(values, name.lower(), "".join(rest).strip(), options, f"{where}, --{name}", problems)
    problems += _tags_without_effect(text, values, where, options)
    raise_all(problems)
    return _line(text, values, where)


def _line(prompt: str, values: dict[str, Any], where: str) -> PromptLine:
    own = {name: values.pop(name) for name in ("seeds", "file_name") if name in values}
    return PromptLine(prompt=prompt.strip(), settings=values, where=where, **own)


def _tags_without_effect(
    prompt: str, values: Mapping[str, Any], where: str, options: Mapping[str, PromptOption]
) -> list[UserError]:
    """Tags of adapters in a preview, which shows the adapter in training, or in a negative prompt."""
    problems = []
    if options is not IMAGE_OPTIONS and (found := _TAG.search(prompt)):
        remedy = "previews show the adapter that is trained; take the tag out"
        problems.append(UserError(f"{found.group()!r} has no effect", where=where, remedy=remedy))
    for name, title in _WITHOUT_TAGS.items():
        if found := _TAG.search(values.get(name) or ""):
            remedy = "tags act on the whole picture; write it in the prompt"
            problems.append(UserError(f"{found.group()!r} in the {title} has no effect", where=where, remedy=remedy))
    return problems


_WITHOUT_TAGS = {
    "negative_prompt": "negative prompt",
    "prompt_2": "second prompt",
    "negative_prompt_2": "second negative prompt",
}


def _set_option(
    values: dict[str, Any],
    name: str,
    value: str,
    options: Mapping[str, PromptOption],
    where: str,
    problems: list[UserError],
) -> None:
    if name not in options:
        if name in UNAVAILABLE:
            problems.append(UserError("is not available", where=where, remedy=UNAVAILABLE[name]))
        else:
            known = near_names(name, options)
            problems.append(UserError("unknown option in a prompt", where=where, remedy=known))
    elif options[name].field in values:
        problems.append(UserError("is given twice", where=where, remedy="keep one of them"))
    else:
        try:
            values[options[name].field] = options[name].convert(value)
        except ValueError as error:
            problems.append(UserError(str(error), where=where))


def numbered_lines(text: str, where: str) -> list[tuple[str, str]]:
    """(place, line) of a prompt file's text, without blank lines and those that begin with "#"."""
    numbered = enumerate(text.splitlines(), 1)
    return [(f"{where}, line {number}", line) for number, line in numbered if line.strip() and not line.startswith("#")]


def read_prompt_file(path: Path, *, where: str, options: Mapping[str, PromptOption] = IMAGE_OPTIONS) -> list[PromptLine]:
    """The lines of a .txt file.

    Raises:
        UserError: the file cannot be read or holds no prompt, or lines are wrong; all of them at once.
    """
    places = numbered_lines(read_text(path, where=where), where)
    return _all_lines(places, lambda line, place: parse_prompt_line(line, where=place, options=options), where)


def read_preview_prompts(path: Path, *, where: str | None = None) -> list[PromptLine]:
    """The prompts of --sample_prompts: .txt lines, a .json list of lines and tables, or .toml with [[prompt.subset]].

    Raises:
        UserError: see `read_prompt_file`.
    """
    where = where or f"--sample_prompts {path}"
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return read_prompt_file(path, where=where, options=PREVIEW_OPTIONS)
    if suffix not in (".json", ".toml"):
        raise UserError("is no kind of prompt file", where=where, remedy="give a .txt, .toml or .json file")
    entries = _json_entries(path, where) if suffix == ".json" else _toml_entries(path, where)
    return _all_lines([(f"{where}, prompt {number}", entry) for number, entry in enumerate(entries, 1)], _entry_line, where)


ENTRY_KEYS: dict[str, PromptOption] = {
    "negative_prompt": PREVIEW_OPTIONS["n"],
    "width": PREVIEW_OPTIONS["w"],
    "height": PREVIEW_OPTIONS["h"],
    "sample_steps": PREVIEW_OPTIONS["s"],
    "scale": PREVIEW_OPTIONS["l"],
    "seed": PREVIEW_OPTIONS["d"],
    "sample_sampler": PREVIEW_OPTIONS["ss"],
}


def _entry_line(entry: Any, where: str) -> PromptLine:
    """A prompt of a .json or .toml file: a line, or a table of keys."""
    if isinstance(entry, str):
        return parse_prompt_line(entry, where=where, options=PREVIEW_OPTIONS)
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise UserError("is neither a text nor a table with a prompt", where=where)
    if _OPTION_START.search(entry["prompt"]):
        raise UserError("options stand inside the text of a table", where=where, remedy="give them as keys (width = 512)")
    values: dict[str, Any] = {}
    problems: list[UserError] = []
    for key, value in entry.items():
        if key != "prompt" and value is not None:
            _set_option(values, key, str(value), ENTRY_KEYS, f"{where}, {key}", problems)
    problems += _tags_without_effect(entry["prompt"], values, where, PREVIEW_OPTIONS)
    raise_all(problems)
    return _line(entry["prompt"], values, where)


def _json_entries(path: Path, where: str) -> list[Any]:
    entries = read_json(path, where=where)
    if not isinstance(entries, list):
        raise UserError("is not a list of prompts", where=where, remedy='write ["a cat", {"prompt": "a dog"}]')
    return entries


def _toml_entries(path: Path, where: str) -> list[Any]:
    """Each [[prompt.subset]] on top of the keys of [prompt]; the subset's own win."""
    content = read_toml(path, where=where)
    shared = content.get("prompt")
    shared = shared if isinstance(shared, dict) else {}
    subsets = shared.get("subset")
    if not isinstance(subsets, list):
        raise UserError("holds no prompts", where=where, remedy='write [[prompt.subset]] and below it prompt = "a cat"')
    common = {key: value for key, value in shared.items() if key != "subset"}
    return [common | subset if isinstance(subset, dict) else subset for subset in subsets]


def _all_lines(entries: Sequence[tuple[str, Any]], parse: Callable[[Any, str], PromptLine], where: str) -> list[PromptLine]:
    """Every (place, entry) of a file, parsed; the mistakes of all of them at once, and a file without any is one."""
    problems: list[UserError] = []
    lines = [attempt(partial(parse, entry, place), problems) for place, entry in entries]
    raise_all(problems)
    if not lines:
        raise UserError("holds no prompt", where=where)
    return [line for line in lines if line is not None]
