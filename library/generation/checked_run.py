"""A run of gen_img_diffusers.py, with everything found out that can be before weights are loaded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.errors import UserError, attempt, raise_all
from library.generation.checking import PromptAdapters, checked_model
from library.generation.lines import prompt_lines
from library.generation.options import GenerationOptions, PictureOptions
from library.generation.planning import SEEDS, Plan, Settings, repetition_notes, rounding_notes
from library.generation.prompt_options import PromptLine
from library.generation.requests import SECOND_TEXTS, SIZES
from library.prompts.choices import Wildcards

if TYPE_CHECKING:
    from library.checkpoints.base_model import BaseModelFiles
    from library.families.family import ModelFamily

GRID_SEED = 1


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A run that can begin.

    Attributes:
        lines: of prompts; none where they are typed.
        defaults: of every request.
        plan: how often lines are drawn.
        notes: for the user.
    """

    options: GenerationOptions
    base_model: BaseModelFiles
    adapters: PromptAdapters
    lines: Sequence[PromptLine]
    defaults: Settings
    plan: Plan
    notes: Sequence[str]


def check_run(options: GenerationOptions, left_out: list[UserError]) -> CheckedRun:
    """Everything but the pictures themselves.

    Args:
        left_out: gets what is wrong with single lines of a prompt file.

    Raises:
        UserError: every other problem, and those of the lines with them.
    """
    problems: list[UserError] = []
    base_model = checked_model(options, problems)
    family = base_model.family if base_model is not None else None
    adapters = attempt(lambda: PromptAdapters(options.adapters, family), problems)
    folder = options.pictures.wildcards
    wildcards = attempt(lambda: None if folder is None else Wildcards(folder), problems)
    lines = attempt(lambda: prompt_lines(options.pictures, options.control, left_out), problems)
    idle = {} if family is None else _without_effect(family)
    given = options.pictures.given & idle.keys()
    problems += [UserError("has no effect", where=f"--{name}", remedy=idle[name]) for name in sorted(given)]
    raise_all(problems + left_out if problems else [])
    assert base_model is not None  # for the type checker: without these there was a problem
    assert adapters is not None
    assert lines is not None
    pictures = options.pictures
    side = base_model.own_side
    defaults = {"width": side, "height": side, "lora_tag_style": options.adapters.tag_style, **pictures.settings}
    repeats = repetition_notes(lines, images_per_prompt=pictures.images_per_prompt, iterations=pictures.iterations)
    plan = Plan(
        seed=_seed(pictures),
        images_per_prompt=pictures.images_per_prompt,
        iterations=pictures.iterations,
        same_seed=pictures.same_seed,
        shuffled=pictures.shuffled,
        networks=len(options.adapters.networks) - options.adapters.merged,
        wildcards=wildcards,
        without_effect=idle,
        complete=adapters.complete,
    )
    return CheckedRun(
        options=options,
        base_model=base_model,
        adapters=adapters,
        lines=lines,
        defaults=defaults,
        plan=plan,
        notes=[*base_model.notes(), *rounding_notes(lines, defaults), *repeats],
    )


def _without_effect(family: ModelFamily) -> dict[str, str]:
    """Fields of requests that models of a family have no use for, and why."""
    second = {} if len(family.text_encoders) > 1 else dict.fromkeys(SECOND_TEXTS, "has one text encoder")
    sizes = {} if family.size_conditions else dict.fromkeys(SIZES, "is told no sizes")
    return {field: f"{family.title} {why}; leave it out" for field, why in {**second, **sizes}.items()}


def _seed(options: PictureOptions) -> int:
    """The seed of a command: chance where it names none, but for a grid, which is to be found again by the same command."""
    if options.seed is not None:
        return options.seed
    return GRID_SEED if options.axes else random.SystemRandom().randrange(SEEDS)
