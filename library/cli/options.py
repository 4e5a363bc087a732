"""Options as data: one `Option` per command-line flag, the parser built from them, and `--config_file`.

The tables drive the parser, the configuration file, the reference page in docs/ and the frozen list in the tests, so that an
option is described in one place. Nothing here imports torch: `--help` has to answer at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import UserError, near_names, raise_all

FLAG = bool


@dataclass(frozen=True, kw_only=True)
class Option:
    """One command-line option.

    Attributes:
        name: without dashes; also its key in a configuration file.
        help: what it does, its unit and range; None never appears as a default in it.
        type: a converter from text; `FLAG` for a switch without a value.
        default: the value when it is not given.
        choices: the values allowed.
        many: takes any number of values; the parsed value is then a tuple.
        count: takes exactly this many values; the parsed value is then a tuple.
        later: why using it is refused for now, as the middle of a sentence; None where it works.
        extension: not an option of sd-scripts, but ours.
    """

    name: str
    help: str
    type: Callable[[str], Any] = str
    default: Any = None
    choices: tuple[Any, ...] | None = None
    many: bool = False
    count: int | None = None
    later: str | None = None
    extension: bool = False

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def takes_list(self) -> bool:
        return self.many or self.count is not None

    def convert(self, raw: Any) -> Any:
        """A value from the command line (text) or from TOML (typed) as the option's own type.

        Raises:
            ValueError: with the end of a sentence ("is not a whole number").
        """
        if self.type is FLAG:
            if not isinstance(raw, bool):
                raise ValueError(f"{raw!r} is not true or false")
            return raw
        if self.takes_list:
            items = raw if isinstance(raw, (list, tuple)) else [raw]
            if self.count is not None and len(items) != self.count:
                raise ValueError(f"takes {self.count} values, not {len(items)}")
            return tuple(self._convert_one(item) for item in items)
        return self._convert_one(raw)

    def _convert_one(self, raw: Any) -> Any:
        if isinstance(raw, (bool, list, tuple, dict)):
            raise ValueError(f"{raw!r} is not {_type_name(self.type)}")
        try:
            value = self.type(str(raw).strip() if self.type is not str else str(raw))
        except ValueError as error:
            own_sentence = self.type not in (int, float, str, Path) and str(error)
            raise ValueError(own_sentence or f"{raw!r} is not {_type_name(self.type)}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{raw!r} is not a finite number")
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{value!r} is not known; {near_names(str(value), [str(c) for c in self.choices])}")
        return value


def _type_name(converter: Callable[[str], Any]) -> str:
    return {int: "a whole number", float: "a number", str: "one text", Path: "a path"}.get(converter, "a valid value")  # type: ignore[call-overload]


@dataclass(frozen=True)
class OptionGroup:
    """Options under one heading of `--help`."""

    title: str
    options: tuple[Option, ...]


@dataclass(frozen=True, kw_only=True)
class ParsedOptions:
    """Every option's value, and which of them the user gave (on the command line or in a configuration file)."""

    values: Mapping[str, Any]
    explicit: frozenset[str]
    sources: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def given(self, name: str) -> bool:
        return name in self.explicit

    def where(self, name: str) -> str:
        """How a sentence names the option: `--name value`, and the file it stands in."""
        value = self.values[name]
        shown = f"--{name}" if isinstance(value, bool) or value is None else f"--{name} {_shown(value)}"
        return f"{shown} ({self.sources[name]})" if name in self.sources else shown


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _Parser(argparse.ArgumentParser):
    """argparse, with errors as sentences and unknown options answered by the near ones."""

    def error(self, message: str) -> Any:
        raise UserError(message, remedy="--help lists all options")


def all_options(groups: Sequence[OptionGroup]) -> dict[str, Option]:
    return {option.name: option for group in groups for option in group.options}


def build_parser(
    groups: Sequence[OptionGroup], *, description: str, positional: Sequence[Option] = ()
) -> argparse.ArgumentParser:
    """The argparse parser of a door. It leaves defaults out of its result, so that what was given can be told from them."""
    parser = _Parser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for option in positional:
        parser.add_argument(option.name, help=option.help)
    for group in groups:
        section = parser.add_argument_group(group.title)
        for option in group.options:
            section.add_argument(option.flag, **_argparse_settings(option))
    return parser


def _argparse_settings(option: Option) -> dict[str, Any]:
    text = option.help
    if option.later:
        text += " [not yet available]"
    elif option.default not in (None, False, ""):
        text += f" (default: {_shown(option.default)})"
    settings: dict[str, Any] = {"help": text.replace("%", "%%")}
    if option.type is FLAG:
        return settings | {"action": "store_true"}
    if option.takes_list:
        settings["nargs"] = "*" if option.many else option.count
    if option.choices:
        settings["metavar"] = "{" + ",".join(map(str, option.choices)) + "}"
    return settings


def parse(
    argv: Sequence[str], groups: Sequence[OptionGroup], *, description: str, positional: Sequence[Option] = ()
) -> ParsedOptions:
    """Parse a command line and the configuration file it names.

    The command line wins over the file, the file over the defaults. `positional` are given by their place, without a name.

    Raises:
        UserError: with every unknown name, wrong value and unavailable option at once.
    """
    options = all_options(groups)
    parser = build_parser(groups, description=description, positional=positional)
    namespace, unknown = parser.parse_known_args(_spelled(argv, options))
    problems = [_unknown_argument(argument, options) for argument in unknown if argument.startswith("-")]
    if unknown and not problems:
        problems.append(UserError(f"what is {unknown[0]!r}? It belongs to no option", remedy="--help lists all options"))
    given: dict[str, Any] = {}
    known = options | {option.name: option for option in positional}
    for name, raw in vars(namespace).items():
        _convert_into(given, known[name], raw, f"--{name}" if name in options else name, problems)
    sources: dict[str, str] = {}
    if given.get("config_file") and not given.get("output_config"):
        for name, value in read_config_file(Path(given["config_file"]), options, problems).items():
            if name not in given:
                given[name] = value
                sources[name] = str(given["config_file"])
    problems += [
        _unavailable(known[name]) for name, value in given.items() if known[name].later and value not in (False, None)
    ]
    raise_all(problems)
    defaults = {name: bool(option.default) if option.type is FLAG else option.default for name, option in options.items()}
    return ParsedOptions(values=defaults | given, explicit=frozenset(given), sources=sources)


def _spelled(argv: Sequence[str], options: Mapping[str, Option]) -> list[str]:
    """Accept `--network-dim` and `--networkdim` for `--network_dim`."""
    by_letters = {name.replace("_", ""): name for name in options}

    def spelled(argument: str) -> str:
        if not argument.startswith("--"):
            return argument
        name, equals, value = argument[2:].partition("=")
        known = by_letters.get(name.replace("_", "").replace("-", ""))
        return f"--{known}{equals}{value}" if known and name not in options else argument

    return [spelled(argument) for argument in argv]


def _unknown_argument(argument: str, options: Mapping[str, Option]) -> UserError:
    name = argument.lstrip("-").partition("=")[0]
    near = near_names(name, options)
    remedy = near if near.startswith("did you mean") else "--help lists all options"
    return UserError("unknown option", where=f"--{name}", remedy=remedy)


def _unavailable(option: Option) -> UserError:
    return UserError(f"is not available yet: {option.later}", where=option.flag, remedy="leave it out for now")


def _convert_into(values: dict[str, Any], option: Option, raw: Any, where: str, problems: list[UserError]) -> None:
    try:
        values[option.name] = option.convert(raw)
    except ValueError as error:
        problems.append(UserError(str(error), where=where))


def read_config_file(path: Path, options: Mapping[str, Option], problems: list[UserError]) -> dict[str, Any]:
    """The options of a TOML file; section names only group, as in sd-scripts. Mistakes are added to `problems`."""
    from library.text_files import read_toml

    if not path.suffix:
        path = path.with_suffix(".toml")
    where = f"--config_file {path}"
    try:
        content = read_toml(path, where=where)
    except UserError as error:
        problems.append(error)
        return {}
    values: dict[str, Any] = {}
    for key, raw in _flattened(content, where, problems):
        if key == "config_file":
            problems.append(UserError("a configuration file names no other", where=where, remedy="take config_file out"))
        elif key not in options:
            problems.append(UserError(f"unknown option {key!r}", where=where, remedy=near_names(key, options)))
        elif key in values:
            problems.append(UserError(f"{key!r} stands in two sections", where=where, remedy="keep one of them"))
        else:
            _convert_into(values, options[key], raw, f"{where}, {key}", problems)
    return values


def _flattened(content: Mapping[str, Any], where: str, problems: list[UserError]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        if not isinstance(value, dict):
            pairs.append((key, value))
            continue
        for inner_key, inner in value.items():
            if isinstance(inner, dict):
                problems.append(
                    UserError(f"section [{key}.{inner_key}] is nested too deep", where=where, remedy=f"use [{key}]")
                )
            else:
                pairs.append((inner_key, inner))
    return pairs
