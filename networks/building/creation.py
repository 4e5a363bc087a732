"""From what the user gives to a network: `create_network` and `create_network_from_weights` of every network module.

An algorithm's file declares an `Algorithm` and binds these two to its name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.tensor_files import open_tensor_file
from library.errors import UserError, counted
from library.families.family import ModelFamily
from library.streams import torch_stream
from networks.building.blocks import RankPlan, all_learning_rate_weights, block_values
from networks.building.groups import RateFactors
from networks.building.network import AdapterNetwork
from networks.building.rules import Rule, first_setting, matches, ruled_options
from networks.building.selection import SELECTION_ARGUMENTS, Selection, read_selection
from networks.building.targets import Target, family_of_models, model_layers
from networks.core import arguments
from networks.core.adapter import Adapter, weight_of
from networks.core.algorithms import Algorithm, algorithm, algorithm_of
from networks.core.arguments import Parser
from networks.formats import files

logger = logging.getLogger(__name__)

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

_ALPHA_ARGUMENTS = ("conv_alpha", "block_alphas", "conv_block_alphas", "network_reg_alphas")

START_ARGUMENTS: dict[str, Parser] = {"seed": arguments.whole_number}
"""Where the initial values come from."""

SCALE_ARGUMENTS: dict[str, Parser] = {"rs_lora": arguments.flag}
"""How alpha acts: rsLoRA (Kalajdzievski, arXiv:2312.03732) scales by alpha / sqrt(rank)."""


def rate_factors(values: Mapping[str, Any], family: ModelFamily, rules: Sequence[Rule] = ()) -> RateFactors:
    """What the arguments of `RATE_ARGUMENTS` say, beside learning rates by pattern.

    Raises:
        UserError: a wrong number of block values, an unknown preset, a threshold that has nothing to act on.
    """
    weights = all_learning_rate_weights(
        values.get("down_lr_weight"),
        values.get("mid_lr_weight"),
        values.get("up_lr_weight"),
        zero_threshold=values.get("block_lr_zero_threshold", 0.0),
        family=family,
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
        rules=rules,
        text_encoder_plus_ratio=values.get("loraplus_text_encoder_lr_ratio", ratio),
        denoiser_plus_ratio=values.get("loraplus_unet_lr_ratio", ratio),
    )


def rank_plan(
    network_dim: int | None,
    network_alpha: float | None,
    values: Mapping[str, Any],
    rates: RateFactors,
    selection: Selection,
    count: int,
) -> RankPlan:
    """What `network_dim` (4 where None), `network_alpha` (None and 0 stand for the rank) and `RANK_ARGUMENTS` say.

    A preset that means convolutions gives them `network_dim` and `network_alpha` where `conv_dim` is not given.

    Raises:
        UserError: ranks below 1, negative alphas, a wrong number of block values, alphas without their dims.
    """
    dim = 4 if network_dim is None else network_dim
    if dim < 1 or dim != int(dim):
        raise UserError(f"{dim} is no rank", where="--network_dim", remedy="give a whole number of 1 or more")
    alpha = network_alpha or 0.0
    if alpha < 0:
        raise UserError(f"{alpha:g} is negative", where="--network_alpha", remedy="give 0 (alpha = rank) or more")
    conv_dim, conv_alpha = values.get("conv_dim"), values.get("conv_alpha", 1.0)
    if conv_dim is None and selection.preset.convolutions:
        conv_dim, conv_alpha = int(dim), values.get("conv_alpha", alpha)
    elif conv_dim is None and "conv_block_dims" not in values:
        for name in ("conv_alpha", "conv_block_alphas"):
            if name in values:
                raise UserError("has no effect without conv_dim", where=f"--network_args {name}", remedy="give conv_dim too")
    return RankPlan(
        dim=int(dim),
        alpha=alpha,
        conv_dim=conv_dim,
        conv_alpha=conv_alpha,
        block_dims=_checked_count(values, "block_dims", count),
        block_alphas=_block_numbers(values, "block_alphas", count),
        conv_block_dims=_checked_count(values, "conv_block_dims", count),
        conv_block_alphas=_block_numbers(values, "conv_block_alphas", count),
        lr_weights=rates.block_weights,
        rules=selection.rules,
    )


def _block_numbers(values: Mapping[str, Any], name: str, count: int) -> tuple[float, ...] | None:
    return block_values(values[name], count, name) if name in values else None


def _checked_count(values: Mapping[str, Any], name: str, count: int) -> tuple[int, ...] | None:
    if name in values:
        block_values(",".join(map(str, values[name])), count, name)
    return values.get(name)


def create_network(
    name: str,
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Models,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> AdapterNetwork:
    """A new network, which changes nothing yet and is not attached.

    Args:
        name: of the algorithm; layers that `network_reg_algos` names take another.
        multiplier: strength; 1 for training.
        network_dim: rank (OFT, BOFT: block size); None stands for 4.
        network_alpha: None and 0 stand for the rank.
        vae: not used.
        neuron_dropout: `--network_dropout`.
        network_args: conv_dim, conv_alpha, block_dims, down_lr_weight, preset ...: the tables in this module and in
            `selection.py`, and the algorithms' own.

    Raises:
        UserError: wrong settings, all unknown names and unreadable values at once; nothing is left to adapt.
    """
    own = algorithm(name)
    family = family_of_models(text_encoder, unet)
    used = algorithms_used(own, network_args)
    shared = RANK_ARGUMENTS | RATE_ARGUMENTS | START_ARGUMENTS | SCALE_ARGUMENTS | SELECTION_ARGUMENTS
    values = arguments.read_arguments(network_args, shared | _own_arguments(used))
    values = _with_dropout(values, neuron_dropout, used)
    selection = read_selection(values, family, default_preset=own.preset)
    _note_what_means_nothing(used, network_dim, network_alpha, values, selection.rules)
    rates = rate_factors(values, family, selection.rules)
    plan = rank_plan(network_dim, network_alpha, values, rates, selection, family.block_count)

    seed = values.get("seed")
    seed = torch.initial_seed() if seed is None else seed
    adapters, targets = [], []
    for target in selection.layers(model_layers(family, text_encoder, unet), with_convolutions=plan.with_convolutions):
        adapter = _new_adapter(target, own, selection, plan, values)
        if adapter is not None:
            # A stream for each layer: its values depend neither on the other layers, nor on their order or the device.
            adapter.initialise(torch_stream(seed, f"init {target.name}"), weight_of(target.layer).detach())
            adapters.append(adapter)
            targets.append(target)
    if not targets:
        raise UserError(
            "leave no layer to adapt", where="--network_args", remedy="give some block a rank and a weight above 0"
        )
    _check_included(selection, targets)
    _note_block_sizes([(adapter, plan.of(target)) for adapter, target in zip(adapters, targets, strict=True)], values)
    if any(name.startswith("loraplus") for name in values) and not any(adapter.plus_parameters() for adapter in adapters):
        logger.warning("LoRA+ has no effect: %s has no factors that start at zero beside others", own.adapter.title)
    return AdapterNetwork(adapters, targets, family=family, multiplier=multiplier, rate_factors=rates)


def _check_included(selection: Selection, adapted: Sequence[Target]) -> None:
    """Refuse patterns of `include_patterns` that no adapter came of."""
    for pattern in selection.include:
        if not any(matches(pattern, target) for target in adapted):
            raise UserError(
                f"'{pattern}' matches only layers without a rank",
                where="--network_args include_patterns",
                remedy="give conv_dim for 3x3 convolutions, or network_reg_dims",
            )


def algorithms_used(own: Algorithm, network_args: Mapping[str, Any]) -> list[Algorithm]:
    """The algorithm of the module, and those that are given to layers by pattern.

    Raises:
        UserError: an unknown name among these, or a `train_norm` that is neither yes nor no.
    """
    pieces = str(network_args.get("network_reg_algos") or "").split(",")
    names = [piece.rpartition("=")[2] for piece in pieces if "=" in piece]
    train_norm = network_args.get("train_norm")
    norms = ["norm"] if train_norm is not None and arguments.flag(str(train_norm), "train_norm") else []
    return [own, *(algorithm(name, where="--network_args network_reg_algos") for name in names + norms)]


def _own_arguments(algorithms: Sequence[Algorithm]) -> dict[str, Parser]:
    return {name: parser for used in algorithms for name, parser in (used.arguments | used.training_arguments).items()}


def _options(chosen: Algorithm, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an algorithm's own arguments, for its constructor."""
    return {name: values[name] for name in (*chosen.arguments, *chosen.training_arguments) if name in values}


def _new_adapter(
    target: Target, own: Algorithm, selection: Selection, plan: RankPlan, values: Mapping[str, Any]
) -> Adapter | None:
    """The adapter of one layer, without values; None where it gets none."""
    name = first_setting(selection.rules, target, "algorithm")
    chosen = own if name is None else algorithm(name)
    if target.spec.is_norm and not chosen.norms:
        if not selection.norms:
            return None
        chosen = algorithm("norm")
    elif chosen.norms and not target.spec.is_norm:
        return None
    settings = plan.of(target)
    if settings is None:
        return None
    ruled = ruled_options(selection.rules, target, given=values)
    options = _options(chosen, ruled)
    rank, alpha = settings
    if chosen.has_rank:
        options["rank"] = rank
    if chosen.has_alpha:
        # What is stored is read as alpha / rank everywhere, so the square root goes into alpha.
        options["alpha"] = alpha * math.sqrt(rank) if values.get("rs_lora") else alpha
    try:
        return chosen.adapter(target.spec, **options)
    except ValueError as error:
        raise UserError(f"{target.name}: {error}", where="--network_args") from None


def _with_dropout(values: Mapping[str, Any], neuron_dropout: float | None, used: Sequence[Algorithm]) -> dict[str, Any]:
    """The values, with `--network_dropout`, which is the same thing as the argument `dropout`."""
    result = dict(values)
    if neuron_dropout is None:
        return result
    given = arguments.probability(str(neuron_dropout), "dropout")
    if not any("dropout" in each.training_arguments for each in used) and given:
        raise UserError(
            f"{used[0].adapter.title} has no neurons to drop",
            where="--network_dropout",
            remedy="leave it out, or use --network_args module_dropout",
        )
    if result.setdefault("dropout", given) != given:
        raise UserError(f"is {given:g}, but --network_args dropout is {result['dropout']:g}", where="--network_dropout")
    return result


def _note_what_means_nothing(
    used: Sequence[Algorithm],
    network_dim: int | None,
    network_alpha: float | None,
    values: Mapping[str, Any],
    rules: Sequence[Rule],
) -> None:
    """Warn of settings that act on nothing: ranks and alphas that none of the algorithms has, DoRA's axis without DoRA.
    (1 is what alpha is where the user does not give it.)"""
    title = used[0].adapter.title
    if network_dim is not None and not any(each.has_rank for each in used):
        logger.warning("--network_dim has no effect: %s has no rank", title)
    if network_dim is not None and "num_blocks" in values and len(used) == 1:
        logger.warning("--network_dim has no effect: num_blocks decides the size of the blocks")
    decomposed = values.get("dora_wd") or any(rule.options.get("dora_wd") for rule in rules)
    if values.get("wd_on_output") and not decomposed:
        logger.warning("--network_args wd_on_output has no effect without dora_wd=True")
    if any(each.has_alpha for each in used):
        return
    given = ["--network_alpha"] if network_alpha not in (None, 0, 1) else []
    given += [f"--network_args {name}" for name in (*_ALPHA_ARGUMENTS, *SCALE_ARGUMENTS) if values.get(name)]
    instead = "; --network_args constraint limits its rotations" if "constraint" in used[0].arguments else ""
    for name in given:
        logger.warning("%s has no effect: %s has no alpha%s", name, title, instead)


def _note_block_sizes(adapters: Sequence[tuple[Adapter, tuple[int, float] | None]], values: Mapping[str, Any]) -> None:
    """Warn where blocks of outputs are not of the size that was asked for, because it does not split a layer's width.

    Args:
        adapters: each with its planned rank and alpha.
    """
    if "num_blocks" in values:
        return
    rotated = [(adapter, plan[0]) for adapter, plan in adapters if plan is not None and _has_blocks(adapter)]
    other = [(adapter, asked) for adapter, asked in rotated if adapter.rank != asked]
    if other:
        logger.warning(
            "%s: %d of %s have blocks of %s outputs instead of %s, which does not split their width so",
            other[0][0].title,
            len(other),
            counted(len(rotated), "layer"),
            *(" or ".join(map(str, sorted(sizes))) for sizes in ({each.rank for each, _ in other}, {n for _, n in other})),
        )


def _has_blocks(adapter: Adapter) -> bool:
    """Whether the adapter's rank is the size of blocks, which a layer's width limits: of those without alpha."""
    return bool(adapter.rank) and not adapter.has_alpha


def create_network_from_weights(
    name: str,
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: Models,
    unet: nn.Module | None,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    allow_unmatched: bool = False,
    **network_args: Any,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """A network with the layers, algorithms, ranks, alphas and weights of a file, not attached.

    Args:
        name: of the algorithm whose `network_args` are taken; what the file holds may be of any.
        file, weights_sd: the file, or its tensors if they were read already. A file beside them gives its metadata, which
            say how PEFT's layout is scaled.
        for_inference: without effect; the same modules serve both.
        allow_unmatched: accept layers of the file that the models have not; they are left out.
        network_args: drop-outs and learning rates; layers, ranks and alphas are the file's.

    Returns:
        The network, and the tensors under our names, which `network.load_state_dict` takes.

    Raises:
        UserError: a file that does not fit the models, or settings that it decides itself.
    """
    own = algorithm(name)
    by_file = RANK_ARGUMENTS | START_ARGUMENTS | SCALE_ARGUMENTS | SELECTION_ARGUMENTS
    decided = [key for key in network_args if key in by_file | own.arguments and key != "network_reg_lrs"]
    if decided:
        raise UserError(
            "has no effect with ranks and weights from a file", where=f"--network_args {decided[0]}", remedy="leave it out"
        )
    family = family_of_models(text_encoder, unet)
    rate_table = RATE_ARGUMENTS | {"network_reg_lrs": SELECTION_ARGUMENTS["network_reg_lrs"]}
    values = arguments.read_arguments(network_args, rate_table | own.training_arguments)
    selection = read_selection(values, family, default_preset=own.preset)
    adapter = _adapter_given(file, weights_sd, family)
    targets = {target.name: target for target in model_layers(family, text_encoder, unet)}
    report = replace(files.match_layers(adapter, targets), missing=())
    report.check(adapter.where, family, allow_unmatched=allow_unmatched)
    used = [target for key, target in targets.items() if key in report.matched]
    adapters = [_adapter_of_file(target, report.matched[target.name], own, values, adapter.where) for target in used]
    rates = rate_factors(values, family, selection.rules)
    network = AdapterNetwork(adapters, used, family=family, multiplier=multiplier, rate_factors=rates)
    network.load_report = str(report)
    return network, network.file_tensors()


def _adapter_given(file: str | Path | None, tensors: Mapping[str, Tensor] | None, family: ModelFamily) -> files.AdapterFile:
    if file is None and tensors is None:
        raise ValueError("give a file or its tensors")
    if tensors is None:
        return files.read_adapter(str(file), family)
    if file is None:
        return files.adapter_of_tensors(tensors, family)
    metadata = files.adapter_metadata(open_tensor_file(file)) if Path(file).is_file() else {}
    return files.adapter_of_tensors(tensors, family, metadata=metadata, where=str(file))


def _adapter_of_file(
    target: Target, tensors: Mapping[str, Tensor], own: Algorithm, values: Mapping[str, Any], where: str
) -> Adapter:
    """The adapter of one layer of a file: of the module's algorithm where that saves such tensors."""
    found = algorithm_of({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    if found is None:
        raise files.unknown_algorithm(target.name, tensors, where)
    chosen = algorithm(found)
    if own.adapter.title_in_files() == chosen.adapter.title:
        chosen = own
    taken = {key: value for key, value in _options(own, values).items() if key in chosen.training_arguments}
    try:
        return chosen.adapter.from_tensors(target.spec, tensors, **taken)
    except ValueError as error:
        raise UserError(f"{target.name}: {error}", where=where) from None
