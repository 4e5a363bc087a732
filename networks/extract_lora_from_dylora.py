#!/usr/bin/env python3
"""Cut a DyLoRA file into LoRA files of every rank that it was trained for, the full one included.

    python networks/extract_lora_from_dylora.py --model dylora.safetensors --save_to split.safetensors --unit 4

writes split-0004.safetensors, split-0008.safetensors and so on. Each acts as its rank acted in training: its alpha is that
of the model times sqrt(rank / full rank). Every file is opened again and compared; a table tells how far each is from the
full rank.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.doors import run_door
from library.cli.options import Option, OptionGroup, parse
from library.cli.weight_tools import (
    REPORT_OPTIONS,
    missing_problems,
    place_problems,
    rank_problems,
    report_places,
    suffix_problems,
    tell,
)
from library.errors import raise_all

OPTIONS = (
    OptionGroup(
        "extraction",
        (
            Option(name="model", type=Path, help="DyLoRA file"),
            Option(name="save_to", type=Path, help="name of the files to write; '-' and the rank are put before the suffix"),
            Option(name="unit", type=int, help="step of the ranks, as in the training's --network_args unit"),
            *REPORT_OPTIONS,
        ),
    ),
)


def work(argv: Sequence[str]) -> int:
    given = parse(argv, OPTIONS, description=__doc__ or "")
    wanted = {"model": "a DyLoRA file", "save_to": "a name for the files to write", "unit": "the unit of the training"}
    problems = [*missing_problems(given, wanted), *suffix_problems(given), *rank_problems(given, "unit")]
    raise_all([*problems, *place_problems(given, ("model",), {})])
    from library.training.progress import CountBar
    from networks.tools.rank_cutting import read_low_rank_file, write_ranks
    from networks.tools.rank_cutting_report import report_of

    file = read_low_rank_file(given["model"])
    places = write_ranks(file, given["save_to"], given["unit"], progress=CountBar("files"))
    tell(report_of(file, places), report_places(given))
    return 0


if __name__ == "__main__":
    sys.exit(run_door("extract_lora_from_dylora", work))
