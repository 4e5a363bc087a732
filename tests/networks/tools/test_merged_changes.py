"""The merged change of one layer, for every pair of forms of algorithms and every kind of layer, against plain sums."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from networks.core.products import svd
from networks.formats.file_adapters import adapter_of_layer
from networks.tools.conversion import DOWN, SourceLayer
from networks.tools.dense_merging import Method, largest
from networks.tools.merged_changes import Arithmetic, RankLimit, tensors_of, wanted_change, written_change
from tests.networks.cases import CASES, acting, layer_and_input, new_adapter

KINDS = ("linear", "conv 1x1", "conv 3x3")
RATIOS = itertools.cycle([(0.5, 0.25), (1.5, -0.75), (-1.0, 2.0), (0.0, 1.0), (0.3, 0.0)])


def source(case, kind, seed):
    """A layer of a file with a form of an algorithm, and the base weight that it knows."""
    layer, _ = layer_and_input(kind)
    adapter = acting(new_adapter(case, layer), seed)
    weight = layer.get_parameter("weight")
    base = SimpleNamespace(weight=lambda _name: weight, model=SimpleNamespace(path="base"))
    tensors = {name: tensor.detach().clone() for name, tensor in adapter.tensors().items()}
    read = adapter_of_layer("layer", tensors, adapter.spec)
    return SourceLayer(name="layer", tensors=tensors, adapter=read, base=base), weight  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [case for case in CASES if case.name != "norm"], ids=str)
def test_the_merged_layer_is_the_sum_with_any_other(first, kind):
    for second in [case for case in CASES if kind in case.layers and kind in first.layers]:
        ratios, ((one, weight), (other, _)) = next(RATIOS), (source(first, kind, 1), source(second, kind, 2))
        change = wanted_change([(ratios[0], one), (ratios[1], other)], Arithmetic())
        tensors, _ = tensors_of(change, None)
        meant = adapter_of_layer("layer", tensors, change.spec).delta_weight(weight)
        deltas = [each.known_adapter().delta_weight(weight).double() for each in (one, other)]
        expected = ratios[0] * deltas[0] + ratios[1] * deltas[1]
        assert (meant - expected).norm() <= 1e-5 * expected.norm() + 1e-6, second
        assert change.distance(written_change(tensors, change.spec)) <= 1e-5 * expected.norm() + 1e-6
        if DOWN in tensors:
            assert len(tensors[DOWN]) <= min(weight.flatten(1).shape)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 6, 100])
def test_cut_by_thin_factors_the_sum_is_that_of_the_dense_computation(kind, rank):
    one, other = (source(CASES[0], kind, seed)[0] for seed in (1, 2))
    change = wanted_change([(0.7, one), (-1.2, other)], Arithmetic())
    tensors, _ = tensors_of(change, RankLimit(rank=rank, conv_rank=rank))
    dense = 0.7 * one.delta().double() - 1.2 * other.delta().double()
    left, values, right = torch.linalg.svd(dense.flatten(1), full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    written = written_change(tensors, change.spec)
    assert (written.matrix() - best).norm() <= 1e-5 * best.norm()
    lost = (dense.flatten(1) - best).norm()
    assert abs(change.distance(written) - lost) <= 1e-5 * dense.norm()
    assert abs(change.norm() - dense.norm()) <= 1e-5 * dense.norm()


@torch.no_grad()
def test_a_conv_rank_is_that_of_kernels_alone():
    limit = RankLimit(rank=2, conv_rank=3)
    for kind, rank in (("linear", 2), ("conv 1x1", 2), ("conv 3x3", 3)):
        change = wanted_change([(1.0, source(CASES[0], kind, 1)[0])], Arithmetic())
        assert len(tensors_of(change, limit)[0][DOWN]) == rank


# Methods that look at single values


def changes(count=3):
    stream = torch.Generator().manual_seed(4)
    return [torch.randn(6, 8, generator=stream) for _ in range(count)], [0.5, -1.0, 2.0][:count]


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_and_magnitude_are_those_of_peft(density):
    from peft.utils import merge_utils

    tensors, ratios = changes()
    for name, theirs in (("ties", merge_utils.ties), ("magnitude", merge_utils.magnitude_prune)):
        ours = Method(name=name, density=density).combine("layer", tensors, ratios)
        # peft elects signs before its weights; here they count, as if the adapters had been trained so
        weighted = [ratio * tensor for ratio, tensor in zip(ratios, tensors, strict=True)]
        torch.testing.assert_close(ours, theirs(weighted, torch.ones(3), density))


def test_dare_keeps_a_random_share_scaled_up_and_repeats_itself():
    method, ones = Method(name="dare", density=0.25, seed=7), [torch.ones(100, 100)]
    merged = method.combine("layer", ones, [3.0])
    assert merged.unique().tolist() == [0.0, 12.0]
    assert float(merged.mean()) == pytest.approx(3.0, rel=0.1)
    assert torch.equal(merged, method.combine("layer", ones, [3.0]))
    for other in (Method(name="dare", density=0.25, seed=8).combine("layer", ones, [3.0]), method.combine("x", ones, [3.0])):
        assert not torch.equal(merged, other)
    two = method.combine("layer", [*ones, *ones], [1.0, 1.0])
    assert set(two.unique().tolist()) == {0.0, 4.0, 8.0}


@torch.no_grad()
def test_a_method_acts_on_the_change_of_the_weight():
    one, other = (source(CASES[0], "linear", seed)[0] for seed in (1, 2))
    method = Method(name="ties", density=0.3)
    change = wanted_change([(1.0, one), (0.5, other)], Arithmetic(method=method))
    expected = method.combine("layer", [one.delta(), other.delta()], [1.0, 0.5])
    torch.testing.assert_close(change.matrix(), expected.flatten(1))
    written = written_change(tensors_of(change, RankLimit(rank=4, conv_rank=4))[0], change.spec)
    values = svd(expected.flatten(1))[1]
    assert change.distance(written) == pytest.approx(float(values[4:].norm()), rel=1e-4)


@pytest.mark.parametrize("values", [[3.0, -5, 1, 4, 0, -2], [2.0, -2, 2, 2, -2, 2], [0.0, 0, 0, 0, 0, 1]])
@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_as_many_of_the_largest_values_are_kept_as_were_asked_for(values, count):
    change = torch.tensor(values).view(2, 3)
    kept = largest(change, count / 6 + 1e-9)
    chosen = change.flatten()[change.flatten().abs().argsort(descending=True)[:count]]
    assert kept.abs().flatten().sort().values[6 - count :].tolist() == sorted(chosen.abs().tolist())
    assert (kept != 0).sum() <= count
    assert torch.equal(kept[kept != 0], change[kept != 0])
