"""train_network.py from the command line: what it trains, writes, says and refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.base_model import open_base_model
from library.checkpoints.packed_weights import PackedLayer
from tests.support.command_lines import (
    ENVIRONMENT,
    ROOT,
    assert_refused,
    dataset_file,
    draw_images,
    run_script,
    train_here,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data") / "images", 6)


@pytest.fixture(scope="module")
def dataset(images) -> Path:
    return dataset_file(images.parent / "dataset.toml", images, dataset="resolution = 64\nbatch_size = 2")


of_families = pytest.mark.parametrize("train", ["tiny_sd1_folder", "tiny_sdxl_folder"], indirect=True)
"""Tests of what one text encoder without sizes, and two with them, have to show alike."""


@pytest.fixture
def train(request, capsys, tmp_path, dataset):
    """Runs a short training with given options on top of the usual ones, and returns (how it ended, output folder)."""
    base = request.getfixturevalue(getattr(request, "param", "tiny_sd1_folder"))

    def run(*options: object, out: str = "out", **named: object):
        arguments: dict[str, object] = {
            "pretrained_model_name_or_path": base,
            "dataset_config": dataset,
            "output_dir": tmp_path / out,
            "output_name": "mine",
            "network_module": "networks.lora",
            "learning_rate": 1e-2,
            "max_train_steps": 3,
            "seed": 7,
            "max_data_loader_n_workers": 0,
        } | named
        flat = [part for name, value in arguments.items() if value is not None for part in (f"--{name}", str(value))]
        return train_here(capsys, *flat, *options), tmp_path / out

    return run


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


DOCUMENTED = (
    "--save_model_as=safetensors --prior_loss_weight=1.0 --optimizer_type=AdamW8bit --xformers --mixed_precision=no "
    "--cache_latents --gradient_checkpointing --save_every_n_epochs=1"
)


def test_the_command_line_of_the_documentation_trains_a_lierla_lora(train):
    finished, out = train(
        *DOCUMENTED.split(),
        max_train_steps=6,
        network_module="network.lora",
    )
    finished.require_success()
    assert sorted(path.name for path in out.iterdir()) == ["mine-000001.safetensors", "mine.safetensors"]
    tensors = load_file(out / "mine.safetensors")
    modules = {key.split(".")[0] for key in tensors}
    assert len([name for name in modules if name.startswith("lora_te_")]) == 18  # three layers of six
    assert len([name for name in modules if name.startswith("lora_unet_")]) == 192
    assert all(tensors[f"{name}.alpha"] == 1 for name in modules)
    assert all(tensors[f"{name}.lora_down.weight"].shape[0] == 4 for name in modules)
    ups = torch.stack([tensors[f"{name}.lora_up.weight"].abs().max() for name in modules])
    assert (ups > 0).float().mean() > 0.9, "modules learn, but for queries and keys of a single latent pixel"
    assert "xformers is not installed" in finished.out or "xformers has no kernels" in finished.out
    assert finished.last_line == f"saved {out / 'mine.safetensors'} (re-opened and compared: equal to what was trained)"


def test_the_file_carries_the_metadata_of_the_ecosystem_and_true_hashes(train):
    _, out = train("--network_args", "conv_dim=2", "conv_alpha=0.5", network_dim=8, network_alpha=4)
    path = out / "mine.safetensors"
    metadata = header(path)
    assert metadata["ss_network_dim"] == "8"
    assert metadata["ss_network_alpha"] == "4.0"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "0.5"}
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_steps"] == "3"
    assert metadata["ss_seed"] == "7"
    assert metadata["ss_optimizer"].startswith("torch.optim.adamw.AdamW")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.resolution"] == "64x64"
    assert json.loads(metadata["ss_tag_frequency"])["images"]["sks thing"] == 6
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()


def test_minimal_metadata_keeps_what_readers_need(train):
    _, out = train("--no_metadata")
    metadata = header(out / "mine.safetensors")
    assert {name for name in metadata if name.startswith("ss_")} == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_variants",
    }


def equal(first: Path, second: Path) -> bool:
    one, other = load_file(first / "mine.safetensors"), load_file(second / "mine.safetensors")
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


@of_families
def test_the_same_command_gives_the_same_weights_with_any_number_of_workers(train):
    options = ("--shuffle_caption", "--flip_aug", "--caption_dropout_rate", 0.3, "--network_dropout", 0.2)
    folders = [train(*options, out=f"{workers}", max_data_loader_n_workers=workers)[1] for workers in (0, 0, 2)]
    assert equal(folders[0], folders[1])
    assert equal(folders[0], folders[2])
    assert not equal(folders[0], train(*options, out="other", seed=8)[1])


def difference(first: Path, second: Path) -> float:
    """Relative Frobenius difference of all trained tensors."""
    one, other = load_file(first / "mine.safetensors"), load_file(second / "mine.safetensors")
    apart = sum((one[key] - other[key]).double().pow(2).sum() for key in one)
    return float((apart / sum(one[key].double().pow(2).sum() for key in one)).sqrt())


@of_families
def test_cached_latents_change_nothing_in_memory_or_on_disk(train, images):
    _, plain = train(out="plain")
    _, memory = train("--cache_latents", out="memory")
    _, disk = train("--cache_latents_to_disk", out="disk")
    _, again = train("--cache_latents_to_disk", out="again")
    assert equal(disk, again)
    assert equal(memory, disk)
    assert difference(plain, memory) < 1e-5


VARIED = ("--shuffle_caption", "--caption_dropout_rate", 0.3, "--network_train_unet_only")


@pytest.mark.parametrize(
    ("train", "precision"),
    [("tiny_sd1_folder", "no"), ("tiny_sdxl_folder", "no"), ("tiny_sdxl_folder", "bf16")],
    indirect=["train"],
)
def test_captions_encoded_before_training_change_nothing_in_memory_or_on_disk(train, images, precision):
    options = (*VARIED, "--mixed_precision", precision, "--optimizer_type", "SGD")
    _, plain = train(*options, out="plain")
    memory, in_memory = train(*options, "--cache_text_encoder_outputs", out="memory")
    memory.require_success()
    assert "captions encoded before training" in memory.out
    assert re.search(r"encoding captions: (\d+) of \1\n", memory.out)
    disk, on_disk = train(*options, "--cache_text_encoder_outputs_to_disk", out="disk")
    again, once_more = train(*options, "--cache_text_encoder_outputs_to_disk", out="again")
    assert ("encoding captions" in disk.out, "encoding captions" in again.out) == (True, False)
    assert equal(in_memory, on_disk)
    assert equal(on_disk, once_more)
    assert difference(plain, in_memory) < (1e-5 if precision == "no" else 1e-2)


def test_too_many_captions_leave_the_text_encoders_where_they_are(train, monkeypatch):
    from library.training import text_cache

    monkeypatch.setattr(text_cache, "MOST_BYTES", 30_000)
    _, plain = train(*VARIED, out="plain")
    finished, out = train(*VARIED, "--cache_text_encoder_outputs", out="cached")
    assert re.search(r"text cache: the run has more than \d+ different captions, so the text encoders stay", finished.out)
    assert equal(plain, out)


def with_rounded_weights(folder: Path, target: Path, weight_format: str, *, unet_only: bool) -> Path:
    """A copy of a model whose weights are those that packed layers form."""
    base = open_base_model(folder)
    settings = {"dtype": torch.float32, "device": "cpu", "weight_format": weight_format}
    packed = {"unet": base.load_denoiser(**settings)}
    if not unet_only:
        names = [encoder.part for encoder in base.family.text_encoders]
        packed |= dict(zip(names, base.load_text_encoders(**settings), strict=True))
    shutil.copytree(folder, target)
    for part, model in packed.items():
        (path,) = (target / part).glob("*.safetensors")
        tensors = load_file(path)
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLayer):
                tensors[f"{name}.weight"] = layer.weight
        save_file(tensors, path, {"format": "pt"})
    return target


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("option", ["fp8_base", "fp8_base_unet", "nf4_base", "nf4_base_unet"])
def test_a_base_model_in_fewer_bits_trains_as_that_of_the_rounded_weights(train, request, tmp_path, family, option):
    weight_format, unet_only = option[:3], option.endswith("unet")
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    rounded = with_rounded_weights(folder, tmp_path / "rounded", weight_format, unet_only=unet_only)
    _, wanted = train(out="wanted", pretrained_model_name_or_path=rounded, optimizer_type="SGD")
    finished, out = train(
        f"--{option}", "--gradient_checkpointing", pretrained_model_name_or_path=folder, optimizer_type="SGD"
    )
    finished.require_success()
    learned, expected = (load_file(path / "mine.safetensors") for path in (out, wanted))
    keys = [key for key in expected if "lora_up" in key]  # what began as zero
    apart = torch.cat([(learned[key] - expected[key]).flatten() for key in keys]).norm()
    assert apart < 1e-4 * torch.cat([expected[key].flatten() for key in keys]).norm()
    parts = "the U-Net's weights" if unet_only else "its weights"
    assert f"base model in fp32 with {parts} kept in {weight_format}, adapter in fp32" in finished.out
    told = re.search(rf"U-Net kept in {weight_format}: its blocks take (\S+) MB instead of (\S+), .* (\S+)\n", finished.out)
    packed, plain_size, error = map(float, told.groups())
    assert packed / plain_size == pytest.approx({"fp8": 8 / 32, "nf4": 4.5 / 32}[weight_format], rel=0.05)
    assert error == pytest.approx({"fp8": 0.026, "nf4": 0.092}[weight_format], rel=0.1)
    metadata = header(out / "mine.safetensors")
    for each in ("fp8_base", "fp8_base_unet", "nf4_base", "nf4_base_unet"):
        assert metadata[f"ss_{each}"] == str(each == option)


@of_families
def test_gradient_checkpointing_changes_nothing(train):
    _, plain = train("--network_dropout", 0.3, out="plain", optimizer_type="SGD")
    _, saving = train("--network_dropout", 0.3, "--gradient_checkpointing", out="saving", optimizer_type="SGD")
    assert difference(plain, saving) < 1e-6


@of_families
def test_only_the_chosen_part_is_trained_and_saved(train):
    for option, prefix in (
        ("--network_train_unet_only", "lora_unet_"),
        ("--network_train_text_encoder_only", "lora_te"),
    ):
        _, out = train(option, out=prefix)
        assert all(key.startswith(prefix) for key in load_file(out / "mine.safetensors"))


def test_a_rate_of_zero_leaves_its_part_as_it_is(train):
    _, out = train(text_encoder_lr=0)
    tensors = load_file(out / "mine.safetensors")
    ups = {key: value for key, value in tensors.items() if "lora_up" in key}
    assert all((value == 0).all() for key, value in ups.items() if key.startswith("lora_te_"))
    assert any((value != 0).any() for key, value in ups.items() if key.startswith("lora_unet_"))


def test_training_goes_on_from_the_weights_of_a_file(train):
    _, first = train(out="first")
    for way in (("--dim_from_weights",), ()):
        finished, second = train(
            *("--network_weights", first / "mine.safetensors", *way),
            out=f"second{len(way)}",
            max_train_steps=1,
            learning_rate=1e-9,
        )
        assert difference(first, second) < 1e-4
        assert re.search(r"starts from \S+mine.safetensors: \d+ layers matched, 0 unmatched, 0 ignored\n", finished.out)


def test_files_are_saved_at_their_steps_and_the_old_ones_removed(train):
    _, out = train("--save_every_n_steps", 1, "--save_last_n_steps", 1, max_train_steps=5)
    assert sorted(path.name for path in out.iterdir()) == [
        "mine-step00000003.safetensors",
        "mine-step00000004.safetensors",
        "mine.safetensors",
    ]


def test_saved_precision_is_the_one_that_was_asked_for(train):
    _, out = train("--save_precision", "fp16")
    assert {tensor.dtype for tensor in load_file(out / "mine.safetensors").values()} == {torch.float16}


def test_previews_and_curves_are_drawn_and_change_nothing(train, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two\nsks thing --w 64 --h 64 --s 2 --d 1\na thing --n bad --w 64 --h 64 --s 2 --l 1\n")
    _, plain = train("--network_dropout", 0.3, out="plain")
    finished, out = train(
        *("--network_dropout", 0.3, "--sample_prompts", prompts, "--sample_every_n_steps", 2, "--sample_at_first"),
        *("--logging_dir", tmp_path / "logs", "--log_prefix", "run_"),
        out="previews",
    )
    finished.require_success()
    assert equal(plain, out)
    pictures = sorted(path.name for path in (out / "sample").iterdir())
    assert [name[:15] for name in pictures] == ["mine_000000_00_", "mine_000000_01_", "mine_000002_00_", "mine_000002_01_"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tmp_path / "logs").glob("run_*/network_train")
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss/current")] == [1, 2, 3]
    assert events.Scalars("lr/textencoder")[0].value == pytest.approx(1e-2)


@pytest.mark.parametrize("kind", ["tiny_sd2_folder", "tiny_sd2_v_folder"])
def test_sd2_trains_with_what_it_predicts(train, request, kind):
    finished, out = train("--v2", pretrained_model_name_or_path=request.getfixturevalue(kind))
    finished.require_success()
    assert header(out / "mine.safetensors")["ss_base_model_version"] == ("sd_v2_v" if "v_folder" in kind else "sd_v2")
    assert ("predicts the velocity" in finished.out) == ("v_folder" in kind)


def test_bf16_trains_on_a_cpu_with_an_adapter_in_fp32(train):
    finished, out = train("--mixed_precision", "bf16")
    finished.require_success()
    assert {tensor.dtype for tensor in load_file(out / "mine.safetensors").values()} == {torch.float32}


def test_the_plan_tells_what_the_run_does(train):
    finished, out = train("--plan_only", "--huber_c", 0.2, "--network_args", "conv_dim=2", gradient_accumulation_steps=2)
    finished.require_success()
    assert not out.exists(), "a plan writes nothing"
    for part in (
        "3 steps of 2 images x 2 micro-batches: 1 epoch and 1 step; 2 steps in an epoch",
        "the last step of an epoch has 1 of them",
        "6 images, each 1 time an epoch (1 to 2 in the run)",
        "predicts the noise",
        "--huber_c has no effect: --loss_type is not huber",
        "U-Net: 277 modules of LoRA, rank 2/4",
    ):
        assert part in finished.out, finished.out


def test_adafactor_says_that_it_chooses_the_rate(train):
    finished, _ = train("--plan_only", optimizer_type="Adafactor", learning_rate=None)
    finished.require_success()
    assert "text encoder chosen by the optimizer, U-Net chosen by the optimizer" in finished.out
    assert "2e-06" not in finished.out
    assert "2e-6" not in finished.out
    finished, out = train(optimizer_type="Adafactor", optimizer_args="relative_step=True", lr_scheduler="adafactor:1e-3")
    finished.require_success()
    assert "--learning_rate has no effect: Adafactor's relative steps choose the rate" in finished.out
    assert (out / "mine.safetensors").exists()


def test_options_that_do_nothing_are_said(train, tmp_path):
    (tmp_path / "prompts.txt").write_text("a thing")
    finished, _ = train(
        *("--plan_only", "--sample_prompts", tmp_path / "prompts.txt", "--metadata_author", "me", "--save_model_as", "pt"),
        *("--lr_warmup_steps", 5, "--training_comment", "mine"),
    )
    finished.require_success()
    for part in (
        "--sample_prompts has no effect: there is no --sample_every_n_epochs",
        "--metadata_author has no effect: only .safetensors",
        "--training_comment has no effect: only .safetensors",
        "warm-up 5 steps, which is the whole run",
    ):
        assert part in finished.out, finished.out


@pytest.mark.parametrize(("limit", "told"), [(75, True), (225, False)])
def test_captions_that_are_cut_off_are_named(train, tmp_path, limit, told):
    images = draw_images(tmp_path / "long", 2)
    (images / "01.txt").write_text(", ".join(f"tag{number}" for number in range(40)))
    dataset = dataset_file(tmp_path / "long.toml", images)
    finished, _ = train("--plan_only", dataset_config=dataset, max_token_length=limit)
    finished.require_success()
    assert ("1 caption has more than 75 tokens, and the rest is not read" in finished.out) == told
    assert ("01.png (" in finished.out) == told


@pytest.mark.parametrize(
    ("optimizer", "module", "kind"),
    [
        ("SGD", "networks.lora", "tiny_sd1_folder"),
        ("AdamW", "networks.lora", "tiny_sd1_folder"),
        ("SGD", "networks.dylora", "tiny_sd1_folder"),
        ("SGD", "networks.lora", "tiny_sdxl_folder"),
    ],
)
def test_two_processes_give_the_weights_of_one_with_twice_the_batch(train, tmp_path, request, optimizer, module, kind):
    """With buckets of 3 and 2 images, batches of 2 x 1 or 1 x 2 leave incomplete ones. Where text encoders train, the last
    layer of one of two is not used, which DDP has to be told."""
    base = request.getfixturevalue(kind)
    images = draw_images(tmp_path / "two", 5, [(64, 64), (128, 64)])
    buckets = "resolution = 96\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 128\nbatch_size = {}"
    options = ["--optimizer_type", optimizer, *([] if "sdxl" in kind else ["--network_train_unet_only"])]
    if optimizer == "AdamW":  # its default of 1e-8 makes whole steps of gradients that are nothing but rounding
        options += ["--optimizer_args", "eps=1e-3"]
    one = dataset_file(tmp_path / "one.toml", images, dataset=buckets.format(2))
    single_process = {"dataset_config": one, "max_train_steps": 4, "network_module": module}
    finished, single = train(*options, out="single", pretrained_model_name_or_path=base, **single_process)
    finished.require_success()
    two = dataset_file(tmp_path / "two.toml", images, dataset=buckets.format(1))
    arguments = {
        "pretrained_model_name_or_path": base,
        "dataset_config": two,
        "output_dir": tmp_path / "double",
        "output_name": "mine",
        "network_module": module,
        "learning_rate": 1e-2,
        "max_train_steps": 4,
        "seed": 7,
        "max_data_loader_n_workers": 0,
    }
    flat = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "train_network.py"), *flat, *options],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 steps of 2 x 1 images" in done.stdout
    assert done.stdout.count("saved ") == 1, "one process speaks"
    assert difference(single, tmp_path / "double") < 1e-6


@pytest.mark.parametrize(("sent", "name", "status"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_a_signal_to_all_processes_ends_the_step_and_saves_the_work(tmp_path, tiny_sd1_folder, dataset, sent, name, status):
    arguments = [
        *("--pretrained_model_name_or_path", tiny_sd1_folder, "--dataset_config", dataset, "--output_dir", tmp_path / "out"),
        *("--output_name", "mine", "--network_module", "networks.lora", "--learning_rate", "1e-3"),
        *("--max_train_steps", "100000", "--seed", "1", "--max_data_loader_n_workers", "1"),
    ]
    process = subprocess.Popen(
        [sys.executable, "train_network.py", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    os.killpg(process.pid, sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, out + err
    assert "Traceback" not in err
    (saved,) = (tmp_path / "out").iterdir()
    assert f"stopped by {name}; saved {saved}" in out
    assert saved.name.startswith("mine-step")
    assert all(tensor.isfinite().all() for tensor in load_file(saved).values())


def test_a_run_whose_gradients_are_no_numbers_names_the_steps_and_stops(train):
    finished, out = train("--save_every_n_steps", 3, learning_rate=1e38, optimizer_type="SGD", max_train_steps=20)
    assert_refused(finished, "the gradient was not finite 10 steps in a row", "--mixed_precision bf16 or no")
    assert "step 3: the gradient is not finite; the step is skipped" in finished.out
    assert not (out / "mine.safetensors").exists()
    for path in out.iterdir():
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


BAD = {
    "no dataset file": ({"dataset_config": "none.toml"}, ["none.toml"]),
    "no model": ({"pretrained_model_name_or_path": "/none/model.safetensors"}, ["/none/model.safetensors"]),
    "unknown module": ({"network_module": "networks.lroa"}, ["--network_module networks.lroa", "networks.lora"]),
    "unknown optimizer": ({"optimizer_type": "AdamV"}, ["did you mean AdamW"]),
    "unknown schedule": ({"lr_scheduler": "cosin"}, ["did you mean cosine"]),
    "unknown network argument": ({"network_args": "conv_dmi=4"}, ["conv_dmi", "conv_dim"]),
    "rate of zero": ({"learning_rate": 0}, ["nothing would be trained"]),
    "share that is none": ({"network_args": "module_dropout=abc"}, ["--network_args module_dropout", "not a number"]),
    "setting refused": ({"optimizer_args": "betas=2"}, ["--optimizer_type AdamW: refuses its settings"]),
    "schedule without pieces": ({"lr_scheduler": "piecewise_constant"}, ["--lr_scheduler_args", "step_rules="]),
    "schedule that needs a loss": (
        {"lr_scheduler_type": "ReduceLROnPlateau"},
        ["cannot be used for step 1 of 3", "metrics"],
    ),
    "schedule that lacks a setting": ({"lr_scheduler_type": "StepLR"}, ["StepLR: refuses its settings", "step_size"]),
    "optimizer of sparse gradients": ({"optimizer_type": "SparseAdam"}, ["cannot train an adapter"]),
    "norm of zero": ({"scale_weight_norms": 0}, ["--scale_weight_norms 0", "is not above 0"]),
    "rate without end": ({"learning_rate": "inf"}, ["--learning_rate", "not a finite number"]),
    "noise that is no number": ({"noise_offset": "nan"}, ["--noise_offset", "not a finite number"]),
    "warm-up without end": ({"lr_warmup_steps": "inf"}, ["--lr_warmup_steps", "neither a whole number"]),
    "name that is a path": ({"output_name": "a/b"}, ["--output_name a/b: is a path"]),
    "thumbnail that is none": ({"metadata_thumbnail": "none.png"}, ["--metadata_thumbnail none.png: is neither"]),
    "fp16 on a CPU": ({"mixed_precision": "fp16"}, ["needs a GPU", "bf16"]),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_a_sentence_before_anything_is_written(train, name):
    options, parts = BAD[name]
    finished, out = train(**options)
    assert_refused(finished, *parts)
    assert not out.exists()


def test_outputs_of_text_encoders_that_are_trained_are_not_cached(train):
    finished, out = train("--cache_text_encoder_outputs_to_disk")
    assert_refused(finished, "--cache_text_encoder_outputs_to_disk: cannot be used with text encoders that are trained")
    assert "give --network_train_unet_only as well" in finished.err
    assert not out.exists()


def test_text_encoders_are_packed_where_they_stay_and_are_meant(train):
    options = ("--fp8_base", "--network_train_unet_only")
    stay, _ = train(*options, out="stay")
    assert "text encoder kept in fp8: its blocks take" in stay.out
    freed, _ = train(*options, "--cache_text_encoder_outputs", out="freed")
    left_out, folder = train(*options, "--fp8_base_unet", out="left_out")
    for finished in (freed, left_out):
        assert "with the U-Net's weights kept in fp8" in finished.out
        assert "text encoder kept in" not in finished.out
    assert "--fp8_base has no effect: --fp8_base_unet leaves the text encoders out" in left_out.out
    assert header(folder / "mine.safetensors")["ss_fp8_base_unet"] == "True"


def test_a_base_model_is_kept_in_one_format(train):
    finished, out = train("--nf4_base_unet", "--fp8_base")
    assert_refused(finished, "--fp8_base: a base model in 4 bits is not kept in 8 as well", "leave out --nf4_base_unet")
    assert not out.exists()


def test_an_adapter_of_another_rank_is_refused_before_anything_is_written(train):
    _, first = train(out="first")
    finished, second = train("--network_weights", first / "mine.safetensors", out="second", network_dim=8)
    assert_refused(finished, "has rank 4 in the file and 8 in the network", "--dim_from_weights")
    assert not second.exists()


def test_an_sd1_model_is_not_trained_as_sd2(train):
    finished, _ = train("--v2")
    assert_refused(finished, "--v2", "Stable Diffusion 1")


def test_a_folder_that_cannot_be_written_is_found_out_before_training(train, tmp_path):
    (tmp_path / "file").write_text("")
    finished, _ = train(output_dir=tmp_path / "file")
    assert_refused(finished, f"--output_dir {tmp_path / 'file'}: is a file")


def test_curves_that_cannot_be_written_are_found_out_before_training(train, tmp_path):
    (tmp_path / "file").write_text("")
    finished, _ = train("--logging_dir", tmp_path / "file" / "logs")
    assert_refused(finished, f"--logging_dir {tmp_path / 'file' / 'logs'}: cannot be written to")
    assert "step 1" not in finished.out


def test_a_configuration_that_cannot_be_written_is_one_sentence(train, tmp_path):
    finished, _ = train("--output_config", "--config_file", tmp_path / "none" / "here.toml")
    assert_refused(finished, "here.toml", "does not exist")


def test_help_answers_without_importing_torch():
    code = "import sys, train_network; train_network.main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "--pretrained_model_name_or_path" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.endswith((" torch", " diffusers", " transformers"))]


def test_a_run_prints_no_warning_of_any_library(tmp_path, tiny_sd1_folder, dataset):
    finished = run_script(
        "train_network.py",
        *("--pretrained_model_name_or_path", tiny_sd1_folder, "--dataset_config", dataset, "--output_dir", tmp_path / "out"),
        *(
            "--network_module",
            "networks.lora",
            "--learning_rate",
            "1e-3",
            "--max_train_steps",
            1,
            "--optimizer_type",
            "AdamW8bit",
        ),
        *("--cache_latents", "--logging_dir", tmp_path / "logs"),
    ).require_success()
    assert finished.err == ""
    assert "Warning" not in finished.out
