"""LoHa: the paper's product, its smaller form, its drop-outs, and files exchanged with LyCORIS and peft."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from networks import loha
from networks.core.adapter import LayerSpec
from networks.loha import LoHaModule, as_one_product, hadamard_delta
from tests.networks.cases import LAYERS, acting, attached, layer_and_input, stream
from tests.networks.lycoris_layers import lycoris_module, output_with, read_by_lycoris

FORMS = [
    ("linear", {"rank": 4}),
    ("linear", {"rank": 2}),
    ("conv 1x1", {"rank": 3}),
    ("conv 1x1", {"rank": 1}),
    ("conv 3x3", {"rank": 4}),
    ("conv 3x3", {"rank": 2}),
    ("conv 3x3", {"rank": 2, "use_tucker": True}),
]
every_form = pytest.mark.parametrize(("layer_name", "settings"), FORMS, ids=lambda value: str(value))
dora = pytest.mark.parametrize("on_output", [None, False, True], ids=["plain", "dora per input", "dora per output"])


def new(layer: nn.Module, *, alpha: float = 3.0, **settings) -> LoHaModule:
    adapter = LoHaModule(LayerSpec.of(layer), alpha=alpha, **settings)
    adapter.initialise(stream(), layer.get_parameter("weight"))
    return adapter


def formula(adapter: LoHaModule, tensors: dict[str, Tensor]) -> Tensor:
    """What the tensors of a file mean, index by index."""
    scale = tensors["alpha"] / adapter.rank
    if "hada_t1" in tensors:
        parts = [
            torch.einsum("ij...,ip,jq->pq...", *(tensors[f"hada_{name}"] for name in (f"t{n}", f"w{n}_a", f"w{n}_b")))
            for n in (1, 2)
        ]
    else:
        parts = [torch.einsum("or,ri->oi", tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]) for n in (1, 2)]
    return (scale * parts[0] * parts[1]).reshape(adapter.spec.weight_shape)


def double_leaves(adapter: LoHaModule) -> dict[str, Tensor]:
    names = {name for name, _ in adapter.named_parameters()}
    return {name: value.detach().double().requires_grad_(name in names) for name, value in adapter.tensors().items()}


@every_form
def test_the_delta_is_the_papers_product(layer_name, settings):
    layer, _ = layer_and_input(layer_name)
    adapter = acting(new(layer, **settings))
    expected = formula(adapter, double_leaves(adapter))
    delta = adapter.delta_weight(layer.weight)
    assert delta.abs().max() > 0.05
    torch.testing.assert_close(delta.double(), expected, rtol=1e-5, atol=1e-6)


@every_form
def test_gradients_are_those_of_the_formula_in_double_precision(layer_name, settings):
    layer, x = layer_and_input(layer_name)
    adapter = acting(new(layer, **settings)).train()
    x.requires_grad_()
    attached(layer, adapter, x).square().sum().backward()
    leaves, x64 = double_leaves(adapter), x.detach().double().requires_grad_()
    weight = layer.weight.double() + formula(adapter, leaves)
    bias = None if layer.bias is None else layer.bias.double()
    adapter.spec.apply(x64, weight, bias).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        wanted = leaves[name].grad
        assert wanted.abs().max() > 0
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5 * x64.grad.abs().max().item())


def test_the_product_of_the_squared_rank_is_the_same_change():
    factors = [torch.randn(shape, generator=stream(seed)) for seed, shape in enumerate([(6, 3), (3, 5)] * 2)]
    up, down = as_one_product(*factors)
    assert (up.shape, down.shape) == ((6, 9), (9, 5))
    torch.testing.assert_close(up @ down, hadamard_delta(*factors, None, 1.0))


@pytest.mark.parametrize(
    ("shape", "rank", "smaller"),
    [((320, 320), 11, True), ((320, 320), 12, False), ((320, 320, 3, 3), 14, True), ((320, 320, 3, 3), 15, False)],
)
def test_the_form_with_fewer_multiplications_is_taken(shape, rank, smaller):
    adapter = LoHaModule(LayerSpec(weight_shape=shape, padding=(1, 1)), rank=rank, alpha=1)
    assert adapter.acts_as_one_product == smaller
    tucker = LoHaModule(LayerSpec(weight_shape=(320, 320, 3, 3)), rank=2, alpha=1, use_tucker=True)
    assert not tucker.acts_as_one_product


@every_form
def test_initial_values_are_those_of_lycoris(layer_name, settings):
    layer, _ = layer_and_input(layer_name)
    wide = LoHaModule(LayerSpec(weight_shape=(256, 300)), rank=16, alpha=1)
    wide.initialise(stream(), torch.empty(256, 300, device="meta"))
    for name, spread in [("hada_w1_a", 0.1), ("hada_w1_b", 1.0), ("hada_w2_b", 1.0)]:
        assert wide.get_parameter(name).std().item() == pytest.approx(spread, rel=0.05)
    adapter = new(layer, **settings)
    (zero,) = adapter.plus_parameters()
    assert zero is adapter.hada_w2_a
    assert [name for name, value in adapter.named_parameters() if not value.any()] == ["hada_w2_a"]
    again = new(layer, **settings)
    assert all(torch.equal(value, again.tensors()[name]) for name, value in adapter.tensors().items())


# Drop-outs


def test_rank_dropout_drops_output_channels_of_each_sample_in_training_alone():
    torch.manual_seed(0)
    layer = nn.Linear(16, 400, bias=False).requires_grad_(False)
    adapter = acting(new(layer, rank=4, rank_dropout=0.25)).train()
    x = torch.randn(20, 5, 16, generator=stream())
    full = LayerSpec.of(layer).apply(x, adapter.delta_weight(layer.weight))
    effect = adapter.effect(layer, x, layer(x))
    ratio = (effect / full).mean(dim=1)  # the places of a sample share what is dropped
    dropped = ratio.abs() < 1e-6
    assert 0.22 < dropped.float().mean() < 0.28
    torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 4 / 3), rtol=1e-3, atol=1e-3)
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(adapter.eval().effect(layer, x, layer(x)), full, rtol=1e-4, atol=1e-4)


def test_module_dropout_leaves_whole_passes_out():
    layer, x = layer_and_input("conv 3x3")
    adapter = acting(new(layer, rank=2, module_dropout=0.5)).train()
    torch.manual_seed(0)
    without = [torch.equal(attached(layer, adapter, x), layer(x)) for _ in range(40)]
    assert 10 < sum(without) < 30


# Files


def lycoris_loha(layer: nn.Module, settings: dict, **options) -> nn.Module:
    return lycoris_module("LohaModule", layer, lora_dim=settings["rank"], use_tucker="use_tucker" in settings, **options)


@dora
@every_form
def test_lycoris_reads_our_tensors_to_the_same_output(layer_name, settings, on_output):
    layer, x = layer_and_input(layer_name)
    options = {} if on_output is None else {"dora_wd": True, "wd_on_output": on_output}
    adapter = acting(new(layer, **settings, **options))
    if on_output is False:  # lycoris-lora's own reader takes all magnitudes for such along the outputs
        theirs = lycoris_loha(layer, settings, alpha=3, weight_decompose=True, wd_on_out=False)
        theirs.load_state_dict(adapter.tensors())
    else:
        theirs = read_by_lycoris(layer, adapter.tensors())
    ours = attached(layer, adapter, x)
    assert (ours - layer(x)).abs().max() > 0.05
    torch.testing.assert_close(ours, output_with(layer, theirs, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@dora
@every_form
def test_we_read_lycoris_tensors_to_the_same_output(layer_name, settings, on_output, dtype):
    layer, x = layer_and_input(layer_name)
    options = {} if on_output is None else {"weight_decompose": True, "wd_on_out": on_output}
    theirs = lycoris_loha(layer, settings, alpha=2, **options)
    tensors = {name: value.detach().to(dtype) for name, value in theirs.state_dict().items()}
    adapter = LoHaModule.from_tensors(LayerSpec.of(layer), tensors)
    assert adapter.rank == settings["rank"]
    assert adapter.tensors().keys() == tensors.keys()
    expected = output_with(layer, theirs, x)
    assert (expected - layer(x)).abs().max() > 0.05
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    limit = tolerance * expected.abs().max().item()
    torch.testing.assert_close(attached(layer, adapter, x), expected, rtol=tolerance, atol=limit)


@pytest.mark.parametrize(("layer_name", "effective"), [("linear", False), ("conv 3x3", False), ("conv 3x3", True)])
def test_the_product_is_pefts(layer_name, effective):
    peft = pytest.importorskip("peft")
    layer, _ = layer_and_input(layer_name)
    config = peft.LoHaConfig(r=3, alpha=2, target_modules=["0"], use_effective_conv2d=effective, init_weights=False)
    model = peft.get_peft_model(nn.Sequential(layer), config)
    theirs = model.base_model.model[0]
    tensors = {name: getattr(theirs, name)["default"].detach() for name in _PEFT_NAMES if "default" in getattr(theirs, name)}
    adapter = LoHaModule.from_tensors(LayerSpec.of(layer), {**tensors, "alpha": torch.tensor(2.0)})
    delta = adapter.delta_weight(layer.weight)
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(delta, theirs.get_delta_weight("default"), rtol=1e-5, atol=1e-7)


_PEFT_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


def test_tensors_that_are_not_loha_or_do_not_fit_are_refused():
    layer, _ = layer_and_input("linear")
    spec = LayerSpec.of(layer)
    with pytest.raises(ValueError, match="no LoHa layer"):
        LoHaModule.from_tensors(spec, {"lora_up.weight": torch.zeros(3, 2)})
    tensors = new(layer, rank=4).tensors()
    with pytest.raises(ValueError, match="hada_w1_a"):
        LoHaModule.from_tensors(spec, {**tensors, "hada_w1_a": torch.zeros(25, 4)})
    with pytest.raises(ValueError, match="hada_w2_a"):
        LoHaModule.from_tensors(spec, {name: value for name, value in tensors.items() if name != "hada_w2_a"})


def test_a_file_without_alpha_has_alpha_equal_to_the_rank():
    layer, _ = layer_and_input("linear")
    tensors = new(layer, rank=4).tensors()
    del tensors["alpha"]
    assert LoHaModule.from_tensors(LayerSpec.of(layer), tensors).scale == 1.0


def test_network_arguments_reach_the_layers(sd1):
    network = loha.create_network(
        1.0, 4, 2, None, sd1.text_encoder, sd1.unet, conv_dim=2, use_tucker="True", rs_lora="True", rank_dropout="0.1"
    )
    adapters = [adapter for _, adapter in network.items()]
    assert all(isinstance(adapter, LoHaModule) and adapter.rank_dropout == 0.1 for adapter in adapters)
    wide = [adapter for adapter in adapters if adapter.spec.is_wide]
    assert wide
    assert all((adapter.hada_t1 is not None) == adapter.spec.is_wide for adapter in adapters)
    assert {adapter.scale for adapter in adapters if not adapter.spec.is_wide} == {1.0}  # 2 / sqrt 4


def test_every_layer_of_the_suite_has_a_form():
    assert {name for name, _ in FORMS} | {"square", "layer norm", "group norm"} == set(LAYERS)
