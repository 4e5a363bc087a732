"""Prompts and negative prompts as conditions of one length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.conditioning import clip_text, prompt_weights
from library.conditioning.clip_text import CHUNK
from library.generation.requests import ImageRequest


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the denoiser is told, for every picture of a batch.

    Attributes:
        positive: (B, L, D).
        negative: the same, or None without guidance.
    """

    positive: Tensor
    negative: Tensor | None


class PromptEncoder:
    """Encodes the texts of requests.

    A prompt is cut into chunks of 75 tokens, as many as the longer of it and its negative prompt needs, for both. Requests
    that need different numbers do not share a batch: more (empty) chunks would change the picture.

    Args:
        max_chunks: 1 or more; tokens beyond are dropped, with a note.
        note: is told what was dropped, once per text.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        text_encoders: Sequence[nn.Module],
        *,
        max_chunks: int,
        note: Callable[[str], None],
    ) -> None:
        self._tokenizer, self._text_encoder = tokenizers[0], text_encoders[0]
        self._max_chunks, self._note = max_chunks, note
        self._known_chunks: dict[str, int] = {}

    def chunks_needed(self, request: ImageRequest) -> int:
        """Chunks of the prompt, and of the negative prompt where it has an effect."""
        texts = [request.prompt, request.negative_prompt] if request.guided else [request.prompt]
        return max(map(self._chunks_of, texts))

    def _chunks_of(self, text: str) -> int:
        if text not in self._known_chunks:
            parts = prompt_weights.parse(text)
            tokens = sum(len(clip_text.token_ids(self._tokenizer, part)) for part, _ in parts)
            room = self._max_chunks * CHUNK
            if tokens > room:
                self._note(f"the prompt {shortened(text)!r} has {tokens} tokens; the last {tokens - room} are left out")
            self._known_chunks[text] = min(self._max_chunks, max(1, math.ceil(tokens / CHUNK)))
        return self._known_chunks[text]

    def encode(self, requests: Sequence[ImageRequest], device: torch.device) -> Conditions:
        """Conditions of a batch; its requests need the same number of chunks, and all are guided or none is.

        Equal texts are encoded once.
        """
        chunks = max(map(self.chunks_needed, requests))
        keys = [(request.prompt, request.clip_skip) for request in requests]
        if requests[0].guided:
            keys += [(request.negative_prompt, request.clip_skip) for request in requests]
        encoded = {key: self._encode(key[0], key[1], chunks).to(device) for key in dict.fromkeys(keys)}
        contexts = torch.cat([encoded[key] for key in keys])
        count = len(requests)
        return Conditions(positive=contexts[:count], negative=contexts[count:] if requests[0].guided else None)

    def _encode(self, text: str, clip_skip: int | None, chunks: int) -> Tensor:
        """(1, L, D)."""
        tokens = clip_text.tokenize(self._tokenizer, [text], max_length=CHUNK * chunks, weighted=True)
        return clip_text.encode(self._text_encoder, tokens, clip_skip=clip_skip, weight_mode="keep_mean")


def shortened(text: str, length: int = 40) -> str:
    """The beginning of a text, for a sentence about it."""
    return text if len(text) <= length else f"{text[:length]}..."
