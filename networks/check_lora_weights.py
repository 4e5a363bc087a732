#!/usr/bin/env python3
"""Show what is in an adapter file: its tensors, its layers with rank, alpha and size, and which programs read them.

    python networks/check_lora_weights.py lora.safetensors
    python networks/check_lora_weights.py lora.safetensors --every_layer

First a line for each tensor: key, shape, mean and smallest absolute value. Exit status 1 where values are not finite, or
tensors make no layer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.doors import run_door
from library.cli.options import FLAG, Option, OptionGroup, build_parser
from library.errors import counted, some_names

OPTIONS = (
    OptionGroup(
        "output",
        (
            Option(
                name="every_layer",
                type=FLAG,
                help="also a line for each layer, and the names of all layers that a program does not read",
                extension=True,
            ),
        ),
    ),
)
EXIT_FAULTY = 1


def work(argv: Sequence[str]) -> int:
    parser = build_parser(OPTIONS, description=__doc__ or "")
    parser.add_argument("file", type=Path, help="LoRA or other adapter: .safetensors, or .pt and .ckpt with tensors only")
    parser.add_argument("-s", "--show_all_keys", action="store_true", help="also a line for the tensors beside the weights")
    given = vars(parser.parse_args(list(argv)))

    from library.checkpoints.tensor_files import open_tensor_file
    from library.families.detect import DEFAULT_FAMILY
    from networks.formats.file_adapters import default_lines, family_of_adapter_file
    from networks.tools.checking import check_file, tensor_lines

    file = open_tensor_file(given["file"])
    family = family_of_adapter_file(file, DEFAULT_FAMILY)
    for line in tensor_lines(file, all_keys=given.get("show_all_keys", False)):
        print(line)
    report = check_file(file, family, every_layer=given.get("every_layer", False))
    print("", *default_lines(file, family), *report.lines, sep="\n")
    if report.unreadable:
        print(f"{counted(len(report.unreadable), 'layer')} that cannot be read ({some_names(report.unreadable, 3)})")
    if report.bad:
        print(f"{counted(len(report.bad), 'tensor')} with values that are not finite ({some_names(report.bad, 3)})")
    return EXIT_FAULTY if report.unreadable or report.bad else 0


if __name__ == "__main__":
    sys.exit(run_door("check_lora_weights", work))
