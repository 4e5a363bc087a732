"""Every preset in configs/ is accepted as it stands, does what it says, and gives a reason for each value."""

from pathlib import Path

import pytest

from library.cli.training import parse_training, training_options
from library.dataset.schema import read_dataset_file

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DATASETS = sorted(CONFIGS.glob("dataset_*.toml"))
PRESETS = sorted(set(CONFIGS.glob("*.toml")) - set(DATASETS))


def name(path):
    return path.stem


def parsed(preset):
    command = ["--config_file", preset, "--pretrained_model_name_or_path", "model.safetensors", "--output_dir", "outputs"]
    return parse_training([*map(str, command), "--dataset_config", str(CONFIGS / "dataset_dreambooth.toml")])


def test_the_globs_find_the_files():
    assert len(DATASETS) >= 5
    assert len(PRESETS) >= 7


@pytest.mark.parametrize("preset", PRESETS, ids=name)
def test_a_preset_is_a_run(preset):
    options = training_options(parsed(preset))
    assert options.network.module == "networks.lora"
    assert options.optimizer.learning_rate == 1e-4
    assert options.network.alpha == options.network.dim / 2


@pytest.mark.parametrize("preset", PRESETS, ids=name)
def test_nothing_in_a_preset_is_without_effect(preset):
    assert training_options(parsed(preset)).notes == ()


@pytest.mark.parametrize("dataset", DATASETS, ids=name)
def test_a_dataset_file_is_accepted(dataset):
    file = read_dataset_file(dataset)
    assert all(table.resolution or file.general.resolution for table in file.datasets)


@pytest.mark.parametrize("path", [*PRESETS, *DATASETS], ids=name)
def test_values_have_a_reason(path):
    """Folder and file names, repeats and the module explain themselves."""
    plain = ("image_dir", "metadata_file", "num_repeats", "network_module")
    for line in path.read_text(encoding="utf-8").splitlines():
        key, equals, _ = line.strip().partition(" = ")
        opens_a_list = line.endswith("[")
        if equals and not key.startswith("#") and key not in plain and not opens_a_list:
            assert " # " in line, f"{path.name}: {line.strip()}"
