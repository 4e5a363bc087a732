"""Linear and convolution layers that keep their frozen weight in 8 or 4 bits, and form it anew at every use.

fp8: float8_e4m3fn, each output's weights scaled by a power of two, so that scaling itself rounds nothing. nf4: the 4-bit
NormalFloat of QLoRA in blocks of 64, each with an fp32 scale (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314,
section 3), as bitsandbytes has it. Arithmetic stays that of the layer's dtype: the rounding of the weights is all that
differs from a layer that is not packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from library.errors import UserError

WeightFormat = Literal["fp8", "nf4"]


class _PackedValues(Protocol):
    """A tensor in fewer bits."""

    def unpacked(self) -> Tensor: ...

    def move(self, device: torch.device) -> None: ...

    @property
    def nbytes(self) -> int: ...


class _Fp8Values:
    """A tensor (rows, ...) in float8_e4m3fn, with a scale for each row."""

    def __init__(self, values: Tensor, dtype: torch.dtype) -> None:
        rows = values.float().flatten(1)
        finite = rows.isfinite()
        # Rows then reach to 256 of the format's 448. The least scale is the least number of fp16.
        exponents = torch.frexp(rows.abs().where(finite, 0).amax(dim=1, keepdim=True)).exponent.clamp(min=-16) - 8
        scales = ((exponents + 127) << 23).view(torch.float32)  # by their bits: `pow` of some devices is not exact
        # The format has no infinity, and would make a number of it.
        self._codes = (rows / scales).where(finite, torch.nan).to(torch.float8_e4m3fn)
        self._scales = scales.to(dtype)
        self._shape = values.shape

    def unpacked(self) -> Tensor:
        return (self._codes.to(self._scales.dtype) * self._scales).view(self._shape)

    def move(self, device: torch.device) -> None:
        self._codes, self._scales = self._codes.to(device), self._scales.to(device)

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes


class _Nf4Values:
    """A tensor in 4-bit NormalFloat."""

    def __init__(self, values: Tensor, dtype: torch.dtype) -> None:
        from bitsandbytes import functional

        # In a row, since bitsandbytes has kernels for even rows only; blocks follow that order anyway.
        self._codes, self._state = functional.quantize_4bit(values.float().flatten(), blocksize=64, quant_type="nf4")
        self._state.dtype = dtype
        self._shape = values.shape

    def unpacked(self) -> Tensor:
        from bitsandbytes import functional

        return functional.dequantize_4bit(self._codes, self._state).view(self._shape)

    def move(self, device: torch.device) -> None:
        self._codes = self._codes.to(device)
        self._state.to(device)

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._state.absmax.nbytes


_FORMATS: dict[str, Callable[[Tensor, torch.dtype], _PackedValues]] = {"fp8": _Fp8Values, "nf4": _Nf4Values}


class PackedLayer(nn.Module):
    """What the packed layers share. `weight` is formed whenever it is read, and takes no gradient.

    What is written into that tensor is lost. A layer that holds nothing is a plain one: other packages make their factors of
    the class of the layer they adapt, or take its weight away.

    Attributes:
        weight_dtype: of `weight`.
        squared_norm, squared_error: of the weight before packing and of what packing changed, 0-d fp32.
        plain_bytes: what the weight would take in its dtype.
    """

    squared_norm: Tensor
    squared_error: Tensor
    plain_bytes: int
    weight_dtype: torch.dtype
    _values: _PackedValues | None = None

    def hold(self, weight: Tensor, weight_format: WeightFormat, dtype: torch.dtype) -> None:
        """Pack a weight, where it lies; it is formed again in `dtype`."""
        values = _FORMATS[weight_format](weight, dtype)
        self._values = values
        self.weight_dtype = dtype
        self.plain_bytes = weight.numel() * dtype.itemsize
        exact = weight.float()
        self.squared_norm = exact.square().sum()
        self.squared_error = (values.unpacked().float() - exact).square().sum()

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._values is not None:
            return self._values.unpacked()
        return super().__getattr__(name)

    def __delattr__(self, name: str) -> None:
        if name == "weight" and self._values is not None:
            self._values = None
        else:
            super().__delattr__(name)

    @property
    def packed_bytes(self) -> int:
        """What the weight takes."""
        return 0 if self._values is None else self._values.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """See `torch.nn.Module.forward`."""
        if self._values is None:
            return self.operation(x, self.weight, self.bias)
        result: Tensor = _WithPackedWeight.apply(x, self, self.weight_dtype, self.bias)
        return result

    def without_bias(self, x: Tensor) -> Tensor:
        """The output less the bias, in the wider dtype of input and weight where there is no autocast."""
        if self._values is None:
            return self.operation(x, self.weight, None)
        dtype = self.weight_dtype
        if not torch.is_autocast_enabled(x.device.type):
            dtype = torch.promote_types(dtype, x.dtype)
        result: Tensor = _WithPackedWeight.apply(x.to(dtype), self, dtype, None)
        return result

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer does with an input, with any weight and bias."""
        raise NotImplementedError

    def input_gradient(self, shape: torch.Size, weight: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of an input of this shape for that of the output."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow to another device; the dtype stays that which the weight was packed for."""
        super()._apply(fn, recurse)
        if self._values is not None:
            self._values.move(fn(self.squared_norm).device)
        return self


class Linear(PackedLayer, nn.Linear):
    """A packed `torch.nn.Linear`."""

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedLayer.operation`."""
        return F.linear(x, weight, bias)

    def input_gradient(self, shape: torch.Size, weight: Tensor, gradient: Tensor) -> Tensor:
        """See `PackedLayer.input_gradient`."""
        return gradient @ weight


class Conv2d(PackedLayer, nn.Conv2d):
    """A packed `torch.nn.Conv2d`."""

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedLayer.operation`."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, shape: torch.Size, weight: Tensor, gradient: Tensor) -> Tensor:
        """See `PackedLayer.input_gradient`."""
        return conv2d_input(shape, weight, gradient, self.stride, self.padding, self.dilation, self.groups)


class _WithPackedWeight(torch.autograd.Function):
    """A layer's operation whose weight is formed in the forward pass and again in the backward pass, and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLayer, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return layer.operation(x, layer.weight.to(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        weight = ctx.layer.weight.to(gradient.dtype)
        return ctx.layer.input_gradient(ctx.shape, weight, gradient).to(ctx.dtype), None, None, None


def make_packable(module: nn.Module) -> dict[str, PackedLayer]:
    """Turn the layers of a module's repeated blocks into packed ones, which have no weight yet.

    What stands before and after the blocks is small and stays as it is.

    Returns:
        Name of the weight -> the layer that is to hold it.
    """
    return {f"{name}.weight": _packable(layer) for name, layer in _layers_of_blocks(module)}


def _layers_of_blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in module.named_modules():
        is_plain_convolution = (
            type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        )
        in_a_block = any(part.isdigit() for part in name.split("."))
        if in_a_block and (is_plain_convolution or type(layer) is nn.Linear):
            yield name, layer


def _packable(layer: nn.Module) -> PackedLayer:
    """The layer itself, turned into a packed one, so that its bias, its hooks and its place stay what they are."""
    layer.__class__ = Linear if isinstance(layer, nn.Linear) else Conv2d
    del layer._parameters["weight"]
    assert isinstance(layer, PackedLayer)
    return layer


@dataclass(frozen=True, kw_only=True)
class PackedSummary:
    """What packing did to a model.

    Attributes:
        nbytes: of the packed weights.
        plain_nbytes: of the same weights without packing.
        error: ||packed - weights|| / ||weights||, over all of them.
    """

    nbytes: int
    plain_nbytes: int
    error: float


def summarise_packing(module: nn.Module) -> PackedSummary:
    """Sums over the packed layers of a model, of which there are some."""
    layers = [layer for layer in module.modules() if isinstance(layer, PackedLayer) and layer.packed_bytes]
    norm = torch.stack([layer.squared_norm for layer in layers]).double().sum()
    error = torch.stack([layer.squared_error for layer in layers]).double().sum()
    return PackedSummary(
        nbytes=sum(layer.packed_bytes for layer in layers),
        plain_nbytes=sum(layer.plain_bytes for layer in layers),
        error=float((error / norm).sqrt()) if norm else 0.0,
    )


def check_weight_format(weight_format: WeightFormat, device: torch.device, *, where: str) -> None:
    """Try a format on a device.

    Raises:
        UserError: it does not work there, or bitsandbytes is missing.
    """
    try:
        _FORMATS[weight_format](torch.ones(2, 64, device=device), torch.float32).unpacked()
    except ImportError:
        raise UserError("needs bitsandbytes", where=where, remedy="run pip install bitsandbytes") from None
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"does not work on {device} ({reason})", where=where, remedy=f"leave out {where}") from None
