"""(IA)3: one trained factor for each output channel of a layer, or for each input channel.

    dW = w * W   along the outputs or the inputs

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv:2205.05638,
section 3.3, whose factors are 1 + w. It puts them on the outputs of keys and values and on the inputs of the second layer
of each MLP, as the preset "ia3" does, and learns with rates of 0.001 to 0.01. The bias is not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from networks.building import creation
from networks.core import arguments
from networks.core.adapter import Adapter, LayerSpec, apply_base
from networks.core.algorithms import Algorithm


def ia3_delta(base_weight: Tensor, factors: Tensor, *, on_input: bool) -> Tensor:
    """The change of a weight.

    Args:
        base_weight: (out, in, ...).
        factors: as many as inputs or outputs, in any shape.
        on_input: which of them.

    Returns:
        The base weight's shape.
    """
    shape = [1] * base_weight.dim()
    shape[1 if on_input else 0] = -1
    return base_weight * factors.view(shape)


class IA3Module(Adapter):
    """(IA)3 on one layer.

    Args:
        spec: the base layer.
        train_on_input: one factor for each input channel instead of each output channel.
        module_dropout: share of forward passes in train mode that go without this adapter.

    Attributes:
        scales_input: what `train_on_input` said, or the file whose tensors were loaded since.
    """

    title = "(IA)3"

    def __init__(self, spec: LayerSpec, *, train_on_input: bool = False, module_dropout: float = 0.0) -> None:
        super().__init__(spec, module_dropout=module_dropout)
        if spec.is_norm or spec.groups != 1:
            raise ValueError("(IA)3 is for Linear layers and convolutions without groups")
        self.scales_input = train_on_input
        outputs, inputs, *kernel = spec.weight_shape
        channels = inputs if train_on_input else outputs
        # Readers broadcast along the second axis of a convolution's weight, which they transpose for outputs.
        shape = (1, channels, *(1 for _ in kernel)) if kernel else (channels,)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.register_buffer("on_input", torch.tensor(float(train_on_input)))

    @property
    def variant(self) -> str:
        """See `Adapter.variant`: tells which channels are scaled."""
        return f"{self.title} on {'inputs' if self.scales_input else 'outputs'}"

    def initialise(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """Factors of 1, which are saved as 0; see `Adapter.initialise`."""
        nn.init.zeros_(self.weight)

    def delta_weight(self, base_weight: Tensor) -> Tensor:
        """See `Adapter.delta_weight`."""
        factors = self.weight.to(base_weight.device, torch.float32)
        return ia3_delta(base_weight.float(), factors, on_input=self.scales_input)

    def effect(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """See `Adapter.effect`. The factors act on the layer's output, or on its input."""
        factors = self.spec.along_channels(self.weight.flatten()) * self.multiplier
        if self.scales_input:
            return apply_base(self.spec, layer, (x * factors).to(x.dtype))
        return self.base_output(layer, x, output) * factors

    def scale_delta_(self, factor: Tensor) -> None:
        """See `Adapter.scale_delta_`."""
        self.weight.mul_(factor)

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """See `Adapter.from_tensors`; options are the drop-outs."""
        if not {"weight", "on_input"} <= set(tensors):
            raise ValueError(f"is no (IA)3 layer, its tensors are {', '.join(tensors)}")
        adapter = cls(spec, train_on_input=bool(tensors["on_input"].any()), **options)
        adapter.load_tensors(tensors)
        return adapter

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the factors in any shape, and the direction from the file."""
        weight, on_input = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}on_input")
        if weight is not None and weight.numel() == self.weight.numel():
            state_dict[f"{prefix}weight"] = weight.reshape(self.weight.shape)
        if on_input is not None and on_input.numel() == 1:
            state_dict[f"{prefix}on_input"] = on_input.reshape(())
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.scales_input = bool(self.get_buffer("on_input"))


ALGORITHM = Algorithm(
    name="ia3",
    adapter=IA3Module,
    arguments={"train_on_input": arguments.flag},
    training_arguments={"module_dropout": arguments.probability},
    has_rank=False,
    has_alpha=False,
    preset="ia3",
)

create_network = partial(creation.create_network, "ia3")
create_network_from_weights = partial(creation.create_network_from_weights, "ia3")
