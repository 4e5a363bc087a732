"""Full difference: the change of weight and bias itself is trained, with as many values as the layer has; and the same for
norms, which `train_norm` adds to the layers of any algorithm.

    W' = W + diff      bias' = bias + diff_b        of Linear layers and convolutions
    w' = w + w_norm    b'    = b + b_norm           of LayerNorm and GroupNorm

as LyCORIS names the tensors (docs/Algo-List.md, "Full" and "Norm").
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from networks.building import creation
from networks.core import arguments
from networks.core.adapter import Adapter, LayerSpec, matching_dtypes
from networks.core.algorithms import Algorithm


class DifferenceAdapter(Adapter):
    """An adapter whose parameters are the change: that of the weight, and that of the bias where the layer has one.

    The file always holds both of a layer's changes, because some readers refuse one alone; of a file either one is enough.

    Args:
        spec: the base layer.
        module_dropout: share of forward passes in train mode that go without this adapter.
    """

    weight_name: str
    bias_name: str
    for_norms: bool

    def __init__(self, spec: LayerSpec, *, module_dropout: float = 0.0) -> None:
        super().__init__(spec, module_dropout=module_dropout)
        if spec.is_norm != self.for_norms:
            raise ValueError(f"{self.title} is {'only' if self.for_norms else 'not'} for norms")
        self.register_parameter(self.weight_name, nn.Parameter(torch.zeros(spec.weight_shape)))
        if spec.has_bias:
            self.register_parameter(self.bias_name, nn.Parameter(torch.zeros(spec.weight_shape[0])))

    def initialise(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """No change; see `Adapter.initialise`."""
        for change in self.parameters():
            nn.init.zeros_(change)

    @property
    def reads_base(self) -> bool:
        """See `Adapter.reads_base`: the parameters are the change."""
        return False

    def delta_weight(self, base_weight: Tensor) -> Tensor:
        """See `Adapter.delta_weight`."""
        return self.get_parameter(self.weight_name).to(base_weight.device, torch.float32)

    def delta_bias(self) -> Tensor | None:
        """See `Adapter.delta_bias`."""
        return self.get_parameter(self.bias_name).float() if self.spec.has_bias else None

    def effect(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """See `Adapter.effect`. Nothing is formed that would have to be formed again: the parameters are the change."""
        x, *changes = matching_dtypes(x, *self.parameters())
        return self.multiplier * self.spec.apply(x, *changes)

    def scale_delta_(self, factor: Tensor) -> None:
        """See `Adapter.scale_delta_`; the bias's change too."""
        for change in self.parameters():
            change.mul_(factor)

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """See `Adapter.from_tensors`; options are the drop-outs."""
        if not {cls.weight_name, cls.bias_name} & set(tensors):
            raise ValueError(f"is no layer of {cls.title}, its tensors are {', '.join(tensors)}")
        adapter = cls(spec, **options)
        adapter.load_tensors(tensors)
        return adapter

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take a missing change for none, where the other is there, and a bias's change of 0 where there is no bias."""
        names = [prefix + name for name in (self.weight_name, self.bias_name)]
        if any(name in state_dict for name in names):
            for name, own in self.state_dict().items():
                state_dict.setdefault(prefix + name, torch.zeros_like(own))
        bias = state_dict.get(names[1])
        if not self.spec.has_bias and bias is not None and not bias.any():
            del state_dict[names[1]]
        super()._load_from_state_dict(state_dict, prefix, *rest)


class FullModule(DifferenceAdapter):
    """The whole difference of a Linear layer or convolution."""

    title = "Full"
    weight_name, bias_name, for_norms = "diff", "diff_b", False

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """See `Adapter.from_tensors`; options are the drop-outs."""
        if "set_weight" in tensors:
            raise ValueError("the file replaces its weight (set_weight), and an adapter here can only add to a weight")
        return super().from_tensors(spec, tensors, **options)


class NormModule(DifferenceAdapter):
    """The difference of a LayerNorm or GroupNorm."""

    title = "Norm"
    weight_name, bias_name, for_norms = "w_norm", "b_norm", True


ALGORITHM = Algorithm(
    name="full",
    adapter=FullModule,
    training_arguments={"module_dropout": arguments.probability},
    has_rank=False,
    has_alpha=False,
)

NORM = Algorithm(
    name="norm",
    adapter=NormModule,
    training_arguments={"module_dropout": arguments.probability},
    has_rank=False,
    has_alpha=False,
    norms=True,
)

create_network = partial(creation.create_network, "full")
create_network_from_weights = partial(creation.create_network_from_weights, "full")
