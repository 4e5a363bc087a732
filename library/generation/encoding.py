"""Texts as conditions for the denoiser, each computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.conditioning import clip_text
from library.generation.placing import on_device

REMEMBERED = 512  # conditions; one of SD1 has 0.2 MB in fp32

Chunks = list[list[tuple[int, float]]]


class PromptEncoder:
    """Encodes texts without tags.

    A text is cut into chunks of 75 tokens. All rows of a batch have as many as the longest text of the picture needs, and
    pictures that need different numbers do not share a batch: more (empty) chunks would change a picture.

    Args:
        max_chunks: 1 or more; tokens beyond are dropped, with a note.
        note: is told what was dropped, once per text.
        stays: whether the text encoder is on the device all the time, and not just while it computes.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        text_encoders: Sequence[nn.Module],
        *,
        max_chunks: int,
        note: Callable[[str], None],
        stays: bool = True,
    ) -> None:
        self._tokenizer, self._text_encoder = tokenizers[0], text_encoders[0]
        self._max_chunks, self._note, self._stays = max_chunks, note, stays
        self._known_chunks: dict[tuple[str, bool], Chunks] = {}
        self._known: OrderedDict[Hashable, Tensor] = OrderedDict()

    def chunks_needed(self, texts: Iterable[str], *, extended: bool) -> int:
        """Chunks of the longest of several texts.

        Args:
            extended: read `BREAK`.
        """
        return max(len(self._chunks_of(text, extended)) for text in texts)

    def _chunks_of(self, text: str, extended: bool) -> Chunks:
        if (text, extended) not in self._known_chunks:
            chunks = clip_text.text_chunks(self._tokenizer, text, breaks=extended)
            dropped = sum(map(len, chunks[self._max_chunks :]))
            if dropped:
                total = sum(map(len, chunks))
                self._note(f"the prompt {shortened(text)!r} has {total} tokens; the last {dropped} are left out")
            self._known_chunks[text, extended] = chunks[: self._max_chunks]
        return self._known_chunks[text, extended]

    def encode(
        self,
        text: str,
        *,
        chunks: int,
        clip_skip: int | None,
        extended: bool,
        state: Hashable,
        prepare: Callable[[], object],
        device: torch.device,
    ) -> Tensor:
        """(1, chunks * 77, D): the condition of a text.

        Args:
            chunks: as many as `chunks_needed` or more.
            state: of the text encoder: equal where it computes the same.
            prepare: brings it into that state; called if there is something to compute.
        """
        key = (text, chunks, clip_skip, extended, state)
        if key not in self._known:
            tokens = clip_text.chunk_batch(self._tokenizer, [self._chunks_of(text, extended)], chunks=chunks)
            prepare()
            with on_device(self._text_encoder, device, stays=self._stays):
                condition = clip_text.encode(
                    self._text_encoder, tokens, clip_skip=clip_skip, weight_mode="keep_mean", whole_chunks=True
                )
            self._known[key] = condition.to(device)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def forget(self) -> None:
        """Drop what was computed, since text encoder and tokenizer may change."""
        self._known.clear()
        self._known_chunks.clear()


def shortened(text: str, length: int = 40) -> str:
    """The beginning of a text, for a sentence about it."""
    return text if len(text) <= length else f"{text[:length]}..."
