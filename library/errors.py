"""The one exception that a door turns into a sentence.

Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake in what the user gave: what is wrong, where, and what to do about it.

    Args:
        what: the fact, without a final stop ("no such folder").
        where: the option, file or image at fault ("--output_dir /data/out"); put before a colon.
        remedy: what to do ("create it, or name another folder"); put after a semicolon.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        sentence = f"{where}: {what}" if where else what
        super().__init__(f"{sentence}; {remedy}" if remedy else sentence)

    @property
    def problems(self) -> tuple[UserError, ...]:
        """The mistakes one by one: this one."""
        return (self,)


class UserErrors(UserError):
    """Several mistakes found in one pass, one sentence each, on lines of their own."""

    def __init__(self, problems: Iterable[UserError]) -> None:
        self._problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self._problems))

    @property
    def problems(self) -> tuple[UserError, ...]:
        """The mistakes one by one."""
        return self._problems


def raise_all(problems: list[UserError]) -> None:
    """Raise what was collected: nothing for none, the error itself for one, all at once for several."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UserErrors(problems)


def attempt(work: Callable[[], T], problems: list[UserError]) -> T | None:
    """What the work gives; where it raises a `UserError`, None, and its mistakes are added to `problems`."""
    try:
        return work()
    except UserError as error:
        problems += error.problems
        return None


def some_names(names: Sequence[str], limit: int = 20) -> str:
    """Names in a row for a sentence, the rest as a number.

    >>> some_names(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def near_names(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: its near neighbours, and else all known names.

    >>> near_names("adamw8", ["AdamW", "AdamW8bit", "Lion"])
    'did you mean AdamW or AdamW8bit?'
    """
    import difflib

    by_lower = {known_name.lower(): known_name for known_name in known}
    likeness = {match: difflib.SequenceMatcher(None, name.lower(), match).ratio() for match in by_lower}
    best = max(likeness.values(), default=0.0)
    near = [match for match, ratio in likeness.items() if ratio >= max(0.6, best - 0.1)]
    if near:
        near = sorted(near, key=lambda match: -likeness[match])[:3]
        return f"did you mean {' or '.join(by_lower[match] for match in near)}?"
    return f"known are {', '.join(sorted(by_lower.values(), key=str.lower))}"


def counted(number: int, noun: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
