"""The metadata of a saved file: texts throughout, as other programs parse them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from library.cli.training import parse_training, training_options
from library.errors import UserError
from library.training.metadata import RunFacts, base_model_metadata, thumbnail_url, training_metadata


@pytest.fixture
def options():
    def build(*more: str):
        argv = "--pretrained_model_name_or_path m --output_dir o --network_module networks.lora --dataset_config d.toml"
        return training_options(parse_training([*argv.split(), *more]))

    return build


FACTS = RunFacts(
    session_id=1,
    started_at=2.5,
    seed=3,
    base_model_version="sd_v2_v",
    is_v2=True,
    base_model={"ss_sd_model_name": "m"},
    dataset={"ss_dataset_dirs": "{}"},
    optimizer="torch.optim.adamw.AdamW()",
    network_dim=4,
    network_alpha=1.0,
    total_steps=10,
    total_epochs=2,
    batches_per_epoch=5,
    train_samples=20,
    regularisation_samples=7,
)


def test_every_value_is_text_as_sd_scripts_writes_it(options):
    metadata = training_metadata(options("--learning_rate", "1e-5"), FACTS, step=5, epochs=1, finished_at=9.0)
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_learning_rate"] == "1e-05"
    assert metadata["ss_v2"] == "True"
    assert metadata["ss_unet_lr"] == "None"
    assert metadata["ss_steps"] == "5"
    assert metadata["ss_num_reg_images"] == "7"
    assert "ss_network_args" not in metadata


def test_network_arguments_are_json_of_texts_with_the_dropout(options):
    metadata = training_metadata(
        options("--network_args", "conv_dim=4", "--network_dropout", "0.1"), FACTS, step=1, epochs=0, finished_at=9.0
    )
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "4", "dropout": "0.1"}


def test_a_checkpoint_is_known_by_both_its_hashes(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(2**20) + b"x" * 2**16)
    metadata = base_model_metadata(path, None)
    assert metadata["ss_sd_model_name"] == "model.safetensors"
    assert len(metadata["ss_sd_model_hash"]) == 8
    assert len(metadata["ss_new_sd_model_hash"]) == 64
    assert base_model_metadata(tmp_path, None) == {"ss_sd_model_name": tmp_path.name}


def test_a_thumbnail_becomes_a_data_url(tmp_path):
    path = tmp_path / "small.png"
    path.write_bytes(b"png")
    assert thumbnail_url(str(path)) == "data:image/png;base64," + base64.b64encode(b"png").decode()
    assert thumbnail_url("data:image/png;base64,AA") == "data:image/png;base64,AA"
    with pytest.raises(UserError, match="neither an image file nor a data URL"):
        thumbnail_url(str(Path(tmp_path / "none.png")))
