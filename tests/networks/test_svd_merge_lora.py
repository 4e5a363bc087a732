"""Merging adapters into one of a given rank as a user does it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.cli.doors import run_door
from networks.svd_merge_lora import work
from tests.networks.test_merge_lora import changes_of, files, sd2_adapter, weighted_sum  # noqa: F401 (fixtures)
from tests.support.command_lines import Finished, assert_is_another_picture, assert_refused, run_script


def run(capsys, *arguments: object) -> Finished:
    capsys.readouterr()
    status = run_door("svd_merge_lora", work, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Finished(status, captured.out, captured.err)


def ranks_of(path) -> dict[str, set[int]]:
    tensors = {key: tensor for key, tensor in load_file(path).items() if "lora_down" in key}
    return {
        "wide": {len(tensor) for tensor in tensors.values() if tensor.shape[2:].numel() > 1},
        "other": {len(tensor) for tensor in tensors.values() if tensor.shape[2:].numel() == 1},
    }


def test_the_result_is_the_best_of_its_rank_and_says_how_good(files, tiny_sd1_file, tmp_path, capsys):  # noqa: F811
    models, target = [files("lora", 1), files("lora", 2, rank=3)], tmp_path / "cut.safetensors"
    command = ["--models", *models, "--ratios", 0.6, -1.4, "--new_rank", 2, "--new_conv_rank", 1, "--save_to", target]
    done = run(capsys, *command, "--save_precision", "float", "--report", tmp_path / "report.json").require_success()
    assert ranks_of(target) == {"wide": {1}, "other": {2}}
    wanted = weighted_sum([changes_of(model, tiny_sd1_file) for model in models], [0.6, -1.4])
    lost = had = 0.0
    tensors = load_file(target)
    for (name, _), change in wanted.items():
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        values = torch.linalg.svdvals(change.reshape(len(up), -1))
        found = (float(tensors[f"{name}.alpha"]) / len(down)) * (up.double().flatten(1) @ down.double().flatten(1))
        left_out = values[len(down) :].square().sum().sqrt()
        assert abs((found.flatten() - change).norm() - left_out) <= 1e-5 * change.norm()
        lost, had = lost + float(left_out) ** 2, had + float(change.norm()) ** 2
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["relative_error"] == pytest.approx((lost / had) ** 0.5, rel=1e-4)
    assert f"{report['relative_error']:.3g}" in next(line for line in done.out.splitlines() if line.startswith("total"))
    assert len({float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")}) == 1
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "2"
    assert json.loads(metadata["ss_network_args"])["conv_dim"] == "1"


@pytest.mark.parametrize("method", ["ties", "dare", "magnitude"])
def test_every_method_gives_lora_of_the_rank(method, files, tmp_path, capsys):  # noqa: F811
    target = tmp_path / "cut.safetensors"
    command = ["--models", files("lora", 1), files("loha", 2), "--method", method, "--density", 0.3, "--save_to", target]
    run(capsys, *command, "--new_rank", 3).require_success()
    assert ranks_of(target) == {"wide": {3}, "other": {3}}


def test_at_a_density_of_1_all_but_ties_are_the_sum(files, tiny_sd1_file, tmp_path, capsys):  # noqa: F811
    found = {}
    for method, options in (("linear", []), ("dare", ["--density", 1]), ("magnitude", ["--density", 1])):
        target = tmp_path / f"{method}.safetensors"
        command = ["--models", files("lora", 1), files("lora", 2), "--method", method, *options, "--new_rank", 16]
        run(capsys, *command, "--save_precision", "float", "--save_to", target).require_success()
        found[method] = changes_of(target, tiny_sd1_file)
    for key, change in found["linear"].items():
        for method in ("dare", "magnitude"):
            assert (found[method][key] - change).norm() <= 1e-5 * change.norm()


def test_wrong_input_is_one_sentence_and_writes_nothing(files, sd2_adapter, tmp_path, capsys):  # noqa: F811
    lora, target = files("lora"), tmp_path / "new.safetensors"
    table = [
        (["--models", lora, "--new_rank", 0], "--new_rank 0"),
        (["--models", lora, "--method", "ties", "--density", 0], "--density 0"),
        (["--models", lora, "--density", 0.5], "--method linear"),
        (["--models", lora, "--device", "nonsense"], "--device nonsense"),
        (["--models", lora, sd2_adapter], "Stable Diffusion 2.x"),
        (["--models", files("oft")], "depends on the base model", "--base"),
    ]
    for arguments, *parts in table:
        assert_refused(run(capsys, *arguments, "--save_to", target), *parts)
        assert not target.exists()


def test_it_runs_as_a_command(files, tmp_path):  # noqa: F811
    target = tmp_path / "new.safetensors"
    words = ["--save_to", target, "--models", files("lora"), files("loha"), "--ratios", 0.6, 0.4, "--new_rank", 32]
    done = run_script("networks/svd_merge_lora.py", *words, "--device", "cpu").require_success()
    assert done.last_line.startswith(f"{target}: read rightly by ComfyUI")


def test_a_picture_shows_what_a_method_and_a_rank_keep(files, tmp_path, capsys):  # noqa: F811
    command = ["--models", files("lora", 1), files("lora", 2), "--save_to", tmp_path / "cut.safetensors"]
    plots, report = [tmp_path / "0.png", tmp_path / "1.png"], tmp_path / "report.json"
    run(capsys, *command, "--plot", plots[0]).require_success()
    run(capsys, *command, "--plot", plots[1], "--method", "ties", "--new_rank", 3, "--report", report).require_success()
    assert_is_another_picture(*plots)
    layers = json.loads(report.read_text())["layers"].values()
    assert {layer["rank"] for layer in layers} == {3}
    for layer in layers:  # what the leading values leave of the norm is what is lost
        kept = sum(value**2 for value in layer["singular_values"][:3])
        assert layer["relative_error"] == pytest.approx((1 - kept / layer["norm"] ** 2) ** 0.5, rel=1e-2)
