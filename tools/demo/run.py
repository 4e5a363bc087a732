"""`make demo`: train a small LoRA on the demo model, make pictures with it, and draw what came of it.

    python -m tools.demo.run

Every step but the last is an ordinary command line, printed before it runs, to be copied and changed. What they write lies
in demo_output/.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/demo"
OUTPUT = "demo_output"
ADAPTER = "demo_lora"
STRENGTHS = ("0.5", "1.0")
SEED = "1"  # of the first picture, where the prompt file names none
SIDE = "64"  # pixels of a picture; the demo model knows no other size


class StepFailed(Exception):
    """A step that ended badly: its sentence, and the exit status to pass on."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command line of the demo."""

    title: str
    command: Sequence[str]

    def run(self, number: int, total: int) -> None:
        print(f"\n[{number}/{total}] {self.title}\n$ {self.line()}\n", flush=True)
        started = time.monotonic()
        program = shutil.which(self.command[0])
        if program is None:
            raise StepFailed(f"{self.command[0]} is not installed here; run python tools/bootstrap.py demo", 2)
        status = subprocess.run([program, *self.command[1:]], cwd=ROOT, check=False).returncode
        if status:
            raise StepFailed(
                f"step {number} ({self.title}) failed, see above; its command line is printed there", abs(status)
            )
        print(f"({time.monotonic() - started:.0f} s)", flush=True)

    def line(self) -> str:
        """The command as it can be typed from the repository's root."""
        return subprocess.list2cmdline(self.command) if os.name == "nt" else shlex.join(self.command)


def training_step() -> Step:
    # Without these, accelerate prints five lines on the defaults it took.
    launch = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", str(os.cpu_count() or 1)]
    options = ["--config_file", f"{CONFIG}/train.toml", "--dataset_config", f"{CONFIG}/concept.toml"]
    options += ["--pretrained_model_name_or_path", f"{CONFIG}/base", "--network_module", "networks.lora"]
    options += ["--output_dir", OUTPUT, "--output_name", ADAPTER, "--logging_dir", f"{OUTPUT}/logs"]
    return Step(title="Train the LoRA", command=["accelerate", "launch", "--quiet", *launch, "train_network.py", *options])


def picture_step(strength: str | None) -> Step:
    options = ["--ckpt", f"{CONFIG}/base", "--from_file", f"{CONFIG}/prompts.txt", "--seed", SEED]
    options += ["--W", SIDE, "--H", SIDE, "--outdir", picture_folder(strength), "--sequential_file_name"]
    if strength is None:
        return Step(title="Pictures of the base model", command=["python", "gen_img_diffusers.py", *options])
    options += ["--network_module", "networks.lora", "--network_weights", f"{OUTPUT}/{ADAPTER}.safetensors"]
    options += ["--network_mul", strength]
    title = f"The same with the LoRA at strength {strength}"
    return Step(title=title, command=["python", "gen_img_diffusers.py", *options])


def picture_folder(strength: str | None) -> str:
    return f"{OUTPUT}/pictures/" + ("base" if strength is None else f"lora_{strength}")


def draw_results() -> list[Path]:
    """The contact sheet and the loss curve, from what the steps have written."""
    from tools.demo.contact_sheet import Row, draw_contact_sheet, read_pictures, read_training_pictures
    from tools.demo.loss_curve import draw_loss_curve, read_losses

    output = ROOT / OUTPUT
    rows = [Row("base model", read_pictures(ROOT / picture_folder(None)))]
    rows += [
        Row(f"with the LoRA,\nstrength {strength}", read_pictures(ROOT / picture_folder(strength))) for strength in STRENGTHS
    ]
    sheet, curve = output / "contact_sheet.png", output / "loss_curve.png"
    draw_contact_sheet(read_training_pictures(ROOT / CONFIG / "concept"), rows).save(sheet)
    draw_loss_curve(read_losses(output / "logs")).save(curve)
    return [sheet, curve]


def run_demo() -> None:
    started = time.monotonic()
    if not (ROOT / CONFIG / "base").is_dir():
        raise StepFailed(f"{CONFIG}/base, the demo model, is missing; restore it with git checkout -- {CONFIG}", 2)
    print(f"Every command below can be typed after `{activation()}`.")
    # Older pictures and logs would mix with those of this run.
    for folder in ("pictures", "logs"):
        shutil.rmtree(ROOT / OUTPUT / folder, ignore_errors=True)
    steps = [training_step(), picture_step(None), *map(picture_step, STRENGTHS)]
    for number, step in enumerate(steps, start=1):
        step.run(number, len(steps))
    sheet, curve = draw_results()
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    print(f"the LoRA file:   {ROOT / OUTPUT / ADAPTER}.safetensors\nbefore and with: {sheet}\nthe loss:        {curve}")


def activation() -> str:
    return ".venv\\Scripts\\activate" if os.name == "nt" else "source .venv/bin/activate"


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="demo", description="Train a small LoRA and make pictures with it.").parse_args(argv)
    try:
        run_demo()
    except StepFailed as failure:
        print(f"demo: {failure}", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
