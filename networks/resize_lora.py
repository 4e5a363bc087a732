#!/usr/bin/env python3
"""Lower the ranks of a LoRA, LoHa or LoKr file; the result is LoRA, each layer the best approximation of its rank.

    python networks/resize_lora.py --model lora.safetensors --save_to small.safetensors --new_rank 4 --save_precision fp16
    python networks/resize_lora.py --model lora.safetensors --save_to small.safetensors --new_rank 16 \\
        --dynamic_method sv_fro --dynamic_param 0.9 --verbose

The file is opened again and compared; a table tells what was lost.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.doors import run_door
from library.cli.options import FLAG, Option, OptionGroup, ParsedOptions, parse
from library.cli.weight_tools import (
    PRECISIONS,
    REPORT_OPTIONS,
    checked_device,
    missing_problems,
    place_problems,
    rank_problems,
    report_places,
    suffix_problems,
    tell,
)
from library.errors import UserError, attempt, raise_all

if TYPE_CHECKING:
    from networks.tools.resizing import Resizing

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")

OPTIONS = (
    OptionGroup(
        "files",
        (
            Option(name="model", type=Path, help="adapter file of any layout, of LoRA, LoHa or LoKr"),
            Option(name="save_to", type=Path, help="file to write; its suffix decides the format"),
            Option(name="save_precision", choices=tuple(PRECISIONS), help="of the numbers; float if not given"),
            *REPORT_OPTIONS,
            Option(name="verbose", type=FLAG, help="a line for each layer: what of its singular values is retained"),
        ),
    ),
    OptionGroup(
        "ranks",
        (
            Option(name="new_rank", type=int, default=4, help="rank of the layers; with --dynamic_method the highest one"),
            Option(
                name="new_conv_rank",
                type=int,
                help="the same of convolutions with kernels larger than 1x1; as --new_rank if not given",
            ),
            Option(
                name="dynamic_method",
                choices=METHODS,
                help="find each layer's rank by its singular values: sv_ratio keeps those above the largest / "
                "dynamic_param, sv_fro the fewest with that share of the Frobenius norm, sv_cumulative of the sum",
            ),
            Option(
                name="dynamic_param",
                type=float,
                help="what the method keeps to: above 1 for sv_ratio, above 0 and at most 1 for the others",
            ),
            Option(name="device", help="where the decompositions are computed, as torch names it; cpu if not given"),
        ),
    ),
)


def resizing_of(given: ParsedOptions) -> Resizing:
    """What a command line asks for.

    Raises:
        UserError: all that is wrong with it at once.
    """
    from networks.tools.file_conversion import DTYPES
    from networks.tools.resizing import Resizing

    wanted = {"model": "an adapter file", "save_to": "a name for the file to write"}
    problems = [*missing_problems(given, wanted), *suffix_problems(given), *place_problems(given, ("model",))]
    problems += [*rank_problems(given, "new_rank", "new_conv_rank"), *_problems_of_method(given)]
    device = attempt(lambda: checked_device(given["device"]), problems)
    raise_all(problems)
    return Resizing(
        source=given["model"],
        target=given["save_to"],
        rank=given["new_rank"],
        conv_rank=given["new_conv_rank"] or given["new_rank"],
        method=given["dynamic_method"],
        param=given["dynamic_param"] or 0.0,
        dtype=DTYPES[given["save_precision"] or "float"],
        device=device or "cpu",
        verbose=given["verbose"],
    )


def _problems_of_method(given: ParsedOptions) -> list[UserError]:
    method, param = given["dynamic_method"], given["dynamic_param"]
    if method is None and param is None:
        return []
    if method is None:
        return [UserError("has no effect", where=given.where("dynamic_param"), remedy="give --dynamic_method too")]
    if param is None:
        return [UserError("needs a value to keep to", where=given.where("dynamic_method"), remedy="give --dynamic_param")]
    if method == "sv_ratio" and not param > 1:
        return [UserError("is not above 1", where=given.where("dynamic_param"), remedy="give the ratio, such as 20")]
    if method != "sv_ratio" and not 0 < param <= 1:
        remedy = "give a share above 0 and at most 1, such as 0.9"
        return [UserError("is no share", where=given.where("dynamic_param"), remedy=remedy)]
    return []


def work(argv: Sequence[str]) -> int:
    given = parse(argv, OPTIONS, description=__doc__ or "")
    options = resizing_of(given)
    from library.training.progress import CountBar
    from networks.tools.resizing import resize_file

    tell(resize_file(options, progress=CountBar("layers resized")), report_places(given))
    return 0


if __name__ == "__main__":
    sys.exit(run_door("resize_lora", work))
