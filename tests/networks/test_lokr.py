"""LoKr: the Kronecker product that is never built, the forms of its factors, and files exchanged with LyCORIS and peft."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from networks import lokr
from networks.core.adapter import LayerSpec
from networks.core.kronecker import planned_form
from networks.lokr import LoKrModule, kronecker_delta
from tests.networks.cases import acting, attached, layer_and_input, stream
from tests.networks.lycoris_layers import lycoris_module, output_with, read_by_lycoris

BOTH = {"rank": 1, "factor": 4, "decompose_both": True}
FORMS = [
    ("linear", {"rank": 1}),
    ("linear", {"rank": 2, "factor": 2}),
    ("linear", {"rank": 1, "full_matrix": True}),
    ("linear", BOTH),
    ("linear", {"rank": 2, "unbalanced_factorization": True}),
    ("conv 1x1", {"rank": 1}),
    ("conv 1x1", {"rank": 100}),
    ("conv 3x3", {"rank": 1}),
    ("conv 3x3", {"rank": 2, "factor": 1}),
    ("conv 3x3", {"rank": 9}),
    ("conv 3x3", {"rank": 1, "use_tucker": True}),
    ("conv 3x3", {"rank": 2, "factor": 2, "use_tucker": True}),
    ("conv 3x3", {"rank": 3, "factor": 1, "use_tucker": True}),
    ("conv 3x3", {"rank": 2, "factor": 2, "use_tucker": True, "unbalanced_factorization": True}),
    ("conv 3x3", BOTH | {"factor": 3}),
]
every_form = pytest.mark.parametrize(("layer_name", "settings"), FORMS, ids=lambda value: str(value))
dora = pytest.mark.parametrize("on_output", [None, False, True], ids=["plain", "dora per input", "dora per output"])


def new(layer: nn.Module, *, alpha: float = 3.0, **settings) -> LoKrModule:
    adapter = LoKrModule(LayerSpec.of(layer), alpha=alpha, **settings)
    adapter.initialise(stream(), layer.get_parameter("weight"))
    return adapter


def formula(adapter: LoKrModule, tensors: dict[str, Tensor]) -> Tensor:
    """What the tensors of a file mean, index by index."""
    w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    out1, in1 = w1.shape
    outputs, inputs, *kernel = adapter.spec.weight_shape
    shape = (outputs // out1, inputs // in1, *kernel)
    rank = None
    if "lokr_w2" in tensors:
        w2 = tensors["lokr_w2"]
        rank = len(tensors["lokr_w1_b"]) if "lokr_w1_b" in tensors else None
    elif "lokr_t2" in tensors:
        w2 = torch.einsum("ijhw,ip,jq->pqhw", tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
        rank = len(tensors["lokr_w2_b"])
    else:
        w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
        rank = len(tensors["lokr_w2_b"])
    scale = 1.0 if rank is None else tensors["alpha"] / rank
    return scale * torch.einsum("oi,pqk->opiqk", w1, w2.reshape(*shape[:2], -1)).reshape(adapter.spec.weight_shape)


def double_leaves(adapter: LoKrModule) -> dict[str, Tensor]:
    names = {name for name, _ in adapter.named_parameters()}
    return {name: value.detach().double().requires_grad_(name in names) for name, value in adapter.tensors().items()}


@every_form
def test_the_delta_is_the_kronecker_product(layer_name, settings):
    layer, _ = layer_and_input(layer_name)
    adapter = acting(new(layer, **settings))
    delta = adapter.delta_weight(layer.weight)
    assert delta.abs().max() > 0.02
    torch.testing.assert_close(delta.double(), formula(adapter, double_leaves(adapter)), rtol=1e-5, atol=1e-6)


@every_form
def test_gradients_are_those_of_the_formula_in_double_precision(layer_name, settings):
    layer, x = layer_and_input(layer_name)
    adapter = acting(new(layer, **settings)).train()
    x.requires_grad_()
    attached(layer, adapter, x).square().sum().backward()
    leaves, x64 = double_leaves(adapter), x.detach().double().requires_grad_()
    weight = layer.weight.double() + formula(adapter, leaves)
    adapter.spec.apply(x64, weight, layer.bias.double()).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        wanted = leaves[name].grad
        assert wanted.abs().max() > 0
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5 * x64.grad.abs().max().item())


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.parametrize("settings", [{"rank": 2}, {"rank": 2, "full_matrix": True}, {"rank": 6}], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["linear", "convolution"])
def test_the_product_is_never_built(settings, wide):
    layer = nn.Conv2d(64, 64, 3, padding=1) if wide else nn.Linear(64, 64)
    layer.requires_grad_(False)
    adapter = acting(new(layer, **settings)).train()
    x = torch.randn((1, 64, 2, 2) if wide else (4, 64), generator=stream()).requires_grad_()
    output = layer(x)
    with Largest() as largest:
        adapter.effect(layer, x, output).square().sum().backward()
    assert 0 < largest.size < layer.weight.numel() / 2


def test_ranks_are_gone_through_where_that_is_less_work():
    def keeps(shape, **settings):
        return LoKrModule(LayerSpec(weight_shape=shape, padding=(1, 1)), alpha=1, **settings).keeps_ranks

    assert keeps((320, 320), rank=4)
    assert not keeps((2560, 320), rank=31)  # forming w2 of 64 x 20 is cheaper than its 31 ranks for each of 40 groups
    assert keeps((320, 320, 3, 3), rank=4)
    assert keeps((320, 320, 3, 3), rank=4, use_tucker=True)
    assert not keeps((320, 320), rank=4, full_matrix=True)


def test_kronecker_indices():
    w1, w2 = torch.randn(2, 3, generator=stream(0)), torch.randn(4, 5, 3, 3, generator=stream(1))
    delta = kronecker_delta(w1, w2, 0.5)
    assert delta.shape == (8, 15, 3, 3)
    torch.testing.assert_close(delta[1 * 4 + 2, 2 * 5 + 3], 0.5 * w1[1, 2] * w2[2, 3])


# Forms


@pytest.mark.parametrize("shape", [(320, 320), (2560, 320), (320, 768), (320, 640, 3, 3), (4, 320, 3, 3), (320, 320, 1, 1)])
def test_forms_and_stored_alphas_are_those_of_lycoris(shape):
    modules = pytest.importorskip("lycoris.modules")
    with torch.device("meta"):
        layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2])
    for rank, factor in itertools.product((1, 4, 9, 10000), (-1, 4, 8)):
        for flags in itertools.product((False, True), repeat=4):
            options = dict(
                zip(("decompose_both", "full_matrix", "use_tucker", "unbalanced_factorization"), flags, strict=True)
            )
            ours = LoKrModule(LayerSpec.of(layer), rank=rank, alpha=3, factor=factor, **options)
            theirs = modules.LokrModule("name", layer, lora_dim=rank, alpha=3, factor=factor, **options)
            expected = {name: tuple(value.shape) for name, value in theirs.named_parameters()}
            assert {name: tuple(value.shape) for name, value in ours.named_parameters()} == expected, (rank, factor, options)
            assert ours.scale == theirs.scale
            assert ours.alpha == theirs.alpha


def test_a_factor_of_zero_is_refused():
    with pytest.raises(ValueError, match="factor is 0"):
        planned_form(LayerSpec(weight_shape=(16, 16)), 2, factor=0)


@pytest.mark.parametrize("alpha", [9999999999.0, math.inf, 0.0, 3.0, None])
def test_with_two_full_factors_alpha_means_nothing(alpha):
    layer, _ = layer_and_input("linear")
    adapter = acting(new(layer, rank=4, alpha=2.0, full_matrix=True))
    assert (adapter.scale, adapter.rank, adapter.alpha.item()) == (1.0, 0, 4.0)
    tensors = {name: value.half() for name, value in adapter.tensors().items() if name != "alpha"}
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    for dtype in (torch.float32, torch.float16):
        in_file = {name: value.to(dtype) for name, value in tensors.items()}
        again = LoKrModule.from_tensors(LayerSpec.of(layer), in_file)
        assert again.scale == 1.0
        assert torch.isfinite(again.tensors()["alpha"].half())
        torch.testing.assert_close(again.own_delta(), adapter.own_delta(), rtol=2e-3, atol=2e-3)


def test_a_rank_beyond_half_precision_stores_an_alpha_within_it():
    layer, _ = layer_and_input("linear")
    assert torch.isfinite(new(layer, rank=100000).alpha.half())


@pytest.mark.parametrize(
    ("w1", "w2"),
    [((8, 2), (3, 8)), ((2, 8), (12, 2)), ((24, 1), (1, 16)), ((24, 16), (1, 1))],
    ids=["first factor larger", "unlike ours", "column and row", "all in the first"],
)
def test_sizes_are_the_files_and_not_recomputed(w1, w2):
    layer, x = layer_and_input("linear")
    tensors = {
        "lokr_w1": torch.randn(w1, generator=stream(0)),
        "lokr_w2": torch.randn(w2, generator=stream(1)),
        "alpha": torch.tensor(9999999999.0),
    }
    adapter = LoKrModule.from_tensors(LayerSpec.of(layer), tensors)
    product = torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
    torch.testing.assert_close(adapter.delta_weight(layer.weight), product)
    torch.testing.assert_close(attached(layer, adapter, x), layer(x) + x @ product.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [(2, 3), (3, 1)], ids=str)
def test_the_rank_is_that_of_w2_also_where_w1_has_another(ranks):
    layer, _ = layer_and_input("linear")
    r1, r2 = ranks
    shapes = {"lokr_w1_a": (4, r1), "lokr_w1_b": (r1, 4), "lokr_w2_a": (6, r2), "lokr_w2_b": (r2, 4)}
    tensors = {name: torch.randn(shape, generator=stream(seed)) for seed, (name, shape) in enumerate(shapes.items())}
    adapter = LoKrModule.from_tensors(LayerSpec.of(layer), {**tensors, "alpha": torch.tensor(6.0)})
    assert (adapter.rank, adapter.scale) == (r2, 6 / r2)
    expected = torch.kron(tensors["lokr_w1_a"] @ tensors["lokr_w1_b"], tensors["lokr_w2_a"] @ tensors["lokr_w2_b"])
    torch.testing.assert_close(adapter.own_delta(), 6 / r2 * expected)


def test_the_rank_is_that_of_w1_where_w2_is_full():
    layer, _ = layer_and_input("linear")
    tensors = {"lokr_w1_a": torch.ones(4, 2), "lokr_w1_b": torch.ones(2, 4), "lokr_w2": torch.ones(6, 4)}
    adapter = LoKrModule.from_tensors(LayerSpec.of(layer), {**tensors, "alpha": torch.tensor(1.0)})
    assert (adapter.rank, adapter.scale) == (2, 0.5)


def test_w2_b_is_read_with_the_kernels_axes_too():
    layer, _ = layer_and_input("conv 3x3")
    adapter = acting(new(layer, rank=1))
    tensors = adapter.tensors()
    assert tensors["lokr_w2_b"].dim() == 2
    four_axes = tensors["lokr_w2_b"].reshape(1, -1, 3, 3)
    again = LoKrModule.from_tensors(LayerSpec.of(layer), {**tensors, "lokr_w2_b": four_axes})
    assert torch.equal(again.own_delta(), adapter.own_delta())


def test_tensors_that_are_not_lokr_or_do_not_fit_are_refused():
    spec = LayerSpec(weight_shape=(24, 16))
    with pytest.raises(ValueError, match=r"no LoKr layer, its tensors are lokr_w1$"):
        LoKrModule.from_tensors(spec, {"lokr_w1": torch.ones(4, 4)})
    with pytest.raises(ValueError, match="product of 4 x 4 and 5 x 4, the layer has 24 x 16"):
        LoKrModule.from_tensors(spec, {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(5, 4)})
    with pytest.raises(ValueError, match="lokr_t1"):
        LoKrModule.from_tensors(
            spec, {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(6, 4), "lokr_t1": torch.ones(2, 2)}
        )


# Training


@every_form
def test_one_factor_starts_at_zero(layer_name, settings):
    layer, _ = layer_and_input(layer_name)
    adapter = new(layer, **settings)
    (zero,) = adapter.plus_parameters()
    assert [value is zero for _, value in adapter.named_parameters() if not value.any()] == [True]
    for name, value in adapter.named_parameters():
        assert value is zero or value.abs().max() <= 1 / math.sqrt(value[0].numel()), name
    again = new(layer, **settings)
    assert all(torch.equal(value, again.tensors()[name]) for name, value in adapter.tensors().items())


@pytest.mark.parametrize("wide", [False, True], ids=["linear", "convolution"])
def test_rank_dropout_drops_output_channels_of_each_sample_in_training_alone(wide):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 400, 3, padding=1) if wide else nn.Linear(16, 400)
    layer.requires_grad_(False)
    adapter = acting(new(layer, rank=1, rank_dropout=0.25)).train()
    x = torch.randn((20, 16, 3, 3) if wide else (20, 9, 16), generator=stream())
    full = LayerSpec.of(layer).apply(x, adapter.delta_weight(layer.weight))
    effect = adapter.effect(layer, x, layer(x))
    ratio = (effect / full).flatten(2) if wide else (effect / full).transpose(1, 2)  # (sample, channel, place)
    dropped = (ratio == 0).all(dim=2)
    assert 0.22 < dropped.float().mean() < 0.28
    assert not torch.equal(dropped[0], dropped[1])
    kept = ratio[~dropped]
    assert kept.median().item() == pytest.approx(4 / 3, rel=1e-4)
    torch.testing.assert_close(adapter.eval().effect(layer, x, layer(x)), full, rtol=1e-4, atol=1e-4)


def test_network_arguments_reach_the_layers(sd1):
    network = lokr.create_network(
        1.0, 4, 2, None, sd1.text_encoder, sd1.unet, factor="2", decompose_both="True", rs_lora="True", module_dropout="0.1"
    )
    adapters = [adapter for _, adapter in network.items()]
    assert all(isinstance(adapter, LoKrModule) and adapter.module_dropout == 0.1 for adapter in adapters)
    assert {adapter.form.inputs[0] for adapter in adapters} == {2}
    assert {adapter.scale for adapter in adapters} == {1.0}  # 2 / sqrt 4, in the file as alpha 4
    assert {adapter.alpha.item() for adapter in adapters} == {4.0}


def test_rank_stabilisation_means_nothing_with_two_full_factors(sd1):
    network = lokr.create_network(1.0, 4, 2, None, None, sd1.unet, full_matrix="True", rs_lora="True")
    assert {(adapter.scale, adapter.alpha.item()) for _, adapter in network.items()} == {(1.0, 4.0)}


# Other programs


def lycoris_lokr(layer: nn.Module, settings: dict, **options) -> nn.Module:
    chosen = {key: value for key, value in settings.items() if key != "rank"}
    return lycoris_module("LokrModule", layer, lora_dim=settings["rank"], **chosen, **options)


def readable_by_lycoris(settings: dict, on_output: bool | None) -> bool:
    """Its own reader fails on Tucker forms with a full w1, and takes all magnitudes for such along the outputs."""
    return "use_tucker" not in settings and "unbalanced_factorization" not in settings and on_output is not False


@dora
@every_form
def test_lycoris_reads_our_tensors_to_the_same_output(layer_name, settings, on_output):
    layer, x = layer_and_input(layer_name)
    options = {} if on_output is None else {"dora_wd": True, "wd_on_output": on_output}
    adapter = acting(new(layer, **settings, **options))
    if readable_by_lycoris(settings, on_output):
        theirs = read_by_lycoris(layer, adapter.tensors())
    else:
        magnitudes = {} if on_output is None else {"weight_decompose": True, "wd_on_out": on_output}
        theirs = lycoris_lokr(layer, settings, alpha=3, **magnitudes)
        theirs.load_state_dict(adapter.tensors())
    ours = attached(layer, adapter, x)
    assert (ours - layer(x)).abs().max() > 0.05
    torch.testing.assert_close(ours, output_with(layer, theirs, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@dora
@every_form
def test_we_read_lycoris_tensors_to_the_same_output(layer_name, settings, on_output, dtype):
    layer, x = layer_and_input(layer_name)
    options = {} if on_output is None else {"weight_decompose": True, "wd_on_out": on_output}
    theirs = lycoris_lokr(layer, settings, alpha=2, **options)
    tensors = {name: value.detach().to(dtype) for name, value in theirs.state_dict().items()}
    adapter = LoKrModule.from_tensors(LayerSpec.of(layer), tensors)
    assert adapter.tensors().keys() == tensors.keys()
    expected = output_with(layer, theirs, x)
    assert (expected - layer(x)).abs().max() > 0.05
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    limit = tolerance * expected.abs().max().item()
    torch.testing.assert_close(attached(layer, adapter, x), expected, rtol=tolerance, atol=limit)


_PEFT_NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@pytest.mark.parametrize(
    ("layer_name", "options"),
    [
        ("linear", {}),
        ("linear", {"decompose_both": True, "decompose_factor": 4}),
        ("conv 3x3", {}),
        ("conv 3x3", {"use_effective_conv2d": True}),
        ("conv 3x3", {"r": 16}),
    ],
    ids=str,
)
def test_the_product_is_pefts(layer_name, options):
    peft = pytest.importorskip("peft")
    layer, _ = layer_and_input(layer_name)
    settings = {"r": 1, "alpha": 1, "target_modules": ["0"], "init_weights": False} | options
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoKrConfig(**settings))
    theirs = model.base_model.model[0]
    tensors = {name: getattr(theirs, name)["default"].detach() for name in _PEFT_NAMES if "default" in getattr(theirs, name)}
    rank = len(tensors["lokr_w2_b"]) if "lokr_w2_b" in tensors else 1
    adapter = LoKrModule.from_tensors(LayerSpec.of(layer), {**tensors, "alpha": torch.tensor(float(rank))})
    # The product alone: peft divides alpha by r with two full factors too, where all others take 1.
    expected = theirs.get_delta_weight("default") / theirs.scaling["default"]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(adapter.delta_weight(layer.weight), expected, rtol=1e-5, atol=1e-7)
