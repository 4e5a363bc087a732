"""From what the user gives to a network: the steps that `create_network` of every algorithm shares.

An algorithm adds its own arguments to the tables here and says how one adapter is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.families.family import ModelFamily
from library.streams import torch_stream
from networks.core import arguments, files
from networks.core.adapter import Adapter, LayerSpec
from networks.core.arguments import Parser
from networks.core.blocks import RankPlan, all_learning_rate_weights, block_values
from networks.core.groups import RateFactors
from networks.core.keys import to_kohya
from networks.core.network import AdapterNetwork
from networks.core.targets import family_of_models, find_targets

Models = nn.Module | Sequence[nn.Module] | None

RATE_ARGUMENTS: dict[str, Parser] = {
    "down_lr_weight": arguments.as_is,
    "mid_lr_weight": arguments.as_is,
    "up_lr_weight": arguments.as_is,
    "block_lr_zero_threshold": arguments.not_negative,
    "loraplus_lr_ratio": arguments.positive,
    "loraplus_unet_lr_ratio": arguments.positive,
    "loraplus_text_encoder_lr_ratio": arguments.positive,
}
"""Learning rates by block, and LoRA+."""

RANK_ARGUMENTS: dict[str, Parser] = {
    "conv_dim": arguments.rank,
    "conv_alpha": arguments.not_negative,
    "block_dims": arguments.ranks,
    "block_alphas": arguments.as_is,
    "conv_block_dims": arguments.ranks,
    "conv_block_alphas": arguments.as_is,
}
"""Ranks and alphas beside `network_dim` and `network_alpha`."""

START_ARGUMENTS: dict[str, Parser] = {"seed": arguments.whole_number}
"""Where the initial values come from."""


def rate_factors(values: Mapping[str, Any], block_count: int) -> RateFactors:
    """What the arguments of `RATE_ARGUMENTS` say.

    Raises:
        UserError: a wrong number of block values, an unknown preset, a threshold that has nothing to act on.
    """
    weights = all_learning_rate_weights(
        values.get("down_lr_weight"),
        values.get("mid_lr_weight"),
        values.get("up_lr_weight"),
        zero_threshold=values.get("block_lr_zero_threshold", 0.0),
        block_count=block_count,
    )
    if weights is None and "block_lr_zero_threshold" in values:
        raise UserError(
            "has no effect without block weights",
            where="--network_args block_lr_zero_threshold",
            remedy="give down_lr_weight, mid_lr_weight or up_lr_weight as well",
        )
    ratio = values.get("loraplus_lr_ratio")
    return RateFactors(
        block_weights=weights,
        text_encoder_plus_ratio=values.get("loraplus_text_encoder_lr_ratio", ratio),
        denoiser_plus_ratio=values.get("loraplus_unet_lr_ratio", ratio),
    )


def rank_plan(
    network_dim: int | None,
    network_alpha: float | None,
    values: Mapping[str, Any],
    lr_weights: Sequence[float] | None,
    count: int,
) -> RankPlan:
    """What `network_dim` (4 where None), `network_alpha` (None and 0 stand for the rank) and `RANK_ARGUMENTS` say.

    Raises:
        UserError: ranks below 1, negative alphas, a wrong number of block values, alphas without their dims.
    """
    dim = 4 if network_dim is None else network_dim
    if dim < 1 or dim != int(dim):
        raise UserError(f"{dim} is no rank", where="--network_dim", remedy="give a whole number of 1 or more")
    alpha = network_alpha or 0.0
    if alpha < 0:
        raise UserError(f"{alpha:g} is negative", where="--network_alpha", remedy="give 0 (alpha = rank) or more")
    if "conv_dim" not in values and "conv_block_dims" not in values:
        for name in ("conv_alpha", "conv_block_alphas"):
            if name in values:
                raise UserError("has no effect without conv_dim", where=f"--network_args {name}", remedy="give conv_dim too")
    return RankPlan(
        dim=int(dim),
        alpha=alpha,
        conv_dim=values.get("conv_dim"),
        conv_alpha=values.get("conv_alpha", 1.0),
        block_dims=_checked_count(values, "block_dims", count),
        block_alphas=_block_numbers(values, "block_alphas", count),
        conv_block_dims=_checked_count(values, "conv_block_dims", count),
        conv_block_alphas=_block_numbers(values, "conv_block_alphas", count),
        lr_weights=lr_weights,
    )


def _block_numbers(values: Mapping[str, Any], name: str, count: int) -> tuple[float, ...] | None:
    return block_values(values[name], count, name) if name in values else None


def _checked_count(values: Mapping[str, Any], name: str, count: int) -> tuple[int, ...] | None:
    if name in values:
        block_values(",".join(map(str, values[name])), count, name)
    return values.get(name)


def build_network(
    make_adapter: Callable[[LayerSpec, int, float], Adapter],
    plan: RankPlan,
    text_encoder: Models,
    unet: nn.Module | None,
    *,
    family: ModelFamily,
    multiplier: float,
    rates: RateFactors,
    seed: int | None = None,
) -> AdapterNetwork:
    """A new network with an adapter on every layer that the plan gives a rank.

    Args:
        make_adapter: from layer, rank and alpha to a new adapter.
        seed: of the initial values; None takes the seed that torch was given. Each layer has a stream of its own, so that
            its values depend neither on which other layers there are, nor on their order, nor on the device.

    Raises:
        UserError: nothing is left to adapt.
    """
    seed = torch.initial_seed() if seed is None else seed
    adapters, targets = [], []
    for target in find_targets(family, text_encoder, unet, with_convolutions=plan.with_convolutions):
        settings = plan.of(target)
        if settings is not None:
            adapter = make_adapter(target.spec, *settings)
            adapter.initialise(torch_stream(seed, f"init {target.name}"))
            adapters.append(adapter)
            targets.append(target)
    if not targets:
        raise UserError(
            "leave no layer to adapt", where="--network_args", remedy="give some block a rank and a weight above 0"
        )
    return AdapterNetwork(adapters, targets, family=family, multiplier=multiplier, rate_factors=rates)


def network_from_weights(
    adapter_class: type[Adapter],
    multiplier: float,
    file: str | Path | None,
    text_encoder: Models,
    unet: nn.Module | None,
    weights: Mapping[str, Tensor] | None,
    *,
    rates: Mapping[str, Any],
    options: Mapping[str, Any],
    allow_unmatched: bool = False,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """A network with the layers, ranks and alphas of a file, and its tensors loaded.

    Args:
        file, weights: the file, or its tensors if they were read already.
        rates: values of `RATE_ARGUMENTS`.
        options: drop-outs, for `adapter_class`.
        allow_unmatched: accept layers that the models have not; they are left out.

    Returns:
        The network, and the tensors under our names, which `network.load_state_dict` takes.

    Raises:
        UserError: layers that the models have not, or tensors of another algorithm or size.
    """
    family = family_of_models(text_encoder, unet)
    if weights is None:
        if file is None:
            raise ValueError("give a file or its tensors")
        weights = files.read_tensors(file)
    where = str(file) if file is not None else "the adapter"
    targets = {target.name: target for target in find_targets(family, text_encoder, unet, with_convolutions=True)}
    tensors = to_kohya(weights, family)
    report = files.match_layers(tensors, targets)
    report.check(where, family, allow_unmatched=allow_unmatched, allow_missing=True)
    used = [target for name, target in targets.items() if name in report.matched]
    adapters = []
    for target in used:
        try:
            adapters.append(adapter_class.from_tensors(target.spec, report.matched[target.name], **options))
        except ValueError as error:
            raise UserError(f"{target.name}: {error}", where=where) from None
    network = AdapterNetwork(
        adapters, used, family=family, multiplier=multiplier, rate_factors=rate_factors(rates, family.block_count)
    )
    return network, {key: value for key, value in tensors.items() if key.partition(".")[0] in report.matched}
