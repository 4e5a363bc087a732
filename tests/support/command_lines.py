"""Running our scripts as a user does, and looking at what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Finished:
    """A script that has ended."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.strip().splitlines()[-1]

    def require_success(self) -> Finished:
        assert self.status == 0, f"exit status {self.status}\n{self.out}\n{self.err}"
        return self


def run_script(script: str, *arguments: object, cwd: Path = ROOT) -> Finished:
    """Run a script in a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


def train_here(capsys, *arguments: object, door: str = "train_network") -> Finished:
    """Run train_network.py, or another door, inside this process, which saves the seconds that importing torch takes."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    capsys.readouterr()
    status = import_module(door).main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Finished(status, captured.out, captured.err)


def assert_refused(finished: Finished, *parts: str) -> None:
    """Exit status 2, sentences on stderr that contain every part, no traceback."""
    assert finished.status == 2, f"exit status {finished.status}\n{finished.out}\n{finished.err}"
    assert "Traceback" not in finished.err
    for part in parts:
        assert part in finished.err, finished.err


def assert_is_another_picture(path: Path, other: Path) -> None:
    """Both are PNG files of a size for reading, with something drawn in several colours, and not the same."""
    pictures = []
    for each in (path, other):
        with Image.open(each) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) >= 400
            assert len(picture.getcolors(1 << 20)) > 4
            pictures.append(picture.tobytes())
    assert pictures[0] != pictures[1]


def draw_images(folder: Path, count: int, sizes: Iterable[tuple[int, int]] = ((64, 64),)) -> Path:
    """Pictures of coloured noise with captions, in sizes taken in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = list(sizes)
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        pixels = np.random.default_rng(number).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"sks thing, number {number}, colour {number * 7 % 5}")
    return folder


def dataset_file(path: Path, image_dir: Path, *, general: str = "", dataset: str = "", subset: str = "") -> Path:
    """A dataset TOML over one folder; `general`, `dataset` and `subset` are lines of their tables."""
    path.write_text(
        f'[general]\ncaption_extension = ".txt"\n{general}\n[[datasets]]\n'
        f"{dataset or 'resolution = 64'}\n[[datasets.subsets]]\nimage_dir = '{image_dir}'\n{subset}\n"
    )
    return path
