"""The loop: one optimizer step after another, as planned, with saves, previews and logs at their cadence."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError
from library.streams import stream_seed
from library.training.guards import StopRequest, clip_and_clean
from library.training.plan import RunLength
from library.training.progress import Progress
from library.training.saving import RunFiles, SavingFailed
from library.training.tracking import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from library.dataset.batches import Batch

BAD_STEPS_IN_A_ROW = 10
READ_BACK_EVERY = 10  # steps whose losses are read back together, so that no step waits for the device
CHECK_LEARNING_AT = 50


@dataclass(kw_only=True)
class LoopParts:
    """Everything the loop moves; built by `assembly.build_loop`.

    Attributes:
        module: the prepared trainable module; `network` the adapter network inside it.
        batches: micro-batches in the order of the plan.
        divisor_of: samples of an optimizer step (counted from 0) over the number of processes.
        latents_of: a batch on the device -> mean and spread of its latents.
        previews: draws pictures after (step, epoch ended); None without previews.
        scale_weight_norms: largest norm of an adapter; None leaves them.
    """

    accelerator: Accelerator
    module: nn.Module
    network: Any
    optimizer: Any
    scheduler: Any
    group_names: list[str]
    length: RunLength
    batches: Iterator[Batch]
    divisor_of: Callable[[int], float]
    latents_of: Callable[[Batch], tuple[Tensor, Tensor]]
    files: RunFiles
    progress: Progress
    tracker: Tracker
    seed: int
    max_grad_norm: float
    schedule_free: bool = False
    scale_weight_norms: float | None = None
    previews: Callable[[int, int | None], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: steps done, and the signal that ended it early."""

    steps: int
    stopped_by: str | None = None
    exit_status: int = 0


def run_loop(parts: LoopParts) -> Outcome:
    """Train. Files due at a step are written before its previews are drawn.

    Raises:
        UserError: too many bad steps in a row; files written before are good.
    """
    readings = Readings(parts)
    start = _trainable_sum(parts.module)
    if parts.previews:
        _with_weights_of_evaluation(parts, lambda: parts.previews(0, None))  # type: ignore[misc]
    with StopRequest() as stop:
        for step in range(parts.length.steps):
            if step % parts.length.steps_per_epoch == 0:
                parts.network.on_epoch_start(None, parts.module)
            loss, bad = train_step(parts, step)
            readings.add(step + 1, loss, bad)
            if step + 1 == min(CHECK_LEARNING_AT, parts.length.steps):
                _warn_if_unchanged(parts, start)
            _after_step(parts, step + 1, readings)
            if step + 1 < parts.length.steps and _all_stop(parts.accelerator, step + 1, stop.requested):
                readings.read_back()
                return Outcome(steps=step + 1, stopped_by=stop.name, exit_status=stop.exit_status)
    readings.read_back()
    return Outcome(steps=parts.length.steps)


def train_step(parts: LoopParts, step: int) -> tuple[Tensor, Tensor]:
    """One optimizer step over its micro-batches; nothing is read back from the device.

    Returns:
        This process's share of the loss and whether the gradient was not finite, both () on the device.
    """
    accelerator = parts.accelerator
    torch.manual_seed(stream_seed(parts.seed, "drop-out", step, accelerator.process_index))
    divisor = parts.divisor_of(step)
    places = parts.length.batches_of(step)
    total = torch.zeros((), device=accelerator.device)
    if hasattr(parts.network, "begin_step"):
        parts.network.begin_step(parts.seed, step)
    if hasattr(parts.network, "on_step_start"):
        parts.network.on_step_start()
    for place in places:
        asked = time.perf_counter()
        batch = next(parts.batches).to(accelerator.device)
        parts.progress.waited_for_data(time.perf_counter() - asked)
        for sentence in batch.skipped:
            parts.progress.say(f"step {step + 1}: {sentence}; it does not count")
        mean, std = parts.latents_of(batch)
        last = place == places[-1]
        with contextlib.nullcontext() if last else accelerator.no_sync(parts.module):
            loss = parts.module(batch, mean, std, divisor)
            accelerator.backward(loss)
        total += loss.detach()
    accelerator.unscale_gradients(parts.optimizer)
    _, bad = clip_and_clean([p for p in parts.module.parameters() if p.requires_grad], parts.max_grad_norm)
    parts.optimizer.step()
    if parts.scheduler is not None and not accelerator.optimizer_step_was_skipped:
        parts.scheduler.step()
    parts.optimizer.zero_grad(set_to_none=True)
    if parts.scale_weight_norms:
        parts.network.apply_max_norm_regularization(parts.scale_weight_norms, accelerator.device)
    return total / accelerator.num_processes, bad


def _after_step(parts: LoopParts, step: int, readings: Readings) -> None:
    """Save, then draw previews, where this step is the turn of either."""
    length, epoch_ended = parts.length, parts.length.epoch_ended_by(step)
    epochs = epoch_ended or length.epoch_of(step - 1)
    saves = parts.files.due(step, epoch_ended, length.steps)
    if saves:
        readings.read_back()
        _with_weights_of_evaluation(parts, lambda: _save(parts, step, epoch_ended, epochs))
    if parts.previews:
        previews = parts.previews
        _with_weights_of_evaluation(parts, lambda: previews(step, epoch_ended))


def _save(parts: LoopParts, step: int, epoch_ended: int | None, epochs: int) -> None:
    if parts.accelerator.is_main_process:
        try:
            paths = [parts.files.save_step(step, epochs, parts.length.steps)]
            if epoch_ended is not None:
                paths.append(parts.files.save_epoch(epoch_ended, step))
        except SavingFailed as error:
            parts.progress.say(f"step {step}: {error}; training goes on")
            paths = []
        for path in filter(None, paths):
            parts.progress.say(f"saved {path}")
            if news := parts.files.news_of_readers(path):
                parts.progress.say(news)
    parts.accelerator.wait_for_everyone()


def _with_weights_of_evaluation(parts: LoopParts, work: Callable[[], None]) -> None:
    """Do something with the weights a schedule-free optimizer means for use; others have only one kind."""
    if parts.schedule_free:
        parts.optimizer.eval()
    work()
    if parts.schedule_free:
        parts.optimizer.train()


@dataclass
class Readings:
    """Losses and bad steps, read back from the device several at a time."""

    parts: LoopParts
    steps: list[int] = field(default_factory=list)
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    bad_in_a_row: int = 0
    recent: list[float] = field(default_factory=list)
    last_read: float = field(default_factory=time.perf_counter)

    def add(self, step: int, loss: Tensor, bad: Tensor) -> None:
        self.steps.append(step)
        self.values.append((loss, bad))
        alone = self.parts.accelerator.num_processes == 1 and time.perf_counter() - self.last_read > 0.5
        if alone or step % READ_BACK_EVERY == 0:
            self.read_back()

    def read_back(self) -> None:
        """Name bad steps, log and show the others.

        Raises:
            UserError: too many bad steps in a row.
        """
        if not self.values:
            return
        accelerator = self.parts.accelerator
        stacked = torch.stack([torch.stack([loss, bad.to(loss.dtype)]) for loss, bad in self.values])
        stacked = accelerator.reduce(stacked, reduction="sum")
        for step, (loss, bad) in zip(self.steps, stacked.tolist(), strict=True):
            self._note(step, loss, bool(bad))
        self.steps, self.values = [], []
        self.last_read = time.perf_counter()

    def _note(self, step: int, loss: float, bad: bool) -> None:
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        scaling = self.parts.accelerator.scaler is not None  # fp16's loss scale finds its level by overflowing
        if self.bad_in_a_row >= BAD_STEPS_IN_A_ROW * (3 if scaling else 1):
            raise UserError(
                f"the gradient was not finite {self.bad_in_a_row} steps in a row",
                where=f"step {step}",
                remedy="lower the learning rate, or use --mixed_precision bf16 or no; files saved before are good",
            )
        if bad:
            if not scaling:
                self.parts.progress.say(f"step {step}: the gradient is not finite; the step is skipped")
            return
        self.recent = [*self.recent, loss][-self.parts.length.steps_per_epoch :]
        average = sum(self.recent) / len(self.recent)
        rates = self._rates()
        self.parts.tracker.log(step, {"loss/current": loss, "loss/average": average} | rates)
        self.parts.progress.update(step, average, next(iter(rates.values()), None))

    def _rates(self) -> dict[str, float]:
        groups = self.parts.optimizer.param_groups
        names = self.parts.group_names
        return {f"lr/{name}": group["lr"] for name, group in zip(names, groups, strict=True) if group["lr"] is not None}


def _trainable_sum(module: nn.Module) -> Tensor:
    """A number that changes when any trainable weight does (but for a cancellation no training makes)."""
    return sum(  # type: ignore[return-value]
        (p.detach().double().abs().sum() for p in module.parameters() if p.requires_grad), torch.zeros(())
    )


def _warn_if_unchanged(parts: LoopParts, start: Tensor) -> None:
    if bool(_trainable_sum(parts.module) == start):
        steps = min(CHECK_LEARNING_AT, parts.length.steps)
        parts.progress.say(f"note: after {steps} steps no weight of the adapter has changed; is a learning rate too small?")


def _all_stop(accelerator: Accelerator, step: int, requested: bool) -> bool:
    """Whether to stop after this step: all processes must agree, which they ask each other only now and then."""
    if accelerator.num_processes == 1:
        return requested
    if step % READ_BACK_EVERY:
        return False
    flag = torch.tensor(float(requested), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)
