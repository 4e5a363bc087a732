"""How LoRA's factors begin: the default, PiSSA, OLoRA, orthogonal.

All take the weight as a matrix (out, in * kernel) and fill `down` (rank, in, ...) and `up` (out, rank, ...) in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from library.errors import UserError, near_names
from networks.core.products import leading_singular_vectors

Start = Literal["default", "pissa", "olora", "orthogonal"]


def read_start(text: str, name: str) -> Start:
    """The value of the argument `init`; see `arguments.Parser`.

    Raises:
        UserError: an unknown name, with the known ones.
    """
    for start in get_args(Start):
        if text.strip().lower() == start:
            known: Start = start
            return known
    raise UserError(f"'{text}' is no way to start", where=f"--network_args {name}", remedy=near_names(text, get_args(Start)))


def default_start(down: Tensor, up: Tensor, generator: torch.Generator) -> None:
    """`down` as torch's own Linear layers start (Kaiming uniform, a = sqrt 5), `up` zero: no change at all."""
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    nn.init.zeros_(up)


@torch.no_grad()
def orthogonal_start(down: Tensor, up: Tensor, generator: torch.Generator) -> None:
    """Both factors at random, but up @ down = 0: each goes through one half of an orthogonal basis of the rank's space.

    `down = Q1' A / 10` and `up = B Q2 / 10` with normal A and B, where Q1 and Q2 (rank / 2, rank) are the halves; after
    https://datta0.github.io/posts/rethink-lora-init, with the spread that it and PEFT use.

    Raises:
        ValueError: an odd rank.
    """
    rank = len(down)
    check_orthogonal(rank)
    basis = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    first, second = basis[: rank // 2], basis[rank // 2 :]
    down.copy_((first.T @ torch.randn(rank // 2, down[0].numel(), generator=generator) / 10).view(down.shape))
    up.copy_((torch.randn(len(up), rank // 2, generator=generator) @ second / 10).view(up.shape))


def check_orthogonal(rank: int) -> None:
    """Refuse a rank that has no halves.

    Raises:
        ValueError: an odd rank.
    """
    if rank % 2:
        raise ValueError(f"init=orthogonal needs an even rank, not {rank}")


def principal_factors(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """PiSSA: the weight's largest singular values and vectors, shared evenly by the factors.

    Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    arXiv:2404.02948.

    Returns:
        down (n, columns) and up (rows, n); n is the rank, or the weight's smaller side where that is less.
    """
    left, values, right = leading_singular_vectors(weight, rank, generator)
    roots = values.sqrt()
    return roots[:, None] * right, left * roots


def orthonormal_factors(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """OLoRA: the first columns of Q and rows of R of the weight's QR decomposition; nothing is drawn.

    Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv:2406.01775. The first
    columns of Q follow from the same columns of the weight, so these alone are decomposed.

    Returns:
        As `principal_factors`.
    """
    columns = torch.linalg.qr(weight[:, :rank]).Q
    return columns.T @ weight, columns


PRINCIPAL_STARTS: dict[str, Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "pissa": principal_factors,
    "olora": orthonormal_factors,
}
"""The starts that take a part of the base weight, whose product is therefore not zero."""


@torch.no_grad()
def principal_start(
    start: Start, down: Tensor, up: Tensor, weight: Tensor, scale: float, generator: torch.Generator
) -> None:
    """Fill the factors with a part of the weight, so that `scale * up @ down` is that part for PiSSA, and as PEFT does for
    OLoRA, whose orthonormal `up` stays as it is.

    Ranks beyond the weight's own stay as they are. The computation is in fp32 on the CPU.

    Args:
        weight: (out, in, ...).
        scale: alpha / rank.
    """
    matrix = weight.detach().to("cpu", torch.float32).flatten(1)
    found_down, found_up = PRINCIPAL_STARTS[start](matrix, len(down), generator)
    share = 1.0 if start == "olora" else math.sqrt(scale)
    count = len(found_down)
    down[:count] = (found_down / share).view(count, *down.shape[1:])
    up[:, :count] = (found_up / share).view(len(up), count, *up.shape[2:])


def since_start(down: Tensor, up: Tensor, start_down: Tensor, start_up: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of `up @ down - start_up @ start_down`, each as small as that difference itself,

        (up - start_up) @ down + start_up @ (down - start_down)

    so that half precision rounds the difference, and not the much larger parts of the base.

    Args:
        down, start_down: (rank, in, ...).
        up, start_up: (out, rank, ...).

    Returns:
        down (2 rank, in, ...) and up (out, 2 rank, ...).
    """
    return torch.cat([down, down - start_down]), torch.cat([up - start_up, start_up], dim=1)


def start_and_now(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reverse of `since_start`, for any factors of twice the rank: down, up, start_down, start_up."""
    (now_down, change_down), (change_up, start_up) = down.chunk(2), up.chunk(2, dim=1)
    return now_down, start_up + change_up, now_down - change_down, start_up
