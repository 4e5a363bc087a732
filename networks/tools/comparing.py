"""Questions about whole tensors, answered faster than torch's own functions do for half precision."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or not a number."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:
        tensor = tensor.float()
    return all(math.isfinite(float(extreme)) for extreme in tensor.aminmax())


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors on the CPU have the same type, shape and values."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return np.array_equal(_bytes(first), _bytes(second)) or torch.equal(first, second)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy()
