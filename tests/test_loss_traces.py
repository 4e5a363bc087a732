"""Every algorithm trains as it did: the losses of 20 steps on the demo's base model, pinned.

A change that is meant to alter training writes them anew with `python -m tests.support.loss_traces`.
"""

from __future__ import annotations

import json

import pytest

from networks.core.algorithms import ALGORITHMS
from tests.support.loss_traces import FILE, FORMS, STEPS, trace

pytestmark = pytest.mark.filterwarnings("ignore")

PINNED: dict[str, list[float]] = json.loads(FILE.read_text(encoding="utf-8"))
TOLERANCE = 1e-3  # of a loss: other instruction sets round differently, by 2e-5 where it was tried


@pytest.mark.parametrize("form", FORMS)
def test_the_losses_of_the_first_steps_are_those_written_down(form, tmp_path):
    assert trace(FORMS[form], tmp_path) == pytest.approx(PINNED[form], rel=TOLERANCE)


def test_every_algorithm_is_pinned():
    assert set(PINNED) == set(FORMS)
    assert set(ALGORITHMS) <= set(FORMS)
    assert all(len(losses) == STEPS for losses in PINNED.values())


def test_the_traces_tell_the_algorithms_apart():
    """Each begins as the base model and then goes its own way by more than the tolerance."""
    assert len({losses[0] for losses in PINNED.values()}) == 1
    for name, losses in PINNED.items():
        for other in set(PINNED) - {name}:
            apart = [abs(a - b) / b for a, b in zip(losses, PINNED[other], strict=True)]
            assert max(apart) > 10 * TOLERANCE, (name, other)
