"""Pictures drawn while a run trains, by the generator itself, with the adapter as it stands."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.training.options import PreviewOptions

if TYPE_CHECKING:
    from library.generation.pipeline import Pipeline
    from library.generation.requests import ImageRequest


def previews_due(options: PreviewOptions, *, step: int, epoch_ended: int | None) -> bool:
    """Whether previews are to be drawn after a step.

    Args:
        step: optimizer steps done; 0 before the first.
        epoch_ended: the epoch, counted from 1, that this step ended; None within one.
    """
    if options.prompts is None:
        return False
    if step == 0:
        return options.at_first
    if options.every_n_epochs:
        return epoch_ended is not None and epoch_ended % options.every_n_epochs == 0
    return bool(options.every_n_steps) and step % (options.every_n_steps or 1) == 0


def preview_name(output_name: str | None, *, step: int, epoch_ended: int | None, index: int, seed: int) -> str:
    """File name as sd-scripts gives it: place in the run, number of the prompt, time, seed."""
    place = f"e{epoch_ended:06d}" if epoch_ended is not None else f"{step:06d}"
    start = f"{output_name}_" if output_name else ""
    return f"{start}{place}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}_{seed}.png"


def draw_previews(
    pipeline: Pipeline,
    requests: Sequence[ImageRequest],
    folder: Path,
    *,
    output_name: str | None,
    step: int,
    epoch_ended: int | None,
) -> list[Path]:
    """Draw every prompt into `folder`; random states and the modes of the models are left as they were.

    Returns:
        The files written.
    """
    from library.generation.png_info import write_png

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (request, picture) in enumerate(zip(requests, pipeline.generate(requests), strict=True)):
        path = folder / preview_name(output_name, step=step, epoch_ended=epoch_ended, index=index, seed=request.seed)
        write_png(path, picture, request, {"step": step})
        paths.append(path)
    return paths
