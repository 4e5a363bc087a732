"""What a run will do, computed before anything heavy, printed, and then obeyed by the loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.errors import counted
from library.training.lr_schedules import steps_of
from library.training.options import LengthOptions, TrainingOptions
from library.training.saving import epochs_between_saves, final_file


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """Steps and epochs of a run.

    Attributes:
        batches_per_epoch: global micro-batches, each shared by all processes.
        accumulation: micro-batches of one optimizer step; the last step of an epoch may have fewer.
        steps: optimizer steps of the run; the last epoch may be cut short.
    """

    batches_per_epoch: int
    accumulation: int
    steps: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def epochs(self) -> int:
        return math.ceil(self.steps / self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 0, that a step (counted from 0) belongs to."""
        return step // self.steps_per_epoch

    def batches_of(self, step: int) -> range:
        """The micro-batches of a step as places within its epoch."""
        first = step % self.steps_per_epoch * self.accumulation
        return range(first, min(first + self.accumulation, self.batches_per_epoch))

    def epoch_ended_by(self, step: int) -> int | None:
        """The epoch, counted from 1, that is over after `step` steps; None within one."""
        return step // self.steps_per_epoch if step % self.steps_per_epoch == 0 else None


def run_length(options: LengthOptions, batches_per_epoch: int) -> RunLength:
    """Steps of the run; a number of epochs wins over a number of steps."""
    steps_per_epoch = math.ceil(batches_per_epoch / options.accumulation)
    steps = options.epochs * steps_per_epoch if options.epochs else options.steps
    return RunLength(batches_per_epoch=batches_per_epoch, accumulation=options.accumulation, steps=steps)


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """What the plan tells beside the options; the parts about data and network come from their rooms as text."""

    base_model: str
    base_notes: Sequence[str]
    prediction: str
    seed: int
    length: RunLength
    processes: int
    batch_sizes: Sequence[int]
    dataset_lines: Sequence[str]
    network_lines: Sequence[str]
    rates: Mapping[str, float | None]
    own_rate: bool
    optimizer: str
    device: str


def plan_text(options: TrainingOptions, facts: PlanFacts) -> str:
    """The plan as a person reads it."""
    blocks: list[tuple[str, Sequence[str]]] = [
        ("base model", [facts.base_model, f"predicts {facts.prediction}", *facts.base_notes]),
        ("data", facts.dataset_lines),
        ("length", _length_lines(facts)),
        ("network", facts.network_lines),
        ("rates", _rate_lines(options, facts)),
        ("computes", [_compute_line(options, facts)]),
        ("writes", _saving_lines(options, facts)),
        ("note", options.notes),
    ]
    lines = ["Plan"]
    for title, texts in blocks:
        lines += [f"  {title if number == 0 else '':<12}{text}" for number, text in enumerate(texts)]
    return "\n".join(lines)


def _length_lines(facts: PlanFacts) -> list[str]:
    length, sizes = facts.length, sorted(set(facts.batch_sizes))
    batch = "/".join(map(str, sizes))
    shares = f"{facts.processes} x " if facts.processes > 1 else ""
    accumulated = f" x {length.accumulation} micro-batches" if length.accumulation > 1 else ""
    whole, rest = divmod(length.steps, length.steps_per_epoch)
    epochs = " and ".join(filter(None, [counted(whole, "epoch") if whole else "", counted(rest, "step") if rest else ""]))
    last = length.batches_per_epoch % length.accumulation
    return [
        f"{counted(length.steps, 'step')} of {shares}{batch} images{accumulated}: {epochs}; "
        f"{counted(length.steps_per_epoch, 'step')} in an epoch",
        *([f"the last step of an epoch has {last} of them"] if last and length.accumulation > 1 else []),
        f"seed {facts.seed}",
    ]


def _rate_lines(options: TrainingOptions, facts: PlanFacts) -> list[str]:
    shown = {part: f"{rate:g}" if rate else "frozen" for part, rate in facts.rates.items()}
    if facts.own_rate:
        shown = {part: "chosen by the optimizer" if rate else "frozen" for part, rate in facts.rates.items()}
        return [", ".join(f"{part} {text}" for part, text in shown.items()), facts.optimizer]
    parts = [f"{part} {text}" for part, text in shown.items()]
    schedule = options.schedule.custom_type or options.schedule.name
    if options.schedule.warmup:
        warmup = steps_of(options.schedule.warmup, facts.length.steps)
        whole = ", which is the whole run" if warmup >= facts.length.steps else ""
        schedule += f", warm-up {counted(warmup, 'step')}{whole}"
    return [", ".join(parts), f"{facts.optimizer}, {schedule}"]


def _compute_line(options: TrainingOptions, facts: PlanFacts) -> str:
    precision = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}[options.compute.mixed_precision]
    extras = ["gradient checkpointing"] if options.compute.gradient_checkpointing else []
    extras += ["captions encoded before training"] if options.captions.caches else []
    processes = f"{facts.processes} processes on " if facts.processes > 1 else "on "
    base = f"base model in {precision}{_packed_text(options)}"
    return ", ".join([f"{processes}{facts.device}", base, "adapter in fp32", *extras])


def _packed_text(options: TrainingOptions) -> str:
    if options.compute.unet_format is None:
        return ""
    whole = options.compute.text_encoder_format is not None and not options.captions.caches
    parts = "its" if whole else "the U-Net's"
    return f" with {parts} weights kept in {options.compute.unet_format}"


def _saving_lines(options: TrainingOptions, facts: PlanFacts) -> list[str]:
    saving = options.saving
    final = saving.output_dir / final_file(saving)
    lines = [f"{final}{', in place of the file that is there' if final.exists() else ''}"]
    every_epochs = epochs_between_saves(saving, facts.length.epochs)
    if every_epochs:
        lines.append(f"and one every {counted(every_epochs, 'epoch')}")
    if saving.every_n_steps:
        lines.append(f"and one every {counted(saving.every_n_steps, 'step')}")
    if options.previews.prompts:
        lines.append(f"previews in {saving.output_dir / 'sample'}")
    if options.logging.folder:
        lines.append(f"curves in {options.logging.folder}")
    return lines
