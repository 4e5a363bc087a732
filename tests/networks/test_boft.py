"""BOFT: rotations in butterfly stages, the widths that they are for, and files exchanged with LyCORIS."""

from __future__ import annotations

import math

import pytest
import torch

from library.errors import UserError
from networks import boft
from networks.boft import BOFTModule, turn_in_stages
from networks.core.adapter import LayerSpec
from networks.core.rotation import skew
from tests.networks.cases import acting, attached, changed, layer_and_input, stream
from tests.networks.double_precision import assert_same_output_and_gradients
from tests.networks.lycoris_layers import lycoris_module, output_with, read_by_lycoris

every_layer = pytest.mark.parametrize("layer_name", ["linear", "square", "conv 1x1", "conv 3x3"])
every_form = pytest.mark.parametrize(
    "settings", [{}, {"constraint": 0.02}, {"rescaled": True}], ids=["plain", "limited", "rescaled"]
)


def new(layer_name: str, rank: int = 6, **settings):
    """Layer, input, and an adapter that acts."""
    layer, x = layer_and_input(layer_name)
    return layer, x, acting(BOFTModule(LayerSpec.of(layer), rank=rank, **settings))


def rotated(weight: torch.Tensor, blocks: torch.Tensor, limit: float = math.inf) -> torch.Tensor:
    """Rows of a weight after all stages, row by row as the format has it."""
    generators = blocks - blocks.transpose(-1, -2)
    norm = generators.square().sum().sqrt()
    generators = generators * (limit / norm) if norm > limit else generators
    identity = torch.eye(generators.shape[-1], dtype=generators.dtype)
    rotations = (identity + generators) @ torch.linalg.inv(identity - generators)
    stages, count, size, _ = blocks.shape
    rows = weight
    for stage in range(stages):
        k = 2**stage * size // 2
        # Place of each row after (c, 2, k) became (c, k, 2).
        order = torch.arange(len(rows)).view(-1, 2, k).transpose(1, 2).flatten()
        parts = rows[order].chunk(count)
        turned = torch.cat([torch.tensordot(m, part, dims=1) for m, part in zip(rotations[stage], parts, strict=True)])
        rows = torch.empty_like(turned).index_copy(0, order, turned)
    return rows


@every_form
@every_layer
def test_output_and_gradients_are_those_of_the_formula(layer_name, settings):
    layer, x, adapter = new(layer_name, **settings)
    limit = settings.get("constraint", math.inf) * len(layer.weight)

    def formula(leaves, weight, bias):
        changed = rotated(weight, leaves["oft_blocks"], limit)
        return leaves["rescale"] * changed if "rescale" in leaves else changed, bias

    assert_same_output_and_gradients(adapter, layer, x, formula)


@every_layer
def test_norms_and_angles_between_all_outputs_stay(layer_name):
    layer, _, adapter = new(layer_name)
    before = layer.weight.flatten(1)
    after = (layer.weight + adapter.delta_weight(layer.weight)).flatten(1)
    assert not torch.allclose(after, before, atol=0.05)
    torch.testing.assert_close(after.t() @ after, before.t() @ before, rtol=1e-4, atol=1e-5)


def test_the_stages_together_mix_every_output_with_every_other():
    adapter = acting(BOFTModule(LayerSpec(weight_shape=(24, 5)), rank=6))
    matrix = torch.eye(24) + turn_in_stages(torch.eye(24), adapter.turns())
    assert (matrix != 0).all()
    first = torch.eye(24) + turn_in_stages(torch.eye(24), adapter.turns()[:1])
    assert (first != 0).sum() == 24 * 6


@pytest.mark.parametrize("multiplier", [-1.0, 0.25, 0.5, 2.0])
def test_the_change_is_linear_in_the_strength(multiplier):
    layer, x, adapter = new("conv 3x3", rescaled=True)
    whole = attached(layer, adapter, x) - layer(x)
    adapter.multiplier = multiplier
    torch.testing.assert_close(attached(layer, adapter, x) - layer(x), multiplier * whole, rtol=1e-4, atol=1e-5)


# Sizes


@pytest.mark.parametrize(
    ("outputs", "rank", "shape"),
    [
        (320, 16, (6, 32, 10, 10)),
        (320, 20, (5, 16, 20, 20)),
        (768, 8, (8, 128, 6, 6)),
        (768, 16, (7, 64, 12, 12)),
        (2048, 4, (10, 512, 4, 4)),
        (4, 10, (1, 1, 4, 4)),
    ],
)
def test_sizes_of_blocks_and_numbers_of_stages(outputs, rank, shape):
    adapter = BOFTModule(LayerSpec(weight_shape=(outputs, 8)), rank=rank)
    assert tuple(adapter.oft_blocks.shape) == shape
    assert adapter.rank == shape[-1]


@pytest.mark.parametrize(
    ("outputs", "rank", "works"),
    [(320, 8, "network_dim 10 or more does"), (768, 4, "network_dim 6 or more does"), (77, 50, "no network_dim does")],
)
def test_widths_that_cannot_be_split_are_named_with_what_works(outputs, rank, works):
    with pytest.raises(ValueError, match=f"network_dim {rank} does not split {outputs} outputs .*{works}"):
        BOFTModule(LayerSpec(weight_shape=(outputs, 8)), rank=rank)


def test_a_network_that_cannot_be_split_is_one_sentence(sd1):
    with pytest.raises(UserError, match="lora_unet.*: network_dim 1 does not split .*; network_dim 2 or more does"):
        boft.create_network(1.0, 1, None, None, None, sd1.unet)
    network = boft.create_network(1.0, 8, None, None, None, sd1.unet, constraint="0.1")
    assert {adapter.variant for _, adapter in network.items()} == {"BOFT with constraint"}
    assert all(adapter.rank <= 8 for _, adapter in network.items())


# Files


def test_the_limit_is_in_the_saved_blocks():
    layer, _, adapter = new("linear", constraint=0.02)
    tensors = adapter.tensors()
    norm = torch.linalg.vector_norm(skew(tensors["oft_blocks"])).item()
    assert norm == pytest.approx(0.02 * 24)
    assert tensors["alpha"] > norm
    expected = rotated(layer.weight.double(), tensors["oft_blocks"].double()) - layer.weight.double()
    torch.testing.assert_close(adapter.delta_weight(layer.weight).double(), expected, rtol=1e-4, atol=1e-5)


def test_tensors_that_do_not_fit_are_refused():
    spec = LayerSpec(weight_shape=(24, 5))
    with pytest.raises(ValueError, match="no BOFT layer"):
        BOFTModule.from_tensors(spec, {"oft_blocks": torch.zeros(6, 4, 4)})
    with pytest.raises(ValueError, match=r"oft_blocks is .*, the layer wants"):
        BOFTModule.from_tensors(spec, {"oft_blocks": torch.zeros(2, 4, 6, 6)})
    with pytest.raises(ValueError, match="does not split"):
        BOFTModule.from_tensors(spec, {"oft_blocks": torch.zeros(3, 6, 4, 4)})


# LyCORIS, whose strength mixes every stage: at 1 both are the same.


@every_form
@every_layer
def test_lycoris_reads_our_tensors_to_the_same_output(layer_name, settings):
    layer, x, adapter = new(layer_name, **settings)
    tensors = {name: value.detach() for name, value in adapter.tensors().items()}
    with torch.no_grad():
        theirs = read_by_lycoris(layer, tensors)
    ours = attached(layer, adapter, x)
    assert (ours - layer(x)).abs().max() > 0.05
    torch.testing.assert_close(ours, output_with(layer, theirs, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_form
@every_layer
def test_we_read_lycoris_tensors_to_the_same_output(layer_name, settings, dtype):
    layer, x = layer_and_input(layer_name)
    theirs = lycoris_module(
        "ButterflyOFTModule",
        layer,
        lora_dim=6,
        constraint=settings.get("constraint", 0.0),
        rescaled="rescaled" in settings,
    )
    tensors = {name: value.detach().to(dtype) for name, value in theirs.state_dict().items()}
    adapter = BOFTModule.from_tensors(LayerSpec.of(layer), tensors)
    assert adapter.tensors().keys() == tensors.keys()
    expected = output_with(layer, theirs, x)
    assert (expected - layer(x)).abs().max() > 0.05
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    limit = tolerance * expected.abs().max().item()
    torch.testing.assert_close(attached(layer, adapter, x), expected, rtol=tolerance, atol=limit)


@pytest.mark.parametrize("places", [10, 200], ids=["fewer outputs than weights", "fewer weights than outputs"])
def test_the_smaller_of_weight_and_output_is_turned_and_no_stage_is_kept(places):
    layer = torch.nn.Linear(64, 320, bias=False).requires_grad_(False)
    adapter = acting(BOFTModule(LayerSpec.of(layer), rank=10)).train()
    x = torch.randn(2, places, 64, generator=stream())
    output = layer(x)
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = adapter(layer, x, output)
    smaller = min(output.numel(), layer.weight.numel())
    assert len([shape for shape in kept if shape != x.shape and shape.numel() >= smaller]) <= 1
    torch.testing.assert_close(found, changed(layer, adapter, x), rtol=1e-4, atol=1e-5)
