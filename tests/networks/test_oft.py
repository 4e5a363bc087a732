"""OFT: rotations of blocks of outputs, their limit, and what other programs' rules make of the files."""

from __future__ import annotations

import math

import pytest
import torch

from networks import oft
from networks.core.adapter import LayerSpec
from networks.core.factorization import factorization
from networks.core.rotation import cayley_turn, limiting_factor, skew
from networks.oft import OFTModule, generators_of, turn_in_blocks
from tests.networks.cases import acting, attached, changed, layer_and_input, stream
from tests.networks.double_precision import assert_same_output_and_gradients
from tests.networks.lycoris_layers import lycoris_module, output_with, read_by_lycoris

every_layer = pytest.mark.parametrize("layer_name", ["linear", "square", "conv 1x1", "conv 3x3"])
every_form = pytest.mark.parametrize(
    "settings",
    [{}, {"constraint": 0.02}, {"constraint": 100.0}, {"rescaled": True}, {"num_blocks": 2}],
    ids=["plain", "limited", "not reaching the limit", "rescaled", "two blocks"],
)


def new(layer_name: str, rank: int = 4, **settings):
    """Layer, input, and an adapter that acts."""
    layer, x = layer_and_input(layer_name)
    return layer, x, acting(OFTModule(LayerSpec.of(layer), rank=rank, **settings))


def limited(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """Q of the blocks, as the papers have it."""
    generators = blocks - blocks.transpose(-1, -2)
    norm = generators.square().sum().sqrt()
    return generators * (limit / norm) if norm > limit else generators


def rotated(weight: torch.Tensor, generators: torch.Tensor) -> torch.Tensor:
    """Rows in blocks, each one by its R' = ((I + Q) (I - Q)^-1)'."""
    identity = torch.eye(generators.shape[-1], dtype=generators.dtype)
    rotations = (identity + generators) @ torch.linalg.inv(identity - generators)
    parts = weight.chunk(len(generators))
    return torch.cat([torch.tensordot(matrix.t(), part, dims=1) for matrix, part in zip(rotations, parts, strict=True)])


@every_form
@every_layer
def test_output_and_gradients_are_those_of_the_formula(layer_name, settings):
    layer, x, adapter = new(layer_name, **settings)
    limit = settings.get("constraint", math.inf) * len(layer.weight)

    def formula(leaves, weight, bias):
        changed = rotated(weight, limited(leaves["oft_blocks"], limit))
        return leaves["rescale"] * changed if "rescale" in leaves else changed, bias

    assert_same_output_and_gradients(adapter, layer, x, formula)


@every_layer
def test_norms_and_angles_between_a_blocks_outputs_stay(layer_name):
    layer, _, adapter = new(layer_name)
    after = (layer.weight + adapter.delta_weight(layer.weight)).flatten(1)
    assert not torch.allclose(after, layer.weight.flatten(1), atol=0.05)
    before = layer.weight.flatten(1)
    size = adapter.rank
    for rows_before, rows_after in zip(before.split(size), after.split(size), strict=True):
        torch.testing.assert_close(rows_after.t() @ rows_after, rows_before.t() @ rows_before, rtol=1e-4, atol=1e-5)


def test_small_turns_keep_their_digits():
    generators = skew(1e-6 * torch.randn(3, 4, 4, generator=stream()))
    exact = generators.double()
    identity = torch.eye(4, dtype=torch.float64)
    expected = (identity + exact) @ torch.linalg.inv(identity - exact) - identity
    torch.testing.assert_close(cayley_turn(generators).double(), expected, rtol=1e-6, atol=1e-14)


def test_blocks_are_turned_by_the_transposed_matrix():
    turns = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]) - torch.eye(2)
    assert (torch.tensor([1.0, 0.0]) + turn_in_blocks(torch.tensor([1.0, 0.0]), turns)).tolist() == [0.0, 1.0]


def test_a_limit_holds_the_norm_over_all_blocks():
    _, _, adapter = new("linear", constraint=0.02)
    generators = skew(adapter.oft_blocks)
    assert torch.linalg.vector_norm(generators) > 1
    assert torch.linalg.vector_norm(generators * limiting_factor(generators, 0.48)).item() == pytest.approx(0.48)
    _, _, free = new("linear", constraint=100.0)
    assert torch.equal(free.turns(), new("linear")[2].turns())


def test_a_limit_does_not_stop_training_from_the_start():
    """The norm of nothing has no gradient of its own."""
    layer, x = layer_and_input("linear")
    adapter = OFTModule(LayerSpec.of(layer), rank=4, constraint=0.1, rescaled=True).train()
    (attached(layer, adapter, x) - 1).square().sum().backward()
    for parameter in adapter.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("multiplier", [-1.0, 0.25, 0.5, 2.0])
def test_the_change_is_linear_in_the_strength(multiplier):
    layer, x, adapter = new("conv 3x3", rescaled=True)
    whole = attached(layer, adapter, x) - layer(x)
    adapter.multiplier = multiplier
    torch.testing.assert_close(attached(layer, adapter, x) - layer(x), multiplier * whole, rtol=1e-4, atol=1e-5)


# Sizes


@pytest.mark.parametrize(
    ("outputs", "settings", "shape"),
    [
        (320, {"rank": 4}, (80, 4, 4)),
        (320, {"rank": 16}, (20, 16, 16)),
        (768, {"rank": 7}, (128, 6, 6)),
        (320, {"rank": 64}, (64, 5, 5)),
        (320, {"rank": 4, "num_blocks": 4}, (4, 80, 80)),
    ],
)
def test_sizes_of_blocks(outputs, settings, shape):
    adapter = OFTModule(LayerSpec(weight_shape=(outputs, 8)), **settings)
    assert tuple(adapter.oft_blocks.shape) == shape
    assert adapter.rank == shape[-1]


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="320 outputs are not divided by num_blocks 7"):
        OFTModule(LayerSpec(weight_shape=(320, 8)), rank=4, num_blocks=7)
    with pytest.raises(ValueError, match="must not be negative"):
        OFTModule(LayerSpec(weight_shape=(320, 8)), rank=4, constraint=-1)


# Files


@every_layer
def test_the_file_has_the_fields_names_and_shapes(layer_name):
    layer, _, adapter = new(layer_name, rescaled=True)
    ones = [1] * (layer.weight.dim() - 1)
    shapes = {name: tuple(value.shape) for name, value in adapter.tensors().items()}
    assert shapes == {
        "oft_blocks": tuple(adapter.oft_blocks.shape),
        "rescale": (len(layer.weight), *ones),
        "alpha": (),
    }


READERS = {
    "alpha times outputs, 0 for none": lambda alpha, outputs, norm: min(1, alpha * outputs / norm) if alpha else 1,
    "alpha times outputs, always": lambda alpha, outputs, norm: (min(norm, alpha * outputs) + 1e-8) / (norm + 1e-8),
    "alpha itself": lambda alpha, outputs, norm: min(1, alpha / norm) if alpha else 1,
}


@pytest.mark.parametrize("rule", READERS.values(), ids=READERS)
@pytest.mark.parametrize("constraint", [0.0, 0.02, 100.0])
@pytest.mark.parametrize("spread", [0.3, 300.0])
def test_no_readers_limit_changes_what_is_saved(rule, constraint, spread):
    layer, _ = layer_and_input("linear")
    adapter = acting(OFTModule(LayerSpec.of(layer), rank=4, constraint=constraint), spread=spread)
    tensors = adapter.tensors()
    generators = skew(tensors["oft_blocks"])
    norm = torch.linalg.vector_norm(generators).item()
    assert norm < tensors["alpha"].item() <= 32768
    assert tensors["alpha"].half() == tensors["alpha"].bfloat16() == tensors["alpha"]
    factor = rule(tensors["alpha"].item(), len(layer.weight), norm)
    read = rotated(layer.weight.double(), generators.double() * factor)
    torch.testing.assert_close((layer.weight + adapter.delta_weight(layer.weight)).double(), read, rtol=1e-3, atol=1e-3)


def test_a_training_state_keeps_blocks_and_limit_as_they_are():
    _, _, adapter = new("linear", constraint=0.02)
    state = adapter.state_dict()
    again = new("linear", constraint=0.02)[2]
    torch.nn.init.zeros_(again.oft_blocks)
    again.load_state_dict(state)
    assert torch.equal(again.oft_blocks, adapter.oft_blocks)
    assert torch.equal(again.turns(), adapter.turns())


@pytest.mark.parametrize("alpha", [None, 0.0, 0.02, 100.0, math.inf])
def test_alpha_of_a_file_is_a_limit_as_in_lycoris(alpha):
    layer, _, adapter = new("linear")
    tensors = {"oft_blocks": adapter.oft_blocks.detach()} | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
    read = OFTModule.from_tensors(LayerSpec.of(layer), tensors)
    limit = alpha * 24 if alpha else math.inf
    expected = rotated(layer.weight.double(), limited(tensors["oft_blocks"].double(), limit)) - layer.weight.double()
    torch.testing.assert_close(read.delta_weight(layer.weight).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(read.oft_blocks, adapter.oft_blocks)


@pytest.mark.parametrize("own", [0.0, 0.05, 0.001])
def test_a_files_limit_counts_where_an_adapter_with_its_own_loads_it(own):
    layer, _, adapter = new("linear")
    adapter = OFTModule(LayerSpec.of(layer), rank=4, constraint=own)
    blocks = 0.3 * torch.randn(adapter.oft_blocks.shape, generator=stream())
    adapter.load_tensors({"oft_blocks": blocks, "alpha": torch.tensor(0.02)})
    limit = min(0.02, own or math.inf) * 24
    expected = rotated(layer.weight.double(), limited(blocks.double(), limit)) - layer.weight.double()
    torch.testing.assert_close(adapter.delta_weight(layer.weight).double(), expected, rtol=1e-4, atol=1e-5)
    assert adapter.constraint == own


def test_our_own_files_set_no_limit_for_more_training():
    layer, _, adapter = new("linear", constraint=0.02)
    read = OFTModule.from_tensors(LayerSpec.of(layer), adapter.tensors())
    assert read.constraint == 0
    assert (adapter.variant, read.variant) == ("OFT with constraint", "OFT")
    torch.testing.assert_close(read.delta_weight(layer.weight), adapter.delta_weight(layer.weight))


@pytest.mark.parametrize("count", [2, 6, 12])
def test_blocks_of_any_number_are_read(count):
    """sd-scripts counts blocks, so that they may be larger than they are many."""
    spec = LayerSpec(weight_shape=(24, 5))
    blocks = torch.randn(count, 24 // count, 24 // count, generator=stream())
    adapter = OFTModule.from_tensors(spec, {"oft_blocks": blocks, "alpha": torch.tensor(1.0)})
    assert torch.equal(adapter.oft_blocks, blocks)
    assert adapter.rank == 24 // count


@every_layer
def test_rotations_themselves_are_read(layer_name):
    """As old files of LyCORIS have them, under the name oft_diag."""
    layer, x, adapter = new(layer_name)
    rotations = adapter.turns().detach() + torch.eye(adapter.rank)
    tensors = {"oft_diag": rotations, "alpha": torch.tensor(1e-5)}
    for read in (OFTModule.from_tensors(LayerSpec.of(layer), tensors), new(layer_name)[2]):
        read.load_tensors(tensors)
        torch.testing.assert_close(attached(layer, read, x), attached(layer, adapter, x), rtol=1e-3, atol=1e-4)


def test_matrices_that_are_no_rotations_are_refused():
    with pytest.raises(ValueError, match="no rotations"):
        generators_of(torch.eye(3)[None] * 1.1)
    for mirrored in (torch.diag(torch.tensor([-1.0, 1.0, 1.0])), torch.diag(torch.tensor([-1.0, -1.0, 1.0]))):
        with pytest.raises(ValueError, match="half a circle, or mirrors"):
            generators_of(mirrored[None])
    half = (torch.eye(3) + cayley_turn(skew(torch.randn(2, 3, 3, generator=stream())))).half()
    assert torch.isfinite(generators_of(half)).all()


def test_tensors_of_other_sizes_are_refused():
    spec = LayerSpec(weight_shape=(24, 5))
    for shape in ((6, 5, 5), (6, 4, 5), (0, 0, 0)):
        for name in ("oft_blocks", "oft_diag"):
            with pytest.raises(ValueError, match=rf"its blocks \({shape[0]}.* do not fit a layer with 24 outputs"):
                OFTModule.from_tensors(spec, {name: torch.zeros(shape)})
    with pytest.raises(ValueError, match="is no OFT layer, its tensors are rescale"):
        OFTModule.from_tensors(spec, {"rescale": torch.ones(24, 1)})
    with pytest.raises(ValueError, match="its alpha is no single number"):
        OFTModule.from_tensors(spec, {"oft_blocks": torch.zeros(6, 4, 4), "alpha": torch.ones(2)})


def test_scaling_the_change_nearly_scales_it_and_reaches_below_a_limit():
    for settings in ({}, {"constraint": 0.02}, {"rescaled": True}):
        layer, _, adapter = new("linear", **settings)
        adapter.oft_blocks.data *= 0.3
        before = adapter.delta_norm(layer.weight)
        with torch.no_grad():
            adapter.scale_delta_(torch.tensor(0.5))
        assert adapter.delta_norm(layer.weight).item() == pytest.approx(before.item() / 2, rel=0.1)


# Networks


def test_network_arguments_reach_the_layers(sd1, caplog):
    network = oft.create_network(1.0, 8, 4, None, None, sd1.unet, constraint="0.01", rescaled="True", module_dropout="0.1")
    assert "--network_alpha has no effect: OFT has no alpha" in caplog.text
    for target, adapter in network.items():
        assert (adapter.constraint, adapter.module_dropout) == (0.01, 0.1)
        assert adapter.rescale is not None
        assert adapter.rank == factorization(target.spec.weight_shape[0], 8)[0]
    assert {alpha for row in network.describe() for alpha in row.alphas} == set()


# LyCORIS


def lycoris_settings(settings: dict) -> dict:
    return {"constraint": settings.get("constraint", 0.0), "rescaled": "rescaled" in settings}


exchanged = pytest.mark.parametrize(
    "settings", [{}, {"constraint": 0.02}, {"rescaled": True}], ids=["plain", "limited", "rescaled"]
)


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
@exchanged
@every_layer
def test_lycoris_reads_our_tensors_to_the_same_output(layer_name, settings, multiplier):
    layer, x, adapter = new(layer_name, **settings)
    tensors = {name: value.detach() for name, value in adapter.tensors().items()}
    with torch.no_grad():
        theirs = read_by_lycoris(layer, tensors)
    adapter.multiplier = theirs.multiplier = multiplier
    ours = attached(layer, adapter, x)
    assert (ours - layer(x)).abs().max() > 0.05
    if settings.get("rescaled") and multiplier != 1:  # it scales with the whole factor at any strength
        expected = changed(layer, adapter, x, multiplier)
    else:
        expected = output_with(layer, theirs, x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@exchanged
@every_layer
def test_we_read_lycoris_tensors_to_the_same_output(layer_name, settings, dtype):
    layer, x = layer_and_input(layer_name)
    theirs = lycoris_module("DiagOFTModule", layer, lora_dim=4, **lycoris_settings(settings))
    tensors = {name: value.detach().to(dtype) for name, value in theirs.state_dict().items()}
    adapter = OFTModule.from_tensors(LayerSpec.of(layer), tensors)
    assert adapter.tensors().keys() == tensors.keys()
    expected = output_with(layer, theirs, x)
    assert (expected - layer(x)).abs().max() > 0.05
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    limit = tolerance * expected.abs().max().item()
    torch.testing.assert_close(attached(layer, adapter, x), expected, rtol=tolerance, atol=limit)
