"""Optimizers by name: one table, one place that builds.

Names are those of sd-scripts in any case; anything else is a class of torch.optim or a dotted path.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.errors import UserError, near_names

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """Where an optimizer comes from.

    Attributes:
        path: dotted path of the class.
        package: what to install for it, where it does not come with the requirements.
        defaults: settings used unless the user gives others.
        adaptive_rate: the optimizer finds its own rate; learning rates are factors of it and belong near 1.
    """

    path: str
    package: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    adaptive_rate: bool = False


def _adaptation(name: str) -> OptimizerKind:
    return OptimizerKind(path=f"dadaptation.{name}", package="dadaptation", adaptive_rate=True)


NESTEROV = {"momentum": 0.9, "nesterov": True}
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What classes of the user's choice raise about their settings."""

OPTIMIZERS: Mapping[str, OptimizerKind] = {
    "AdamW": OptimizerKind(path="torch.optim.AdamW"),
    "AdamW8bit": OptimizerKind(path="bitsandbytes.optim.AdamW8bit"),
    "PagedAdamW": OptimizerKind(path="bitsandbytes.optim.PagedAdamW"),
    "PagedAdamW8bit": OptimizerKind(path="bitsandbytes.optim.PagedAdamW8bit"),
    "PagedAdamW32bit": OptimizerKind(path="bitsandbytes.optim.PagedAdamW32bit"),
    "Lion": OptimizerKind(path="bitsandbytes.optim.Lion"),
    "Lion8bit": OptimizerKind(path="bitsandbytes.optim.Lion8bit"),
    "PagedLion8bit": OptimizerKind(path="bitsandbytes.optim.PagedLion8bit"),
    "SGDNesterov": OptimizerKind(path="torch.optim.SGD", defaults=NESTEROV),
    "SGDNesterov8bit": OptimizerKind(path="bitsandbytes.optim.SGD8bit", defaults=NESTEROV),
    "DAdaptation": _adaptation("experimental.DAdaptAdamPreprint"),
    "DAdaptAdamPreprint": _adaptation("experimental.DAdaptAdamPreprint"),
    "DAdaptAdaGrad": _adaptation("DAdaptAdaGrad"),
    "DAdaptAdam": _adaptation("DAdaptAdam"),
    "DAdaptAdan": _adaptation("DAdaptAdan"),
    "DAdaptAdanIP": _adaptation("experimental.DAdaptAdanIP"),
    "DAdaptLion": _adaptation("DAdaptLion"),
    "DAdaptSGD": _adaptation("DAdaptSGD"),
    "Prodigy": OptimizerKind(path="prodigyopt.Prodigy", package="prodigyopt", adaptive_rate=True),
    "Adafactor": OptimizerKind(path="transformers.optimization.Adafactor", defaults={"relative_step": True}),
    "RAdamScheduleFree": OptimizerKind(path="schedulefree.RAdamScheduleFree", package="schedulefree"),
    "AdamWScheduleFree": OptimizerKind(path="schedulefree.AdamWScheduleFree", package="schedulefree"),
    "SGDScheduleFree": OptimizerKind(path="schedulefree.SGDScheduleFree", package="schedulefree"),
}
_BY_LOWER_NAME = {name.lower(): name for name in OPTIMIZERS}


def optimizer_kind(name: str) -> tuple[str, OptimizerKind]:
    """An optimizer's proper name and where it comes from; torch is not imported for a name of the table.

    Raises:
        UserError: unknown, answered with the near names.
    """
    known = _BY_LOWER_NAME.get((name or "AdamW").lower())
    if known:
        return known, OPTIMIZERS[known]
    where = f"--optimizer_type {name}"
    if "." in name:
        return name.rsplit(".", 1)[1], OptimizerKind(path=name)
    import torch

    if inspect.isclass(getattr(torch.optim, name, None)):
        return name, OptimizerKind(path=f"torch.optim.{name}")
    raise UserError("no such optimizer", where=where, remedy=near_names(name, OPTIMIZERS))


def optimizer_class(name: str) -> Any:
    """The class behind a name.

    Raises:
        UserError: the package is missing (with the command that installs it), or it has no such class.
    """
    known, kind = optimizer_kind(name)
    where = f"--optimizer_type {name}"
    module_name, _, class_name = kind.path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = kind.package or module_name.partition(".")[0]
        raise UserError(
            f"{known} needs the package {package} ({error})", where=where, remedy=f"pip install {package}"
        ) from None
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        raise UserError(f"{module_name} has no class {class_name}", where=where)
    return found


def optimizer_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings an optimizer is built with: its defaults here, then what the user gave.

    Raises:
        UserError: a setting the class does not take, answered with the near ones.
    """
    known, kind = optimizer_kind(name)
    settings = {**kind.defaults, **given}
    parameters = inspect.signature(optimizer_class(name)).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        takes = [key for key in parameters if key not in ("self", "params", "lr")]
        for key in given:
            if key not in takes:
                raise UserError(f"{known} has no setting {key!r}", where="--optimizer_args", remedy=near_names(key, takes))
    return settings


def build_optimizer(
    name: str, groups: Sequence[dict[str, Any]], learning_rate: float, settings: Mapping[str, Any]
) -> Optimizer:
    """The optimizer over parameter groups, each of which may carry its own `lr`.

    Args:
        settings: as `optimizer_settings` gives them.

    Raises:
        UserError: the class refuses its settings, in its own words.
    """
    own_rate = chooses_its_rate(name, settings)
    groups = [{key: value for key, value in group.items() if not (own_rate and key == "lr")} for group in groups]
    # The plan says so; bitsandbytes would put a line of its source on the screen, at the first step.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    try:
        return optimizer_class(name)(groups, lr=None if own_rate else learning_rate, **settings)
    except REFUSALS as error:
        where = f"--optimizer_type {name}"
        raise UserError(f"refuses its settings: {in_words(error)}", where=where, remedy="see --optimizer_args") from error


def rehearse_optimizer(name: str, learning_rate: float, settings: Mapping[str, Any]) -> None:
    """Take a step on a small weight with a class that is not of the table; some need sparse gradients, or closures.

    Raises:
        UserError: it cannot train an adapter.
    """
    import torch

    if optimizer_kind(name)[0] in OPTIMIZERS:
        return
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    optimizer = build_optimizer(name, [{"params": [parameter]}], learning_rate, settings)
    try:
        optimizer.step()
    except REFUSALS as error:
        where = f"--optimizer_type {name}"
        raise UserError(
            f"cannot train an adapter: {in_words(error)}", where=where, remedy="use AdamW, or another"
        ) from error


def in_words(error: Exception) -> str:
    """What an exception of a library says, as part of a sentence; its kind where it says nothing."""
    return str(error).rstrip(".") or type(error).__name__


def chooses_its_rate(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether learning rates have no effect: Adafactor with relative steps."""
    return optimizer_kind(name)[0] == "Adafactor" and bool(settings.get("relative_step"))


def is_schedule_free(name: str) -> bool:
    """Whether the optimizer replaces the learning-rate schedule and has a training and an evaluation mode."""
    return optimizer_kind(name)[0].lower().endswith("schedulefree")
