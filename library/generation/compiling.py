"""A U-Net whose repeated blocks are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CompiledDenoiser:
    """Calls a U-Net of diffusers, and compiles its repeated blocks at the first call.

    Compiled code does not see hooks that come later, and would have to be made anew for each of them. So while there are any
    the U-Net computes without it.

    Args:
        denoiser: its calls from elsewhere are compiled as well.
        backend: of `torch.compile`.
        note: is told if it cannot be compiled; then it computes as it did before.
    """

    def __init__(self, denoiser: Any, *, backend: str = "inductor", note: Callable[[str], None]) -> None:
        self._denoiser = denoiser
        self._note, self._works = note, True
        # One code for all sizes of pictures and batches.
        self._denoiser.compile_repeated_blocks(backend=backend, dynamic=True)

    def __call__(self, *inputs: Any, hooked: bool, **keywords: Any) -> Any:
        """The U-Net's output.

        Args:
            hooked: whether adapters stand on it as hooks.
        """
        if self._works and not hooked:
            try:
                return self._denoiser(*inputs, **keywords)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._works = False
                why = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
                self._note(f"the U-Net cannot be compiled here, and computes without that ({why})")
        with torch.compiler.set_stance("force_eager"):
            return self._denoiser(*inputs, **keywords)
