"""The loss of each of 20 steps on the demo's base model, for every algorithm: computed, and written down.

    python -m tests.support.loss_traces

writes tests/data/loss_traces.json anew; `git diff` then shows what a change has done to training.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo"
FILE = ROOT / "tests" / "data" / "loss_traces.json"
STEPS = 20


@dataclass(frozen=True)
class Form:
    """One form of an algorithm, with a rate at which 20 steps tell."""

    module: str
    rate: float
    network_args: tuple[str, ...] = ()
    network_dim: int = 4


FORMS = {
    "lora": Form("networks.lora", 5e-3, ("conv_dim=4", "conv_alpha=2")),
    "lora with DoRA": Form("networks.lora", 5e-3, ("dora_wd=True",)),
    "dylora": Form("networks.dylora", 5e-3, ("unit=2",)),
    "loha": Form("networks.loha", 5e-3, ("preset=attn-only",)),
    "lokr": Form("networks.lokr", 1e-2, ("preset=attn-only",)),
    "glora": Form("networks.glora", 5e-3, ("preset=attn-only",)),
    "ia3": Form("networks.ia3", 5e-2),
    "oft": Form("networks.oft", 1e-2, ("preset=attn-only",)),
    "boft": Form("networks.boft", 2e-3, ("preset=attn-only",), network_dim=18),
    "full": Form("networks.full", 1e-3),
    "norm": Form("networks.lora", 1e-2, ("train_norm=True", "exclude_patterns=^(?!.*norm)")),
}


def trace(form: Form, folder: Path) -> list[float]:
    """The losses of a training's first steps."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from library.cli.training import parse_training, training_options
    from library.training.assembly import build_loop, with_latents
    from library.training.planning import plan_run
    from library.training.trainer import train_step

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    settings = {
        **{"pretrained_model_name_or_path": DEMO / "base", "dataset_config": _dataset(folder), "output_dir": folder},
        **{"network_module": form.module, "network_dim": form.network_dim, "network_alpha": 2},
        **{"learning_rate": form.rate, "max_train_steps": STEPS, "seed": 1},
        **{"max_data_loader_n_workers": 0, "mixed_precision": "no"},
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()] + ["--cache_latents"]
    if form.network_args:
        arguments += ["--network_args", *form.network_args]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run, latents = with_latents(plan_run(training_options(parse_training(arguments))))
        parts = build_loop(run, latents, None)
        parts.network.on_epoch_start(None, parts.module)
        return [round(train_step(parts, step)[0].item(), 6) for step in range(STEPS)]


def _dataset(folder: Path) -> Path:
    """The pictures of the demo's concept, one a batch."""
    file = folder / "dataset.toml"
    file.write_text(
        '[general]\ncaption_extension = ".txt"\nresolution = 64\nbatch_size = 1\n[[datasets]]\n[[datasets.subsets]]\n'
        f"image_dir = '{DEMO / 'concept'}'\n"
    )
    return file


def all_traces() -> dict[str, list[float]]:
    """Form -> losses."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: trace(form, Path(folder)) for name, form in FORMS.items()}


def main() -> int:
    FILE.parent.mkdir(exist_ok=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(losses)}" for name, losses in all_traces().items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
