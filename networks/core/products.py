"""Singular values and best approximations of products of two matrices, without forming the product where it is larger."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values_of_product(left: Tensor, right: Tensor) -> Tensor:
    """The singular values of left @ right, largest first.

    With left = Q1 R1 and right' = Q2 R2, they are those of R1 R2', which is as small as the rank.

    Args:
        left: (out, rank).
        right: (rank, in).

    Returns:
        (min(out, rank, in),), fp32.
    """
    left, right = left.float(), right.float()
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return torch.linalg.svdvals(left @ right)
    first, second = (torch.linalg.qr(factor, mode="r").R for factor in (left, right.t()))
    return torch.linalg.svdvals(first @ second.t())


def svd_of_product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced singular value decomposition of left @ right: U (out, k), values (k,) largest first, V' (k, in); fp32."""
    left, right = left.float(), right.float()
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return svd(left @ right)
    (q1, r1), (q2, r2) = torch.linalg.qr(left), torch.linalg.qr(right.t())
    inner_left, values, inner_right = svd(r1 @ r2.t())
    return q1 @ inner_left, values, inner_right @ q2.t()


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a matrix."""
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    return left, values, right


def effective_rank(values: Tensor) -> float:
    """How many directions a change has in effect: exp of the entropy of the singular values' shares.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. A change of nothing has 0.
    """
    total = values.double().sum()
    if not total > 0:
        return 0.0
    shares = values.double() / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def rank_within(values: Tensor, error: float) -> int:
    """The lowest rank, 1 or more, whose best approximation is off by at most this share of the Frobenius norm."""
    squares = values.double().square()
    left_out = squares.flip(0).cumsum(0).flip(0)  # what is lost with the first k values kept, at place k
    needed = int((left_out > error**2 * squares.sum()).sum())
    return max(1, needed)


def balanced_factors(left: Tensor, values: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors of equal norm, (out, rank) and (rank, in), whose product is the best approximation of a rank.

    Args:
        left, values, right: a singular value decomposition; where it has fewer values than the rank, that many are kept.
    """
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
