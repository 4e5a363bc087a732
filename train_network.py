#!/usr/bin/env python3
"""Train a LoRA-type adapter for Stable Diffusion 1.x, 2.x or XL.

    accelerate launch --num_cpu_threads_per_process 1 train_network.py --pretrained_model_name_or_path model.safetensors \
        --dataset_config dataset.toml --output_dir out --output_name mine --network_module networks.lora

Options are those of kohya-ss/sd-scripts; docs/train.md explains them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from library.cli.doors import run_door
from library.cli.training import parse_training, training_options, write_config


def train(argv: Sequence[str], *, family: str | None = None) -> int:
    """Train as a command line says; `family` is the name of the only one whose models are taken."""
    parsed = parse_training(argv)
    if parsed["output_config"]:
        return write_config(parsed)
    options = training_options(parsed, family=family)
    from library.training.run import run_training

    return run_training(options)


def main(argv: Sequence[str] | None = None) -> int:
    return run_door("train_network", train, argv)


if __name__ == "__main__":
    sys.exit(main())
