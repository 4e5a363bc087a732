"""Pictures of a checked run, drawn and saved one by one; and the prompts that are typed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError, attempt
from library.generation.comparing import Comparisons
from library.generation.made_with import RecipeWriter
from library.generation.output import DrawingProgress, Namer, namer
from library.generation.planning import SEEDS, Plan, PlannedPicture, planned_pictures
from library.generation.png_info import write_png
from library.generation.prompt_options import parse_prompt_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.generation.checked_run import CheckedRun
    from library.generation.pipeline import Pipeline
    from library.generation.requests import ImageRequest


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
        tell(problems, run.options.program)
        yield pictures


def tell(problems: Sequence[UserError], program: str) -> None:
    """Say what cannot be drawn, while the rest is."""
    for problem in problems:
        print(f"{program}: {problem}", file=sys.stderr, flush=True)


def _nothing(*_: Any) -> None:
    return None


class Drawing:
    """Draws pictures and saves each as soon as it is there.

    Args:
        left_out: gets what is wrong with pictures that cannot be drawn, which is told at once; the others are drawn then.
            Without it the first such ends all.
        name: of each picture's file; without it as the options want it.
        saved: is told each picture and its path.
    """

    def __init__(
        self,
        run: CheckedRun,
        pipeline: Pipeline,
        *,
        left_out: list[UserError] | None = None,
        name: Namer | None = None,
        saved: Callable[[PlannedPicture, Path], None] = _nothing,
    ) -> None:
        self._run, self._pipeline, self._left_out, self._saved = run, pipeline, left_out, saved
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
            hooks = replace(hooks, first_stage=partial(self._save_first_stage, pictures))
        failed = None if self._left_out is None else partial(self._leave_out, pictures)
        count = 0
        try:
            drawn = self._pipeline.stream(requests, batch_size=options.pictures.batch_size, hooks=hooks, failed=failed)
            for number, image in drawn:
                if number >= len(pictures):
                    comparisons.base_drawn(number - len(pictures), image)
                    continue
                picture = pictures[number]
                path = self._name(self._number + number, picture, "")
                write_png(path, image, picture.request, self._recipes.made_with(picture))
                progress.drawn(path)
                count += 1
                self._saved(picture, path)
                comparisons.picture_saved(number, path)
        finally:
            progress.close()
        self._number += len(pictures)
        return count

    def _learn(self, files: Sequence[Path]) -> None:
        """Teach the text encoder the words that come with adapter files."""
        from library.generation.loading import learn_bundled

        for note in learn_bundled(self._pipeline.models, [file for file in files if file not in self._learned]):
            print(note)
        self._learned.update(files)

    def _leave_out(self, pictures: Sequence[PlannedPicture], number: int, error: UserError) -> None:
        assert self._left_out is not None
        place = pictures[number].where if number < len(pictures) else "--compare_base"
        problems = [
            UserError(each.what, where=f"{place}, {each.where}" if each.where else place, remedy=each.remedy)
            for each in error.problems
        ]
        tell(problems, self._run.options.program)
        self._left_out += problems

    def _save_first_stage(
        self, pictures: Sequence[PlannedPicture], request: ImageRequest, first: ImageRequest, image: Image
    ) -> None:
        number = next(number for number, picture in enumerate(pictures) if picture.request is request)
        picture = replace(pictures[number], request=first)
        write_png(self._name(self._number + number, picture, "0"), image, first, self._recipes.made_with(picture))
