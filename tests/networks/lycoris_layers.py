"""lycoris-lora's modules on single layers, as judges of ours. Their forward pass, not their merge, which scales twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.networks.cases import stream


def lycoris_module(kind: str, layer: nn.Module, **settings: Any) -> nn.Module:
    """A module of lycoris-lora ("LohaModule") for a layer, whose every parameter has a value that acts."""
    modules = pytest.importorskip("lycoris.modules")
    module = getattr(modules, kind)("name", layer, **settings)
    generator = stream(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def read_by_lycoris(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module that lycoris-lora makes of a file's tensors of one layer."""
    modules = pytest.importorskip("lycoris.modules")
    kind, values = modules.get_module({f"name.{key}": value for key, value in tensors.items()}, "name")
    module = modules.make_module(kind, values, "name", layer)
    assert module is not None
    return module


def output_with(layer: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """The layer's output with a lycoris-lora module on it."""
    module.apply_to()
    try:
        return layer(x)
    finally:
        module.restore()
