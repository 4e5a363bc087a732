"""LoRA: the weight change as a product of two low-rank matrices, on Linear, 1x1 (LierLa) and larger convolutions (C3Lier).

    dW = alpha / rank * up @ down

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1. For a convolution, `down`
has the layer's kernel, stride and padding, and `up` is 1x1 (LoCon, arXiv:2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from networks.core import arguments, creation
from networks.core.adapter import Adapter, LayerSpec, Weight
from networks.core.network import AdapterNetwork
from networks.core.targets import family_of_models


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


class LoRAModule(Adapter):
    """LoRA on one layer.

    Args:
        spec: the base layer.
        rank: of the change.
        alpha: the change is scaled by alpha / rank.
        dropout: share of single values of the rank-sized activation that are zeroed.
        rank_dropout: share of ranks that are zeroed, for each sample anew.
        module_dropout: share of forward passes that go without this adapter.

    All three act in train mode only. The first two scale what is left up, the third does not.
    """

    def __init__(
        self,
        spec: LayerSpec,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__(spec)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        if spec.groups != 1:
            raise ValueError("LoRA on grouped convolutions is not supported")
        self.rank = rank
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self._drops = bool(dropout or rank_dropout or module_dropout)
        out_features, *in_shape = spec.weight_shape
        self.lora_down = Weight(torch.zeros(rank, *in_shape))
        self.lora_up = Weight(torch.zeros(out_features, rank, *(1 for _ in in_shape[1:])))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.update_scale()

    def initialise(self, generator: torch.Generator) -> None:
        """`down` as torch's own Linear layers start (Kaiming uniform, a = sqrt 5), `up` zero: no change at all."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_up.weight)

    def delta_weight(self, base_weight: Tensor) -> Tensor:
        """See `Adapter.delta_weight`."""
        down, up = (factor.weight.to(base_weight.device, torch.float32) for factor in (self.lora_down, self.lora_up))
        return low_rank_delta(down, up, self.scale)

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """See `Adapter.forward`. Nothing as large as the output is formed beside the sum itself."""
        x, down, up = self.matching_dtypes(x, self.lora_down.weight, self.lora_up.weight)
        hidden = self.spec.apply(x, down)
        if self._drops and self.training:
            hidden = self._drop(hidden)
        factor = self.multiplier * self.scale
        if self.spec.is_linear and hidden.dtype == output.dtype:
            # One kernel for product, factor and sum; the factor acts before anything is rounded.
            rows = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), up.t(), alpha=factor)
            return rows.view(output.shape)
        hidden = hidden * factor
        change = F.linear(hidden, up) if self.spec.is_linear else F.conv2d(hidden, up)
        return output + change.to(output.dtype)

    def _drop(self, hidden: Tensor) -> Tensor:
        """Drop-outs on the rank-sized activation: (batch, ..., rank) of a Linear layer, (batch, rank, h, w) of a
        convolution.

        All draws are torch's own and stay on the device, so that gradient checkpointing repeats them when it recomputes
        the layer.
        """
        hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            shape = [len(hidden)] + [1] * (hidden.dim() - 1)
            shape[-1 if self.spec.is_linear else 1] = self.rank
            kept = torch.rand(shape, device=hidden.device) >= self.rank_dropout
            hidden = hidden * kept.to(hidden.dtype) / (1 - self.rank_dropout)
        if self.module_dropout:
            hidden = hidden * (torch.rand((), device=hidden.device) >= self.module_dropout).to(hidden.dtype)
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
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> LoRAModule:
        """See `Adapter.from_tensors`; options are the drop-outs."""
        if "lora_down.weight" not in tensors:
            raise ValueError(f"is no LoRA layer, its tensors are {', '.join(tensors)}")
        rank = len(tensors["lora_down.weight"])
        adapter = cls(spec, rank=rank, alpha=rank, **options)
        try:
            adapter.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise ValueError(f"does not fit ({'; '.join(str(error).split(chr(10))[1:])})") from None
        return adapter


LoRANetwork = AdapterNetwork
LoRAInfModule = LoRAModule
"""sd-scripts' names; a module for inference is no different here."""

_DROPOUT_ARGUMENTS = {
    "dropout": arguments.probability,
    "rank_dropout": arguments.probability,
    "module_dropout": arguments.probability,
}


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: creation.Models,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> AdapterNetwork:
    """A new LoRA network, which changes nothing yet and is not attached.

    Args:
        multiplier: strength; 1 for training.
        network_dim: rank; None stands for 4.
        network_alpha: None and 0 stand for the rank.
        vae: not used.
        neuron_dropout: `--network_dropout`.
        network_args: conv_dim, conv_alpha, block_dims, down_lr_weight ...: the tables in `core/creation.py`, and drop-outs.

    Raises:
        UserError: wrong settings, all unknown names and unreadable values at once.
    """
    table = creation.RANK_ARGUMENTS | creation.RATE_ARGUMENTS | creation.START_ARGUMENTS | _DROPOUT_ARGUMENTS
    values = arguments.read_arguments(network_args, table)
    options = _dropouts(values, neuron_dropout)
    family = family_of_models(text_encoder, unet)
    rates = creation.rate_factors(values, family.block_count)
    plan = creation.rank_plan(network_dim, network_alpha, values, rates.block_weights, family.block_count)

    def make_adapter(spec: LayerSpec, rank: int, alpha: float) -> LoRAModule:
        return LoRAModule(spec, rank=rank, alpha=alpha, **options)

    return creation.build_network(
        make_adapter,
        plan,
        text_encoder,
        unet,
        family=family,
        multiplier=multiplier,
        rates=rates,
        seed=values.get("seed"),
    )


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: creation.Models,
    unet: nn.Module | None,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    allow_unmatched: bool = False,
    **network_args: Any,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """A LoRA network with the layers, ranks, alphas and weights of a file, not attached.

    Args:
        file, weights_sd: the file, or its tensors if they were read already.
        for_inference: without effect; the same modules serve both.
        allow_unmatched: accept layers of the file that the models have not; they are left out.
        network_args: drop-outs and learning rates by block; ranks are the file's.

    Returns:
        The network, and its tensors under kohya's names.

    Raises:
        UserError: a file that does not fit the models, or settings that it decides itself.
    """
    decided = [name for name in network_args if name in creation.RANK_ARGUMENTS or name in creation.START_ARGUMENTS]
    if decided:
        raise UserError(
            "has no effect with ranks and weights from a file", where=f"--network_args {decided[0]}", remedy="leave it out"
        )
    values = arguments.read_arguments(network_args, creation.RATE_ARGUMENTS | _DROPOUT_ARGUMENTS)
    return creation.network_from_weights(
        LoRAModule,
        multiplier,
        file,
        text_encoder,
        unet,
        weights_sd,
        rates=values,
        options=_dropouts(values, None),
        allow_unmatched=allow_unmatched,
    )


def _dropouts(values: Mapping[str, Any], neuron_dropout: float | None) -> dict[str, float]:
    """The drop-outs among the arguments; `dropout` and `--network_dropout` are the same thing."""
    dropouts = {name: values[name] for name in _DROPOUT_ARGUMENTS if name in values}
    if neuron_dropout is not None:
        given = arguments.read_arguments({"dropout": neuron_dropout}, _DROPOUT_ARGUMENTS)["dropout"]
        if dropouts.setdefault("dropout", given) != given:
            raise UserError(
                f"is {given:g}, but --network_args dropout is {dropouts['dropout']:g}", where="--network_dropout"
            )
    return dropouts
