"""Nothing that is not a number gets into the weights, and clipping is torch's."""

from __future__ import annotations

import pytest
import torch

from library.training.guards import clip_and_clean


def parameters(*gradients: torch.Tensor) -> list[torch.nn.Parameter]:
    result = []
    for gradient in gradients:
        parameter = torch.nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        result.append(parameter)
    return result


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_is_that_of_torch(max_norm):
    gradients = [torch.randn(5, 3), torch.randn(7)]
    ours, theirs = parameters(*gradients), parameters(*gradients)
    norm, bad = clip_and_clean(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected)
    assert not bad
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_zero_does_not_clip():
    (parameter,) = parameters(torch.full((3,), 9.0))
    clip_and_clean([parameter], 0)
    assert parameter.grad.tolist() == [9.0, 9.0, 9.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_value_makes_every_gradient_zero(value):
    good, broken = parameters(torch.ones(3), torch.tensor([1.0, value]))
    _, bad = clip_and_clean([good, broken], 1.0)
    assert bad
    assert good.grad.tolist() == [0, 0, 0]
    assert broken.grad.tolist() == [0, 0]
