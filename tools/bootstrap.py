#!/usr/bin/env python3
"""Set up the environment in .venv where it is missing or out of date, then do one job in it.

    python tools/bootstrap.py install              the requirements, nothing else
    python tools/bootstrap.py demo                 train a small LoRA and make pictures with it
    python tools/bootstrap.py test                 all tests
    python tools/bootstrap.py test -k merge -x     what follows the job goes to pytest
    python tools/bootstrap.py check                the linters and the type checker

`make install`, `make demo`, `make test` and `make check` do the same. Only the standard library is used here. A second call
installs nothing unless a requirements file, the Python version or the folder's place has changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)  # what diffusers and transformers ask for
MOST_TEST_PROCESSES = 4  # each holds torch and diffusers, about half a gigabyte

TO_RUN = ("requirements.txt",)
TO_DEVELOP = ("requirements.txt", "requirements-dev.txt")


class SetupError(Exception):
    """What stops the job: one sentence for the person at the keyboard, and the exit status."""

    def __init__(self, sentence: str, status: int = 2) -> None:
        super().__init__(sentence)
        self.status = status


class Environment:
    """The virtual environment of this checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scripts = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.scripts / ("python.exe" if os.name == "nt" else "python")
        self.stamp = folder / "bootstrap.json"

    @property
    def identity(self) -> str:
        """What an environment is made for: its scripts hold the folder's path, its packages fit one Python."""
        return "Python {}.{} in {}".format(*sys.version_info[:2], self.folder)

    def variables(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment variables of a job, as after `source .venv/bin/activate`."""
        path = os.pathsep.join([str(self.scripts), os.environ.get("PATH", "")])
        variables = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(self.folder), **(more or {})}
        variables.pop("PYTHONHOME", None)
        return variables

    def prepare(self, names: Sequence[str]) -> None:
        """Create the environment and install the named requirements files, where that has not been done."""
        wanted = {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in names}
        stamp = self._read_stamp()
        fits = stamp.get("identity", self.identity) == self.identity
        before = stamp.get("requirements", {}) if fits and self.python.exists() else {}
        if all(before.get(name) == digest for name, digest in wanted.items()):
            return
        if not (fits and self._works()):
            self._create()
        # Gone before pip begins, so that an interrupted installation is done again.
        self.stamp.unlink(missing_ok=True)
        self._install(names)
        stamp = {"identity": self.identity, "requirements": {**before, **wanted}}
        self.stamp.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")

    def _read_stamp(self) -> dict[str, Any]:
        """What the last finished installation wrote down; empty where there was none."""
        try:
            return dict(json.loads(self.stamp.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _works(self) -> bool:
        """Whether packages can be installed: so an environment made by hand, with a torch of its own, is kept."""
        probe = [str(self.python), "-c", f"import pip, sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"]
        return self.python.exists() and subprocess.run(probe, capture_output=True, check=False).returncode == 0

    def _create(self) -> None:
        if Path(sys.prefix).resolve() == self.folder.resolve():
            raise SetupError(
                f"the environment {self.folder} is damaged; leave it (deactivate), delete it and run this again"
            )
        if self.folder.is_symlink():
            raise SetupError(
                f"{self.folder} is a link to an environment of another place ({self.folder.resolve()}), which would be "
                "cleared; delete the link and run this again"
            )
        if importlib.util.find_spec("ensurepip") is None:
            raise SetupError(
                "this Python cannot create environments, for its module ensurepip is missing; install the package "
                "python3-venv (Debian, Ubuntu: sudo apt install python3-venv) and run this again"
            )
        # --clear: what another Python or an interrupted call left there is of no use.
        status = run([sys.executable, "-m", "venv", "--clear", str(self.folder)])
        if status:
            raise SetupError(f"the environment {self.folder} could not be created (see above)", status)

    def _install(self, names: Sequence[str]) -> None:
        command = [str(self.python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        for name in names:
            command += ["-r", name]
        print("Installing (the first time this takes some minutes and some gigabytes of disc):", flush=True)
        status = run(command, env=self.variables(), show=news_of_pip)
        if status:
            raise SetupError("the installation failed (see above); mend the cause and run this again", status)


def news_of_pip(line: str) -> str:
    """What of a line of pip's is worth showing: the large files it fetches, and that it is busy; empty for the rest."""
    words = line.split()
    if words[:1] == ["Downloading"] and words[-1] in {"MB)", "GB)"}:
        return f"{words[1].rsplit('/', 1)[-1]} {words[-2]} {words[-1]}"
    return "unpacking" if words[:2] == ["Installing", "collected"] else ""


def run(command: Sequence[str], *, env: Mapping[str, str] | None = None, show: Callable[[str], str] | None = None) -> int:
    """Print a command, run it in the repository's root, and return its exit status.

    Args:
        show: what to print for a line of its output (nothing where empty); None passes the output on untouched.
    """
    print(f"$ {subprocess.list2cmdline(command) if os.name == 'nt' else shlex.join(command)}", flush=True)
    stdout = None if show is None else subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=stdout, text=True, errors="replace") as process:
        try:
            for line in process.stdout or ():
                if show is not None and (news := show(line)):
                    print(f"  {news}", flush=True)
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # the terminal has told it, too; it may have files to finish
            raise
    return status if status >= 0 else 128 - status  # killed by a signal: as a shell reports it


def install(environment: Environment, arguments: Sequence[str]) -> int:
    del arguments
    environment.prepare(TO_RUN)
    print(f"The environment {environment.folder} is ready; activate it with: {activation(environment)}")
    return 0


def demo(environment: Environment, arguments: Sequence[str]) -> int:
    environment.prepare(TO_RUN)
    return run([str(environment.python), "-m", "tools.demo.run", *arguments], env=environment.variables())


def test(environment: Environment, arguments: Sequence[str]) -> int:
    environment.prepare(TO_DEVELOP)
    command = [str(environment.python), "-m", "pytest"]
    variables = {"HF_HUB_OFFLINE": "1"}
    processes = min(os.cpu_count() or 1, MOST_TEST_PROCESSES)
    if processes > 1 and not arguments:
        # One thread each: the tests' tensors are small, and processes that each use all cores hinder one another.
        command += ["-n", str(processes), "--dist", "worksteal"]
        variables["OMP_NUM_THREADS"] = "1"
    return run([*command, *arguments], env=environment.variables(variables))


def check(environment: Environment, arguments: Sequence[str]) -> int:
    """All three, also after one has failed, so that one call shows everything."""
    if arguments:
        raise SetupError(f"check takes no arguments, but was given {' '.join(arguments)}")
    environment.prepare(TO_DEVELOP)
    commands = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])
    statuses = [run([str(environment.python), "-m", *command], env=environment.variables()) for command in commands]
    return next((status for status in statuses if status), 0)


Job = Callable[[Environment, Sequence[str]], int]
JOBS: dict[str, Job] = {"install": install, "demo": demo, "test": test, "check": check}


def activation(environment: Environment) -> str:
    """The command after which `accelerate` and `python` are those of the environment."""
    if os.name == "nt":
        return str(environment.scripts.relative_to(ROOT) / "activate")
    return f"source {environment.scripts.relative_to(ROOT) / 'activate'}"


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in {"help", "-h", "--help"}:
        print(__doc__)
        return 0
    job, arguments = argv[0], argv[1:]
    try:
        if sys.version_info < OLDEST_PYTHON:
            found = ".".join(map(str, sys.version_info[:3]))
            wanted = ".".join(map(str, OLDEST_PYTHON))
            raise SetupError(f"Python {wanted} or later is needed, and this is {found}; run it with a newer one")
        if job not in JOBS:
            raise SetupError(f"there is no job {job}; known are {', '.join(JOBS)} and help")
        return JOBS[job](Environment(ROOT / ".venv"), arguments)
    except SetupError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
