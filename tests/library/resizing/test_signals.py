"""A resizing that is killed: no process of it lives on, and nothing unfinished stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.support.command_lines import ENVIRONMENT, ROOT, draw_images

SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
from library.cli.resize_images_options import parse_resize_options
from library.resizing.folder import plan_folder
from library.resizing.run import resize_folder

if __name__ == "__main__":
    options = parse_resize_options(sys.argv[1:], description="")
    resize_folder(
        plan_folder(options), options.target, progress=lambda *_: os.kill(os.getpid(), signal.SIGTERM), processes=2
    )
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_no_process_lives_on(tmp_path):
    draw_images(tmp_path / "images", 6)
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    command = [sys.executable, tmp_path / "script.py", tmp_path / "images", tmp_path / "small"]
    # The pipe ends when the last process that holds it has ended.
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, check=False, timeout=60)
    assert done.returncode == -signal.SIGTERM
    assert not [path.name for path in (tmp_path / "small").iterdir() if path.name.endswith(".tmp")]
