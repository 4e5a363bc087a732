"""What is given and means nothing to an algorithm is said, and nothing else is."""

from __future__ import annotations

import pytest

from networks import full, glora, ia3, lora, oft
from networks.building.creation import algorithms_used


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
        (oft, {"num_blocks": "2"}),
        (full, {"conv_dim": "4"}),
        (lora, {"wd_on_output": "False"}),
        (lora, {"wd_on_output": "True", "dora_wd": "True"}),
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
        (lora, {"wd_on_output": "True"}, "--network_args wd_on_output has no effect without dora_wd=True"),
        (
            oft,
            {"dim": 4, "num_blocks": "2"},
            "--network_dim has no effect: num_blocks decides the size of the blocks",
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


def test_blocks_of_another_size_are_said_once(caplog, sd1):
    network = oft.create_network(1.0, 7, None, None, None, sd1.unet)
    sizes, count = sorted({adapter.rank for _, adapter in network.items()}), len(network.targets)
    assert 7 not in sizes
    assert caplog.messages == [
        f"OFT: {count} of {count} layers have blocks of {' or '.join(map(str, sizes))} outputs "
        "instead of 7, which does not split their width so"
    ]


def test_an_axis_of_dora_means_something_where_a_preset_file_decomposes_some_layers(caplog, sd1, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('unet_target_module = ["Attention"]\n[module_algo_map.Attention]\nalgo = "lora"\ndora_wd = true')
    assert warnings(caplog, lora, sd1, preset=str(file), wd_on_output="True") == []


@pytest.mark.parametrize(("value", "trained"), [("true", True), (" Yes ", True), ("1", True), ("no", False), (False, False)])
def test_norms_are_trained_by_every_spelling_of_yes(sd1, value, trained):
    network = lora.create_network(1.0, 4, 1, None, None, sd1.unet, train_norm=value)
    assert any(target.spec.is_norm for target in network.targets.values()) == trained
    assert [each.name for each in algorithms_used(lora.ALGORITHM, {"train_norm": value})] == ["lora", *["norm"] * trained]
