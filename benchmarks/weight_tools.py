#!/usr/bin/env python3
"""Time and peak memory of the weight tools, as whole commands on files of full size.

    python benchmarks/weight_tools.py --model sd15.safetensors --lora a.safetensors --other b.safetensors \\
        --tuned tuned.safetensors
    python benchmarks/weight_tools.py ... --only merge_lora svd_merge_lora --rounds 3

Every row of `COMMANDS` is a command line; {model}, {tuned}, {lora} and {other} are the files given, {out} is a folder that
is emptied afterwards. Times are medians; those of the processor do not count what others do on the machine. Memory is the
most that the process held (ru_maxrss of wait4).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Command:
    """One row.

    Attributes:
        title: for the table.
        script: below the root.
        arguments: with places in braces.
    """

    title: str
    script: str
    arguments: str


COMMANDS = (
    Command(
        "a LoRA into a model",
        "networks/merge_lora.py",
        "--sd_model {model} --models {lora} --ratios 0.8 --save_to {out}/m.safetensors",
    ),
    Command(
        "two LoRA files into one, exactly",
        "networks/merge_lora.py",
        "--models {lora} {other} --ratios 0.6 0.4 --save_to {out}/l.safetensors",
    ),
    Command(
        "two LoRA files into one of rank 16",
        "networks/svd_merge_lora.py",
        "--models {lora} {other} --ratios 0.6 0.4 --new_rank 16 --save_to {out}/s.safetensors",
    ),
    Command(
        "LoRA of rank 16 from two models",
        "networks/extract_lora_from_models.py",
        "--model_org {model} --model_tuned {tuned} --dim 16 --save_precision fp16 --save_to {out}/e.safetensors",
    ),
    Command(
        "a LoRA at rank 4",
        "networks/resize_lora.py",
        "--model {lora} --new_rank 4 --save_precision fp16 --save_to {out}/r.safetensors",
    ),
)


@dataclass(frozen=True)
class Measured:
    """One run: seconds, seconds of the processor, and MiB."""

    wall: float
    processor: float
    memory: float


def run(command: Command, files: Mapping[str, str]) -> Measured:
    """Run a command once, with no output of its own.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [word.format(**files, out=folder) for word in command.arguments.split()]
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, str(ROOT / command.script), *words], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command.script} failed")
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--lora", required=True, help="an adapter for it")
    parser.add_argument("--other", required=True, help="another one")
    parser.add_argument("--tuned", required=True, help="a checkpoint that was tuned from the first")
    parser.add_argument("--only", nargs="*", help="names of scripts")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(argv)
    files = {name: str(Path(getattr(given, name)).resolve()) for name in ("model", "lora", "other", "tuned")}
    print("| what | wall s | processor s | peak MiB |\n|---|---|---|---|")
    for command in COMMANDS:
        if given.only and Path(command.script).stem not in given.only:
            continue
        runs = [run(command, files) for _ in range(given.rounds)]
        wall, processor = (statistics.median(getattr(each, name) for each in runs) for name in ("wall", "processor"))
        print(f"| {command.title} | {wall:.1f} | {processor:.1f} | {max(each.memory for each in runs):.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
