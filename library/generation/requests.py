"""What one picture is made from. Nothing here imports torch: the doors build these before anything heavy is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from library.errors import UserError, attempt, raise_all
from library.generation.deep_shrink import DeepShrink
from library.generation.gradual_latent import SAMPLERS as GROWING_SAMPLERS
from library.generation.gradual_latent import GradualLatent
from library.generation.samplers import find_sampler

LATENT_FACTOR = 8
MIN_SIZE = 64
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
SECOND_TEXTS = ("prompt_2", "negative_prompt_2")
"""Fields that only families with a second text encoder have a use for."""

SIZES = (
    *("original_width", "original_height", "original_width_negative", "original_height_negative"),
    *("crop_top", "crop_left"),
)
"""Fields that only families that are told sizes have a use for."""


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One picture: the same request gives the same picture, whatever else is made along with it.

    Every field is text, a number or a tuple of them, so that a PNG's recipe holds a request whole.

    Attributes:
        prompt, negative_prompt: text with A1111 weights; tags of adapters act in the prompt alone.
        extended: read `AND` and `BREAK` in the texts; previews of training do not, as in sd-scripts.
        lora_tag_style: a name of `lora_tags.STYLES`: what numbers at places in a tag mean.
        network_strengths: of the adapters of the command line, one each; empty for those given there.
        width, height: pixels, multiples of 8, 64 at least.
        seed: of all noise of this picture, 0 to 2**63 - 1.
        steps: of the sampler, 1 to 1000.
        scale: of classifier-free guidance; 1 and less is without, and then the negative prompt has no effect.
        negative_scale: of the negative prompt, where it is guided away from by a scale of its own.
        guidance_rescale: 0 to 1, how much guided predictions are brought back to the spread of unguided ones
            (arXiv:2305.08891, eq. 15 and 16).
        sampler: a name of `samplers.SAMPLERS`.
        clip_skip: the text encoders' layer, counted from their ends; None is the family's own.
        prompt_2, negative_prompt_2: what the text encoders behind the first are told instead; None for the same.
        original_width, original_height: size that the picture is said to come from, where a family takes sizes; None for
            its own. `_negative`: for the negative prompt; None for the same.
        crop_top, crop_left: where it is said to be cut out of that.
        refiner_start: share of the noise, from the beginning, behind which a refiner goes on, where there is one; 0 to 1.
        aesthetic_score: how beautiful it is said to be, where a family takes that. `_negative`: likewise.
        image: file to begin from; None begins from noise.
        strength: 0 to 1, how much of an image is drawn anew.
        mask: file, white where an image is drawn anew; None for everywhere.
        regions: file whose colours say which sub-prompt counts where; None for all everywhere.
        region_colors: read `regions` as that many colour codes; None reads sub-prompts 1 to 3 in red, green and blue.
        highres_scale: size of a first stage, as a share; None draws in one stage.
        highres_steps: of the first stage.
        highres_strength: `strength` of the first stage, where it begins from an image; None for the same.
        highres_uncontrolled: no ControlNet in the second stage.
        highres_latents: enlarge its latents, and not its picture.
        control_images: files, one for each ControlNet.
        shrink_depth_1 and so on: see `deep_shrink.DeepShrink`; a `shrink_depth_1` of None is without.
        growth_below and so on: see `gradual_latent.GradualLatent`; a `growth_below` of None is without.

    Raises:
        UserError: a value out of its range, or things that exclude each other; all of them at once.
    """

    prompt: str
    negative_prompt: str = ""
    extended: bool = True
    lora_tag_style: str = "sdnext"
    network_strengths: tuple[float, ...] = ()
    width: int = 512
    height: int = 512
    seed: int
    steps: int = 50
    scale: float = 7.5
    negative_scale: float | None = None
    guidance_rescale: float = 0.0
    sampler: str = "ddim"
    clip_skip: int | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int = 0
    crop_left: int = 0
    refiner_start: float = 0.8
    aesthetic_score: float = 6.0
    aesthetic_score_negative: float = 2.5
    image: str | None = None
    strength: float = 0.8
    mask: str | None = None
    regions: str | None = None
    region_colors: int | None = None
    highres_scale: float | None = None
    highres_steps: int = 28
    highres_strength: float | None = None
    highres_latents: bool = False
    highres_uncontrolled: bool = False
    control_images: tuple[str, ...] = ()
    shrink_depth_1: int | None = None
    shrink_until_1: int = 650
    shrink_depth_2: int | None = None
    shrink_until_2: int = 650
    shrink_ratio: float = 0.5
    growth_below: int | None = None
    growth_ratio: float = 0.5
    growth_step: float = 0.125
    growth_every: int = 3

    def __post_init__(self) -> None:
        problems = [
            UserError(f"{value} is not a {side} a picture can have", remedy=f"give a multiple of 8, {MIN_SIZE} or more")
            for side, value in (("width", self.width), ("height", self.height))
            if value < MIN_SIZE or value % LATENT_FACTOR
        ]
        ranges = (
            (f"{self.steps} steps", self.steps, 1, MAX_STEPS),
            (f"seed {self.seed}", self.seed, 0, MAX_SEED),
            (f"strength {self.strength}", self.strength, 0, 1),
            (f"strength {self.highres_strength} of the first stage", self.highres_strength or 0, 0, 1),
            (f"a refiner's start at {self.refiner_start}", self.refiner_start, 0, 1),
            (f"guidance rescale {self.guidance_rescale}", self.guidance_rescale, 0, 1),
            (f"{self.highres_steps} steps of the first stage", self.highres_steps, 1, MAX_STEPS),
            *((f"{name} {getattr(self, name)}", getattr(self, name) or 0, 0, math.inf) for name in SIZES),
            (f"clip skip {self.clip_skip}", 1 if self.clip_skip is None else self.clip_skip, 1, math.inf),
            (f"a first stage of {self.highres_scale}", 1 if self.highres_scale is None else self.highres_scale, 0.05, 1),
        )
        for what, value, least, most in ranges:
            if not least <= value <= most:
                remedy = f"give {least} or more" if most == math.inf else f"give {least} to {most}"
                problems.append(UserError(f"{what} is out of range", remedy=remedy))
        sampler = attempt(lambda: find_sampler(self.sampler), problems)
        if sampler is not None and sampler.most_steps is not None and self.steps > sampler.most_steps:
            what = f"{self.steps} steps of {self.sampler} is out of range"
            problems.append(UserError(what, remedy=f"give 1 to {sampler.most_steps}"))
        attempt(lambda: self.deep_shrink, problems)
        attempt(lambda: self.gradual_latent, problems)
        raise_all(problems + self._exclusions())

    def _exclusions(self) -> list[UserError]:
        """What cannot go together."""
        grows, shrinks = self.growth_below is not None, self.shrink_depth_1 is not None
        rules = (
            (shrinks and self.control_images, "Deep Shrink and ControlNet", "differ in the sizes inside the U-Net"),
            (grows and self.control_images, "Gradual Latent and ControlNet", "differ in the size of the picture"),
            (grows and self.regions is not None, "Gradual Latent and regions", "differ in the size of the picture"),
            (grows and self.image is not None, "Gradual Latent and an image", "both decide what a picture begins from"),
            (grows and self.highres_scale is not None, "Gradual Latent and two stages", "both begin in a small size"),
        )
        problems = [UserError(f"{pair} {why}", remedy="use one of them") for broken, pair, why in rules if broken]
        if grows and self.sampler not in GROWING_SAMPLERS:
            problems.append(UserError(f"Gradual Latent does not work with {self.sampler}", remedy="use euler_a"))
        return problems

    @property
    def deep_shrink(self) -> DeepShrink | None:
        """How the U-Net's inner blocks see it; None as it is."""
        if self.shrink_depth_1 is None:
            return None
        return DeepShrink(
            depth_1=self.shrink_depth_1,
            until_1=self.shrink_until_1,
            depth_2=self.shrink_depth_2,
            until_2=self.shrink_until_2,
            ratio=self.shrink_ratio,
        )

    @property
    def gradual_latent(self) -> GradualLatent | None:
        """How it grows while it is drawn; None where it does not."""
        if self.growth_below is None:
            return None
        return GradualLatent(
            below=self.growth_below,
            ratio=self.growth_ratio,
            ratio_step=self.growth_step,
            every_n_steps=self.growth_every,
        )

    def size_conditions(self, names: Sequence[str], *, negative: bool = False) -> tuple[float, ...]:
        """What the picture is said to be.

        Args:
            names: of `SIZE_CONDITIONS`.
            negative: for the negative prompt.
        """
        width, height = self.original_width or self.width, self.original_height or self.height
        if negative:
            width, height = self.original_width_negative or width, self.original_height_negative or height
        values = {
            **{"original_height": height, "original_width": width, "crop_top": self.crop_top, "crop_left": self.crop_left},
            **{"target_height": self.height, "target_width": self.width},
            "aesthetic_score": self.aesthetic_score_negative if negative else self.aesthetic_score,
        }
        return tuple(float(values[name]) for name in names)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.scale > 1

    @property
    def first_stage(self) -> tuple[int, int] | None:
        """Width and height of a first stage in pixels; None where there is none.

        Rounded down to multiples of 32, as sd-scripts does, and no smaller than a picture can be.
        """
        if self.highres_scale is None:
            return None
        width, height = (int(side * self.highres_scale) // 32 * 32 for side in (self.width, self.height))
        return max(width, MIN_SIZE), max(height, MIN_SIZE)


def floored_size(pixels: int) -> int:
    """The next size below that a latent can have; sd-scripts rounds so too."""
    return pixels - pixels % LATENT_FACTOR
