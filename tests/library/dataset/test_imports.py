"""What a door imports for --help costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

HEAVY = ("torch", "numpy", "cv2", "PIL")


@pytest.mark.parametrize("module", ["options", "buckets", "captions", "schema", "sources", "dataset", "metadata_files"])
def test_importing_loads_no_heavy_package(module):
    code = f"import sys, library.dataset.{module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
