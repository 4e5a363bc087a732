"""The documentation's commands, from a base model in every form to a picture, and the trained file in another program."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.support.command_lines import dataset_file, draw_images, run_script, train_here

pytestmark = pytest.mark.filterwarnings("ignore")

TRAINING = """
    --pretrained_model_name_or_path={base}
    --dataset_config={dataset}
    --output_dir={out}
    --output_name=documented
    --save_model_as=safetensors
    --prior_loss_weight=1.0
    --max_train_steps=2
    --learning_rate=1e-2
    --optimizer_type="AdamW8bit"
    --xformers
    --mixed_precision="no"
    --cache_latents
    --gradient_checkpointing
    --save_every_n_epochs=1
    --network_module=networks.lora
    --max_data_loader_n_workers=0
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    return dataset_file(folder / "dataset.toml", draw_images(folder / "images", 2))


@pytest.fixture(scope="module")
def ckpt_file(tiny_sd1_folder, tmp_path_factory) -> Path:
    """The tiny SD1 model as a .ckpt, made by the converter."""
    path = tmp_path_factory.mktemp("ckpt") / "model.ckpt"
    run_script("tools/convert_diffusers20_original_sd.py", tiny_sd1_folder, path, "--float").require_success()
    return path


BASES = ["tiny_sd1_folder", "tiny_sd1_file", "ckpt_file", "tiny_sd2_folder", "tiny_sd2_file"]


@pytest.mark.parametrize("base", BASES)
def test_the_training_command_and_the_picture_command_run_on(base, request, dataset, tmp_path, capsys):
    path = request.getfixturevalue(base)
    finished = train_here(capsys, *shlex.split(TRAINING.format(base=path, dataset=dataset, out=tmp_path)))
    finished.require_success()
    trained = tmp_path / "documented.safetensors"
    assert any(tensor.abs().max() > 0 for key, tensor in load_file(trained).items() if "lora_up" in key)
    pictures = tmp_path / "pictures"
    drawn = run_script(
        "gen_img_diffusers.py",
        *("--ckpt", path, "--outdir", pictures, "--prompt", "sks thing", "--W", 64, "--H", 64, "--steps", 2, "--seed", 1),
        *("--network_module", "networks.lora", "--network_weights", trained, "--network_mul", 0.8, "--sequential_file_name"),
    ).require_success()
    (picture,) = pictures.glob("*.png")
    assert Image.open(picture).size == (64, 64)
    assert drawn.last_line.startswith(f"1 picture in {pictures}")


def test_diffusers_gives_the_noise_prediction_of_our_network_for_a_trained_file(tiny_sd1_folder, dataset, tmp_path, capsys):
    from networks.lora import create_network_from_weights

    command = TRAINING.format(base=tiny_sd1_folder, dataset=dataset, out=tmp_path)
    train_here(capsys, *shlex.split(command), "--network_args", "conv_dim=2").require_success()
    trained = tmp_path / "documented.safetensors"
    latents, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])

    def prediction(pipe: StableDiffusionPipeline) -> torch.Tensor:
        ids = pipe.tokenizer(["sks thing", "a"], padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            return pipe.unet(latents, times, pipe.text_encoder(ids)[0]).sample

    theirs = StableDiffusionPipeline.from_pretrained(tiny_sd1_folder)
    plain = prediction(theirs)
    theirs.load_lora_weights(str(trained))
    ours = StableDiffusionPipeline.from_pretrained(tiny_sd1_folder)
    network, weights = create_network_from_weights(1.0, str(trained), ours.vae, ours.text_encoder, ours.unet)
    network.apply_to(ours.text_encoder, ours.unet)
    network.load_state_dict(weights)
    assert not torch.allclose(prediction(ours), plain, atol=1e-3), "the training must act, or this says nothing"
    torch.testing.assert_close(prediction(ours), prediction(theirs), rtol=1e-4, atol=1e-4)
