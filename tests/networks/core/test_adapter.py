"""What an algorithm gets from the base class when it gives nothing but its delta."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.core.adapter import Adapter, LayerSpec


class WholeChange(Adapter):
    """The plainest algorithm: the change itself."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.diff = nn.Parameter(0.1 * torch.randn(spec.weight_shape))

    def delta_weight(self, base_weight):
        return self.diff.to(base_weight.device, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(6, 5), (2, 3, 6)), (nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 8, 8))],
    ids=["linear", "conv"],
)
def test_the_effect_follows_from_the_delta(layer, shape, dtype):
    adapter = WholeChange(LayerSpec.of(layer))
    adapter.multiplier = 0.7
    x = torch.randn(shape)
    merged = torch.func.functional_call(layer, {"weight": layer.weight + 0.7 * adapter.diff}, (x,))
    half = layer.to(dtype)
    handle = half.register_forward_hook(adapter.hook)
    out = half(x.to(dtype))
    handle.remove()
    layer.to(torch.float32)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.float(), merged, rtol=tolerance, atol=tolerance)


def test_norm_and_tensors_follow_too():
    adapter = WholeChange(LayerSpec(weight_shape=(5, 6)))
    torch.testing.assert_close(adapter.delta_norm(torch.zeros(5, 6)), adapter.diff.norm())
    assert list(adapter.tensors()) == ["diff"]
    assert adapter.plus_parameters() == []


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="no adapter for Embedding"):
        LayerSpec.of(nn.Embedding(4, 4))
