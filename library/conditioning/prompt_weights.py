"""Weights in prompts, in the syntax of AUTOMATIC1111's web UI.

`(text)` weighs 1.1, `[text]` 1/1.1, `(text:1.3)` 1.3; brackets nest and their weights multiply. Behind a backslash, brackets
and backslashes are the characters themselves. A bracket that is never closed reaches to the end; one that was never opened
is text.
"""

from __future__ import annotations

import re

ROUND_WEIGHT = 1.1
SQUARE_WEIGHT = 1 / 1.1

_WEIGHT_AND_CLOSE = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")
_ESCAPED = re.compile(r"\\([()\[\]\\]?)")
_PLAIN = re.compile(r"[^()\[\]\\:]+|:")


class _Parts:
    """The parts read so far; a bracket remembers how many there were when it opened."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.weights: list[float] = []
        self.open: dict[str, list[int]] = {"(": [], "[": []}

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.weights.append(1.0)

    def weigh(self, start: int, weight: float) -> None:
        self.weights[start:] = [before * weight for before in self.weights[start:]]

    def merged(self) -> list[tuple[str, float]]:
        """Neighbours of one weight as one part, without empty ones."""
        merged: list[tuple[str, float]] = []
        for text, weight in zip(self.texts, self.weights, strict=True):
            if merged and merged[-1][1] == weight:
                merged[-1] = (merged[-1][0] + text, weight)
            elif text:
                merged.append((text, weight))
        return merged


def parse(text: str) -> list[tuple[str, float]]:
    """Split a prompt into parts and their weights.

    >>> parse("a (red:1.5) [cat]")
    [('a ', 1.0), ('red', 1.5), (' ', 1.0), ('cat', 0.9090909090909091)]
    """
    parts = _Parts()
    position = 0
    while position < len(text):
        position += _read_one(text, position, parts)
    for starts, weight in ((parts.open["("], ROUND_WEIGHT), (parts.open["["], SQUARE_WEIGHT)):
        for start in starts:
            parts.weigh(start, weight)
    return parts.merged() or [("", 1.0)]


def _read_one(text: str, position: int, parts: _Parts) -> int:
    """Read one piece at `position`; returns its length."""
    character = text[position]
    if character in "([":
        parts.open[character].append(len(parts.texts))
        return 1
    if parts.open["("] and (weighted := _WEIGHT_AND_CLOSE.match(text, position)):
        parts.weigh(parts.open["("].pop(), float(weighted[1]))
        return len(weighted[0])
    if character in ")]":
        opening, weight = ("(", ROUND_WEIGHT) if character == ")" else ("[", SQUARE_WEIGHT)
        if parts.open[opening]:
            parts.weigh(parts.open[opening].pop(), weight)
        else:
            parts.add(character)
        return 1
    if escaped := _ESCAPED.match(text, position):
        parts.add(escaped[1])
        return len(escaped[0])
    plain = _PLAIN.match(text, position)
    piece = plain[0] if plain else character
    parts.add(piece)
    return len(piece)
