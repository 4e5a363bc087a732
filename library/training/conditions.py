"""Captions to conditions while training: encoded at every use, or once where the text encoders stay as they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from library.conditioning.clip_text import TokenBatch
from library.conditioning.condition import Condition, joined
from library.conditioning.text_encoders import TextEncoders
from library.training.options import CaptionEncodingOptions

ConditionsOf = Callable[[Sequence[str]], Condition]
"""Captions to their conditions, contexts (B, n * 75 + 2, D)."""

REMEMBERED_BYTES = 2**28


def tokens_of(captions: Sequence[str], texts: TextEncoders, options: CaptionEncodingOptions) -> list[TokenBatch]:
    """What each text encoder reads of captions."""
    return texts.tokenize(captions, max_length=options.max_token_length, weighted=options.weighted_captions)


def encoded(captions: Sequence[str], texts: TextEncoders, options: CaptionEncodingOptions) -> Condition:
    """The conditions of captions, computed now; gradients flow into the text encoders where they are enabled."""
    return texts.encode(tokens_of(captions, texts, options), clip_skip=options.clip_skip)


class RememberedConditions:
    """Conditions that are made once and kept, as far as `REMEMBERED_BYTES` reach.

    Args:
        make: conditions of captions that are not known; called without gradients.
    """

    def __init__(self, make: ConditionsOf) -> None:
        self._make = make
        self._known: OrderedDict[str, Condition] = OrderedDict()

    def __call__(self, captions: Sequence[str]) -> Condition:
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if missing:
            with torch.no_grad():
                self._known.update(zip(missing, self._make(missing).split(), strict=True))
        conditions = joined([self._known[caption] for caption in captions])
        most = REMEMBERED_BYTES * len(captions) // conditions.nbytes
        while len(self._known) > most:
            self._known.popitem(last=False)
        return conditions
