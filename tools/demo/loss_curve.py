"""The loss of a run as a picture, read from its TensorBoard log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from tools.demo.lettering import font

LOSS_OF_STEP = "loss/current"
WIDTH, HEIGHT = 900, 480
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 48, 56  # margins of the plot
FINER = 2  # drawn this many times larger and shrunk, for smooth lines
PAPER, INK, FAINT, GRID = (255, 255, 255), (28, 30, 34), (104, 110, 120), (226, 229, 234)
DOT, LINE = (168, 192, 226), (24, 84, 168)


@dataclass(frozen=True)
class Losses:
    """The loss of each optimizer step."""

    steps: Sequence[int]
    values: Sequence[float]


def read_losses(folder: Path) -> Losses:
    """The loss of every step from the newest event file below a --logging_dir.

    Raises:
        FileNotFoundError: without an event file.
        KeyError: where the file holds no such curve.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder} holds no TensorBoard event file")
    events = EventAccumulator(str(files[-1]), size_guidance={"scalars": 0}).Reload()  # 0: all points
    points = events.Scalars(LOSS_OF_STEP)
    return Losses([point.step for point in points], [point.value for point in points])


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values at each place, of fewer at the start."""
    return [math.fsum(values[max(0, end - window) : end]) / min(end, window) for end in range(1, len(values) + 1)]


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def draw_loss_curve(losses: Losses) -> Image.Image:
    """Every step's loss as a dot, and their running mean over a twentieth of the run as a line."""
    window = max(1, len(losses.values) // 20)
    plot = _Plot(max(losses.steps), max(losses.values))
    plot.draw_axes()
    plot.draw_dots(losses.steps, losses.values)
    plot.draw_line(losses.steps, running_mean(losses.values, window))
    plot.write((LEFT, 16), "loss", INK, 18, "la")
    plot.write((WIDTH - RIGHT, 18), f"each step (dots), mean of the last {window} (line)", FAINT, 14, "ra")
    plot.write(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14), "step", FAINT, 14, "md")
    return plot.finished()


class _Plot:
    """A frame whose lower left corner is step 0, loss 0."""

    def __init__(self, last_step: int, highest: float) -> None:
        self.last_step, self.highest = max(last_step, 1), highest * 1.05 or 1.0
        self.image = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), PAPER)
        self.canvas = ImageDraw.Draw(self.image)

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Where a point lies, in pixels of the finished picture."""
        x = LEFT + step / self.last_step * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - value / self.highest * (HEIGHT - TOP - BOTTOM)
        return x, y

    def draw_axes(self) -> None:
        for value in round_ticks(0, self.highest):
            self._stroke([self.place(0, value), self.place(self.last_step, value)], GRID, 1)
            x, y = self.place(0, value)
            self.write((x - 8, y), f"{value:.4g}", FAINT, 14, "rm")
        for step in round_ticks(0, self.last_step, 8):
            x, y = self.place(step, 0)
            self.write((x, y + 6), f"{step:.0f}", FAINT, 14, "ma")
        self._stroke([self.place(0, self.highest), self.place(0, 0), self.place(self.last_step, 0)], FAINT, 1)

    def draw_dots(self, steps: Sequence[int], values: Sequence[float]) -> None:
        for step, value in zip(steps, values, strict=True):
            x, y = (FINER * coordinate for coordinate in self.place(step, value))
            self.canvas.circle((x, y), 2 * FINER, fill=DOT)

    def draw_line(self, steps: Sequence[int], values: Sequence[float]) -> None:
        self._stroke([self.place(step, value) for step, value in zip(steps, values, strict=True)], LINE, 2)

    def write(self, at: tuple[float, float], text: str, colour: tuple[int, int, int], size: int, anchor: str) -> None:
        x, y = at
        self.canvas.text((x * FINER, y * FINER), text, fill=colour, font=font(size * FINER), anchor=anchor)

    def finished(self) -> Image.Image:
        return self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)

    def _stroke(self, points: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: int) -> None:
        scaled = [(x * FINER, y * FINER) for x, y in points]
        self.canvas.line(scaled, fill=colour, width=width * FINER, joint="curve")
