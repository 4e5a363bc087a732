"""Operands that are formed anew: the same numbers as ever, and nothing kept but the input and the factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from networks.core.adapter import LayerSpec
from networks.core.recompute import apply_recomputed

LINEAR = LayerSpec(weight_shape=(6, 5))
CONVOLUTION = LayerSpec(weight_shape=(6, 5, 3, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2))


def operands(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin(), a * b.exp()


def plain(operation: LayerSpec, x: Tensor, *factors: Tensor) -> Tensor:
    return operation.apply(*operands(x, *factors))


def again(operation: LayerSpec, x: Tensor, *factors: Tensor) -> Tensor:
    return apply_recomputed(operation, operands, x, *factors)


@pytest.fixture(params=[LINEAR, CONVOLUTION], ids=["linear", "convolution"])
def case(request):
    generator = torch.Generator().manual_seed(0)
    operation = request.param
    x = torch.randn((3, 7, 5) if operation.is_linear else (3, 5, 8, 8), generator=generator)
    factors = [torch.randn(operation.weight_shape, generator=generator).requires_grad_() for _ in range(2)]
    return operation, x.requires_grad_(), factors


def gradients(function, operation, x, factors, **autocast) -> list[Tensor | None]:
    inputs = [tensor for tensor in (x, *factors) if tensor.requires_grad]
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        out = function(operation, x, *factors)
    return list(torch.autograd.grad(out.float().square().sum(), inputs))


def test_output_and_gradients_are_those_of_autograd(case):
    operation, x, factors = case
    torch.testing.assert_close(again(operation, x, *factors), plain(operation, x, *factors))
    for found, wanted in zip(gradients(again, operation, x, factors), gradients(plain, operation, x, factors), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(case, frozen):
    operation, x, factors = case
    (x, *factors)[frozen].requires_grad_(False)
    for found, wanted in zip(gradients(again, operation, x, factors), gradients(plain, operation, x, factors), strict=True):
        torch.testing.assert_close(found, wanted)


def test_under_autocast_the_backward_pass_uses_the_same_precision(case):
    operation, x, factors = case
    settings = {"dtype": torch.bfloat16}
    for found, wanted in zip(
        gradients(again, operation, x, factors, **settings),
        gradients(plain, operation, x, factors, **settings),
        strict=True,
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())


def test_only_the_input_and_the_factors_are_kept(case):
    operation, x, factors = case
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        again(operation, x, *factors)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in (x, *factors)]


def test_inside_gradient_checkpointing(case):
    operation, x, factors = case

    def checkpointed(operation, *inputs):
        return checkpoint(again, operation, *inputs, use_reentrant=False)

    for found, wanted in zip(
        gradients(checkpointed, operation, x, factors), gradients(plain, operation, x, factors), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_padding_by_name_takes_the_ordinary_way():
    operation = LayerSpec(weight_shape=(6, 5, 3, 3), padding="same")
    generator = torch.Generator().manual_seed(0)
    x, *factors = (torch.randn(shape, generator=generator) for shape in [(2, 5, 8, 8), (6, 5, 3, 3), (6, 5, 3, 3)])
    factors[0].requires_grad_()
    (found,) = gradients(again, operation, x, factors)
    torch.testing.assert_close(found, gradients(plain, operation, x, factors)[0])


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_is_left_to_the_compiler(case):
    operation, x, factors = case
    compiled = torch.compile(lambda x, *factors: again(operation, x, *factors), backend="aot_eager", fullgraph=True)
    wanted = gradients(plain, operation, x, factors)
    found = torch.autograd.grad(compiled(x, *factors).square().sum(), [x, *factors])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()
