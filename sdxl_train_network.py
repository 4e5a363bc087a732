#!/usr/bin/env python3
"""Train a LoRA-type adapter for Stable Diffusion XL: train_network.py, which refuses other models here.

    accelerate launch --num_cpu_threads_per_process 1 sdxl_train_network.py \
        --pretrained_model_name_or_path model.safetensors --dataset_config dataset.toml \
        --output_dir out --output_name mine --network_module networks.lora

Options are those of kohya-ss/sd-scripts; docs/train.md explains them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from library.cli.doors import run_door
from train_network import train


def main(argv: Sequence[str] | None = None) -> int:
    return run_door("sdxl_train_network", partial(train, family="sdxl"), argv)


if __name__ == "__main__":
    sys.exit(main())
