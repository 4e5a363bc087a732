#!/usr/bin/env python3
"""merge_lora.py under the name that sd-scripts has for SDXL: the family is told by the files."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.doors import run_door
from networks.merge_lora import work

if __name__ == "__main__":
    sys.exit(run_door("sdxl_merge_lora", work))
