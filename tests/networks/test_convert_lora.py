"""The converter as a user runs it, on real files of every algorithm; diffusers and the formulas judge the results."""

from __future__ import annotations

import importlib
import json
import logging
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.hashes import sshs_hashes
from library.errors import UserError
from library.families.sd1 import SD1
from networks import lora
from networks.convert_lora import READERS, work
from networks.formats import readers
from networks.formats.keys import by_layer, to_kohya
from tests.support.command_lines import assert_is_another_picture, assert_refused, run_script
from tests.support.tiny_models import build_tiny_parts

METADATA = {"ss_base_model_version": "sd_v1", "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_tag_frequency": "{}"}
OF_THE_BASE = ("lora dora", "glora", "ia3", "oft", "boft")
FILES = {
    "lora": {"conv_dim": "2", "conv_alpha": "1"},
    "lora dora": {"dora_wd": "True", "wd_on_output": "True"},
    "loha": {"conv_dim": "2"},
    "lokr": {"factor": "4"},
    "glora": {},
    "ia3": {},
    "oft": {},
    "boft": {},
}


@pytest.fixture(scope="module")
def parts():
    return build_tiny_parts(SD1)


@pytest.fixture(scope="module")
def files(parts, tmp_path_factory):
    """Files of every algorithm whose layers act, by a name in `FILES`; made when asked for."""
    folder = tmp_path_factory.mktemp("files")

    def file(name):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            module = importlib.import_module(f"networks.{name.split()[0]}")
            network = module.create_network(1.0, 4, 2, None, parts["text_encoder"], parts["unet"], **FILES[name])
            stream = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
            network.save_weights(path, None, METADATA)
        return path

    return file


def convert(capsys, source, target, *arguments):
    capsys.readouterr()
    assert work(["--model", str(source), "--save_to", str(target), *map(str, arguments)]) == 0
    progress, *lines = capsys.readouterr().out.splitlines()
    assert progress.startswith("layers: ")
    return lines


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@torch.no_grad()
def run(unet, text_encoder):
    """What models make of fixed inputs."""
    stream = torch.Generator().manual_seed(5)
    latents, context = torch.randn(2, 4, 16, 16, generator=stream), torch.randn(2, 7, 32, generator=stream)
    tokens = torch.randint(0, 49000, (2, 12), generator=stream)
    return unet(latents, torch.tensor([10, 500]), context).sample, text_encoder(tokens).last_hidden_state


@pytest.fixture(scope="module")
def plain(parts):
    return run(parts["unet"], parts["text_encoder"])


@pytest.fixture(scope="module")
def pipe(tiny_sd1_folder):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny_sd1_folder, local_files_only=True)


def outputs(parts, path):
    """The same with a file on the tiny model, read by ourselves."""
    network, _ = lora.create_network_from_weights(1.0, path, None, parts["text_encoder"], parts["unet"])
    network.attach()
    try:
        return run(parts["unet"], parts["text_encoder"])
    finally:
        network.detach()


def assert_same_outputs(made, expected, plain, tolerance=1e-3):
    for one, other, base in zip(made, expected, plain, strict=True):
        assert (other - base).abs().max() > 0.02 * base.abs().max(), "the adapter acts"
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * base.abs().max().item())


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_for_diffusers_diffusers_loads_and_means_the_same(
    name, files, parts, plain, pipe, tiny_sd1_folder, tmp_path, capsys
):
    lines = convert(capsys, files(name), tmp_path / "new.safetensors", "--for", "diffusers", "--base", tiny_sd1_folder)
    assert lines[-1] == "applied rightly by diffusers (re-opened and compared)"
    assert_same_outputs(in_diffusers(pipe, tmp_path / "new.safetensors"), outputs(parts, files(name)), plain)


@pytest.mark.parametrize("name", ["lora", "lora dora"])
def test_diffusers_reads_its_own_names(name, files, parts, plain, pipe, tmp_path, capsys):
    lines = convert(capsys, files(name), tmp_path / "new.safetensors", "--to", "diffusers")
    assert "diffusers" in lines[-1].partition(";")[0]
    assert_same_outputs(in_diffusers(pipe, tmp_path / "new.safetensors"), outputs(parts, files(name)), plain)


def in_diffusers(pipe, path):
    """What the tiny model makes of the inputs with a file that diffusers has loaded."""
    logging.disable(logging.WARNING)
    try:
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        return run(pipe.unet, pipe.text_encoder)
    finally:
        logging.disable(logging.NOTSET)
        pipe.unload_lora_weights()


@pytest.mark.parametrize("algorithm", ["lora", "full"])
@pytest.mark.parametrize("name", FILES)
def test_every_algorithm_becomes_lora_or_the_full_difference_exactly(
    name, algorithm, files, parts, plain, tiny_sd1_folder, tmp_path, capsys
):
    target = tmp_path / "new.safetensors"
    base = ["--base", tiny_sd1_folder] if name in OF_THE_BASE else []
    lines = convert(capsys, files(name), target, "--algorithm", algorithm, *base)
    suffixes = {"lora": {"lora_up.weight", "lora_down.weight", "alpha"}, "full": {"diff"}}
    assert all(set(own) <= suffixes[algorithm] for own in by_layer(load_file(target)).values())
    assert any(line.startswith(("relative error of the change: ", "the change is the same")) for line in lines)
    assert_same_outputs(outputs(parts, target), outputs(parts, files(name)), plain)
    metadata = metadata_of(target)
    assert metadata["ss_tag_frequency"] == "{}"
    assert sshs_hashes(target).items() <= metadata.items()
    if algorithm == "full":
        assert metadata["ss_network_module"] == "networks.full"
        assert "ss_network_dim" not in metadata


def test_a_report_and_a_picture_tell_what_a_conversion_lost(files, tmp_path, capsys):
    target, report, plots = tmp_path / "low.safetensors", tmp_path / "r.json", [tmp_path / "0.png", tmp_path / "1.png"]
    command = [files("loha"), target, "--algorithm", "lora", "--rank"]
    convert(capsys, *command, 5, "--plot", plots[0])
    lines = convert(capsys, *command, 2, "--plot", plots[1], "--report", report)
    assert_is_another_picture(*plots)
    told, layers, source = json.loads(report.read_text()), by_layer(load_file(target)), by_layer(load_file(files("loha")))
    assert told["layers"].keys() == layers.keys() == source.keys()
    lost = had = 0.0
    for name, tensors in layers.items():
        own, found = source[name], told["layers"][name]
        scale = float(own["alpha"]) / len(own["hada_w1_b"])
        delta = scale * (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        made = (float(tensors["alpha"]) / 2) * tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)
        away, norm = float((delta - made).norm()), float(delta.norm())
        assert (found["rank"], found["norm"]) == (2, pytest.approx(norm, rel=1e-4))
        assert found["relative_error"] == pytest.approx(away / norm, rel=1e-3)
        values = torch.linalg.svdvals(made)[:2].tolist()
        assert found["singular_values"] == pytest.approx(values, rel=1e-3)
        lost, had = lost + away**2, had + norm**2
    assert told["relative_error"] == pytest.approx((lost / had) ** 0.5, rel=1e-3)
    total = next(line for line in lines if line.startswith("total"))
    assert total.split()[1:4] == [str(len(layers)), "2", f"{told['relative_error']:.3g}"]


def test_what_is_only_renamed_is_reported_as_it_was(files, tmp_path, capsys):
    target, report, plot = tmp_path / "peft.safetensors", tmp_path / "r.json", tmp_path / "p.png"
    lines = convert(capsys, files("lora"), target, "--to", "diffusers", "--report", report, "--plot", plot)
    told = json.loads(report.read_text())
    assert (told["relative_error"], told["layers"]) == (0.0, {})
    assert set(told["as_they_were"]) == set(by_layer(load_file(files("lora"))))
    assert "the change is the same, bit for bit" in lines
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_lower_rank_is_the_best_of_that_rank_and_says_what_it_loses(files, tmp_path, capsys):
    target = tmp_path / "low.safetensors"
    lines = convert(capsys, files("loha"), target, "--algorithm", "lora", "--rank", 2)
    assert "ranks 2" in lines[0] or "rank 2" in lines[0]
    (sentence,) = [line for line in lines if line.startswith("relative error of the change: ")]
    told = float(sentence.split()[5])
    layers, source = by_layer(load_file(target)), by_layer(load_file(files("loha")))
    lost = had = 0.0
    for name, tensors in layers.items():
        own = source[name]
        delta = (
            (float(own["alpha"]) / len(own["hada_w1_b"]))
            * (own["hada_w1_a"] @ own["hada_w1_b"])
            * (own["hada_w2_a"] @ own["hada_w2_b"])
        )
        made = (float(tensors["alpha"]) / 2) * tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)
        values = torch.linalg.svdvals(delta)
        assert float((delta - made).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-3)
        lost, had = lost + float((delta - made).norm()) ** 2, had + float(delta.norm()) ** 2
    assert told == pytest.approx((lost / had) ** 0.5, rel=0.05)
    assert 0.05 < told < 0.9
    assert metadata_of(target)["ss_network_dim"] == "2"


@pytest.mark.parametrize("name", ["lora", "lora dora"])
def test_peft_names_and_back_is_the_same_file(name, files, tmp_path, capsys):
    lines = convert(capsys, files(name), tmp_path / "peft.safetensors", "--to", "diffusers")
    assert "the change is the same, bit for bit" in lines
    assert all(key.startswith(("unet.", "text_encoder.")) for key in load_file(tmp_path / "peft.safetensors"))
    convert(capsys, tmp_path / "peft.safetensors", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == files(name).read_bytes()


def test_old_names_of_glora_for_the_programs_that_want_them(files, tmp_path, capsys, tiny_sd1_folder):
    base = ["--base", tiny_sd1_folder]
    lines = convert(capsys, files("glora"), tmp_path / "old.safetensors", "--for", "a1111", *base)
    assert "210 glora: respelled" in lines[0]
    assert lines[-1] == "applied rightly by A1111 (re-opened and compared)"
    linear = {name: own for name, own in by_layer(load_file(tmp_path / "old.safetensors")).items() if "attn" in name}
    assert all(own["b2.weight"].shape[1] == own["b1.weight"].shape[0] == 4 for own in linear.values())


def test_an_alpha_of_oft_that_a_program_takes_for_no_rotation_is_written_anew(files, parts, plain, tmp_path, capsys):
    tensors = {key: torch.zeros(()) if key.endswith("alpha") else value for key, value in load_file(files("oft")).items()}
    save_file(tensors, tmp_path / "a.safetensors", METADATA)
    lines = convert(capsys, tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--for", "sdnext")
    assert "210 oft: respelled" in lines[0]
    assert_same_outputs(outputs(parts, tmp_path / "b.safetensors"), outputs(parts, files("oft")), plain)


def wide_file(path, *, alphas=(2.0, 2.0), extra=None):
    """A file of full-size layers, few of them: attention, convolution, text encoder."""
    stream = torch.Generator().manual_seed(2)
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    sizes = {f"{block}_attn2_to_k": (320, 768), f"{block}_attn2_to_q": (320, 320)}
    sizes["lora_te_text_model_encoder_layers_0_self_attn_q_proj"] = (768, 768)
    tensors = {}
    for number, (name, (outputs_, inputs)) in enumerate(sizes.items()):
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, inputs, generator=stream)
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs_, 4, generator=stream)
        tensors[f"{name}.alpha"] = torch.tensor(alphas[number % 2])
    save_file(tensors | (extra or {}), path, {"ss_network_dim": "4", "ss_network_alpha": "Dynamic"})
    return path


def test_for_all_gives_one_alpha_and_whole_attention(tmp_path, capsys):
    source = wide_file(tmp_path / "a.safetensors", alphas=(2.0, 8.0))
    lines = convert(capsys, source, tmp_path / "b.safetensors", "--for", "all")
    assert lines[-1] == (
        "applied rightly by ComfyUI, A1111, Forge, SD.Next, diffusers, LyCORIS, InvokeAI (re-opened and compared)"
    )
    before, after = by_layer(load_file(source)), by_layer(load_file(tmp_path / "b.safetensors"))
    assert {float(own["alpha"]) for own in after.values()} == {2.0}
    assert after.keys() - before.keys() == {
        f"lora_te_text_model_encoder_layers_0_self_attn_{letter}_proj" for letter in ("k", "v", "out")
    }
    for name, own in after.items():
        made = float(own["alpha"]) / len(own["lora_down.weight"]) * own["lora_up.weight"] @ own["lora_down.weight"]
        if name not in before:
            assert not made.any()
            continue
        was = before[name]
        meant = float(was["alpha"]) / len(was["lora_down.weight"]) * was["lora_up.weight"] @ was["lora_down.weight"]
        torch.testing.assert_close(made, meant, rtol=1e-4, atol=1e-4)
    assert metadata_of(tmp_path / "b.safetensors")["ss_network_alpha"] == "2"


def test_attention_of_an_sd2_text_encoder_is_completed_for_a1111(tmp_path, capsys):
    layer = "lora_te_text_model_encoder_layers_0_self_attn_{}_proj"
    tensors = {f"{layer.format('q')}.{name}": tensor for name, tensor in lora_tensors(1024, 1024).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    lines = convert(capsys, tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--for", "a1111", "forge")
    assert lines[-1] == "applied rightly by A1111, Forge (re-opened and compared)"
    made = by_layer(load_file(tmp_path / "b.safetensors"))
    assert made.keys() == {layer.format(letter) for letter in ("q", "k", "v", "out")}
    assert [name for name, own in made.items() if own["lora_down.weight"].any()] == [layer.format("q")]


@pytest.mark.parametrize("place", ["attn2_to_k", "attn1_to_k"])
def test_invokeai_gets_a_layer_that_shows_the_base(place, tmp_path, capsys):
    name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{place}"
    width = 768 if place.startswith("attn2") else 320
    shapes = {"lokr_w1": (16, 16), "lokr_w2_a": (20, 4), "lokr_w2_b": (4, width // 16)}
    stream = torch.Generator().manual_seed(4)
    tensors = {f"{name}.{tensor}": torch.randn(shape, generator=stream) for tensor, shape in shapes.items()}
    save_file(tensors | {f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors", METADATA)
    lines = convert(capsys, tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--for", "invokeai")
    assert lines[-1] == "applied rightly by InvokeAI (re-opened and compared)"
    made = by_layer(load_file(tmp_path / "b.safetensors"))
    shown = made[name.replace("attn1", "attn2")]
    assert shown["lora_down.weight"].shape[1] == 768
    assert bool(shown["lora_up.weight"].any()) is place.startswith("attn2")
    assert place.startswith("attn2") or "lokr_w1" in made[name]


def test_original_names_and_torch_files_are_read_and_written(tmp_path, capsys):
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.{tensor}": value for tensor, value in lora_tensors(320, 768).items()}
    torch.save(tensors, tmp_path / "a.pt")
    lines = convert(capsys, tmp_path / "a.pt", tmp_path / "b.ckpt", "--for", "all")
    assert lines[-1].startswith("applied rightly by ComfyUI, A1111, Forge, SD.Next, diffusers, LyCORIS, InvokeAI")
    read = torch.load(tmp_path / "b.ckpt", weights_only=True)
    ours = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    assert torch.equal(read[f"{ours}.lora_up.weight"], tensors[f"{name}.lora_up.weight"])


def lora_tensors(outputs_, inputs):
    stream = torch.Generator().manual_seed(4)
    down, up = torch.randn(4, inputs, generator=stream), torch.randn(outputs_, 4, generator=stream)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}


def test_norms_and_biases_are_not_lost_in_silence(tmp_path, capsys):
    block = "lora_unet_down_blocks_0_attentions_0"
    extra = {f"{block}_norm.w_norm": torch.ones(320), f"{block}_norm.b_norm": torch.ones(320)}
    extra |= {f"{block}_proj_out.diff": torch.eye(320), f"{block}_proj_out.diff_b": torch.ones(320)}
    source = wide_file(tmp_path / "a.safetensors", extra=extra)
    with pytest.raises(UserError, match="something of 2 layers would be lost .*change of a norm.*change of a bias"):
        convert(capsys, source, tmp_path / "b.safetensors", "--for", "diffusers")
    assert os.listdir(tmp_path) == ["a.safetensors"]
    lines = convert(capsys, source, tmp_path / "b.safetensors", "--for", "diffusers", "--leave_out")
    assert lines[1].startswith("left out something of 2 layers: ")
    made = by_layer(load_file(tmp_path / "b.safetensors"))
    assert f"{block}_norm" not in made
    own = made[f"{block}_proj_out"]
    assert own["lora_down.weight"].shape == (320, 320, 1, 1)


def test_precision_is_the_sources_or_as_asked_and_alphas_stay_exact(tmp_path, capsys):
    half = {key: value.half() for key, value in load_file(wide_file(tmp_path / "a.safetensors")).items()}
    save_file(half, tmp_path / "half.safetensors")
    convert(capsys, tmp_path / "half.safetensors", tmp_path / "b.safetensors", "--algorithm", "lora")
    assert {value.dtype for value in load_file(tmp_path / "b.safetensors").values()} == {torch.float16}
    odd = wide_file(tmp_path / "odd.safetensors", alphas=(2.03125, 2.03125))
    lines = convert(capsys, odd, tmp_path / "c.safetensors", "--save_precision", "bf16")
    tensors = load_file(tmp_path / "c.safetensors")
    assert {value.dtype for key, value in tensors.items() if "weight" in key} == {torch.bfloat16}
    assert {float(value) for key, value in tensors.items() if "alpha" in key} == {2.03125}
    error = float(next(line for line in lines if line.startswith("relative")).split()[5])
    assert 1e-4 < error < 1e-2


REFUSED = {
    ("--algorithm", "lora"): "is DoRA, whose change depends on the base model; give it with --base",
    ("--for", "comfyui"): "is DoRA, whose change depends on the base model; give it with --base",
    ("--for", "comfyui", "--algorithm", "lora"): "the program decides the algorithm",
    ("--for", "comfy"): "'comfy' is not known",
    ("--rank", "0", "--algorithm", "lora"): "--rank 0: is below 1",
    ("--rank", "4"): "--rank 4: has no effect",
    ("--base", "nowhere.safetensors"): "nowhere.safetensors",
    ("--to", "diffusers", "--save_to", "new.pt"): "new.pt: can hold no metadata, where diffusers' layout has alphas",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_mistakes_are_sentences_and_nothing_is_written(arguments, files, tmp_path, capsys):
    with pytest.raises(UserError) as raised:
        convert(capsys, files("lora dora"), tmp_path / "b.safetensors", *arguments)
    assert REFUSED[arguments] in str(raised.value)
    assert os.listdir(tmp_path) == []


def test_what_no_form_helps_is_refused(files, tmp_path, capsys, tiny_sd2_folder):
    with pytest.raises(UserError, match="InvokeAI would refuse it .it tells the base model by the width 32"):
        convert(capsys, files("lora"), tmp_path / "b.safetensors", "--for", "invokeai")
    with pytest.raises(UserError, match=r"is Stable Diffusion 2\.x, and the adapter is for Stable Diffusion 1\.x"):
        convert(capsys, files("oft"), tmp_path / "b.safetensors", "--algorithm", "lora", "--base", tiny_sd2_folder)
    with pytest.raises(UserError, match="PEFT's layout has no place for it; use --to kohya"):
        convert(capsys, files("loha"), tmp_path / "b.safetensors", "--to", "diffusers")
    bad = load_file(files("lora"))
    bad["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"][0] = float("inf")
    save_file(bad, tmp_path / "bad.safetensors", METADATA)
    with pytest.raises(UserError, match="has values that are not finite in lora_up.weight"):
        convert(capsys, tmp_path / "bad.safetensors", tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["bad.safetensors"]


def test_the_door_works_from_any_folder_and_refuses_in_one_line(tmp_path, files):
    script = "networks/convert_lora.py"
    help_text = run_script(script, "--help", cwd=tmp_path).require_success().out
    assert "--leave_out" in help_text
    assert_refused(run_script(script, cwd=tmp_path), "--model: not given", "--save_to: not given")
    done = run_script(script, "--model", files("lora"), "--save_to", "new.safetensors", cwd=tmp_path).require_success()
    assert done.last_line.startswith("read rightly by ComfyUI, A1111, Forge, SD.Next, diffusers, LyCORIS")
    assert to_kohya(load_file(tmp_path / "new.safetensors"), SD1).keys() == load_file(files("lora")).keys()


def test_the_door_names_every_reader():
    assert set(READERS) == set(readers.READERS)
