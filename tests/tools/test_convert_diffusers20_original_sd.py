"""The converter as a user runs it: both ways, every precision, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from library.checkpoints.base_model import open_base_model
from library.checkpoints.tensor_files import open_tensor_file
from library.errors import UserError
from library.families.sd1 import SD1
from tools.convert_diffusers20_original_sd import convert, parse_options

ROOT = Path(__file__).resolve().parents[2]
DOOR = ROOT / "tools" / "convert_diffusers20_original_sd.py"


def run(*argv: object) -> str:
    return convert(parse_options([str(argument) for argument in argv]))


def run_door(*argv: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOOR), *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def assert_same_model(path: Path, other: Path, dtype: torch.dtype = torch.float32) -> None:
    ours, theirs = open_base_model(path), open_base_model(other)
    for kind in SD1.parts:
        mine, expected = ours.parts[kind], theirs.parts[kind]
        assert set(mine.sources) == set(expected.sources)
        for name, source in mine.sources.items():
            tensor, wanted = source.read(), expected.sources[name].read()
            assert tensor.dtype == dtype
            assert torch.equal(tensor.flatten(), wanted.flatten().to(dtype)), name


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_folder_to_file_to_folder_is_the_same_model(name, request, tmp_path):
    folder = request.getfixturevalue(f"tiny_{name}_folder")
    run(folder, tmp_path / "model.safetensors")
    run(tmp_path / "model.safetensors", tmp_path / "back")
    assert_same_model(tmp_path / "model.safetensors", folder)
    assert_same_model(tmp_path / "back", folder)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_written_folder_is_what_diffusers_loads(name, request, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    folder, single = (request.getfixturevalue(f"tiny_{name}_{form}") for form in ("folder", "file"))
    run(single, tmp_path / "model")
    pictures = []
    for path in (folder, tmp_path / "model"):
        pipeline = StableDiffusionPipeline.from_pretrained(path, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
        pictures.append(pipeline("a cat", generator=torch.Generator().manual_seed(1), **settings).images)
    assert pictures[0].std() > 0.01
    assert (pictures[0] == pictures[1]).all()


def test_what_a_file_predicts_survives_both_ways(tiny_sd2_v_folder, tmp_path):
    run(tiny_sd2_v_folder, tmp_path / "model.safetensors")
    assert open_base_model(tmp_path / "model.safetensors").prediction_type == "v_prediction"
    run(tmp_path / "model.safetensors", tmp_path / "back")
    assert open_base_model(tmp_path / "back").prediction_type == "v_prediction"


def test_heads_and_groups_that_shapes_do_not_show_survive(tiny_sd1_folder, tmp_path):
    import shutil

    odd = tmp_path / "odd"
    shutil.copytree(tiny_sd1_folder, odd)
    changes = {"unet": {"attention_head_dim": 4}, "vae": {"norm_num_groups": 8}, "text_encoder": {"num_attention_heads": 2}}
    for part, change in changes.items():
        config = odd / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    run(odd, tmp_path / "model.safetensors")
    for part, change in changes.items():
        assert change.items() <= open_base_model(tmp_path / "model.safetensors").parts[part].config.items()


PRECISIONS = {
    ("--fp16",): torch.float16,
    ("--bf16",): torch.bfloat16,
    ("--float",): torch.float32,
    ("--save_precision_as", "bf16"): torch.bfloat16,
    (): torch.float32,
}


@pytest.mark.parametrize("flags", PRECISIONS, ids=lambda flags: " ".join(flags) or "none")
def test_numbers_are_saved_as_asked(flags, tiny_sd1_file, tmp_path):
    run(tiny_sd1_file, tmp_path / "model.safetensors", *flags)
    assert_same_model(tmp_path / "model.safetensors", tiny_sd1_file, PRECISIONS[flags])


def test_counters_of_checkpoints_add_up_and_beside_tensors_survive(tiny_sd2_file, tmp_path):
    run(tiny_sd2_file, tmp_path / "a.ckpt", "--epoch", 2, "--global_step", 100, "--fp16")
    run(tmp_path / "a.ckpt", tmp_path / "b.ckpt", "--epoch", 3)
    content = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (5, 100)
    assert set(content["state_dict"]) == set(open_tensor_file(tiny_sd2_file).keys())


def test_a_written_sd2_file_has_the_layer_that_readers_count(tiny_sd2_file):
    """Web UIs build 24 layers and use 23: OpenCLIP's last is there, and the text model's other tensors."""
    keys = set(open_tensor_file(tiny_sd2_file).keys())
    prefix = "cond_stage_model.model."
    assert {
        f"{prefix}transformer.resblocks.2.attn.in_proj_weight",
        f"{prefix}text_projection",
        f"{prefix}logit_scale",
    } <= keys


def test_metadata_are_json_and_never_run(tiny_sd1_file, tmp_path, monkeypatch):
    run(tiny_sd1_file, tmp_path / "m.safetensors", "--metadata", '{"author": "me", "n": 3, "modelspec.title": "T"}')
    metadata = open_tensor_file(tmp_path / "m.safetensors").metadata
    assert {
        "author": "me",
        "n": "3",
        "modelspec.title": "T",
        "modelspec.prediction_type": "epsilon",
    }.items() <= metadata.items()
    sentinel = tmp_path / "ran"
    with pytest.raises(UserError, match="--metadata: is not JSON"):
        run(tiny_sd1_file, tmp_path / "x.safetensors", "--metadata", f"open({str(sentinel)!r}, 'w')")
    assert not sentinel.exists()


def test_a_reference_gives_scheduler_and_tokenizer(tiny_sd1_file, tiny_sd1_folder, tmp_path):
    import shutil

    reference = tmp_path / "reference"
    shutil.copytree(tiny_sd1_folder, reference)
    config = reference / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}))
    run(tiny_sd1_file, tmp_path / "out", "--reference_model", reference)
    assert json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())["skip_prk_steps"] is True
    assert json.loads((tmp_path / "out/model_index.json").read_text())["scheduler"] == ["diffusers", "PNDMScheduler"]


def test_a_variant_goes_into_the_names_and_out_of_them(tiny_sd1_file, tmp_path):
    run(tiny_sd1_file, tmp_path / "out", "--variant", "fp16", "--fp16")
    assert (tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    run(tmp_path / "out", tmp_path / "back.safetensors", "--variant", "fp16")
    assert_same_model(tmp_path / "back.safetensors", tiny_sd1_file, torch.float16)


REFUSED = {
    ("--fp16", "--bf16"): "bf16 and fp16 exclude each other",
    ("--v1", "--v2"): "--v1 and --v2 exclude each other",
    ("--v2",): r"--v2 was given, but this is Stable Diffusion 1\.x",
    ("--metadata", "[1]"): "--metadata: is not a JSON object",
    ("--epoch", "x"): "--epoch: 'x' is not a whole number",
    ("--fp17",): "--fp17",
}


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_mistakes_are_sentences_and_nothing_is_written(flags, tiny_sd1_file, tmp_path):
    with pytest.raises(UserError, match=REFUSED[flags]):
        run(tiny_sd1_file, tmp_path / "x.safetensors", *flags)
    assert os.listdir(tmp_path) == []


def test_targets_that_cannot_be_meant_are_refused(tiny_sd1_file, tiny_sd1_folder, tmp_path):
    with pytest.raises(UserError, match="is the model to load"):
        run(tiny_sd1_file, tiny_sd1_file)
    with pytest.raises(UserError, match=r"unknown suffix '\.zip'"):
        run(tiny_sd1_file, tmp_path / "x.zip")
    with pytest.raises(UserError, match=r"only \.safetensors files hold metadata"):
        run(tiny_sd1_file, tmp_path / "x.ckpt", "--metadata", "{}", "--metadata", '{"a": "b"}')


def test_the_door_answers_help_at_once_and_mistakes_in_one_line_from_any_folder(tmp_path):
    started = time.process_time(), os.times().children_user
    answer = run_door("--help", cwd=tmp_path)
    assert answer.returncode == 0
    assert "--save_precision_as" in answer.stdout
    assert os.times().children_user - started[1] < 1.0, "seconds of computing: torch must not be imported"
    mistake = run_door("nothing.safetensors", "out", cwd=tmp_path)
    assert mistake.returncode == 2
    assert mistake.stdout == ""
    assert mistake.stderr == "convert_diffusers20_original_sd: nothing.safetensors: no such file or folder\n"


def test_the_door_says_what_it_wrote_and_nothing_else(tiny_sd1_folder, tmp_path):
    done = run_door(tiny_sd1_folder, "model.safetensors", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("model.safetensors: Stable Diffusion 1.x, ")
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_what_is_said_of_the_family_is_checked(tiny_sdxl_file, tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(UserError, match="--v1 was given, but this is Stable Diffusion XL; leave out --v1"):
        convert(parse_options([str(tiny_sdxl_file), str(target), "--v1"]))
    assert not target.exists()
