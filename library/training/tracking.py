"""Curves of a run: TensorBoard event files, under the names sd-scripts gives them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from library.training.options import LoggingOptions


class Tracker:
    """Writes scalars; does nothing where no folder was asked for."""

    def __init__(self, options: LoggingOptions, *, active: bool) -> None:
        self._writer: Any = None
        self.folder = None
        if options.folder and active:
            from torch.utils.tensorboard import SummaryWriter

            self.folder = options.folder / (options.prefix + time.strftime("%Y%m%d%H%M%S")) / options.tracker_name
            self._writer = SummaryWriter(str(self.folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one optimizer step, counted from 1."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
