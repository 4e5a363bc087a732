"""Every schedule follows transformers' function of the same name, step by step."""

from __future__ import annotations

import pytest
import torch
import transformers.optimization as reference

from library.errors import UserError
from library.training.lr_schedules import SCHEDULES, build_schedule, check_schedule, learning_rate_factor
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
