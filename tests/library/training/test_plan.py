"""The arithmetic of a run: every micro-batch is used as planned, and the names of files follow from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.training.options import LengthOptions, SavingOptions
from library.training.plan import RunLength, run_length
from library.training.saving import epochs_between_saves


@pytest.mark.parametrize("batches", [1, 4, 7])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 10])
def test_an_epoch_uses_every_batch_once(batches, accumulation):
    length = RunLength(batches_per_epoch=batches, accumulation=accumulation, steps=100)
    places = [place for step in range(length.steps_per_epoch) for place in length.batches_of(step)]
    assert places == list(range(batches))
    assert all(1 <= len(length.batches_of(step)) <= accumulation for step in range(100))


def test_epochs_win_over_steps():
    assert run_length(LengthOptions(steps=5, epochs=3, accumulation=2), 7).steps == 12
    assert run_length(LengthOptions(steps=5, accumulation=2), 7).steps == 5


def test_a_run_may_end_within_an_epoch():
    length = RunLength(batches_per_epoch=4, accumulation=1, steps=10)
    assert length.epochs == 3
    assert [length.epoch_ended_by(step) for step in (3, 4, 8, 10)] == [None, 1, 2, None]
    assert [list(length.batches_of(step)) for step in (3, 4, 9)] == [[3], [0], [1]]


@pytest.mark.parametrize(("ratio", "epochs", "every"), [(3, 10, 3), (20, 10, 1), (1, 10, 10)])
def test_a_ratio_of_saves_is_a_number_of_epochs_between_them(ratio, epochs, every):
    assert epochs_between_saves(SavingOptions(output_dir=Path("."), epoch_ratio=ratio), epochs) == every
