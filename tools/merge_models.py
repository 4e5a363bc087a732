#!/usr/bin/env python3
"""Merge Stable Diffusion models of one family into one: the sum of their tensors, each model with a factor.

    python tools/merge_models.py --models a.safetensors b.ckpt --ratios 0.7 0.3 --output merged --saving_precision fp16
    python tools/merge_models.py --models a.safetensors b_folder c.safetensors --ratios 1 1 -1 --output with_difference

Tensors are read, summed in 32 bits, rounded once and written one by one. The result is opened again and compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.doors import run_door
from library.cli.merge_models_options import parse_merge_options
from library.cli.weight_tools import tell


def work(argv: Sequence[str]) -> int:
    command = parse_merge_options(argv, description=__doc__ or "")
    from library.checkpoints.atomic import check_writable
    from library.checkpoints.model_merging import merge_models, open_models
    from library.training.progress import CountBar
    from networks.tools.model_merging_report import report_of

    options = command.merge
    check_writable(options.target)
    models = open_models(options)
    done = merge_models(models, options, progress=CountBar("tensors"))
    tell(report_of(models, options, done, name_left_out=command.show_skipped), command.places)
    return 0


if __name__ == "__main__":
    sys.exit(run_door("merge_models", work))
