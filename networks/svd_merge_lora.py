#!/usr/bin/env python3
"""Merge adapters of any ranks into one LoRA of a given rank: the best approximation of their sum.

    python networks/svd_merge_lora.py --models a.safetensors b.safetensors --ratios 0.6 0.4 --new_rank 32 \\
        --save_to both.safetensors
    python networks/svd_merge_lora.py --models a.safetensors b.safetensors --method ties --density 0.3 \\
        --save_to both.safetensors

The table at the end tells how far the result is from what was asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.adapter_merge_options import parse_svd_merge_lora
from library.cli.doors import run_door
from library.cli.weight_tools import tell


def work(argv: Sequence[str]) -> int:
    options, places = parse_svd_merge_lora(argv, description=__doc__ or "")
    from library.training.progress import CountBar
    from networks.tools.adapter_merging import merge_adapters

    tell(merge_adapters(options, progress=CountBar("layers")), places)
    return 0


if __name__ == "__main__":
    sys.exit(run_door("svd_merge_lora", work))
