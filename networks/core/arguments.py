"""`network_args`: key=value strings, declared as a table by each algorithm and read in one pass that reports every
problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from library.errors import UserError, near_names, raise_all

Parser = Callable[[str, str], Any]
"""From the text and the argument's name to its value; raises UserError."""


def read_arguments(given: Mapping[str, Any], table: Mapping[str, Parser]) -> dict[str, Any]:
    """The values of the given arguments, by name; absent and None ones are left out.

    Args:
        given: strings from the command line, or plain values from Python code.
        table: name -> parser of everything that is known.

    Raises:
        UserErrors: every unknown name (with near ones) and wrong value at once.
    """
    values: dict[str, Any] = {}
    problems: list[UserError] = []
    for name, value in given.items():
        if name not in table:
            remedy = near_names(name, table)
            problems.append(UserError(f"unknown argument '{name}'", where="--network_args", remedy=remedy))
        elif value is not None:
            try:
                values[name] = table[name](_as_text(value), name)
            except UserError as problem:
                problems.append(problem)
    raise_all(problems)
    return values


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _wrong(text: str, name: str, wanted: str) -> UserError:
    return UserError(f"'{text}' is not {wanted}", where=f"--network_args {name}")


def number(text: str, name: str) -> float:
    """Any finite number."""
    try:
        value = float(text)
    except ValueError:
        raise _wrong(text, name, "a number") from None
    if not math.isfinite(value):
        raise _wrong(text, name, "a finite number")
    return value


def numbers(text: str, name: str) -> tuple[float, ...]:
    """Numbers between commas."""
    return tuple(number(part.strip(), name) for part in text.split(","))


def not_negative(text: str, name: str) -> float:
    """A number of 0 or more."""
    value = number(text, name)
    if value < 0:
        raise _wrong(text, name, "0 or more")
    return value


def positive(text: str, name: str) -> float:
    """A number above 0."""
    value = number(text, name)
    if value <= 0:
        raise _wrong(text, name, "a number above 0")
    return value


def rank(text: str, name: str) -> int:
    """A whole number of 1 or more."""
    value = number(text, name)
    if value != int(value) or value < 1:
        raise _wrong(text, name, "a whole number of 1 or more")
    return int(value)


def rank_or_none(text: str, name: str) -> int:
    """A whole number of 0 or more; 0 stands for no adapter."""
    value = number(text, name)
    if value != int(value) or value < 0:
        raise _wrong(text, name, "a whole number of 0 or more")
    return int(value)


def flag(text: str, name: str) -> bool:
    """True or False, in any spelling of the field."""
    word = text.strip().lower()
    if word not in ("true", "false", "1", "0", "yes", "no"):
        raise _wrong(text, name, "True or False")
    return word in ("true", "1", "yes")


def probability(text: str, name: str) -> float:
    """A share from 0 up to, but not including, 1."""
    value = number(text, name)
    if not 0 <= value < 1:
        raise _wrong(text, name, "a share from 0 to below 1")
    return value


def whole_number(text: str, name: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise _wrong(text, name, "a whole number") from None


def as_is(text: str, name: str) -> str:
    """Text whose meaning depends on other arguments, or on the model."""
    return text


def ranks(text: str, name: str) -> tuple[int, ...]:
    """Whole numbers of 0 or more between commas; 0 stands for no adapter."""
    return tuple(rank_or_none(part.strip(), name) for part in text.split(","))
