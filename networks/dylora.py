"""DyLoRA: one training for all ranks up to `network_dim`, so that the file can be cut to any of them afterwards.

Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation",
arXiv:2210.07558, Algorithm 1 in its "frozen" form: each optimizer step draws a rank b, runs the forward pass with the first
b ranks alone, and trains the last of them. As in sd-scripts, ranks come in slabs of `unit`, b is unit, 2 unit, ... or r, and
the change of that step is

    dW_b = alpha / r * sqrt(r / b) * up[:, :b] @ down[:b]

At b = r, and outside training, that is LoRA, and as LoRA it is saved. `networks/tools/rank_cutting.py` takes lower ranks
out.
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
from networks.core.adapter import LayerSpec, matching_dtypes, misfit
from networks.core.additive import AdditiveAdapter
from networks.core.algorithms import Algorithm
from networks.lora import LoRAModule, low_rank_delta


class DyLoRAModule(AdditiveAdapter):
    """DyLoRA on one layer.

    The factors are kept as slabs, each a parameter of its own: a slab that a step does not train has no gradient in it
    (None), and optimizers leave it alone with its moments and its weight decay.

    Args:
        spec: the base layer.
        rank: the largest one, a multiple of `unit`.
        alpha: at full rank the change is scaled by alpha / rank.
        unit: ranks of a slab.
        dropout: share of single values of the rank-sized activation that are zeroed in train mode.
        module_dropout: share of forward passes in train mode that go without this adapter.

    Attributes:
        drawn_rank: ranks in use in train mode, from the network's present draw; None before the first draw, when all ranks
            act and train. `delta_weight` is always that of the full rank.
    """

    title = "DyLoRA"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        rank: int,
        alpha: float,
        unit: int = 1,
        dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__(spec, rank=rank, alpha=alpha, module_dropout=module_dropout)
        if rank % unit:
            raise ValueError(f"rank {rank} is no multiple of unit {unit}")
        self.unit, self.dropout = unit, dropout
        self.drawn_rank: int | None = None
        out_features, *in_shape = spec.weight_shape
        up_shape = (out_features, unit, *(1 for _ in in_shape[1:]))
        self.lora_down = nn.ParameterList(torch.zeros(unit, *in_shape) for _ in range(rank // unit))
        self.lora_up = nn.ParameterList(torch.zeros(up_shape) for _ in range(rank // unit))

    def initialise_factors(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """As LoRA of the full rank starts: `down` Kaiming uniform (a = sqrt 5), `up` zero."""
        for down, up in zip(self.lora_down, self.lora_up, strict=True):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(up)

    def begin_step(self, draw: float, largest_rank: int) -> None:
        """See `Adapter.begin_step`: all layers use the same rank, or their own where it is smaller."""
        slabs = 1 + int(draw * (largest_rank // self.unit))
        self.drawn_rank = min(slabs * self.unit, self.rank)

    def own_delta(self) -> Tensor:
        """See `AdditiveAdapter.own_delta`; of the full rank, whatever is drawn."""
        down, up = self._whole_factors()
        return low_rank_delta(down.float(), up.float(), self.scale)

    def own_effect(self, x: Tensor, factor: float) -> Tensor:
        """See `AdditiveAdapter.own_effect`. In train mode that of the drawn rank, with gradients for its last slab alone."""
        down, up = self._whole_factors()
        scale = self.scale
        if self.training and self.drawn_rank is not None:
            down, up = self._drawn_factors(self.drawn_rank // self.unit)
            scale *= math.sqrt(self.rank / self.drawn_rank)
        x, down, up = matching_dtypes(x, down, up)
        hidden = F.dropout(self.spec.apply(x, down), self.dropout, self.training) * (factor * scale)
        return F.linear(hidden, up) if self.spec.is_linear else F.conv2d(hidden, up)

    def _whole_factors(self) -> tuple[Tensor, Tensor]:
        """`down` (rank, in, ...) and `up` (out, rank, ...)."""
        return torch.cat(list(self.lora_down)), torch.cat(list(self.lora_up), dim=1)

    def _drawn_factors(self, slabs: int) -> tuple[Tensor, Tensor]:
        """The first slabs of `down` and `up`, of which only the last takes gradients."""
        downs = [slab.detach() for slab in self.lora_down[: slabs - 1]] + [self.lora_down[slabs - 1]]
        ups = [slab.detach() for slab in self.lora_up[: slabs - 1]] + [self.lora_up[slabs - 1]]
        return torch.cat(downs), torch.cat(ups, dim=1)

    def scale_delta_(self, factor: Tensor) -> None:
        """See `Adapter.scale_delta_`."""
        for slab in (*self.lora_down, *self.lora_up):
            slab.mul_(factor.sqrt())

    def plus_parameters(self) -> list[nn.Parameter]:
        """The slabs of `up`, which start at zero."""
        return list(self.lora_up)

    # In files

    @classmethod
    def title_in_files(cls) -> str:
        """See `Adapter.title_in_files`: a file cannot be told from LoRA's."""
        return LoRAModule.title

    def tensors(self) -> dict[str, Tensor]:
        """See `Adapter.tensors`; those of LoRA."""
        down, up = self._whole_factors()
        return {"alpha": self.get_buffer("alpha"), "lora_down.weight": down.detach(), "lora_up.weight": up.detach()}

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """See `Adapter.from_tensors`; options are `unit` and the drop-outs."""
        if "lora_down.weight" not in tensors:
            raise ValueError(f"is no LoRA layer, its tensors are {', '.join(tensors)}")
        rank = len(tensors["lora_down.weight"])
        adapter = cls(spec, rank=rank, alpha=rank, **options)
        adapter.load_tensors(tensors)
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
        """Beside slabs, accept a file's whole factors."""
        for name, axis, own in zip(("lora_down", "lora_up"), (0, 1), self._whole_factors(), strict=True):
            whole = state_dict.pop(f"{prefix}{name}.weight", None)
            if whole is None:
                continue
            if whole.numel() != own.numel() or len(whole) != len(own):
                error_msgs.append(misfit(f"{prefix}{name}.weight", whole, own))
                whole = own
            slabs = whole.split(self.unit, dim=axis)
            state_dict.update({f"{prefix}{name}.{place}": slab for place, slab in enumerate(slabs)})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


ALGORITHM = Algorithm(
    name="dylora",
    adapter=DyLoRAModule,
    training_arguments={
        "unit": arguments.rank,
        "dropout": arguments.probability,
        "module_dropout": arguments.probability,
    },
    rests=True,
)

create_network = partial(creation.create_network, "dylora")
create_network_from_weights = partial(creation.create_network_from_weights, "dylora")
