"""OFT: the outputs of a layer, split into blocks, are rotated in each block. COFT is the same with `constraint`.

    W'_k = R_k' W_k      of the k-th block of rows

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280, equation 5, in the
block-diagonal form of section 3.3, oriented as LyCORIS ("diag-oft") and sd-scripts have it. `networks/core/rotation.py`
tells how rotations are trained.

`network_dim` chooses the size of the blocks as LyCORIS does it: where it divides the outputs, the smaller one of it and what
it leaves. `num_blocks` gives their number instead, which is what `network_dim` means to sd-scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from networks.building import creation
from networks.core import arguments
from networks.core.adapter import LayerSpec
from networks.core.algorithms import Algorithm
from networks.core.arguments import Parser
from networks.core.factorization import factorization
from networks.core.rotation import RotationAdapter


def turn_in_blocks(values: Tensor, turns: Tensor) -> Tensor:
    """What rotations of blocks change in values.

    Args:
        values: (..., blocks * size).
        turns: R - I, (blocks, size, size).

    Returns:
        (R' - I) of each block of values, in their shape.
    """
    blocks = values.unflatten(-1, turns.shape[:2])
    return torch.einsum("knm,...kn->...km", turns, blocks).flatten(-2)


def generators_of(rotations: Tensor) -> Tensor:
    """Blocks B whose rotations are the given ones: the reverse of the Cayley transform of Q = B - B'.

    Args:
        rotations: (blocks, size, size).

    Raises:
        ValueError: matrices that are no rotations, or that turn some plane by half a circle, which has no such Q.
    """
    exact = rotations.double()
    identity = torch.eye(exact.shape[-1], dtype=exact.dtype)
    tolerance = 4 * exact.shape[-1] * torch.finfo(rotations.dtype).eps
    if not torch.allclose(exact.mT @ exact, identity.expand_as(exact), rtol=0, atol=tolerance):
        raise ValueError("oft_diag holds matrices that are no rotations, which OFT cannot represent")
    generators, singular = torch.linalg.solve_ex(exact + identity, exact - identity, left=False)
    if singular.any() or generators.abs().max() > 0.5 / tolerance:
        raise ValueError("oft_diag holds rotations by half a circle, or mirrors, which OFT cannot represent")
    return (generators - generators.mT).float() / 4


class OFTModule(RotationAdapter):
    """OFT on one layer.

    Args:
        spec: the base layer.
        rank: chooses the size of the blocks, see this module's docstring.
        num_blocks: their number, instead.
        settings: see `RotationAdapter`.
    """

    title = "OFT"

    def __init__(self, spec: LayerSpec, *, rank: int, num_blocks: int | None = None, **settings: Any) -> None:
        outputs = spec.weight_shape[0]
        if num_blocks is None:
            size, count = factorization(outputs, rank)
        elif outputs % num_blocks:
            raise ValueError(f"{outputs} outputs are not divided by num_blocks {num_blocks}")
        else:
            size, count = outputs // num_blocks, num_blocks
        super().__init__(spec, block_shape=(count, size, size), **settings)

    def turn(self, values: Tensor, turns: Tensor) -> Tensor:
        """See `RotationAdapter.turn`."""
        return turn_in_blocks(values, turns)

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """See `Adapter.from_tensors`; options are the drop-outs."""
        if "oft_diag" in tensors:
            tensors = {name: value for name, value in tensors.items() if name != "alpha"}
        blocks = tensors.get("oft_blocks", tensors.get("oft_diag"))
        if blocks is None or blocks.dim() != 3:
            raise ValueError(f"is no OFT layer, its tensors are {', '.join(tensors)}")
        count, size, columns = blocks.shape
        if (count * size, columns) != (spec.weight_shape[0], size):
            raise ValueError(f"its blocks {tuple(blocks.shape)} do not fit a layer with {spec.weight_shape[0]} outputs")
        return cls._from_blocks(spec, tensors, rank=size, num_blocks=count, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the rotations themselves (`oft_diag`), as old files of LyCORIS have them; to those no limit applies."""
        rotations = state_dict.pop(f"{prefix}oft_diag", None)
        if rotations is not None:
            state_dict[f"{prefix}oft_blocks"] = generators_of(rotations)
            state_dict.pop(f"{prefix}alpha", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


ROTATION_ARGUMENTS: dict[str, Parser] = {"constraint": arguments.not_negative, "rescaled": arguments.flag}
"""See `RotationAdapter`."""

ALGORITHM = Algorithm(
    name="oft",
    adapter=OFTModule,
    arguments=ROTATION_ARGUMENTS | {"num_blocks": arguments.rank},
    training_arguments={"module_dropout": arguments.probability},
    has_alpha=False,
)

create_network = partial(creation.create_network, "oft")
create_network_from_weights = partial(creation.create_network_from_weights, "oft")
