#!/usr/bin/env python3
"""Make a LoRA of the difference of two Stable Diffusion models.

    python networks/extract_lora_from_models.py --model_org base.safetensors --model_tuned tuned.safetensors \\
        --save_to lora.safetensors --dim 16
    python networks/extract_lora_from_models.py --model_org base.ckpt --model_tuned tuned_folder \\
        --save_to lora.safetensors --rank_error 0.3 --conv_dim 64 --save_precision fp16

Layers are read one at a time from both. How near the result is to the difference is measured, and the file opened again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.doors import run_door
from library.cli.extract_lora_options import parse_extraction
from library.cli.weight_tools import tell


def work(argv: Sequence[str]) -> int:
    extraction, places = parse_extraction(argv, description=__doc__ or "")
    from library.training.progress import CountBar
    from networks.tools.extraction import extract
    from networks.tools.extraction_report import report_of

    tell(report_of(extract(extraction, progress=CountBar("tensors"))), places)
    return 0


if __name__ == "__main__":
    sys.exit(run_door("extract_lora_from_models", work))
