#!/usr/bin/env python3
"""Convert an adapter file to other key names, to another algorithm, or to what a program applies rightly.

    python networks/convert_lora.py --model loha.safetensors --save_to lora.safetensors --algorithm lora
    python networks/convert_lora.py --model dora.safetensors --save_to lora.safetensors --for comfyui --base sd15.ckpt
    python networks/convert_lora.py --model lora.safetensors --save_to peft.safetensors --to diffusers

Nothing is written before it is known that it works; what is written is opened again and compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.doors import run_door
from library.cli.options import FLAG, Option, OptionGroup, ParsedOptions, parse
from library.cli.weight_tools import (
    PRECISIONS,
    REPORT_OPTIONS,
    missing_problems,
    place_problems,
    rank_problems,
    report_places,
    suffix_problems,
    tell,
)
from library.errors import UserError, raise_all

if TYPE_CHECKING:
    from networks.tools.file_conversion import FileConversion

READERS = ("comfyui", "a1111", "forge", "sdnext", "diffusers", "lycoris", "invokeai")

OPTIONS = (
    OptionGroup(
        "files",
        (
            Option(name="model", type=Path, help="adapter file of any layout and algorithm"),
            Option(name="save_to", type=Path, help="file to write; its suffix decides the format"),
            Option(
                name="base",
                help="checkpoint, diffusers folder or Hub id of the model that the adapter was trained on; wanted where its "
                "change depends on that model (DoRA, GLoRA, OFT, BOFT, (IA)3) and another algorithm is to hold it",
            ),
            Option(name="save_precision", choices=tuple(PRECISIONS), help="of the numbers; as in the file if not given"),
            *REPORT_OPTIONS,
        ),
    ),
    OptionGroup(
        "form",
        (
            Option(
                name="to",
                choices=("kohya", "diffusers"),
                default="kohya",
                help="names of the keys: kohya's, which most programs read, or those of diffusers and PEFT (LoRA only)",
            ),
            Option(
                name="algorithm",
                choices=("lora", "full"),
                help="make every layer plain LoRA, or the full difference of its weight; without it, each stays what it is",
            ),
            Option(
                name="rank",
                type=int,
                help="highest rank of LoRA that is computed; if not given, each layer gets the lowest one that is exact",
            ),
            Option(
                name="for",
                choices=("all", *READERS),
                many=True,
                help="give every layer the nearest form that these programs apply rightly, and all of them one alpha where "
                "a program needs that",
            ),
            Option(
                name="leave_out",
                type=FLAG,
                help="write the file without what its form cannot hold (norms and biases in LoRA) instead of refusing",
            ),
        ),
    ),
)


def conversion_of(given: ParsedOptions) -> FileConversion:
    """What a command line asks for.

    Raises:
        UserError: all that is wrong with it at once.
    """
    from networks.tools.file_conversion import FileConversion

    wanted = {"model": "an adapter file", "save_to": "a name for the file to write"}
    problems = [*missing_problems(given, wanted), *suffix_problems(given), *place_problems(given, ("model", "base"))]
    problems += rank_problems(given, "rank")
    target: Any = given["save_to"]
    if target is not None and given["to"] == "diffusers" and target.suffix != ".safetensors":
        remedy = "use .safetensors"
        problems.append(
            UserError(
                "can hold no metadata, where diffusers' layout has alphas", where=given.where("save_to"), remedy=remedy
            )
        )
    readers = given["for"] or ()
    if readers and given["algorithm"]:
        remedy = "give one of them"
        problems.append(UserError("the program decides the algorithm", where="--for with --algorithm", remedy=remedy))
    if given["rank"] is not None and not readers and given["algorithm"] != "lora":
        problems.append(UserError("has no effect", where=given.where("rank"), remedy="give --algorithm lora or --for"))
    raise_all(problems)
    return FileConversion(
        source=given["model"],
        target=target,
        layout=given["to"],
        algorithm=given["algorithm"],
        rank=given["rank"],
        base=given["base"],
        readers=READERS if "all" in readers else tuple(readers),
        precision=given["save_precision"],
        leave_out=given["leave_out"],
    )


def work(argv: Sequence[str]) -> int:
    given = parse(argv, OPTIONS, description=__doc__ or "")
    conversion = conversion_of(given)
    from library.training.progress import CountBar
    from networks.tools.file_conversion import convert_file

    tell(convert_file(conversion, progress=CountBar("layers")), report_places(given))
    return 0


if __name__ == "__main__":
    sys.exit(run_door("convert_lora", work))
