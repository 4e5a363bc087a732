#!/usr/bin/env python3
"""Merge adapters into a Stable Diffusion model, or several adapters into one.

    python networks/merge_lora.py --sd_model model.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5 \\
        --save_to merged.safetensors
    python networks/merge_lora.py --models a.safetensors b.safetensors --ratios 0.6 0.4 --save_to both.safetensors

Both are sums: an adapter with ratio r counts r times its change. What is written is opened again and compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.adapter_merge_options import parse_merge_lora
from library.cli.doors import run_door
from library.cli.weight_tools import tell


def work(argv: Sequence[str], family: str | None = None) -> int:
    options, places = parse_merge_lora(argv, description=__doc__ or "", family=family)
    from library.training.progress import CountBar
    from networks.tools.adapter_merging import AdapterMerge, merge_adapters
    from networks.tools.checkpoint_merging import merge_into_checkpoint

    if isinstance(options, AdapterMerge):
        tell(merge_adapters(options, progress=CountBar("layers")), places)
    else:
        tell(merge_into_checkpoint(options, progress=CountBar("tensors")), places)
    return 0


if __name__ == "__main__":
    sys.exit(run_door("merge_lora", work))
