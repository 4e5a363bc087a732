"""What training has for Stable Diffusion XL beside what every family has: its door, two rates, its files in other hands."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.checkpoints.base_model import open_base_model
from library.conditioning.text_encoders import TextEncoders
from networks import lora
from tests.support.command_lines import assert_refused, dataset_file, draw_images, train_here

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Every side is a multiple of 32, and that of one bucket not of 64."""
    folder = tmp_path_factory.mktemp("sdxl")
    buckets = "resolution = 96\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 128\nbucket_reso_steps = 32"
    return dataset_file(folder / "dataset.toml", draw_images(folder / "images", 2, [(96, 96)]), dataset=buckets)


@pytest.fixture
def train(capsys, tmp_path, tiny_sdxl_folder, dataset):
    def run(*options: object, base=tiny_sdxl_folder, name: str = "mine"):
        finished = train_here(
            capsys,
            *("--pretrained_model_name_or_path", base, "--dataset_config", dataset, "--output_dir", tmp_path),
            *("--output_name", name, "--network_module", "networks.lora", "--max_train_steps", 3, "--seed", 5),
            *("--max_data_loader_n_workers", 0, "--learning_rate", 1e-2, *options),
            door="sdxl_train_network",
        )
        return finished, tmp_path / f"{name}.safetensors"

    return run


def ups(path, prefix: str) -> torch.Tensor:
    """The largest value of every up matrix of a part; 0 where a layer has learned nothing."""
    return torch.stack([t.abs().max() for key, t in load_file(path).items() if key.startswith(prefix) and "lora_up" in key])


def test_the_file_says_what_it_is_for(train, tiny_sdxl_file):
    finished, path = train("--text_encoder_lr", 1e-5, 2e-5, base=tiny_sdxl_file)
    finished.require_success()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    told = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_text_encoder_lr": "[1e-05, 2e-05]",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.resolution": "96x96",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "epsilon",
    }
    assert {name: metadata[name] for name in told} == told
    assert json.loads(metadata["ss_datasets"])[0]["bucket_info"]["buckets"]["0"]["resolution"] == [96, 96]
    for start in ("lora_te1_text_model_", "lora_te2_text_model_", "lora_unet_input_blocks_", "lora_unet_middle_block_"):
        assert any(key.startswith(start) for key in load_file(path)), start


def test_each_text_encoder_has_a_rate_of_its_own(train):
    finished, path = train("--text_encoder_lr", 0, 1e-2)
    finished.require_success()
    assert "rates       text encoder frozen, second text encoder 0.01, U-Net 0.01" in finished.out
    assert (ups(path, "lora_te1_") == 0).all()
    assert (ups(path, "lora_te2_") > 0).all(), "all of its layers act, as the pooled text is taken behind the last"
    both, path = train("--text_encoder_lr", 1e-2, name="both")
    assert "rates       text encoder 0.01, second text encoder 0.01, U-Net 0.01" in both.out
    learned = ups(path, "lora_te1_") > 0
    assert learned[:12].all(), "the first two layers of three"
    assert not learned[12:].any(), "what lies behind the layer whose output is used"


def test_rates_are_one_or_one_for_each(train):
    finished, path = train("--text_encoder_lr", 1e-5, 1e-5, 1e-5)
    assert_refused(
        finished, "--text_encoder_lr 1e-05 1e-05 1e-05: this base model has 2 text encoders; give one rate, or one for"
    )
    assert not path.exists()


def test_sizes_that_only_other_families_refuse_are_not_told_of_beside_another_mistake(train, tiny_sd1_folder):
    for mistake, base in (("--v2",), {}), (("--text_encoder_lr", 1, 1, 1), {}), ((), {"base": tiny_sd1_folder}):
        finished, _ = train(*mistake, **base)
        assert_refused(finished)
        assert len(finished.err.splitlines()) == 1, "every side of its buckets suits the family"


@pytest.mark.parametrize("kind", ["tiny_sd1_folder", "tiny_sd2_folder"])
def test_this_door_refuses_other_families(train, request, kind):
    finished, _ = train(base=request.getfixturevalue(kind))
    assert_refused(finished, "and this script is for Stable Diffusion XL only; use the one without sdxl_ in its name")


def test_v2_is_refused_and_what_else_belongs_to_old_command_lines_is_said(train):
    finished, _ = train("--v2")
    assert_refused(finished, "--v2 was given, but this is Stable Diffusion XL")
    finished, _ = train("--plan_only", "--disable_mmap_load_safetensors", "--no_half_vae", "--clip_skip", 1)
    finished.require_success()
    assert "--disable_mmap_load_safetensors has no effect" in finished.out
    assert "--no_half_vae has no effect: the VAE always runs in fp32" in finished.out
    assert "the text encoders give layer 1 from the end (--clip_skip) instead of layer 2" in finished.out
    finished, _ = train("--plan_only", "--clip_skip", 2)
    assert "(--clip_skip)" not in finished.out, "that is the layer it has anyway"


def test_previews_are_drawn_with_text_encoders_that_are_not_on_the_device_any_more(train, tmp_path):
    (tmp_path / "prompts.txt").write_text("sks thing --w 64 --h 64 --s 2 --d 1\n")
    options = ("--network_train_unet_only", "--cache_text_encoder_outputs")
    _, plain = train(*options, name="plain")
    finished, path = train(*options, "--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", 2)
    finished.require_success()
    assert len(list((tmp_path / "sample").iterdir())) == 1
    one, other = load_file(plain), load_file(path)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_diffusers_predicts_the_same_noise_with_the_file(train, tiny_sdxl_folder):
    from diffusers import StableDiffusionXLPipeline

    finished, path = train("--network_args", "conv_dim=2")
    finished.require_success()
    base = open_base_model(tiny_sdxl_folder)
    unet = base.load_denoiser(dtype=torch.float32, device="cpu")
    encoders = base.load_text_encoders(dtype=torch.float32, device="cpu")
    texts = TextEncoders(specs=base.family.text_encoders, tokenizers=base.load_tokenizers(), modules=encoders)
    latents, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    sizes = torch.tensor([[64.0, 96.0, 0.0, 16.0, 64.0, 64.0]])

    @torch.no_grad()
    def ours() -> torch.Tensor:
        told = texts.encode(texts.tokenize(["sks thing, red"])).denoiser_arguments(sizes)
        return unet(latents, time, return_dict=False, **told)[0]

    without = ours()
    network, _ = lora.create_network_from_weights(1.0, str(path), None, encoders, unet)
    network.apply_to(encoders, unet, True, True)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    pipeline.load_lora_weights(str(path))
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt("sks thing, red", do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": sizes}
        theirs = pipeline.unet(latents, time, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]
    change = (ours() - without).norm()
    assert change > 1e-2 * without.norm()
    assert (ours() - theirs).norm() < 1e-3 * change
