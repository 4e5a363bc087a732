"""What keeps a run from losing work: signals that end it after the step, and gradients that are not numbers."""

from __future__ import annotations

import signal
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class StopRequest:
    """Notes Ctrl-C and SIGTERM while it is entered, so that the loop can finish its step and save.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number

    @property
    def requested(self) -> bool:
        return self.signal_number is not None

    @property
    def name(self) -> str:
        return "Ctrl-C" if self.signal_number == signal.SIGINT else "SIGTERM"

    @property
    def exit_status(self) -> int:
        """As shells count it: 128 and the signal's number."""
        return 128 + (self.signal_number or 0)


def clip_and_clean(parameters: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Scale gradients down to a norm, and make them zero if any of them is not finite.

    Nothing is read back, so the device is not waited for. A step on zero gradients leaves the weights finite; moments and
    weight decay act as they would on a flat piece of the loss.

    Args:
        parameters: those with gradients are looked at.
        max_norm: 0 does not clip.

    Returns:
        The norm before clipping and whether the step was bad, both () on the parameters' device.
    """
    import torch

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    bad = ~norm.isfinite()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, torch.where(bad, torch.ones_like(scale), scale))
    for gradient in gradients:
        gradient.masked_fill_(bad, 0.0)
    return norm, bad
