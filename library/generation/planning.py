"""From prompt lines to requests: defaults, sizes, and which seed every picture gets.

The seed of picture number i of a command is the command's own seed for i = 0 and a pure function of that seed and i for the
others. So one picture made with --seed S has seed S, a picture's seed does not depend on batches, and each picture can be
made again alone with the seed in its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from library.generation.prompt_options import PromptLine
from library.generation.requests import ImageRequest, floored_size
from library.streams import stream_seed

SEEDS = 2**32  # the range that web interfaces and sd-scripts take


@dataclass(frozen=True, kw_only=True)
class ImageDefaults:
    """What a prompt line does not say; see `ImageRequest`."""

    width: int
    height: int
    steps: int
    scale: float
    sampler: str
    clip_skip: int | None = None


def image_seed(seed: int, number: int) -> int:
    """The seed of picture `number` (from 0) of a command."""
    return seed if number == 0 else stream_seed(seed, "image", number) % SEEDS


def image_requests(
    lines: Sequence[PromptLine], defaults: ImageDefaults, *, seed: int, images_per_prompt: int = 1, iterations: int = 1
) -> list[ImageRequest]:
    """Every picture of a command: all lines with all their pictures, as often as there are iterations.

    Each picture of the command has a number and with it a seed, so that iterations differ. Seeds that a line names itself
    take the place of that, one per picture of the line, the last one for all further ones; other lines keep theirs.
    """
    requests: list[ImageRequest] = []
    for _ in range(iterations):
        for line in lines:
            for place in range(images_per_prompt):
                own = line.seeds[min(place, len(line.seeds) - 1)] if line.seeds else None
                requests.append(_request(line, defaults, image_seed(seed, len(requests)) if own is None else own))
    return requests


def preview_requests(lines: Sequence[PromptLine], defaults: ImageDefaults, *, seed: int) -> list[ImageRequest]:
    """One picture per line, with the same seed whenever it is made in a training, so that previews can be compared.

    Args:
        seed: of the training.
    """
    return [
        _request(line, defaults, line.seeds[0] if line.seeds else stream_seed(seed, "preview", number) % SEEDS)
        for number, line in enumerate(lines)
    ]


def rounding_notes(lines: Sequence[PromptLine], defaults: ImageDefaults) -> list[str]:
    """One sentence for every size that is not a multiple of 8 and is rounded down."""
    asked = {(line.where, line.width or defaults.width, line.height or defaults.height) for line in lines}
    return [
        f"{where}: {width}x{height} is rounded down to {floored_size(width)}x{floored_size(height)}, multiples of 8"
        for where, width, height in sorted(asked)
        if (width, height) != (floored_size(width), floored_size(height))
    ]


def repetition_notes(lines: Sequence[PromptLine], *, images_per_prompt: int, iterations: int) -> list[str]:
    """One sentence for every line whose own seeds make the same picture more than once."""
    count = images_per_prompt * iterations
    return [
        f"{line.where}: --d gives {len(set(line.seeds))} of {count} seeds, so equal pictures are drawn"
        for line in lines
        if line.seeds and len(set(line.seeds[:images_per_prompt])) < count
    ]


def _request(line: PromptLine, defaults: ImageDefaults, seed: int) -> ImageRequest:
    return ImageRequest(
        prompt=line.prompt,
        negative_prompt=line.negative_prompt or "",
        width=floored_size(line.width or defaults.width),
        height=floored_size(line.height or defaults.height),
        seed=seed,
        steps=line.steps or defaults.steps,
        scale=defaults.scale if line.scale is None else line.scale,
        sampler=line.sampler or defaults.sampler,
        clip_skip=defaults.clip_skip,
    )
