"""Options of tools/resize_images_to_resolution.py, and the way from them to what the tool does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.cli.options import FLAG, Option, OptionGroup, parse
from library.errors import UserError, raise_all

if TYPE_CHECKING:
    from library.resizing.folder import ResizeOptions

INTERPOLATIONS = ("area", "cubic", "lanczos4", "nearest", "linear", "box")


def resolutions(text: str) -> tuple[tuple[int, int], ...]:
    """Sizes from "512x512,384x384".

    Raises:
        ValueError: the end of a sentence.
    """
    sizes: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d{0,5})[xX]([1-9]\d{0,5})\s*", part)
        if match is None:
            raise ValueError(f"{part.strip()!r} is not a width and a height, as in 512x512")
        sizes.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(sizes))


RESIZE_FOLDERS = (
    Option(name="src_img_folder", type=Path, help="folder of images; folders in it are not searched"),
    Option(
        name="dst_img_folder", type=Path, help="where the images and their smaller pictures go; made where it is missing"
    ),
)
RESIZE_IMAGES_OPTIONS = (
    OptionGroup(
        "pictures",
        (
            Option(
                name="max_resolution",
                type=resolutions,
                default="512x512,384x384,256x256,128x128",
                help="sizes with commas between; each image is scaled to the area of each, and never enlarged",
            ),
            Option(name="divisible_by", type=int, default=1, help="cut both sides, at both ends, to multiples of this"),
            Option(
                name="interpolation",
                choices=INTERPOLATIONS,
                default="area",
                help="how pixels are put together; all but nearest take the mean of what a pixel covers",
            ),
            Option(
                name="save_as_png",
                type=FLAG,
                help="save PNG, which keeps transparency and 16-bit grey; else JPEG of quality 100",
            ),
        ),
    ),
    OptionGroup(
        "files",
        (
            Option(
                name="copy_associated_files",
                type=FLAG,
                help="copy files with an image's name, such as captions, under the name of each of its pictures too",
            ),
        ),
    ),
)


def parse_resize_options(argv: Sequence[str], *, description: str) -> ResizeOptions:
    """What a command line asks for.

    Raises:
        UserError: all that is wrong with it.
    """
    given = parse(argv, RESIZE_IMAGES_OPTIONS, description=description, positional=RESIZE_FOLDERS)
    problems: list[UserError] = []
    if given["divisible_by"] < 1:
        problems.append(UserError("must be 1 or more", where=given.where("divisible_by")))
    raise_all(problems)
    from library.resizing.folder import ResizeOptions
    from library.resizing.pictures import Recipe

    sizes = given["max_resolution"]
    return ResizeOptions(
        source=given["src_img_folder"],
        target=given["dst_img_folder"],
        recipes=tuple(
            Recipe(
                area=size,
                divisible_by=given["divisible_by"],
                interpolation=given["interpolation"],
                png=given["save_as_png"],
            )
            for size in (resolutions(sizes) if isinstance(sizes, str) else sizes)
        ),
        copy_associated_files=given["copy_associated_files"],
    )
