"""What one picture is made from. Nothing here imports torch: the doors build these before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import UserError, raise_all
from library.generation.samplers import find_sampler

LATENT_FACTOR = 8
MIN_SIZE = 64
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One picture: the same request gives the same picture, whatever else is made along with it.

    Attributes:
        prompt, negative_prompt: text with A1111 weights.
        width, height: pixels, multiples of 8, 64 at least.
        seed: of all noise of this picture, 0 to 2**63 - 1.
        steps: of the sampler, 1 to 1000.
        scale: of classifier-free guidance; 1 and less is without, and then the negative prompt has no effect.
        sampler: a name of `samplers.SAMPLERS`.
        clip_skip: the text encoder's layer, counted from its end; None and 1 are the last.

    Raises:
        UserError: a value out of its range; all of them at once.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    seed: int
    steps: int = 50
    scale: float = 7.5
    sampler: str = "ddim"
    clip_skip: int | None = None

    def __post_init__(self) -> None:
        problems = [
            UserError(f"{value} is not a {side} a picture can have", remedy=f"give a multiple of 8, {MIN_SIZE} or more")
            for side, value in (("width", self.width), ("height", self.height))
            if value < MIN_SIZE or value % LATENT_FACTOR
        ]
        if not 1 <= self.steps <= MAX_STEPS:
            problems.append(UserError(f"{self.steps} steps", remedy=f"give 1 to {MAX_STEPS}"))
        if not 0 <= self.seed <= MAX_SEED:
            problems.append(UserError(f"{self.seed} is not a seed", remedy=f"give 0 to {MAX_SEED}"))
        if self.clip_skip is not None and self.clip_skip < 1:
            problems.append(UserError(f"clip skip {self.clip_skip}", remedy="give 1 or more"))
        try:
            find_sampler(self.sampler)
        except UserError as error:
            problems.append(error)
        raise_all(problems)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.scale > 1


def floored_size(pixels: int) -> int:
    """The next size below that a latent can have; sd-scripts rounds so too."""
    return pixels - pixels % LATENT_FACTOR
