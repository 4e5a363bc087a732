"""What is to be done for a folder of images: which pictures are made of each, which files are copied, under which names.

Names are settled before anything is written. A picture says in its comment what it was made from and how, so that a second
run knows which are up to date.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.dataset.images import image_extensions
from library.errors import UserError, raise_all
from library.resizing.pictures import Recipe

UNRENAMED = (".npz",)
"""Files of an image's name that belong to it at its own size only: cached latents."""


@dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """One call of the tool.

    Attributes:
        source, target: folders; the first is not searched for folders in it.
        recipes: one for each size.
        copy_associated_files: files with an image's name and another extension are copied under each picture's name.
    """

    source: Path
    target: Path
    recipes: tuple[Recipe, ...]
    copy_associated_files: bool = False


@dataclass(frozen=True)
class ImageTask:
    """An image and the pictures to make of it: (path, recipe)."""

    path: Path
    pictures: tuple[tuple[Path, Recipe], ...]


@dataclass(frozen=True)
class FolderPlan:
    """All that one call does.

    Attributes:
        images: what is decoded and scaled.
        copies: (from, to), byte for byte: images at their own size, other files, captions under new names.
        folders: how many folders in the source are passed over.
    """

    images: tuple[ImageTask, ...]
    copies: tuple[tuple[Path, Path], ...]
    folders: int


def plan_folder(options: ResizeOptions) -> FolderPlan:
    """Look at the names in the source folder.

    Raises:
        UserError: folders that are none or the same, no images, or two files that would get one name.
    """
    _check_folders(options)
    entries = sorted(options.source.iterdir(), key=lambda entry: entry.name)
    files = [entry for entry in entries if entry.is_file()]
    extensions = image_extensions()
    images = [file for file in files if file.suffix.lower() in extensions and not file.name.startswith(".")]
    if not images:
        raise UserError("holds no images", where=str(options.source), remedy=f"known are {', '.join(extensions)}")
    tasks = tuple(
        ImageTask(image, tuple((options.target / picture_name(image, recipe), recipe) for recipe in options.recipes))
        for image in images
    )
    copies = [(file, options.target / file.name) for file in files]
    if options.copy_associated_files:
        copies += _associated(tasks, set(files) - set(images))
    _check_names([(task.path, target) for task in tasks for target, _ in task.pictures] + copies)
    return FolderPlan(tasks, tuple(copies), sum(entry.is_dir() for entry in entries))


def picture_name(image: Path, recipe: Recipe) -> str:
    """ "photo+512x512.jpg" for "photo.webp"."""
    return f"{image.stem}+{recipe.name}{recipe.extension}"


def _associated(tasks: Sequence[ImageTask], others: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    by_stem = defaultdict(list)
    for file in others:
        if file.suffix.lower() not in UNRENAMED:
            by_stem[file.stem].append(file)
    for task in tasks:
        for picture, _ in task.pictures:
            yield from ((file, picture.with_name(picture.stem + file.suffix)) for file in sorted(by_stem[task.path.stem]))


def _check_folders(options: ResizeOptions) -> None:
    source, target = options.source, options.target
    if not source.is_dir():
        what = "is a file, not a folder" if source.exists() else "no such folder"
        raise UserError(what, where=str(source))
    if target.exists() and not target.is_dir():
        raise UserError("is a file, not a folder", where=str(target), remedy="name a folder")
    if target.exists() and target.samefile(source):
        raise UserError("is the folder of the images", where=str(target), remedy="name another folder")


def _check_names(named: Iterable[tuple[Path, Path]]) -> None:
    makers: dict[str, list[Path]] = defaultdict(list)
    names: dict[str, str] = {}
    for source, target in named:
        makers[os.path.normcase(target)].append(source)
        names[os.path.normcase(target)] = target.name
    raise_all(
        [
            UserError(
                f"would become one file, {names[target]}", where=", ".join(map(str, sources)), remedy="rename all but one"
            )
            for target, sources in makers.items()
            if len(sources) > 1
        ]
    )
