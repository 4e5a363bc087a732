"""(IA)3: factors along outputs or inputs, which layers get which, and files exchanged with LyCORIS."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from networks import ia3
from networks.core.adapter import LayerSpec
from networks.ia3 import IA3Module
from tests.networks.cases import acting, attached, layer_and_input
from tests.networks.double_precision import assert_same_output_and_gradients
from tests.networks.lycoris_layers import lycoris_module, output_with

every_layer = pytest.mark.parametrize("layer_name", ["linear", "square", "conv 1x1", "conv 3x3"])
both_sides = pytest.mark.parametrize("on_input", [False, True], ids=["outputs", "inputs"])


def new(layer_name: str, on_input: bool):
    """Layer, input, and an adapter that acts."""
    layer, x = layer_and_input(layer_name)
    return layer, x, acting(IA3Module(LayerSpec.of(layer), train_on_input=on_input))


@both_sides
@every_layer
def test_output_and_gradients_are_those_of_the_formula(layer_name, on_input):
    layer, x, adapter = new(layer_name, on_input)

    def formula(leaves, weight, bias):
        factors = 1 + leaves["weight"].flatten()
        return torch.einsum("oi...,i->oi..." if on_input else "oi...,o->oi...", weight, factors), bias

    assert_same_output_and_gradients(adapter, layer, x, formula)


def test_the_bias_is_not_scaled():
    layer, x, adapter = new("linear", on_input=False)
    torch.nn.init.constant_(adapter.weight, -1.0)
    torch.testing.assert_close(attached(layer, adapter, x), layer.bias.expand(3, 7, 24), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer_name", "on_input", "shape"),
    [
        ("linear", False, (24,)),
        ("linear", True, (16,)),
        ("conv 3x3", False, (1, 12, 1, 1)),
        ("conv 3x3", True, (1, 8, 1, 1)),
    ],
)
def test_tensors_have_the_names_and_shapes_of_the_field(layer_name, on_input, shape):
    tensors = new(layer_name, on_input)[2].tensors()
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {"weight": shape, "on_input": ()}
    assert tensors["on_input"].item() == on_input


def test_the_file_says_the_direction_on_a_square_layer_too():
    layer, x, on_inputs = new("square", on_input=True)
    adapter = IA3Module(LayerSpec.of(layer))
    adapter.load_tensors(on_inputs.tensors())
    assert torch.equal(attached(layer, adapter, x), attached(layer, on_inputs, x))
    assert adapter.variant == "(IA)3 on inputs"


def test_factors_in_any_shape_are_read():
    """SD2's projections are Linear layers in a folder and 1x1 convolutions in a file."""
    values = torch.arange(4.0)
    tensors = {"weight": values, "on_input": torch.tensor([1.0])}
    adapter = IA3Module.from_tensors(LayerSpec(weight_shape=(6, 4, 1, 1)), tensors)
    assert torch.equal(adapter.delta_weight(torch.ones(6, 4, 1, 1))[0].flatten(), values)
    wide = {"weight": values.view(1, 4, 1, 1), "on_input": torch.tensor(1)}
    adapter = IA3Module.from_tensors(LayerSpec(weight_shape=(6, 4)), wide)
    assert torch.equal(adapter.delta_weight(torch.ones(6, 4))[0], values)


def test_what_does_not_fit_is_refused():
    spec = LayerSpec(weight_shape=(6, 4))
    with pytest.raises(ValueError, match="no .IA.3 layer"):
        IA3Module.from_tensors(spec, {"weight": torch.zeros(6)})
    with pytest.raises(ValueError, match=r"weight is .*, the layer wants"):
        IA3Module.from_tensors(spec, {"weight": torch.zeros(4), "on_input": torch.tensor(0.0)})
    with pytest.raises(ValueError, match=r"on_input is .*, the layer wants \(\)"):
        IA3Module.from_tensors(spec, {"weight": torch.zeros(6), "on_input": torch.zeros(2)})
    with pytest.raises(ValueError, match="without groups"):
        IA3Module(LayerSpec(weight_shape=(6, 2, 1, 1), groups=2))


# Networks


def test_the_papers_layers_in_the_papers_direction(sd1, tmp_path):
    network = ia3.create_network(1.0, None, None, None, sd1.text_encoder, sd1.unet)
    sides = {}
    for target, adapter in network.items():
        sides.setdefault(adapter.scales_input, set()).add(".".join(target.path.split(".")[-2:]))
    assert sides == {
        True: {"net.2", "mlp.fc2"},
        False: {"attn1.to_k", "attn1.to_v", "attn2.to_k", "attn2.to_v", "self_attn.k_proj", "self_attn.v_proj"},
    }
    network.save_weights(tmp_path / "a.safetensors", torch.float16, {})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        variants = json.loads(file.metadata()["ss_network_variants"])
    assert set(variants) == {"(IA)3 on inputs", "(IA)3 on outputs"}
    again, _ = ia3.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, sd1.text_encoder, sd1.unet)
    assert [adapter.scales_input for _, adapter in again.items()] == [adapter.scales_input for _, adapter in network.items()]


def test_the_direction_that_is_asked_for_comes_before_the_papers(sd1):
    network = ia3.create_network(1.0, None, None, None, None, sd1.unet, train_on_input="False")
    assert {adapter.scales_input for _, adapter in network.items()} == {False}


def test_other_layers_get_the_direction_that_is_asked_for(sd1):
    for given, expected in ((None, False), ("True", True)):
        network = ia3.create_network(1.0, None, None, None, None, sd1.unet, preset="attn-mlp", train_on_input=given)
        assert {adapter.scales_input for _, adapter in network.items()} == {expected}


# LyCORIS


@pytest.mark.parametrize("multiplier", [1.0, -0.5])
@both_sides
@every_layer
def test_lycoris_loads_our_tensors_to_the_same_output(layer_name, on_input, multiplier):
    layer, x, adapter = new(layer_name, on_input)
    # Its own reader of single layers raises a TypeError; its networks load into modules like this one.
    theirs = lycoris_module("IA3Module", layer, train_on_input=on_input)
    theirs.load_state_dict(adapter.tensors())
    adapter.multiplier = theirs.multiplier = multiplier
    ours = attached(layer, adapter, x)
    assert (ours - layer(x)).abs().max() > 0.05
    torch.testing.assert_close(ours, output_with(layer, theirs, x), rtol=1e-4, atol=1e-5)


@both_sides
@every_layer
def test_we_read_lycoris_tensors_to_the_same_output(layer_name, on_input):
    layer, x = layer_and_input(layer_name)
    theirs = lycoris_module("IA3Module", layer, train_on_input=on_input)
    tensors = {name: value.detach() for name, value in theirs.state_dict().items()}
    adapter = IA3Module.from_tensors(LayerSpec.of(layer), tensors)
    assert {name: value.shape for name, value in adapter.tensors().items()} == {n: v.shape for n, v in tensors.items()}
    expected = output_with(layer, theirs, x)
    assert (expected - layer(x)).abs().max() > 0.05
    torch.testing.assert_close(attached(layer, adapter, x), expected, rtol=1e-4, atol=1e-5)
