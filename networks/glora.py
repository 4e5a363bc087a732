"""GLoRA: a low-rank change, and beside it a low-rank change that passes through the base weight.

    dW = alpha / rank * (W @ a1 @ a2 + b1 @ b2)

Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv:2306.07967, equation 9, without
its vectors for bias and prompt, as LyCORIS has it. For a convolution, a1 and a2 act on the input channels, and b2 has the
layer's kernel.

LyCORIS 2 and the readers made for its files name the factors the other way round (`other_naming`); both are read, the newer
naming is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.building import creation
from networks.core import arguments
from networks.core.adapter import Adapter, LayerSpec, Weight, matching_dtypes, weight_of
from networks.core.algorithms import Algorithm
from networks.core.recompute import apply_recomputed

_OTHER_NAMES = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight", "b2.weight": "b1.weight"}


def through_base(base_weight: Tensor, factor: Tensor) -> Tensor:
    """A base weight after a matrix on its input channels.

    Args:
        base_weight: (out, in, ...).
        factor: (in, rank), with any number of axes of size 1 behind.

    Returns:
        (out, rank, ...).
    """
    return torch.einsum("oi...,ir->or...", base_weight, factor.flatten(1))


def glora_delta(base_weight: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, scale: float) -> Tensor:
    """The change of a weight.

    Args:
        base_weight: (out, in, ...).
        a1, a2: (in, rank) and (rank, in), with any number of axes of size 1 behind.
        b1, b2: (out, rank), likewise, and (rank, in, ...).
        scale: alpha / rank.

    Returns:
        The base weight's shape.
    """
    through = through_base(through_base(base_weight, a1), a2)
    return scale * (through + (b1.flatten(1) @ b2.flatten(1)).reshape(base_weight.shape))


def other_naming(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors under the names of LyCORIS 2, A1111 and SD.Next, where a1 and b1 are the first factors that act on
    the input; or from those back to ours. In order of the names."""
    return dict(sorted((_OTHER_NAMES.get(name, name), tensor) for name, tensor in tensors.items()))


def in_our_naming(spec: LayerSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors under our names, whichever they have, told by their shapes.

    Where rank, inputs and outputs are as many, both fit; then the newer naming, which is ours, is taken.

    Raises:
        ValueError: shapes that are neither.
    """
    for named in (dict(tensors), other_naming(tensors)):
        if _fit(spec, named):
            return named
    shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in _OTHER_NAMES if name in tensors)
    raise ValueError(f"the tensors of GLoRA do not fit the layer {spec.weight_shape}: {shapes}")


def _fit(spec: LayerSpec, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a layer's tensors have the shapes that our names mean."""
    outputs, inputs, *kernel = spec.weight_shape
    if not set(_OTHER_NAMES) <= set(tensors) or any(tensors[name].dim() < 2 for name in _OTHER_NAMES):
        return False
    rank = len(tensors["a2.weight"])
    found = [tuple(tensors[name].flatten(1).shape) for name in _OTHER_NAMES]
    return found == [(inputs, rank), (rank, inputs), (outputs, rank), (rank, inputs * math.prod(kernel))]


class GLoRAModule(Adapter):
    """GLoRA on one layer.

    Args:
        spec: the base layer.
        rank: of both changes.
        alpha: they are scaled by alpha / rank.
        module_dropout: share of forward passes in train mode that go without this adapter.
    """

    title = "GLoRA"

    def __init__(self, spec: LayerSpec, *, rank: int, alpha: float, module_dropout: float = 0.0) -> None:
        super().__init__(spec, module_dropout=module_dropout)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        if spec.groups != 1:
            raise ValueError("adapters on grouped convolutions are not supported")
        self.rank = rank
        outputs, inputs, *kernel = spec.weight_shape
        ones = [1 for _ in kernel]
        self.a1 = Weight(torch.zeros(inputs, rank, *ones))
        self.a2 = Weight(torch.zeros(rank, inputs, *ones))
        self.b1 = Weight(torch.zeros(outputs, rank, *ones))
        self.b2 = Weight(torch.zeros(rank, inputs, *kernel))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.update_scale()

    @property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.a1.weight, self.a2.weight, self.b1.weight, self.b2.weight

    def initialise(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """a2 and b2 as LoRA's first matrix, a1 and b1 zero: no change; see `Adapter.initialise`."""
        for first in (self.a2.weight, self.b2.weight):
            nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        for second in self.plus_parameters():
            nn.init.zeros_(second)

    def delta_weight(self, base_weight: Tensor) -> Tensor:
        """See `Adapter.delta_weight`."""
        a1, a2, b1, b2 = (factor.to(base_weight.device, torch.float32) for factor in self._factors)
        return glora_delta(base_weight.float(), a1, a2, b1, b2, self.scale)

    def effect(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """See `Adapter.effect`. The base weight meets a1 alone, so that nothing larger than it is formed, and the input
        passes two changes of low rank. What is formed of it is formed anew in the backward pass."""
        x, a1, a2, b1, b2 = matching_dtypes(x, *self._factors)
        factor = self.multiplier * self.scale

        def met(inner: Tensor, a1: Tensor) -> tuple[Tensor, Tensor]:
            weight, a1 = matching_dtypes(weight_of(layer), a1)
            return inner, through_base(weight, a1).to(inner.dtype)

        through = apply_recomputed(self.spec, met, self._pointwise(x, a2) * factor, a1)
        return through + self._pointwise(self.spec.apply(x, b2) * factor, b1)

    def _pointwise(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix) if self.spec.is_linear else F.conv2d(x, matrix)

    def spellings(self) -> list[dict[str, Tensor]]:
        """See `Adapter.spellings`; `other_naming` is the second."""
        return [self.tensors(), other_naming(self.tensors())]

    def scale_delta_(self, factor: Tensor) -> None:
        """See `Adapter.scale_delta_`."""
        for weight in self._factors:
            weight.mul_(factor.sqrt())

    def plus_parameters(self) -> list[nn.Parameter]:
        """a1 and b1, which start at zero."""
        return [self.a1.weight, self.b1.weight]

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """See `Adapter.from_tensors`; options are the drop-outs."""
        rank = len(in_our_naming(spec, tensors)["a2.weight"])
        adapter = cls(spec, rank=rank, alpha=rank, **options)
        adapter.load_tensors(tensors)
        return adapter

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take both namings."""
        given = {name: state_dict[prefix + name] for name in _OTHER_NAMES if prefix + name in state_dict}
        if not _fit(self.spec, given) and _fit(self.spec, other_naming(given)):
            state_dict.update({prefix + name: tensor for name, tensor in other_naming(given).items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


ALGORITHM = Algorithm(name="glora", adapter=GLoRAModule, training_arguments={"module_dropout": arguments.probability})

create_network = partial(creation.create_network, "glora")
create_network_from_weights = partial(creation.create_network_from_weights, "glora")
