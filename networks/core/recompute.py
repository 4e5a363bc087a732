"""A layer's operation on operands that are formed anew in the backward pass instead of being kept until then.

`torch.utils.checkpoint` does the same for any function. Here the operation itself, which costs most, is not run again, and
there is less to do around it: what is repeated are only the steps that lead to its operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from networks.core.adapter import LayerSpec

Prepare = Callable[..., tuple[Tensor, Tensor]]
"""From a layer's input and the factors to the operands (input, weight) of an operation: pure, and without random draws."""


def apply_recomputed(operation: LayerSpec, prepare: Prepare, x: Tensor, *factors: Tensor) -> Tensor:
    """`operation.apply(*prepare(x, *factors))`, of which only `x` and the factors are kept for the backward pass.

    Code that is being compiled is left to the compiler, which chooses what to compute again.
    """
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *factors))
    if not tracked or isinstance(operation.padding, str) or torch.compiler.is_compiling():
        return operation.apply(*prepare(x, *factors))
    result: Tensor = _Recomputed.apply(operation, prepare, x, *factors)
    return result


def _operand_gradients(operation: LayerSpec, gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """The gradients of `operation.apply(x, weight)`; None for an input that needs none. All in the dtype of `gradient`."""
    wanted = x.requires_grad
    x, weight = x.detach().to(gradient.dtype), weight.detach().to(gradient.dtype)
    if operation.is_linear:
        of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        return gradient @ weight if wanted else None, of_weight
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        operation.stride,
        operation.padding,
        operation.dilation,
        False,
        (0, 0),
        operation.groups,
        (wanted, True, False),
    )
    return of_x, of_weight


class _Recomputed(torch.autograd.Function):
    """See `apply_recomputed`."""

    @staticmethod
    def forward(ctx: Any, operation: LayerSpec, prepare: Prepare, x: Tensor, *factors: Tensor) -> Tensor:
        device = x.device.type
        ctx.operation, ctx.prepare = operation, prepare
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(x, *factors)
        return operation.apply(*prepare(x, *factors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        leaves = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(ctx.saved_tensors, needed, strict=True)]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            operands = ctx.prepare(*leaves)
        gradients = _operand_gradients(ctx.operation, gradient, *operands)
        pairs = [
            (operand, found.to(operand.dtype))
            for operand, found in zip(operands, gradients, strict=True)
            if operand.requires_grad and found is not None
        ]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(
            torch.autograd.grad([operand for operand, _ in pairs], wanted, [value for _, value in pairs], allow_unused=True)
        )
        return None, None, *(next(found) if leaf.requires_grad else None for leaf in leaves)
