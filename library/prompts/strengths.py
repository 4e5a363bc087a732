"""How strongly an adapter acts on a picture: by part of the model, by block, and by sampling step.

Steps are counted from 0. A position of a schedule is such a number or, where no position of it exceeds 1, a share of the run
as SD.Next counts it: the last step but one is at 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from library.families.block_weights import PLACES


@dataclass(frozen=True)
class StepValues:
    """A number that may change from step to step: linear between its points, constant outside them.

    Attributes:
        points: (position, value), at least one, in the order of their positions.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def constant(cls, value: float) -> StepValues:
        """The same value at every step."""
        return cls(((0.0, value),))

    @property
    def is_constant(self) -> bool:
        """Whether all steps have the same value."""
        return len({value for _, value in self.points}) == 1

    def at(self, step: int, steps: int) -> float:
        """The value at a step, 0 to `steps` - 1."""
        place = float(step) if self.points[-1][0] > 1 else share_of_run(step, steps)
        if place <= self.points[0][0]:
            return self.points[0][1]
        for (start, before), (end, after) in pairwise(self.points):
            if place < end:
                return before + (after - before) * (place - start) / (end - start)
        return self.points[-1][1]


def share_of_run(step: int, steps: int) -> float:
    """How far a run of `steps` is at a step: 0 at the first, 1 from the last but one."""
    return min(1.0, step / (steps - 2)) if steps > 2 else float(step > 0)


ONE = StepValues.constant(1.0)
ZERO = StepValues.constant(0.0)


@dataclass(frozen=True, kw_only=True)
class AdapterStrength:
    """The strength of one adapter on one picture.

    Attributes:
        text_encoder: on the text encoders.
        inputs, middle, outputs: on the U-Net's three sections.
        block_weights: further factors, one for each of `block_weights.PLACES`; None for 1 everywhere.
        start, stop: the steps with the adapter, from `start` up to `stop`, which is without it; a float is a share of all
            steps (0.5 of 20 is step 10), None sets no bound.
    """

    text_encoder: StepValues = ONE
    inputs: StepValues = ONE
    middle: StepValues = ONE
    outputs: StepValues = ONE
    block_weights: tuple[float, ...] | None = None
    start: int | float | None = None
    stop: int | float | None = None

    @classmethod
    def constant(cls, value: float) -> AdapterStrength:
        """The same strength everywhere and at every step."""
        values = StepValues.constant(value)
        return cls(text_encoder=values, inputs=values, middle=values, outputs=values)

    @property
    def is_constant(self) -> bool:
        """Whether it is the same at every step."""
        values = (self.text_encoder, self.inputs, self.middle, self.outputs)
        return self.start is None and self.stop is None and all(each.is_constant for each in values)

    @property
    def is_nothing(self) -> bool:
        """Whether it is 0 everywhere at every step."""
        weights, sections = self.block_weights or (1.0,) * len(PLACES), self._sections
        return not any(
            value for name, weight in zip(PLACES, weights, strict=True) if weight for _, value in sections[name[0]].points
        )

    def at(self, step: int, steps: int) -> StrengthNow:
        """What it is at a step of a run of `steps`."""
        if not self._acts(step, steps):
            return NOTHING
        weights = self.block_weights or (1.0,) * len(PLACES)
        values = {section: value.at(step, steps) for section, value in self._sections.items()}
        now = [values[name[0]] * weight for name, weight in zip(PLACES, weights, strict=True)]
        return StrengthNow(now[0], (*now[1:], values["O"]))

    @property
    def _sections(self) -> dict[str, StepValues]:
        """What holds, without block weights, at those of `PLACES` that begin with a letter."""
        return {"B": self.text_encoder, "I": self.inputs, "M": self.middle, "O": self.outputs}

    def _acts(self, step: int, steps: int) -> bool:
        def reached(bound: float) -> bool:
            return (step / steps if isinstance(bound, float) else step) >= bound

        return (self.start is None or reached(self.start)) and (self.stop is None or not reached(self.stop))


@dataclass(frozen=True)
class StrengthNow:
    """A strength at one step.

    Attributes:
        text_encoder: on the text encoders.
        denoiser: for each of `block_weights.PLACES` behind BASE, and last for the layers outside all blocks (conv_out),
            which follow the section of the outputs.
    """

    text_encoder: float
    denoiser: tuple[float, ...]

    @classmethod
    def total(cls, strengths: Iterable[StrengthNow]) -> StrengthNow:
        """The sum, which is how an adapter acts that is asked for several times; nothing of nothing."""
        given = list(strengths) or [NOTHING]
        if len(given) == 1:
            return given[0]
        denoiser = tuple(map(sum, zip(*(each.denoiser for each in given), strict=True)))
        return cls(sum(each.text_encoder for each in given), denoiser)


NOTHING = StrengthNow(0.0, (0.0,) * len(PLACES))
