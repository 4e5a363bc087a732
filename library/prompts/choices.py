"""Choices in prompts: `{a|b|c}`, and `__name__` for a line of a file, drawn by a picture's seed.

Inside braces, before the options: `e$$` makes a prompt of each option instead of drawing one; `2$$` draws two, and `1-3$$`
one to three different ones, joined by ", " or by what stands before a further `$$`. `3::` before an option makes it three
times as likely. Braces may stand in braces; `\\{` and `\\}` are the characters. The syntax is that of sd-scripts' generator
and of sd-dynamic-prompts, where both have it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations, islice
from pathlib import Path

from library.errors import UserError, near_names
from library.streams import python_stream
from library.text_files import read_text

MAX_DEPTH = 20
MAX_PROMPTS = 10_000

# No part of a word, so that the name in <lora:my__old__style> is none.
_WILDCARD = re.compile(r"(?<!\w)__([^\s_](?:[^|{}\n]*?[^\s_])?)__(?!\w)")
_EVERY = re.compile(r"\{\s*e\s*\$\$", re.IGNORECASE)
_BRACE = re.compile("[{}]")
_OPTION_WEIGHT = re.compile(r"\s*(\d+\.?\d*|\.\d+)::")
_COUNT = re.compile(r"\s*(\d*)(-?)(\d*)\s*")
_MARK = re.compile(r"[{}|]|\$\$")
# Escaped braces, while braces are read: from Unicode's private area, so that no prompt has them.
_HIDDEN = {r"\{": "\ue000", r"\}": "\ue001"}


class Wildcards:
    """The .txt files of a folder and of those below it: options, one a line, without blank lines and comments (#).

    Raises:
        UserError: no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError("no such folder", where=f"--wildcards_dir {folder}")
        self._paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.txt"))}
        self._lines: dict[str, list[str]] = {}

    def lines(self, name: str, *, where: str) -> list[str]:
        """The options of a file, one at least.

        Args:
            name: path below the folder, without .txt; `*` stands for any characters, and then several files are one.

        Raises:
            UserError: no such file, or one without lines.
        """
        if name not in self._lines:
            paths = [path for known, path in self._paths.items() if fnmatchcase(known, name)]
            if not paths:
                remedy = near_names(name, self._paths) if self._paths else "the folder of wildcards has no .txt file"
                raise UserError(f"there is no wildcard '{name}'", where=where, remedy=remedy)
            lines = [line.strip() for path in paths for line in read_text(path, where=f"{where}, {path}").splitlines()]
            self._lines[name] = [line for line in lines if line and not line.startswith("#")]
        if not self._lines[name]:
            raise UserError(f"the wildcard '{name}' has no lines", where=where, remedy="write one option a line")
        return self._lines[name]


def expand_choices(text: str, *, seed: int, wildcards: Wildcards | None, where: str) -> str:
    """A text with all its choices drawn: the same for the same seed, text and files.

    Args:
        wildcards: where `__name__` is looked up.
        where: how a sentence names the text.

    Raises:
        UserError: braces that are not closed or cannot be read, unknown wildcards, wildcards in a circle.
    """
    draw = _Draw(python_stream(seed, "choices"), wildcards, where)
    return _restored(draw.expanded(_hidden(text)), escaped=False)


def enumerate_choices(text: str, *, where: str, wildcards: Wildcards | None = None) -> tuple[str, ...]:
    """The texts that `{e$$a|b}` makes of one, the first of them changing last; all else is left for `expand_choices`.

    Raises:
        UserError: braces that are not closed or cannot be read, more than `MAX_PROMPTS` texts.
    """
    texts = tuple(islice(_enumerated(_hidden(text), wildcards, where), MAX_PROMPTS + 1))
    if len(texts) > MAX_PROMPTS:
        raise UserError(f"stands for more than {MAX_PROMPTS} prompts", where=where, remedy="take fewer options with e$$")
    return tuple(_restored(text, escaped=True) for text in texts)


def _hidden(text: str) -> str:
    for escaped, mark in _HIDDEN.items():
        text = text.replace(escaped, mark)
    return text


def _restored(text: str, *, escaped: bool) -> str:
    for written, mark in _HIDDEN.items():
        text = text.replace(mark, written if escaped else written[-1])
    return text


@dataclass(frozen=True, kw_only=True)
class _Group:
    """What stands in a pair of braces.

    Attributes:
        start, end: its place in the text, braces included.
        every: makes a prompt of each of its outcomes, where prompts are enumerated.
        low, high: how many options it takes, at most all of them.
        joint: stands between several.
        options: (text, weight).
        source: the wildcard that the options are lines of, if they are.
    """

    start: int
    end: int
    every: bool
    low: int
    high: int
    joint: str
    options: tuple[tuple[str, float], ...]
    source: tuple[str, ...]


def _groups(text: str, wildcards: Wildcards | None, where: str) -> Iterator[_Group]:
    """The outermost groups of a text. A brace without its other half is a character, unless options follow it."""
    position = 0
    while (start := text.find("{", position)) >= 0:
        end = _closing(text, start)
        if end is None and "|" in text[start:]:
            remedy = r"close it with }, or write \{ for the character"
            raise UserError(
                f"{{ is not closed in '{_restored(text[start : start + 40], escaped=True)}'", where=where, remedy=remedy
            )
        if end is not None:
            yield _read_group(text, start, end, wildcards, where)
        position = start + 1 if end is None else end


def _closing(text: str, start: int) -> int | None:
    """The place behind the brace that closes the one at `start`."""
    depth = 0
    for found in _BRACE.finditer(text, start):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.end()
    return None


def _split(text: str, mark: str) -> list[str]:
    """At every "|" or "$$" that is outside of braces."""
    pieces, depth, start = [], 0, 0
    for found in _MARK.finditer(text):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if found[0] == mark and depth == 0:
            pieces.append(text[start : found.start()])
            start = found.end()
    return [*pieces, text[start:]]


def _read_group(text: str, start: int, end: int, wildcards: Wildcards | None, where: str) -> _Group:
    place = f"{where}, {_restored(text[start:end], escaped=True)}"
    *head, body = _split(text[start + 1 : end - 1], "$$")
    every = bool(head) and head[0].strip().lower() == "e"
    low, high, joint = _read_head(head[every:], place)
    alone = _WILDCARD.fullmatch(body.strip())
    texts = _lines(alone[1], wildcards, place) if alone else _split(body, "|")
    options = tuple(map(_weighted, texts))
    if not any(weight for _, weight in options):
        raise UserError("all options have the weight 0", where=place, remedy="give one of them a weight above 0")
    return _Group(
        start=start,
        end=end,
        every=every,
        low=min(low, len(options)),
        high=len(options) if high is None else min(high, len(options)),
        joint=joint,
        options=options,
        source=(alone[1],) if alone else (),
    )


def _read_head(head: list[str], where: str) -> tuple[int, int | None, str]:
    """The least and the most options (None: all) that `2$$`, `1-3$$`, `-3$$` or `2-$$` takes, and what joins them."""
    count = head[0] if head else "1"
    joint = head[1] if len(head) > 1 else ", "
    found = _COUNT.fullmatch(count)
    if len(head) > 2 or not found or not any(found.groups()):
        what = "has too many $$" if len(head) > 2 else f"'{count}' is no number of options"
        raise UserError(what, where=where, remedy="write it like {2$$a|b|c}, {1-3$$a|b|c} or {2$$ and $$a|b|c}")
    low = int(found[1] or 1)
    high = (int(found[3]) if found[3] else None) if found[2] else low
    if high is not None and low > high:
        raise UserError(f"{count} has its larger number first", where=where, remedy=f"write {high}-{low}")
    return low, high, joint


def _lines(name: str, wildcards: Wildcards | None, where: str) -> list[str]:
    if wildcards is None:
        remedy = "name it with --wildcards_dir"
        raise UserError(f"__{name}__ needs a folder of wildcards", where=where, remedy=remedy)
    return [_hidden(line) for line in wildcards.lines(name, where=where)]


def _refuse_depth(within: tuple[str, ...], where: str) -> None:
    """For wildcards that name themselves, on whatever way round."""
    if len(within) > MAX_DEPTH:
        what = f"wildcards stand in wildcards more than {MAX_DEPTH} deep ({', '.join(within[-3:])})"
        raise UserError(what, where=where, remedy="look for one that names itself")


def _weighted(option: str) -> tuple[str, float]:
    found = _OPTION_WEIGHT.match(option)
    return (option[found.end() :], float(found[1])) if found else (option, 1.0)


def _enumerated(text: str, wildcards: Wildcards | None, where: str, within: tuple[str, ...] = ()) -> Iterator[str]:
    _refuse_depth(within, where)
    found = _EVERY.search(text)
    end = _closing(text, found.start()) if found else None
    if found is None or end is None:
        yield text
        return
    group = _read_group(text, found.start(), end, wildcards, where)
    options = [option for option, _ in group.options]
    for count in range(group.low, group.high + 1):
        for taken in combinations(options, count):
            joined = text[: group.start] + group.joint.join(taken) + text[group.end :]
            yield from _enumerated(joined, wildcards, where, (*within, *group.source))


class _Draw:
    """Draws the choices of one text; `within` are the names of the wildcards that a part of it came from."""

    def __init__(self, draws: random.Random, wildcards: Wildcards | None, where: str) -> None:
        self._draws, self._wildcards, self._where = draws, wildcards, where

    def expanded(self, text: str, within: tuple[str, ...] = ()) -> str:
        _refuse_depth(within, self._where)
        pieces, position = [], 0
        for group in _groups(text, self._wildcards, self._where):
            taken = self._taken(list(group.options), self._draws.randint(group.low, group.high))
            drawn = [self.expanded(option, (*within, *group.source)) for option in taken]
            pieces += [text[position : group.start], self.expanded(group.joint, within).join(drawn)]
            position = group.end
        # behind the braces, which may hold a part of a name: __{warm|cold}_colors__
        return _WILDCARD.sub(lambda name: self.expanded(f"{{{name[0]}}}", within), "".join([*pieces, text[position:]]))

    def _taken(self, options: list[tuple[str, float]], count: int) -> list[str]:
        """Different ones, as likely as their weights; fewer than `count` where the others have the weight 0."""
        taken: list[str] = []
        while len(taken) < count and any(weight for _, weight in options):
            (place,) = self._draws.choices(range(len(options)), [weight for _, weight in options])
            taken.append(options.pop(place)[0])
        return taken
