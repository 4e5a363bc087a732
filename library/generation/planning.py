"""From prompt lines to requests: defaults, sizes, choices, pictures to begin from, and which seed every picture gets.

The seed of picture number i of a command is the command's own seed for i = 0 and a pure function of that seed and i for the
others. So one picture made with --seed S has seed S, a picture's seed does not depend on batches, and each picture can be
made again alone with the seed in its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from library.errors import UserError, attempt, counted, raise_all
from library.generation.prompt_options import IMAGE_OPTIONS, PromptLine
from library.generation.requests import ImageRequest, floored_size
from library.prompts.choices import Wildcards, enumerate_choices, expand_choices
from library.streams import python_stream, stream_seed

SEEDS = 2**32  # the range that web interfaces and sd-scripts take

Settings = Mapping[str, Any]
"""Fields of `ImageRequest`, width and height among them."""


@dataclass(frozen=True, kw_only=True)
class PlannedPicture:
    """One picture of a command.

    Attributes:
        raw_prompt: before choices were made.
        file_name: that its line asks for; None leaves it to the command.
        where: how a sentence names its line.
    """

    request: ImageRequest
    raw_prompt: str
    file_name: str | None = None
    where: str = "prompt"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How often lines are drawn.

    Attributes:
        seed: of the command.
        images_per_prompt: pictures of each line.
        iterations: of the whole list, each time with other seeds.
        same_seed: one seed for all pictures of an iteration.
        shuffled: lines in another order in each iteration.
        networks: how many adapters of the command line have a strength that a prompt may change.
        wildcards: of the prompts; None for none.
        without_effect: fields of a request that the base model has no use for, and why.
        complete: checks a prompt, given with its place for sentences, and adds what it needs beside, such as trigger words.
    """

    seed: int
    images_per_prompt: int = 1
    iterations: int = 1
    same_seed: bool = False
    shuffled: bool = False
    networks: int = 0
    wildcards: Wildcards | None = None
    without_effect: Mapping[str, str] = field(default_factory=dict)
    complete: Callable[[str, str], str] = lambda prompt, _: prompt


def image_seed(seed: int, number: int) -> int:
    """The seed of picture `number` (from 0) of a command."""
    return seed if number == 0 else stream_seed(seed, "image", number) % SEEDS


def planned_pictures(
    lines: Sequence[PromptLine], defaults: Settings, plan: Plan, problems: list[UserError]
) -> list[PlannedPicture]:
    """Every picture of a command: all lines with all their pictures, as often as there are iterations.

    Each picture of the command has a number and with it a seed, so that iterations differ. Seeds that a line names itself
    take the place of that, one per picture of the line, the last one for all further ones; other lines keep theirs. What a
    line enumerates are pictures of one seed.

    Args:
        problems: gets what is wrong with lines, which then have no pictures.
    """
    pictures: list[PlannedPicture] = []
    number = 0
    for iteration in range(plan.iterations):
        order = list(lines)
        if plan.shuffled:
            python_stream(plan.seed, "order of prompts", iteration).shuffle(order)
        for line in order:
            prompts = attempt(partial(_enumerated, line, plan), problems) or ()
            for place in range(plan.images_per_prompt):
                seed = image_seed(plan.seed, iteration if plan.same_seed else number)
                if line.seeds:
                    seed = line.seeds[min(place, len(line.seeds) - 1)]
                number += 1
                for prompt in prompts:
                    one = partial(_planned, replace(line, prompt=prompt), line.prompt, defaults, seed, plan)
                    picture = attempt(one, problems)
                    pictures += [picture] if picture is not None else []
    return pictures


def _enumerated(line: PromptLine, plan: Plan) -> tuple[str, ...]:
    if line.literal:
        return (line.prompt,)
    return enumerate_choices(line.prompt, where=line.where, wildcards=plan.wildcards)


def _planned(line: PromptLine, raw_prompt: str, defaults: Settings, seed: int, plan: Plan) -> PlannedPicture:
    def chosen(text: str, seed: int, where: str) -> str:
        return text if line.literal else expand_choices(text, seed=seed, wildcards=plan.wildcards, where=where)

    prompt = chosen(line.prompt, seed, line.where)
    settings = dict(line.settings)
    for name, option in _FURTHER_TEXTS.items():
        text = line.settings.get(name, defaults.get(name))
        if text is not None:
            stream = stream_seed(seed, name.replace("_", " "))
            settings[name] = chosen(text, stream, f"{line.where}, --{option}")
    line = replace(line, prompt=plan.complete(prompt, line.where), settings=settings)
    request = _request(line, defaults, seed)
    if not line.literal:
        _check_effects(line, {**defaults, **line.settings}, plan)
    return PlannedPicture(request=request, raw_prompt=raw_prompt, file_name=line.file_name, where=line.where)


_FURTHER_TEXTS = {"negative_prompt": "n", "prompt_2": "p2", "negative_prompt_2": "n2"}
"""Texts of a request beside its prompt, and the options that set them in a line."""


def _check_effects(line: PromptLine, settings: Settings, plan: Plan) -> None:
    """Refuse what a line says that would change nothing.

    Args:
        settings: of the command, and of the line before those.
        plan: of the command.

    Raises:
        UserError: all of it.
    """
    networks = plan.networks
    problems = [
        UserError("has no effect", where=f"{line.where}, --{name}", remedy=plan.without_effect[option.field])
        for name, option in IMAGE_OPTIONS.items()
        if option.field in plan.without_effect and line.settings.get(option.field) is not None
    ]
    for needed, remedy, options in _PARTS:
        if all(settings.get(name) is None for name in needed):
            given = [f"--{option}" for option, field in options.items() if line.settings.get(field) is not None]
            problems += [UserError("has no effect", where=f"{line.where}, {option}", remedy=remedy) for option in given]
    strengths = line.settings.get("network_strengths", ())
    if strengths and not networks:
        what, remedy = "there is no adapter that this could act on", "name it with --network_weights, without merging it"
        problems.append(UserError(what, where=f"{line.where}, --am", remedy=remedy))
    elif len(strengths) > networks:
        what = f"{counted(len(strengths), 'strength')} for {counted(networks, 'adapter')}"
        problems.append(UserError(what, where=f"{line.where}, --am", remedy="give one for each adapter"))
    raise_all(problems)


_SHRINKING = {"dst1": "shrink_until_1", "dsd2": "shrink_depth_2", "dst2": "shrink_until_2", "dsr": "shrink_ratio"}
_GROWING = {"glr": "growth_ratio", "gls": "growth_step", "gle": "growth_every"}
_PARTS: tuple[tuple[tuple[str, ...], str, Mapping[str, str]], ...] = (
    (("image", "highres_scale"), "give a picture with --image_path, or --highres_fix_scale", {"t": "strength"}),
    (("shrink_depth_1",), "give --dsd1 too", _SHRINKING),
    (("growth_below",), "give --glt too", _GROWING),
)
"""Fields of which one is needed, what to do without, and the options in prompts that do nothing then."""


def preview_requests(lines: Sequence[PromptLine], defaults: Settings, *, seed: int) -> list[ImageRequest]:
    """One picture per line, with the same seed whenever it is made in a training, so that previews can be compared.

    Args:
        seed: of the training.
    """
    plain = {**defaults, "extended": False}
    return [
        _request(line, plain, line.seeds[0] if line.seeds else stream_seed(seed, "preview", number) % SEEDS)
        for number, line in enumerate(lines)
    ]


def with_pictures(lines: Sequence[PromptLine], field: str, files: Sequence[str], *, where: str) -> list[PromptLine]:
    """Lines with a file each: one line for all files, or one file for all lines, or as many of one as of the other.

    Args:
        field: of the request that takes the file.
        where: names the files in a sentence.

    Raises:
        UserError: other numbers.
    """
    if not files:
        return list(lines)
    if len(lines) == 1:
        lines = [lines[0]] * len(files)
    elif len(files) == 1:
        files = [files[0]] * len(lines)
    elif len(lines) != len(files):
        what = f"{counted(len(files), 'picture')} for {counted(len(lines), 'prompt')}"
        raise UserError(what, where=where, remedy="give one, or one for each prompt")
    return [replace(line, settings={**line.settings, field: file}) for line, file in zip(lines, files, strict=True)]


def rounding_notes(lines: Sequence[PromptLine], defaults: Settings) -> list[str]:
    """One sentence for every size that is not a multiple of 8 and is rounded down."""
    asked = {(line.where, *_size(line, defaults)) for line in lines}
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


def _size(line: PromptLine, defaults: Settings) -> tuple[int, int]:
    return line.settings.get("width") or defaults["width"], line.settings.get("height") or defaults["height"]


def _request(line: PromptLine, defaults: Settings, seed: int) -> ImageRequest:
    width, height = map(floored_size, _size(line, defaults))
    settings = {**defaults, **line.settings, "width": width, "height": height}
    try:
        return ImageRequest(prompt=line.prompt, seed=seed, **settings)
    except UserError as error:
        raise UserError(error.what, where=line.where, remedy=error.remedy) from None
