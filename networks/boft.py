"""BOFT: the outputs of a layer are rotated in stages of small blocks that together mix all of them, as a butterfly does.

    W' = P_m' R_m P_m ... P_1' R_1 P_1 W

Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv:2311.06243, section 4. As in
LyCORIS there are log2(blocks) + 1 stages, and in stage i the halves of a block lie 2^i half blocks apart.
`networks/core/rotation.py` tells how rotations are trained.

The strength scales the whole change. (LyCORIS mixes every stage with none instead, so that half its strength goes another
way; at strength 1 both are the same.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.building import creation
from networks.core import arguments
from networks.core.adapter import Adapter, LayerSpec
from networks.core.algorithms import Algorithm
from networks.core.factorization import power_of_two_factorization, smallest_even_factor
from networks.core.rotation import RotationAdapter
from networks.oft import ROTATION_ARGUMENTS


def turn_in_stages(values: Tensor, turns: Tensor) -> Tensor:
    """What butterfly stages change in values.

    Args:
        values: (..., blocks * size).
        turns: R - I, (stages, blocks, size, size).

    Returns:
        The rotated values less the values, in their shape.
    """
    stages, blocks, size, _ = turns.shape
    half = size // 2
    rows = values.movedim(-1, 0)
    shape, rows = rows.shape, rows.reshape(len(rows), -1).contiguous()
    # A block has pairs of rows, one from each of its halves. Taken half by half, whole stretches of memory are moved.
    matrices = turns.view(stages, blocks, half, 2, half, 2).transpose(2, 3).transpose(4, 5).reshape(turns.shape)
    change = torch.zeros_like(rows)
    for stage in range(stages):
        apart = 2**stage
        halves = (rows + change).view(blocks // apart, 2, apart, half, -1).transpose(1, 2)
        turned = torch.bmm(matrices[stage], halves.reshape(blocks, size, -1))
        change = change + turned.view(blocks // apart, apart, 2, half, -1).transpose(1, 2).flatten(0, 3)
    return change.view(shape).movedim(0, -1)


class BOFTModule(RotationAdapter):
    """BOFT on one layer.

    Args:
        spec: the base layer.
        rank: largest size of a block; taken is the largest even one that splits the outputs into a power of two of blocks.
        settings: see `RotationAdapter`.

    Raises:
        ValueError: the outputs cannot be split so.
    """

    title = "BOFT"

    def __init__(self, spec: LayerSpec, *, rank: int, **settings: Any) -> None:
        outputs = spec.weight_shape[0]
        sizes = power_of_two_factorization(outputs, rank)
        if sizes is None:
            smallest = smallest_even_factor(outputs)
            works = f"network_dim {smallest} or more does" if smallest else "no network_dim does, so exclude it"
            raise ValueError(
                f"network_dim {rank} does not split {outputs} outputs into a power of two of even blocks for BOFT; {works}"
            )
        size, count = sizes
        super().__init__(spec, block_shape=(count.bit_length(), count, size, size), **settings)

    def turn(self, values: Tensor, turns: Tensor) -> Tensor:
        """See `RotationAdapter.turn`."""
        return turn_in_stages(values, turns)

    def effect(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """See `Adapter.effect`. What has fewer values is turned, the layer's weight or its output, and the stages are run
        again in the backward pass, or every one of them would be kept."""
        if output.numel() > math.prod(self.spec.weight_shape):
            return Adapter.effect(self, layer, x, output)
        if torch.is_grad_enabled() and self.training:
            return checkpoint(super().effect, layer, x, output, use_reentrant=False, preserve_rng_state=False)
        return super().effect(layer, x, output)

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """See `Adapter.from_tensors`; options are the drop-outs."""
        blocks = tensors.get("oft_blocks")
        if blocks is None or blocks.dim() != 4:
            raise ValueError(f"is no BOFT layer, its tensors are {', '.join(tensors)}")
        return cls._from_blocks(spec, tensors, rank=blocks.shape[-1], **options)


ALGORITHM = Algorithm(
    name="boft",
    adapter=BOFTModule,
    arguments=ROTATION_ARGUMENTS,
    training_arguments={"module_dropout": arguments.probability},
    has_alpha=False,
)

create_network = partial(creation.create_network, "boft")
create_network_from_weights = partial(creation.create_network_from_weights, "boft")
