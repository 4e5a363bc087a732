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
from library.errors import counted


def work(argv: Sequence[str]) -> int:
    options, show_skipped = parse_merge_options(argv, description=__doc__ or "")
    from library.checkpoints.atomic import check_writable
    from library.checkpoints.model_merging import left_out, merge_models, open_models, report_lines
    from library.training.progress import CountBar

    check_writable(options.target)
    models = open_models(options)
    for model in models:
        for note in model.notes():
            print(note)
    change = merge_models(models, options, progress=CountBar("tensors"))
    for path, keys in left_out(models).items():
        named = ": " + ", ".join(keys) if show_skipped else " (--show_skipped names them)"
        print(f"{path}: {counted(len(keys), 'tensor')} outside the parts left out{named}")
    print("\n".join(report_lines(models, options, change)))
    terms = " + ".join(f"{ratio:g} * {model.name}" for model, ratio in zip(models, options.ratios, strict=True))
    print(f"{options.target}: {models[0].family.title}, {terms}; opened again and compared")
    return 0


if __name__ == "__main__":
    sys.exit(run_door("merge_models", work))
