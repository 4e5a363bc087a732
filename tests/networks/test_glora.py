"""GLoRA: the change through the base weight and the one beside it, and files under both namings."""

from __future__ import annotations

import pytest
import torch

from networks import glora
from networks.core.adapter import LayerSpec
from networks.formats.traits import is_old_glora
from networks.glora import GLoRAModule, glora_delta, in_our_naming, other_naming
from tests.networks.cases import acting, attached, layer_and_input, stream
from tests.networks.double_precision import assert_same_output_and_gradients
from tests.networks.lycoris_layers import lycoris_module, output_with, read_by_lycoris

every_layer = pytest.mark.parametrize("layer_name", ["linear", "square", "conv 1x1", "conv 3x3"])


def new(layer_name: str, rank: int = 3, **settings):
    """Layer, input, and an adapter as training begins with it."""
    layer, x = layer_and_input(layer_name)
    adapter = GLoRAModule(LayerSpec.of(layer), **{"rank": rank, "alpha": 2.0} | settings)
    adapter.initialise(stream(), layer.weight)
    return layer, x, adapter


@every_layer
def test_output_and_gradients_are_those_of_the_formula(layer_name):
    layer, x, adapter = new(layer_name)

    def formula(leaves, weight, bias):
        a1, a2, b1, b2 = (leaves[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        through = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
        return weight + 2 / 3 * (through + torch.einsum("or,rn->on", b1, b2).reshape(weight.shape)), bias

    assert_same_output_and_gradients(acting(adapter), layer, x, formula)


@every_layer
def test_one_half_alone_is_lora_or_a_change_of_the_input(layer_name):
    layer, _, adapter = new(layer_name)
    a1, a2, b1, b2 = (value.detach() for value in acting(adapter).parameters())
    beside = glora_delta(layer.weight, torch.zeros_like(a1), a2, b1, b2, 1.0)
    torch.testing.assert_close(beside.flatten(1), b1.flatten(1) @ b2.flatten(1))
    through = glora_delta(layer.weight, a1, a2, torch.zeros_like(b1), b2, 1.0)
    mixed = (a1.flatten(1) @ a2.flatten(1)).t()
    torch.testing.assert_close(through, torch.einsum("oi...,ji->oj...", layer.weight, mixed), rtol=1e-4, atol=1e-5)


def test_the_second_factors_start_at_zero_and_are_the_ones_that_lora_plus_trains_faster():
    _, _, adapter = new("conv 3x3")
    zero = [name for name, value in adapter.named_parameters() if not value.any()]
    assert zero == ["a1.weight", "b1.weight"]
    assert adapter.plus_parameters() == [adapter.a1.weight, adapter.b1.weight]
    bound = 1 / adapter.b2.weight[0].numel() ** 0.5
    assert 0.9 * bound < adapter.b2.weight.abs().max() <= bound


def test_the_scale_is_alpha_over_rank_and_travels_with_the_file(sd1):
    network = glora.create_network(1.0, 4, 2, None, None, sd1.unet, rs_lora="True", conv_dim=2)
    adapters = [adapter for _, adapter in network.items()]
    assert {adapter.scale for adapter in adapters if not adapter.spec.is_wide} == {1.0}  # 2 / sqrt 4
    layer, _, adapter = new("linear", rank=4, alpha=3.0)
    tensors = adapter.tensors()
    assert tensors.keys() == {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"}
    assert GLoRAModule.from_tensors(LayerSpec.of(layer), tensors).scale == 0.75
    without = {name: value for name, value in tensors.items() if name != "alpha"}
    assert GLoRAModule.from_tensors(LayerSpec.of(layer), without).scale == 1.0


# Namings


@every_layer
def test_the_older_naming_is_read_to_the_same_change(layer_name):
    layer, x, adapter = new(layer_name)
    old = other_naming(acting(adapter).tensors())
    assert old["a1.weight"].flatten(1).shape == (3, layer.weight.shape[1])
    assert old["b2.weight"].flatten(1).shape == (layer.weight.shape[0], 3)
    # In the words of those files: W' = W + scale * ((W a2) a1 + b2 b1)
    a1, a2, b1, b2 = (old[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    expected = 2 / 3 * (torch.einsum("oi...,ir,rj->oj...", layer.weight, a2, a1) + (b2 @ b1).reshape(layer.weight.shape))
    read = GLoRAModule.from_tensors(LayerSpec.of(layer), old)
    torch.testing.assert_close(read.delta_weight(layer.weight), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(attached(layer, read, x), attached(layer, adapter, x))
    assert all(torch.equal(value, adapter.tensors()[name]) for name, value in read.tensors().items())
    again = new(layer_name)[2]
    again.load_tensors(old)
    assert torch.equal(again.delta_weight(layer.weight), adapter.delta_weight(layer.weight))


@pytest.mark.parametrize(("weight_shape", "rank"), [((4, 8), 8), ((8, 4), 8), ((8, 8, 3, 3), 8), ((8, 8), 4)])
def test_one_pair_of_shapes_that_tells_is_enough(weight_shape, rank):
    spec = LayerSpec(weight_shape=weight_shape)
    tensors = GLoRAModule(spec, rank=rank, alpha=1.0).tensors()
    assert in_our_naming(spec, other_naming(tensors)).keys() == tensors.keys()
    assert all(value is tensors[name] for name, value in in_our_naming(spec, other_naming(tensors)).items())
    assert all(value is tensors[name] for name, value in in_our_naming(spec, tensors).items())


@pytest.mark.parametrize(
    ("weight_shape", "rank"),
    [((16, 4, 3, 3), 8), ((4, 16, 3, 3), 8), ((4, 16), 8), ((16, 4), 4), ((16, 16), 4), ((16, 16, 3, 3), 4), ((16, 16), 16)],
)
def test_shapes_alone_tell_the_naming_as_well(weight_shape, rank):
    tensors = GLoRAModule(LayerSpec(weight_shape=weight_shape), rank=rank, alpha=1.0).tensors()
    assert not is_old_glora({name: tuple(value.shape) for name, value in tensors.items()})
    old = {name: tuple(value.shape) for name, value in other_naming(tensors).items()}
    assert is_old_glora(old) == (weight_shape != (16, 16) or rank != 16)


def test_where_shapes_do_not_tell_the_newer_naming_is_taken():
    spec = LayerSpec(weight_shape=(8, 8))
    tensors = {name: torch.randn(value.shape) for name, value in GLoRAModule(spec, rank=8, alpha=8.0).tensors().items()}
    assert all(value is tensors[name] for name, value in in_our_naming(spec, tensors).items())


def test_naming_the_other_way_twice_is_naming_as_before():
    tensors = GLoRAModule(LayerSpec(weight_shape=(6, 5)), rank=2, alpha=1.0).tensors()
    assert all(value is tensors[name] for name, value in other_naming(other_naming(tensors)).items())


def test_what_does_not_fit_is_refused():
    spec = LayerSpec(weight_shape=(6, 5))
    tensors = GLoRAModule(spec, rank=2, alpha=1.0).tensors()
    with pytest.raises(ValueError, match=r"do not fit the layer \(7, 5\): a1.weight \(5, 2\)"):
        GLoRAModule.from_tensors(LayerSpec(weight_shape=(7, 5)), tensors)
    with pytest.raises(ValueError, match="do not fit"):
        GLoRAModule.from_tensors(spec, {name: value for name, value in tensors.items() if name != "b1.weight"})
    with pytest.raises(ValueError, match="do not fit"):
        GLoRAModule.from_tensors(spec, {**tensors, "a2.weight": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"alpha is .*, the layer wants \(\)"):
        GLoRAModule.from_tensors(spec, {**tensors, "alpha": torch.ones(2)})
    with pytest.raises(ValueError, match="bm.weight"):
        GLoRAModule.from_tensors(spec, {**tensors, "bm.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="at least 1"):
        GLoRAModule(spec, rank=0, alpha=1.0)
    with pytest.raises(ValueError, match="grouped"):
        GLoRAModule(LayerSpec(weight_shape=(6, 5, 1, 1), groups=2), rank=1, alpha=1.0)


# LyCORIS


@pytest.mark.parametrize("multiplier", [1.0, -0.5])
@every_layer
def test_lycoris_reads_our_tensors_to_the_same_output(layer_name, multiplier):
    layer, x, adapter = new(layer_name)
    theirs = read_by_lycoris(layer, acting(adapter).tensors())
    adapter.multiplier = theirs.multiplier = multiplier
    ours = attached(layer, adapter, x)
    assert (ours - layer(x)).abs().max() > 0.05
    torch.testing.assert_close(ours, output_with(layer, theirs, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_layer
def test_we_read_lycoris_tensors_to_the_same_output(layer_name, dtype):
    layer, x = layer_and_input(layer_name)
    theirs = lycoris_module("GLoRAModule", layer, lora_dim=3, alpha=2)
    tensors = {name: value.detach().to(dtype) for name, value in theirs.state_dict().items()}
    adapter = GLoRAModule.from_tensors(LayerSpec.of(layer), tensors)
    assert adapter.rank == 3
    assert adapter.tensors().keys() == tensors.keys()
    expected = output_with(layer, theirs, x)
    assert (expected - layer(x)).abs().max() > 0.05
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    limit = tolerance * expected.abs().max().item()
    torch.testing.assert_close(attached(layer, adapter, x), expected, rtol=tolerance, atol=limit)
