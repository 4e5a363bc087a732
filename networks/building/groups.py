"""Optimizer parameter groups: learning rates per part and block, and LoRA+."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.errors import UserError, counted
from networks.building.rules import Rule, first_setting
from networks.building.targets import DENOISER, TEXT_ENCODERS, Part, Target
from networks.core.adapter import Adapter

PART_LABELS: dict[Part, str] = {"text_encoder": "textencoder", "text_encoder_2": "textencoder2", "denoiser": "unet"}
"""sd-scripts' names of the parts in logs."""


@dataclass(frozen=True, kw_only=True)
class RateFactors:
    """What `network_args` say about learning rates, as factors of the parts' own.

    Attributes:
        block_weights: by U-Net block, where given.
        rules: learning rates by pattern, in place of the parts' and blocks'.
        text_encoder_plus_ratio, denoiser_plus_ratio: LoRA+ (Hayou, Ghosh and Yu, arXiv:2402.12354): the rate of the
            matrices that start at zero, over the rate of the others; None trains both alike.
    """

    block_weights: Sequence[float] | None = None
    rules: Sequence[Rule] = ()
    text_encoder_plus_ratio: float | None = None
    denoiser_plus_ratio: float | None = None

    def rate_of(self, target: Target, rates: Mapping[Part, float | None]) -> float | None:
        """The learning rate of one layer, from those of the parts; None where they do not say.

        A part whose own rate is 0 stays frozen, whatever the rules say.
        """
        rate = rates.get(target.part)
        ruled: float | None = first_setting(self.rules, target, "rate")
        if ruled is not None and rate != 0:
            return ruled
        if rate is None or self.block_weights is None or target.block is None:
            return rate
        return rate * self.block_weights[target.block]

    def plus_ratio(self, part: Part) -> float | None:
        """The LoRA+ ratio of one part."""
        return self.denoiser_plus_ratio if part == DENOISER else self.text_encoder_plus_ratio


def text_encoder_rates(rates: float | Sequence[float | None] | None, encoders: int) -> dict[Part, float | None]:
    """The learning rate of each text encoder, where sd-scripts allows one for all or a list with one for each.

    Raises:
        UserError: another number of rates than encoders, some of which would be without effect or without a rate.
    """
    given = [rates] if rates is None or isinstance(rates, (int, float)) else list(rates) or [None]
    if len(given) not in (1, encoders):
        shown = " ".join(str(rate) for rate in given)
        raise UserError(
            f"{len(given)} learning rates for {counted(encoders, 'text encoder')}",
            where=f"--text_encoder_lr {shown}",
            remedy="give one" if encoders == 1 else f"give one, or one for each of the {encoders}",
        )
    each = given if len(given) == encoders else given * encoders
    return dict(zip(TEXT_ENCODERS, each, strict=False))


def parameter_groups(
    adapters: Iterable[tuple[Target, Adapter]], rates: Mapping[Part, float | None], factors: RateFactors
) -> tuple[list[dict[str, Any]], list[str]]:
    """The groups for the optimizer and their names for logs ("unet_block3 plus"): text encoders, then U-Net by block.

    Layers with rate 0 or None are in no group.
    """
    members: dict[tuple[Part, int | None, float], list[Adapter]] = {}
    for target, adapter in adapters:
        rate = factors.rate_of(target, rates)
        if rate:
            block = target.block if factors.block_weights is not None else None
            members.setdefault((target.part, block, rate), []).append(adapter)

    groups, descriptions = [], []
    for part, block, rate in sorted(members, key=lambda place: (place_order(place[:2]), -place[2])):
        several = sum((part, block) == other[:2] for other in members) > 1
        label = PART_LABELS[part] + ("" if block is None else f"_block{block}") + (f"_lr{rate:g}" if several else "")
        for suffix, ratio, parameters in _split(members[part, block, rate], factors.plus_ratio(part)):
            groups.append({"params": parameters, "lr": rate * ratio})
            descriptions.append(label + suffix)
    return groups, descriptions


def place_order(place: tuple[Part, int | None]) -> tuple[int, int]:
    """Sort key of (part, block): the text encoders before the denoiser, then by block."""
    part, block = place
    return (*TEXT_ENCODERS, DENOISER).index(part), block or 0


def _split(adapters: list[Adapter], plus_ratio: float | None) -> list[tuple[str, float, list[nn.Parameter]]]:
    """Suffix of the name, factor of the rate, and parameters of one group, or of its two with LoRA+."""
    everything = [parameter for adapter in adapters for parameter in adapter.parameters()]
    if plus_ratio is None:
        return [("", 1.0, everything)]
    plus = [parameter for adapter in adapters for parameter in adapter.plus_parameters()]
    plus_ids = {id(parameter) for parameter in plus}
    others = [parameter for parameter in everything if id(parameter) not in plus_ids]
    return [half for half in (("", 1.0, others), (" plus", plus_ratio, plus)) if half[2]]
