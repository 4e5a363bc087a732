#!/usr/bin/env python3
"""Convert Stable Diffusion 1.x and 2.x models between one file in the original layout and a diffusers folder.

    python tools/convert_diffusers20_original_sd.py model.safetensors model_folder
    python tools/convert_diffusers20_original_sd.py model_folder model.safetensors --fp16

A name with a suffix (.safetensors, .ckpt) is a file, one without is a folder. The result is opened again and compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.doors import run_door
from library.cli.options import FLAG, Option, OptionGroup, all_options, build_parser
from library.errors import UserError, raise_all

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "float": "float32"}
FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")

OPTIONS = (
    OptionGroup(
        "model",
        (
            Option(name="v1", type=FLAG, help="say that the model is SD 1.x; an error where it is not"),
            Option(name="v2", type=FLAG, help="say that the model is SD 2.x; an error where it is not"),
            Option(name="variant", help="which weights of a folder are read, and how those written are named ('fp16')"),
            Option(name="reference_model", help="a model folder, or Hub id, whose scheduler and tokenizer are copied"),
            Option(
                name="unet_use_linear_projection",
                type=FLAG,
                help="no effect: SD 2.x folders always get linear projections, as published, and SD 1.x convolutions",
            ),
        ),
    ),
    OptionGroup(
        "output",
        (
            Option(name="fp16", type=FLAG, help="save 16-bit floats"),
            Option(name="bf16", type=FLAG, help="save bfloat16"),
            Option(name="float", type=FLAG, help="save 32-bit floats; without any of these, numbers are kept as they are"),
            Option(
                name="save_precision_as", choices=("no", *PRECISIONS), default="no", help="another spelling of these three"
            ),
            Option(name="epoch", type=int, default=0, help="added to the epoch stored in a checkpoint file"),
            Option(name="global_step", type=int, default=0, help="added to the step stored in a checkpoint file"),
            Option(name="metadata", help="""texts for the header of a .safetensors file, as JSON: '{"name": "value"}'"""),
            Option(name="use_safetensors", type=FLAG, help="no effect: folders always hold .safetensors files"),
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """What one conversion does.

    Attributes:
        source: file, folder or Hub id.
        target: a file where it has a suffix, else a folder.
        v2: what the user says about the family; None where nothing is said.
        precision: torch's name of the type to save; None keeps what is stored.
        metadata: for the header of a .safetensors file.
    """

    source: str
    target: Path
    v2: bool | None
    precision: str | None
    epoch: int
    global_step: int
    metadata: dict[str, str]
    variant: str | None
    reference_model: str | None

    @property
    def to_file(self) -> bool:
        return bool(self.target.suffix)


def parse_options(argv: Sequence[str]) -> ConversionOptions:
    """The options of a command line.

    Raises:
        UserError: all that is wrong with them at once.
    """
    parser = build_parser(OPTIONS, description=__doc__ or "")
    parser.add_argument("model_to_load", help="checkpoint file, diffusers folder, or Hub id")
    parser.add_argument("model_to_save", help="where to: a file with a suffix, or a folder")
    given = vars(parser.parse_args(list(argv)))
    options = all_options(OPTIONS)
    problems: list[UserError] = []
    values: dict[str, Any] = {name: option.default for name, option in options.items()}
    for name, raw in given.items():
        try:
            values[name] = options[name].convert(raw) if name in options else raw
        except ValueError as error:
            problems.append(UserError(str(error), where=f"--{name}"))
    result = ConversionOptions(
        source=values["model_to_load"],
        target=Path(values["model_to_save"]),
        v2=_family_said(values, problems),
        precision=_precision(values, problems),
        epoch=values["epoch"],
        global_step=values["global_step"],
        metadata=_metadata(values["metadata"], problems),
        variant=values["variant"],
        reference_model=values["reference_model"],
    )
    _check_target(result, problems)
    raise_all(problems)
    return result


def _family_said(values: dict[str, Any], problems: list[UserError]) -> bool | None:
    if values["v1"] and values["v2"]:
        problems.append(UserError("--v1 and --v2 exclude each other", remedy="leave both out: the model says what it is"))
    return True if values["v2"] else False if values["v1"] else None


def _precision(values: dict[str, Any], problems: list[UserError]) -> str | None:
    asked = {name for name in PRECISIONS if values[name]} | ({values["save_precision_as"]} - {"no"})
    if len(asked) > 1:
        problems.append(UserError(f"{' and '.join(sorted(asked))} exclude each other as precisions", remedy="keep one"))
    return PRECISIONS[asked.pop()] if len(asked) == 1 else None


def _metadata(text: str | None, problems: list[UserError]) -> dict[str, str]:
    import json

    if text is None:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        content, reason = None, f"is not JSON ({error})"
    else:
        reason = "is not a JSON object"
    if isinstance(content, dict):
        return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}
    problems.append(UserError(reason, where="--metadata", remedy="""write '{"name": "value"}'"""))
    return {}


def _check_target(options: ConversionOptions, problems: list[UserError]) -> None:
    target = options.target
    where = str(target)
    if options.to_file and target.suffix not in FILE_SUFFIXES:
        problems.append(
            UserError(f"unknown suffix {target.suffix!r}", where=where, remedy=f"use {', '.join(FILE_SUFFIXES)}")
        )
    if target.exists() and Path(options.source).exists() and target.resolve() == Path(options.source).resolve():
        problems.append(UserError("is the model to load", where=where, remedy="name another place"))
    if not options.to_file and target.is_file():
        problems.append(UserError("is a file, not a folder", where=where, remedy="name a folder, or a file with a suffix"))
    if options.metadata and target.suffix != ".safetensors":
        problems.append(UserError("only .safetensors files hold metadata", where="--metadata", remedy="leave it out"))


def convert(options: ConversionOptions) -> str:
    """Do it; returns a sentence about what was written."""
    from library.checkpoints.base_model import open_base_model
    from library.checkpoints.hub import resolve_model_path
    from library.checkpoints.model_writing import same_tensors, write_folder
    from library.families.sd1 import SD1

    model = open_base_model(options.source, v2=options.v2, variant=options.variant)
    if options.v2 is False and model.family != SD1:
        raise UserError(f"--v1 was given, but this is {model.family.title}", where=str(model.path), remedy="leave out --v1")
    reference = resolve_model_path(options.reference_model) if options.reference_model else None
    if options.to_file:
        _write_file(model, options)
        written = open_base_model(options.target)
    else:
        write_folder(
            model, options.target, dtype=options.precision, variant=options.variant, reference=reference
        )  # fmt: skip
        written = open_base_model(options.target, variant=options.variant)
    same_tensors(written, model, options.precision)
    tensors = sum(len(part.sources) for part in written.parts.values())
    return f"{options.target}: {model.family.title}, {tensors} tensors, compared with {options.source}"


def _write_file(model: Any, options: ConversionOptions) -> None:
    from datetime import datetime

    from library.checkpoints.metadata import ModelDescription, modelspec_metadata
    from library.checkpoints.model_writing import config_metadata, counters_of, plan_single_file
    from library.checkpoints.tensor_writing import write_tensors, write_torch_file

    planned = plan_single_file(model, dtype=options.precision)
    if options.target.suffix != ".safetensors":
        stored = counters_of(model)
        counters = {name: stored.get(name, 0) + getattr(options, name) for name in ("epoch", "global_step")}
        write_torch_file(options.target, planned, counters)
        return
    described = modelspec_metadata(
        model.family,
        model.resolved_prediction_type,
        ModelDescription(title=options.target.stem),
        saved_at=datetime.now(),
    )
    write_tensors(options.target, planned, {**described, **config_metadata(model, planned), **options.metadata})


def work(argv: Sequence[str]) -> int:
    print(convert(parse_options(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(run_door("convert_diffusers20_original_sd", work))
