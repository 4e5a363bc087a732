"""Merging whole models as a user does it: any layouts, exact sums, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.base_model import open_base_model
from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.parts import UNET
from library.checkpoints.tensor_files import open_tensor_file
from library.cli.doors import run_door
from library.families.sd1 import SD1
from tests.support.command_lines import Finished, assert_is_another_picture, assert_refused, run_script
from tests.support.tiny_models import build_tiny_folder
from tools.convert_diffusers20_original_sd import convert, parse_options
from tools.merge_models import work


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, Path]:
    """Two more SD1 models: as a folder, and as a .ckpt in half precision."""
    root = tmp_path_factory.mktemp("others")
    folder = build_tiny_folder(root / "second", SD1, seed=1)
    convert(parse_options([str(build_tiny_folder(root / "third_folder", SD1, seed=2)), str(root / "third.ckpt"), "--fp16"]))
    return {"folder": folder, "ckpt": root / "third.ckpt"}


def run(capsys, *arguments: object) -> Finished:
    capsys.readouterr()
    status = run_door("merge_models", work, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Finished(status, captured.out, captured.err)


def tensors_of(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    model = open_base_model(path)
    return {(kind, name): source.read() for kind, part in model.parts.items() for name, source in part.sources.items()}


def assert_is_sum(path: Path, models: list[Path], ratios: list[float], *, parts: tuple[str, ...] = SD1.parts) -> None:
    """Within one rounding to the saved type, of a sum in 64 bits."""
    merged, sources = tensors_of(path), [tensors_of(model) for model in models]
    assert merged.keys() == sources[0].keys()
    for key, tensor in merged.items():
        weights = ratios if key[0] in parts else [1.0]
        expected = sum(ratio * source[key].double().flatten() for ratio, source in zip(weights, sources, strict=False))
        rounding = torch.finfo(tensor.dtype).eps * expected.abs().max()
        assert (tensor.double().flatten() - expected).abs().max() <= rounding, key


def test_a_file_a_folder_and_a_ckpt_are_summed(tiny_sd1_file, others, tmp_path, capsys):
    models = [tiny_sd1_file, others["folder"], others["ckpt"]]
    done = run(capsys, "--models", *models, "--ratios", 1.5, -0.75, 0.25, "--output", tmp_path / "m.safetensors")
    done.require_success()
    assert_is_sum(tmp_path / "m.safetensors", models, [1.5, -0.75, 0.25])
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "m.safetensors").values()} == {torch.float32}
    target = tmp_path / "m.safetensors"
    names = "1.5 * tiny_sd1 + -0.75 * second + 0.25 * third"
    assert done.last_line == f"{target}: Stable Diffusion 1.x, {names}; opened again and compared"
    assert [line.split()[0] for line in done.out.splitlines() if "3 models" in line] == ["U-Net", "VAE", "text"]


@pytest.mark.parametrize("first", ["folder", "ckpt"])
def test_the_first_model_may_have_any_layout_and_all_count_the_same_without_ratios(
    first, tiny_sd1_folder, others, tmp_path, capsys
):
    models = [others[first], tiny_sd1_folder]
    run(capsys, "--models", *models, "--output", tmp_path / "merged").require_success()
    assert_is_sum(tmp_path / "merged.safetensors", models, [0.5, 0.5])


@pytest.mark.parametrize("precision", ["float", "fp16", "bf16"])
@pytest.mark.parametrize("saved", ["fp16", "bf16"])
def test_precisions_are_those_asked_for(precision, saved, tiny_sd1_file, others, tmp_path, capsys):
    models, kept = [tiny_sd1_file, others["folder"]], {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    command = ["--models", *models, "--ratios", 0.3, 0.7, "--output", tmp_path / "m", "--unet_only"]
    done = run(capsys, *command, "--precision", precision, "--saving_precision", saved).require_success()
    merged, (first, second) = tensors_of(tmp_path / "m.safetensors"), map(tensors_of, models)
    for key, tensor in merged.items():
        parts = [whole[key].to(kept[precision]) for whole in (first, second)]
        expected = torch.add(parts[0] * 0.3, parts[1].reshape(parts[0].shape), alpha=0.7) if key[0] == UNET else parts[0]
        assert torch.equal(tensor.flatten(), expected.to(kept[saved]).flatten()), key
    exact = {key: first[key] * 0.3 + second[key].reshape(first[key].shape) * 0.7 for key in merged if key[0] == UNET}
    lost = sum((merged[key].float().reshape(each.shape) - each).double().square().sum() for key, each in exact.items())
    share = (lost / sum(each.double().square().sum() for each in exact.values())).sqrt()
    (row,) = (line for line in done.out.splitlines() if line.startswith("U-Net"))
    assert float(row.split()[-1]) == pytest.approx(float(share), rel=0.05), "the arithmetic's loss is told too"


def test_only_the_unet_is_merged_where_asked(tiny_sd1_file, others, tmp_path, capsys):
    models = [tiny_sd1_file, others["folder"]]
    done = run(capsys, "--models", *models, "--unet_only", "--output", tmp_path / "m").require_success()
    assert_is_sum(tmp_path / "m.safetensors", models, [0.5, 0.5], parts=(UNET,))
    assert sum("the first model" in line for line in done.out.splitlines()) == 2


def test_sd2_with_its_joined_attention_is_merged_and_counts_all_its_layers(tiny_sd2_file, tiny_sd2_folder, tmp_path, capsys):
    models = [tiny_sd2_file, tiny_sd2_folder]
    run(capsys, "--models", *models, "--ratios", 0.25, 0.5, "--output", tmp_path / "m").require_success()
    assert_is_sum(tmp_path / "m.safetensors", models, [0.25, 0.5])
    assert set(open_tensor_file(tmp_path / "m.safetensors").keys()) == set(open_tensor_file(tiny_sd2_file).keys())
    run(capsys, "--models", *reversed(models), "--output", tmp_path / "n").require_success()
    assert_is_sum(tmp_path / "n.safetensors", models, [0.5, 0.5])


def test_the_header_says_what_was_merged_and_the_hashes_are_right(tiny_sd1_file, others, tmp_path, capsys):
    models = [tiny_sd1_file, others["folder"]]
    done = run(capsys, "--models", *models, "--ratios", 0.5, 0.25, "--output", tmp_path / "my_mix").require_success()
    metadata = open_tensor_file(tmp_path / "my_mix.safetensors").metadata
    assert metadata["modelspec.merged_from"] == "tiny_sd1, second"
    assert metadata["modelspec.title"] == "my_mix"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert json.loads(metadata["merge_recipe"]) == {
        "models": ["tiny_sd1", "second"],
        "ratios": [0.5, 0.25],
        "parts": list(SD1.parts),
        "precision": "float32",
    }
    assert sshs_hashes(tmp_path / "my_mix.safetensors").items() <= metadata.items()
    assert str(tmp_path) not in json.dumps(metadata)
    assert "the ratios add up to 0.75, not 1: all merged weights are scaled by that" in done.out


def test_diffusers_loads_a_merged_file_like_the_sum_of_the_modules(tiny_sd1_file, others, tmp_path, capsys):
    from diffusers import UNet2DConditionModel

    run(capsys, "--models", tiny_sd1_file, others["folder"], "--output", tmp_path / "m").require_success()
    convert(parse_options([str(tmp_path / "m.safetensors"), str(tmp_path / "folder")]))
    merged, first, second = (
        UNet2DConditionModel.from_pretrained(path, subfolder="unet").state_dict()
        for path in (tmp_path / "folder", tiny_sd1_file.with_suffix(""), others["folder"])
    )
    assert all(torch.allclose(merged[key], (first[key] + second[key]) / 2, atol=1e-6) for key in merged)


def test_tensors_outside_the_parts_are_kept_from_the_first_and_named_of_the_others(tiny_sd1_file, tmp_path, capsys):
    for name in ("a", "b"):
        extra = {f"{name}_extra": torch.ones(2), "model_ema.decay": torch.ones(1)}
        save_file(
            {**load_file(tiny_sd1_file), **extra}, tmp_path / f"{name}.safetensors", open_tensor_file(tiny_sd1_file).metadata
        )
    command = ["--models", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--output", tmp_path / "m"]
    assert (
        f"{tmp_path / 'b.safetensors'}: 2 tensors outside the parts left out (--show_skipped names them)"
        in run(capsys, *command).out
    )
    assert "left out: model_ema.decay, b_extra" in run(capsys, *command, "--show_skipped").require_success().out
    keys = set(open_tensor_file(tmp_path / "m.safetensors").keys())
    assert keys - set(open_tensor_file(tiny_sd1_file).keys()) == {"a_extra"}


def with_tensor(source: Path, target: Path, key: str, change) -> Path:
    tensors = load_file(source)
    tensors[key] = change(tensors[key])
    save_file(
        {key: tensor for key, tensor in tensors.items() if tensor is not None}, target, open_tensor_file(source).metadata
    )
    return target


LAST_NORM = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def test_sums_that_cannot_be_saved_leave_the_old_file(tiny_sd1_file, tmp_path, capsys):
    (tmp_path / "m.safetensors").write_bytes(b"old")
    command = ["--models", tiny_sd1_file, tiny_sd1_file, "--output", tmp_path / "m.safetensors"]
    refused = run(capsys, *command, "--ratios", 1e9, 1e9, "--saving_precision", "fp16")
    assert_refused(refused, "the sum is larger than --precision float32 and --saving_precision float16 hold; use bf16")
    assert_refused(run(capsys, *command, "--ratios", 1e39, 1), "the sum is larger than")
    broken = with_tensor(tiny_sd1_file, tmp_path / "nan.safetensors", CONV_IN, lambda tensor: tensor * torch.nan)
    refused = run(capsys, "--models", tiny_sd1_file, broken, "--output", tmp_path / "m.safetensors")
    assert_refused(refused, f"conv_in.weight of the U-Net: has values that are not finite in {broken}")
    assert (tmp_path / "m.safetensors").read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.safetensors", "nan.safetensors"]


def test_models_that_do_not_belong_together_are_refused(tiny_sd1_file, tiny_sd2_folder, tiny_sd2_v_folder, tmp_path, capsys):
    def refused(*parts: str, models: list[Path]) -> None:
        assert_refused(run(capsys, "--models", *models, "--output", tmp_path / "m"), *parts)
        assert not (tmp_path / "m.safetensors").exists()

    refused("is Stable Diffusion 2.x, while", "is Stable Diffusion 1.x", models=[tiny_sd1_file, tiny_sd2_folder])
    refused("predicts v_prediction, while", models=[tiny_sd2_folder, tiny_sd2_v_folder])
    wide = with_tensor(tiny_sd1_file, tmp_path / "wide.safetensors", LAST_NORM, lambda tensor: torch.ones(5))
    refused(
        "its text encoder has other shapes than that of", "final_layer_norm.weight is (5,)", models=[tiny_sd1_file, wide]
    )
    lacking = with_tensor(tiny_sd1_file, tmp_path / "lacking.safetensors", LAST_NORM, lambda tensor: None)
    refused("its text encoder lacks 1 tensor: final_layer_norm.weight", models=[tiny_sd1_file, lacking])
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_sd1_file.read_bytes()[:-10])
    refused(f"{cut}: is truncated", f"{tmp_path / 'none.ckpt'}: no such file", models=[cut, tmp_path / "none.ckpt"])
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, tmp_path / "lora.safetensors")
    refused("lora.safetensors", models=[tiny_sd1_file, tmp_path / "lora.safetensors"])


class Malicious:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sentinel),)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tiny_sd1_file, tmp_path, capsys):
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": Malicious(tmp_path / "ran")}, tmp_path / "bad.ckpt")
    refused = run(capsys, "--models", tiny_sd1_file, tmp_path / "bad.ckpt", "--output", tmp_path / "m")
    assert_refused(refused, f"{tmp_path / 'bad.ckpt'}: ")
    assert os.listdir(tmp_path) == ["bad.ckpt"]


def test_where_there_is_no_space_the_old_file_stays(tiny_sd1_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "m.safetensors").write_bytes(b"old")
    free = tiny_sd1_file.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=free, used=0, free=free))
    refused = run(capsys, "--models", tiny_sd1_file, tiny_sd1_file, "--output", tmp_path / "m")
    assert_refused(refused, "MB are free on its disk; make room, or name another place")
    assert (tmp_path / "m.safetensors").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--models", "{model}", "--output", "m"], "--models: name two or more"),
        (["--models", "{model}", "{model}"], "--output: name the file to write"),
        (["--models", "{model}", "{model}", "--ratios", "1", "--output", "m"], "--ratios 1.0: 1 given for 2 models"),
        (["--models", "{model}", "{model}", "--output", "{model}"], "is one of the inputs"),
        (["--models", "{model}", "{model}", "--output", "m.ckpt"], "only .safetensors files are written"),
        (["--models", "{model}", "{model}", "--output", "none/m"], "the folder none does not exist"),
        (["--models", "{model}", "{model}", "--output", "m", "--device", "gpu"], "--device gpu: cannot be used here"),
        (["--models", "{model}", "{model}", "--output", "m", "--precision", "fp8"], "'fp8' is not known"),
    ],
)
def test_mistakes_are_sentences(arguments, sentence, tiny_sd1_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = tiny_sd1_file.stat()
    assert_refused(run(capsys, *(argument.format(model=tiny_sd1_file) for argument in arguments)), sentence)
    assert list(tmp_path.iterdir()) == []
    assert tiny_sd1_file.stat().st_mtime_ns == content.st_mtime_ns


def test_the_door_runs_from_any_folder(tiny_sd1_file, others, tmp_path):
    command = ["--models", tiny_sd1_file, others["ckpt"], "--output", "m", "--saving_precision", "fp16"]
    finished = run_script("tools/merge_models.py", *command, cwd=tmp_path).require_success()
    assert finished.err == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_report_and_a_picture_tell_how_far_the_result_is_from_each_model(tiny_sd1_file, others, tmp_path, capsys):
    models, report = [tiny_sd1_file, others["folder"], others["ckpt"]], tmp_path / "report.json"
    plots, target = [tmp_path / "0.png", tmp_path / "1.png"], tmp_path / "m.safetensors"
    command = ["--models", *models, "--output", target, "--saving_precision", "fp16"]
    run(capsys, *command, "--unet_only", "--plot", plots[0]).require_success()
    done = run(capsys, *command, "--ratios", 0.5, 0.75, -0.25, "--plot", plots[1], "--report", report)
    assert_is_another_picture(*plots)
    told, merged, sources = json.loads(report.read_text()), tensors_of(target), [tensors_of(model) for model in models]
    assert told["models"] == [str(model) for model in models]
    assert told["ratios"] == [0.5, 0.75, -0.25]
    assert len(told["tensors"]) == sum(tensor.is_floating_point() for tensor in merged.values())
    squares = torch.zeros(3, 2, dtype=torch.float64)
    for (kind, name), tensor in merged.items():
        found = told["tensors"].get(f"{kind}.{name}")
        for place, source in enumerate(sources if found else ()):
            own = source[kind, name].double().flatten()
            distance = float((tensor.double().flatten() - own).norm())
            assert found["norms_of_models"][place] == pytest.approx(float(own.norm()), rel=1e-4, abs=1e-6)
            assert found["distances"][place] == pytest.approx(distance, rel=1e-3, abs=1e-5)
            squares[place] += torch.tensor([distance, float(own.norm())], dtype=torch.float64).square()
    whole = (squares[:, 0] / squares[:, 1]).sqrt().tolist()
    assert told["relative_distances"] == pytest.approx(whole, rel=1e-3)
    assert "away from 3" in done.out


def test_the_report_is_told_of_parts_that_are_not_merged(tiny_sd1_file, others, tmp_path, capsys):
    report = tmp_path / "report.json"
    command = ["--models", tiny_sd1_file, others["folder"], "--output", tmp_path / "m", "--unet_only", "--report", report]
    done = run(capsys, *command).require_success()
    told = json.loads(report.read_text())
    assert told["parts"] == ["U-Net"]
    assert {len(found["distances"]) for name, found in told["tensors"].items() if name.startswith("unet.")} == {2}
    assert {tuple(found["distances"]) for name, found in told["tensors"].items() if name.startswith("vae.")} == {(0.0,)}
    assert [line.split()[-2] for line in done.out.splitlines() if "the first model" in line] == ["-", "-"]
