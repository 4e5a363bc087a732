"""Every algorithm, in every form that is another formula, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from networks.core.adapter import Adapter, LayerSpec
from networks.core.algorithms import algorithm


@dataclass(frozen=True)
class Case:
    """One form of one algorithm.

    Attributes:
        name: of the algorithm.
        options: what its constructor takes beside `RANK` and `ALPHA`, or instead of them.
        layers: names of `LAYERS` that it is for.
        exact_round_trip: whether what is loaded again is the same form, so that training can go on from it.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ("linear", "square", "conv 1x1", "conv 3x3")
    exact_round_trip: bool = True

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


LAYERS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 24), (3, 7, 16)),
    "square": (lambda: nn.Linear(16, 16, bias=False), (3, 7, 16)),
    "conv 1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 5, 5)),
    "conv 3x3": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 8, 8)),
    "layer norm": (lambda: nn.LayerNorm(12), (3, 7, 12)),
    "group norm": (lambda: nn.GroupNorm(4, 12), (2, 12, 5, 5)),
}
"""Layer, and the shape of an input."""

RANK, ALPHA = 4, 3.0
DORA = [{"dora_wd": True}, {"dora_wd": True, "wd_on_output": True}]
LOKR_FORMS: list[dict[str, Any]] = [
    {},
    {"decompose_both": True, "factor": 4},
    {"full_matrix": True},
    {"unbalanced_factorization": True},
]
TUCKER_FORMS: list[dict[str, Any]] = [
    {},
    {"rank": 2, "factor": 1},
    {"rank": 3, "factor": 1},
    *({"rank": 2, "factor": 2} | options for options in ({}, {"decompose_both": True}, *DORA)),
]

CASES = [
    Case("lora"),
    *(Case("lora", options) for options in DORA),
    *(Case("loha", options) for options in ({}, *DORA)),
    Case("loha", {"rank": 2}),  # r^2 small enough for the product of that rank
    *(Case("loha", {"use_tucker": True} | options, layers=("conv 3x3",)) for options in ({}, *DORA)),
    *(Case("lokr", options) for options in ({}, *DORA)),
    *(Case("lokr", {"rank": 1, "factor": 2} | options) for options in LOKR_FORMS),
    *(Case("lokr", {"rank": 1, "use_tucker": True} | options, layers=("conv 3x3",)) for options in TUCKER_FORMS),
    Case("lora", {"init": "orthogonal"}),
    Case("lora", {"init": "pissa"}, exact_round_trip=False),  # a file has twice the rank
    Case("lora", {"init": "olora"}, exact_round_trip=False),
    Case("lora", {"init": "pissa", "dora_wd": True}, exact_round_trip=False),
    *(Case("dylora", {"unit": unit}, exact_round_trip=False) for unit in (1, 2)),
    Case("full"),
    Case("norm", layers=("layer norm", "group norm")),
    Case("glora"),
    *(Case("ia3", {"train_on_input": on_input}) for on_input in (False, True)),
    *(Case("oft", options) for options in ({}, {"constraint": 0.05}, {"rescaled": True}, {"num_blocks": 2})),
    *(Case("boft", {"rank": 6} | options) for options in ({}, {"constraint": 0.05}, {"rescaled": True})),
]


def layer_and_input(name: str) -> tuple[nn.Module, Tensor]:
    """A frozen layer with weights of its own, and an input for it."""
    make_layer, shape = LAYERS[name]
    torch.manual_seed(1)
    layer = make_layer().requires_grad_(False)
    if layer.get_parameter("weight").dim() == 1:
        nn.init.normal_(layer.get_parameter("weight"))
    return layer, torch.randn(shape, generator=stream(2))


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_adapter(case: Case, layer: nn.Module) -> Adapter:
    """An adapter as training begins with it."""
    found = algorithm(case.name)
    settings = ({"rank": RANK} if found.has_rank else {}) | ({"alpha": ALPHA} if found.has_alpha else {})
    adapter = found.adapter(LayerSpec.of(layer), **settings | dict(case.options))
    adapter.initialise(stream(), layer.get_parameter("weight"))
    return adapter


def acting(adapter: Adapter, seed: int = 3, spread: float = 0.3) -> Adapter:
    """The adapter with every parameter moved from where it was."""
    generator = stream(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return adapter


def attached(layer: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
    """The layer's output with the adapter on it."""
    handle = layer.register_forward_hook(adapter.hook)
    try:
        return layer(x)
    finally:
        handle.remove()


def changed(layer: nn.Module, adapter: Adapter, x: Tensor, multiplier: float = 1.0) -> Tensor:
    """The output of the layer whose weight and bias have the adapter's changes."""
    weight = layer.get_parameter("weight")
    tensors = {"weight": weight + multiplier * adapter.delta_weight(weight).to(weight.dtype)}
    bias = adapter.delta_bias()
    if bias is not None:
        tensors["bias"] = layer.get_parameter("bias") + multiplier * bias.to(weight.dtype)
    return torch.func.functional_call(layer, tensors, (x,))
