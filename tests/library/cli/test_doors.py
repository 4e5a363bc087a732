"""What every script does around its work: here, what becomes of it when nobody reads what it prints."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.command_lines import ENVIRONMENT, ROOT

PRINTING = """
import sys
sys.path.insert(0, {root!r})
from library.cli.doors import run_door
from library.errors import UserError
from pathlib import Path

def work(argv):
    sys.stdin.readline()
    for line in range(50_000):
        print("line", line, flush=line % 1000 == 0)
    Path(argv[0]).write_text("done")
    if len(argv) > 1:
        raise UserError("is wrong")
    return 0

sys.exit(run_door("door", work))
"""


def run_unread(*words: object) -> tuple[int, str]:
    """Exit status and stderr of a script that prints into a pipe whose reader has gone."""
    script = PRINTING.format(root=str(ROOT))
    command = [sys.executable, "-c", script, *map(str, words)]
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert started.stdout is not None
    started.stdout.close()
    started.stdout = None
    _, errors = started.communicate("go\n")
    return started.returncode, errors


@pytest.mark.parametrize(("more", "status", "said"), [((), 0, ""), (("wrong",), 2, "door: is wrong\n")])
def test_a_reader_that_has_gone_changes_neither_the_work_nor_its_status(more, status, said, tmp_path):
    assert run_unread(tmp_path / "file", *more) == (status, said)
    assert (tmp_path / "file").read_text() == "done"


def test_help_to_a_reader_that_has_gone_is_no_error():
    done = subprocess.run(
        f"{sys.executable} networks/merge_lora.py --help | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_output_that_is_closed_from_the_start_is_no_error():
    done = subprocess.run(
        f"{sys.executable} networks/merge_lora.py --help >&-",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
