"""What comes of a run of gen_img_diffusers.py: names of files, and what a person sees while they are made."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.generation.pipeline import Step
    from library.generation.requests import ImageRequest


def timed_names(folder: Path) -> Callable[[int, int], Path]:
    """im_{time}_{number}_{seed}.png, as sd-scripts names it; never one that exists.

    The time is the command's for all its pictures, so that sorting by name sorts them by prompt.
    """
    started = time.strftime("%Y%m%d%H%M%S")

    def name(number: int, seed: int) -> Path:
        stem = f"im_{started}_{number:03d}_{seed}"
        path, copies = folder / f"{stem}.png", 1
        while path.exists():
            copies += 1
            path = folder / f"{stem}_{copies}.png"
        return path

    return name


def sequential_names(folder: Path) -> Callable[[int, int], Path]:
    """im_000001.png and so on, after the highest number in the folder; sd-scripts begins at 1 and overwrites."""
    numbers = [int(path.stem[3:]) for path in folder.glob("im_*.png") if path.stem[3:].isdecimal()]
    first = max(numbers, default=0) + 1
    return lambda number, _: folder / f"im_{first + number:06d}.png"


class DrawingProgress:
    """A bar over all sampler steps on a terminal, one line per picture elsewhere."""

    def __init__(self, requests: Sequence[ImageRequest]) -> None:
        self._count, self._done = len(requests), 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=sum(request.steps for request in requests), unit="step", dynamic_ncols=True)

    def before_step(self, step: Step) -> None:
        """Samplers that call the denoiser twice a step count half a step each time."""
        if self._bar is not None:
            self._bar.update(self._share(step, step.number + 1) - self._share(step, step.number))

    @staticmethod
    def _share(step: Step, number: int) -> int:
        return sum(request.steps for request in step.requests) * number // step.count

    def drawn(self, path: Path) -> None:
        """Say that a picture is saved."""
        self._done += 1
        line = f"{self._done}/{self._count} {path}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()
