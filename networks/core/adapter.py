"""What every adapter algorithm offers for one layer: the change of its weight, the effect on its output, the saved tensors.

An adapter does not replace or own its base layer. It is handed the layer's output by a forward hook
(`AdapterNetwork.attach`) and returns the output with its effect added, so any number of adapters stack on one layer and
leave in any order.

A new algorithm gives `delta_weight` and `tensors` / `from_tensors`; `forward` here follows from `delta_weight`, and is
overridden where there is a faster way to the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What an adapter needs to know of its base layer; made from the layer, or by the weight tools from a weight's shape
    alone.

    Attributes:
        weight_shape: (out, in) for Linear, (out, in / groups, kh, kw) for Conv2d.
        stride, padding, dilation, groups: of the convolution; without meaning for Linear.
    """

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Module) -> LayerSpec:
        """The spec of a Linear or Conv2d layer.

        Raises:
            TypeError: any other layer.
        """
        if isinstance(layer, nn.Linear):
            return cls(weight_shape=tuple(layer.weight.shape))
        if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
            raise TypeError(f"no adapter for {layer}")
        return cls(
            weight_shape=tuple(layer.weight.shape),
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
        )

    @property
    def is_linear(self) -> bool:
        """Whether the layer is a Linear one (its weight has two axes)."""
        return len(self.weight_shape) == 2

    @property
    def is_wide(self) -> bool:
        """Whether the layer has a kernel larger than one pixel; such layers take `conv_dim` instead of `network_dim`."""
        return any(size > 1 for size in self.weight_shape[2:])

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation with another weight of its shape, without bias."""
        if self.is_linear:
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


class Weight(nn.Module):
    """A bare parameter, for algorithms whose saved tensors are called `<factor>.weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Adapter(nn.Module):
    """One adapted layer.

    Attributes:
        spec: the base layer's shape.
        rank: of the change, for tables and reports; 0 where an algorithm has none.
        multiplier: strength; set it through `AdapterNetwork.set_multipliers`. At 0 the base layer's output passes untouched.
        scale: the algorithm's own factor (alpha / rank), part of `delta_weight`.
    """

    spec: LayerSpec
    rank: int = 0
    multiplier: float = 1.0
    scale: float = 1.0

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec

    def initialise(self, generator: torch.Generator) -> None:
        """Fill the parameters with their starting values, drawn on the CPU, with which the adapter changes nothing."""
        raise NotImplementedError

    def delta_weight(self, base_weight: Tensor) -> Tensor:
        """The change of the base weight: its shape, fp32, scale included and multiplier not.

        Only algorithms whose change depends on the base read `base_weight`'s values; others take its device.
        """
        raise NotImplementedError

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output with the adapter's effect: `output + multiplier * op(x, delta_weight)`.

        Args:
            layer: the base layer.
            x: its input.
            output: its output; not changed in place.
        """
        delta = self.delta_weight(layer.get_parameter("weight")) * self.multiplier
        x, delta = self.matching_dtypes(x, delta)
        return output + self.spec.apply(x, delta).to(output.dtype)

    def matching_dtypes(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Input and weights in one dtype: the wider one, so that fp32 adapters keep their precision on a half-precision
        model.

        Under autocast everything is left as it is, since its operations do their own casting.
        """
        if all(weight.dtype == x.dtype for weight in weights) or torch.is_autocast_enabled(x.device.type):
            return (x, *weights)
        dtype = x.dtype
        for weight in weights:
            dtype = torch.promote_types(dtype, weight.dtype)
        return (x.to(dtype), *(weight.to(dtype) for weight in weights))

    def hook(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The forward hook that `AdapterNetwork.attach` registers on the base layer."""
        return self.forward(layer, inputs[0], output) if self.multiplier != 0 else None

    def delta_norm(self, base_weight: Tensor) -> Tensor:
        """Frobenius norm of `delta_weight`: a 0-d fp32 tensor on the adapter's device."""
        return torch.linalg.vector_norm(self.delta_weight(base_weight))

    def scale_delta_(self, factor: Tensor) -> None:
        """Multiply the change by a 0-d factor, in place, shared evenly by the trained tensors."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Saved name within the layer ("lora_down.weight") -> tensor, in the file's order."""
        return dict(self.state_dict())

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Adapter:
        """An adapter with the tensors of a file: the reverse of `tensors`.

        Args:
            spec: the layer it is for; shapes of factors are adjusted between Linear and 1x1 convolution.
            tensors: saved name within the layer -> tensor.
            options: what the algorithm's constructor takes beside (drop-outs).

        Raises:
            ValueError: tensors that are not this algorithm's, or do not fit the layer.
        """
        raise NotImplementedError

    def update_scale(self) -> None:
        """Recompute what depends on the `alpha` buffer, after it was loaded."""
        if "alpha" in self._buffers:
            self.scale = float(self.get_buffer("alpha")) / self.rank

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Accept factors shaped for the layer's twin (SD2's projections are Linear layers in a folder and 1x1 convolutions
        in a file), and files without alpha or with alpha 0, which stand for alpha = rank."""
        for name, own in self.state_dict().items():
            given = state_dict.get(prefix + name)
            if given is not None and given.numel() == own.numel() and given.shape[:1] in (own.shape[:1], (1,)):
                state_dict[prefix + name] = given.reshape(own.shape)
        if "alpha" in self._buffers:
            alpha = state_dict.get(prefix + "alpha")
            state_dict[prefix + "alpha"] = alpha if alpha is not None and alpha != 0 else torch.tensor(float(self.rank))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.update_scale()

    def plus_parameters(self) -> list[nn.Parameter]:
        """The parameters that LoRA+ trains at a higher rate: those that start at zero."""
        return []
