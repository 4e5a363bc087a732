"""One run of gen_img_diffusers.py: everything is checked, then models are loaded, then pictures are drawn and saved."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError, counted, raise_all
from library.generation.checked_run import CheckedRun, check_run
from library.generation.comparing import check_comparisons
from library.generation.drawing import Drawing, tell, typed_pictures
from library.generation.made_with import RecipeWriter
from library.generation.options import AdapterOptions, GenerationOptions
from library.generation.planning import PlannedPicture, planned_pictures
from library.generation.recipes import with_recipes
from library.quiet import quiet_libraries

if TYPE_CHECKING:
    from library.generation.pipeline import Pipeline

LINES_LEFT_OUT = 2
"""Exit status where lines of a prompt file could not be drawn, and the others were."""


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
    tell(_each_once(left_out), options.program)
    count = draw_grids(run, pictures) if options.pictures.axes else _draw_single(run, pictures, left_out)
    seconds = time.perf_counter() - started
    print(f"{counted(count, 'picture')} in {options.output.folder} ({seconds:.1f} s)")
    return LINES_LEFT_OUT if left_out else 0


def _draw_single(run: CheckedRun, pictures: Sequence[PlannedPicture], left_out: list[UserError]) -> int:
    if run.options.pictures.interactive:
        # mistakes in typing are told, and are no failure of the run
        return sum(map(Drawing(run, _loaded(run), left_out=[]).draw, typed_pictures(run)))
    return Drawing(run, _loaded(run), left_out=left_out).draw(pictures)


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
