"""LoRA layers in the spellings of other programs: every one is read as the change it means, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import lora
from networks.core.adapter import LayerSpec
from networks.formats.files import save_tensors
from networks.lora import LoRAModule
from tests.networks.cases import attached, changed, layer_and_input, stream

LAYERS = ["linear", "conv 1x1", "conv 3x3"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=stream(seed))


def factors(spec: LayerSpec, rank: int = 3) -> dict[str, torch.Tensor]:
    """A file's tensors of one layer, in the usual spelling."""
    outputs, *inputs = spec.weight_shape
    up = normal(outputs, rank, *(1 for _ in inputs[1:]), seed=1)
    return {"lora_down.weight": normal(rank, *inputs), "lora_up.weight": up, "alpha": torch.tensor(1.5)}


def usual_delta(spec: LayerSpec) -> torch.Tensor:
    """What `factors` means, scale 1.5 / 3 included."""
    tensors = factors(spec)
    return 0.5 * torch.einsum("or,r...->o...", tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"])


def check_acts_as(layer: nn.Module, x: torch.Tensor, adapter: LoRAModule, delta: torch.Tensor) -> None:
    """The change is this one, in the weights and on the output, and so it is after saving and reading."""
    weight = layer.get_parameter("weight")
    torch.testing.assert_close(adapter.delta_weight(weight), delta, rtol=1e-5, atol=1e-5)
    for training in (False, True):
        out = attached(layer, adapter.train(training), x)
        torch.testing.assert_close(out, changed(layer, adapter, x), rtol=1e-5, atol=1e-4)
    again = LoRAModule.from_tensors(adapter.spec, adapter.tensors())
    torch.testing.assert_close(again.delta_weight(weight), delta, rtol=1e-5, atol=1e-5)
    assert attached(layer, again, x).equal(attached(layer, adapter, x))


@pytest.fixture(params=LAYERS)
def place(request):
    layer, x = layer_and_input(request.param)
    return layer, x, LayerSpec.of(layer)


def test_flattened_factors(place):
    """LyCORIS' functional form and DyLoRA write `down` (r, in * kernel), many write `up` (out, r)."""
    layer, x, spec = place
    tensors = factors(spec)
    flat = {name: tensor.flatten(1) if tensor.dim() else tensor for name, tensor in tensors.items()}
    check_acts_as(layer, x, LoRAModule.from_tensors(spec, flat), usual_delta(spec))


@pytest.mark.parametrize("flat", [False, True], ids=["with kernel axes", "as matrices"])
def test_a_middle_factor(place, flat):
    layer, x, spec = place
    outputs, inputs, *kernel = spec.weight_shape
    ones = () if flat else tuple(1 for _ in kernel)
    down, up, middle = normal(4, inputs, *ones), normal(outputs, 4, *ones, seed=1), normal(4, 4, *kernel, seed=2)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": middle, "alpha": torch.tensor(2.0)}
    adapter = LoRAModule.from_tensors(spec, tensors)
    assert set(adapter.tensors()) == {"lora_down.weight", "lora_up.weight", "alpha"}
    exact = torch.einsum("op,pq...,qi->oi...", up.flatten(1).double(), middle.double(), down.flatten(1).double())
    check_acts_as(layer, x, adapter, 0.5 * exact.float())
    other = LoRAModule(spec, rank=4, alpha=1)
    other.load_tensors(tensors)
    assert other.delta_weight(layer.weight).equal(adapter.delta_weight(layer.weight))


def test_a_middle_factor_between_two_ranks_keeps_the_scale(place):
    layer, x, spec = place
    outputs, inputs, *kernel = spec.weight_shape
    down, up, middle = normal(2, inputs), normal(outputs, 4, seed=1), normal(4, 2, *kernel, seed=2)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": middle, "alpha": torch.tensor(1.0)}
    exact = torch.einsum("op,pq...,qi->oi...", up.double(), middle.double(), down.double())
    check_acts_as(layer, x, LoRAModule.from_tensors(spec, tensors), 0.5 * exact.float())


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
def test_a_change_of_the_bias_beside_the_factors(place, dora):
    layer, x, spec = place
    tensors = factors(spec) | {"diff_b": normal(spec.weight_shape[0], seed=4).half()}
    if dora:
        tensors["dora_scale"] = 1 + normal(1, spec.weight_shape[1], *(1 for _ in spec.weight_shape[2:])).abs()
    adapter = LoRAModule.from_tensors(spec, tensors)
    torch.testing.assert_close(adapter.delta_bias(), tensors["diff_b"].float())
    assert "diff_b" in adapter.tensors()
    for multiplier in (1.0, -0.5):
        adapter.multiplier = multiplier
        expected = changed(layer, adapter, x, multiplier)
        torch.testing.assert_close(attached(layer, adapter, x), expected, rtol=1e-4, atol=1e-4)
    without = LoRAModule.from_tensors(spec, {name: tensor for name, tensor in tensors.items() if name != "diff_b"})
    assert not attached(layer, without, x).allclose(attached(layer, adapter, x), atol=1e-2)


def test_a_change_of_a_bias_that_is_not_there_is_refused():
    spec = LayerSpec(weight_shape=(5, 4))
    with pytest.raises(ValueError, match="change of the bias .diff_b., but the base layer has no bias"):
        LoRAModule.from_tensors(spec, factors(spec) | {"diff_b": normal(5)})
    with pytest.raises(ValueError, match="the base layer has no bias"):
        LoRAModule(spec, rank=3, alpha=1).load_tensors(factors(spec) | {"diff_b": normal(5)})
    assert "diff_b" not in LoRAModule.from_tensors(spec, factors(spec) | {"diff_b": torch.zeros(5)}).tensors()


@pytest.mark.parametrize("alpha", [None, torch.tensor(9.0), torch.tensor(0.0)])
def test_a_scale_replaces_alpha(place, alpha):
    layer, x, spec = place
    tensors = factors(spec) | {"scale": torch.tensor(0.5)}
    tensors.pop("alpha")
    if alpha is not None:
        tensors["alpha"] = alpha
    adapter = LoRAModule.from_tensors(spec, tensors)
    assert adapter.tensors()["alpha"] == 1.5
    check_acts_as(layer, x, adapter, usual_delta(spec))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int16])
def test_alpha_of_any_dtype_and_shape(dtype, shape):
    spec = LayerSpec(weight_shape=(5, 4))
    adapter = LoRAModule.from_tensors(spec, factors(spec) | {"alpha": torch.full(shape, 6, dtype=dtype)})
    assert (adapter.scale, adapter.alpha.dtype, adapter.alpha.shape) == (2.0, torch.float32, ())


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("alpha", torch.tensor(torch.inf), "its alpha is infinite"),
        ("alpha", torch.tensor(9999999999).half(), "its alpha is infinite"),
        ("alpha", torch.tensor(torch.nan), "its alpha is not a number"),
        ("alpha", torch.ones(3), "its alpha is not one number but .3."),
        ("scale", torch.tensor(-torch.inf), "its scale is infinite"),
    ],
)
def test_an_alpha_that_is_no_number_is_refused(name, value, sentence):
    spec = LayerSpec(weight_shape=(5, 4))
    tensors = factors(spec) | {name: value}
    with pytest.raises(ValueError, match=sentence):
        LoRAModule.from_tensors(spec, tensors)
    with pytest.raises(ValueError, match=sentence):
        LoRAModule(spec, rank=3, alpha=1).load_tensors(tensors)


@pytest.mark.parametrize("strangers", [("diff",), ("set_weight",), ("hada_w1_a", "reshape_weight")])
def test_tensors_that_do_not_belong_are_named(strangers):
    spec = LayerSpec(weight_shape=(5, 4))
    with pytest.raises(ValueError, match=f"do not belong to a LoRA layer: {', '.join(strangers)}$"):
        LoRAModule.from_tensors(spec, factors(spec) | {name: torch.zeros(5, 4) for name in strangers})


def test_a_middle_factor_of_another_rank_is_refused():
    spec = LayerSpec(weight_shape=(5, 4, 3, 3))
    tensors = factors(LayerSpec(weight_shape=(5, 4, 1, 1))) | {"lora_mid.weight": normal(2, 2, 3, 3)}
    with pytest.raises(ValueError, match=r"lora_mid.weight \[2, 2, 3, 3\], which does not go with .*\[3, 4, 1, 1\]"):
        LoRAModule.from_tensors(spec, tensors)


class TestResidue:
    """LyCORIS' extraction keeps single large values of the weight's change, under names that say bias."""

    @staticmethod
    def residue(spec: LayerSpec) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The three tensors, and the change of the weight that they are."""
        dense = normal(*spec.weight_shape, seed=7) * (normal(*spec.weight_shape, seed=8) > 1)
        sparse = dense.flatten(1).to_sparse().coalesce()
        tensors = {
            "bias_indices": sparse.indices().to(torch.int16),
            "bias_values": sparse.values(),
            "bias_size": torch.tensor(dense.flatten(1).shape).to(torch.int16),
        }
        return tensors, dense

    def test_it_is_added_to_the_weight(self, place):
        layer, x, spec = place
        tensors, dense = self.residue(spec)
        adapter = LoRAModule.from_tensors(spec, factors(spec) | tensors | {"alpha": torch.tensor([3.0]).half()})
        check_acts_as(layer, x, adapter, 2 * usual_delta(spec) + dense)

    def test_it_is_scaled_with_the_change(self, place):
        layer, _, spec = place
        tensors, _ = self.residue(spec)
        adapter = LoRAModule.from_tensors(spec, factors(spec) | tensors)
        before, norm = adapter.delta_weight(layer.weight), adapter.delta_norm(layer.weight)
        torch.testing.assert_close(norm, before.norm())
        with torch.no_grad():
            adapter.scale_delta_(torch.tensor(0.25))
        torch.testing.assert_close(adapter.delta_weight(layer.weight), before / 4, rtol=1e-5, atol=1e-6)

    def test_its_places_survive_half_precision(self, place, tmp_path):
        _, _, spec = place
        adapter = LoRAModule.from_tensors(spec, factors(spec) | self.residue(spec)[0])
        save_tensors(tmp_path / "half.pt", adapter.to(torch.float16).tensors(), torch.float16, None)
        saved = torch.load(tmp_path / "half.pt", weights_only=True)
        assert saved["bias_indices"].dtype == torch.int16
        assert saved["bias_indices"].equal(self.residue(spec)[0]["bias_indices"])
        assert saved["bias_values"].dtype == torch.float16

    @pytest.mark.parametrize(
        ("broken", "sentence"),
        [
            ({"bias_size": torch.tensor([12, 8])}, r"bias_size of \[12, 8\], but the base weight's is \[24, 16\]"),
            ({"bias_indices": torch.tensor([[99], [0]]), "bias_values": torch.ones(1)}, "outside the base weight"),
            ({"bias_values": torch.ones(1)}, r"do not go with bias_values \[1\]"),
            ({"bias_values": None}, "has bias_indices, bias_size without bias_values"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, broken, sentence):
        layer, _ = layer_and_input("linear")
        spec = LayerSpec.of(layer)
        tensors = factors(spec) | self.residue(spec)[0] | broken
        with pytest.raises(ValueError, match=sentence):
            LoRAModule.from_tensors(spec, {name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout", "module_dropout"])
@pytest.mark.parametrize("form", ["middle", "DoRA", "bias"])
def test_dropouts_act_on_what_was_read(form, kind):
    layer, x = layer_and_input("conv 3x3")
    spec = LayerSpec.of(layer)
    tensors = {
        "middle": factors(LayerSpec(weight_shape=(12, 8, 1, 1))) | {"lora_mid.weight": normal(3, 3, 3, 3)},
        "DoRA": factors(spec) | {"dora_scale": 1 + normal(1, 8, 1, 1).abs()},
        "bias": factors(spec) | {"diff_b": normal(12)},
    }[form]
    full = attached(layer, LoRAModule.from_tensors(spec, tensors), x)
    dropping = LoRAModule.from_tensors(spec, tensors, **{kind: 0.5})
    outputs = [attached(layer, dropping.train(), x) for _ in range(8)]
    assert any(not outputs[0].equal(output) for output in outputs[1:])
    torch.testing.assert_close(attached(layer, dropping.eval(), x), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_output", [False, True])
def test_magnitudes_of_a_square_layer_keep_their_axis(on_output):
    spec = LayerSpec(weight_shape=(4, 4))
    tensors = factors(spec) | {"dora_scale": 1 + normal(4, 1).abs() if on_output else 1 + normal(1, 4).abs()}
    adapter = LoRAModule.from_tensors(spec, tensors)
    assert adapter.magnitude_axis == ("output" if on_output else "input")
    with pytest.raises(ValueError, match="magnitudes are along the"):
        LoRAModule(spec, rank=3, alpha=1, dora_wd=True, wd_on_output=not on_output).load_tensors(tensors)


@torch.no_grad()
def test_a_file_of_odd_spellings_acts_the_same_attached_and_merged(sd1, tmp_path):
    network = lora.create_network(1.0, 3, 1, None, sd1.text_encoder, sd1.unet, conv_dim=3)
    tensors = {}
    for number, (target, adapter) in enumerate(network.items()):
        layer = {name: 0.3 * normal(*tensor.shape, seed=number) for name, tensor in adapter.tensors().items()}
        layer["alpha"] = torch.tensor([1.0])
        if target.spec.is_wide:
            outputs, inputs, *kernel = target.spec.weight_shape
            layer["lora_down.weight"] = 0.3 * normal(3, inputs, 1, 1)
            layer["lora_mid.weight"] = 0.3 * normal(3, 3, *kernel)
        elif target.spec.has_bias:
            layer["diff_b"] = 0.1 * normal(target.spec.weight_shape[0])
        else:
            layer |= TestResidue.residue(target.spec)[0]
        tensors |= {f"{target.name}.{name}": tensor for name, tensor in layer.items()}
    save_tensors(tmp_path / "odd.safetensors", tensors, torch.float16, {})
    read, again = lora.create_network_from_weights(1.0, tmp_path / "odd.safetensors", None, sd1.text_encoder, sd1.unet)
    read.load_state_dict(again)
    base = sd1.both()
    read.attach()
    attached_output = sd1.both()
    read.merge()
    merged = sd1.both()
    read.unmerge()
    assert (attached_output - base).abs().max() > 0.1
    torch.testing.assert_close(attached_output, merged, rtol=1e-3, atol=1e-4 * base.abs().max().item())
    assert sd1.both().equal(base)
