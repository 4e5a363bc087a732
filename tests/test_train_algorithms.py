"""train_network.py with the other algorithms: the documentation's DyLoRA, and options that change how adapters train."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.families.detect import FAMILIES
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from networks import lora
from networks.registry import NETWORK_MODULES
from tests.support.command_lines import assert_refused, dataset_file, draw_images, run_script, train_here
from tests.support.tiny_models import build_tiny_parts

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("algorithms")
    return dataset_file(
        folder / "dataset.toml", draw_images(folder / "images", 4), dataset="resolution = 64\nbatch_size = 2"
    )


@pytest.fixture(params=["tiny_sd1_folder", "tiny_sd2_folder", "tiny_sdxl_folder"])
def base(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def train(capsys, tmp_path, tiny_sd1_folder, dataset):
    """Runs a short training with the words of a command line; returns how it ended and the file it should have written."""

    def run(words: str, *options: object, base=tiny_sd1_folder, name: str = "trained", steps: int = 2):
        finished = train_here(
            capsys,
            *("--pretrained_model_name_or_path", base, "--dataset_config", dataset),
            *("--output_dir", tmp_path, "--output_name", name, "--max_train_steps", steps, "--seed", 5),
            *("--max_data_loader_n_workers", 0, "--learning_rate", 1e-2, *shlex.split(words), *options),
        )
        return finished, tmp_path / f"{name}.safetensors"

    return run


def losses(finished) -> list[str]:
    return re.findall(r"loss (\S+)", finished.out)


def test_the_documentations_dylora_is_trained_and_cut(train, base, tmp_path):
    finished, path = train('--network_module=network.dylora --network_dim=16 --network_args "unit=4"', base=base)
    finished.require_success()
    assert "of DyLoRA, rank 16" in finished.out
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "network.dylora"
    assert json.loads(metadata["ss_network_args"]) == {"unit": "4"}
    assert {len(tensor) for key, tensor in load_file(path).items() if "lora_down" in key} == {16}
    words = f'--model "{path}" --save_to "{tmp_path}/dylora-model-split.safetensors" --unit 4'
    run_script("networks/extract_lora_from_dylora.py", *shlex.split(words)).require_success()
    assert len(list(tmp_path.glob("dylora-model-split-00*.safetensors"))) == 4


def test_dylora_without_unit_and_with_convolutions(train):
    finished, path = train('--network_module=network.dylora --network_dim=3 --network_args "conv_dim=2"')
    finished.require_success()
    shapes = {tuple(tensor.shape[2:]): len(tensor) for key, tensor in load_file(path).items() if "lora_down" in key}
    assert shapes == {(): 3, (1, 1): 3, (3, 3): 2}
    refused, _ = train('--network_module=network.dylora --network_dim=10 --network_args "unit=4"')
    assert_refused(refused, "rank 10 is no multiple of unit 4")


def test_dylora_computes_the_same_with_gradient_checkpointing(train):
    words = '--network_module networks.dylora --network_dim 8 --network_args "unit=2" "module_dropout=0.1"'
    plain, first = train(words, steps=4)
    again, second = train(words, "--gradient_checkpointing", steps=4, name="again")
    assert losses(plain)
    assert losses(plain) == losses(again)
    one, other = load_file(first), load_file(second)
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)


@pytest.mark.parametrize("module", ["networks.dylora", "networks.lokr"])
def test_a_training_goes_on_from_its_file(train, module):
    words = f"--network_module {module} --network_dim 4"
    _, first = train(words)
    for number, way in enumerate(("", "--dim_from_weights")):
        finished, second = train(
            f"{words} {way} --network_weights '{first}' --learning_rate 1e-9", name=f"second{number}", steps=1
        )
        finished.require_success()
        before, after = load_file(first), load_file(second)
        assert before.keys() == after.keys()
        assert all(torch.allclose(after[key], before[key], rtol=1e-3, atol=1e-5) for key in before)


NORM = 0.02


@pytest.mark.parametrize(("module", "family"), [("networks.dylora", SD1), ("networks.loha", SD2), ("networks.full", SD1)])
def test_the_norm_of_every_layers_change_is_held_down(train, module, family, request):
    base = request.getfixturevalue(f"tiny_{family.name}_folder")
    words = f"--network_module {module} --network_dim 4 --learning_rate 0.05"
    _, free = train(words, base=base)
    finished, held = train(f"{words} --scale_weight_norms {NORM}", base=base, name="held")
    finished.require_success()
    parts = build_tiny_parts(family)

    def largest_norm(path) -> float:
        network, _ = lora.create_network_from_weights(1.0, path, None, parts["text_encoder"], parts["unet"])
        return max(adapter.delta_norm(target.layer.weight).item() for target, adapter in network.items())

    assert largest_norm(free) > 2 * NORM, "without the option some layer goes further, or this test says nothing"
    assert 0.9 * NORM < largest_norm(held) < 1.01 * NORM


def test_dropout_of_the_command_line_acts_where_there_are_neurons(train):
    words = "--network_module networks.dylora --network_dim 4"
    plain, _ = train(words, steps=4)
    dropping, path = train(f"{words} --network_dropout 0.5", steps=4, name="dropping")
    assert losses(dropping) != losses(plain)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["ss_network_args"]) == {"dropout": "0.5"}
    refused, _ = train("--network_module networks.loha --network_dropout 0.5")
    assert_refused(refused, "--network_dropout: LoHa has no neurons to drop")


FORMS = {
    "LoRA": "networks.lora --network_dim 4",
    "DyLoRA": 'networks.dylora --network_dim 4 --network_args "unit=2"',
    "LoHa": 'networks.loha --network_dim 2 --network_args "conv_dim=2" "use_tucker=True"',
    "LoKr": 'networks.lokr --network_dim 2 --network_args "factor=4" "decompose_both=True"',
    "GLoRA": "networks.glora --network_dim 2",
    "(IA)3": "networks.ia3",
    "OFT": 'networks.oft --network_dim 4 --network_args "constraint=0.01"',
    "BOFT": "networks.boft --network_dim 8",
    "Full": 'networks.full --network_args "preset=unet-only" "train_norm=True"',
}


def test_every_module_is_trained_below():
    assert {words.split()[0] for words in FORMS.values()} == set(NETWORK_MODULES)


@pytest.mark.parametrize("title", FORMS)
def test_every_algorithm_is_trained_saved_and_read(train, title, base):
    finished, path = train(f"--network_module {FORMS[title]}", base=base)
    finished.require_success()
    with safe_open(path, "pt") as file:
        variants = json.loads(file.metadata()["ss_network_variants"])
    assert sum(count for variant, count in variants.items() if variant.startswith(title)) > 50
    family = next(family for family in FAMILIES if base.name == f"tiny_{family.name}")
    parts = build_tiny_parts(family)
    encoders = [parts[encoder.part] for encoder in family.text_encoders]
    network, _ = lora.create_network_from_weights(1.0, path, None, encoders, parts["unet"])
    assert len(network.targets) == sum(variants.values())
    changes = [adapter.delta_weight(target.layer.weight).abs().max() for target, adapter in network.items()]
    assert sum(change > 0 for change in changes) > 0.9 * len(changes), "two steps have moved nearly all layers"


def test_the_metadata_tell_the_files_rank_where_it_is_not_the_trained_one(train):
    finished, path = train('--network_module networks.lora --network_dim 4 --network_alpha 2 --network_args "init=pissa"')
    finished.require_success()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "4.0")
    tensors = load_file(path)
    assert {len(tensor) for key, tensor in tensors.items() if "lora_down" in key} == {8}
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")} == {4.0}
