"""What a denoiser is told beside the latents and the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """A batch of texts, as a denoiser takes them.

    Attributes:
        context: (B, L, D), the tokens' features of all text encoders side by side.
        pooled: (B, P), one vector for each text; None where the family takes none.
    """

    context: Tensor
    pooled: Tensor | None = None

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Condition:
        """The same on another device or in another type."""
        pooled = None if self.pooled is None else self.pooled.to(device=device, dtype=dtype)
        return Condition(self.context.to(device=device, dtype=dtype), pooled)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.context.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def split(self) -> list[Condition]:
        """Each text alone, (1, ...)."""
        return [
            Condition(self.context[n : n + 1], None if self.pooled is None else self.pooled[n : n + 1])
            for n in range(len(self.context))
        ]

    def denoiser_arguments(self, sizes: Tensor | None) -> dict[str, Any]:
        """Keywords for a U-Net of diffusers.

        Args:
            sizes: (B, n), the family's `size_conditions`; None where it takes none.
        """
        arguments: dict[str, Any] = {"encoder_hidden_states": self.context}
        if sizes is not None:
            arguments["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": sizes}
        return arguments


def joined(conditions: Sequence[Condition]) -> Condition:
    """Batches of one length L as one."""
    pooled = [each.pooled for each in conditions if each.pooled is not None]
    return Condition(torch.cat([each.context for each in conditions]), torch.cat(pooled) if pooled else None)
