"""Singular values of products, and of every algorithm's factors."""

from __future__ import annotations

import pytest
import torch

from networks.core.additive import AdditiveAdapter
from networks.core.products import (
    balanced_factors,
    effective_rank,
    norm_of_difference,
    norm_of_product,
    rank_within,
    singular_values_of_product,
    svd,
    svd_of_kronecker,
    svd_of_product,
)
from tests.networks.cases import CASES, acting, layer_and_input, new_adapter, stream


@pytest.mark.parametrize("rank", [3, 20])
def test_values_of_a_product_are_those_of_the_matrix(rank):
    left, right = torch.randn(12, rank, generator=stream(1)), torch.randn(rank, 16, generator=stream(2))
    values = singular_values_of_product(left, right)
    torch.testing.assert_close(values, torch.linalg.svdvals(left @ right)[: len(values)])
    assert len(values) == min(rank, 12)
    u, s, v = svd_of_product(left, right)
    torch.testing.assert_close((u * s) @ v, left @ right, rtol=1e-4, atol=1e-4)


def test_effective_rank_counts_equal_directions_fully_and_weak_ones_little():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert 1 < effective_rank(torch.tensor([1.0, 0.01])) < 1.1
    assert effective_rank(torch.zeros(4)) == 0


def test_the_rank_within_an_error_is_the_lowest_that_keeps_it():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])
    norm = 14**0.5
    assert rank_within(values, 0) == 3
    assert rank_within(values, 1.01 / norm) == 2
    assert rank_within(values, 0.99 / norm) == 3
    assert rank_within(torch.zeros(3), 0) == 1
    matrix = torch.randn(6, 9, generator=stream(3))
    u, s, v = svd_of_product(matrix, torch.eye(9))
    up, down = balanced_factors(u, s, v, 4)
    assert float(torch.linalg.vector_norm(matrix - up @ down)) == pytest.approx(float(s[4:].norm()), rel=1e-4)
    assert float(up.norm()) == pytest.approx(float(down.norm()), rel=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_values_of_factors_are_those_of_the_change(case):
    for name in case.layers:
        layer, _ = layer_and_input(name)
        adapter = acting(new_adapter(case, layer))
        values = adapter.singular_values()
        if values is None:
            continue
        dense = torch.linalg.svdvals(adapter.own_delta().flatten(1))
        torch.testing.assert_close(values, dense[: len(values)], rtol=1e-3, atol=1e-4)
        assert bool((dense[len(values) :] < 1e-4).all())


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_a_change_that_does_not_read_the_base_is_the_same_on_any(case):
    layer, _ = layer_and_input(case.layers[0])
    adapter = acting(new_adapter(case, layer))
    weight = layer.get_parameter("weight")
    same = torch.equal(adapter.delta_weight(weight), adapter.delta_weight(weight + 1))
    assert same is not adapter.reads_base


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_every_spelling_means_the_same(case):
    layer, _ = layer_and_input(case.layers[0])
    adapter = acting(new_adapter(case, layer))
    expected = adapter.delta_weight(layer.get_parameter("weight"))
    for tensors in adapter.spellings():
        read = type(adapter).from_tensors(adapter.spec, tensors)
        torch.testing.assert_close(read.delta_weight(layer.get_parameter("weight")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [0.0, 1e-12, 1e-7, 1e-3, 1.0])
def test_norms_of_differences_do_not_drown(change):
    left, right = (torch.randn(shape, generator=stream(4), dtype=torch.float64) for shape in ((30, 4), (4, 20)))
    other = left + change * torch.randn(left.shape, generator=stream(5), dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(4, 4, generator=stream(6), dtype=torch.float64)).Q
    exact = float(torch.linalg.vector_norm((left - other) @ right))
    found = norm_of_difference((left, right), (other @ turned, turned.t() @ right))
    assert found == pytest.approx(exact, rel=1e-2 if change < 1e-9 else 1e-6, abs=1e-13)
    assert norm_of_product(left, right) == pytest.approx(float(torch.linalg.vector_norm(left @ right)))


def test_a_kronecker_product_is_decomposed_by_its_factors():
    low = torch.randn(6, 2, generator=stream(7)) @ torch.randn(2, 10, generator=stream(8))
    full = torch.randn(4, 3, generator=stream(9))
    left, values, right = svd_of_kronecker(svd(full), svd(low))
    product = torch.kron(full, low)
    assert len(values) == 3 * 2
    torch.testing.assert_close((left * values) @ right, product, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, torch.linalg.svdvals(product)[:6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.t() @ left, torch.eye(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_decompositions_and_products_are_those_of_the_change(case):
    for name in case.layers:
        layer, _ = layer_and_input(name)
        adapter = acting(new_adapter(case, layer))
        if not isinstance(adapter, AdditiveAdapter) or adapter.singular_values() is None:
            continue
        left, values, right = adapter.svd()
        dense = adapter.own_delta().flatten(1)
        close = {"rtol": 1e-4, "atol": 1e-5 * float(dense.norm())}
        torch.testing.assert_close((left * values) @ right, dense, **close)
        product = adapter.product()
        if product is not None:
            torch.testing.assert_close(product[0] @ product[1], dense, **close)
