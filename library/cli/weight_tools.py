"""What the command lines of all weight tools are asked alike: names of types and files, places to write to, ranks, devices,
and what they tell at the end.

Functions named after problems return the mistakes that they find, so that a tool can tell all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.checkpoints.atomic import check_writable
from library.cli.options import Option, ParsedOptions
from library.errors import UserError, attempt
from networks.tools.reports import ReportPlaces, ToolReport, write_reports

PRECISIONS: Mapping[str, str] = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""As sd-scripts names them -> as torch does."""
FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
REPORT_OPTIONS = (
    Option(name="report", type=Path, help="write all that was found to this JSON file", extension=True),
    Option(
        name="plot",
        type=Path,
        help="draw into this PNG file: singular values of the layers, and how far each block is from what was meant",
        extension=True,
    ),
)


def missing_problems(given: ParsedOptions, wanted: Mapping[str, str]) -> list[UserError]:
    """Options that a tool cannot do without: name -> what it wants there ("an adapter file")."""
    return [
        UserError("not given", where=f"--{name}", remedy=f"give {what}")
        for name, what in wanted.items()
        if given[name] in (None, ())
    ]


def rank_problems(given: ParsedOptions, *names: str) -> list[UserError]:
    """Ranks below 1."""
    return [
        UserError("is below 1", where=given.where(name), remedy="give 1 or more")
        for name in names
        if given[name] is not None and given[name] < 1
    ]


def suffix_problems(given: ParsedOptions, *, folder: bool = False) -> list[UserError]:
    """A name in `--save_to` that tells of no kind of file.

    Args:
        folder: a name without a suffix is one of a diffusers folder.
    """
    target = given["save_to"]
    if target is None or target.suffix in FILE_SUFFIXES or (folder and target.suffix == ""):
        return []
    remedy = f"use {', '.join(FILE_SUFFIXES)}" + (", or none for a diffusers folder" if folder else "")
    return [UserError("has no suffix of a tensor file", where=given.where("save_to"), remedy=remedy)]


def place_problems(
    given: ParsedOptions, inputs: Sequence[str], outputs: Mapping[str, Path] | None = None
) -> list[UserError]:
    """Places to write to that hold an input or are taken by another output, and reports that could not be written.

    Args:
        inputs: options that name files and model folders; what is not there (ids at the Hub) is passed over.
        outputs: option -> file that it makes; what `--save_to` says if not given. Reports are added.
    """
    if outputs is None:
        outputs = {"save_to": given["save_to"]} if given["save_to"] is not None else {}
    reports = {name: place for name, place in vars(report_places(given)).items() if place is not None}
    problems: list[UserError] = []
    taken: dict[Path, str] = {}
    for name, place in {**outputs, **reports}.items():
        found = place.resolve()
        owner = next((path for path in _files(given, inputs) if found.exists() and path.samefile(found)), None)
        if owner is not None:
            problems.append(UserError("is one of the inputs", where=given.where(name), remedy="name another place"))
        elif found in taken:
            what = f"is what --{taken[found]} writes"
            problems.append(UserError(what, where=given.where(name), remedy="name another place"))
        elif name in reports and place.suffix in FILE_SUFFIXES:
            problems.append(UserError("has the suffix of a tensor file", where=given.where(name), remedy="name another one"))
        elif name == "plot" and place.suffix.lower() != ".png":
            problems.append(UserError("is no name of a PNG file", where=given.where(name), remedy="let it end in .png"))
        elif name in reports:
            attempt(lambda place=place: check_writable(place), problems)  # type: ignore[misc]
        taken[found] = name
    return problems


def report_places(given: ParsedOptions) -> ReportPlaces:
    """What `REPORT_OPTIONS` say; nowhere for a tool without them."""
    return ReportPlaces(report=given.values.get("report"), plot=given.values.get("plot"))


def tell(told: ToolReport, places: ReportPlaces) -> None:
    """Write the reports that are wanted, and print the lines.

    Raises:
        UserError: a place that cannot be written to.
    """
    write_reports(told, places)
    print(*told.lines, sep="\n")


def _files(given: ParsedOptions, inputs: Sequence[str]) -> Iterator[Path]:
    """The files and folders that options name, and all that is in the folders."""
    for name in inputs:
        value: Any = given[name]
        for each in value if isinstance(value, tuple) else (value,):
            path = Path(each or "")
            if each is not None and path.exists():
                yield path
                yield from path.rglob("*") if (path / "unet").is_dir() else ()


def checked_device(name: str | None) -> str:
    """The name of a device that can be used; the CPU for None.

    Raises:
        UserError: a device that is none, is not there, or computes nothing.
    """
    if name in (None, "cpu"):
        return "cpu"
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot be used here ({reason})", where=f"--device {name}", remedy="use cpu") from None
    return str(name)
