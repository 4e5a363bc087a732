"""Full differences and norms: what is trained is the change, files hold it in pairs, and models come back as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from networks import full, lora
from networks.core.adapter import LayerSpec
from networks.full import FullModule, NormModule
from tests.networks.cases import acting, attached, changed, layer_and_input
from tests.networks.double_precision import assert_same_output_and_gradients
from tests.networks.lycoris_layers import lycoris_module, output_with, read_by_lycoris

LAYERS = [
    ("linear", FullModule),
    ("square", FullModule),
    ("conv 1x1", FullModule),
    ("conv 3x3", FullModule),
    ("layer norm", NormModule),
    ("group norm", NormModule),
]
every_layer = pytest.mark.parametrize(("layer_name", "kind"), LAYERS, ids=[name for name, _ in LAYERS])


def new(layer_name: str, kind: type, **settings):
    """Layer, input, and an adapter that acts."""
    layer, x = layer_and_input(layer_name)
    return layer, x, acting(kind(LayerSpec.of(layer), **settings))


@every_layer
def test_output_and_gradients_are_those_of_the_sum(layer_name, kind):
    layer, x, adapter = new(layer_name, kind)

    def formula(leaves, weight, bias):
        change, *bias_change = leaves.values()
        return weight + change, bias + bias_change[0] if bias_change else None

    assert_same_output_and_gradients(adapter, layer, x, formula)


@every_layer
def test_parameters_are_fp32_whatever_the_model_is_in(layer_name, kind):
    layer, _ = layer_and_input(layer_name)
    assert {value.dtype for value in kind(LayerSpec.of(layer.to(torch.float16))).parameters()} == {torch.float32}


@every_layer
def test_the_file_has_both_changes_where_the_layer_has_both(layer_name, kind):
    layer, _, adapter = new(layer_name, kind)
    names = [kind.weight_name, kind.bias_name] if layer.bias is not None else [kind.weight_name]
    assert list(adapter.tensors()) == names


@every_layer
def test_one_change_alone_is_read(layer_name, kind):
    layer, x, adapter = new(layer_name, kind)
    for name, change in adapter.tensors().items():
        read = kind.from_tensors(LayerSpec.of(layer), {name: change})
        for other, value in read.tensors().items():
            assert torch.equal(value, change if other == name else torch.zeros_like(value))
        torch.testing.assert_close(attached(layer, read, x), changed(layer, read, x), rtol=1e-4, atol=1e-5)
        loaded = new(layer_name, kind)[2]
        loaded.load_tensors({name: change})
        assert all(torch.equal(value, loaded.tensors()[other]) for other, value in read.tensors().items())


def test_a_change_of_a_bias_that_the_layer_has_not():
    spec = LayerSpec(weight_shape=(4, 3))
    tensors = {"diff": torch.ones(4, 3), "diff_b": torch.zeros(4)}
    assert list(FullModule.from_tensors(spec, tensors).tensors()) == ["diff"]
    with pytest.raises(ValueError, match="diff_b"):
        FullModule.from_tensors(spec, {**tensors, "diff_b": torch.ones(4)})


def test_what_does_not_fit_is_refused():
    spec = LayerSpec(weight_shape=(4, 3), has_bias=True)
    with pytest.raises(ValueError, match=r"replaces its weight \(set_weight\)"):
        FullModule.from_tensors(spec, {"set_weight": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="no layer of Full"):
        FullModule.from_tensors(spec, {"alpha": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"diff is .*, the layer wants"):
        FullModule.from_tensors(spec, {"diff": torch.zeros(4, 4)})
    with pytest.raises(ValueError, match="alpha does not belong to it"):
        FullModule.from_tensors(spec, {"diff": torch.zeros(4, 3), "alpha": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="Full is not for norms"):
        FullModule(LayerSpec(weight_shape=(4,)))
    with pytest.raises(ValueError, match="Norm is only for norms"):
        NormModule(spec)


def test_a_matrix_is_read_for_a_1x1_convolution():
    change = torch.randn(4, 3)
    adapter = FullModule.from_tensors(LayerSpec(weight_shape=(4, 3, 1, 1)), {"diff": change})
    assert torch.equal(adapter.delta_weight(torch.zeros(4, 3, 1, 1)), change.view(4, 3, 1, 1))


@every_layer
def test_module_dropout_leaves_whole_passes_out(layer_name, kind):
    layer, x, adapter = new(layer_name, kind, module_dropout=0.5)
    torch.manual_seed(0)
    without = [torch.equal(attached(layer, adapter.train(), x), layer(x)) for _ in range(40)]
    assert 10 < sum(without) < 30
    torch.testing.assert_close(attached(layer, adapter.eval(), x), changed(layer, adapter, x), rtol=1e-4, atol=1e-5)


# LyCORIS


@pytest.mark.parametrize("multiplier", [1.0, -0.5])
@every_layer
def test_lycoris_reads_our_tensors_to_the_same_output(layer_name, kind, multiplier):
    layer, x, adapter = new(layer_name, kind)
    theirs = lycoris_module(kind.__name__, copy.deepcopy(layer))
    if kind is NormModule:
        theirs = read_by_lycoris(layer, adapter.tensors())
    else:  # its reader copies into parameters that take gradients, which torch refuses
        _empty(theirs)
        theirs.load_state_dict(adapter.tensors())
    adapter.multiplier = theirs.multiplier = multiplier
    assert (attached(layer, adapter, x) - layer(x)).abs().max() > 0.05
    torch.testing.assert_close(attached(layer, adapter, x), theirs(x), rtol=1e-4, atol=1e-5)


def _empty(module: torch.nn.Module) -> None:
    """Its loader adds to what its parameters hold."""
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)


@every_layer
def test_we_read_lycoris_tensors_to_the_same_output(layer_name, kind):
    layer, x = layer_and_input(layer_name)
    theirs = lycoris_module(kind.__name__, copy.deepcopy(layer))
    if kind is NormModule:
        tensors, expected = theirs.state_dict(), output_with(theirs.org_module[0], theirs, x)
    else:  # what it would save is right only while it is applied
        theirs.apply_to()
        tensors, expected = theirs.state_dict(), theirs(x)
    adapter = kind.from_tensors(LayerSpec.of(layer), {name: value.detach() for name, value in tensors.items()})
    assert adapter.tensors().keys() == tensors.keys()
    assert (expected - layer(x)).abs().max() > 0.05
    torch.testing.assert_close(attached(layer, adapter, x), expected, rtol=1e-4, atol=1e-5)


# Networks


def train(network, models, steps: int = 4) -> list[float]:
    """A few steps; the losses."""
    network.apply_to(models.text_encoder, models.unet)
    groups, _ = network.prepare_optimizer_params(1e-3, 1e-3, None)
    network.on_epoch_start(models.text_encoder, models.unet)
    optimizer = torch.optim.AdamW(groups)
    target = torch.randn(models.latents.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = (models.picture() - target).square().mean() + 1e-3 * models.text().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state_of(models) -> dict[str, torch.Tensor]:
    return {
        f"{part} {name}": value.clone()
        for part, model in (("unet", models.unet), ("text", models.text_encoder))
        for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("module", "arguments"),
    [(full, {"preset": "full", "train_norm": "True"}), (lora, {"train_norm": "True"})],
    ids=["full", "lora with norms"],
)
def test_trained_saved_read_merged_and_taken_out(module, arguments, sd1, tmp_path):
    before, base = state_of(sd1), sd1.both()
    network = module.create_network(1.0, 4, 4, None, sd1.text_encoder, sd1.unet, **arguments)
    losses = train(network, sd1)
    assert losses[-1] < 0.98 * losses[0]
    assert all((value != 0).any() for value in network.file_tensors().values())
    trained = sd1.both().detach()
    network.save_weights(tmp_path / "a.safetensors", None, None)
    network.detach()
    assert torch.equal(sd1.both(), base)

    tensors = load_file(tmp_path / "a.safetensors")
    norms = {key for key in tensors if key.endswith("_norm")}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1.w_norm" in norms
    assert {key.replace("w_norm", "b_norm") for key in norms} == {key for key in norms if key.endswith("b_norm")}
    again, _ = module.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, sd1.text_encoder, sd1.unet)
    again.attach()
    assert torch.equal(sd1.both(), trained)
    again.merge()
    torch.testing.assert_close(sd1.both(), trained, rtol=1e-4, atol=1e-4 * trained.abs().max().item())
    assert any(not torch.equal(value, before[name]) for name, value in state_of(sd1).items() if name.endswith("norm1.bias"))
    again.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in state_of(sd1).items())
    assert torch.equal(sd1.both(), base)


def test_the_preset_full_reaches_all_linear_and_convolution_layers_of_the_u_net(sd1):
    network = full.create_network(1.0, None, None, None, None, sd1.unet, preset="full", train_norm="True")
    outside = {
        name for name, module in sd1.unet.named_modules() if isinstance(getattr(module, "weight", None), torch.Tensor)
    } - {target.path for target in network.targets.values()}
    assert outside == {"conv_norm_out"}


def test_a_file_that_replaces_weights_is_refused_with_the_layers_name(sd1, tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{name}.set_weight": torch.zeros(32, 32, 1, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"{name}: the file replaces its weight"):
        full.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, sd1.text_encoder, sd1.unet)
