"""What a network holds, as rows of plain data for the plan that a run prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from networks.building.groups import RateFactors, place_order
from networks.building.targets import Part, Target
from networks.core.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """One text encoder, or one block of the U-Net.

    Attributes:
        block: place among the block values; None for text encoders.
        modules: number of adapters.
        variants: the forms of algorithms that occur.
        ranks, alphas: the different ones that occur, in rising order; of the algorithms that have them.
        learning_rates: the different ones that occur; none before the rates are set, 0 where the part is frozen.
        parameters: number of trained values.
    """

    part: Part
    block: int | None
    modules: int
    variants: tuple[str, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    learning_rates: tuple[float, ...]
    parameters: int


def summarise(
    adapters: Iterable[tuple[Target, Adapter]], rates: Mapping[Part, float | None], factors: RateFactors
) -> list[GroupSummary]:
    """One row for each text encoder and one for each block that has adapters."""
    members: dict[tuple[Part, int | None], list[tuple[Adapter, float | None]]] = {}
    for target, adapter in adapters:
        members.setdefault((target.part, target.block), []).append((adapter, factors.rate_of(target, rates)))
    rows = []
    for part, block in sorted(members, key=place_order):
        group = [adapter for adapter, _ in members[part, block]]
        rows.append(
            GroupSummary(
                part=part,
                block=block,
                modules=len(group),
                variants=tuple(sorted({adapter.variant for adapter in group})),
                ranks=tuple(sorted({adapter.rank for adapter in group} - {0})),
                alphas=tuple(sorted({adapter.scale * adapter.rank for adapter in group if adapter.has_alpha} - {0})),
                learning_rates=tuple(sorted({rate for _, rate in members[part, block] if rate is not None})),
                parameters=sum(parameter.numel() for adapter in group for parameter in adapter.parameters()),
            )
        )
    return rows
