"""What is given and means nothing to an algorithm is said, and nothing else is."""

from __future__ import annotations

import pytest

from networks import full, glora, ia3, lora, oft


def warnings(caplog, module, models, *, dim=None, alpha=None, **network_args) -> list[str]:
    module.create_network(1.0, dim, alpha, None, None, models.unet, **network_args)
    return caplog.messages


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (lora, {"dim": 4, "alpha": 2, "rs_lora": "True", "loraplus_lr_ratio": "4"}),
        (glora, {"dim": 4, "alpha": 2, "rs_lora": "True", "loraplus_lr_ratio": "4"}),
        (full, {"alpha": 1}),
        (ia3, {"rs_lora": "False"}),
        (oft, {"dim": 4, "alpha": 1, "constraint": "0.01"}),
        (oft, {"dim": 4, "alpha": 2, "network_reg_algos": "to_q=lora"}),
    ],
)
def test_what_means_something_is_taken_without_a_word(caplog, sd1, module, settings):
    assert warnings(caplog, module, sd1, **settings) == []


@pytest.mark.parametrize(
    ("module", "settings", "expected"),
    [
        (full, {"dim": 8}, "--network_dim has no effect: Full has no rank"),
        (full, {"alpha": 2}, "--network_alpha has no effect: Full has no alpha"),
        (ia3, {"rs_lora": "True"}, "--network_args rs_lora has no effect: (IA)3 has no alpha"),
        (full, {"network_reg_alphas": "to_q=2"}, "--network_args network_reg_alphas has no effect: Full has no alpha"),
        (
            oft,
            {"alpha": 0.001},
            "--network_alpha has no effect: OFT has no alpha; --network_args constraint limits its rotations",
        ),
        (
            ia3,
            {"loraplus_unet_lr_ratio": "4"},
            "LoRA+ has no effect: (IA)3 has no factors that start at zero beside others",
        ),
    ],
)
def test_what_means_nothing_is_said(caplog, sd1, module, settings, expected):
    assert warnings(caplog, module, sd1, **settings) == [expected]
