#!/usr/bin/env python3
"""Processor time of tools/resize_images_to_resolution.py against a plain Pillow loop over the same images.

    python benchmarks/resize_images.py --rounds 3

Both copy each image and make three pictures of it by area averaging, as JPEG of quality 100 (4:4:4) or PNG. They run in
turn, as whole commands, on one core, so that a machine whose speed drifts slows both; the ratio counts.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AREAS = ((512, 512), (384, 384), (256, 256))
KINDS = {"JPEG of 4000x3000": ("jpg", (4000, 3000), 16), "PNG of 1600x1200": ("png", (1600, 1200), 48)}


def make_images(folder: Path, extension: str, size: tuple[int, int], count: int) -> None:
    """Smooth colours with some grain, which compress about as pictures do."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 255, (size[1] // 40, size[0] // 40, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        grain = random.integers(-3, 4, (size[1], size[0], 1), dtype=np.int16)
        picture = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        picture.save(folder / f"{number}.{extension}", quality=92)


def plain_loop(source: Path, target: Path, result: str) -> None:
    """The shortest loop that does the same."""
    from PIL import Image, ImageOps

    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copy2(path, target)
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        for width, height in AREAS:
            scale = math.sqrt(width * height / (image.width * image.height))
            size = round(image.width * scale), round(image.height * scale)
            scaled = image.resize(size, Image.Resampling.BOX)
            scaled.save(target / f"{path.stem}+{width}x{height}.{result}", quality=100, subsampling=0)


def seconds_of(command: list[str]) -> float:
    """Processor time of a command and its processes; time in which the machine does other work does not count."""
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=on_one_core)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout}{done.stderr}")
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def on_one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def compare(rounds: int, work: Path) -> None:
    """Run both in turn and print the table."""
    tool = ROOT / "tools" / "resize_images_to_resolution.py"
    areas = ",".join(f"{width}x{height}" for width, height in AREAS)
    print("| images | pictures | round | ours s | plain s | ratio | ours again s |\n|---|---|---|---|---|---|---|")
    for kind, (extension, size, count) in KINDS.items():
        source = work / extension
        make_images(source, extension, size, count)
        for result, flags in {"jpg": [], "png": ["--save_as_png"]}.items():
            ratios = []
            for number in range(rounds):
                ours, plain = work / "ours", work / "plain"
                command = [sys.executable, str(tool), "--max_resolution", areas, *flags, str(source), str(ours)]
                own = seconds_of(command)
                bare = seconds_of([sys.executable, __file__, "--plain", str(source), str(plain), result])
                again = seconds_of(command)
                ratios.append(own / bare)
                cells = f"{number + 1} | {own:.2f} | {bare:.2f} | {ratios[-1]:.3f} | {again:.2f}"
                print(f"| {count} {kind} | {result} | {cells} |", flush=True)
                shutil.rmtree(ours)
                shutil.rmtree(plain)
            print(f"| {count} {kind} | {result} | median | | | **{statistics.median(ratios):.3f}** | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", nargs=3, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.plain:
        source, target, result = settings.plain
        plain_loop(Path(source), Path(target), result)
        return
    with tempfile.TemporaryDirectory() as work:
        compare(settings.rounds, Path(work))


if __name__ == "__main__":
    main()
