#!/usr/bin/env python3
"""Draw pictures with Stable Diffusion 1.x, 2.x and XL and adapters.

    python gen_img_diffusers.py --ckpt model.safetensors --network_weights mine.safetensors --network_mul 0.8 \
        --prompt "a photo of a cat --n blurry --d 1" --outdir outputs --bf16

Options are those of kohya-ss/sd-scripts; docs/generate.md explains them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from library.cli.doors import run_door
from library.cli.generation import parse_generation


def generate(program: str, family: str | None, argv: Sequence[str]) -> int:
    options = parse_generation(argv, program, family)
    if isinstance(options, Path):
        from library.generation.run import list_adapters

        return list_adapters(options)
    from library.generation.run import run_generation

    return run_generation(options)


def main(argv: Sequence[str] | None = None) -> int:
    return run_door("gen_img_diffusers", partial(generate, "gen_img_diffusers", None), argv)


if __name__ == "__main__":
    sys.exit(main())
