"""Texts as conditions for the denoiser, each computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from functools import partial

import torch

from library.conditioning import clip_text
from library.conditioning.condition import Condition
from library.conditioning.text_encoders import TextEncoders
from library.generation.placing import on_device

REMEMBERED = 512  # conditions; one of SD1 has 0.2 MB in fp32

Chunks = list[clip_text.WeightedTokens]


class PromptEncoder:
    """Encodes texts without tags.

    A text is cut into chunks of 75 tokens. All rows of a batch have as many as the longest text of the picture needs, and
    pictures that need different numbers do not share a batch: more (empty) chunks would change a picture.

    Args:
        max_chunks: 1 or more; tokens beyond are dropped, with a note.
        note: is told what was dropped, once per text.
        stays: whether the text encoders are on the device all the time, and not just while it computes.
    """

    def __init__(
        self,
        texts: TextEncoders,
        *,
        max_chunks: int,
        note: Callable[[str], None],
        stays: bool = True,
    ) -> None:
        self._texts = texts
        self._max_chunks, self._note, self._stays = max_chunks, note, stays
        self._known_chunks: dict[tuple[str, bool], list[Chunks]] = {}
        self._known: OrderedDict[Hashable, Condition] = OrderedDict()

    def chunks_needed(self, texts: Iterable[str], *, extended: bool) -> int:
        """Chunks of the longest of several texts.

        Args:
            extended: read `BREAK`.
        """
        return max(len(chunks) for text in texts for chunks in self._chunks_of(text, extended))

    def _chunks_of(self, text: str, extended: bool) -> list[Chunks]:
        """A text's chunks for each text encoder."""
        if (text, extended) not in self._known_chunks:
            tokenizers = self._texts.tokenizers
            of_each = [clip_text.text_chunks(tokenizer, text, breaks=extended) for tokenizer in tokenizers]
            dropped = sum(map(len, of_each[0][self._max_chunks :]))
            if dropped:
                total = sum(map(len, of_each[0]))
                self._note(f"the prompt {shortened(text)!r} has {total} tokens; the last {dropped} are left out")
            self._known_chunks[text, extended] = [chunks[: self._max_chunks] for chunks in of_each]
        return self._known_chunks[text, extended]

    def encode(
        self,
        text: str,
        text_2: str | None = None,
        *,
        chunks: int,
        clip_skip: int | None,
        extended: bool,
        state: Hashable,
        prepare: Callable[[], object],
        device: torch.device,
    ) -> Condition:
        """The condition of a text; its context is (1, chunks * 77, D).

        Args:
            text_2: for the text encoders behind the first; None for the same.
            chunks: as many as `chunks_needed` or more.
            state: of the text encoders: equal where they compute the same.
            prepare: brings them into that state; called if there is something to compute.
        """
        key = (text, text_2, chunks, clip_skip, extended, state)
        if key not in self._known:
            first, *others = self._chunks_of(text, extended)
            if text_2 is not None:
                others = self._chunks_of(text_2, extended)[1:]
            of_each = zip(self._texts.tokenizers, (first, *others), strict=True)
            tokens = [clip_text.chunk_batch(tokenizer, [own], chunks=chunks) for tokenizer, own in of_each]
            prepare()
            condition = self._texts.encode(
                tokens,
                clip_skip=clip_skip,
                weight_mode="keep_mean",
                whole_chunks=True,
                around=partial(on_device, device=device, stays=self._stays),
            )
            self._known[key] = condition.to(device=device)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def forget(self) -> None:
        """Drop what was computed, since text encoders and tokenizers may change."""
        self._known.clear()
        self._known_chunks.clear()


def shortened(text: str, length: int = 40) -> str:
    """The beginning of a text, for a sentence about it."""
    return text if len(text) <= length else f"{text[:length]}..."
