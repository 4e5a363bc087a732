"""Cutting a DyLoRA file into ranks, as a user runs it: every file acts as its rank did in training."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.hashes import sshs_hashes
from networks import dylora, loha, lora
from networks.extract_lora_from_dylora import work
from networks.tools.rank_cutting import cut_layer, read_low_rank_file, write_ranks
from tests.networks.cases import acting, attached, layer_and_input, stream
from tests.networks.test_dylora import module
from tests.support.command_lines import assert_is_another_picture, assert_refused, run_script

DOOR = "networks/extract_lora_from_dylora.py"
METADATA = {
    "ss_network_module": "networks.dylora",
    "ss_network_dim": "8",
    "ss_network_alpha": "4",
    "ss_network_args": json.dumps({"unit": "2", "conv_dim": "4"}),
    "ss_training_comment": "a ball",
    "ss_output_name": "ball",
    "modelspec.title": "Ball",
    "modelspec.hash_sha256": "0x00",
    "modelspec.architecture": "stable-diffusion-v1/lora",
}


@pytest.fixture
def trained(sd1, perturb, tmp_path):
    """A DyLoRA network whose weights act, and its file."""
    network = dylora.create_network(1.0, 8, 4, None, sd1.text_encoder, sd1.unet, unit=2, conv_dim=4, conv_alpha=1)
    path = tmp_path / "ball.safetensors"
    perturb(network).save_weights(path, None, METADATA)
    return network, path


def cut_file(source, save_to, unit):
    """The files of all ranks, lowest first."""
    return list(write_ranks(read_low_rank_file(source), save_to, unit).values())


def header(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("layer_name", ["linear", "conv 3x3"])
@pytest.mark.parametrize("rank", [2, 4, 6, 8])
def test_a_rank_acts_as_it_did_in_training(layer_name, rank):
    layer, x = layer_and_input(layer_name)
    adapter = module(layer).train()
    adapter.begin_step((rank - 1) / 8, largest_rank=8)
    assert adapter.drawn_rank == rank
    cut = cut_layer(adapter.tensors(), rank)
    read = lora.LoRAModule.from_tensors(adapter.spec, cut).eval()
    assert read.rank == rank
    torch.testing.assert_close(attached(layer, read, x), attached(layer, adapter, x), rtol=1e-4, atol=1e-5)


def test_one_file_for_each_rank_with_metadata_and_hashes_of_its_own(trained, tmp_path, sd1):
    network, path = trained
    assert work(["--model", str(path), "--save_to", str(tmp_path / "split.safetensors"), "--unit", "2"]) == 0
    written = sorted(tmp_path.glob("split-*"))
    assert [file.name for file in written] == [f"split-000{rank}.safetensors" for rank in (2, 4, 6, 8)]
    hashes = set()
    for rank, file in zip((2, 4, 6, 8), written, strict=True):
        found = header(file)
        assert found["ss_network_dim"] == str(rank)
        assert float(found["ss_network_alpha"]) == pytest.approx(4 * (rank / 8) ** 0.5, rel=1e-5)
        assert found["ss_training_comment"] == f"rank {rank} of 8, cut from ball.safetensors; a ball"
        assert found["ss_output_name"] == file.stem, "web UIs take it for the name to call the file by"
        assert found["modelspec.title"] == f"Ball, rank {rank}"
        assert "modelspec.hash_sha256" not in found
        for name in ("ss_network_module", "ss_network_args", "modelspec.architecture"):
            assert found[name] == METADATA[name]
        assert {name: found[name] for name in ("sshs_model_hash", "sshs_legacy_hash")} == sshs_hashes(file)
        hashes.add(found["sshs_model_hash"])
        for name, tensor in load_file(file).items():
            if name.endswith("lora_down.weight"):
                assert len(tensor) == min(rank, 4 if tensor.shape[2:] == (3, 3) else 8)
    assert len(hashes) == 4
    full, source = load_file(written[-1]), load_file(path)
    assert full.keys() == source.keys()
    assert all(torch.equal(full[name], source[name]) for name in source)


def test_ranks_below_a_layers_own_keep_it_as_it_is(trained, tmp_path):
    _, path = trained
    at_six = load_file(cut_file(path, tmp_path / "split.safetensors", 2)[2])
    source = load_file(path)
    small = [name.partition(".")[0] for name, tensor in source.items() if tensor.shape[2:] == (3, 3)]
    assert small
    for name in small:
        for tensor in ("alpha", "lora_down.weight", "lora_up.weight"):
            assert torch.equal(at_six[f"{name}.{tensor}"], source[f"{name}.{tensor}"])


@torch.no_grad()
def test_a_cut_file_gives_the_same_in_diffusers(trained, tmp_path, sd1, tiny_sd1_folder):
    from diffusers import StableDiffusionPipeline

    network, path = trained
    cut = cut_file(path, tmp_path / "split.safetensors", 2)[1]
    network.apply_to(sd1.text_encoder, sd1.unet)
    for _, adapter in network.items():
        adapter.train().begin_step(0.3, largest_rank=8)
    base = StableDiffusionPipeline.from_pretrained(tiny_sd1_folder, local_files_only=True)
    base.load_lora_weights(cut.parent, weight_name=cut.name)
    theirs = base.unet(sd1.latents, torch.tensor([10, 500]), sd1.context).sample
    ours = sd1.picture()
    network.set_multiplier(0)
    assert (ours - sd1.picture()).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_files_without_metadata_alpha_or_full_precision(tmp_path, suffix):
    layer, _ = layer_and_input("linear")
    tensors = {f"lora_unet_a.{name}": value.half() for name, value in module(layer).tensors().items() if name != "alpha"}
    source = tmp_path / f"bare{suffix}"
    torch.save(tensors, source) if suffix == ".ckpt" else save_file(tensors, source)
    first, second = cut_file(source, tmp_path / "cut.safetensors", 4)
    assert header(first)["ss_training_comment"] == "rank 4 of 8, cut from " + source.name
    assert float(header(first)["ss_network_alpha"]) == pytest.approx(8 * 0.5**0.5, rel=1e-3)
    assert header(second)["ss_network_alpha"] == "8"
    found = load_file(first)
    alpha = found.pop("lora_unet_a.alpha")
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert alpha.item() == pytest.approx(8 * 0.5**0.5, rel=1e-7), "half precision would lose digits of it"
    as_torch, _ = cut_file(source, tmp_path / "cut.pt", 4)
    assert torch.load(as_torch, weights_only=True).keys() == load_file(first).keys()


def test_an_alpha_that_is_stored_as_a_whole_number_is_not_cut_to_one(tmp_path):
    tensors = {f"lora_unet_a.{name}": value for name, value in module(layer_and_input("linear")[0]).tensors().items()}
    save_file(tensors | {"lora_unet_a.alpha": torch.tensor(6)}, tmp_path / "whole.safetensors")
    first, _ = cut_file(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors", 4)
    assert load_file(first)["lora_unet_a.alpha"].item() == pytest.approx(6 * 0.5**0.5, rel=1e-7)


def test_the_door_works_from_any_directory(trained, tmp_path):
    _, path = trained
    ended = run_script(DOOR, "--model", path, "--save_to", "split.safetensors", "--unit", 4, cwd=tmp_path)
    ended.require_success()
    assert ended.last_line == "saved split-0008.safetensors (re-opened and compared)"
    assert sorted(file.name for file in tmp_path.glob("split*")) == ["split-0004.safetensors", "split-0008.safetensors"]
    refused = run_script(DOOR, "--model", path, "--save_to", "no/split.safetensors", "--unit", 3, cwd=tmp_path)
    assert_refused(refused, "--unit 3: does not divide the file's rank, 8; give the unit that it was trained with")


def dense(tensors, name) -> torch.Tensor:
    """A layer's change, fp64, as readers compute it."""
    up, down = (tensors[f"{name}.lora_{way}.weight"].double().flatten(1) for way in ("up", "down"))
    return float(tensors[f"{name}.alpha"]) / len(down) * up @ down


def test_a_report_and_a_picture_tell_how_far_each_rank_is_from_the_full_one(trained, tmp_path, capsys):
    _, path = trained
    report, plots, save_to = tmp_path / "r.json", [tmp_path / "0.png", tmp_path / "1.png"], tmp_path / "split.safetensors"
    command = ["--model", str(path), "--save_to", str(save_to)]
    assert work([*command, "--unit", "4", "--plot", str(plots[0])]) == 0
    capsys.readouterr()
    assert work([*command, "--unit", "2", "--plot", str(plots[1]), "--report", str(report)]) == 0
    assert_is_another_picture(*plots)
    told, source = json.loads(report.read_text()), load_file(path)
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    for rank, (file, found) in zip((2, 4, 6, 8), told["files"].items(), strict=True):
        cut, lost, had = load_file(file), 0.0, 0.0
        for name, layer in found["layers"].items():
            full = dense(source, name)
            away, norm = float((full - dense(cut, name)).norm()), float(full.norm())
            assert layer["rank"] == len(cut[f"{name}.lora_down.weight"])
            assert layer["norm"] == pytest.approx(norm, rel=1e-5)
            assert layer["relative_error"] == pytest.approx(away / norm, rel=1e-4, abs=1e-7)
            lost, had = lost + away**2, had + norm**2
        assert found["relative_error"] == pytest.approx((lost / had) ** 0.5, rel=1e-4, abs=1e-7)
        assert rows[str(rank)][-1] == f"{found['relative_error']:.3g}"
    for name, layer in told["layers"].items():
        values = torch.linalg.svdvals(dense(source, name))[: layer["rank"]]
        assert layer["singular_values"] == pytest.approx(values.tolist(), rel=1e-3, abs=1e-5 * float(values[0]))


def test_a_report_takes_the_place_of_no_file(trained, tmp_path, capsys):
    from library.cli.doors import run_door
    from tests.support.command_lines import Finished

    _, path = trained
    for option, place, sentence in [
        ("--report", path, "is one of the inputs"),
        ("--report", tmp_path / "split-0004.safetensors", "has the suffix of a tensor file"),
        ("--plot", tmp_path / "split.jpg", "is no name of a PNG file; let it end in .png"),
    ]:
        command = ["--model", path, "--save_to", tmp_path / "split.safetensors", "--unit", 4, option, place]
        status = run_door("extract_lora_from_dylora", work, list(map(str, command)))
        captured = capsys.readouterr()
        assert_refused(Finished(status, captured.out, captured.err), sentence)
    assert not list(tmp_path.glob("split*"))


def loha_file(path):
    adapter = acting(loha.LoHaModule(module(layer_and_input("linear")[0]).spec, rank=4, alpha=1))
    save_file({f"lora_unet_a.{name}": tensor.contiguous() for name, tensor in adapter.tensors().items()}, path)


def damaged_file(path):
    tensors = {f"lora_unet_a.{name}": tensor for name, tensor in module(layer_and_input("linear")[0]).tensors().items()}
    tensors["lora_unet_a.lora_up.weight"][0, 0] = float("nan")
    save_file(tensors, path)


def file_with(path, **changes):
    tensors = {f"lora_unet_a.{name}": tensor for name, tensor in module(layer_and_input("linear")[0]).tensors().items()}
    save_file(tensors | {f"lora_unet_a.{name.replace('__', '.')}": tensor for name, tensor in changes.items()}, path)


REFUSED = {
    "no unit": (["--unit"], ["--unit: not given; give the unit of the training"]),
    "nothing": (["--unit", "--model", "--save_to"], ["--model: not given", "--save_to: not given", "--unit: not given"]),
    "unit 0": ({"--unit": 0}, ["--unit 0: is below 1"]),
    "unit of text": ({"--unit": "four"}, ["--unit: 'four' is not a whole number"]),
    "no such file": ({"--model": "baal.safetensors"}, ["baal.safetensors: no such file"]),
    "not low-rank": (
        {"--model": "loha.safetensors"},
        ["loha.safetensors: is no LoRA file that can be cut: lora_unet_a has"],
    ),
    "not finite": ({"--model": "nan.safetensors"}, ["lora_unet_a.lora_up.weight holds values that are not finite"]),
    "two alphas": ({"--model": "alphas.safetensors"}, ["the alpha of lora_unet_a is not one number"]),
    "no rank": ({"--model": "empty.safetensors"}, ["which do not belong together"]),
    "no suffix": ({"--save_to": "split"}, ["--save_to split: has no suffix of a tensor file"]),
    "the model itself": ({"--save_to": "ball.safetensors"}, ["ball.safetensors is the file to cut"]),
    "one of its ranks": (
        {"--model": "out-0002.safetensors", "--save_to": "out.safetensors"},
        ["out-0002.safetensors is the file to cut"],
    ),
    "no folder": ({"--save_to": "missing/split.safetensors"}, ["missing"]),
    "unknown option": ({"--units": 2}, ["--unit"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_a_sentence_and_writes_nothing(case, tmp_path, monkeypatch, capsys):
    from library.cli.doors import run_door
    from tests.support.command_lines import Finished

    monkeypatch.chdir(tmp_path)
    layer, _ = layer_and_input("linear")
    for name in ("ball", "out-0002"):
        save_file({f"lora_unet_a.{key}": t for key, t in module(layer).tensors().items()}, f"{name}.safetensors")
    loha_file("loha.safetensors")
    damaged_file("nan.safetensors")
    file_with("alphas.safetensors", alpha=torch.ones(2))
    file_with("empty.safetensors", lora_down__weight=torch.ones(0, 16), lora_up__weight=torch.ones(24, 0))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*")}
    changes, sentences = REFUSED[case]
    options = {"--model": "ball.safetensors", "--save_to": "split.safetensors", "--unit": 2}
    options = {**options, **changes} if isinstance(changes, dict) else {k: v for k, v in options.items() if k not in changes}
    status = run_door("extract_lora_from_dylora", work, [str(part) for pair in options.items() for part in pair])
    captured = capsys.readouterr()
    assert_refused(Finished(status, captured.out, captured.err), *sentences)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*")} == before


def test_rank_4_cut_from_dylora_is_better_than_rank_4_cut_from_lora(sd1, perturb, tmp_path):
    """Both trained alike at rank 16, on what another adapter makes of some captions."""
    encoder = sd1.text_encoder
    captions = torch.randint(0, 49000, (8, 4, 12), generator=stream(0))
    teacher = perturb(lora.create_network(1.0, 8, 8, None, encoder, None))
    teacher.attach()
    with torch.no_grad():
        wanted = [encoder(tokens).last_hidden_state for tokens in captions]
    teacher.detach()

    def loss_of(place: int) -> torch.Tensor:
        return (encoder(captions[place]).last_hidden_state - wanted[place]).square().mean()

    @torch.no_grad()
    def loss_with(file) -> float:
        network, _ = lora.create_network_from_weights(1.0, file, None, encoder, None)
        network.attach()
        loss = sum(loss_of(place).item() for place in range(8)) / 8
        network.detach()
        return loss

    losses = {}
    for kind, network_args in ((dylora, {"unit": 4}), (lora, {})):
        network = kind.create_network(1.0, 16, 16, None, encoder, None, seed=3, **network_args)
        network.apply_to(encoder, None)
        groups, _ = network.prepare_optimizer_params(5e-3, None, None)
        network.on_epoch_start()
        optimizer = torch.optim.AdamW(groups)
        for step in range(300):
            network.begin_step(1, step)
            loss_of(step % 8).backward()
            optimizer.step()
            optimizer.zero_grad()
        network.detach()
        network.save_weights(tmp_path / "whole.safetensors", None, None)
        losses[kind] = [loss_with(file) for file in cut_file(tmp_path / "whole.safetensors", tmp_path / "cut.pt", 4)]
    assert losses[dylora][0] < 0.5 * losses[lora][0]
    assert losses[dylora][0] < 2 * losses[dylora][-1], "little is lost with the upper ranks"
    assert losses[lora][0] > 5 * losses[lora][-1], "where LoRA's ranks all need each other"
