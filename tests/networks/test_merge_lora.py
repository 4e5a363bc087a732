"""Merging adapters as a user does it: into models and into one, of every algorithm, and what is refused."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints import atomic
from library.checkpoints.base_model import open_base_model
from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_writing import write_tensors
from library.cli.doors import run_door
from library.families.block_weights import PLACES, place_of, read_block_weights
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from networks.formats.base_weights import BaseWeights
from networks.formats.file_adapters import stream_layers
from networks.merge_lora import work
from networks.tools.conversion import SourceLayer
from tests.support.command_lines import (
    ENVIRONMENT,
    ROOT,
    Finished,
    assert_is_another_picture,
    assert_refused,
    run_script,
)
from tests.support.tiny_models import build_tiny_parts

FILES = {
    "lora": {"conv_dim": "2", "conv_alpha": "1"},
    "lora dora": {"dora_wd": "True", "wd_on_output": "True"},
    "loha": {"conv_dim": "2"},
    "lokr": {"factor": "4"},
    "full": {"train_norm": "True"},
    "glora": {},
    "ia3": {},
    "oft": {},
    "boft": {},
}
OF_THE_BASE = ("lora dora", "glora", "ia3", "oft", "boft")
METADATA = {"ss_base_model_version": "sd_v1", "modelspec.title": "of a test"}


def make_adapter(path: Path, name: str, parts, *, seed: int = 1, rank: int = 4, metadata=METADATA) -> Path:
    """A file of an algorithm whose layers act."""
    module = importlib.import_module(f"networks.{name.split()[0]}")
    network = module.create_network(1.0, rank, 2, None, parts["text_encoder"], parts["unet"], **FILES[name])
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
    network.save_weights(path, None, metadata)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files by a name in `FILES` and a seed; made when asked for."""
    folder, parts = tmp_path_factory.mktemp("adapters"), build_tiny_parts(SD1)

    def file(name: str, seed: int = 1, rank: int = 4) -> Path:
        path = folder / f"{name.replace(' ', '_')}-{seed}-{rank}.safetensors"
        return path if path.exists() else make_adapter(path, name, parts, seed=seed, rank=rank)

    return file


@pytest.fixture(scope="module")
def sd2_adapter(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sd2") / "sd2.safetensors"
    return make_adapter(path, "lora", build_tiny_parts(SD2), metadata={"ss_base_model_version": "sd_v2"})


def run(capsys, *arguments: object) -> Finished:
    capsys.readouterr()
    status = run_door("merge_lora", work, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Finished(status, captured.out, captured.err)


@torch.no_grad()
def changes_of(path: Path, base: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(layer, "weight" or "bias") -> change, fp64, of any adapter file; what is zero is left out."""
    model = BaseWeights(open_base_model(base))
    found = {}
    for name, tensors in stream_layers(open_tensor_file(path), SD1):
        layer = SourceLayer.read(name, tensors, SD1, model)
        bias = layer.known_adapter().delta_bias()
        found[name, "weight"] = layer.delta().double().flatten()
        if bias is not None and bias.any():
            found[name, "bias"] = bias.double()
    return {key: change for key, change in found.items() if change.any()}


def weighted_sum(changes, ratios):
    """The sum of several files' changes; a ratio is a number, or a function of a layer."""
    total: dict[tuple[str, str], torch.Tensor] = {}
    for each, ratio in zip(changes, ratios, strict=True):
        for key, change in each.items():
            factor = ratio(key[0]) if callable(ratio) else ratio
            if factor:
                total[key] = total.get(key, 0) + factor * change
    return total


def assert_same_changes(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for key, change in expected.items():
        assert (found[key] - change).norm() <= tolerance * change.norm() + 1e-7, key


def tensors_of(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    model = open_base_model(path)
    return {(kind, name): source.read() for kind, part in model.parts.items() for name, source in part.sources.items()}


def assert_model_is(path: Path, base: Path, expected) -> None:
    """Every tensor is the base's with its change, within one rounding."""
    merged, before, places = tensors_of(path), tensors_of(base), BaseWeights(open_base_model(base))
    assert merged.keys() == before.keys()
    changed = {places.place(*key): change for key, change in expected.items()}
    assert None not in changed
    for key, tensor in merged.items():
        exact = before[key].double().flatten() + changed.get(key, 0)
        assert tensor.dtype == before[key].dtype
        eps = max(torch.finfo(tensor.dtype).eps, 2e-6)
        assert (tensor.double().flatten() - exact).abs().max() <= eps * exact.abs().max() + 1e-6, key
        assert key in changed or torch.equal(tensor, before[key])


NAMES = list(FILES)
PAIRS = list(zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True))
RATIOS = [(0.5, 0.25), (1.5, -0.75), (-1.0, 2.0), (0.0, 1.0)]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_adapters_become_one_that_is_their_sum(first, second, files, tiny_sd1_file, tmp_path, capsys):
    models, ratios = [files(first, 1), files(second, 2, rank=3 if second == "lora" else 4)], RATIOS[len(first + second) % 4]
    target = tmp_path / "both.safetensors"
    command = ["--models", *models, "--ratios", *ratios, "--save_to", target, "--save_precision", "float"]
    if any(name in OF_THE_BASE for name, ratio in zip((first, second), ratios, strict=True) if ratio):
        assert_refused(run(capsys, *command), "depends on the base model", "--base")
        assert not target.exists()
        command += ["--base", tiny_sd1_file]
    run(capsys, *command).require_success()
    expected = weighted_sum([changes_of(model, tiny_sd1_file) for model in models], ratios)
    assert_same_changes(changes_of(target, tiny_sd1_file), expected, 1e-5)


@pytest.mark.parametrize("name", FILES)
def test_any_adapter_is_merged_into_a_model_as_its_formula_says(name, files, tiny_sd1_file, tmp_path, capsys):
    models, ratios = [files(name, 1), files("lora", 2)], [1.25, -0.5]
    target = tmp_path / "merged.safetensors"
    done = run(capsys, "--sd_model", tiny_sd1_file, "--models", *models, "--ratios", *ratios, "--save_to", target)
    done.require_success()
    expected = weighted_sum([changes_of(model, tiny_sd1_file) for model in models], ratios)
    assert_model_is(target, tiny_sd1_file, expected)
    assert done.last_line.startswith(f"{target}: Stable Diffusion 1.x, tiny_sd1 + 1.25 * ")


@torch.no_grad()
def outputs(parts) -> list[torch.Tensor]:
    stream = torch.Generator().manual_seed(5)
    latents, context = torch.randn(2, 4, 16, 16, generator=stream), torch.randn(2, 7, 32, generator=stream)
    tokens = torch.randint(0, 49000, (2, 12), generator=stream)
    made = parts["unet"](latents, torch.tensor([10, 500]), context).sample
    return [made, parts["text_encoder"](tokens).last_hidden_state]


@pytest.mark.parametrize("name", ["lora", "lora dora", "lokr", "glora", "ia3", "oft"])
def test_a_merged_model_does_what_the_model_does_with_the_network_on_it(name, files, tiny_sd1_folder, tmp_path, capsys):
    target = tmp_path / "merged"
    run(capsys, "--sd_model", tiny_sd1_folder, "--models", files(name), "--save_to", target).require_success()

    def loaded(path):
        model, settings = open_base_model(path), {"dtype": torch.float32, "device": "cpu"}
        return {"unet": model.load_denoiser(**settings), "text_encoder": model.load_text_encoders(**settings)[0]}

    parts = loaded(tiny_sd1_folder)
    plain = outputs(parts)
    module = importlib.import_module(f"networks.{name.split()[0]}")
    network, _ = module.create_network_from_weights(1.0, files(name), None, parts["text_encoder"], parts["unet"])
    network.attach()
    for made, expected, base in zip(outputs(loaded(target)), outputs(parts), plain, strict=True):
        assert (expected - base).abs().max() > 1e-3
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 * float(base.abs().max()))


def test_diffusers_fuses_the_same_tensors(files, tiny_sd1_folder, tmp_path, capsys):
    from diffusers import StableDiffusionPipeline

    target = tmp_path / "merged"
    command = ["--sd_model", tiny_sd1_folder, "--models", files("lora"), "--ratios", 0.8, "--save_to", target]
    run(capsys, *command).require_success()
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1_folder, local_files_only=True)
    pipe.load_lora_weights(files("lora").parent, weight_name=files("lora").name)
    pipe.fuse_lora(lora_scale=0.8)
    pipe.unload_lora_weights()
    merged = StableDiffusionPipeline.from_pretrained(target, local_files_only=True)
    for part in ("unet", "text_encoder", "vae"):
        theirs, ours = (getattr(each, part).state_dict() for each in (pipe, merged))
        assert theirs.keys() == ours.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)


def with_types(source: Path, target: Path, dtypes: list[torch.dtype]) -> Path:
    """A copy whose large tensors have these types in turn."""
    tensors = load_file(source)
    for number, key in enumerate(tensors):
        if tensors[key].dim() > 1:
            tensors[key] = tensors[key].to(dtypes[number % len(dtypes)])
    write_tensors(target, tensors, open_tensor_file(source).metadata)
    return target


def test_every_tensor_keeps_its_own_type(files, tiny_sd1_file, tmp_path, capsys):
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn]
    base = with_types(tiny_sd1_file, tmp_path / "mixed.safetensors", types)
    adapter = with_types(files("lora"), tmp_path / "adapter.safetensors", types)
    target = tmp_path / "merged.safetensors"
    run(capsys, "--sd_model", base, "--models", adapter, "--ratios", 0.7, "--save_to", target).require_success()
    assert {tensor.dtype for tensor in tensors_of(target).values()} == set(types)
    assert_model_is(target, base, weighted_sum([changes_of(adapter, base)], [0.7]))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [([], torch.float32), (["--save_precision", "fp16"], torch.float16), (["--precision", "bf16"], torch.bfloat16)],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ""])
def test_the_name_decides_the_format_and_precision_the_type(options, dtype, suffix, files, tiny_sd1_file, tmp_path, capsys):
    target = tmp_path / f"merged{suffix}"
    command = ["--sd_model", tiny_sd1_file, "--models", files("lora"), "--save_to", target, *options]
    done = run(capsys, *command).require_success()
    merged = tensors_of(target)
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    told = next(float(line.split()[-1]) for line in done.out.splitlines() if line.startswith("total"))
    assert (told > 1e-3) is (dtype != torch.float32), "what rounding takes is told, in the sum or in saving"
    changes = changes_of(files("lora"), tiny_sd1_file)
    place = BaseWeights(open_base_model(tiny_sd1_file)).place
    base = tensors_of(tiny_sd1_file)
    eps = 2 * torch.finfo(dtype).eps
    for key, change in changes.items():
        exact = base[place(*key)].double().flatten() + change
        assert (merged[place(*key)].double().flatten() - exact).norm() <= eps * exact.norm() + 1e-6


# Ratios by part and block

WEIGHTS = {count: json.dumps([round(0.1 * (place + 1), 1) for place in range(count)]) for count in (12, 17, 20, 26)}
NAMED = {
    12: "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    17: "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    20: "BASE " + " ".join(f"IN0{n}" for n in range(9)) + " MID " + " ".join(f"OUT0{n}" for n in range(9)),
    26: " ".join(PLACES),
}


@pytest.mark.parametrize("count", NAMED)
def test_a_list_of_block_weights_names_these_places_and_the_others_keep_1(count):
    weights = dict(zip(PLACES, read_block_weights(WEIGHTS[count]), strict=True))
    named = NAMED[count].split()
    assert [weights[name] for name in named] == json.loads(WEIGHTS[count])
    assert {weight for name, weight in weights.items() if name not in named} <= {1.0}


@pytest.mark.parametrize(
    ("layer", "place"),
    {
        "lora_te_text_model_encoder_layers_0_mlp_fc1": "BASE",
        "lora_unet_conv_in": "IN00",
        "lora_unet_down_blocks_0_attentions_0_proj_in": "IN01",
        "lora_unet_down_blocks_0_downsamplers_0_conv": "IN03",
        "lora_unet_down_blocks_2_resnets_1_conv1": "IN08",
        "lora_unet_down_blocks_3_resnets_1_conv1": "IN11",
        "lora_unet_mid_block_attentions_0_proj_in": "MID",
        "lora_unet_up_blocks_0_upsamplers_0_conv": "OUT02",
        "lora_unet_up_blocks_1_attentions_0_proj_in": "OUT03",
        "lora_unet_up_blocks_3_attentions_2_proj_in": "OUT11",
    }.items(),
)
def test_layers_have_places_as_in_the_original_models(layer, place):
    assert PLACES[place_of(layer, SD1)] == place


def test_named_block_weights_are_those_of_web_uis():
    assert read_block_weights("ALL") == (1.0,) * 26
    assert read_block_weights("none") == (0.0,) * 26
    middle = dict(zip(PLACES, read_block_weights("MIDD"), strict=True))
    acting = [name for name, weight in middle.items() if weight]
    assert acting == ["BASE", *PLACES[PLACES.index("IN05") : PLACES.index("OUT06") + 1]]


@pytest.mark.parametrize("into_model", [True, False])
def test_block_weights_multiply_the_ratios_once(into_model, files, tiny_sd1_file, tmp_path, capsys):
    models, target = [files("lora", 1), files("lora", 2)], tmp_path / "merged.safetensors"
    base = ["--sd_model", tiny_sd1_file] if into_model else ["--save_precision", "float"]
    command = ["--models", *models, "--ratios", 0.5, -1.5, "--lbws", WEIGHTS[17], "OUTS", "--save_to", target]
    run(capsys, *base, *command).require_success()
    ratios = [
        lambda layer: 0.5 * read_block_weights(WEIGHTS[17])[place_of(layer, SD1)],
        lambda layer: -1.5 * read_block_weights("OUTS")[place_of(layer, SD1)],
    ]
    expected = weighted_sum([changes_of(model, tiny_sd1_file) for model in models], ratios)
    if into_model:
        assert_model_is(target, tiny_sd1_file, expected)
    else:
        assert_same_changes(changes_of(target, tiny_sd1_file), expected, 1e-5)


def test_parts_have_ratios_of_their_own(files, tiny_sd1_file, tmp_path, capsys):
    target = tmp_path / "merged.safetensors"
    command = ["--models", files("lora"), "--te_ratios", 0, "--unet_ratios", 2, "--save_precision", "float"]
    done = run(capsys, *command, "--save_to", target).require_success()
    expected = weighted_sum([changes_of(files("lora"), tiny_sd1_file)], [lambda layer: 2 * ("unet" in layer)])
    assert_same_changes(changes_of(target, tiny_sd1_file), expected, 1e-5)
    assert "with a ratio of 0 left out (lora_te_" in done.out


# The form of one adapter


def test_ranks_add_up_and_alpha_is_one(files, tmp_path, capsys):
    target = tmp_path / "both.safetensors"
    command = ["--models", files("lora", 1), files("lora", 2, rank=3), "--concat", "--shuffle", "--save_to", target]
    run(capsys, *command, "--report", tmp_path / "report.json").require_success()
    tensors = load_file(target)
    assert {len(tensor) for key, tensor in tensors.items() if "lora_down" in key and tensor.shape[2:].numel() == 1} == {7}
    assert len({float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")}) == 1
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "7"
    assert metadata["modelspec.merged_from"] == "of a test, of a test"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert sshs_hashes(target).items() <= metadata.items()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["relative_error"] < 1e-6
    assert len(report["layers"]) == len(list(stream_layers(open_tensor_file(target), SD1)))


def test_an_exact_merge_reports_the_singular_values_of_the_sum_and_draws_them(files, tiny_sd1_file, tmp_path, capsys):
    models, target, report = [files("lora", 1), files("loha", 2)], tmp_path / "both.safetensors", tmp_path / "report.json"
    command = ["--models", *models, "--save_to", target, "--save_precision", "bf16"]
    plots = [tmp_path / "0.png", tmp_path / "1.png"]
    run(capsys, *command, "--ratios", 0.5, 0.1, "--plot", plots[0]).require_success()
    run(capsys, *command, "--ratios", 0.5, -2, "--plot", plots[1], "--report", report).require_success()
    assert_is_another_picture(*plots)
    told, written = json.loads(report.read_text()), changes_of(target, tiny_sd1_file)
    expected = weighted_sum([changes_of(model, tiny_sd1_file) for model in models], (0.5, -2))
    lost = had = 0.0
    for name, layer in told["layers"].items():
        change = expected[name, "weight"]
        error = float((written[name, "weight"] - change).norm())
        assert layer["norm"] == pytest.approx(float(change.norm()), rel=1e-4)
        assert layer["relative_error"] == pytest.approx(error / float(change.norm()), rel=1e-2)
        lost, had = lost + error**2, had + float(change.norm()) ** 2
        rows = len(load_file(target)[f"{name}.lora_up.weight"])
        values = torch.linalg.svdvals(change.reshape(rows, -1))
        found = torch.tensor(layer["singular_values"], dtype=torch.float64)
        assert 4 <= len(found) <= 64
        torch.testing.assert_close(found, values[: len(found)], rtol=1e-3, atol=1e-4 * float(values[0]))
    assert told["relative_error"] == pytest.approx((lost / had) ** 0.5, rel=1e-2)


def test_a_merge_into_a_model_reports_what_changed_and_draws_it(files, tiny_sd1_file, tmp_path, capsys):
    target, report, plots = tmp_path / "m.safetensors", tmp_path / "report.json", [tmp_path / "0.png", tmp_path / "1.png"]
    command = ["--sd_model", tiny_sd1_file, "--models", files("lora", 1), "--save_to", target, "--save_precision", "fp16"]
    run(capsys, *command, "--lbws", "INALL", "--plot", plots[0]).require_success()
    run(capsys, *command, "--ratios", 0.5, "--plot", plots[1], "--report", report).require_success()
    assert_is_another_picture(*plots)
    told, before, merged = json.loads(report.read_text())["tensors"], tensors_of(tiny_sd1_file), tensors_of(target)
    expected, places = changes_of(files("lora", 1), tiny_sd1_file), BaseWeights(open_base_model(tiny_sd1_file))
    assert len(told) == len(expected)
    for key, change in expected.items():
        place = places.place(*key)
        found, exact = told[".".join(place)], before[place].double().flatten() + 0.5 * change
        assert found["layer"] == key[0]
        assert found["norm"] == pytest.approx(float(before[place].double().norm()), rel=1e-4)
        assert found["change"] == pytest.approx(0.5 * float(change.norm()), rel=1e-4)
        assert found["lost_by_rounding"] == pytest.approx(float((merged[place].double().flatten() - exact).norm()), rel=1e-2)


def test_shuffled_ranks_are_others_and_mean_the_same(files, tiny_sd1_file, tmp_path, capsys):
    for name, options in (("plain", []), ("shuffled", ["--shuffle"])):
        command = ["--models", files("lora"), "--save_to", tmp_path / f"{name}.safetensors", *options]
        run(capsys, *command).require_success()
    plain, other = (tmp_path / f"{name}.safetensors" for name in ("plain", "shuffled"))
    assert_same_changes(changes_of(other, tiny_sd1_file), changes_of(plain, tiny_sd1_file), 1e-6)
    factors = [load_file(path) for path in (plain, other)]
    assert any(not torch.equal(factors[0][key], factors[1][key]) for key in factors[0])


def test_a_share_of_the_norm_takes_as_few_ranks_as_hold_it(files, tiny_sd1_file, tmp_path, capsys):
    target, models = tmp_path / "cut.safetensors", [files("lora", 1), files("loha", 2)]
    command = ["--models", *models, "--rank_share", 0.9, "--save_precision", "float", "--save_to", target]
    run(capsys, *command).require_success()
    changes = changes_of(target, tiny_sd1_file)
    wanted = weighted_sum([changes_of(model, tiny_sd1_file) for model in models], [1, 1])
    for name, tensors in stream_layers(open_tensor_file(target), SD1):
        rank, rows = len(tensors["lora_down.weight"]), len(tensors["lora_up.weight"])
        values = torch.linalg.svdvals(wanted[name, "weight"].reshape(rows, -1)).square()
        shares = values.cumsum(0) / values.sum()
        assert rank == int((shares < 0.9).sum()) + 1
        lost = (changes[name, "weight"] - wanted[name, "weight"]).square().sum() / values.sum()
        assert abs(lost - (1 - shares[rank - 1])) < 1e-5


def test_without_modelspec_what_readers_need_is_written_all_the_same(files, tmp_path, capsys):
    target = tmp_path / "one.safetensors"
    run(capsys, "--models", files("lora"), "--no_metadata", "--save_to", target).require_success()
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert not [key for key in metadata if key.startswith("modelspec.")]
    assert metadata["ss_v2"] == "False"
    assert "sshs_model_hash" in metadata


# What is refused


class Harm:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_wrong_input_is_one_sentence_and_writes_nothing(files, sd2_adapter, tiny_sd1_file, tiny_sd2_file, tmp_path, capsys):
    lora, target = files("lora"), tmp_path / "new.safetensors"
    strange = tmp_path / "strange.safetensors"
    save_file({key.replace("lora_unet_", "lora_unet_other_").replace("lora_te_", "lora_te_other_"): tensor
               for key, tensor in load_file(lora).items()}, strange, METADATA)  # fmt: skip
    some = tmp_path / "some.safetensors"
    odd = {"lora_unet_other.lora_up.weight": torch.zeros(4, 2), "lora_unet_other.lora_down.weight": torch.zeros(2, 4)}
    save_file(load_file(lora) | odd, some, METADATA)
    short, harmful = tmp_path / "short.safetensors", tmp_path / "harmful.ckpt"
    short.write_bytes(lora.read_bytes()[:-100])
    harmful.write_bytes(pickle.dumps({"a.lora_up.weight": Harm()}))
    into = ["--sd_model", tiny_sd1_file]
    table = [
        ([], "--models", "one or more adapter files"),
        (["--models", lora, "--ratios", 1, 2], "--ratios 1.0 2.0: 2 given for 1 model"),
        (["--models", lora, lora, "--lbws", "ALL"], "--lbws", "1 given for 2 models"),
        (["--models", lora, "--lbws", "[1,2,3]"], "has 3 values", "12, 17, 20 or 26"),
        (["--models", lora, "--lbws", "OUTAL"], "OUTALL"),
        (["--models", lora, "--lbws", '[1,"x"]'], "not a list of numbers"),
        (["--models", lora, sd2_adapter], "Stable Diffusion 2.x", "Stable Diffusion 1.x"),
        ([*into, "--models", sd2_adapter], "is Stable Diffusion 1.x", "is for Stable Diffusion 2.x"),
        (["--sd_model", tiny_sd2_file, "--models", lora], "is Stable Diffusion 2.x", "is for Stable Diffusion 1.x"),
        (["--models", lora, "--v2"], "Stable Diffusion 1.x", "leave out --v2"),
        ([*into, "--models", strange], "none of its"),
        ([*into, "--models", some], "1 of its", "--allow_unmatched"),
        (["--models", some], "lora_unet_other", "--allow_unmatched"),
        (["--models", short], "short.safetensors", "truncated"),
        (["--models", harmful], "harmful.ckpt"),
        (["--models", tiny_sd1_file], "checkpoint, not an adapter"),
        (["--models", tmp_path / "none.safetensors"], "none.safetensors"),
        ([*into, "--models", lora, "--new_rank", 4], "--new_rank 4", "--sd_model"),
        (["--models", lora, "--rank_share", 2], "--rank_share 2"),
        (["--models", lora, "--ratios", 0], "nothing is left"),
    ]
    for arguments, *parts in table:
        assert_refused(run(capsys, *arguments, "--save_to", target), *parts)
        assert not target.exists()
    assert not Path("harm").exists()
    for arguments, place in (
        ([*into, "--models", lora], tiny_sd1_file),
        (["--models", lora], lora),
        ([*into, "--models", lora], lora),
    ):
        before = place.read_bytes()
        assert_refused(run(capsys, *arguments, "--save_to", place), "is one of the inputs")
        assert place.read_bytes() == before
    assert_refused(run(capsys, "--models", lora), "--save_to")
    assert_refused(run(capsys, "--models", lora, "--save_to", tmp_path / "folder"), "suffix")


def silent(source: Path, folder: Path) -> Path:
    """A copy that does not tell what it is for: tiny layers, and no metadata."""
    save_file(load_file(source), folder / f"silent-{source.name}")
    return folder / f"silent-{source.name}"


def test_an_adapter_that_tells_nothing_is_for_the_model_it_is_merged_into(
    files, sd2_adapter, tiny_sd1_file, tiny_sd2_file, tmp_path, capsys
):
    first, second = silent(files("lora"), tmp_path), silent(sd2_adapter, tmp_path)
    merged = []
    for adapter in (files("lora"), first):
        target = tmp_path / f"merged-{adapter.name}"
        run(capsys, "--sd_model", tiny_sd1_file, "--models", adapter, "--save_to", target).require_success()
        merged.append(tensors_of(target))
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])
    target = tmp_path / "new.safetensors"
    done = run(capsys, "--sd_model", tiny_sd2_file, "--models", second, "--save_to", target).require_success()
    assert "does not say what it predicts" in done.out
    refused = run(capsys, "--sd_model", tiny_sd1_file, "--models", second, "--save_to", tmp_path / "none.safetensors")
    assert_refused(refused, second.name)
    assert not (tmp_path / "none.safetensors").exists()


def test_adapters_that_tell_nothing_are_taken_for_what_another_tells_or_for_sd1(files, sd2_adapter, tmp_path, capsys):
    first, second, target = silent(files("lora"), tmp_path), silent(sd2_adapter, tmp_path), tmp_path / "new.safetensors"
    for words, family in (
        ([first], "sd_v1"),
        ([second, "--v2"], "sd_v2"),
        ([second, sd2_adapter], "sd_v2"),
    ):
        done = run(capsys, "--models", *words, "--save_to", target).require_success()
        assert f"{words[0]}: says nowhere which models it is for" in done.out
        assert open_tensor_file(target).metadata["ss_base_model_version"] == family


def test_a_layer_that_does_not_fit_is_named_with_its_file(files, tiny_sd1_file, tmp_path, capsys):
    tensors, odd, target = load_file(files("lora")), tmp_path / "odd.safetensors", tmp_path / "new.safetensors"
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    save_file(tensors | {key: torch.zeros(len(tensors[key]), 7, *tensors[key].shape[2:])}, odd, METADATA)
    for into in ([], ["--sd_model", tiny_sd1_file]):
        done = run(capsys, *into, "--models", files("lora"), odd, "--save_to", target)
        assert_refused(done, "odd.safetensors", key.partition(".")[0], "lora_up.weight is")
        assert not target.exists()


def test_unmatched_layers_are_named_where_they_are_allowed(files, tiny_sd1_file, tmp_path, capsys):
    some, target = tmp_path / "some.safetensors", tmp_path / "new.safetensors"
    odd = {"lora_unet_other.lora_up.weight": torch.zeros(4, 2), "lora_unet_other.lora_down.weight": torch.zeros(2, 4)}
    save_file(load_file(files("lora")) | odd, some, METADATA)
    for into in ([], ["--sd_model", tiny_sd1_file]):
        command = [*into, "--models", some, "--allow_unmatched", "--save_to", target]
        done = run(capsys, *command).require_success()
        assert "1 layer left out" in done.out
        assert "lora_unet_other" in done.out


def test_changes_that_half_precision_does_not_hold_are_refused(files, tiny_sd1_file, tmp_path, capsys):
    target = tmp_path / "new.safetensors"
    command = ["--sd_model", tiny_sd1_file, "--models", files("lora"), "--ratios", 1e9, "--save_precision", "fp16"]
    assert_refused(run(capsys, *command, "--save_to", target), "is larger than float16 holds")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ""])
def test_without_space_the_old_one_stays_and_nothing_partial(suffix, files, tiny_sd1_file, tmp_path, capsys, monkeypatch):
    target = tmp_path / f"old{suffix}"
    if suffix:
        target.write_bytes(b"old")
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 21)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _path: usage)
    command = ["--sd_model", tiny_sd1_file, "--models", files("lora"), "--save_to", target]
    assert_refused(run(capsys, *command), "are free on its disk")
    assert [path.name for path in tmp_path.iterdir()] == (["old.safetensors"] if suffix else [])
    assert not suffix or target.read_bytes() == b"old"


def test_a_folder_that_holds_something_is_not_replaced(files, tiny_sd1_file, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    command = ["--sd_model", tiny_sd1_file, "--models", files("lora"), "--save_to", tmp_path / "full"]
    assert_refused(run(capsys, *command), "exists already")


KILLED_WHILE_WRITING = """
import os, signal, sys
sys.path.insert(0, {root!r})
from networks.tools import checkpoint_merging
real, sent = checkpoint_merging.MergedWeights.__call__, []
def dying(self, kind, name, tensor):
    if len(self.given) >= 20 and not sent:  # several threads are at it, so that no number is sure to be seen
        sent.append(True)
        os.kill(os.getpid(), {number})
    return real(self, kind, name, tensor)
checkpoint_merging.MergedWeights.__call__ = dying
from library.cli.doors import run_door
from networks.merge_lora import work
sys.exit(run_door("merge_lora", work))
"""


@pytest.mark.parametrize(
    ("number", "status", "name"),
    [
        (signal.SIGTERM, -signal.SIGTERM, "new.safetensors"),
        (signal.SIGTERM, -signal.SIGTERM, "new"),
        (signal.SIGHUP, -signal.SIGHUP, "new.ckpt"),
        (signal.SIGINT, 130, "new.safetensors"),
    ],
)
def test_a_merge_that_a_signal_ends_leaves_nothing(number, status, name, files, tiny_sd1_file, tmp_path):
    words = ["--sd_model", tiny_sd1_file, "--models", files("lora"), "--save_to", tmp_path / name]
    script = KILLED_WHILE_WRITING.format(root=str(ROOT), number=int(number))
    command = [sys.executable, "-c", script, *map(str, words)]
    # As on a terminal: what runs in the background of a shell inherits that some signals are ignored.
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, check=False, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)
    )
    assert done.returncode == status, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_merging_into_a_file_imports_neither_diffusers_nor_transformers(files, tiny_sd1_file, tmp_path):
    words = ["--sd_model", tiny_sd1_file, "--models", files("lora"), "--save_to", tmp_path / "new.safetensors"]
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from networks.merge_lora import work; work(sys.argv[1:]); "
        "assert not {'diffusers', 'transformers'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, env=ENVIRONMENT, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_it_runs_as_a_command(files, tiny_sd1_file, tmp_path):
    target = tmp_path / "new.ckpt"
    words = [
        "--sd_model",
        tiny_sd1_file,
        "--save_to",
        target,
        "--models",
        files("lora"),
        files("loha"),
        "--ratios",
        0.8,
        0.5,
    ]
    done = run_script("networks/merge_lora.py", *words).require_success()
    assert done.last_line.endswith("opened again and compared")


def test_a_model_that_lacks_a_tensor_is_refused_though_no_module_is_built(files, tiny_sd1_file, tmp_path, capsys):
    tensors = load_file(tiny_sd1_file)
    lost = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != lost},
        tmp_path / "base.safetensors",
        open_tensor_file(tiny_sd1_file).metadata,
    )
    command = ["--sd_model", tmp_path / "base.safetensors", "--models", files("full"), "--allow_unmatched"]
    done = run(capsys, *command, "--save_to", tmp_path / "new.safetensors")
    assert_refused(done, "lacks mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight of its U-Net")
    assert not (tmp_path / "new.safetensors").exists()
