"""Which layers get an adapter and with which settings: presets, patterns, rules, and LyCORIS' preset files."""

from __future__ import annotations

import pytest

from library.errors import UserError, UserErrors
from networks import lora
from networks.building.presets import PRESETS


def make(models, **network_args):
    return lora.create_network(1.0, 4, 2, None, models.text_encoder, models.unet, **network_args)


def paths(network, part="denoiser"):
    return {target.path for target in network.targets.values() if target.part == part}


def kinds(network, part="denoiser"):
    """The last words of the layers' paths."""
    return {path.removesuffix(".0").rpartition(".")[2] for path in paths(network, part)}


ATTENTION = {"to_q", "to_k", "to_v", "to_out"}
TRANSFORMER = ATTENTION | {"proj_in", "proj_out", "proj", "2"}
BLOCKS = {"conv1", "conv2", "time_emb_proj", "conv_shortcut", "conv"}
TEXT_ATTENTION = {"q_proj", "k_proj", "v_proj", "out_proj"}


@pytest.mark.parametrize(
    ("preset", "unet", "text_encoder"),
    [
        ("attn-mlp", TRANSFORMER, TEXT_ATTENTION | {"fc1", "fc2"}),
        ("attn-only", ATTENTION, TEXT_ATTENTION),
        (
            "full",
            TRANSFORMER | BLOCKS | {"conv_in", "conv_out", "linear_1", "linear_2"},
            TEXT_ATTENTION | {"fc1", "fc2"},
        ),
        (
            "full-lin",
            TRANSFORMER | {"time_emb_proj", "conv_shortcut", "linear_1", "linear_2"},
            TEXT_ATTENTION | {"fc1", "fc2"},
        ),
        ("unet-only", TRANSFORMER | BLOCKS | {"conv_in", "conv_out", "linear_1", "linear_2"}, set()),
        ("unet-transformer-only", TRANSFORMER, set()),
        ("unet-convblock-only", BLOCKS | {"conv_in", "conv_out"}, set()),
        ("ia3", {"to_k", "to_v", "2"}, {"k_proj", "v_proj", "fc2"}),
    ],
)
def test_what_a_preset_takes(sd1, preset, unet, text_encoder):
    network = make(sd1, preset=preset)
    assert (kinds(network), kinds(network, "text_encoder")) == (unet, text_encoder)


def test_every_preset_is_listed_above():
    listed = next(mark for mark in test_what_a_preset_takes.pytestmark if mark.name == "parametrize").args[1]
    assert {row[0] for row in listed} == set(PRESETS)


def test_a_preset_with_convolutions_gives_them_the_networks_rank(sd1):
    network = make(sd1, preset="full")
    assert {(adapter.rank, adapter.scale) for _, adapter in network.items()} == {(4, 0.5)}
    ranks = {target.spec.is_wide: adapter.rank for target, adapter in make(sd1, preset="full", conv_dim=2).items()}
    assert ranks == {False: 4, True: 2}


def test_patterns_leave_layers_out_and_take_others_in(sd1):
    network = make(sd1, exclude_patterns="attn1,ff\\.net", include_patterns="unet.*attn1.to_q", conv_dim=3)
    assert not any("ff.net" in path for path in paths(network))
    assert {path.rpartition(".")[2] for path in paths(network) if "attn1" in path} == {"to_q"}
    assert "conv_in" not in paths(network)
    assert "conv_in" in paths(make(sd1, include_patterns="['conv_in']", conv_dim=3))


def test_ranks_alphas_and_rates_by_pattern(sd1):
    network = make(
        sd1, network_reg_dims="attn2=8,attn=2", network_reg_alphas="attn2.*to_k=4", network_reg_lrs="mid_block=1e-5,fc1=0"
    )
    for target, adapter in network.items():
        rank = 8 if "attn2" in target.path else 2 if "attn" in target.path else 4
        alpha = 4 if "attn2" in target.path and "to_k" in target.path else 2
        assert (adapter.rank, adapter.scale) == (rank, alpha / rank), target.path
    assert not any("fc1" in path for path in paths(network, "text_encoder")), "rate 0 makes no module"
    groups, names = network.prepare_optimizer_params(1e-4, 1e-3, None)
    assert dict(zip(names, (group["lr"] for group in groups), strict=True)) == {
        "textencoder": 1e-4,
        "unet_lr0.001": 1e-3,
        "unet_lr1e-05": 1e-5,
    }
    rows = {row.block: row for row in network.describe() if row.part == "denoiser"}
    assert rows[12].learning_rates == (1e-5,)
    assert rows[1].learning_rates == (1e-3,)
    assert rows[1].ranks == (2, 4, 8)


def test_a_frozen_part_stays_frozen_whatever_the_rules_say(sd1):
    network = make(sd1, network_reg_lrs="self_attn=1e-5")
    _, names = network.prepare_optimizer_params(0, 1e-3, None)
    assert names == ["unet"]


def test_a_rank_of_zero_by_pattern_makes_no_module(sd1):
    assert not any("attn2" in path for path in paths(make(sd1, network_reg_dims="attn2=0")))


@pytest.mark.parametrize(
    ("network_args", "sentence"),
    [
        ({"preset": "atn-mlp"}, r"--network_args preset: 'atn-mlp' is no preset; did you mean attn-mlp"),
        ({"exclude_patterns": "atn2"}, r"exclude_patterns: 'atn2' matches none of the \d+ layers; did you mean attn"),
        ({"network_reg_dims": "unet.*to_kk=4"}, r"network_reg_dims: 'unet\.\*to_kk' matches none .*; did you mean to_k"),
        ({"network_reg_dims": "to_k=4.5"}, r"network_reg_dims: '4\.5' is not a whole number"),
        ({"network_reg_dims": "to_k"}, r"network_reg_dims: 'to_k' is not pattern=value"),
        ({"network_reg_lrs": "to_k=-1"}, r"network_reg_lrs: '-1' is not 0 or more"),
        ({"network_reg_algos": "to_k=lhoa"}, r"network_reg_algos: 'lhoa' is no algorithm; did you mean lora or loha"),
        ({"network_reg_algos": "norm1=norm"}, r"norms are not chosen by pattern; use train_norm=True"),
        ({"include_patterns": "conv_in"}, r"include_patterns: 'conv_in' matches only layers without a rank; give conv_dim"),
        ({"include_patterns": "(conv_in"}, r"'\(conv_in' is no regular expression"),
        ({"include_patterns": "['conv_in'"}, r"'\['conv_in'' is no list of patterns"),
        ({"train_norm": "maybe"}, r"train_norm: 'maybe' is not True or False"),
    ],
)
def test_wrong_selections_are_one_sentence(sd1, network_args, sentence):
    with pytest.raises((UserError, UserErrors), match=sentence):
        make(sd1, **network_args)


TAKES = 'unet_target_module = ["Attention"]\n'

PRESET_FILE = """
enable_conv = true
unet_target_module = ["Transformer2DModel"]
unet_target_name = ["conv_in", "mid_block.resnets"]
text_encoder_target_module = []
text_encoder_target_name = [".*fc1"]
exclude_name = [".*attn1"]
[module_algo_map.FeedForward]
dim = 2
[name_algo_map.".*to_out"]
algo = "lora"
alpha = 1
dora_wd = true
dropout = 0.25
"""


def test_a_preset_file_of_lycoris(sd1, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(PRESET_FILE)
    network = make(sd1, preset=str(file))
    assert kinds(network, "text_encoder") == {"fc1"}
    assert "conv_in" in paths(network)
    assert any(path.startswith("mid_block.resnets") for path in paths(network))
    assert not any("attn1" in path or path.startswith("down_blocks.0.resnets") for path in paths(network))
    for target, adapter in network.items():
        assert adapter.rank == (2 if ".ff." in target.path else 4)
        assert ("dora_scale" in adapter.tensors()) == ("to_out" in target.path)
        assert adapter.dropout == (0.25 if "to_out" in target.path else 0)


def test_globs_in_a_preset_file(sd1, tmp_path):
    file = tmp_path / "globs.toml"
    file.write_text('use_fnmatch = true\nunet_target_name = ["*attn2.to_?"]')
    assert kinds(make(sd1, preset=str(file))) == {"to_q", "to_k", "to_v"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("unet_target_modul = []", "unknown key 'unet_target_modul'; did you mean unet_target_module"),
        ("enable_conv = 3", "enable_conv is 3, not a bool"),
        ('unet_target_name = ["("]', r"'\(' is no regular expression"),
        ("[name_algo_map]\nto_k = 3", "to_k.*is 3, not a table of settings"),
        ('[name_algo_map.to_k]\nalgo = "lora"\ndimm = 4', "unknown key 'dimm'; did you mean dim"),
        ('[name_algo_map.to_k]\nalgo = "lorra"', "'lorra' is no algorithm; did you mean lora"),
        ("unet_target_name = [", "is not valid TOML"),
        ('exclude_name = ["conv_in"]', "the preset chooses none of the model's"),
        (
            'unet_target_name = ["conv_in", "nothing.*"]',
            r"unet_target_name: 'nothing\.\*' matches none of the \d+ layers; known",
        ),
        ('unet_target_name = ["conv_inn"]', r"'conv_inn' matches none of the \d+ layers; did you mean conv_in"),
        ("unet_target_name = [3]", "unet_target_name holds 3, which is no name"),
        ('unet_target_module = ["Attentio", "DiTBlock"]', "'Attentio', 'DiTBlock' match none of .*; did you mean Attention"),
        (TAKES + 'exclude_name = ["zzz"]', "exclude_name: 'zzz' matches none of the"),
        (TAKES + "[module_algo_map.Attentio]\ndim = 2", "'Attentio' matches none of .*; did you mean Attention"),
        (
            TAKES + '[module_algo_map.Attention]\nalgo = "lora"\ndim = 2.5',
            "map.Attention, dim: '2.5' is not a whole number of 0",
        ),
        (TAKES + '[module_algo_map.Attention]\ndim = "abc"', "module_algo_map.Attention, dim: 'abc' is not a number"),
        (TAKES + '[module_algo_map.Attention]\nalpha = "x"', "module_algo_map.Attention, alpha: 'x' is not a number"),
        (TAKES + "[module_algo_map.Attention]\nalpha = -1", "module_algo_map.Attention, alpha: '-1' is not 0 or more"),
        (TAKES + '[module_algo_map.Attention]\nalgo = "norm"', "norms are not chosen by pattern; use train_norm=True"),
        (TAKES + '[module_algo_map.Attention]\nalgo = "lora"\ndora_wd = 7', "Attention, dora_wd: '7' is not True or False"),
        (
            TAKES + '[name_algo_map."down_blocks.*to_kk"]\ndim = 2',
            r"'down_blocks\.\*to_kk' matches none .*; did you mean to_k",
        ),
        (TAKES + '[name_algo_map."attn"]\ndim = "abc"', "name_algo_map.attn, dim: 'abc' is not a number"),
    ],
)
def test_wrong_preset_files_are_one_sentence(sd1, tmp_path, content, sentence):
    file = tmp_path / "wrong.toml"
    file.write_text(content)
    with pytest.raises(UserError, match=sentence):
        make(sd1, preset=str(file))


def test_every_mistake_in_a_preset_file_is_told_at_once(sd1, tmp_path):
    file = tmp_path / "wrong.toml"
    file.write_text(
        'unet_target_name = ["(", ")"]\n[name_algo_map."to_k"]\ndim = "x"\nalpha = "y"\n[module_algo_map]\nA = 3'
    )
    with pytest.raises(UserErrors) as caught:
        make(sd1, preset=str(file))
    assert len(str(caught.value).splitlines()) == 5


def test_a_list_of_classes_may_have_other_models_classes(sd1, tmp_path):
    file = tmp_path / "many.toml"
    file.write_text('unet_target_module = ["HunYuanDiTBlock", "Attention", "WanAttentionBlock"]')
    assert kinds(make(sd1, preset=str(file))) == ATTENTION


def test_a_preset_file_may_be_about_a_part_that_is_not_trained(sd1, tmp_path, caplog):
    file = tmp_path / "both.toml"
    lists = TAKES + 'text_encoder_target_module = ["CLIPMLP"]\ntext_encoder_target_name = [".*q_proj"]\n'
    file.write_text(lists + '[name_algo_map.".*fc1"]\ndim = 2')
    network = lora.create_network(1.0, 4, 2, None, None, sd1.unet, preset=str(file))
    assert kinds(network) == ATTENTION
    assert len(caplog.messages) == 1
    assert "name_algo_map: '.*fc1' matches none of the" in caplog.text


def test_a_missing_preset_file_is_named(sd1):
    with pytest.raises(UserError, match="nowhere.toml: no such file"):
        make(sd1, preset="nowhere.toml")
