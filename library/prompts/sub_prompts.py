"""A prompt as sub-prompts: parts between `AND`, each with a weight and with adapters of its own.

`AND` is a word of its own, in capitals. Among several sub-prompts, `:1.2` at the end of one is its weight, as in A1111. A
prompt without `AND` is one sub-prompt of weight 1, and there ":30" at its end is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from library.errors import UserError, attempt, raise_all
from library.prompts.lora_tags import LoraTag, read_tags, without_tags

_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")


@dataclass(frozen=True, kw_only=True)
class SubPrompt:
    """One part of a prompt.

    Attributes:
        text: without tags, with A1111 weights and BREAK.
        weight: how much its prediction counts beside those of the others; may be negative.
        tags: of the adapters that act on it.
    """

    text: str
    weight: float = 1.0
    tags: tuple[LoraTag, ...] = ()


def read_prompt(prompt: str, *, where: str, style: str = "sdnext", extended: bool = True) -> tuple[SubPrompt, ...]:
    """The sub-prompts of a prompt, one at least.

    Args:
        where: how a sentence names the prompt.
        style: see `lora_tags.read_tags`.
        extended: split at `AND`; without it the word is text.

    Raises:
        UserError: mistakes in tags, and an `AND` with nothing on a side of it; all of them at once.
    """
    problems: list[UserError] = []
    pieces = _split(prompt) if extended else [prompt]
    read = partial(_read_part, several=len(pieces) > 1, where=where, style=style)
    parts = [attempt(partial(read, piece), problems) for piece in pieces]
    raise_all(problems)
    return tuple(part for part in parts if part is not None)


def _split(prompt: str) -> list[str]:
    """At every `AND` outside of tags, where it may be a word of a name."""
    pieces, start = [], 0
    for found in _AND.finditer(without_tags(prompt)):
        pieces.append(prompt[start : found.start()])
        start = found.end()
    return [*pieces, prompt[start:]]


def _read_part(piece: str, *, several: bool, where: str, style: str) -> SubPrompt:
    text, tags = read_tags(piece, where=where, style=style)
    weight = _WEIGHT.search(text) if several else None
    text = text[: weight.start()] if weight else text
    if several and not text.strip() and not tags:
        remedy = "write sub-prompts before and behind it, or take it away"
        raise UserError("AND has nothing on one side", where=where, remedy=remedy)
    return SubPrompt(text=text.strip(), weight=float(weight[1]) if weight else 1.0, tags=tags)
