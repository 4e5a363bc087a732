"""Training of the demo model's parts against the clock: learning rates follow the share of the time budget that is spent.

Checkpoints hold everything a run needs to go on, the time spent included, so an interrupted run ends where it would have.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(kw_only=True)
class Clock:
    """Time spent on training, over interruptions: `progress` runs from 0 to 1 and drives the learning rate."""

    budget_seconds: float
    spent_before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        return self.spent_before + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        return min(1.0, self.spent / self.budget_seconds)


def learning_rate(peak: float, progress: float, step: int, warmup_steps: int = 100) -> float:
    """Linear warm-up over steps, then a half cosine over the time budget down to 1% of the peak."""
    return peak * min(1.0, (step + 1) / warmup_steps) * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


class Run:
    """One module in training: optimizer, averaged weights, clock and checkpoint."""

    def __init__(self, module: nn.Module, *, checkpoint: Path, minutes: float, peak_rate: float, ema_decay: float) -> None:
        self.module = module
        self.checkpoint = checkpoint
        self.peak_rate = peak_rate
        self.ema_decay = ema_decay
        self.step = 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.clock = Clock(budget_seconds=minutes * 60)
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        if checkpoint.exists():
            self._resume()
        self.progress = self.clock.progress

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        for mine, saved in zip(self.average, state["average"], strict=True):
            mine.copy_(saved)
        self.step = state["step"]
        self.clock.spent_before = state["spent"]
        print(f"resumed at step {self.step}, {state['spent'] / 60:.1f} minutes spent", flush=True)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all; one process does it for all."""
        if self.rank != 0:
            return
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "spent": self.clock.spent,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def update(self, loss: Tensor) -> None:
        """One optimizer step on a loss, and the weights' running average after it."""
        loss.backward()
        self._share()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.peak_rate, self.progress, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # A short memory at first, else the average would keep the untrained weights for long.
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1.0 - decay)

    def _share(self) -> None:
        """Average gradients, and the clocks' progress with them, over the processes that train together."""
        self.progress = self.clock.progress
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        parts = [gradient.flatten() for gradient in gradients]
        everything = torch.cat([*parts, parts[0].new_tensor([self.progress])])
        dist.all_reduce(everything)
        everything /= self.world
        *parts, progress = everything.split([*(part.numel() for part in parts), 1])
        self.progress = progress.item()
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def load_average(self) -> None:
        """Put the averaged weights into the module: what is exported and looked at."""
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.average, strict=True):
                parameter.copy_(mean)

    def steps(self, save_every_seconds: float = 120.0) -> Iterator[int]:
        """Step numbers until the time is spent; saves on the way and at the end."""
        saved = time.monotonic()
        while self.progress < 1.0:
            yield self.step
            if time.monotonic() - saved > save_every_seconds:
                self.save()
                saved = time.monotonic()
        self.save()


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: the same after a resume."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Meter:
    """Mean of the last losses, printed now and then."""

    def __init__(self, every: int = 100) -> None:
        self.every = every
        self.losses: list[Tensor] = []

    def add(self, run: Run, **losses: Tensor) -> None:
        self.losses.append(torch.stack([value.detach() for value in losses.values()]))
        if run.step % self.every == 0 and run.rank == 0:
            means = torch.stack(self.losses).mean(dim=0).tolist()
            shown = " ".join(f"{name} {value:.5f}" for name, value in zip(losses, means, strict=True))
            print(f"step {run.step} at {run.clock.spent / 60:.1f} min: {shown}", flush=True)
            self.losses.clear()
