"""CLIP's tokenizer from the table shipped with the package, so that single files train without any download.

The table holds the 48,894 byte-pair merges of OpenAI's CLIP (MIT licence). The vocabulary follows from it: the 256 byte
symbols, the same at the end of a word, one entry per merge, and the two special tokens.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.families.family import TextEncoder

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES_FILE = Path(__file__).with_name("tokenizer_data") / "clip_bpe_merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77


def _byte_symbols() -> list[str]:
    """One printable character per byte, in the vocabulary's order (Radford et al., GPT-2: `bytes_to_unicode`).

    Printable Latin-1 characters stand for themselves and come first; the others borrow from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    borrowed = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(borrowed)]


@cache
def clip_merges() -> list[tuple[str, str]]:
    """The byte-pair merges, the first to be applied first; don't change the result, it is shared."""
    with gzip.open(MERGES_FILE, "rt", encoding="utf-8") as file:
        pairs = [line.split() for line in file if line.strip()]
    return [(left, right) for left, right in pairs]


@cache
def clip_vocabulary() -> dict[str, int]:
    """Token -> id, 49,408 of them; don't change the result, it is shared."""
    symbols = _byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, clip_merges()), START, END]
    return {token: number for number, token in enumerate(tokens)}


def shipped_tokenizer(encoder: TextEncoder) -> CLIPTokenizer:
    """The tokenizer of a text encoder, padding as that does."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=clip_vocabulary(),
        merges=clip_merges(),  # type: ignore[arg-type]  # pairs are taken as well as texts
        pad_token=encoder.pad_token,
        model_max_length=MAX_TOKENS,
    )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """A model folder's own tokenizer.

    Raises:
        UserError: where it cannot be read.
    """
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the tokenizer cannot be read ({reason})", where=str(folder)) from None
