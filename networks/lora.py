"""LoRA: the weight change as a product of two low-rank matrices, on Linear, 1x1 (LierLa) and larger convolutions (C3Lier).

    dW = alpha / rank * up @ down

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1. For a convolution, `down`
has the layer's kernel, stride and padding, and `up` is 1x1 (LoCon, arXiv:2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.core import arguments, creation
from networks.core.adapter import LayerSpec, Weight, kept_by_dropout
from networks.core.additive import AdditiveAdapter, dora_options
from networks.core.algorithms import Algorithm
from networks.core.arguments import Parser
from networks.core.network import AdapterNetwork


def low_rank_delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The change of a weight.

    Args:
        down: (rank, in), for a convolution (rank, in, kh, kw).
        up: (out, rank), for a convolution (out, rank, 1, 1).
        scale: alpha / rank.

    Returns:
        (out, in), or (out, in, kh, kw), in the dtype of the factors.
    """
    return (scale * (up.flatten(1) @ down.flatten(1))).reshape(len(up), *down.shape[1:])


class LoRAModule(AdditiveAdapter):
    """LoRA on one layer.

    Args:
        spec: the base layer.
        rank: of the change.
        alpha: the change is scaled by alpha / rank.
        dropout: share of single values of the rank-sized activation that are zeroed.
        rank_dropout: share of ranks that are zeroed, for each sample anew.
        settings: see `AdditiveAdapter`.

    The drop-outs act in train mode only. These two scale what is left up, `module_dropout` does not.
    """

    title = "LoRA"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(spec, rank=rank, alpha=alpha, **settings)
        self.dropout, self.rank_dropout = dropout, rank_dropout
        out_features, *in_shape = spec.weight_shape
        self.lora_down = Weight(torch.zeros(rank, *in_shape))
        self.lora_up = Weight(torch.zeros(out_features, rank, *(1 for _ in in_shape[1:])))

    def initialise_factors(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """`down` as torch's own Linear layers start (Kaiming uniform, a = sqrt 5), `up` zero: no change at all."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_up.weight)

    def own_delta(self) -> Tensor:
        """See `AdditiveAdapter.own_delta`."""
        return low_rank_delta(self.lora_down.weight.float(), self.lora_up.weight.float(), self.scale)

    def own_effect(self, x: Tensor, factor: float) -> Tensor:
        """See `AdditiveAdapter.own_effect`. Nothing larger than the output itself is formed."""
        hidden, up = self._hidden(x)
        return self._from_hidden(hidden * (factor * self.scale), up)

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """See `Adapter.forward`. On a Linear layer, one kernel for product, factor and sum, where nothing is rounded
        between them."""
        if self.dora_scale is not None:
            return super().forward(layer, x, output)
        hidden, up = self._hidden(x)
        hidden, factor = self.drop_module(hidden), self.multiplier * self.scale
        if self.spec.is_linear and hidden.dtype == output.dtype:
            rows = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), up.t(), alpha=factor)
            return rows.view(output.shape)
        return output + self._from_hidden(hidden * factor, up).to(output.dtype)

    def _from_hidden(self, hidden: Tensor, up: Tensor) -> Tensor:
        return F.linear(hidden, up) if self.spec.is_linear else F.conv2d(hidden, up)

    def _hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rank-sized activation, with the drop-outs, and the matrix that brings it to the output."""
        x, down, up = self.matching_dtypes(x, self.lora_down.weight, self.lora_up.weight)
        hidden = self.spec.apply(x, down)
        return (self._drop(hidden) if self.training else hidden), up

    def _drop(self, hidden: Tensor) -> Tensor:
        """Drop-outs on the rank-sized activation: (batch, ..., rank) of a Linear layer, (batch, rank, h, w) of a
        convolution.
        """
        hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            shape = [len(hidden)] + [1] * (hidden.dim() - 1)
            shape[-1 if self.spec.is_linear else 1] = self.rank
            kept = kept_by_dropout(shape, self.rank_dropout, hidden.device)
            hidden = hidden * kept.to(hidden.dtype) / (1 - self.rank_dropout)
        return hidden

    def delta_norm(self, base_weight: Tensor) -> Tensor:
        """Frobenius norm of the change, from rank x rank products: |up down|^2 = sum (up' up) * (down down')."""
        down, up = self.lora_down.weight.flatten(1).float(), self.lora_up.weight.flatten(1).float()
        return self.scale * ((up.t() @ up) * (down @ down.t())).sum().clamp(min=0).sqrt()

    def scale_delta_(self, factor: Tensor) -> None:
        """See `Adapter.scale_delta_`."""
        for weight in (self.lora_down.weight, self.lora_up.weight):
            weight.mul_(factor.sqrt())

    def plus_parameters(self) -> list[nn.Parameter]:
        """The up matrix, which starts at zero."""
        return [self.lora_up.weight]

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """See `Adapter.from_tensors`; options are the drop-outs."""
        if "lora_down.weight" not in tensors:
            raise ValueError(f"is no LoRA layer, its tensors are {', '.join(tensors)}")
        rank = len(tensors["lora_down.weight"])
        adapter = cls(spec, rank=rank, alpha=rank, **dora_options(spec, tensors), **options)
        adapter.load_tensors(tensors)
        return adapter


LoRANetwork = AdapterNetwork
LoRAInfModule = LoRAModule
"""sd-scripts' names; a module for inference is no different here."""

DORA_ARGUMENTS: dict[str, Parser] = {"dora_wd": arguments.flag, "wd_on_output": arguments.flag}
"""Weight decomposition, for every algorithm with an own delta."""

ALGORITHM = Algorithm(
    name="lora",
    adapter=LoRAModule,
    arguments=DORA_ARGUMENTS,
    training_arguments={
        "dropout": arguments.probability,
        "rank_dropout": arguments.probability,
        "module_dropout": arguments.probability,
    },
)

create_network = partial(creation.create_network, "lora")
create_network_from_weights = partial(creation.create_network_from_weights, "lora")
