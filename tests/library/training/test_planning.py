"""What is wrong with a run is found before anything is loaded, and all of it at once."""

from __future__ import annotations

import pytest

from library.cli.training import parse_training, training_options
from library.errors import UserError
from library.families.sd1 import SD1
from library.training import preparation
from library.training.planning import plan_run

REQUIRED = ("--pretrained_model_name_or_path=model", "--train_data_dir=data", "--resolution=512", "--output_dir=out")


def test_mistakes_of_different_rooms_are_named_together(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --q 1\n")
    command = {
        "pretrained_model_name_or_path": tmp_path / "no_model.safetensors",
        "train_data_dir": tmp_path / "no_pictures",
        "resolution": 512,
        "network_module": "networks.lroa",
        "sample_prompts": prompts,
        "output_dir": tmp_path,
    }
    options = training_options(parse_training([f"--{name}={value}" for name, value in command.items()]))
    with pytest.raises(UserError) as refused:
        plan_run(options)
    sentences = str(refused.value).splitlines()
    assert len(sentences) == 4
    for sentence, part in zip(sentences, ("networks.lroa", "no_model.safetensors", "no_pictures", "--q"), strict=True):
        assert part in sentence


@pytest.mark.parametrize(
    ("module", "arguments", "rests"),
    [
        ("networks.lora", (), False),
        ("networks.lora", ("--network_args", "module_dropout=0.1"), True),
        ("networks.lora", ("--clip_skip", "2"), True),
        ("networks.dylora", ("--network_args", "unit=2"), True),
        ("networks.lora", ("--network_args", "network_reg_algos=attn2=dylora"), True),
        ("networks.lora", ("--network_args", "network_reg_algos=attn2=loha"), False),
        ("networks.lroa", (), True),
    ],
)
def test_ddp_is_told_where_parameters_have_no_part_in_a_step(module, arguments, rests):
    options = training_options(parse_training([f"--network_module={module}", *REQUIRED, *arguments]))
    assert preparation.adapters_may_rest(options, SD1.text_encoders) == rests


def test_of_other_packages_modules_it_is_not_known(tmp_path, monkeypatch):
    (tmp_path / "rests_perhaps.py").write_text("def create_network(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = training_options(parse_training(["--network_module=rests_perhaps", *REQUIRED]))
    assert preparation.adapters_may_rest(options, SD1.text_encoders)


class TakesOneRate:
    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr):
        return [{"params": [], "lr": text_encoder_lr}]


class TakesOneForEach(TakesOneRate):
    def prepare_optimizer_params_with_multiple_te_lrs(self, text_encoder_lr, unet_lr, default_lr):
        return [{"params": [], "lr": rate} for rate in text_encoder_lr]


def test_other_packages_modules_get_as_many_rates_as_they_take(tmp_path, monkeypatch):
    (tmp_path / "takes_rates.py").write_text("def create_network(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)

    def rates_of(network, *rates: str) -> list[float]:
        command = ["--network_module=takes_rates", *REQUIRED, "--text_encoder_lr", *rates]
        groups, _ = preparation.optimizer_groups(network, training_options(parse_training(command)))
        return [group["lr"] for group in groups]

    assert rates_of(TakesOneRate(), "1e-4") == rates_of(TakesOneRate(), "1e-4", "1e-4") == [1e-4]
    assert rates_of(TakesOneForEach(), "1e-4", "2e-4") == [1e-4, 2e-4]
    with pytest.raises(UserError, match="--text_encoder_lr 0.0001 0.0002: takes_rates takes one rate for all text encoders"):
        rates_of(TakesOneRate(), "1e-4", "2e-4")


def test_the_sampler_of_previews_may_have_its_name_in_web_uis():
    command = [*REQUIRED, "--network_module=networks.lora", "--sample_sampler"]
    options = training_options(parse_training([*command, "DPM++ 2M Karras"]))
    assert options.previews.sampler == "dpmsolver++_karras"
    with pytest.raises(UserError, match=r"--sample_sampler: no sampler is called 'eular'; did you mean euler"):
        training_options(parse_training([*command, "eular"]))
