"""Strengths by step, against the tables that SD.Next's own functions gave (20 steps)."""

from __future__ import annotations

import pytest

from library.families.block_weights import PLACES, read_block_weights
from library.prompts.lora_tags import read_step_values
from library.prompts.strengths import NOTHING, AdapterStrength, StepValues, StrengthNow, share_of_run

SCHEDULES = {
    "0.1@1,0.6@6": {0: 0.1, 1: 0.1, 3: 0.3, 6: 0.6, 10: 0.6, 19: 0.6},
    "0.1@0,0.9@1": {0: 0.1, 9: 0.5, 18: 0.9, 19: 0.9},
    "1@0;0@0.5;1@1": {0: 1.0, 9: 0.0, 18: 1.0},
    "0.9~10,0.1~0": {0: 0.1, 5: 0.5, 10: 0.9, 15: 0.9},
    "-1@2,1@4": {0: -1.0, 3: 0.0, 4: 1.0},
    "0.3@7": {0: 0.3, 19: 0.3},
    "0.8": {0: 0.8, 19: 0.8},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_have_sdnexts_values(schedule):
    values = read_step_values(schedule, "")
    steps = SCHEDULES[schedule]
    assert [values.at(step, 20) for step in steps] == pytest.approx(list(steps.values()))
    assert values.is_constant == (len(set(steps.values())) == 1)


def test_the_last_step_but_one_is_the_end_of_a_run():
    assert [share_of_run(step, 6) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [share_of_run(step, 2) for step in range(2)] == [0, 1]
    assert share_of_run(0, 1) == 0


def test_each_section_of_a_model_has_its_own_strength():
    strength = AdapterStrength(
        text_encoder=StepValues.constant(0.5),
        inputs=StepValues.constant(1.0),
        middle=StepValues.constant(2.0),
        outputs=StepValues.constant(3.0),
    )
    now = strength.at(0, 10)
    assert now.text_encoder == 0.5
    assert now.denoiser == (1.0,) * 12 + (2.0,) + (3.0,) * 13
    assert strength.is_constant


def test_block_weights_are_further_factors():
    weights = read_block_weights(",".join(str(place) for place in range(26)))
    strength = AdapterStrength(
        text_encoder=StepValues.constant(7.0), outputs=StepValues.constant(0.5), block_weights=weights
    )
    now = dict(zip(PLACES[1:], strength.at(0, 10).denoiser[:-1], strict=True))
    assert (now["IN00"], now["IN11"], now["MID"], now["OUT00"], now["OUT11"]) == (1, 12, 13, 7, 12.5)
    assert strength.at(0, 10).text_encoder == 0, "BASE is the text encoder's"


@pytest.mark.parametrize(
    ("start", "stop", "acting"),
    [
        (None, None, range(8)),
        (3, None, range(3, 8)),
        (None, 3, range(3)),
        (2, 5, range(2, 5)),
        (0.5, None, range(4, 8)),
        (None, 0.5, range(4)),
        (0.125, 0.375, range(1, 3)),
        (0.0, 1.0, range(8)),
        (20, None, []),
    ],
)
def test_an_adapter_acts_from_its_start_up_to_its_stop(start, stop, acting):
    strength = AdapterStrength(start=start, stop=stop)
    assert [step for step in range(8) if strength.at(step, 8) != NOTHING] == list(acting)
    assert strength.is_constant == (start is stop is None)


def test_shares_of_all_steps_are_exact():
    for steps in (10, 20, 30, 50):
        for step in range(1, steps):
            strength = AdapterStrength(start=float(f"{step / steps}"))
            assert [strength.at(now, steps).text_encoder for now in (step - 1, step)] == [0, 1]


def test_nothing_is_what_acts_nowhere_at_no_step():
    zero = StepValues.constant(0.0)
    assert AdapterStrength.constant(0.0).is_nothing
    assert AdapterStrength(block_weights=(0.0,) * 26).is_nothing
    assert AdapterStrength(text_encoder=zero, inputs=zero, middle=zero, block_weights=read_block_weights("INALL")).is_nothing
    assert not AdapterStrength(block_weights=read_block_weights("INALL")).is_nothing
    assert not AdapterStrength(text_encoder=zero, inputs=zero, middle=zero).is_nothing
    assert not AdapterStrength.constant(-0.5).is_nothing
    rising = StepValues(((0.0, 0.0), (1.0, 1.0)))
    assert not AdapterStrength(text_encoder=zero, inputs=zero, middle=zero, outputs=rising).is_nothing


def test_an_adapter_asked_for_twice_acts_with_the_sum():
    once, twice = AdapterStrength.constant(0.25).at(0, 5), AdapterStrength.constant(0.5).at(0, 5)
    assert StrengthNow.total([once, once]) == twice
    assert StrengthNow.total([]) == AdapterStrength.constant(0.0).at(0, 5)
