"""The judge of gradients: autograd of a formula in float64, written index by index by the test that calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from networks.core.adapter import Adapter
from tests.networks.cases import attached

Formula = Callable[[Mapping[str, Tensor], Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""From an adapter's parameters by name, and a layer's weight and bias, to the changed weight and bias."""


def assert_same_output_and_gradients(adapter: Adapter, layer: nn.Module, x: Tensor, formula: Formula) -> None:
    """In train mode the adapter gives the formula's output and gradients, as near as fp32 comes."""
    adapter.train()
    x = x.detach().requires_grad_()
    weights = torch.linspace(-1, 1, layer(x).numel())
    out = attached(layer, adapter, x)
    (out + weights.view_as(out)).square().sum().backward()

    leaves = {name: value.detach().double().requires_grad_() for name, value in adapter.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    bias = layer.bias.double() if layer.bias is not None else None
    exact = adapter.spec.apply(exact_x, *formula(leaves, layer.get_parameter("weight").double(), bias))
    assert (exact - layer(x).double()).abs().max() > 0.05, "the adapter must act, or this says nothing"
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    (exact + weights.double().view_as(exact)).square().sum().backward()

    found = {name: value.grad for name, value in adapter.named_parameters()} | {"x": x.grad}
    wanted = {name: value.grad for name, value in leaves.items()} | {"x": exact_x.grad}
    for name, gradient in found.items():
        scale = wanted[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=1e-3, atol=1e-5 * scale, msg=name)
