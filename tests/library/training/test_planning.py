"""What is wrong with a run is found before anything is loaded, and all of it at once."""

from __future__ import annotations

import pytest

from library.cli.training import parse_training, training_options
from library.errors import UserError
from library.training.planning import plan_run


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
