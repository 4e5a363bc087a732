"""Adapters that rotate the outputs of a layer in blocks: what OFT and BOFT share.

Every rotation is the Cayley transform of a skew-symmetric matrix Q, which is trained as Q = B - B':

    R = (I + Q) (I - Q)^-1        (Qiu et al., arXiv:2306.07280, section 3.2)

Only R - I = 2 Q (I - Q)^-1 is ever formed, in fp32, so that small turns lose no digits. With a limit (COFT), Q is scaled
down where its norm over all of a layer's blocks exceeds it. With `rescaled`, every output has a factor beside.

The change is linear in the multiplier: half the strength goes half the way along the straight line to the rotated weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from networks.core.adapter import Adapter, LayerSpec, matching_dtypes

_WRITTEN_ALPHA = 2.0**10
"""The constraint of files that mean none; one that is larger still fits into fp16 up to `_LARGEST_ALPHA`."""
_LARGEST_ALPHA = 2.0**15


def skew(blocks: Tensor) -> Tensor:
    """Q = B - B' of every block.

    Args:
        blocks: (..., size, size).

    Returns:
        The same shape, fp32.
    """
    blocks = blocks.float()
    return blocks - blocks.mT


def limiting_factor(generators: Tensor, limit: float) -> Tensor:
    """What to multiply with so that the norm over all blocks is at most `limit`: 0-d, and 1 where it is already."""
    if limit == math.inf:
        return generators.new_ones(())
    return limit / torch.linalg.vector_norm(generators).clamp(min=limit)


def cayley_turn(generators: Tensor) -> Tensor:
    """R - I of the Cayley transform R = (I + Q) (I - Q)^-1.

    Args:
        generators: Q, (..., size, size) skew-symmetric.
    """
    identity = torch.eye(generators.shape[-1], dtype=generators.dtype, device=generators.device)
    # `solve` would wait for the device to see whether the matrix is singular, which I - Q never is.
    solved: Tensor = torch.linalg.solve_ex(identity - generators, 2 * generators).result
    return solved


def _single_number(alpha: Tensor) -> float:
    if alpha.numel() != 1:
        raise ValueError(f"its alpha is no single number but {tuple(alpha.shape)} of them")
    return float(alpha)


class RotationAdapter(Adapter):
    """An adapter whose subclasses give `turn`.

    Args:
        spec: the base layer.
        block_shape: (..., size, size) of all blocks.
        constraint: the limit on Q's norm is this times the number of outputs; 0 sets none.
        rescaled: train a factor for each output beside the rotations. (ComfyUI and SD.Next leave it out in OFT.)
        module_dropout: share of forward passes in train mode that go without this adapter.
    """

    def __init__(
        self,
        spec: LayerSpec,
        *,
        block_shape: Sequence[int],
        constraint: float = 0.0,
        rescaled: bool = False,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__(spec, module_dropout=module_dropout)
        if constraint < 0:
            raise ValueError(f"the constraint must not be negative, it is {constraint:g}")
        outputs, *inputs = spec.weight_shape
        self.rank = block_shape[-1]
        self.constraint = constraint
        self.oft_blocks = nn.Parameter(torch.zeros(*block_shape))
        self.rescale = nn.Parameter(torch.ones(outputs, *(1 for _ in inputs))) if rescaled else None

    # What an algorithm gives

    def turn(self, values: Tensor, turns: Tensor) -> Tensor:
        """What the rotations change in values along the outputs.

        Args:
            values: (..., outputs).
            turns: R - I of every block, in the shape of `oft_blocks` and the dtype of the values.

        Returns:
            The shape of the values.
        """
        raise NotImplementedError

    # What follows

    @property
    def variant(self) -> str:
        """See `Adapter.variant`: tells of a constraint, and of factors beside."""
        extras = [*(["constraint"] if self.constraint else []), *(["rescale"] if self.rescale is not None else [])]
        return f"{self.title} with {' and '.join(extras)}" if extras else self.title

    @property
    def structure(self) -> dict[str, str]:
        """See `Adapter.structure`."""
        return {} if self.rescale is None else {"rescale": "rescaled=True"}

    def initialise(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """Rotations by nothing; see `Adapter.initialise`."""
        nn.init.zeros_(self.oft_blocks)
        if self.rescale is not None:
            nn.init.ones_(self.rescale)

    @property
    def _limit(self) -> float:
        return self.constraint * self.spec.weight_shape[0] if self.constraint else math.inf

    def turns(self) -> Tensor:
        """R - I of every block, in the shape of `oft_blocks`, fp32."""
        generators = skew(self.oft_blocks)
        return cayley_turn(generators * limiting_factor(generators, self._limit))

    def _change(self, values: Tensor, turns: Tensor, axis: int) -> Tensor:
        """What rotations and factors change in values whose outputs lie along an axis."""
        values = values.movedim(axis, -1)
        turned = self.turn(values, turns)
        if self.rescale is not None:
            excess = (self.rescale.float() - 1).flatten().to(values.device, values.dtype)
            turned = turned + excess * (turned + values)
        return turned.movedim(-1, axis)

    def delta_weight(self, base_weight: Tensor) -> Tensor:
        """See `Adapter.delta_weight`."""
        return self._change(base_weight.float(), self.turns().to(base_weight.device), 0)

    def effect(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """See `Adapter.effect`. The layer's output is rotated instead of its weight."""
        values, turns = matching_dtypes(self.base_output(layer, x, output), self.turns())
        return self.multiplier * self._change(values, turns, self.spec.channel_axis)

    def scale_delta_(self, factor: Tensor) -> None:
        """See `Adapter.scale_delta_`. The angles are scaled, so the change is met nearly, and better the smaller it is."""
        self.oft_blocks.copy_(self._baked_blocks() * factor)
        if self.rescale is not None:
            self.rescale.sub_(1).mul_(factor).add_(1)

    def _baked_blocks(self) -> Tensor:
        """Blocks that mean without a limit what the trained ones mean with it, fp32."""
        return self.oft_blocks.detach().float() * limiting_factor(skew(self.oft_blocks.detach()), self._limit)

    def tensors(self) -> dict[str, Tensor]:
        """See `Adapter.tensors`. Readers disagree on what `alpha` limits and on what 0 says, so the limit is in the blocks
        already, and alpha is beyond the norm that they have."""
        blocks = self._baked_blocks()
        norm = float(torch.linalg.vector_norm(skew(blocks)))
        alpha = _WRITTEN_ALPHA
        while alpha < 2 * norm and alpha < _LARGEST_ALPHA:
            alpha *= 2
        result = {"oft_blocks": blocks.to(self.oft_blocks.dtype)}
        if self.rescale is not None:
            result["rescale"] = self.rescale.detach()
        return result | {"alpha": torch.tensor(alpha)}

    @classmethod
    def _from_blocks(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """An adapter with a file's tensors and its limit, which stays for training."""
        alpha = _single_number(tensors["alpha"]) if "alpha" in tensors else 0.0
        adapter = cls(
            spec,
            constraint=alpha if 0 < alpha < _WRITTEN_ALPHA else 0.0,
            rescaled="rescale" in tensors,
            **options,
        )
        adapter.load_tensors(tensors)
        return adapter

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the limit of a file (which says it by its alpha, and a training state does not) into the blocks; the own
        one stays."""
        alpha, blocks = state_dict.pop(f"{prefix}alpha", None), state_dict.get(f"{prefix}oft_blocks")
        limit = _single_number(alpha) * self.spec.weight_shape[0] if alpha is not None else 0.0
        if blocks is not None and 0 < limit < self._limit:
            state_dict[f"{prefix}oft_blocks"] = blocks.float() * limiting_factor(skew(blocks), limit)
        super()._load_from_state_dict(state_dict, prefix, *rest)
