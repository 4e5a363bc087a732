"""Merges that look at every single value of the changes, not at their sum alone.

    ties        Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv:2306.01708
    dare        Yu et al., "Language Models are Super Mario", arXiv:2311.03099
    magnitude   the largest values of each change, and their sum: TIES' first step alone

A change is multiplied by its ratio after values were chosen by their size, so ratios do not move what is chosen of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from library.streams import torch_stream

_CHUNK = 1 << 16  # values at a time: all that is computed on the way stays in the processor's cache


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is done with the changes of one layer.

    Attributes:
        name: see above.
        density: share of each change's values that is kept.
        seed: of what dare keeps.
    """

    name: Literal["ties", "dare", "magnitude"]
    density: float
    seed: int = 0

    def combine(self, layer: str, changes: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
        """The merged change of a layer.

        Args:
            layer: its name, which dare's draws depend on.
            changes: one tensor for each adapter, of one shape.
            ratios: their factors.
        """
        if self.name == "dare":
            kept = [self._by_chance(change, layer, place) for place, change in enumerate(changes)]
        else:
            kept = [largest(change, self.density) for change in changes]
        weighted = torch.stack([ratio * change for ratio, change in zip(ratios, kept, strict=True)])
        return agreed_mean(weighted) if self.name == "ties" else weighted.sum(0)

    def _by_chance(self, change: Tensor, layer: str, place: int) -> Tensor:
        """A random share of the values, scaled up so that the expected change stays."""
        stream = torch_stream(self.seed, "dare", zlib.crc32(layer.encode()), place)
        kept = torch.rand(change.shape, generator=stream) < self.density
        return change * kept.to(change.device) / self.density


def largest(change: Tensor, density: float) -> Tensor:
    """The change with the given share of its values, those of largest magnitude; the others are 0."""
    count = int(density * change.numel())
    if count >= change.numel():
        return change
    if not count:
        return torch.zeros_like(change)
    sizes = change.flatten().abs()
    # NumPy finds the smallest that is kept without sorting, many times faster than torch's topk.
    bound = float(np.partition(sizes.float().cpu().numpy(), -count)[-count])
    kept = sizes > bound
    kept[(sizes == bound).nonzero()[: count - int(kept.sum())]] = True
    return change * kept.view(change.shape)


def agreed_mean(changes: Tensor) -> Tensor:
    """For every value, the mean of those changes that have the sign of the sum.

    Args:
        changes: (adapters, ...), weighted.
    """
    means = [_agreed_mean(piece) for piece in changes.flatten(1).split(_CHUNK, dim=1)]
    return torch.cat(means).view(changes.shape[1:])


def _agreed_mean(changes: Tensor) -> Tensor:
    agree = changes.sign() == changes.sum(0).sign()
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)
