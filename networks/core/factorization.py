"""How LoKr, OFT and BOFT split a layer's width into two factors, as LyCORIS does it (its files are read by these sizes)."""

from __future__ import annotations

import math


def factorization(width: int, wanted: int = -1) -> tuple[int, int]:
    """Two factors of a width, the smaller one first.

    Args:
        width: at least 1.
        wanted: one of the factors, where it divides the width. Where it does not, the smaller factor becomes the largest
            one that does not exceed it; -1 makes the factors as equal as they can be.

    >>> factorization(320, 8), factorization(320, 7), factorization(320, 64), factorization(320)
    ((8, 40), (5, 64), (5, 64), (16, 20))
    """
    if wanted > 0 and width % wanted == 0:
        small, large = sorted((wanted, width // wanted))
        return small, large
    limit = math.isqrt(width) if wanted < 0 else min(wanted, math.isqrt(width))
    small = max((divisor for divisor in range(1, limit + 1) if width % divisor == 0), default=1)
    return small, width // small


def power_of_two_factorization(width: int, largest: int) -> tuple[int, int] | None:
    """An even factor of a width that leaves a power of two: the largest such one that does not exceed `largest`.

    Returns:
        The even factor and the power of two; None where there are no such factors.

    >>> power_of_two_factorization(320, 16), power_of_two_factorization(320, 8)
    ((10, 32), None)
    """
    factor = smallest_even_factor(width)
    if factor is None or factor > largest:
        return None
    while factor * 2 <= min(largest, width):
        factor *= 2
    return factor, width // factor


def smallest_even_factor(width: int) -> int | None:
    """The smallest even factor of a width that leaves a power of two; None of an odd width.

    >>> smallest_even_factor(320), smallest_even_factor(768), smallest_even_factor(1024), smallest_even_factor(77)
    (10, 6, 2, None)
    """
    if width % 2:
        return None
    odd_part = width // (width & -width)
    return 2 * odd_part
