"""The check as a user runs it: its lines, its last line and its exit status."""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.families.sd1 import SD1
from networks.check_lora_weights import work
from networks.tools.checking import measure_layer
from tests.support.command_lines import assert_refused, run_script
from tests.support.tiny_models import build_tiny_parts

METADATA = {"ss_base_model_version": "sd_v1", "ss_network_dim": "4"}


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Write a file of any algorithm whose layers act, for the tiny SD1."""
    parts = build_tiny_parts(SD1)

    def save(name, **arguments):
        module = importlib.import_module(f"networks.{name}")
        network = module.create_network(1.0, 4, 2, None, parts["text_encoder"], parts["unet"], **arguments)
        stream = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
        path = tmp_path_factory.mktemp("files") / f"{name}.safetensors"
        network.save_weights(path, None, METADATA)
        return path

    return save


@pytest.fixture(scope="module")
def lora(save):
    return save("lora", conv_dim="2", conv_alpha="1")


def checked(capsys, *arguments):
    capsys.readouterr()
    status = work([str(argument) for argument in arguments])
    return status, capsys.readouterr().out.splitlines()


def test_first_come_the_tensors_as_sd_scripts_shows_them(lora, capsys):
    status, lines = checked(capsys, lora)
    tensors = load_file(lora)
    weights = [key for key in tensors if not key.endswith("alpha")]
    assert status == 0
    assert lines[0] == f"number of LoRA tensors: {len(weights)}"
    rows = {line.split(",")[0]: line.split(",")[1:] for line in lines[1 : len(weights) + 1]}
    assert rows.keys() == set(weights)
    key = "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"
    shape, mean, smallest = rows[key]
    assert shape == "(2-32-3-3)"
    assert float(mean) == pytest.approx(float(tensors[key].abs().mean()))
    assert float(smallest) == pytest.approx(float(tensors[key].abs().min()))


def test_all_keys_are_shown_once_on_demand(lora, capsys):
    _, lines = checked(capsys, lora, "-s")
    count = len(load_file(lora))
    assert lines[1] == f"number of all tensors: {count}"
    keys = [line.split(",")[0] for line in lines[2 : count + 2]]
    assert sorted(keys) == sorted(load_file(lora))


def test_then_the_layers_by_place_and_who_reads_them(lora, capsys):
    _, lines = checked(capsys, lora)
    report = lines[lines.index("") + 1 :]
    assert report[0] == "Stable Diffusion 1.x: 295 layers (LoRA 295), kohya's names"
    assert [word for word in report[2].split("  ") if word][0] == "text encoder"
    assert sum(line.startswith("block ") for line in report) == 24
    assert "ranks differ by layer: 4 in 245 layers, 2 in 50 layers" in report
    assert "alphas differ by layer: 2 in 245 layers, 1 in 50 layers" in report
    assert any(line.startswith("A1111 1.10.1") and line.endswith("applies 295 of 295 layers rightly") for line in report)
    assert report[-1].startswith("read rightly by ComfyUI, A1111, Forge, SD.Next, diffusers, LyCORIS")


def test_every_layer_on_demand(lora, capsys):
    _, lines = checked(capsys, lora, "--every_layer")
    row = next(line for line in lines if line.startswith("lora_unet_down_blocks_0_resnets_0_conv1 "))
    assert row.split()[:6] == ["lora_unet_down_blocks_0_resnets_0_conv1", "block", "1", "LoRA", "2", "1"]


@pytest.mark.parametrize("name", ["loha", "lokr", "glora", "ia3", "oft", "boft", "full"])
def test_every_algorithm_is_shown(name, save, capsys):
    path = save(name)
    status, lines = checked(capsys, path)
    title = importlib.import_module(f"networks.{name}").ALGORITHM.adapter.title
    assert status == 0
    assert any(f"layers ({title} " in line for line in lines)
    assert not any(line.startswith("unreadable") for line in lines)
    assert "diffusers would refuse it" in lines[-1]


@torch.no_grad()
def test_norm_and_effective_rank_are_those_of_the_change():
    stream = torch.Generator().manual_seed(1)
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {
        "lora_down.weight": torch.randn(4, 32, 1, 1, generator=stream),
        "lora_up.weight": torch.randn(32, 4, 1, 1, generator=stream),
        "alpha": torch.tensor(2.0),
    }
    measure = measure_layer(name, tensors, SD1)
    delta = 0.5 * tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)
    assert measure.norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert 1 < measure.effective_rank <= 4
    assert (measure.place, measure.rank, measure.alpha) == ("block 1", 4, 2.0)
    broken = measure_layer(name, tensors | {"lora_mid.weight": torch.ones(3, 3)}, SD1)
    assert broken.fault is not None


def test_values_that_are_not_finite_end_with_status_1(lora, tmp_path, capsys):
    tensors = load_file(lora)
    key = "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"
    tensors[key][0, 0] = float("nan")
    save_file(tensors, tmp_path / "bad.safetensors", METADATA)
    status, lines = checked(capsys, tmp_path / "bad.safetensors")
    assert status == 1
    assert lines[-1] == f"1 tensor with values that are not finite ({key})"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda up: None, "has lora_down.weight without lora_up.weight"),
        (lambda up: torch.zeros(len(up), 7, 1, 1), "does not fit: lora_up.weight is"),
        (lambda up: up.to(torch.int32), "has whole numbers for weights: lora_up.weight (int32)"),
    ],
)
def test_tensors_that_make_no_layer_are_named_and_end_with_status_1(change, fault, lora, tmp_path, capsys):
    tensors = load_file(lora)
    layer = "lora_unet_down_blocks_0_resnets_0_conv1"
    changed = change(tensors.pop(f"{layer}.lora_up.weight"))
    kept = tensors if changed is None else tensors | {f"{layer}.lora_up.weight": changed}
    save_file(kept, tmp_path / "bad.safetensors", METADATA)
    status, lines = checked(capsys, tmp_path / "bad.safetensors")
    assert status == 1
    assert any(line.startswith(f"unreadable: {layer}: {fault}") for line in lines)
    assert lines[-1] == f"1 layer that cannot be read ({layer})"


def test_other_layouts_are_read_too(tmp_path, capsys):
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{layer}.lora_A.weight": torch.ones(4, 768), f"{layer}.lora_B.weight": torch.ones(320, 4)}
    save_file(tensors, tmp_path / "peft.safetensors")
    _, lines = checked(capsys, tmp_path / "peft.safetensors")
    assert lines[0] == "number of LoRA tensors: 2"
    assert lines[4] == "Stable Diffusion 1.x: 1 layer (LoRA 1), PEFT's names of attention layers"
    assert lines[-1].startswith("read rightly by diffusers; ComfyUI drops every layer")


def test_wrong_files_are_refused_in_a_sentence(tiny_sd1_file, tmp_path):
    script = "networks/check_lora_weights.py"
    assert_refused(run_script(script, "nothing.safetensors", cwd=tmp_path), "nothing.safetensors: no such file")
    (tmp_path / "text.safetensors").write_text("no tensors at all, only words")
    assert_refused(run_script(script, tmp_path / "text.safetensors"), "is a text file, not a tensor file")
    assert_refused(run_script(script, tiny_sd1_file), "is a Stable Diffusion 1.x checkpoint, not an adapter")


FAULTS = {
    "a layer that no model has": (
        "drops 1 of",
        {"lora_unet_xx_0_to_k": {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2)}},
    ),
    "an alpha of two numbers": ("would refuse it (tensors that do not go together)", {"": {"alpha": (2,)}}),
    "no rank": ("would refuse it (tensors that do", {"": {"lora_down.weight": (0, 32), "lora_up.weight": (32, 0)}}),
    "two ranks": ("would refuse it (tensors that do", {"": {"lora_down.weight": (3, 32)}}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_program_can_use_is_read_rightly_by_none(fault, lora, tmp_path, capsys):
    sentence, changes = FAULTS[fault]
    tensors = load_file(lora)
    first = next(iter(tensors)).partition(".")[0]
    for layer, shapes in changes.items():
        tensors |= {f"{layer or first}.{name}": torch.rand(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "faulty.safetensors", {"ss_base_model_version": "sd_v1"})
    _, lines = checked(capsys, tmp_path / "faulty.safetensors")
    (told,) = (line for line in lines if line.startswith("read rightly by"))
    assert told.startswith("read rightly by none of the programs known here")
    assert f"ComfyUI {sentence}" in told
