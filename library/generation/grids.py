"""Grids of pictures: what each cell is, from one picture and what is varied in it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError, attempt, raise_all
from library.generation.grid_axes import BLOCKS, LORA, NONE, OF_A_TAG, RANK, STRENGTH, Axis, GridValue, applied
from library.generation.options import AdapterOptions
from library.generation.planning import PlannedPicture
from library.generation.requests import ImageRequest
from library.prompts.lora_tags import SUFFIXES, read_tags
from library.prompts.tag_editing import first_tag, with_adapter, with_strength
from networks.registry import NETWORK_MODULES

if TYPE_CHECKING:
    from library.checkpoints.base_model import BaseModelFiles
    from library.generation.checking import PromptAdapters

_CAN_BE_CUT = {"LoRA", "DyLoRA"}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The pictures of one sheet.

    Attributes:
        base: what is varied.
        x, y: what its columns and rows have; None for a single one.
        rows: of pictures, from the top.
    """

    base: PlannedPicture
    x: Axis | None
    y: Axis | None
    rows: tuple[tuple[PlannedPicture, ...], ...]

    def labels(self, side: Axis | None) -> list[str]:
        """Of its columns or rows, one empty text where there is no such axis."""
        return [value.label for value in side.values] if side else [""]

    def cells(self) -> Iterator[tuple[PlannedPicture, str]]:
        """Each picture and what tells it from the others."""
        for row, y in zip(self.rows, self.labels(self.y), strict=True):
            for picture, x in zip(row, self.labels(self.x), strict=True):
                sides = ((self.x, x), (self.y, y))
                yield picture, ", ".join(f"{axis.what} {label}" for axis, label in sides if axis is not None)


def plan_grids(
    pictures: Sequence[PlannedPicture],
    axes: Sequence[Axis],
    options: AdapterOptions,
    adapters: PromptAdapters,
    base_model: BaseModelFiles,
) -> list[Grid]:
    """A grid for each picture.

    Raises:
        UserError: values that do not fit: files that are not there, words that are not in the prompt, a rank that a file
            does not have, a strength where there is no adapter; all at once.
    """
    problems: list[UserError] = []
    found = [attempt(partial(_with_files, axis, options, adapters), problems) for axis in axes]
    raise_all(problems)
    axes = [axis for axis in found if axis is not None]
    for axis in axes:
        if axis.what == "clip_skip":
            attempt(partial(base_model.check_clip_skip, max(value.value for value in axis.values)), problems)
    grids = [attempt(partial(_grid, picture, axes, options, adapters), problems) for picture in pictures]
    raise_all(list({str(problem): problem for problem in problems}.values()))
    return [grid for grid in grids if grid is not None]


def _grid(picture: PlannedPicture, axes: Sequence[Axis], options: AdapterOptions, adapters: PromptAdapters) -> Grid:
    x, y = (next((axis for axis in axes if axis.side == side), None) for side in ("x", "y"))
    base = replace(picture, request=_with_tag(picture.request, axes, options))
    problems: list[UserError] = []
    rows = []
    for down in y.values if y else (None,):
        row = []
        for across in x.values if x else (None,):
            sides = ((x, across), (y, down))
            choices = [(axis, value) for axis, value in sides if axis is not None and value is not None]
            cell = attempt(partial(_cell, base, choices, adapters), problems)
            row += [cell] if cell is not None else []
        rows.append(tuple(row))
    raise_all(problems)
    return Grid(base=picture, x=x, y=y, rows=tuple(rows))


def _cell(base: PlannedPicture, choices: Sequence[tuple[Axis, GridValue]], adapters: PromptAdapters) -> PlannedPicture:
    request = applied(base.request, choices)
    where = choices[0][0].where
    request = replace(request, prompt=adapters.complete(request.prompt, where))
    for axis, value in choices:
        if axis.what == RANK:
            _check_rank(request, value.value, axis.where, adapters)
    return replace(base, request=request)


def _with_tag(request: ImageRequest, axes: Sequence[Axis], options: AdapterOptions) -> ImageRequest:
    """With an adapter that the axes can act on: the first tag, or without one the first adapter of the command line.

    That one gets its own strength into the request, or is written as a tag where only a tag can say what is asked for.
    """
    things = [axis.what for axis in axes]
    asked = [axis for axis in axes if axis.what in (STRENGTH, BLOCKS, RANK)]
    if not asked or LORA in things or first_tag(request.prompt) is not None:
        return request
    uses = options.networks[options.merged :]
    if not uses:
        merged = "; one that is merged stays as it is" if options.merged else ""
        remedy = f"write <lora:FILE:1> into the prompt, or give --network_weights or an axis lora:FILES{merged}"
        raise UserError(f"there is no adapter to vary in {request.prompt!r}", where=asked[0].where, remedy=remedy)
    asked_for = request.network_strengths
    own = [asked_for[min(number, len(asked_for) - 1)] if asked_for else use.strength for number, use in enumerate(uses)]
    if not set(things) & set(OF_A_TAG):
        return replace(request, network_strengths=tuple(own))
    use, where = uses[0], asked[0].where
    if use.args or use.module not in NETWORK_MODULES:
        remedy = "write it into the prompt as <lora:FILE:1>"
        raise UserError(f"cannot act on {use.file}, which has its own module or settings", where=where, remedy=remedy)
    prompt = with_strength(with_adapter(request.prompt, str(use.file), where=where), own[0])
    return replace(request, prompt=prompt, network_strengths=(0.0, *own[1:]))


def _check_rank(request: ImageRequest, rank: int, where: str, adapters: PromptAdapters) -> None:
    """Refuse a rank that the file of the first tag does not have."""
    from library.generation.lora_listing import read_entry

    tag = first_tag(request.prompt)
    if tag is None:
        return
    _, (read,) = read_tags(tag, where=where, style=request.lora_tag_style)
    file = adapters.find(read)
    entry = read_entry(file, read.name)
    if not set(entry.algorithms) <= _CAN_BE_CUT:
        kinds = ", ".join(entry.algorithms)
        raise UserError(f"{file} cannot be cut to a rank: it is {kinds}", where=where, remedy="give a LoRA or DyLoRA")
    if entry.ranks and rank > entry.ranks[-1]:
        raise UserError(f"{file} has no rank {rank}", where=where, remedy=f"give 1 to {entry.ranks[-1]}")


# Files of an axis


def _with_files(axis: Axis, options: AdapterOptions, adapters: PromptAdapters) -> Axis:
    """With patterns as the files that fit them, in the order in which people count."""
    if axis.what != LORA:
        return axis
    names: list[str | None] = []
    problems: list[UserError] = []
    for value in axis.values:
        piece = os.path.expanduser(value.value)
        if piece == NONE:
            names.append(None)
        elif Path(piece).is_file() or not re.search(r"[*?\[]", piece):
            attempt(partial(adapters.shelf.find, piece, where=axis.where), problems)
            names.append(piece)
        else:
            names += attempt(partial(_matching, piece, options.folder, axis.where), problems) or []
    raise_all(problems)
    names = list(dict.fromkeys(names))
    stems = Counter(_stem(name) for name in names)
    values = [GridValue(_stem(name) if stems[_stem(name)] == 1 else str(name), name) for name in names]
    return replace(axis, values=tuple(values))


def _stem(name: str | None) -> str:
    if name is None:
        return NONE
    last = Path(name).name
    return Path(last).stem if last.lower().endswith(SUFFIXES) else last


def _matching(pattern: str, folder: Path | None, where: str) -> list[str]:
    """Adapter files of a pattern from here, else from `--lora_dir`."""
    found = [path for path in glob(pattern, recursive=True) if path.lower().endswith(SUFFIXES)]
    if not found and folder is not None:
        found = [path for path in glob(pattern, root_dir=folder, recursive=True) if path.lower().endswith(SUFFIXES)]
    if not found:
        places = "" if folder is None else f", nor below --lora_dir {folder}"
        raise UserError(f"no adapter file fits {pattern}{places}", where=where, remedy="look at its folder and name")
    return sorted(found, key=_natural)


def _natural(path: str) -> list[tuple[int, int, str]]:
    """For sorting: numbers in names by their size."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.split(r"(\d+)", path)]
