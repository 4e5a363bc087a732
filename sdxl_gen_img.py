#!/usr/bin/env python3
"""Draw pictures with Stable Diffusion XL and adapters: gen_img_diffusers.py, for base models of this family only.

python sdxl_gen_img.py --ckpt sdxl.safetensors --network_weights mine.safetensors --prompt "a photo of a cat" --bf16
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from gen_img_diffusers import generate
from library.cli.doors import run_door
from library.families.sdxl import SDXL


def main(argv: Sequence[str] | None = None) -> int:
    return run_door("sdxl_gen_img", partial(generate, "sdxl_gen_img", SDXL.name), argv)


if __name__ == "__main__":
    sys.exit(main())
