"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Shows step, epoch, loss, rate, time left and the share of time spent waiting for data.

    Attributes:
        total_steps: optimizer steps of the run.
        steps_per_epoch: to name the epoch.
        shown: False on processes that stay silent.
        line_seconds: least time between two plain lines.
    """

    total_steps: int
    steps_per_epoch: int
    total_epochs: int
    shown: bool = True
    line_seconds: float = 10.0
    waited: float = 0.0
    _started: float = field(default_factory=time.perf_counter)
    _last_line: float = field(default_factory=time.perf_counter)
    _bar: Any = None

    def __post_init__(self) -> None:
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total_steps, unit="step", dynamic_ncols=True)

    def waited_for_data(self, seconds: float) -> None:
        self.waited += seconds

    def update(self, step: int, loss: float, learning_rate: float | None) -> None:
        """Show the state after `step` steps; no rate where the optimizer finds its own."""
        if not self.shown:
            return
        epoch = min(self.total_epochs, (step - 1) // self.steps_per_epoch + 1)
        seconds = time.perf_counter() - self._started
        rate_text = "" if learning_rate is None else f"  lr {learning_rate:.3g}"
        shares = f"loss {loss:.4f}{rate_text}  waiting for data {self.waited / max(seconds, 1e-9):.0%}"
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch}/{self.total_epochs}", refresh=False)
            self._bar.set_postfix_str(shares, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        due = time.perf_counter() - self._last_line >= self.line_seconds
        if due or step in (1, self.total_steps):
            self._last_line = time.perf_counter()
            left = seconds / step * (self.total_steps - step)
            rate = f"{seconds / step:.2f} s/step  {clock(left)} left"
            self.say(f"step {step}/{self.total_steps}  epoch {epoch}/{self.total_epochs}  {shares}  {rate}")

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


@dataclass
class CountBar:
    """Progress of a job of known size: a bar on a terminal, one line at the end elsewhere. Called with (done, total)."""

    title: str
    shown: bool = True
    _bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if not self.shown:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = self._bar or tqdm(total=total, desc=self.title, dynamic_ncols=True)
            self._bar.update(done - self._bar.n)
            if done == total:
                self._bar.close()
        elif done == total:
            print(f"{self.title}: {done} of {total}", flush=True)


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
