"""Other programs' own forward and backward passes as judges of LoRA and DoRA: peft, diffusers, lycoris-lora; and float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import lora
from networks.core.adapter import LayerSpec
from networks.lora import LoRAModule
from tests.networks.cases import attached, layer_and_input, stream

RANK, ALPHA = 4, 2.0
LAYERS = ["linear", "square", "conv 1x1", "conv 3x3"]
on_layers = pytest.mark.parametrize("layer_name", LAYERS)


def new(layer: nn.Module, **options: Any) -> LoRAModule:
    adapter = LoRAModule(LayerSpec.of(layer), rank=RANK, alpha=ALPHA, **options)
    adapter.initialise(stream(), layer.get_parameter("weight"))
    return adapter


def shaken(adapter: LoRAModule, seed: int = 3) -> LoRAModule:
    """The adapter away from its start, its magnitudes within a fifth of theirs."""
    generator = stream(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + noise) if name == "dora_scale" else parameter + noise)
    return adapter


def loss_of(output: Tensor) -> Tensor:
    """A loss with another weight for each value, so that no error of a gradient cancels."""
    return (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum() + output.square().mean()


# peft


class OfPeft:
    """A copy of a layer inside peft's LoRA layer."""

    def __init__(self, layer: nn.Module, **config: Any) -> None:
        from copy import deepcopy

        from peft import LoraConfig, inject_adapter_in_model

        settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["layer"]} | config
        self.model = nn.ModuleDict({"layer": deepcopy(layer)})
        inject_adapter_in_model(LoraConfig(**settings), self.model)
        self.layer = self.model["layer"]
        self.down, self.up = self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight
        magnitudes = self.layer.lora_magnitude_vector
        self.magnitudes = magnitudes["default"].weight if "default" in magnitudes else None

    def take(self, adapter: LoRAModule) -> OfPeft:
        """The factors and magnitudes of an adapter of ours."""
        with torch.no_grad():
            self.down.copy_(adapter.lora_down.weight)
            self.up.copy_(adapter.lora_up.weight)
            if self.magnitudes is not None:
                self.magnitudes.copy_(adapter.dora_scale.view(self.magnitudes.shape))
        return self

    def parameters(self) -> list[Tensor]:
        found = [self.down, self.up]
        return found if self.magnitudes is None else [*found, self.magnitudes]


def trained_of(adapter: LoRAModule) -> list[Tensor]:
    """In the order of `OfPeft.parameters`."""
    found = [adapter.lora_down.weight, adapter.lora_up.weight]
    return found if adapter.dora_scale is None else [*found, adapter.dora_scale]


@on_layers
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
def test_forward_and_gradients_are_pefts(layer_name, dora):
    layer, x = layer_and_input(layer_name)
    adapter = shaken(new(layer, dora_wd=dora, wd_on_output=dora)).train()
    theirs = OfPeft(layer, use_dora=dora).take(adapter)
    results = []
    for run, parameters in (
        (lambda inputs: attached(layer, adapter, inputs), trained_of(adapter)),
        (theirs.layer, theirs.parameters()),
    ):
        inputs = x.clone().requires_grad_()
        output = run(inputs)
        results.append((output, torch.autograd.grad(loss_of(output), [inputs, *parameters])))
    (ours, our_gradients), (output, gradients) = results
    assert not ours.allclose(layer(x), atol=0.1)
    torch.testing.assert_close(ours, output, rtol=1e-4, atol=1e-5)
    for gradient, wanted in zip(our_gradients, gradients, strict=True):
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(gradient, wanted.view(gradient.shape), rtol=1e-3, atol=1e-4)


def trained(run: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> None:
    """Five steps of plain gradient descent, which does not see the sign that a pair of singular vectors has."""
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(run(x)).backward()
        optimizer.step()


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
@pytest.mark.parametrize("rs_lora", [False, True], ids=["", "rsLoRA"])
@pytest.mark.parametrize("layer_name", ["linear", "square"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_principal_starts_train_as_in_peft_and_the_file_is_for_the_original_base(init, layer_name, rs_lora, dora):
    layer, x = layer_and_input(layer_name)
    theirs = OfPeft(layer, init_lora_weights=init, use_dora=dora, use_rslora=rs_lora)
    alpha = ALPHA * math.sqrt(RANK) if rs_lora else ALPHA
    ours = LoRAModule(LayerSpec.of(layer), rank=RANK, alpha=alpha, init=init, dora_wd=dora, wd_on_output=dora)
    ours.initialise(stream(), layer.get_parameter("weight"))
    for mine, other in zip(trained_of(ours), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.abs(), other.abs().view(mine.shape), rtol=1e-3, atol=1e-4)
    product = ours.lora_up.weight @ ours.lora_down.weight
    torch.testing.assert_close(product, theirs.up @ theirs.down, rtol=1e-3, atol=1e-4)

    trained(theirs.layer, theirs.parameters(), x)
    trained(lambda inputs: attached(layer, ours.train(), inputs), trained_of(ours), x)
    expected = theirs.layer(x)
    assert not expected.allclose(layer(x), atol=0.05)
    read = LoRAModule.from_tensors(LayerSpec.of(layer), ours.tensors())
    torch.testing.assert_close(attached(layer, read, x), expected, rtol=1e-3, atol=1e-3)


def test_rs_lora_is_alpha_over_the_root_of_the_rank_for_every_reader(sd1):
    network = lora.create_network(1.0, 16, 3, None, sd1.text_encoder, sd1.unet, rs_lora="True", conv_dim=4, conv_alpha=1)
    tensors = network.file_tensors()
    for name in network.targets:
        rank = len(tensors[f"{name}.lora_down.weight"])
        wanted = {16: 3 / math.sqrt(16), 4: 1 / math.sqrt(4)}[rank]
        assert tensors[f"{name}.alpha"].item() / rank == network.adapter(name).scale == wanted


@pytest.mark.parametrize("rank", [3, 4, 7])
def test_rs_lora_scales_as_in_peft(rank):
    layer, x = layer_and_input("linear")
    theirs = OfPeft(layer, r=rank, use_rslora=True)
    adapter = LoRAModule(LayerSpec.of(layer), rank=rank, alpha=ALPHA * math.sqrt(rank))
    shaken(adapter)
    theirs.take(adapter)
    read = LoRAModule.from_tensors(adapter.spec, adapter.tensors())
    torch.testing.assert_close(attached(layer, read, x), theirs.layer(x), rtol=1e-5, atol=1e-5)


# diffusers


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
def test_diffusers_gives_the_same_picture_with_our_tensors_under_pefts_names(sd1, tiny_sd1_folder, dora):
    from diffusers import StableDiffusionPipeline

    settings = {"dora_wd": dora, "wd_on_output": dora, "conv_dim": RANK, "conv_alpha": RANK}
    network = lora.create_network(1.0, RANK, RANK, None, None, sd1.unet, **settings)
    state = {}
    for number, (target, adapter) in enumerate(network.items()):
        tensors = shaken(adapter, number).tensors()
        path = f"unet.{target.path}"
        state |= {f"{path}.lora_A.weight": tensors["lora_down.weight"], f"{path}.lora_B.weight": tensors["lora_up.weight"]}
        if dora:
            magnitudes = tensors["dora_scale"]
            state[f"{path}.lora_magnitude_vector"] = magnitudes.transpose(0, 1) if magnitudes.dim() > 2 else magnitudes[:, 0]
    base = sd1.picture()
    network.attach()
    ours = sd1.picture()
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1_folder, local_files_only=True)
    pipe.load_lora_weights(state)
    picture = pipe.unet(sd1.latents, torch.tensor([10, 500]), sd1.context).sample
    assert (ours - base).abs().max() > 0.05
    torch.testing.assert_close(ours, picture, rtol=1e-3, atol=1e-4 * base.abs().max().item())


# lycoris-lora

FORMS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "Tucker": {"use_tucker": True},
    "scalar": {"use_scalar": True},
    "rsLoRA": {"rs_lora": True},
    "all of them": {"use_tucker": True, "use_scalar": True, "rs_lora": True},
    "DoRA per output": {"weight_decompose": True, "wd_on_out": True},
    "DoRA per input": {"weight_decompose": True, "wd_on_out": False},
}


def of_lycoris(layer: nn.Module, **options: Any) -> nn.Module:
    locon = pytest.importorskip("lycoris.modules.locon")
    return locon.LoConModule("x", layer, 1.0, lora_dim=RANK, alpha=ALPHA, **options)


@on_layers
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_what_lycoris_saves_acts_as_it_does_there(layer_name, form):
    layer, x = layer_and_input(layer_name)
    theirs = of_lycoris(layer, **FORMS[form])
    generator = stream(4)
    for tensor in (*theirs.parameters(), *([theirs.dora_scale] if theirs.wd else [])):
        tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert ("lora_mid.weight" in tensors) == (form in ("Tucker", "all of them") and layer_name == "conv 3x3")
    ours = LoRAModule.from_tensors(LayerSpec.of(layer), tensors)
    expected = theirs(x)
    assert not expected.allclose(layer(x), atol=0.1)
    torch.testing.assert_close(attached(layer, ours, x), expected, rtol=1e-4, atol=1e-4)
    if not theirs.wd:
        delta = theirs.make_weight() * theirs.scale
        torch.testing.assert_close(ours.delta_weight(layer.weight), delta, rtol=1e-5, atol=1e-5)


OURS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "PiSSA": {"init": "pissa"},
    "DoRA per output": {"dora_wd": True, "wd_on_output": True},
}


@on_layers
@pytest.mark.parametrize("form", OURS)
@torch.no_grad()
def test_what_we_save_acts_so_in_lycoris(layer_name, form):
    modules = pytest.importorskip("lycoris.modules")
    layer, x = layer_and_input(layer_name)
    ours = shaken(new(layer, **OURS[form]))
    state = {f"x.{name}": tensor for name, tensor in ours.tensors().items()}
    kind, parameters = modules.get_module(state, "x")
    assert kind.__name__ == "LoConModule"
    theirs = modules.make_module(kind, parameters, "x", layer)
    torch.testing.assert_close(theirs(x), attached(layer, ours, x), rtol=1e-4, atol=1e-4)


@on_layers
@torch.no_grad()
def test_magnitudes_per_input_act_so_in_lycoris(layer_name):
    """Its reader takes every magnitude for one of an output, so its own class is filled here."""
    layer, x = layer_and_input(layer_name)
    ours = shaken(new(layer, dora_wd=True))
    theirs = of_lycoris(layer, weight_decompose=True, wd_on_out=False)
    theirs.lora_down.weight.copy_(ours.lora_down.weight)
    theirs.lora_up.weight.copy_(ours.lora_up.weight)
    theirs.dora_scale.copy_(ours.dora_scale)
    torch.testing.assert_close(theirs(x), attached(layer, ours, x), rtol=1e-4, atol=1e-4)


# The formula in float64


def formula(layer: nn.Module, x: Tensor, parameters: Mapping[str, Tensor], multiplier: float, axis: str | None) -> Tensor:
    """The layer's output by the papers' equations, with the norm as a constant."""
    weight = layer.weight.double()
    bias = None if layer.bias is None else layer.bias.double()
    up, down = parameters["lora_up.weight"].flatten(1), parameters["lora_down.weight"].flatten(1)
    changed = weight + ALPHA / RANK * (up @ down).view(weight.shape)
    if axis is not None:
        rows = changed.detach().flatten(1) if axis == "output" else changed.detach().transpose(0, 1).flatten(1)
        changed = parameters["dora_scale"] * changed / rows.norm(dim=1).view(parameters["dora_scale"].shape)
    weight = weight + multiplier * (changed - weight)
    return F.linear(x, weight, bias) if weight.dim() == 2 else F.conv2d(x, weight, bias, layer.stride, layer.padding)


@on_layers
@pytest.mark.parametrize("multiplier", [1.0, -0.7])
@pytest.mark.parametrize("axis", [None, "input", "output"], ids=["plain", "per input", "per output"])
def test_gradients_are_those_of_the_formula_in_float64(layer_name, axis, multiplier):
    layer, x = layer_and_input(layer_name)
    adapter = shaken(new(layer, dora_wd=axis is not None, wd_on_output=axis == "output")).train()
    adapter.multiplier = multiplier
    inputs = x.clone().requires_grad_()
    loss_of(attached(layer, adapter, inputs)).backward()
    exact = {name: parameter.detach().double().requires_grad_() for name, parameter in adapter.named_parameters()}
    exact_inputs = x.double().requires_grad_()
    loss_of(formula(layer, exact_inputs, exact, multiplier, axis)).backward()
    found = {"x": inputs.grad} | {name: parameter.grad for name, parameter in adapter.named_parameters()}
    wanted = {"x": exact_inputs.grad} | {name: parameter.grad for name, parameter in exact.items()}
    for name, gradient in wanted.items():
        largest = gradient.abs().max().item()
        assert largest > 0.01
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-4, atol=1e-5 * largest)
