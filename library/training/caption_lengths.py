"""Captions that are longer than the text encoder is given to read: found before training, since their end is cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from library.dataset.captions import CaptionSettings
from library.dataset.dataset import Dataset
from library.errors import some_names
from library.training.options import CaptionEncodingOptions

CHUNK_LIMITS = (75, 150, 225)


def cut_caption_notes(dataset: Dataset, tokenizers: Sequence[Any], options: CaptionEncodingOptions) -> list[str]:
    """One sentence that names the images whose captions have more tokens than are read; nothing where all fit.

    Shuffling and dropping tags are left out of account: it is told what the whole caption needs.
    """
    from library.conditioning import clip_text, prompt_weights

    def count(text: str) -> int:
        parts = prompt_weights.parse(text) if options.weighted_captions else [(text, 1.0)]
        return max(sum(len(clip_text.token_ids(own, part)) for part, _ in parts) for own in tokenizers)

    limit = options.max_token_length
    counted = {
        image.path: _longest(image.caption, dataset.subset_of(image).captions, partial(_count_if_long, count, limit))
        for image in dataset.images
    }
    cut = [f"{path.name} ({tokens})" for path, tokens in counted.items() if tokens > limit]
    if not cut:
        return []
    longer = [str(length) for length in CHUNK_LIMITS if length > limit]
    remedy = f" (--max_token_length {' or '.join(longer)} reads more)" if longer else ""
    subject = "caption has" if len(cut) == 1 else "captions have"
    return [f"note: {len(cut)} {subject} more than {limit} tokens, and the rest is not read{remedy}: {some_names(cut)}"]


def _count_if_long(count: Callable[[str], int], limit: int, text: str) -> int:
    """The tokens of a text; a text with no more characters than tokens are read needs no counting."""
    return count(text) if len(text) > limit else 0


def _longest(caption: str, settings: CaptionSettings, count: Callable[[str], int]) -> int:
    """Tokens of the longest text that an image's caption can be."""
    lines: Sequence[str] = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    texts = lines if settings.enable_wildcard else lines[:1]
    return max(
        count(" ".join(part for part in (settings.caption_prefix, text, settings.caption_suffix) if part)) for text in texts
    )
