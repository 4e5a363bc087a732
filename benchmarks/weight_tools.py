#!/usr/bin/env python3
"""Time and peak memory of the weight tools, as whole commands on files of full size, beside what bounds them.

    python benchmarks/make_files.py FOLDER
    python benchmarks/weight_tools.py FOLDER --rounds 3
    python benchmarks/weight_tools.py FOLDER --only model lora

Every row of `COMMANDS` is a command line. The rows take turns, round by round, so that a machine whose speed drifts slows
all of them. Times are medians; the processor's do not count what others do on the machine. Memory is the most that the
process held (ru_maxrss of wait4).
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

MODEL, TUNED, LORA, OTHER, WIDE = (f"{{files}}/{name}.safetensors" for name in ("model", "tuned", "lora", "other", "wide"))
COPY = f"import os, shutil; shutil.copyfile('{MODEL}', '{{out}}'); os.fsync(os.open('{{out}}', os.O_RDONLY))"
TWO = f"--models {LORA} {OTHER} --ratios 0.6 0.4 --save_to {{out}}"
COMMANDS = {
    "importing torch": "-c 'import torch'",
    "copying a model, and fsync": f'-c "{COPY}"',
    "a LoRA into a model": f"networks/merge_lora.py --sd_model {MODEL} --models {LORA} --ratios 0.8 --save_to {{out}}",
    "the sum of two models": f"tools/merge_models.py --models {MODEL} {TUNED} --ratios 0.7 0.3 --saving_precision fp16 "
    "--output {out}",
    "two LoRA files into one, exactly": f"networks/merge_lora.py {TWO}",
    "two LoRA files into one of rank 16": f"networks/svd_merge_lora.py {TWO} --new_rank 16",
    "two LoRA files, by ties": f"networks/svd_merge_lora.py {TWO} --new_rank 16 --method ties --density 0.3",
    "two LoRA files, by dare": f"networks/svd_merge_lora.py {TWO} --new_rank 16 --method dare --density 0.3",
    "two LoRA files, by magnitude": f"networks/svd_merge_lora.py {TWO} --new_rank 16 --method magnitude --density 0.3",
    "LoRA of rank 16 from two models": f"networks/extract_lora_from_models.py --model_org {MODEL} --model_tuned {TUNED} "
    "--dim 16 --save_precision fp16 --save_to {out}",
    "a LoRA of rank 16 at rank 4": f"networks/resize_lora.py --model {WIDE} --new_rank 4 --save_precision fp16 "
    "--save_to {out}",
}
"""Row -> what Python is given; {files} and {out} are places."""


@dataclass(frozen=True)
class Measured:
    """One run: seconds by the clock, of the processor in programs and in the system, and MiB."""

    wall: float
    user: float
    system: float
    memory: float


def run(line: str, files: Path) -> Measured:
    """Run a command once, with no output of its own.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory(dir=files) as folder:
        words = shlex.split(line.format(files=files, out=f"{folder}/out.safetensors"))
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"failed: {line}")
    return Measured(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss / 1024)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, help="the folder that make_files.py filled")
    parser.add_argument("--only", nargs="*", default=[""], help="rows with any of these words")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(argv)
    rows = {title: line for title, line in COMMANDS.items() if any(word in title for word in given.only)}
    runs: dict[str, list[Measured]] = {title: [] for title in rows}
    for _ in range(given.rounds):
        for title, line in rows.items():
            runs[title].append(run(line, given.files.resolve()))
    print(f"load {os.getloadavg()[0]:.1f}\n\n| what | wall s | user s | system s | peak MiB |\n|---|---|---|---|---|")
    for title, measured in runs.items():
        times = [statistics.median(getattr(each, name) for each in measured) for name in ("wall", "user", "system")]
        print(f"| {title} | {' | '.join(f'{seconds:.1f}' for seconds in times)} | {max(m.memory for m in measured):.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
