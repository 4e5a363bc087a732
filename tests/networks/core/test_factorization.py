"""Widths in two factors: the sizes that files of the field have."""

from __future__ import annotations

import pytest

from networks.core.factorization import factorization, power_of_two_factorization, smallest_even_factor

WIDTHS = (1, 2, 7, 77, 127, 128, 250, 320, 360, 512, 640, 768, 1024, 1280, 2048, 2560, 3072, 5120, 10240)
WANTED = (*range(1, 33), 40, 64, 100, 128, 320, 20000)


@pytest.mark.parametrize(
    ("width", "equal", "four", "eight", "sixteen"),
    [
        (320, (16, 20), (4, 80), (8, 40), (16, 20)),
        (640, (20, 32), (4, 160), (8, 80), (16, 40)),
        (768, (24, 32), (4, 192), (8, 96), (16, 48)),
        (1280, (32, 40), (4, 320), (8, 160), (16, 80)),
        (2048, (32, 64), (4, 512), (8, 256), (16, 128)),
        (10240, (80, 128), (4, 2560), (8, 1280), (16, 640)),
    ],
)
def test_known_sizes(width, equal, four, eight, sixteen):
    assert [factorization(width, wanted) for wanted in (-1, 4, 8, 16)] == [equal, four, eight, sixteen]


@pytest.mark.parametrize("width", WIDTHS)
def test_factors_are_factors_and_the_smaller_one_comes_first(width):
    for wanted in (-1, *WANTED):
        small, large = factorization(width, wanted)
        assert small * large == width
        assert small <= large


def test_even_factors_that_leave_a_power_of_two():
    assert power_of_two_factorization(320, 16) == (10, 32)
    assert power_of_two_factorization(768, 8) == (6, 128)
    assert power_of_two_factorization(768, 16) == (12, 64)
    assert [power_of_two_factorization(2048, largest) for largest in (4, 8, 16)] == [(4, 512), (8, 256), (16, 128)]
    assert power_of_two_factorization(320, 1000) == (320, 1)


@pytest.mark.parametrize("width", [320, 640, 1280, 2560, 5120, 10240])
def test_the_u_nets_widths_need_blocks_of_ten(width):
    assert smallest_even_factor(width) == 10
    assert power_of_two_factorization(width, 8) is None
    assert power_of_two_factorization(width, 10) == (10, width // 10)


def test_an_odd_width_has_no_even_factor():
    assert smallest_even_factor(77) is None
    assert power_of_two_factorization(77, 100) is None


def test_the_same_sizes_as_lycoris():
    theirs = pytest.importorskip("lycoris.functional.general")
    for width in WIDTHS:
        assert factorization(width) == theirs.factorization(width)
        for wanted in WANTED:
            assert factorization(width, wanted) == theirs.factorization(width, wanted)
            pair = theirs.power2factorization(width, wanted)
            assert power_of_two_factorization(width, wanted) == (tuple(pair) if pair[1] else None)
