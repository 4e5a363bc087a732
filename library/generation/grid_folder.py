"""The folder of a grid: which of its pictures are there already, a sheet for each prompt, and a page of all.

    grid_001/index.html, sheet.png (sheet_1.png and so on of several), grid.json, pictures/*.png

`grid.json` says what the grid is of, so that the same command finds its folder again, also with other values on its axes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from library.checkpoints.atomic import atomic_write
from library.errors import counted
from library.generation.grid_page import PageCell, PageGrid, page_text, settings_text
from library.generation.grids import Grid
from library.generation.made_with import RecipeWriter
from library.generation.output import free_path, steps_of
from library.generation.planning import PlannedPicture
from library.generation.png_info import own_recipe_of, recipe_text

PICTURES, PAGE, ABOUT = "pictures", "index.html", "grid.json"
_LONGEST_NAME = 80  # of a picture's file, without its ending


@dataclass(frozen=True)
class _Place:
    """A picture to draw, and what its file may be called."""

    picture: PlannedPicture
    stem: str


class GridFolder:
    """The folder of one command's grids.

    Args:
        folder: `--outdir`.
        writer: of the pictures' recipes.
    """

    def __init__(self, folder: Path, grids: Sequence[Grid], writer: RecipeWriter) -> None:
        self._grids, self._writer = grids, writer
        self.path = _folder_for(folder, self._about())
        self._there: dict[str, Path] = {}
        for path in sorted((self.path / PICTURES).glob("*.png")):
            recipe = own_recipe_of(path)
            if recipe is not None:
                self._there.setdefault(recipe, path)
        several = len(grids) > 1
        self._places: dict[str, _Place] = {}
        for number, grid in enumerate(grids, 1):
            for picture, title in grid.cells():
                stem = f"{number}, {title}" if several else title
                self._places.setdefault(self._recipe(picture), _Place(picture, _stem(stem)))
        self.missing = [place.picture for recipe, place in self._places.items() if recipe not in self._there]

    def plan_text(self) -> str:
        """What will be drawn, in a sentence."""
        first = self._grids[0]
        size = f"{len(first.labels(first.x))} x {len(first.labels(first.y))}"
        what = f"{counted(len(self._grids), 'grid')} of {size}: {counted(len(self._places), 'picture')}"
        steps = counted(sum(steps_of(picture.request) for picture in self.missing), "step")
        kept = len(self._places) - len(self.missing)
        if not kept:
            return f"{what}, {steps}"
        return f"{what}; {kept} of them {'is' if kept == 1 else 'are'} in {self.path} already, {steps} for the others"

    def begin(self) -> None:
        """Make the folder, so that what is drawn from now on is found again."""
        (self.path / PICTURES).mkdir(parents=True, exist_ok=True)
        _write(self.path / ABOUT, json.dumps(self._about(), ensure_ascii=False, indent=1).encode())

    def name(self, number: int, picture: PlannedPicture, stage: str) -> Path:
        """Of a picture that is missing, or of a first stage, as `output.Namer`."""
        stem = self._places[self._recipe(picture)].stem if not stage else f"first stage {number:03d}"
        return free_path(self.path / PICTURES / f"{stem}.png")

    def saved(self, picture: PlannedPicture, path: Path) -> None:
        """One that was missing is there now."""
        self._there[self._recipe(picture)] = path

    def write_sheets(self) -> list[Path]:
        """The sheets and the page; returns their paths, the page last."""
        made_with = self._about()["made_with"]
        model = " + ".join([made_with["model"], *(network["name"] for network in made_with["networks"])])
        pages, written = [], []
        for number, grid in enumerate(self._grids, 1):
            sheet = self.path / (f"sheet_{number}.png" if len(self._grids) > 1 else "sheet.png")
            notes = [f"{settings_text(grid.base.request, varied=(grid.x, grid.y))}, {model}"]
            if grid.base.request.negative_prompt:
                notes.insert(0, f"negative: {grid.base.request.negative_prompt}")
            self._write_sheet(sheet, grid, notes)
            pages.append(self._page_grid(sheet, grid, notes))
            written.append(sheet)
        page = self.path / PAGE
        _write(page, page_text(_title(self._grids[0]), pages).encode())
        return [*written, page]

    def _write_sheet(self, path: Path, grid: Grid, notes: Sequence[str]) -> None:
        from PIL import Image

        from library.generation.grid_sheet import Sheet, draw_sheet

        def read(picture: PlannedPicture) -> Image.Image:
            with Image.open(self._there[self._recipe(picture)]) as image:
                return image.convert("RGB")

        sheet = Sheet(
            size=(grid.base.request.width, grid.base.request.height),
            rows=((read(picture) for picture in row) for row in grid.rows),
            columns=grid.labels(grid.x),
            lines=grid.labels(grid.y),
            x=grid.x,
            y=grid.y,
            notes=[grid.base.request.prompt, *notes],
        )
        with atomic_write(path) as file:
            draw_sheet(sheet).save(file, format="PNG")

    def _page_grid(self, sheet: Path, grid: Grid, notes: Sequence[str]) -> PageGrid:
        cells = iter(grid.cells())
        return PageGrid(
            prompt=grid.base.request.prompt,
            sheet=PurePosixPath(sheet.name),
            rows=[[self._page_cell(*next(cells)) for _ in row] for row in grid.rows],
            columns=grid.labels(grid.x),
            lines=grid.labels(grid.y),
            x=grid.x,
            y=grid.y,
            notes=notes,
        )

    def _page_cell(self, picture: PlannedPicture, title: str) -> PageCell:
        file = self._there[self._recipe(picture)].relative_to(self.path)
        return PageCell(file=PurePosixPath(file.as_posix()), title=title, request=picture.request)

    def _recipe(self, picture: PlannedPicture) -> str:
        return recipe_text(picture.request, self._writer.made_with(picture))

    def _about(self) -> dict[str, Any]:
        """What the grids are of, apart from the values of their axes."""
        recipes = [json.loads(self._recipe(grid.base)) for grid in self._grids]
        first = self._grids[0]
        return {
            "axes": {axis.side: axis.what for axis in (first.x, first.y) if axis is not None},
            "pictures": [recipe["image"] for recipe in recipes],
            "made_with": recipes[0]["made_with"],
        }


def _folder_for(outdir: Path, about: dict[str, Any]) -> Path:
    """The folder of these grids, if there is one, else the next that is free."""
    numbers = [0]
    for folder in sorted(outdir.glob("grid_*")):
        number = folder.name.removeprefix("grid_")
        if not number.isdecimal():
            continue
        numbers.append(int(number))
        try:
            if json.loads((folder / ABOUT).read_text(encoding="utf-8")) == about:
                return folder
        except (OSError, ValueError):
            continue
    return outdir / f"grid_{max(numbers) + 1:03d}"


def _stem(title: str) -> str:
    """A name for a file on any system; the end is what tells epochs from one another."""
    return re.sub(r"[^\w.,+() -]+", "-", title).strip(" .-")[-_LONGEST_NAME:] or "picture"


def _title(grid: Grid) -> str:
    return " by ".join(axis.what for axis in (grid.x, grid.y) if axis is not None)


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
