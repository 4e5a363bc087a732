"""Values by block: the presets' curves, the ranks that come of them, and the sentences for wrong settings."""

from __future__ import annotations

import math

import pytest

from library.errors import UserError
from library.families.sd1 import SD1
from library.families.sdxl import SDXL
from networks import lora
from networks.building.blocks import all_learning_rate_weights, learning_rate_weights


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sine", [math.sin(math.pi / 2 * i / 11) for i in range(12)]),
        ("cosine", [math.cos(math.pi / 2 * i / 11) for i in range(12)]),
        ("linear", [i / 11 for i in range(12)]),
        ("reverse_linear", [1 - i / 11 for i in range(12)]),
        ("zeros", [0.0] * 12),
        ("cosine+.25", [math.cos(math.pi / 2 * i / 11) + 0.25 for i in range(12)]),
        ("zeros+1e-1", [0.1] * 12),
        ("0,0,0,0,0,0,1,1,1,1,1,1", [0.0] * 6 + [1.0] * 6),
        (" 1, 2,3,4,5,6,7,8,9,10,11,12 ", [float(i) for i in range(1, 13)]),
    ],
)
def test_weights_of_one_side(text, expected):
    assert learning_rate_weights(text, 12, "down_lr_weight") == pytest.approx(expected, abs=1e-12)


def test_what_is_not_given_has_weight_one():
    assert all_learning_rate_weights(None, "0.5", None, zero_threshold=0, family=SD1) == (1.0,) * 12 + (0.5,) + (1.0,) * 12
    assert all_learning_rate_weights(None, None, None, zero_threshold=0, family=SD1) is None


def test_weights_up_to_the_threshold_are_zero():
    weights = all_learning_rate_weights("linear", None, None, zero_threshold=3 / 11, family=SD1)
    assert weights[:5] == (0, 0, 0, 0, pytest.approx(4 / 11))


def test_learning_rate_weights_cover_the_sides_of_the_family():
    weights = all_learning_rate_weights("linear", "0.5,1,2", "zeros+.5", zero_threshold=0, family=SDXL)
    assert weights == (1, *(pytest.approx(place / 8) for place in range(9)), 0.5, 1, 2, *[0.5] * 9, 1)
    with pytest.raises(UserError, match="1 value given, 3 wanted"):
        all_learning_rate_weights(None, "0.5", None, zero_threshold=0, family=SDXL)


def ranks_by_block(network, wide):
    return {
        target.block: (adapter.rank, adapter.alpha.item())
        for target, adapter in network.items()
        if target.block is not None and target.spec.is_wide == wide
    }


def create(models, dim=4, alpha=1.0, **args):
    return lora.create_network(1.0, dim, alpha, None, models.text_encoder, models.unet, **args)


ONE_TO_25 = ",".join(map(str, range(1, 26)))


def test_ranks_and_alphas_by_block(sd1):
    network = create(sd1, block_dims=ONE_TO_25, block_alphas=",".join(["3"] * 25))
    expected = {block: (block + 1, 3) for block in (1, 2, 4, 5, 7, 8, 12, *range(16, 25))}
    assert ranks_by_block(network, wide=False) == expected
    assert ranks_by_block(network, wide=True) == {}
    text = [adapter for target, adapter in network.items() if target.part == "text_encoder"]
    assert {(adapter.rank, adapter.alpha.item()) for adapter in text} == {(4, 1)}, "block values are the U-Net's alone"


def test_conv_ranks_by_block_and_fallbacks(sd1):
    network = create(sd1, alpha=2, conv_block_dims=ONE_TO_25)
    assert ranks_by_block(network, wide=True) == {block: (block + 1, 1) for block in range(1, 25)}
    assert set(ranks_by_block(network, wide=False).values()) == {(4, 2)}
    network = create(sd1, conv_dim="2", conv_alpha="0", block_dims=ONE_TO_25)
    assert set(ranks_by_block(network, wide=True).values()) == {(2, 2)}, "alpha 0 stands for the rank"


def test_rank_zero_leaves_a_block_out(sd1):
    dims = [4] * 25
    dims[12] = 0
    assert 12 not in ranks_by_block(create(sd1, block_dims=dims), wide=False)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1), (0, 1), (2, 0.5)])
def test_alpha_none_and_zero_stand_for_the_rank(sd1, alpha, scale):
    network = create(sd1, alpha=alpha)
    assert {adapter.scale for _, adapter in network.items()} == {scale}


def test_the_default_rank_is_four(sd1):
    assert {adapter.rank for _, adapter in create(sd1, dim=None).items()} == {4}


WRONG = [
    ({"conv_dim": "abc"}, "--network_args conv_dim: 'abc' is not a number"),
    ({"conv_dim": "0"}, "conv_dim: '0' is not a whole number of 1 or more"),
    ({"conv_dim": "-4"}, "conv_dim: '-4' is not a whole number of 1 or more"),
    ({"conv_dim": "2.5"}, "conv_dim: '2.5' is not a whole number"),
    ({"conv_dim": "inf"}, "conv_dim: 'inf' is not a finite number"),
    ({"conv_alpha": "1"}, "conv_alpha: has no effect without conv_dim; give conv_dim too"),
    ({"conv_dim": "4", "conv_alpha": "-1"}, "conv_alpha: '-1' is not 0 or more"),
    ({"block_dims": "1,2,3"}, "block_dims: 3 values given, 25 wanted"),
    ({"block_dims": ",".join(["1"] * 24 + ["-1"])}, "block_dims: '-1' is not a whole number of 0 or more"),
    ({"block_alphas": "1"}, "block_alphas: 1 value given, 25 wanted"),
    ({"conv_block_dims": "1"}, "conv_block_dims: 1 value given, 25 wanted"),
    ({"conv_block_alphas": "1"}, "conv_block_alphas: has no effect without conv_dim"),
    ({"down_lr_weight": "0.5"}, "down_lr_weight: 1 value given, 12 wanted"),
    ({"up_lr_weight": ",".join(["1"] * 13)}, "up_lr_weight: 13 values given, 12 wanted"),
    ({"mid_lr_weight": "1,1"}, "mid_lr_weight: 2 values given, 1 wanted"),
    ({"mid_lr_weight": "sine"}, "mid_lr_weight: 'sine' is not a number"),
    ({"mid_lr_weight": "-1"}, "mid_lr_weight: -1 is negative"),
    ({"down_lr_weight": "linear+-0.5"}, "down_lr_weight: -0.5 is negative; give 0 or more"),
    ({"down_lr_weight": "cosin+.25"}, "down_lr_weight: 'cosin' is no preset; did you mean cosine"),
    ({"down_lr_weight": "cosine+x"}, "down_lr_weight: 'cosine\\+x' is not a number"),
    ({"block_lr_zero_threshold": "0.1"}, "block_lr_zero_threshold: has no effect without block weights"),
    ({"rank_dropout": "1"}, "rank_dropout: '1' is not a share from 0 to below 1"),
    ({"module_dropout": "-0.1"}, "module_dropout: '-0.1' is not a share"),
    ({"loraplus_lr_ratio": "0"}, "loraplus_lr_ratio: '0' is not a number above 0"),
    ({"seed": "x"}, "seed: 'x' is not a whole number"),
    ({"conv_dims": "4"}, "--network_args: unknown argument 'conv_dims'; did you mean conv_dim"),
    ({"xyz": "4"}, "unknown argument 'xyz'; known are block_alphas, block_dims"),
    ({"block_dims": ",".join(["0"] * 25), "down_lr_weight": "zeros"}, None),
]


@pytest.mark.parametrize(("args", "sentence"), WRONG, ids=[str(args)[:40] for args, _ in WRONG])
def test_wrong_settings_are_named(sd1, args, sentence):
    if sentence is None:
        network = create(sd1, **args)
        assert {target.part for target in network.targets.values()} == {"text_encoder"}
        return
    with pytest.raises(UserError, match=sentence):
        create(sd1, **args)


def test_all_problems_are_told_at_once(sd1):
    with pytest.raises(UserError) as caught:
        create(sd1, conv_dim="x", bloc_dims="1", rank_dropout="2")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"dim": 0}, "--network_dim: 0 is no rank; give a whole number of 1 or more"),
        ({"dim": -2}, "--network_dim: -2 is no rank"),
        ({"alpha": -1.0}, "--network_alpha: -1 is negative"),
    ],
)
def test_wrong_rank_and_alpha_are_named(sd1, given, sentence):
    with pytest.raises(UserError, match=sentence):
        create(sd1, **given)


def test_dropout_is_said_once(sd1):
    with pytest.raises(UserError, match="--network_dropout: is 0.1, but --network_args dropout is 0.2"):
        lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet, neuron_dropout=0.1, dropout="0.2")
    network = lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet, neuron_dropout=0.1, dropout="0.1")
    assert {adapter.dropout for _, adapter in network.items()} == {0.1}


def test_no_layer_left_is_an_error(sd1):
    with pytest.raises(UserError, match="leave no layer to adapt"):
        lora.create_network(1.0, 4, 1, None, None, sd1.unet, down_lr_weight="zeros", mid_lr_weight="0", up_lr_weight="zeros")
