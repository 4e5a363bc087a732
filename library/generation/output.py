"""What comes of a run of gen_img_diffusers.py: names of files, and what a person sees while they are made."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.generation.options import OutputOptions

if TYPE_CHECKING:
    from library.generation.pipeline import Step
    from library.generation.planning import PlannedPicture
    from library.generation.requests import ImageRequest

Namer = Callable[[int, "PlannedPicture", str], Path]
"""The path of a picture from its number, what it is, and what its name has before the number ("0" for a first stage)."""


def namer(options: OutputOptions) -> Namer:
    """Names as the options want them; a name that a prompt gives comes first. None is that of a file that exists."""
    own = sequential_names(options.folder) if options.sequential_names else timed_names(options.folder)

    def name(number: int, picture: PlannedPicture, stage: str) -> Path:
        stem = None
        if picture.file_name is not None:
            name, dot, ending = picture.file_name.rpartition(".")
            stem = name if dot and ending.lower() == "png" else picture.file_name
        elif options.original_names and picture.request.image is not None:
            stem = Path(picture.request.image).stem
        if stem is None:
            return own(number, picture.request.seed, stage)
        return free_path(options.folder / f"{stem}{'_' * bool(stage)}{stage}.png")

    return name


def timed_names(folder: Path) -> Callable[[int, int, str], Path]:
    """im_{time}_{stage}{number}_{seed}.png, as sd-scripts names it.

    The time is the command's for all its pictures, so that sorting by name sorts them by prompt.
    """
    started = time.strftime("%Y%m%d%H%M%S")
    return lambda number, seed, stage: free_path(folder / f"im_{started}_{stage}{number:03d}_{seed}.png")


def sequential_names(folder: Path) -> Callable[[int, int, str], Path]:
    """im_000001.png and so on, after the highest number in the folder; sd-scripts begins at 1 and overwrites.

    A stage stands before the number, which counts the same: im_0000001.png.
    """
    numbers = [int(path.stem[3:9]) for path in folder.glob("im_??????.png") if path.stem[3:].isdecimal()]
    first = max(numbers, default=0) + 1
    return lambda number, _, stage: free_path(folder / f"im_{stage}{first + number:06d}.png")


def free_path(path: Path) -> Path:
    """The path, or where there is something already, with the lowest number behind its stem that makes it free."""
    free, copies = path, 1
    while free.exists():
        copies += 1
        free = path.with_stem(f"{path.stem}_{copies}")
    return free


class DrawingProgress:
    """A bar over all sampler steps on a terminal, one line per picture elsewhere.

    Args:
        requests: that are drawn.
        count: how many of them are saved; all without it.
    """

    def __init__(self, requests: Sequence[ImageRequest], count: int | None = None) -> None:
        self._count, self._done = len(requests) if count is None else count, 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=sum(map(steps_of, requests)), unit="step", dynamic_ncols=True)

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


def steps_of(request: ImageRequest) -> int:
    """Steps of the sampler in all its stages."""
    return request.steps + (request.highres_steps if request.highres_scale is not None else 0)
