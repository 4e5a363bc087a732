"""Singular values and best approximations of products of two matrices, without forming the product where it is larger."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING, ITERATIONS = 8, 4  # of the randomised decomposition


Decomposition = tuple[Tensor, Tensor, Tensor]
"""U, singular values and V'."""


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


def svd_of_kronecker(first: Decomposition, second: Decomposition) -> Decomposition:
    """The same of the Kronecker product of two matrices: the products of every pair of their singular values.

    Pairs that are zero within fp32 are left out. The sizes of the result are at most those of the two ranks' product, and
    the larger matrix is never formed.

    Args:
        first: the decomposition of one of (O1, I1).
        second: of one of (O2, I2).

    Returns:
        U (O1 * O2, k), values (k,), V' (k, I1 * I2).
    """
    (u1, s1, v1), (u2, s2, v2) = first, second
    values, order = torch.outer(s1, s2).flatten().sort(descending=True)
    noise = torch.finfo(torch.float32).eps * float(values[0])
    order = order[: max(1, int((values > noise).sum()))]
    rows, columns = order // len(s2), order % len(s2)
    left = (u1[:, None, rows] * u2[None, :, columns]).flatten(0, 1)
    right = (v1[rows, :, None] * v2[columns, None, :]).flatten(1)
    return left, values[: len(order)], right


def norm_of_difference(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Frobenius norm of A1 @ B1 - A2 @ B2, in double precision.

    The difference is one product of the stacked factors, [A1, -A2] @ [B1; B2]. Orthogonal factors of their QR
    decompositions change no norm, so that of R1 R2' is it; nothing cancels before the small product, which is exact to
    double precision.

    Args:
        first, second: A (out, rank) and B (rank, in); the two ranks may differ.
    """
    left = torch.cat([first[0].double(), -second[0].double()], dim=1)
    right = torch.cat([first[1].double(), second[1].double()]).t()
    r1, r2 = (torch.linalg.qr(stacked, mode="r").R for stacked in (left, right))
    return float(torch.linalg.vector_norm(r1 @ r2.t()))


def norm_of_product(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of left @ right, in double precision: |AB|^2 = sum (A'A) * (BB')."""
    left, right = left.double(), right.double()
    return float(((left.t() @ left) * (right @ right.t())).sum().clamp(min=0).sqrt())


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a matrix."""
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    return left, values, right


def leading_singular_vectors(matrix: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix and their vectors.

    Exact where the matrix is small against `count`, or of a rank not above it. Else by subspace iteration from a random
    start, which takes about 1% of the time: Halko, Martinsson and Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1. The
    approximation that it gives is off by less than 1.01 of the best one's error, whatever the spectrum.

    Args:
        matrix: (rows, columns), fp32, on any device.
        count: how many; no more are returned than the smaller side has.
        generator: of the CPU, so that the start is the same on every device.

    Returns:
        left (rows, n), values (n,) in falling order, right (n, columns).
    """
    width = count + OVERSAMPLING
    if 4 * width >= min(matrix.shape):
        left, values, right = svd(matrix)
    else:
        start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
        span = torch.linalg.qr(matrix @ start).Q
        for _ in range(ITERATIONS):
            span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ span).Q).Q
        left, values, right = svd(span.T @ matrix)
        left = span @ left
    return left[:, :count], values[:count], right[:count]


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
