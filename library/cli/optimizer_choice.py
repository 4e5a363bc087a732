"""Which optimizer a command line names, and what follows from it for rates and schedules."""

from __future__ import annotations

from typing import Any

from library.cli.key_values import key_literals
from library.cli.options import ParsedOptions
from library.errors import UserError

RATES = ("learning_rate", "unet_lr", "text_encoder_lr")


def optimizer_name(parsed: ParsedOptions) -> str:
    """The optimizer as the user spells it, old switches included."""
    legacy = "AdamW8bit" if parsed["use_8bit_adam"] else "Lion" if parsed["use_lion_optimizer"] else None
    return legacy or parsed["optimizer_type"] or "AdamW"


def optimizer_args(parsed: ParsedOptions) -> dict[str, Any]:
    """Its settings; Adafactor finds its rate itself unless a rate is given, or asked not to.

    Raises:
        UserError: a setting that is no key=value, or an unknown optimizer.
    """
    from library.training.optimizers import optimizer_kind

    args = key_literals(parsed["optimizer_args"], "--optimizer_args")
    if optimizer_kind(optimizer_name(parsed))[0] == "Adafactor":
        args.setdefault("relative_step", not any(parsed.given(rate) for rate in RATES))
    return args


def relative_steps(parsed: ParsedOptions) -> bool:
    """Whether Adafactor chooses its rate; no where the optimizer's options are wrong, which is said elsewhere."""
    from library.training.optimizers import chooses_its_rate

    try:
        return chooses_its_rate(optimizer_name(parsed), optimizer_args(parsed))
    except UserError:
        return False


def schedule_free(parsed: ParsedOptions) -> bool:
    """Whether the optimizer needs no schedule; no where its name is wrong, which is said elsewhere."""
    from library.training.optimizers import is_schedule_free

    try:
        return is_schedule_free(optimizer_name(parsed))
    except UserError:
        return False
