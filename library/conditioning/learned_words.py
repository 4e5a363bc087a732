"""Words with vectors of their own (textual inversion): rows behind the end of the text encoder's table.

They are found in texts before the tokenizer sees them. So a word may be one that the tokenizer knows already, may have any
number of vectors, and the tokenizer's own vocabulary stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_ATTRIBUTE = "learned_words"


class LearnedWords:
    """Words and the rows that they stand for.

    A word is found as a whole, in capitals or not, as in web UIs, where names are compared after the tokenizer has made them
    lower case; the longest word wins.
    """

    def __init__(self, rows: Mapping[str, tuple[int, ...]]) -> None:
        self.rows = {folded(word): numbers for word, numbers in rows.items()}
        longest_first = sorted(rows, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_whole_word, longest_first)), re.IGNORECASE) if rows else None

    def split(self, text: str) -> Iterator[str | tuple[int, ...]]:
        """The text in order: stretches without learned words, and the rows of those between them."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() > end:
                yield text[end : match.start()]
            yield self.rows[folded(match[0])]
            end = match.end()
        if end < len(text) or not text:
            yield text[end:]


def folded(word: str) -> str:
    """What two spellings of one word have in common."""
    return " ".join(word.lower().split())


def _whole_word(word: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return before + r"\s+".join(map(re.escape, word.split())) + after


_NONE = LearnedWords({})


def learned_words(tokenizer: Any) -> LearnedWords:
    """Those of a tokenizer; none at first."""
    return getattr(tokenizer, _ATTRIBUTE, _NONE)


def teach(tokenizer: Any, rows: Mapping[str, tuple[int, ...]]) -> None:
    """Give a tokenizer words beside those it has learned."""
    setattr(tokenizer, _ATTRIBUTE, LearnedWords({**learned_words(tokenizer).rows, **rows}))
