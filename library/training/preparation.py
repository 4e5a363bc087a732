"""The single steps from options to a run: checks of names and rates, the accelerator, the network and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from library.checkpoints.parts import PART_TITLES, UNET
from library.devices import best_device, compute_dtype
from library.errors import UserError, attempt, counted, raise_all
from library.families.family import ModelFamily, TextEncoder
from library.training.lr_schedules import rehearse_schedule
from library.training.optimizers import (
    build_optimizer,
    chooses_its_rate,
    is_schedule_free,
    optimizer_class,
    optimizer_settings,
    rehearse_optimizer,
)
from library.training.options import (
    CaptionEncodingOptions,
    ComputeOptions,
    NetworkOptions,
    OptimizerOptions,
    TrainingOptions,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from library.checkpoints.packed_weights import WeightFormat
    from networks.building.summary import GroupSummary


def check_names(options: TrainingOptions) -> None:
    """Names that can be wrong and need no file: the network module and the optimizer.

    Raises:
        UserError: all that are unknown or not installed, at once.
    """
    from networks.registry import load_network_module

    problems: list[UserError] = []
    for check in (
        lambda: load_network_module(options.network.module),
        lambda: optimizer_class(options.optimizer.type),
        lambda: optimizer_settings(options.optimizer.type, options.optimizer.args),
    ):
        attempt(check, problems)
    raise_all(list({str(problem): problem for problem in problems}.values()))


def build_accelerator(compute: ComputeOptions, *, find_unused: bool) -> Accelerator:
    """Accelerate, for launch, precision and distribution.

    Args:
        find_unused: adapters may be left out of a step (layer drop-out, clip skip), which DDP has to be told.

    Raises:
        UserError: the precision, or what weights are kept in, does not fit the device.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    device = best_device()
    compute_dtype(compute.mixed_precision, device, where=f"--mixed_precision {compute.mixed_precision}")
    if compute.unet_format is not None:
        from library.checkpoints.packed_weights import check_weight_format

        check_weight_format(compute.unet_format, device, where=f"--{compute.format_option}")
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=find_unused, broadcast_buffers=False)]
    # Without cpu=True accelerate starts processes on a CPU that do not know of each other, each training by itself.
    return Accelerator(mixed_precision=compute.mixed_precision, cpu=device.type == "cpu", kwargs_handlers=handlers)


def adapters_may_rest(options: TrainingOptions, encoders: Sequence[TextEncoder]) -> bool:
    """Whether a step may pass without some parameters: an adapter's layer is dropped or lies behind the one that is used,
    or its algorithm trains one part of it at a time; whether third-party modules do is not known."""
    from networks.building.creation import algorithms_used
    from networks.registry import load_network_module

    clip_skip = options.captions.clip_skip
    unused_layers = any((clip_skip or each.last_used) > 1 and not each.gives_pooled for each in encoders)
    if unused_layers or options.network.args.get("module_dropout", "0") != "0":
        return True
    module = attempt(lambda: load_network_module(options.network.module), [])
    own = getattr(module, "ALGORITHM", None)
    used = attempt(lambda: algorithms_used(own, options.network.args), []) if own is not None else None
    return used is None or any(each.rests for each in used)


def layer_notes(options: CaptionEncodingOptions, family: ModelFamily) -> list[str]:
    """What --clip_skip changes, where it does."""
    usual = sorted({encoder.last_used for encoder in family.text_encoders})
    if options.clip_skip is None or usual == [options.clip_skip]:
        return []
    instead = "the last" if usual == [1] else f"layer {'/'.join(map(str, usual))}"
    encoders = "the text encoder gives" if len(family.text_encoders) == 1 else "the text encoders give"
    return [f"{encoders} layer {options.clip_skip} from the end (--clip_skip) instead of {instead}"]


def chooses_rate(options: OptimizerOptions) -> bool:
    """Whether the optimizer finds its own rate, so that given ones mean nothing."""
    return chooses_its_rate(options.type, optimizer_settings(options.type, options.args))


def optimizer_title(options: OptimizerOptions, device: str) -> str:
    """What the plan calls the optimizer."""
    unpaged = options.type.lower().startswith("paged") and device == "cpu"
    return f"{options.type} (not paged, as there is no GPU)" if unpaged else options.type


def part_rates(
    options: OptimizerOptions, network: NetworkOptions, encoders: Sequence[TextEncoder]
) -> dict[str, float | None]:
    """The learning rate of each part by its title; None where it is not adapted, 0 where it is left as it is.

    Args:
        encoders: those of the base model; a single rate is that of all of them.
    """
    rates = options.text_encoder_lr or (options.learning_rate,)
    each = rates * len(encoders) if len(rates) == 1 else rates
    unet = options.learning_rate if options.unet_lr is None else options.unet_lr
    return {
        **{
            PART_TITLES[encoder.part]: rate if network.train_text_encoder else None
            for encoder, rate in zip(encoders, each, strict=True)
        },
        PART_TITLES[UNET]: unet if network.train_unet else None,
    }


def check_rates(options: TrainingOptions, encoders: Sequence[TextEncoder]) -> None:
    """Refuse rates that leave nothing to train, or text encoder rates that are neither one nor one for each.

    Raises:
        UserError
    """
    rates = options.optimizer.text_encoder_lr
    if len(rates) not in (0, 1, len(encoders)):
        shown = " ".join(f"{rate:g}" for rate in rates)
        remedy = "give one rate" + ("" if len(encoders) == 1 else ", or one for each")
        raise UserError(
            f"this base model has {counted(len(encoders), 'text encoder')}",
            where=f"--text_encoder_lr {shown}",
            remedy=remedy,
        )
    if not any(part_rates(options.optimizer, options.network, encoders).values()):
        raise UserError("every learning rate is 0, so nothing would be trained", remedy="give --learning_rate 1e-4 or so")


def create_network(options: NetworkOptions, text_encoders: Sequence[nn.Module], unet: nn.Module, *, seed: int) -> nn.Module:
    """The adapter network for a base model, not yet attached.

    Raises:
        UserError: from the module, about its arguments or the file it starts from.
    """
    import torch

    from library.streams import stream_seed
    from networks.registry import load_network_module

    module: Any = load_network_module(options.module)
    encoder = text_encoders[0] if len(text_encoders) == 1 else list(text_encoders)
    torch.manual_seed(stream_seed(seed, "adapter"))
    if options.dim_from_weights and options.weights:
        settings = dict(options.args) | ({} if options.dropout is None else {"dropout": options.dropout})
        network, _ = module.create_network_from_weights(1, str(options.weights), None, encoder, unet, **settings)
        return network
    return module.create_network(
        1.0, options.dim, options.alpha, None, encoder, unet, neuron_dropout=options.dropout, **options.args
    )


@dataclass(frozen=True, kw_only=True)
class BuiltOptimizer:
    """The optimizer, what its groups are called in logs, and how metadata names it."""

    optimizer: Any
    group_names: Sequence[str]
    description: str


def optimizer_groups(network: Any, options: TrainingOptions) -> tuple[list[dict[str, Any]], list[str]]:
    """The parameter groups that the network module makes, and their names.

    Modules return groups alone or with names beside them (sd-scripts changed that); both are taken.

    Raises:
        UserError: no group is left.
    """
    own, adapted = options.optimizer, options.network
    prepare = network.prepare_optimizer_params
    text_encoder_lr: float | list[float] = own.text_encoder_lr[0] if own.text_encoder_lr else own.learning_rate
    if len(set(own.text_encoder_lr)) > 1:
        text_encoder_lr = list(own.text_encoder_lr)
        prepare = _prepare_with_rates_for_each(network, options)
    unet_lr = own.learning_rate if own.unet_lr is None else own.unet_lr
    result = prepare(
        text_encoder_lr if adapted.train_text_encoder else None,
        unet_lr if adapted.train_unet else None,
        own.learning_rate,
    )
    groups, names = result if isinstance(result, tuple) else (result, None)
    if not groups:
        raise UserError("no part of the network has a learning rate above 0", remedy="give --learning_rate 1e-4 or so")
    return list(groups), list(names) if names else [f"group{number}" for number in range(len(groups))]


def _prepare_with_rates_for_each(network: Any, options: TrainingOptions) -> Callable[..., Any]:
    """The network's function for a list of text encoder rates: newer sd-scripts has one of its own beside the usual one.

    Raises:
        UserError: the module is another package's, and has none.
    """
    from networks.building.third_party import ThirdPartyModule
    from networks.registry import load_network_module

    prepare = getattr(network, "prepare_optimizer_params_with_multiple_te_lrs", None)
    if prepare is None and isinstance(load_network_module(options.network.module), ThirdPartyModule):
        shown = " ".join(f"{rate:g}" for rate in options.optimizer.text_encoder_lr)
        what = f"{options.network.module} takes one rate for all text encoders"
        raise UserError(what, where=f"--text_encoder_lr {shown}", remedy="give one rate")
    return prepare or network.prepare_optimizer_params


def build_network_optimizer(network: Any, options: TrainingOptions) -> BuiltOptimizer:
    """The optimizer over the network's parameter groups."""
    groups, names = optimizer_groups(network, options)
    settings = optimizer_settings(options.optimizer.type, options.optimizer.args)
    optimizer = build_optimizer(options.optimizer.type, groups, options.optimizer.learning_rate, settings)
    kind = type(optimizer)
    shown = ",".join(f"{key}={value}" for key, value in settings.items())
    return BuiltOptimizer(optimizer=optimizer, group_names=names, description=f"{kind.__module__}.{kind.__name__}({shown})")


def rehearse(network: Any, options: TrainingOptions, total_steps: int) -> None:
    """Do to a network without weights what is done to the real one, so that what refuses does so before any loading.

    Raises:
        UserError: from the file that training starts from, the optimizer or the schedule.
    """
    problems: list[UserError] = []
    settings = optimizer_settings(options.optimizer.type, options.optimizer.args)
    attempt(lambda: load_start_weights(network, options.network), problems)
    attempt(lambda: rehearse_optimizer(options.optimizer.type, options.optimizer.learning_rate, settings), problems)
    raise_all(problems)
    built = build_network_optimizer(network, options)
    if not is_schedule_free(options.optimizer.type):
        rehearse_schedule(options.schedule, built.optimizer, total_steps)


def load_start_weights(network: Any, options: NetworkOptions) -> None:
    """Load the adapter that training starts from, if there is one.

    Raises:
        UserError: the file does not fit the network.
    """
    from networks.building.third_party import require_all_loaded

    if options.weights:
        require_all_loaded(network.load_weights(str(options.weights)), f"--network_weights {options.weights}")


def network_lines(network: Any, options: NetworkOptions, *, own_rate: bool = False) -> list[str]:
    """What the plan says of the network: one line in all, and one for each part and block where they differ.

    Args:
        own_rate: the optimizer chooses the rate, so those of the network mean nothing.
    """
    total = sum(parameter.numel() for parameter in network.parameters())
    lines = [f"{options.module}, {total:,} parameters"]
    report = getattr(network, "load_report", None)
    if report is not None:
        lines.append(f"starts from {options.weights}: {report}")
    if not hasattr(network, "describe"):
        return lines
    rows = network.describe()
    for part in dict.fromkeys(row.part for row in rows):
        title = PART_TITLES.get(part, PART_TITLES[UNET])
        own = [row for row in rows if row.part == part]
        whole = [_summed(own)]
        alike = len(whole[0].learning_rates) <= 1 and max(len(whole[0].ranks), len(whole[0].alphas)) <= 2
        for row in whole if alike else own:
            place = title if alike or row.block is None else f"{title} block {row.block}"
            lines.append(f"{place}: {_row_text(row, own_rate=own_rate)}")
    return lines


def _summed(rows: Sequence[GroupSummary]) -> GroupSummary:
    """One row for all blocks of a part."""

    def union(name: str) -> tuple[Any, ...]:
        return tuple(sorted({value for row in rows for value in getattr(row, name)}))

    return replace(
        rows[0],
        block=None,
        modules=sum(row.modules for row in rows),
        parameters=sum(row.parameters for row in rows),
        variants=union("variants"),
        ranks=union("ranks"),
        alphas=union("alphas"),
        learning_rates=union("learning_rates"),
    )


def _row_text(row: GroupSummary, *, own_rate: bool) -> str:
    def listed(values: Sequence[float]) -> str:
        return "/".join(f"{value:g}" for value in values)

    facts = [f"{counted(row.modules, 'module')} of {'/'.join(row.variants)}"]
    facts += [f"rank {listed(row.ranks)}"] if row.ranks else []
    facts += [f"alpha {listed(row.alphas)}"] if row.alphas else []
    facts.append(f"{row.parameters:,} parameters")
    if row.learning_rates and not own_rate:
        facts.append(f"rate {listed(row.learning_rates)}" if any(row.learning_rates) else "frozen")
    return ", ".join(facts)


def rank_and_alpha_of_files(network: Any, options: NetworkOptions) -> tuple[int | None, float | None]:
    """What a file is said to have: rank and alpha as given, else the rank that most of its layers have.

    Where files hold more ranks than are trained (a start from the base weight counts twice), both are the file's.
    """
    given = options.dim if options.dim is not None and not options.dim_from_weights else None
    adapters = [adapter for _, adapter in network.items() if adapter.rank] if hasattr(network, "items") else []
    if not adapters:
        return (given if given is not None else options.dim), options.alpha
    ranks = [adapter.rank for adapter in adapters]
    rank = given if given is not None else max(set(ranks), key=ranks.count)
    times = max(adapter.rank_in_files // adapter.rank for adapter in adapters)
    return rank * times, options.alpha if options.alpha is None else options.alpha * times


def data_workers(wanted: int) -> int:
    """Processes that prepare batches: as many as wanted, but one processor is left to the step."""
    import os

    return min(wanted, max(0, (os.cpu_count() or 1) - 1))


def freeze(*modules: nn.Module, checkpointing: bool) -> None:
    """Stop gradients into the base model's weights; evaluation mode, unless checkpointing needs training mode.

    Base models of these families have no drop-out, so the mode changes nothing else.
    """
    for module in modules:
        module.requires_grad_(False)
        module.train(checkpointing)


def enable_checkpointing(denoiser: Any, text_encoders: Sequence[Any]) -> None:
    """Compute activations again in the backward pass instead of keeping them."""
    denoiser.enable_gradient_checkpointing()
    for encoder in text_encoders:
        encoder.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def packing_line(module: nn.Module, weight_format: WeightFormat, part: str) -> str:
    """What keeping a part's weights in fewer bits has saved and cost."""
    from library.checkpoints.packed_weights import summarise_packing

    summary = summarise_packing(module)
    sizes = f"{summary.nbytes / 1e6:,.1f} MB instead of {summary.plain_nbytes / 1e6:,.1f}"
    return (
        f"{PART_TITLES[part]} kept in {weight_format}: its blocks take {sizes}, with a relative error of {summary.error:.4f}"
    )
