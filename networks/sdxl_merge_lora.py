#!/usr/bin/env python3
"""merge_lora.py for models and adapters of SDXL only, under the name that sd-scripts has for it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.doors import run_door
from library.families.sdxl import SDXL
from networks.merge_lora import work

if __name__ == "__main__":
    sys.exit(run_door("sdxl_merge_lora", partial(work, family=SDXL.name)))
