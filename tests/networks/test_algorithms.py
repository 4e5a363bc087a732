"""What holds for every algorithm: it starts as nothing, its delta acts like its effect, its file is what was trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.core.adapter import LayerSpec
from networks.core.algorithms import ALGORITHMS, algorithm, algorithm_of
from tests.networks.cases import CASES, Case, acting, attached, changed, layer_and_input, new_adapter

EVERY = [pytest.param(case, layer, id=f"{case} on {layer}") for case in CASES for layer in case.layers]
everywhere = pytest.mark.parametrize(("case", "layer_name"), EVERY)


def test_every_algorithm_is_among_the_cases():
    assert {case.name for case in CASES} == set(ALGORITHMS)


@everywhere
def test_a_new_adapter_changes_nothing(case: Case, layer_name: str):
    layer, x = layer_and_input(layer_name)
    adapter = new_adapter(case, layer)
    torch.testing.assert_close(attached(layer, adapter, x), layer(x), rtol=1e-5, atol=1e-5)
    delta = adapter.delta_weight(layer.get_parameter("weight"))
    assert delta.abs().max() < 1e-5
    assert delta.shape == layer.get_parameter("weight").shape
    assert delta.dtype == torch.float32


@everywhere
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("multiplier", [-1.0, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_effect_on_the_output_is_that_of_the_changed_weight(case, layer_name, dtype, multiplier, training):
    layer, x = layer_and_input(layer_name)
    adapter = acting(new_adapter(case, layer)).train(training)
    adapter.multiplier = multiplier
    expected = changed(layer, adapter, x, multiplier)
    acts = (expected - layer(x)).abs().max() > 0.02
    assert acts == (multiplier != 0), "the adapter must act, or this test says nothing"
    layer, x = layer.to(dtype), x.to(dtype)
    out = attached(layer, adapter, x)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@everywhere
@torch.no_grad()
def test_a_row_at_a_strength_of_its_own_is_that_row_alone(case, layer_name):
    layer, x = layer_and_input(layer_name)
    adapter = acting(new_adapter(case, layer)).eval()
    strengths = torch.linspace(-0.5, 1.0, len(x))
    adapter.set_strength(strengths)
    together = attached(layer, adapter, x)
    alone = []
    for row, strength in enumerate(strengths.tolist()):
        adapter.set_strength(strength)
        alone.append(attached(layer, adapter, x[row : row + 1]))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    adapter.set_strength(0.7)
    assert (attached(layer, adapter, x) - together).abs().max() > 1e-3, "strengths must matter, or this test says nothing"


ON_LINEAR = [case for case in CASES if "linear" in case.layers]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", ON_LINEAR, ids=str)
def test_a_linear_layer_takes_a_single_vector(case, training):
    layer, x = layer_and_input("linear")
    adapter = acting(new_adapter(case, layer)).train(training)
    out = attached(layer, adapter, x[1, 2])
    torch.testing.assert_close(out, attached(layer, adapter, x)[1, 2], rtol=1e-5, atol=1e-5)


@everywhere
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_by_autocast_and_throughout_is_near(case, layer_name, dtype, training):
    layer, x = layer_and_input(layer_name)
    adapter = acting(new_adapter(case, layer)).train(training)
    expected = attached(layer, adapter, x)
    with torch.autocast("cpu", dtype):
        under_autocast = attached(layer, adapter, x)
    throughout = attached(layer.to(dtype), adapter.to(dtype), x.to(dtype))
    assert throughout.dtype == dtype
    tolerance = 4e-3 if dtype == torch.float16 else 3e-2
    for out in (under_autocast, throughout):
        torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@everywhere
def test_strength_zero_and_removal_give_the_base_bit_for_bit(case, layer_name):
    layer, x = layer_and_input(layer_name)
    adapter = acting(new_adapter(case, layer))
    base = layer(x)
    assert not torch.equal(attached(layer, adapter, x), base)
    assert torch.equal(layer(x), base)
    adapter.multiplier = 0.0
    assert torch.equal(attached(layer, adapter, x), base)


def _loss(out: torch.Tensor) -> torch.Tensor:
    """A loss that rotations change, which the plain sum of squares is not."""
    return (out - torch.linspace(-1, 1, out.numel()).view_as(out)).square().sum()


@everywhere
def test_gradients_are_those_of_the_formula_and_of_nothing_else(case, layer_name):
    layer, x = layer_and_input(layer_name)
    adapter = acting(new_adapter(case, layer)).train()
    x.requires_grad_()
    _loss(attached(layer, adapter, x)).backward()
    found = [parameter.grad for parameter in adapter.parameters()] + [x.grad]
    assert all(parameter.grad is None for parameter in layer.parameters())
    adapter.zero_grad()
    x.grad = None
    _loss(changed(layer, adapter, x)).backward()
    expected = [parameter.grad for parameter in adapter.parameters()] + [x.grad]
    for gradient, wanted in zip(found, expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@everywhere
def test_adapters_stack_in_any_order(case, layer_name):
    layer, x = layer_and_input(layer_name)
    first, second = (acting(new_adapter(case, layer), seed) for seed in (3, 4))
    orders = []
    for pair in ((first, second), (second, first)):
        handles = [layer.register_forward_hook(adapter.hook) for adapter in pair]
        orders.append(layer(x))
        for handle in handles:
            handle.remove()
    sum_of_effects = attached(layer, first, x) + attached(layer, second, x) - layer(x)
    for out in orders:
        torch.testing.assert_close(out, sum_of_effects, rtol=1e-4, atol=1e-4 * out.abs().max().item())


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_saved_and_read_again_is_the_same_change(case, layer_name, dtype):
    layer, _ = layer_and_input(layer_name)
    weight = layer.get_parameter("weight")
    adapter = acting(new_adapter(case, layer))
    tensors = {name: tensor.to(dtype) for name, tensor in adapter.tensors().items()}
    found = algorithm_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    again = algorithm(found).adapter.from_tensors(LayerSpec.of(layer), tensors)
    delta = adapter.delta_weight(weight)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(again.delta_weight(weight), delta, rtol=tolerance, atol=tolerance * delta.abs().max().item())
    if case.exact_round_trip:
        assert type(again) is type(adapter)
        assert again.rank == adapter.rank


@everywhere
def test_scaling_the_change_scales_its_norm(case, layer_name):
    layer, _ = layer_and_input(layer_name)
    rotates = case.name in ("oft", "boft")
    adapter = acting(new_adapter(case, layer), spread=0.1 if rotates else 0.3)
    weight = layer.get_parameter("weight")
    before = adapter.delta_norm(weight)
    with torch.no_grad():
        adapter.scale_delta_(torch.tensor(0.5))
    after = adapter.delta_norm(weight)
    if rotates:  # they have no exact half; what counts is that the norm falls about so far
        assert 0.4 * before < after < 0.75 * before
    else:
        torch.testing.assert_close(after, before / 2, rtol=1e-4, atol=1e-5)


HAS_ALPHA = [pytest.param(*each.values, id=each.id) for each in EVERY if algorithm(each.values[0].name).has_alpha]


@pytest.mark.parametrize(("case", "layer_name"), HAS_ALPHA)
def test_a_negative_alpha_turns_the_change_round_and_keeps_its_norm(case, layer_name):
    layer, _ = layer_and_input(layer_name)
    adapter = acting(new_adapter(case, layer))
    weight = layer.get_parameter("weight")
    delta, norm = adapter.delta_weight(weight), adapter.delta_norm(weight)
    adapter.scale = -adapter.scale
    if not adapter.reads_base:
        assert torch.equal(adapter.delta_weight(weight), -delta)
    assert norm > 0
    torch.testing.assert_close(adapter.delta_norm(weight), norm)


@everywhere
def test_a_compiled_layer_gives_the_same(case, layer_name):
    layer, x = layer_and_input(layer_name)
    adapter = acting(new_adapter(case, layer)).eval()
    expected = attached(layer, adapter, x)
    layer.register_forward_hook(adapter.hook)
    compiled = torch.compile(nn.Sequential(layer), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
