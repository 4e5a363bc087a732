"""One run of gen_img_diffusers.py: everything is checked, then models are loaded, then pictures are drawn and saved."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError, attempt, counted, raise_all
from library.generation.checking import PromptAdapters, checked_model
from library.generation.comparing import Comparisons, check_comparisons
from library.generation.lines import prompt_lines
from library.generation.made_with import RecipeWriter
from library.generation.options import AdapterOptions, GenerationOptions, PictureOptions
from library.generation.output import DrawingProgress, Namer, namer
from library.generation.planning import (
    SEEDS,
    Plan,
    PlannedPicture,
    Settings,
    planned_pictures,
    repetition_notes,
    rounding_notes,
)
from library.generation.png_info import write_png
from library.generation.prompt_options import PromptLine, parse_prompt_line
from library.generation.recipes import with_recipes
from library.prompts.choices import Wildcards
from library.quiet import quiet_libraries

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.checkpoints.base_model import BaseModelFiles
    from library.generation.pipeline import Pipeline
    from library.generation.requests import ImageRequest

GRID_SEED = 1
LINES_LEFT_OUT = 2
"""Exit status where lines of a prompt file could not be drawn, and the others were."""


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


def run_generation(options: GenerationOptions) -> int:
    """Draw what the options say; returns the exit status.

    Raises:
        UserError: everything that can be found out before models are loaded, at once.
    """
    quiet_libraries()
    started = time.perf_counter()
    left_out: list[UserError] = []
    options, notes = with_recipes(options) if options.pictures.recipes else (options, [])
    run = check_run(options, left_out)
    pictures = planned_pictures(run.lines, run.defaults, run.plan, left_out)
    if not pictures and not options.pictures.interactive:
        raise_all(_each_once(left_out))
    if options.pictures.compare_base:
        check_comparisons(pictures, options)
    for note in [*notes, *run.notes]:
        print(note)
    for problem in _each_once(left_out):
        print(f"gen_img_diffusers: {problem}", file=sys.stderr)
    count = draw_grids(run, pictures) if options.pictures.axes else _draw_single(run, pictures)
    seconds = time.perf_counter() - started
    print(f"{counted(count, 'picture')} in {options.output.folder} ({seconds:.1f} s)")
    return LINES_LEFT_OUT if left_out else 0


def _draw_single(run: CheckedRun, pictures: Sequence[PlannedPicture]) -> int:
    drawing = Drawing(run, _loaded(run))
    return sum(map(drawing.draw, typed_pictures(run) if run.options.pictures.interactive else [pictures]))


def draw_grids(run: CheckedRun, pictures: Sequence[PlannedPicture]) -> int:
    """Draw what is missing of a grid for each picture, then the sheets; returns how many pictures were drawn."""
    from library.generation.grid_folder import GridFolder
    from library.generation.grids import plan_grids

    options = run.options
    grids = plan_grids(pictures, options.pictures.axes, options.adapters, run.adapters, run.base_model)
    folder = GridFolder(options.output.folder, grids, RecipeWriter(options, run.base_model, run.adapters))
    print(folder.plan_text(), flush=True)
    folder.begin()
    if folder.missing:
        Drawing(run, _loaded(run), name=folder.name, saved=folder.saved).draw(folder.missing)
    for path in folder.write_sheets():
        print(path)
    return len(folder.missing)


def _loaded(run: CheckedRun) -> Pipeline:
    from library.generation.loading import load_pipeline

    pipeline = load_pipeline(run.options, run.base_model, run.adapters.find)
    if run.options.adapters.show_metadata:
        print(*_metadata_lines(run.options.adapters), sep="\n")
    return pipeline


def _metadata_lines(options: AdapterOptions) -> Iterator[str]:
    """What the files of the command line say of themselves."""
    from library.checkpoints.metadata_view import view_lines
    from library.checkpoints.tensor_files import open_tensor_file

    for use in options.networks:
        yield from view_lines(open_tensor_file(use.file))


def list_adapters(folder: Path) -> int:
    """Print what is in a folder of adapters; returns the exit status."""
    from library.generation.lora_listing import listing_lines
    from library.generation.lora_shelf import LoraShelf

    print(*listing_lines(LoraShelf(folder).entries()), sep="\n")
    return 0


def _each_once(problems: Sequence[UserError]) -> list[UserError]:
    """Without what is said before, as it is when a line is drawn several times."""
    return list({str(problem): problem for problem in problems}.values())


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
        wildcards=wildcards,
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


def _seed(options: PictureOptions) -> int:
    """The seed of a command: chance where it names none, but for a grid, which is to be found again by the same command."""
    if options.seed is not None:
        return options.seed
    return GRID_SEED if options.axes else random.SystemRandom().randrange(SEEDS)


def typed_pictures(run: CheckedRun) -> Iterator[list[PlannedPicture]]:
    """The pictures of each prompt that is typed, until the end of the input; mistakes are told, and the next one is read."""
    number = 0
    while True:
        if sys.stdin.isatty():
            print("prompt (Ctrl-D ends): ", end="", flush=True)
        text = sys.stdin.readline()
        if not text:
            return
        if not text.strip() or text.startswith("#"):
            continue
        number += 1
        problems: list[UserError] = []
        line = attempt(partial(parse_prompt_line, text.rstrip("\n"), where=f"prompt {number}"), problems)
        seed = random.SystemRandom().randrange(SEEDS) if run.options.pictures.seed is None else run.plan.seed + number - 1
        plan = Plan(**{**vars(run.plan), "seed": seed % SEEDS, "iterations": 1})
        pictures = [] if line is None else planned_pictures([line], run.defaults, plan, problems)
        for problem in problems:
            print(f"gen_img_diffusers: {problem}", file=sys.stderr, flush=True)
        yield pictures


def _nothing(*_: Any) -> None:
    return None


class Drawing:
    """Draws pictures and saves each as soon as it is there.

    Args:
        name: of each picture's file; without it as the options want it.
        saved: is told each picture and its path.
    """

    def __init__(
        self,
        run: CheckedRun,
        pipeline: Pipeline,
        *,
        name: Namer | None = None,
        saved: Callable[[PlannedPicture, Path], None] = _nothing,
    ) -> None:
        self._run, self._pipeline, self._saved = run, pipeline, saved
        self._name: Namer = name or namer(run.options.output)
        self._recipes = RecipeWriter(run.options, run.base_model, run.adapters)
        self._number = 0
        self._learned: set[Path] = set()

    def draw(self, pictures: Sequence[PlannedPicture]) -> int:
        """Returns how many."""
        from library.generation.pipeline import Hooks

        self._learn(self._run.adapters.files())
        options = self._run.options
        comparisons = Comparisons(pictures if options.pictures.compare_base else [], options.adapters)
        requests = [*(picture.request for picture in pictures), *comparisons.bases]
        progress = DrawingProgress(requests, len(pictures))
        hooks = Hooks(before_step=progress.before_step)
        if options.output.save_first_stage:
            hooks = Hooks(before_step=progress.before_step, first_stage=self._save_first_stage)
        try:
            drawn = self._pipeline.stream(requests, batch_size=options.pictures.batch_size, hooks=hooks)
            for number, image in drawn:
                if number >= len(pictures):
                    comparisons.base_drawn(number - len(pictures), image)
                    continue
                picture = pictures[number]
                path = self._name(self._number + number, picture, "")
                write_png(path, image, picture.request, self._recipes.made_with(picture))
                progress.drawn(path)
                self._saved(picture, path)
                comparisons.picture_saved(number, path)
        finally:
            progress.close()
        self._number += len(pictures)
        return len(pictures)

    def _learn(self, files: Sequence[Path]) -> None:
        """Teach the text encoder the words that come with adapter files."""
        from library.generation.loading import learn_bundled

        for note in learn_bundled(self._pipeline.models, [file for file in files if file not in self._learned]):
            print(note)
        self._learned.update(files)

    def _save_first_stage(self, request: ImageRequest, image: Image) -> None:
        picture = PlannedPicture(request=request, raw_prompt=request.prompt)
        write_png(self._name(self._number, picture, "0"), image, request, self._recipes.made_with(picture))
