"""Tests run offline, from the repository's root, with one thread per process so that they may run side by side."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ["tests.support.fixtures"]
