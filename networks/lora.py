"""LoRA: the weight change as a product of two low-rank matrices, on Linear, 1x1 (LierLa) and larger convolutions (C3Lier).

    dW = alpha / rank * up @ down

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1. For a convolution, `down`
has the layer's kernel, stride and padding, and `up` is 1x1 (LoCon, arXiv:2309.14859).

Beside starting at zero, the factors may start as a part of the base weight (PiSSA, OLoRA). The base stays as it is, and
what acts is the way that they have gone since:

    dW = alpha / rank * (up @ down - up0 @ down0)

A file holds that as a plain LoRA of twice the rank, so it always means "added to the original base".
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.building import creation
from networks.building.network import AdapterNetwork
from networks.core import arguments
from networks.core.adapter import LayerSpec, Weight, kept_by_dropout, matching_dtypes
from networks.core.additive import AdditiveAdapter, dora_options
from networks.core.algorithms import Algorithm
from networks.core.arguments import Parser
from networks.core.lora_reading import DOWN, RESIDUE, UP, check_lora, dense_residue, plain_lora
from networks.core.lora_starts import (
    PRINCIPAL_STARTS,
    Start,
    check_orthogonal,
    default_start,
    orthogonal_start,
    principal_start,
    read_start,
    since_start,
    start_and_now,
)


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
        rank: of the factors.
        alpha: the change is scaled by alpha / rank.
        init: how the factors start; see `lora_starts`. It decides nothing else than their values, and whether there are
            `start_down` and `start_up`.
        dropout: share of single values of the rank-sized activation that are zeroed.
        rank_dropout: share of ranks that are zeroed, for each sample anew.
        with_bias: change the layer's bias as well; for files that do.
        residue: number of single values beside the factors; for files that an extraction wrote.
        settings: see `AdditiveAdapter`.

    The drop-outs act in train mode only. These two scale what is left up, `module_dropout` does not.

    Attributes:
        start_down, start_up: the factors' values at the start, which do not count; None where their product is zero.
        diff_b: the change of the bias, (out,); None without one.
        bias_indices, bias_values, bias_size: see `lora_reading`; not trained; None without a residue.
    """

    title = "LoRA"
    start_down: Tensor | None
    start_up: Tensor | None
    bias_indices: Tensor | None
    bias_values: Tensor | None

    def __init__(
        self,
        spec: LayerSpec,
        *,
        rank: int,
        alpha: float,
        init: Start = "default",
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        with_bias: bool = False,
        residue: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(spec, rank=rank, alpha=alpha, **settings)
        if init == "orthogonal":
            check_orthogonal(rank)
        self.init, self.dropout, self.rank_dropout = init, dropout, rank_dropout
        out_features, *in_shape = spec.weight_shape
        self.lora_down = Weight(torch.zeros(rank, *in_shape))
        self.lora_up = Weight(torch.zeros(out_features, rank, *(1 for _ in in_shape[1:])))
        principal = init in PRINCIPAL_STARTS
        self.register_buffer("start_down", torch.zeros_like(self.lora_down.weight) if principal else None)
        self.register_buffer("start_up", torch.zeros_like(self.lora_up.weight) if principal else None)
        self.diff_b = nn.Parameter(torch.zeros(out_features)) if with_bias else None
        sparse = (torch.zeros(2, residue, dtype=torch.int16), torch.zeros(residue), torch.zeros(2, dtype=torch.int16))
        for name, tensor in zip(RESIDUE, sparse, strict=True):
            self.register_buffer(name, tensor if residue else None)

    @property
    def structure(self) -> dict[str, str]:
        """See `Adapter.structure`; no setting asks for a file's bias and residue."""
        of_files = {"a change of the bias": self.diff_b, "single values beside": self.bias_values}
        return super().structure | {words: "" for words, tensor in of_files.items() if tensor is not None}

    # The change

    def initialise_factors(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """As `init` says. On the meta device the starts that read the base are left at the default."""
        down, up = self.lora_down.weight, self.lora_up.weight
        if self.init == "orthogonal":
            orthogonal_start(down, up, generator)
            return
        default_start(down, up, generator)
        if self.start_down is not None and self.start_up is not None and not base_weight.is_meta:
            principal_start(self.init, down, up, base_weight, self.scale, generator)
            self.start_down.copy_(down.detach())
            self.start_up.copy_(up.detach())

    def factors(self) -> tuple[Tensor, Tensor]:
        """`down` and `up` of the plain LoRA that acts, of twice the rank where the start does not count."""
        down, up = self.lora_down.weight, self.lora_up.weight
        if self.start_down is None or self.start_up is None:
            return down, up
        return since_start(down, up, self.start_down, self.start_up)

    def own_delta(self) -> Tensor:
        """See `AdditiveAdapter.own_delta`."""
        down, up = self.factors()
        delta = low_rank_delta(down.float(), up.float(), self.scale)
        residue = self._residue()
        return delta if residue is None else delta + self.scale * residue

    def _residue(self) -> Tensor | None:
        if self.bias_indices is None or self.bias_values is None:
            return None
        return dense_residue(self.spec, self.bias_indices, self.bias_values)

    def delta_bias(self) -> Tensor | None:
        """See `Adapter.delta_bias`."""
        return None if self.diff_b is None else self.diff_b.float()

    # Its effect

    def own_effect(self, x: Tensor, factor: float) -> Tensor:
        """See `AdditiveAdapter.own_effect`. Nothing larger than the output itself is formed, but for a residue."""
        hidden, up = self._hidden(x)
        effect = self._from_hidden(hidden * (factor * self.scale), up)
        residue = self._residue()
        if residue is None:
            return effect
        x, residue = matching_dtypes(x, factor * self.scale * residue)
        return effect + self.spec.apply(x, residue)

    def effect(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """See `Adapter.effect`."""
        effect = super().effect(layer, x, output)
        return effect if self.diff_b is None else effect + self.spec.along_channels(self.diff_b * self.multiplier)

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """See `Adapter.forward`. On a Linear layer, one kernel for product, factor and sum, where nothing is rounded
        between them."""
        if self.dora_scale is not None or self.diff_b is not None or self.bias_values is not None:
            return super().forward(layer, x, output)
        hidden, up = self._hidden(x)
        hidden, factor = self.per_row(self.drop_module(hidden)), self.multiplier * self.scale
        if self.spec.is_linear and hidden.dtype == output.dtype:
            rows = torch.addmm(output.reshape(-1, len(up)), hidden.reshape(-1, hidden.shape[-1]), up.t(), alpha=factor)
            return rows.view(output.shape)
        return output + self._from_hidden(hidden * factor, up).to(output.dtype)

    def _from_hidden(self, hidden: Tensor, up: Tensor) -> Tensor:
        return F.linear(hidden, up) if self.spec.is_linear else F.conv2d(hidden, up)

    def _hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rank-sized activation, with the drop-outs, and the matrix that brings it to the output."""
        x, down, up = matching_dtypes(x, *self.factors())
        hidden = self.spec.apply(x, down)
        return (self._drop(hidden) if self.training else hidden), up

    def _drop(self, hidden: Tensor) -> Tensor:
        """Drop-outs on the rank-sized activation: (batch, ..., rank) of a Linear layer, (batch, rank, h, w) of a
        convolution. Where the start does not count, a rank is left out of both halves of `factors`.
        """
        hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            axis = hidden.dim() - 1 if self.spec.is_linear else 1
            shape = [len(hidden)] + [1] * (hidden.dim() - 1)
            shape[axis] = self.rank
            kept = kept_by_dropout(shape, self.rank_dropout, hidden.device)
            kept = torch.cat([kept] * (hidden.shape[axis] // self.rank), dim=axis)
            hidden = hidden * kept.to(hidden.dtype) / (1 - self.rank_dropout)
        return hidden

    # Its size

    def delta_norm(self, base_weight: Tensor) -> Tensor:
        """Frobenius norm of the change, from rank x rank products: |up down|^2 = sum (up' up) * (down down')."""
        if self.bias_values is not None:
            return super().delta_norm(base_weight)
        down, up = (factor.float() for factor in self.factors())
        down, up = down.flatten(1), up.flatten(1)
        return abs(self.scale) * ((up.t() @ up) * (down @ down.t())).sum().clamp(min=0).sqrt()

    def product(self) -> tuple[Tensor, Tensor] | None:
        """See `AdditiveAdapter.product`."""
        if self.bias_values is not None:
            return None
        down, up = (factor.float().flatten(1) for factor in self.factors())
        return self.scale * up, down

    def scale_delta_(self, factor: Tensor) -> None:
        """See `Adapter.scale_delta_`. Factors that do not count are scaled with those that do."""
        for weight in (self.lora_down.weight, self.lora_up.weight, self.start_down, self.start_up):
            if weight is not None:
                weight.mul_(factor.sqrt())
        if self.bias_values is not None:
            self.bias_values.mul_(factor)

    def plus_parameters(self) -> list[nn.Parameter]:
        """The up matrix, which starts at zero by default."""
        return [self.lora_up.weight]

    # In files

    @property
    def rank_in_files(self) -> int:
        """See `Adapter.rank_in_files`."""
        return self.rank if self.start_down is None else 2 * self.rank

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """See `Adapter.tensors`."""
        tensors = super().tensors()
        if self.start_down is not None:
            del tensors["start_down"], tensors["start_up"]
            tensors[DOWN], tensors[UP] = self.factors()
            tensors["alpha"] = tensors["alpha"] * 2
        return tensors

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """See `Adapter.from_tensors`; options are the drop-outs."""
        check_lora(tensors)
        plain = plain_lora(spec, tensors)
        rank = len(plain[DOWN])
        residue = plain["bias_values"].numel() if "bias_values" in plain else 0
        settings: dict[str, Any] = dora_options(spec, plain) | options
        adapter = cls(spec, rank=rank, alpha=rank, with_bias="diff_b" in plain, residue=residue, **settings)
        adapter.load_tensors(plain)
        return adapter

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Accept a file's tensors in any spelling, and for factors whose start does not count those of any plain LoRA."""
        given = {name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
        try:
            plain = self._with_starts(plain_lora(self.spec, given))
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.')} {error}".strip())
            self._keep_own(state_dict, prefix)
            return
        state_dict.update({prefix + name: tensor for name, tensor in plain.items()})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _with_starts(self, plain: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with `start_down` and `start_up`, if this adapter has such and the tensors have not.

        A plain LoRA of twice the rank is taken for what `tensors` wrote; one of this adapter's rank starts from nothing.
        """
        if self.start_down is None or self.start_up is None or {"start_down", "start_up"} & set(plain):
            return plain
        if DOWN not in plain or UP not in plain:
            return plain
        down, up = plain[DOWN].float(), plain[UP].float()
        if len(down) != 2 * self.rank:
            return plain | {"start_down": torch.zeros_like(self.start_down), "start_up": torch.zeros_like(self.start_up)}
        down, up, start_down, start_up = start_and_now(down, up)
        halved = {"alpha": plain["alpha"] / 2} if "alpha" in plain else {}
        return plain | halved | {DOWN: down, UP: up, "start_down": start_down, "start_up": start_up}


LoRANetwork = AdapterNetwork
LoRAInfModule = LoRAModule
"""sd-scripts' names; a module for inference is no different here."""

DORA_ARGUMENTS: dict[str, Parser] = {"dora_wd": arguments.flag, "wd_on_output": arguments.flag}
"""Weight decomposition, for every algorithm with an own delta."""

ALGORITHM = Algorithm(
    name="lora",
    adapter=LoRAModule,
    arguments=DORA_ARGUMENTS | {"init": read_start},
    training_arguments={
        "dropout": arguments.probability,
        "rank_dropout": arguments.probability,
        "module_dropout": arguments.probability,
    },
)

create_network = partial(creation.create_network, "lora")
create_network_from_weights = partial(creation.create_network_from_weights, "lora")
