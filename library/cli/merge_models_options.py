"""Options of tools/merge_models.py, and the way from them to what the tool does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.cli.options import FLAG, Option, OptionGroup, ParsedOptions, parse
from library.cli.weight_tools import FILE_SUFFIXES, PRECISIONS, REPORT_OPTIONS, checked_device, place_problems, report_places
from library.errors import UserError, counted, raise_all

if TYPE_CHECKING:
    from library.checkpoints.model_merging import MergeOptions
    from networks.tools.reports import ReportPlaces

MERGE_MODELS_OPTIONS = (
    OptionGroup(
        "models",
        (
            Option(name="models", many=True, help="two or more: .safetensors, .ckpt, diffusers folders, in any mix"),
            Option(
                name="ratios",
                type=float,
                many=True,
                help="a factor for each model, which may be negative or above 1; without, all count the same",
            ),
            Option(name="unet_only", type=FLAG, help="merge the U-Net; text encoder and VAE are the first model's"),
            Option(name="show_skipped", type=FLAG, help="name the tensors of the other models that belong to no part"),
        ),
    ),
    OptionGroup(
        "output",
        (
            Option(name="output", type=Path, help="the file to write; .safetensors is put behind a name without it"),
            Option(name="device", default="cpu", help="where tensors are summed: cpu, cuda, cuda:1"),
            Option(
                name="precision",
                choices=tuple(PRECISIONS),
                default="float",
                help="type in which tensors are summed; float rounds once, when saving",
            ),
            Option(name="saving_precision", choices=tuple(PRECISIONS), default="float", help="type of the saved tensors"),
            *REPORT_OPTIONS,
        ),
    ),
)


@dataclass(frozen=True)
class MergeModelsCommand:
    """A command line: what to merge, whether to name what is left out, and where the merge is told of."""

    merge: MergeOptions
    show_skipped: bool
    places: ReportPlaces


def parse_merge_options(argv: Sequence[str], *, description: str) -> MergeModelsCommand:
    """What a command line asks for.

    Raises:
        UserError: all that is wrong with it.
    """
    given = parse(argv, MERGE_MODELS_OPTIONS, description=description)
    models = given["models"] or ()
    target = _target(given["output"])
    raise_all([*_count_problems(given, models), *_target_problems(given, target)])

    from library.checkpoints.model_merging import MergeOptions

    return MergeModelsCommand(
        MergeOptions(
            models=models,
            ratios=given["ratios"] or tuple(1 / len(models) for _ in models),
            target=target,
            unet_only=bool(given["unet_only"]),
            device=checked_device(given["device"]),
            precision=PRECISIONS[given["precision"]],
            saving_precision=PRECISIONS[given["saving_precision"]],
        ),
        given["show_skipped"],
        report_places(given),
    )


def _target(output: Path | None) -> Path:
    if output is None or output.suffix == ".safetensors":
        return output or Path()
    return output.with_name(f"{output.name}.safetensors")


def _count_problems(given: ParsedOptions, models: Sequence[str]) -> list[UserError]:
    if len(models) < 2:
        return [UserError("name two or more", where="--models")]
    ratios = given["ratios"]
    if ratios and len(ratios) != len(models):
        what = f"{len(ratios)} given for {counted(len(models), 'model')}"
        return [UserError(what, where=given.where("ratios"), remedy="give one for each model, or none at all")]
    return []


def _target_problems(given: ParsedOptions, target: Path) -> list[UserError]:
    output = given["output"]
    if output is None:
        return [UserError("name the file to write", where="--output")]
    if output.suffix in FILE_SUFFIXES and output != target:
        what = "only .safetensors files are written"
        return [UserError(what, where=given.where("output"), remedy="convert it afterwards")]
    return place_problems(given, ("models",), {"output": target})
