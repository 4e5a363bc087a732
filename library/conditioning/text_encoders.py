"""A family's text encoders as one: texts to conditions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.conditioning import clip_text
from library.conditioning.clip_text import TokenBatch, WeightMode
from library.conditioning.condition import Condition
from library.families.family import TextEncoder

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Around = Callable[[nn.Module], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class TextEncoders:
    """Text encoders with their tokenizers, in the family's order.

    Attributes:
        specs: what is known of each.
    """

    specs: Sequence[TextEncoder]
    tokenizers: Sequence[CLIPTokenizer]
    modules: Sequence[nn.Module]

    def tokenize(
        self, texts: Sequence[str], *, max_length: int = clip_text.CHUNK, weighted: bool = False
    ) -> list[TokenBatch]:
        """The tokens of each text encoder; see `clip_text.tokenize`."""
        return [
            clip_text.tokenize(tokenizer, texts, max_length=max_length, weighted=weighted) for tokenizer in self.tokenizers
        ]

    def encode(
        self,
        tokens: Sequence[TokenBatch],
        *,
        clip_skip: int | None = None,
        weight_mode: WeightMode = "multiply",
        whole_chunks: bool = False,
        around: Around = lambda module: contextlib.nullcontext(),
    ) -> Condition:
        """Conditions of a batch of texts.

        Args:
            tokens: of each text encoder, with as many chunks.
            clip_skip: of every text encoder, counted from its end; None takes each one's own (`TextEncoder.last_used`).
            weight_mode, whole_chunks: see `clip_text.encode`.
            around: a context for the time that a text encoder computes.

        Raises:
            ValueError: for a clip_skip that an encoder has no layer for.
        """
        contexts: list[Tensor] = []
        pooled: Tensor | None = None
        for spec, tokenizer, module, batch in zip(self.specs, self.tokenizers, self.modules, tokens, strict=True):
            layers = clip_text.Layers(clip_skip or spec.last_used, final_norm=spec.final_norm)
            end: Any = tokenizer.eos_token_id
            with around(module):
                encoded = clip_text.encode(
                    module,
                    batch,
                    layers=layers,
                    weight_mode=weight_mode,
                    whole_chunks=whole_chunks,
                    pooled_at=end if spec.gives_pooled else None,
                )
            contexts.append(encoded.context)
            pooled = encoded.pooled if spec.gives_pooled else pooled
        return Condition(contexts[0] if len(contexts) == 1 else torch.cat(contexts, dim=-1), pooled)
