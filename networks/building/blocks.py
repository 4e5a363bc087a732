"""Values per block of the U-Net: learning-rate weights, ranks and alphas, as `network_args` spells them.

A list has one value for each of the family's block places, `ModelFamily.block_index` (25 for SD1 and SD2, 23 for SDXL).
Learning-rate weights cover those of `ModelFamily.block_sides`: 12 down, 1 middle, 12 up (SDXL: 9, 3, 9); others keep 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from library.errors import UserError, near_names
from library.families.family import ModelFamily
from networks.building.rules import Rule, first_setting
from networks.building.targets import Target
from networks.core.adapter import LayerSpec
from networks.core.arguments import numbers

_PRESETS: dict[str, Callable[[float], float]] = {
    "sine": lambda place: math.sin(math.pi / 2 * place),
    "cosine": lambda place: math.sin(math.pi / 2 * (1 - place)),
    "linear": lambda place: place,
    "reverse_linear": lambda place: 1 - place,
    "zeros": lambda place: 0.0,
}
_PRESET = re.compile(r"([a-z_]+)(?:\+([0-9.eE+-]+))?")


def block_values(text: str, count: int, name: str) -> tuple[float, ...]:
    """A comma-separated list of exactly `count` numbers, none of them negative.

    Raises:
        UserError: another number of values, with the right one; or something that is no number.
    """
    values = numbers(text, name)
    if len(values) != count:
        given = f"{len(values)} value{'s' if len(values) != 1 else ''}"
        raise UserError(f"{given} given, {count} wanted, one for each block", where=f"--network_args {name}")
    return _not_negative(values, name)


def learning_rate_weights(text: str, count: int, name: str) -> tuple[float, ...]:
    """Weights of the down or up blocks: a list of numbers, or a preset that is spread over them, as in "cosine+.25".

    Raises:
        UserError: an unknown preset (with the known ones), a list that is not `count` long, or a negative weight.
    """
    match = _PRESET.fullmatch(text.strip())
    if match is None:
        return block_values(text, count, name)
    preset, added = match.groups()
    if preset not in _PRESETS:
        remedy = near_names(preset, _PRESETS)
        raise UserError(f"'{preset}' is no preset", where=f"--network_args {name}", remedy=remedy)
    offset = numbers(added, name)[0] if added else 0.0
    return _not_negative(tuple(_PRESETS[preset](index / (count - 1)) + offset for index in range(count)), name)


def _not_negative(values: tuple[float, ...], name: str) -> tuple[float, ...]:
    if min(values) < 0:
        raise UserError(f"{min(values):g} is negative", where=f"--network_args {name}", remedy="give 0 or more")
    return values


def all_learning_rate_weights(
    down: str | None, middle: str | None, up: str | None, *, zero_threshold: float, family: ModelFamily
) -> tuple[float, ...] | None:
    """One learning-rate weight for each block, or None where none is asked for.

    What is not given is 1; what does not exceed the threshold is 0, and its block gets no adapter.

    Raises:
        UserError: a wrong number of values, an unknown preset, a negative weight.
    """
    if down is None and middle is None and up is None:
        return None
    weights = [1.0] * family.block_count
    readers = (
        (down, "down_lr_weight", learning_rate_weights),
        (middle, "mid_lr_weight", block_values),
        (up, "up_lr_weight", learning_rate_weights),
    )
    for places, (text, name, read) in zip(family.block_sides, readers, strict=True):
        if text is not None:
            weights[places.start : places.stop] = read(text, len(places), name)
    return tuple(weight if weight > zero_threshold else 0.0 for weight in weights)


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Rank and alpha of every layer, by its kind and block.

    Attributes:
        dim, alpha: of Linear and 1x1 layers; alpha 0 stands for alpha = rank.
        conv_dim, conv_alpha: of larger kernels; None leaves them out.
        block_dims, block_alphas, conv_block_dims, conv_block_alphas: the same by U-Net block, where given.
        lr_weights: learning-rate weight by block; a block with 0 gets no adapter.
        rules: ranks and alphas by pattern, which come before all of these; layers with rank or learning rate 0 get no
            adapter.
    """

    dim: int = 4
    alpha: float = 1.0
    conv_dim: int | None = None
    conv_alpha: float = 1.0
    block_dims: Sequence[int] | None = None
    block_alphas: Sequence[float] | None = None
    conv_block_dims: Sequence[int] | None = None
    conv_block_alphas: Sequence[float] | None = None
    lr_weights: Sequence[float] | None = None
    rules: Sequence[Rule] = ()

    @property
    def with_convolutions(self) -> bool:
        """Whether larger kernels are trained (C3Lier)."""
        return self.conv_dim is not None or self.conv_block_dims is not None

    def of(self, target: Target) -> tuple[int, float] | None:
        """Rank and alpha of one layer, or None where it gets no adapter."""
        rank, alpha = self._of_kind(target.spec, target.block)
        ruled_rank, ruled_alpha, rate = (first_setting(self.rules, target, name) for name in ("rank", "alpha", "rate"))
        rank = rank if ruled_rank is None else ruled_rank
        alpha = alpha if ruled_alpha is None else ruled_alpha
        trained = self.lr_weights is None or target.block is None or self.lr_weights[target.block] > 0
        return (rank, alpha or float(rank)) if rank and trained and rate != 0 else None

    def _of_kind(self, spec: LayerSpec, block: int | None) -> tuple[int, float]:
        if spec.is_wide:
            dims, alphas, dim, alpha = self.conv_block_dims, self.conv_block_alphas, self.conv_dim or 0, self.conv_alpha
        else:
            dims, alphas, dim, alpha = self.block_dims, self.block_alphas, self.dim, self.alpha
        if block is None:
            return dim, alpha
        return (dims[block] if dims is not None else dim), (alphas[block] if alphas is not None else alpha)
