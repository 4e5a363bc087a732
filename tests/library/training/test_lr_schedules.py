"""Every schedule follows transformers' function of the same name, step by step."""

from __future__ import annotations

import pytest
import torch
import transformers.optimization as reference

from library.errors import UserError
from library.training.lr_schedules import (
    SCHEDULES,
    build_schedule,
    check_schedule,
    learning_rate_factor,
    rehearse_schedule,
)
from library.training.options import ScheduleOptions

TOTAL, WARMUP = 40, 5


def reference_factors(name: str, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = getattr(reference, name)(optimizer, **settings)
    factors = []
    for _ in range(TOTAL):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


LENGTH = {"num_warmup_steps": WARMUP, "num_training_steps": TOTAL}
CASES = {
    "constant_with_warmup": ({}, ("get_constant_schedule_with_warmup", {"num_warmup_steps": WARMUP})),
    "linear": ({}, ("get_linear_schedule_with_warmup", LENGTH)),
    "cosine": ({}, ("get_cosine_schedule_with_warmup", LENGTH)),
    "cosine_with_restarts": (
        {"num_cycles": 3},
        ("get_cosine_with_hard_restarts_schedule_with_warmup", {**LENGTH, "num_cycles": 3}),
    ),
    "cosine_with_min_lr": (
        {"min_lr_ratio": 0.2},
        ("get_cosine_with_min_lr_schedule_with_warmup", {**LENGTH, "min_lr_rate": 0.2}),
    ),
    "polynomial": (
        {"power": 2.0},
        ("get_polynomial_decay_schedule_with_warmup", {**LENGTH, "lr_end": 0.0, "power": 2.0}),
    ),
    "inverse_sqrt": ({"timescale": 9}, ("get_inverse_sqrt_schedule", {"num_warmup_steps": WARMUP, "timescale": 9})),
    "warmup_stable_decay": (
        {"decay": 10, "min_lr_ratio": 0.1},
        (
            "get_wsd_schedule",
            {"num_warmup_steps": WARMUP, "num_stable_steps": 25, "num_decay_steps": 10, "min_lr_ratio": 0.1},
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_equals_the_one_of_its_name_in_transformers(name):
    options, (function, settings) = CASES[name]
    factor = learning_rate_factor(ScheduleOptions(name=name, warmup=WARMUP, **options), TOTAL)
    assert [factor(step) for step in range(TOTAL)] == pytest.approx(reference_factors(function, **settings), abs=1e-9)


def test_a_share_of_warm_up_is_a_share_of_the_run():
    factor = learning_rate_factor(ScheduleOptions(name="constant", warmup=0.25), 40)
    assert [factor(0), factor(5), factor(10), factor(39)] == [0.0, 0.5, 1.0, 1.0]


def test_piecewise_constant_reads_its_pieces():
    options = ScheduleOptions(name="piecewise_constant", args={"step_rules": "1:10,0.5:20,0.1"})
    factor = learning_rate_factor(options, 40)
    assert [factor(9), factor(10), factor(19), factor(20)] == [1.0, 0.5, 0.5, 0.1]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "piecewise_constant"])
def test_no_schedule_leaves_the_range_from_zero_to_one(name):
    factor = learning_rate_factor(ScheduleOptions(name=name, warmup=3, decay=5), 20)
    assert all(0 <= factor(step) <= 1 for step in range(21))


def test_an_unknown_schedule_is_answered_with_the_near_one():
    with pytest.raises(UserError, match="--lr_scheduler cosin: no such schedule; did you mean cosine"):
        check_schedule(ScheduleOptions(name="cosin"))


def test_a_class_of_torch_can_be_the_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = ScheduleOptions(custom_type="StepLR", args={"step_size": 2, "gamma": 0.5})
    check_schedule(options)
    scheduler = build_schedule(options, optimizer, TOTAL)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_pieces_that_are_missing_are_found_out_at_once():
    with pytest.raises(UserError, match="piecewise_constant needs its pieces"):
        check_schedule(ScheduleOptions(name="piecewise_constant", args={"step_rules": "x"}))


def test_the_schedule_of_adafactor_needs_its_relative_steps():
    check_schedule(ScheduleOptions(name="adafactor:1e-4"), relative_steps=True)
    with pytest.raises(UserError, match="relative_step=True"):
        check_schedule(ScheduleOptions(name="adafactor:1e-4"))


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("ReduceLROnPlateau", {}, "cannot be used for step 1 of 40: .*metrics"),
        ("OneCycleLR", {"max_lr": 1, "total_steps": 39}, "cannot be used for step 40 of 40"),
        ("CosineAnnealingLR", {}, "refuses its settings: .*T_max"),
        ("LRScheduler", {}, "refuses its settings: NotImplementedError"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_class_that_does_not_last_the_run_is_found_out_before_it(name, args, sentence):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError, match=f"--lr_scheduler_type {name}: {sentence}"):
        rehearse_schedule(ScheduleOptions(custom_type=name, args=args), optimizer, TOTAL)


def test_a_class_that_fits_the_run_passes():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = ScheduleOptions(custom_type="OneCycleLR", args={"max_lr": 1, "total_steps": TOTAL})
    rehearse_schedule(options, optimizer, TOTAL)
