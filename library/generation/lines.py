"""Where the prompts of a run come from: the command line, a file, or the pictures that one begins from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from library.errors import UserError, attempt, raise_all
from library.generation.checking import check_readable, picture_files_of
from library.generation.controls import check_hint, hints_for
from library.generation.options import ControlOptions, PictureOptions
from library.generation.planning import with_pictures
from library.generation.png_info import read_picture
from library.generation.prompt_options import PromptLine, numbered_lines, parse_prompt_line
from library.generation.recipes import recipe_lines
from library.generation.requests import MIN_SIZE, floored_size
from library.prompts.lora_tags import without_tags
from library.text_files import read_text


def prompt_lines(options: PictureOptions, control: ControlOptions, left_out: list[UserError]) -> list[PromptLine]:
    """The prompts of a run with the pictures that go with them; none where they are typed.

    Args:
        control: whose hint images the prompts take in turn.
        left_out: gets what is wrong with single lines of a file, if others are right.

    Raises:
        UserError: files that cannot be read, no prompt that can, or other numbers of pictures than of prompts.
    """
    images = picture_files_of(options.images, f"--image_path {options.images}") if options.images else []
    masks = picture_files_of(options.masks, f"--mask_path {options.masks}") if options.masks else []
    check_readable([*images, *masks])
    if options.interactive:
        return []
    lines = _texts(options, images, left_out)
    lines = with_pictures(lines, "image", images, where=f"--image_path {options.images}")
    if images and "width" not in options.given and "height" not in options.given:
        lines = [_of_its_pictures_size(line) for line in lines]
    return _with_hints(_with_masks(lines, masks, options, left_out), control)


def _texts(options: PictureOptions, images: Sequence[str], left_out: list[UserError]) -> list[PromptLine]:
    if options.recipes:
        return recipe_lines(options)
    if options.prompt is not None:
        return [parse_prompt_line(options.prompt, where="--prompt")]
    if options.prompt_file is None:
        return [_said_by(image) for image in images]
    where = f"--from_file {options.prompt_file}"
    numbered = numbered_lines(read_text(options.prompt_file, where=where), where)
    if not numbered:
        raise UserError("holds no prompt", where=where)
    attempted = [attempt(partial(parse_prompt_line, text, where=place), left_out) for place, text in numbered]
    return [line for line in attempted if line is not None]


def _said_by(image: str) -> PromptLine:
    """The prompt and negative prompt that a picture was made with."""
    fields = read_picture(Path(image)).fields
    settings = {"negative_prompt": fields["negative_prompt"]} if fields.get("negative_prompt") else {}
    return PromptLine(prompt=fields["prompt"], settings=settings, where=image)


def _of_its_pictures_size(line: PromptLine) -> PromptLine:
    """With the size of the picture that it begins from, where the line says none."""
    from library.generation.picture_files import picture_size

    if {"width", "height"} & line.settings.keys():
        return line
    sides = (max(MIN_SIZE, floored_size(side)) for side in picture_size(line.settings["image"]))
    return replace(line, settings={**line.settings, **dict(zip(("width", "height"), sides, strict=True))})


def _with_masks(
    lines: list[PromptLine], masks: Sequence[str], options: PictureOptions, left_out: list[UserError]
) -> list[PromptLine]:
    """Masks say where a picture is drawn anew; of prompts with sub-prompts they are the regions, as in sd-scripts."""
    if not masks:
        return lines
    where = f"--mask_path {options.masks}"
    placed = with_pictures(lines, "mask", masks, where=where)
    result = []
    for line in placed:
        if "AND" in without_tags(line.prompt).split():
            settings = {("regions" if name == "mask" else name): value for name, value in line.settings.items()}
            line = replace(line, settings=settings)
        elif "image" not in line.settings:
            remedy = "give the picture with --image_path; or sub-prompts with AND, for which it holds the regions"
            what = "there is no picture that it could be a mask of"
            left_out.append(UserError(what, where=f"{line.where}, {where}", remedy=remedy))
            continue
        result.append(line)
    return result


def _with_hints(lines: list[PromptLine], control: ControlOptions) -> list[PromptLine]:
    """Each line with its hint images, one for each ControlNet; of a folder all its pictures count, by name."""
    if not control.hints:
        return lines
    files = [file for path in control.hints for file in picture_files_of(path, f"--guide_image_path {path}")]
    problems: list[UserError] = []
    for file in dict.fromkeys(files):
        attempt(partial(check_hint, file), problems)
    raise_all(problems)
    return [
        replace(line, settings={**line.settings, "control_images": hints_for(files, len(control.uses), number)})
        for number, line in enumerate(lines)
    ]
