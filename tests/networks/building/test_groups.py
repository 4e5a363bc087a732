"""Which parameters learn at which rate, and what a run prints about them."""

from __future__ import annotations

import pytest

from library.errors import UserError
from networks import lora


def make(models, **args):
    return lora.create_network(1.0, 4, 1, None, models.text_encoder, models.unet, **args)


def test_text_encoder_first_each_part_at_its_rate(sd1):
    network = make(sd1)
    groups, names = network.prepare_optimizer_params(5e-5, 1e-4, 1e-3)
    assert names == ["textencoder", "unet"]
    assert [group["lr"] for group in groups] == [5e-5, 1e-4]
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in network.parameters()), "each parameter is in one group"


def test_a_part_without_a_rate_takes_the_common_one(sd1):
    groups, _ = make(sd1).prepare_optimizer_params(None, 1e-4, 1e-3)
    assert [group["lr"] for group in groups] == [1e-3, 1e-4]


def test_rate_zero_freezes_that_part(sd1):
    network = make(sd1)
    groups, names = network.prepare_optimizer_params(0, None, 1e-3)
    network.prepare_grad_etc(sd1.text_encoder, sd1.unet)
    assert names == ["unet"]
    assert {id(parameter) for parameter in network.get_trainable_params()} == {id(p) for p in groups[0]["params"]}
    for target, adapter in network.items():
        assert all(parameter.requires_grad == (target.part == "denoiser") for parameter in adapter.parameters())


def test_nothing_to_train_is_an_error(sd1):
    with pytest.raises(UserError, match="nothing to train"):
        make(sd1).prepare_optimizer_params(0, 0, 1e-3)


def test_a_list_of_text_encoder_rates(sd1):
    assert make(sd1).prepare_optimizer_params([5e-5], 1e-4, 1e-3)[0][0]["lr"] == 5e-5
    assert make(sd1).prepare_optimizer_params([], 1e-4, 1e-3)[0][0]["lr"] == 1e-3
    with pytest.raises(UserError, match="2 learning rates for 1 text encoder"):
        make(sd1).prepare_optimizer_params([1e-4, 1e-5], 1e-4, 1e-3)


def test_two_text_encoders_have_one_rate_or_one_each(sdxl):
    network = make(sdxl)
    for given, wanted in (
        ([1e-5, 2e-5], [1e-5, 2e-5]),
        (3e-5, [3e-5] * 2),
        ([3e-5], [3e-5] * 2),
        ([None, 2e-5], [1e-3, 2e-5]),
    ):
        groups, names = network.prepare_optimizer_params(given, 1e-4, 1e-3)
        assert names == ["textencoder", "textencoder2", "unet"]
        assert [group["lr"] for group in groups] == [*wanted, 1e-4]
    network.prepare_optimizer_params([0, 2e-5], 1e-4, 1e-3)
    frozen = {target.part for target, adapter in network.items() if not any(p.requires_grad for p in adapter.parameters())}
    assert frozen == {"text_encoder"}
    assert [row.part for row in network.describe()][:2] == ["text_encoder", "text_encoder_2"]
    with pytest.raises(UserError, match="3 learning rates for 2 text encoders; give one, or one for each of the 2"):
        network.prepare_optimizer_params([1e-4, 1e-5, 1e-6], 1e-4, 1e-3)


def test_loraplus_splits_each_part(sd1):
    network = make(sd1, loraplus_lr_ratio="16")
    groups, names = network.prepare_optimizer_params(1e-5, 1e-4, None)
    assert names == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-5, 16e-5, 1e-4, 16e-4])
    ups = {id(adapter.lora_up.weight) for _, adapter in network.items()}
    assert all(
        {id(parameter) in ups for parameter in group["params"]} == {"plus" in name}
        for group, name in zip(groups, names, strict=True)
    )


def test_loraplus_ratios_of_single_parts(sd1):
    network = make(sd1, loraplus_lr_ratio="4", loraplus_unet_lr_ratio="8")
    groups, _ = network.prepare_optimizer_params(1.0, 1.0, None)
    assert [group["lr"] for group in groups] == [1, 4, 1, 8]
    network = make(sd1, loraplus_text_encoder_lr_ratio="2")
    assert network.prepare_optimizer_params(1.0, 1.0, None)[1] == ["textencoder", "textencoder plus", "unet"]


def test_one_group_for_each_block_with_block_weights(sd1):
    network = make(
        sd1, down_lr_weight="linear", up_lr_weight="reverse_linear", mid_lr_weight="2", loraplus_unet_lr_ratio="3"
    )
    groups, names = network.prepare_optimizer_params(1e-5, 1e-4, None)
    rates = dict(zip(names, (group["lr"] for group in groups), strict=True))
    assert names[:3] == ["textencoder", "unet_block1", "unet_block1 plus"]
    assert rates["unet_block1"] == pytest.approx(1e-4 / 11)
    assert rates["unet_block12"] == pytest.approx(2e-4)
    assert rates["unet_block16 plus"] == pytest.approx(3e-4 * 8 / 11)
    assert "unet_block24" not in rates, "a block of weight 0 has no adapters"
    assert 24 not in {target.block for target in network.targets.values()}


def test_the_summary_tells_every_block(sd1):
    network = make(sd1, conv_dim=2, conv_alpha=2, down_lr_weight="zeros", mid_lr_weight="0.5")
    before = network.describe()
    assert {row.learning_rates for row in before} == {()}
    network.prepare_optimizer_params(0, 1e-4, 1e-3)
    rows = network.describe()
    assert sum(row.modules for row in rows) == len(network.targets)
    assert sum(row.parameters for row in rows) == sum(parameter.numel() for parameter in network.parameters())
    assert [row.block for row in rows] == [None, *range(12, 25)]
    by_block = {row.block: row for row in rows}
    assert by_block[None].learning_rates == (0,)
    assert by_block[12].learning_rates == pytest.approx((5e-5,))
    assert by_block[16].ranks == (2, 4)
    assert by_block[16].alphas == pytest.approx((1.0, 2.0))
