"""Weights in fewer bits: the layer is that of the rounded weight, exactly, and how far it is rounded is told truly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from library.checkpoints.base_model import open_base_model
from library.checkpoints.packed_weights import PackedLayer, check_weight_format, make_packable, summarise_packing
from library.errors import UserError
from tests.networks.cases import CASES, acting, attached, layer_and_input, new_adapter

FORMATS = ["fp8", "nf4"]
every_format = pytest.mark.parametrize("weight_format", FORMATS)
every_layer = pytest.mark.parametrize("layer_name", ["linear", "square", "conv 1x1", "conv 3x3"])


def packed(layer: nn.Module, weight_format: str, dtype: torch.dtype = torch.float32) -> PackedLayer:
    """A copy of a layer, packed."""
    container = nn.Sequential(copy.deepcopy(layer))
    weight = layer.get_parameter("weight").detach()
    (holder,) = make_packable(container).values()
    holder.hold(weight, weight_format, dtype)
    return holder


def rounded(layer: nn.Module, holder: PackedLayer) -> nn.Module:
    """A plain layer with the weight that the packed one forms."""
    result = copy.deepcopy(layer)
    result.get_parameter("weight").data = holder.weight
    return result


def kept_for_backward(forward: Callable[[], Tensor]) -> list[Tensor]:
    """What autograd keeps of a forward pass."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        forward()
    return kept


def output_and_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    return out, torch.autograd.grad(out.float().sin().sum(), x)[0]


@every_format
@every_layer
def test_output_and_gradient_are_those_of_the_rounded_weight(weight_format, layer_name):
    layer, x = layer_and_input(layer_name)
    holder = packed(layer, weight_format)
    assert isinstance(holder, type(layer))
    wanted = output_and_gradient(rounded(layer, holder), x)
    for found, expected in zip(output_and_gradient(holder, x), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(layer(x), wanted[0]), "rounding must show, or this test says nothing"


@every_format
@every_layer
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_too(weight_format, layer_name, input_dtype):
    layer, x = layer_and_input(layer_name)
    holder = packed(layer.to(torch.bfloat16), weight_format, torch.bfloat16)
    plain = rounded(layer, holder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = (output_and_gradient(each, x.to(input_dtype)) for each in (holder, plain))
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in wanted] == [torch.bfloat16, input_dtype]
    for each, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_error_is_told_and_small(weight_format, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(256, 96)
    spreads = torch.logspace(-5, 1, 96).unsqueeze(1)
    layer.weight.data = torch.randn(96, 256) * spreads
    holder = packed(layer, weight_format, dtype)
    assert holder.weight.dtype == dtype
    error = ((holder.weight.double() - layer.weight).norm() / layer.weight.double().norm()).item()
    assert 0.01 < error < {"fp8": 0.028, "nf4": 0.1}[weight_format]
    summary = summarise_packing(holder)
    assert summary.error == pytest.approx(error, rel=1e-4)
    assert summary.plain_nbytes == 96 * 256 * dtype.itemsize
    bits = 8 * summary.nbytes / (96 * 256)
    assert {"fp8": 8, "nf4": 4.5}[weight_format] <= bits < {"fp8": 8.2, "nf4": 4.6}[weight_format]
    rows = ((holder.weight - layer.weight).norm(dim=1) / layer.weight.norm(dim=1)).tolist()
    assert max(rows) < {"fp8": 0.04, "nf4": 0.15}[weight_format], "rows of every size keep their share of the precision"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fp8_keeps_zeros_powers_of_two_and_the_ends_of_the_range(dtype):
    layer = nn.Linear(4, 5)
    largest = 60000.0 if dtype == torch.float16 else 1e30
    rows = [[0, 0, 0, 0], [1, -0.5, 2**-6, 2**-16], [1e-6, 0, -1e-6, 0], [largest, 1, 0, -largest], [448, 416, 1.125, 0]]
    layer.weight.data = torch.tensor(rows)
    weight = packed(layer, "fp8", dtype).weight.float()
    assert torch.equal(weight[:2], layer.weight[:2])
    assert torch.equal(weight[4], layer.weight[4])
    torch.testing.assert_close(weight[2], layer.weight[2], rtol=0.07, atol=0)
    torch.testing.assert_close(weight[3, [0, 3]], layer.weight[3, [0, 3]], rtol=0.07, atol=0)


def test_nf4_is_that_of_bitsandbytes():
    import bitsandbytes

    layer = nn.Linear(128, 64)
    theirs = bitsandbytes.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(3, 128)
    torch.testing.assert_close(packed(layer, "nf4")(x), theirs.to("cpu")(x), rtol=1e-5, atol=1e-5)


@every_format
@every_layer
def test_no_weight_is_kept_for_the_backward_pass(weight_format, layer_name):
    layer, x = layer_and_input(layer_name)
    holder = packed(layer, weight_format)
    assert kept_for_backward(lambda: holder(x.requires_grad_())) == []


ON_WEIGHTS = [case for case in CASES if "linear" in case.layers]


@every_format
@pytest.mark.parametrize("case", ON_WEIGHTS, ids=str)
@pytest.mark.parametrize("layer_name", ["linear", "conv 3x3"])
def test_nor_by_an_adapter_on_the_layer(weight_format, case, layer_name):
    layer, x = layer_and_input(layer_name)
    holder = packed(layer, weight_format)
    adapter = acting(new_adapter(case, layer)).train()
    formed = holder.weight.flatten().sort().values
    kept = kept_for_backward(lambda: attached(holder, adapter, x.requires_grad_()))
    alike = [tensor for tensor in kept if tensor.numel() == formed.numel()]
    assert not [tensor for tensor in alike if torch.equal(tensor.flatten().sort().values, formed)]


@every_format
def test_a_change_of_dtype_leaves_what_is_packed(weight_format):
    layer, x = layer_and_input("linear")
    holder = packed(layer, weight_format)
    before = holder.weight
    assert torch.equal(holder.to(torch.bfloat16).weight, before)
    assert holder.bias.dtype == torch.bfloat16


@every_format
@pytest.mark.parametrize("case", ON_WEIGHTS, ids=str)
@pytest.mark.parametrize("layer_name", ["linear", "conv 3x3"])
def test_adapters_act_on_a_packed_layer_as_on_the_rounded_weight(weight_format, case, layer_name):
    layer, x = layer_and_input(layer_name)
    holder = packed(layer, weight_format)
    plain = rounded(layer, holder)
    results = []
    for base in (holder, plain):
        adapter = acting(new_adapter(case, plain)).train()
        out = attached(base, adapter, x)
        gradients = torch.autograd.grad(out.square().sum(), [p for p in adapter.parameters() if p.requires_grad])
        results.append([out, *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))


@every_format
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_model_is_packed_in_its_blocks(request, name, weight_format):
    base = open_base_model(request.getfixturevalue(f"tiny_{name}_folder"))
    cpu = {"dtype": torch.float32, "device": "cpu"}
    for plain, model in [
        (base.load_denoiser(**cpu), base.load_denoiser(**cpu, weight_format=weight_format)),
        *zip(base.load_text_encoders(**cpu), base.load_text_encoders(**cpu, weight_format=weight_format), strict=True),
    ]:
        holders = {name for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
        layers = {name for name, layer in plain.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
        kept = {"conv_in", "conv_out", "text_projection"}
        first = {name.split(".")[0] for name in layers - holders}
        assert holders
        assert first <= kept | {"time_embedding", "add_embedding"}, "what surrounds the blocks stays"
        changed = total = 0.0
        for key, value in plain.state_dict().items():
            layer, _, leaf = key.rpartition(".")
            if layer in holders and leaf == "weight":
                changed += (model.get_submodule(layer).weight - value).double().square().sum().item()
                total += value.double().square().sum().item()
            else:
                assert torch.equal(model.state_dict()[key], value)
        assert summarise_packing(model).error == pytest.approx(math.sqrt(changed / total), rel=1e-4)


def test_other_packages_may_make_layers_of_the_class():
    layer, x = layer_and_input("linear")
    fresh = type(packed(layer, "fp8"))(16, 24)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(fresh.to(torch.float64).weight, layer.weight.double())


def test_other_packages_may_take_the_weight_away():
    layer, x = layer_and_input("linear")
    holder = packed(layer, "nf4")
    del holder.weight
    holder.weight = nn.Parameter(layer.weight)
    assert torch.equal(holder(x), layer(x))
    torch.testing.assert_close(holder.without_bias(x), layer(x) - layer.bias)


@every_format
def test_weights_that_are_no_numbers_stay_none(weight_format):
    layer = nn.Linear(64, 3)
    layer.weight.data[0, 5], layer.weight.data[1, 5] = math.inf, math.nan
    holder = packed(layer, weight_format)
    assert not holder.weight[0, 5].isfinite()
    assert not holder.weight[1, 5].isfinite()
    assert holder.weight[2].isfinite().all()
    assert not math.isfinite(summarise_packing(holder).error)


def test_fp8_keeps_the_rest_of_a_row():
    layer = nn.Linear(64, 1)
    layer.weight.data[0, 5] = math.inf
    weight = packed(layer, "fp8").weight
    torch.testing.assert_close(weight[0, :5], layer.weight[0, :5], rtol=0.07, atol=1e-4)


def test_a_format_that_does_not_work_is_told(monkeypatch):
    import sys

    device = torch.device("cpu")
    for weight_format in FORMATS:
        check_weight_format(weight_format, device, where="--here")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_weight_format("fp8", device, where="--fp8_base")
    with pytest.raises(UserError, match="^--nf4_base: needs bitsandbytes; run pip install bitsandbytes$"):
        check_weight_format("nf4", device, where="--nf4_base")
