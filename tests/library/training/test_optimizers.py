"""Every optimizer of the table is what its name says, steps on a CPU, and refuses what it does not know."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from library.errors import UserError
from library.training.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    chooses_its_rate,
    optimizer_class,
    optimizer_kind,
    optimizer_settings,
    rehearse_optimizer,
)

INSTALLED = [name for name, kind in OPTIMIZERS.items() if importlib.util.find_spec(kind.path.split(".")[0])]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", INSTALLED)
def test_an_optimizer_changes_the_weights_it_is_given_and_warns_of_nothing(name):
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    settings = optimizer_settings(name, {})
    optimizer = build_optimizer(name, [{"params": [parameter], "lr": 1e-2}], 1e-2, settings)
    assert type(optimizer) is optimizer_class(name)
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.isfinite().all()
    assert (parameter < 1).all()


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in INSTALLED])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name):
    with pytest.raises(UserError, match=f"pip install {OPTIMIZERS[name].package}"):
        optimizer_class(name)


def test_nesterov_sgd_has_its_momentum_unless_told_otherwise():
    def build(given):
        parameters = [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
        return build_optimizer("SGDNesterov", parameters, 0.1, optimizer_settings("SGDNesterov", given))

    assert build({}).defaults["nesterov"]
    assert build({}).defaults["momentum"] == 0.9
    assert build({"momentum": 0.5}).defaults["momentum"] == 0.5


def test_each_group_keeps_its_own_rate():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in (0.1, 0.2)]
    optimizer = build_optimizer("adamw", groups, 0.3, {})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("name", ["adamw8BIT", "ADAMW", "sgdnesterov"])
def test_names_are_known_in_any_case(name):
    assert optimizer_kind(name)[0].lower() == name.lower()


def test_a_class_of_torch_and_a_dotted_path_are_taken():
    assert optimizer_class("RMSprop") is torch.optim.RMSprop
    assert optimizer_class("torch.optim.Adagrad") is torch.optim.Adagrad


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("AdamX", "--optimizer_type AdamX: no such optimizer; did you mean AdamW"),
        ("torch.optim.Nope", "--optimizer_type torch.optim.Nope: torch.optim has no class Nope"),
        ("nowhere.at.All", "pip install nowhere"),
    ],
)
def test_an_unknown_optimizer_is_one_sentence(name, sentence):
    with pytest.raises(UserError) as error:
        optimizer_class(name)
    assert sentence in str(error.value)


def test_a_setting_the_class_lacks_is_answered_with_the_near_one():
    with pytest.raises(UserError, match="has no setting 'weight_deca'; did you mean weight_decay"):
        optimizer_settings("AdamW", {"weight_deca": 0.1})


@pytest.mark.parametrize("name", ["SparseAdam", "LBFGS"])
def test_a_class_that_cannot_train_an_adapter_is_found_out_before_the_run(name):
    with pytest.raises(UserError, match=f"--optimizer_type {name}: cannot train an adapter"):
        rehearse_optimizer(name, 1e-2, {})


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_a_rehearsal_lets_the_others_pass(name):
    rehearse_optimizer(name, 1e-2, {})


@pytest.mark.parametrize("settings", [{"betas": 2}, {"betas": (2, 3)}, {"fused": True, "foreach": True}])
def test_settings_that_a_class_refuses_are_one_sentence(settings):
    with pytest.raises(UserError, match="--optimizer_type AdamW: refuses its settings: .*; see --optimizer_args"):
        build_optimizer("AdamW", [{"params": [torch.nn.Parameter(torch.zeros(2))]}], 0.1, settings)


def test_adafactor_alone_chooses_its_rate_and_only_with_relative_steps():
    assert chooses_its_rate("adafactor", {"relative_step": True})
    assert not chooses_its_rate("adafactor", {"relative_step": False})
    assert not chooses_its_rate("AdamW", {"relative_step": True})
