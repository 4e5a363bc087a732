"""Modules where they are needed, and back again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def on_device(module: nn.Module, device: torch.device, *, stays: bool = False) -> Iterator[None]:
    """A module on a device, and afterwards where it was, unless it stays."""
    before = next(module.parameters()).device
    if before != device:
        module.to(device)
    try:
        yield
    finally:
        if before != device and not stays:
            module.to(before)
