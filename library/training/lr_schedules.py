"""Learning-rate schedules: factors of the rate as pure functions of the step.

A schedule here is `factor(step) -> float` with step counted from 0, in optimizer steps of the whole run, whatever the number
of processes. Formulas as in transformers' optimization.py, whose names sd-scripts uses; written out because they must be
printed in the plan and tested without an optimizer.
"""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from library.errors import UserError, near_names
from library.training.optimizers import REFUSALS, in_words
from library.training.options import ScheduleOptions

if TYPE_CHECKING:
    from torch.optim import Optimizer

Factor = Callable[[int], float]


def steps_of(amount: int | float, total_steps: int) -> int:
    """A number of steps from steps, or from a share of the run below 1."""
    return int(amount) if amount >= 1 else round(amount * total_steps)


def _progress(step: int, start: int, end: int) -> float:
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


def _constant(options: ScheduleOptions, warmup: int, total: int) -> Factor:
    return lambda step: 1.0


def _linear(options: ScheduleOptions, warmup: int, total: int) -> Factor:
    return lambda step: 1.0 - _progress(step, warmup, total)


def _cosine(options: ScheduleOptions, warmup: int, total: int) -> Factor:
    return lambda step: 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup, total)))


def _cosine_with_restarts(options: ScheduleOptions, warmup: int, total: int) -> Factor:
    def factor(step: int) -> float:
        progress = _progress(step, warmup, total)
        return 0.0 if progress >= 1 else 0.5 * (1.0 + math.cos(math.pi * ((options.num_cycles * progress) % 1.0)))

    return factor


def _cosine_with_min_lr(options: ScheduleOptions, warmup: int, total: int) -> Factor:
    floor = options.min_lr_ratio or 0.0

    def factor(step: int) -> float:
        wave = 0.5 * (1.0 + math.cos(math.pi * options.num_cycles * _progress(step, warmup, total)))
        return floor + (1.0 - floor) * wave

    return factor


def _polynomial(options: ScheduleOptions, warmup: int, total: int) -> Factor:
    return lambda step: (1.0 - _progress(step, warmup, total)) ** options.power


def _inverse_sqrt(options: ScheduleOptions, warmup: int, total: int) -> Factor:
    timescale = options.timescale or warmup or 10_000
    shift = timescale - warmup
    return lambda step: 1.0 / math.sqrt(max(timescale, step + shift) / timescale)


def _warmup_stable_decay(options: ScheduleOptions, warmup: int, total: int) -> Factor:
    floor = options.min_lr_ratio or 0.0
    decay_start = total - steps_of(options.decay, total)

    def factor(step: int) -> float:
        wave = 0.5 * (1.0 + math.cos(math.pi * options.num_cycles * _progress(step, decay_start, total)))
        return floor + (1.0 - floor) * wave if step >= decay_start else 1.0

    return factor


def _piecewise_constant(options: ScheduleOptions, warmup: int, total: int) -> Factor:
    rules = str(options.args.get("step_rules", "")) if options.args else ""
    try:
        *pieces, last = rules.split(",")
        bounds = [(int(bound), float(value)) for value, bound in (piece.split(":") for piece in pieces)]
        final = float(last)
    except ValueError:
        raise UserError(
            "piecewise_constant needs its pieces",
            where="--lr_scheduler_args",
            remedy="give \"step_rules='1:100,0.1:200,0.01'\" (factor:until step, ..., last factor)",
        ) from None
    return lambda step: next((value for bound, value in bounds if step < bound), final)


SCHEDULES: Mapping[str, Callable[[ScheduleOptions, int, int], Factor]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
    "piecewise_constant": _piecewise_constant,
}


def check_schedule(options: ScheduleOptions, *, relative_steps: bool = False) -> None:
    """Raise a `UserError` for a schedule that does not exist or lacks what it needs.

    Args:
        relative_steps: the optimizer is Adafactor with its own schedule, which sd-scripts calls "adafactor".
    """
    if options.custom_type:
        _custom_class(options.custom_type)
        if options.warmup:
            raise UserError("a custom schedule has no warm-up of ours", where="--lr_warmup_steps", remedy="leave it out")
    elif options.name.partition(":")[0] == "adafactor":
        if relative_steps:
            return
        raise UserError(
            "Adafactor's own schedule needs its relative steps",
            where=f"--lr_scheduler {options.name}",
            remedy='give --optimizer_type Adafactor --optimizer_args "relative_step=True"',
        )
    elif options.name not in SCHEDULES:
        where = f"--lr_scheduler {options.name}"
        raise UserError("no such schedule", where=where, remedy=near_names(options.name, SCHEDULES))
    else:
        SCHEDULES[options.name](options, 0, 1)


def learning_rate_factor(options: ScheduleOptions, total_steps: int) -> Factor:
    """The schedule of a run: a linear warm-up from 0 (warmup_stable_decay: from its lowest rate), then the named curve."""
    warmup = min(steps_of(options.warmup, total_steps), total_steps)
    curve = SCHEDULES[options.name](options, warmup, total_steps)
    floor = options.min_lr_ratio or 0.0 if options.name == "warmup_stable_decay" else 0.0
    return lambda step: floor + (1.0 - floor) * step / warmup if step < warmup else curve(step)


def build_schedule(options: ScheduleOptions, optimizer: Optimizer, total_steps: int) -> Any:
    """A torch scheduler, stepped once after each optimizer step; None for an optimizer that has no rate to change."""
    from torch.optim.lr_scheduler import LambdaLR

    if any(group["lr"] is None for group in optimizer.param_groups):
        return None

    if options.custom_type:
        try:
            return _custom_class(options.custom_type)(optimizer, **options.args)
        except REFUSALS as error:
            where = f"--lr_scheduler_type {options.custom_type}"
            raise UserError(
                f"refuses its settings: {in_words(error)}", where=where, remedy="see --lr_scheduler_args"
            ) from error
    return LambdaLR(optimizer, learning_rate_factor(options, total_steps))


def rehearse_schedule(options: ScheduleOptions, optimizer: Optimizer, total_steps: int) -> None:
    """Build the schedule and walk a class of the user's choice through the run; some end early, or need a loss.

    Raises:
        UserError: it refuses its settings, or a step.
    """
    scheduler = build_schedule(options, optimizer, total_steps)
    if scheduler is None or not options.custom_type:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer itself takes no step
        for step in range(1, total_steps + 1):
            try:
                scheduler.step()
            except REFUSALS as error:
                where = f"--lr_scheduler_type {options.custom_type}"
                what = f"cannot be used for step {step} of {total_steps}: {in_words(error)}"
                raise UserError(what, where=where, remedy="see --lr_scheduler_args") from error


def _custom_class(name: str) -> Any:
    where = f"--lr_scheduler_type {name}"
    module_name, _, class_name = name.rpartition(".")
    module_name = module_name or "torch.optim.lr_scheduler"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"cannot import {module_name} ({error})", where=where) from None
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise UserError(f"{module_name} has no class {class_name}", where=where, remedy=near_names(class_name, classes))
    return found
