"""What LoRA means: it starts as nothing, its delta acts like its effect, and its drop-outs drop in training only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from networks import lora
from networks.core.adapter import LayerSpec
from networks.lora import LoRAModule, low_rank_delta


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (3, 7, 12)),
    "linear on a matrix": (lambda: nn.Linear(12, 20, bias=False), (3, 12)),
    "conv 1x1": (lambda: nn.Conv2d(6, 10, 1), (2, 6, 5, 5)),
    "conv 3x3": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 8, 8)),
    "conv 3x3, stride 2": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "conv 3x3, dilated": (lambda: nn.Conv2d(6, 10, 3, padding=2, dilation=2, bias=False), (2, 6, 8, 8)),
}


@pytest.fixture(params=LAYERS, ids=str)
def case(request):
    make_layer, shape = LAYERS[request.param]
    torch.manual_seed(1)
    layer = make_layer().requires_grad_(False)
    adapter = LoRAModule(LayerSpec.of(layer), rank=3, alpha=2)
    adapter.initialise(stream(), torch.zeros(adapter.spec.weight_shape))
    return layer, torch.randn(shape, generator=stream(2)), adapter


def acting(adapter: LoRAModule, seed: int = 3) -> LoRAModule:
    nn.init.normal_(adapter.lora_up.weight, generator=stream(seed))
    return adapter


def attached(layer: nn.Module, adapter: LoRAModule, x: torch.Tensor) -> torch.Tensor:
    handle = layer.register_forward_hook(adapter.hook)
    try:
        return layer(x)
    finally:
        handle.remove()


def with_weight(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


def test_a_new_adapter_changes_nothing(case):
    layer, x, adapter = case
    assert adapter.delta_weight(layer.weight).abs().max() == 0
    assert torch.equal(attached(layer, adapter, x), layer(x))


def test_the_delta_is_the_papers_product(case):
    layer, _, adapter = case
    acting(adapter)
    down, up = adapter.lora_down.weight.detach().double(), adapter.lora_up.weight.detach().double().flatten(1)
    delta = adapter.delta_weight(layer.weight)
    assert delta.shape == layer.weight.shape
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), 2 / 3 * torch.einsum("or,r...->o...", up, down), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_adding_the_delta_to_the_weight_is_adding_its_effect(case, dtype, multiplier):
    layer, x, adapter = case
    acting(adapter).multiplier = multiplier
    layer, adapter, x = layer.to(dtype), adapter.to(dtype), x.to(dtype)
    out = attached(layer, adapter, x)
    exact = layer.double()
    merged = exact.weight + multiplier * adapter.double().delta_weight(exact.weight)
    expected = with_weight(exact, merged, x.double())
    assert (expected - exact(x.double())).abs().max() > 0.1, "the adapter must act, or this test says nothing"
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp32_adapter_under_autocast_is_as_exact_as_the_base(case, dtype):
    layer, x, adapter = case
    acting(adapter)
    expected = attached(layer, adapter, x)
    with torch.autocast("cpu", dtype):
        out = attached(layer, adapter, x)
        assert out.dtype == layer(x).dtype == dtype
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_an_fp32_adapter_on_a_half_precision_model_keeps_its_own_precision(case):
    layer, x, adapter = case
    acting(adapter)
    half = layer.to(torch.bfloat16)
    x = x.to(torch.bfloat16)
    out = attached(half, adapter, x)
    assert out.dtype == torch.bfloat16
    effect = LayerSpec.of(layer).apply(x.float(), adapter.delta_weight(layer.weight))
    torch.testing.assert_close(out.float(), half(x).float() + effect, rtol=2e-2, atol=2e-2)


def test_a_half_precision_adapter_on_an_fp32_model_leaves_the_output_fp32(case):
    layer, x, adapter = case
    out = attached(layer, acting(adapter).to(torch.float16), x)
    assert out.dtype == torch.float32
    merged = with_weight(layer, layer.weight + adapter.delta_weight(layer.weight), x)
    torch.testing.assert_close(out, merged, rtol=1e-4, atol=1e-4)


def test_multiplier_zero_gives_the_base_output_bit_for_bit(case):
    layer, x, adapter = case
    acting(adapter).multiplier = 0.0
    assert torch.equal(attached(layer, adapter, x), layer(x))


def test_the_base_output_is_not_changed_in_place(case):
    layer, x, adapter = case
    output = layer(x)
    kept = output.clone()
    acting(adapter).forward(layer, x, output)
    assert torch.equal(output, kept)


def test_gradients_are_those_of_the_merged_weight(case):
    layer, x, adapter = case
    acting(adapter)
    attached(layer, adapter, x).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in adapter.parameters()]
    adapter.zero_grad()
    with_weight(layer, layer.weight + adapter.delta_weight(layer.weight), x).square().sum().backward()
    for gradient, parameter in zip(gradients, adapter.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-3)


def test_down_starts_like_a_linear_layer_of_torch():
    adapter = LoRAModule(LayerSpec(weight_shape=(64, 32, 3, 3)), rank=16, alpha=1)
    adapter.initialise(stream(), torch.zeros(adapter.spec.weight_shape))
    values, bound = adapter.lora_down.weight.detach(), 1 / math.sqrt(32 * 9)
    assert 0.99 * bound < values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert adapter.lora_up.weight.abs().max() == 0


def test_tensors_and_back(case):
    layer, _, adapter = case
    acting(adapter)
    tensors = adapter.tensors()
    assert set(tensors) == {"lora_down.weight", "lora_up.weight", "alpha"}
    copy = LoRAModule.from_tensors(LayerSpec.of(layer), tensors)
    assert torch.equal(copy.delta_weight(layer.weight), adapter.delta_weight(layer.weight))
    assert (copy.rank, copy.scale) == (3, 2 / 3)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_a_file_without_alpha_means_alpha_equal_to_rank(alpha):
    spec = LayerSpec(weight_shape=(5, 4))
    tensors = {"lora_down.weight": torch.randn(2, 4), "lora_up.weight": torch.randn(5, 2)}
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    adapter = LoRAModule.from_tensors(spec, tensors)
    assert (adapter.scale, adapter.alpha.item()) == (1.0, 2.0)


def test_alpha_of_one_element_is_read_as_a_scalar():
    tensors = {"lora_down.weight": torch.randn(2, 4), "lora_up.weight": torch.randn(5, 2), "alpha": torch.tensor([6])}
    assert LoRAModule.from_tensors(LayerSpec(weight_shape=(5, 4)), tensors).scale == 3.0


def test_tensors_of_another_algorithm_are_refused():
    with pytest.raises(ValueError, match="is no LoRA layer, its tensors are hada_w1_a"):
        LoRAModule.from_tensors(LayerSpec(weight_shape=(5, 4)), {"hada_w1_a": torch.zeros(5, 2)})


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout", "module_dropout"])
def test_dropouts_act_in_training_only(case, kind):
    layer, x, adapter = case
    dropping = LoRAModule(LayerSpec.of(layer), rank=3, alpha=2, **{kind: 0.5})
    dropping.load_state_dict(acting(adapter).state_dict())
    full = attached(layer, adapter, x)
    outputs = [attached(layer, dropping.train(), x) for _ in range(8)]
    assert any(not torch.equal(outputs[0], output) for output in outputs[1:])
    assert torch.equal(attached(layer, dropping.eval(), x), full)


def hidden_after(kind: str, spec: LayerSpec, shape: tuple[int, ...], share: float = 0.3) -> torch.Tensor:
    torch.manual_seed(0)
    adapter = LoRAModule(spec, rank=4, alpha=4, **{kind: share})
    return torch.stack([adapter._drop(torch.ones(shape)) for _ in range(200)])


CONV, LINEAR = LayerSpec(weight_shape=(5, 6, 3, 3)), LayerSpec(weight_shape=(5, 6))


@pytest.mark.parametrize(("spec", "shape"), [(LINEAR, (8, 5, 4)), (CONV, (8, 4, 3, 3))], ids=["linear", "conv"])
class TestDropoutStatistics:
    def test_dropout_zeroes_its_share_of_values_and_keeps_the_mean(self, spec, shape):
        hidden = hidden_after("dropout", spec, shape)
        assert (hidden == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
        assert hidden.mean().item() == pytest.approx(1, abs=0.02)

    def test_rank_dropout_zeroes_whole_ranks_of_single_samples(self, spec, shape):
        hidden = hidden_after("rank_dropout", spec, shape)
        by_rank = hidden.transpose(2, -1) if spec.is_linear else hidden.flatten(3)
        assert (by_rank == by_rank[..., :1]).all(), "a rank is dropped as a whole"
        kept = by_rank[..., 0]
        assert (kept == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
        assert kept.mean().item() == pytest.approx(1, abs=0.03)
        assert (kept.std(dim=1) > 0).any(), "samples of a batch are dropped separately"


def test_module_dropout_drops_everything_or_nothing(case):
    layer, x, adapter = case
    dropping = LoRAModule(adapter.spec, rank=3, alpha=2, module_dropout=0.3)
    dropping.load_state_dict(acting(adapter).state_dict())
    base, full = layer(x), attached(layer, adapter, x)
    torch.manual_seed(0)
    outputs = [attached(layer, dropping.train(), x) for _ in range(400)]
    dropped = [torch.allclose(output, base) for output in outputs]
    assert all(out or torch.allclose(output, full) for out, output in zip(dropped, outputs, strict=True)), "not scaled"
    assert sum(dropped) / 400 == pytest.approx(0.3, abs=0.06)


def test_the_norm_is_that_of_the_dense_delta(case):
    layer, _, adapter = case
    acting(adapter)
    expected = adapter.delta_weight(layer.weight).norm()
    torch.testing.assert_close(adapter.delta_norm(layer.weight), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        adapter.scale_delta_(torch.tensor(0.25))
    torch.testing.assert_close(adapter.delta_weight(layer.weight).norm(), expected / 4, rtol=1e-5, atol=1e-6)


def test_the_delta_of_files_needs_no_layer():
    down, up = torch.randn(2, 6, 3, 3), torch.randn(5, 2, 1, 1)
    assert low_rank_delta(down, up, 0.5).shape == (5, 6, 3, 3)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")])
def test_layers_that_cannot_be_adapted_exactly_are_refused(layer):
    with pytest.raises((TypeError, ValueError), match="grouped|no adapter"):
        LoRAModule(LayerSpec.of(layer), rank=2, alpha=1)


FORMS = [
    {},
    {"rs_lora": True},
    {"dora_wd": True},
    {"dora_wd": True, "wd_on_output": True},
    {"init": "pissa"},
    {"init": "olora", "dora_wd": True},
    {"init": "orthogonal"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
class TestFormsInANetwork:
    def network(self, models, **form):
        return lora.create_network(1.0, 4, 2, None, models.text_encoder, models.unet, conv_dim=2, **form)

    def test_large_changes_are_scaled_down_and_small_ones_left_alone(self, sd1, perturb, form):
        network = perturb(self.network(sd1, **form))
        names = list(network.targets)
        small, large = network.adapter(names[0]), network.adapter(names[-1])
        with torch.no_grad():
            small.scale_delta_(torch.tensor(1e-3))
        before = small.own_delta(), large.own_delta()
        scaled, _, largest = network.apply_max_norm_regularization(0.5)
        assert 0 < scaled < len(names)
        assert largest <= 0.5 * (1 + 1e-5)
        assert small.own_delta().equal(before[0])
        torch.testing.assert_close(large.own_delta(), before[1] * 0.5 / before[1].norm(), rtol=1e-4, atol=1e-6)

    def test_lora_plus_is_for_the_up_matrices(self, sd1, form):
        network = self.network(sd1, **form, loraplus_lr_ratio=16)
        groups, _ = network.prepare_optimizer_params(None, None, 1e-3)
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
        assert rates == {name: 16e-3 if "lora_up" in name else 1e-3 for name in names.values()}

    def test_dropouts_act(self, sd1, perturb, form):
        for kind in ("dropout", "rank_dropout", "module_dropout"):
            network = perturb(self.network(sd1, **form, **{kind: 0.5})).train()
            torch.manual_seed(0)
            target, adapter = next((target, adapter) for target, adapter in network.items() if target.part == "text_encoder")
            x = torch.randn(2, 3, target.spec.weight_shape[1])
            outputs = [attached(target.layer, adapter, x) for _ in range(8)]
            assert any(not output.allclose(outputs[0]) for output in outputs)
            assert attached(target.layer, adapter.eval(), x).equal(attached(target.layer, adapter, x))
