#!/usr/bin/env python3
"""Put a folder of images, and smaller pictures of each, into another folder: training data at several sizes.

    python tools/resize_images_to_resolution.py --max_resolution 512x512,384x384 --copy_associated_files images resized

Each picture has the area of its size and the shape of its image: photo.png becomes photo+512x512.jpg. No image is enlarged.
A second run makes only what is missing or out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.doors import run_door
from library.cli.resize_images_options import parse_resize_options

NAME = "resize_images_to_resolution"


def work(argv: Sequence[str]) -> int:
    """1 where an image could not be done."""
    options = parse_resize_options(argv, description=__doc__ or "")
    from library.resizing.folder import plan_folder
    from library.resizing.run import outcome_lines, resize_folder
    from library.training.progress import CountBar

    plan = plan_folder(options)
    outcome = resize_folder(plan, options.target, progress=CountBar("images and files"))
    print("\n".join(outcome_lines(plan, options, outcome)))
    for problem in outcome.problems:
        print(f"{NAME}: {problem}", file=sys.stderr)
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(run_door(NAME, work))
