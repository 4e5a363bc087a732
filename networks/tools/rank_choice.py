"""How many directions of a matrix to keep: a rank, or as many as an aim asks for, found with little more work than that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from networks.core.products import leading_singular_vectors, rank_within, svd

_FIRST_TRY = 32  # ranks that are looked for at first where the aim decides
_SURE = 3e-3  # relative errors below this are lost in what fp32 keeps of sums of squares of some of the values


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """What decides on a layer's rank.

    Attributes:
        most: the highest rank; the rank itself where there is no aim. None for no limit.
        error: as few ranks as leave at most this share of the Frobenius norm out; None for no such aim.
        threshold: as many ranks as have singular values above this; None for no such aim.
    """

    most: int | None
    error: float | None = None
    threshold: float | None = None

    @property
    def has_aim(self) -> bool:
        """Whether ranks differ by layer."""
        return self.error is not None or self.threshold is not None


def squared_norm(tensor: Tensor) -> float:
    """Sum of squares, exact to about 1e-7: rows in fp32, their sum in double precision."""
    rows = tensor.reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def decompose(matrix: Tensor, rule: RankRule, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The directions of a matrix to keep, largest first; one at least.

    Args:
        matrix: (rows, columns), fp32.
        generator: of the CPU.

    Returns:
        left (rows, rank), values (rank,), right (rank, columns), and all values that were found on the way.
    """
    side = min(matrix.shape)
    most = side if rule.most is None else min(rule.most, side)
    if not rule.has_aim:
        left, values, right = leading_singular_vectors(matrix, most, generator)
        return left, values, right, values
    total = squared_norm(matrix)
    if rule.error is not None and rule.error < _SURE:
        left, values, right = svd(matrix)
        rank = min(most, rank_within(values, rule.error))
        return left[:, :rank], values[:rank], right[:rank], values
    count = min(_FIRST_TRY, most)
    while True:
        left, values, right = leading_singular_vectors(matrix, count, generator)
        rank, reached = _rank_for(values, total, rule)
        if reached or count >= most:
            return left[:, :rank], values[:rank], right[:rank], values
        count = min(4 * count, most)


def _rank_for(values: Tensor, total: float, rule: RankRule) -> tuple[int, bool]:
    """The lowest rank that the largest values allow, and whether they are enough to know."""
    if rule.threshold is not None:
        above = int((values > rule.threshold).sum())
        return max(1, above), above < len(values)
    assert rule.error is not None
    left_out = total - values.double().square().cumsum(0)
    needed = int((left_out > rule.error**2 * total).sum()) + 1
    return min(needed, len(values)), needed <= len(values)
