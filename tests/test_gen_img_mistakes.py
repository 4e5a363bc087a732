"""Mistakes that people make with gen_img_diffusers.py: each ends in a sentence and exit status 2, and nothing is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import gen_img_diffusers
from tests.support.drawing import write_lora


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_sd1_folder) -> Path:
    """A folder with what the commands below name."""
    folder = tmp_path_factory.mktemp("place")
    write_lora(folder / "loras" / "hero.safetensors", tiny_sd1_folder)
    write_lora(folder / "loras" / "twin" / "one.safetensors", tiny_sd1_folder)
    write_lora(folder / "loras" / "other" / "one.safetensors", tiny_sd1_folder)
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    halves = {"lora_down.weight": torch.ones(4, 2048), "lora_up.weight": torch.ones(640, 4), "alpha": torch.tensor(4.0)}
    save_file({f"{layer}.{name}": half for name, half in halves.items()}, folder / "loras" / "xl.safetensors")
    save_file({"some.tensor": torch.ones(2)}, folder / "loras" / "strange.safetensors")
    (folder / "loras" / "text.safetensors").write_text("no tensors at all")
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    (folder / "text.png").write_text("no picture")
    (folder / "empty.txt").write_text("# nothing\n\n")
    (folder / "latin.txt").write_bytes(b"a caf\xe9\n")
    (folder / "words").mkdir()
    (folder / "words" / "color.txt").write_text("red\n")
    (folder / "pictures").mkdir()
    save_file({"emb_params": torch.ones(1, 7)}, folder / "wide.safetensors")
    return folder


def tag(text: str) -> tuple[str, ...]:
    return ("--prompt", f"a {text}", "--lora_dir", "{place}/loras")


MISTAKES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    # the command line
    (("--promt", "a"), ("--promt", "did you mean prompt")),
    ((), ("no prompt is given", "--prompt TEXT")),
    (("--prompt", "a", "--from_file", "x.txt"), ("--prompt --from_file", "give one of them")),
    (("--prompt", "a", "--steps", "many"), ("--steps", "'many' is not a whole number")),
    (("--prompt", "a", "--steps", "0"), ("--steps 0", "give 1 to 1000")),
    (("--prompt", "a", "--W", "20"), ("--W 20", "give 64 or more")),
    (("--prompt", "a", "--guidance_rescale", "2"), ("--guidance_rescale 2.0", "give 0 to 1")),
    (("--prompt", "a", "--sampler", "eulr_a"), ("no sampler is called 'eulr_a'", "did you mean euler_a")),
    (("--prompt", "a", "--sampler", "DPM fast"), ("DPM fast",)),
    (("--prompt", "a", "--strength", "0.5"), ("--strength", "there is no picture to begin from", "--image_path")),
    (("--prompt", "a", "--highres_fix_save_1st"), ("--highres_fix_save_1st", "give --highres_fix_scale")),
    (("--prompt", "a", "--ds_ratio", "0.4"), ("--ds_ratio: has no effect", "give --ds_depth_1 too")),
    (("--prompt", "a", "--network_mul", "0.5"), ("--network_mul", "name the files with --network_weights")),
    (("--prompt", "a", "--network_merge_n_models", "3", "--network_weights", "{place}/loras/hero.safetensors"),
     ("only 1 adapter to merge",)),
    (("--prompt", "a", "--clip_guidance_scale", "100"), ("--clip_guidance_scale", "no library that is kept up")),
    (("--prompt", "a", "--XTI_embeddings", "x"), ("--XTI_embeddings", "a condition of its own")),
    (("--prompt", "a", "--list_loras"), ("--list_loras", "--lora_dir")),
    (("--prompt", "a", "--lora_dir", "{place}/none"), ("--lora_dir {place}/none", "no such folder")),
    (("--prompt", "a", "--lora_tag_style", "comfy"), ("'comfy' is not known", "sdnext")),
    (("--prompt", "a", "--network_regional_mask_max_color_codes", "3"), ("has no effect", "give --mask_path too")),
    (("--from_png", "{place}/none.png"), ("{place}/none.png: no such file",)),
    (("--interactive", "--n_iter", "3"), ("--n_iter", "use --images_per_prompt")),
    # prompts
    (("--prompt", "a --stps 4"), ("--prompt, --stps", "unknown option in a prompt")),
    (("--prompt", "a --am 0.5"), ("--prompt, --am: there is no adapter", "--network_weights")),
    (("--prompt", "a --am 1,2", "--network_weights", "{place}/loras/hero.safetensors"), ("2 strengths for 1 adapter",)),
    (("--prompt", "a --am 1", "--network_merge", "--network_weights", "{place}/loras/hero.safetensors"),
     ("without merging",)),
    (("--prompt", "a --t 0.5"), ("--prompt, --t: has no effect", "--image_path")),
    (("--prompt", "a --dst1 700"), ("--prompt, --dst1: has no effect", "give --dsd1 too")),
    (("--prompt", "a --gle 2"), ("--prompt, --gle: has no effect", "give --glt too")),
    (("--prompt", "a --f cat.jpg"), ("'cat.jpg' is no PNG file",)),
    (("--prompt", "a --ow 512"), ("--prompt, --ow: has no effect; Stable Diffusion 1.x is told no sizes",)),
    (("--prompt", "a", "--prompt_2", "b"), ("--prompt_2: has no effect; Stable Diffusion 1.x has one text encoder",)),
    (("--prompt", "a", "--crop_top", "-1"), ("--crop_top -1: is out of range; give 0 or more",)),
    (("--prompt", "a", "--refiner_start", "0.5"), ("--refiner_start: has no effect; give --refiner too",)),
    (("--prompt", "a --d x"), ("--prompt, --d", "'x' is not a whole number")),
    (("--prompt", "a --n <lora:hero:1>"), ("<lora:hero:1>", "negative prompt", "write it in the prompt")),
    (("--prompt", "a AND"), ("--prompt", "AND has nothing on one side")),
    (("--prompt", "a {2$$x|y"), ("--prompt",)),
    (("--prompt", "a __color__"), ("__color__", "--wildcards_dir")),
    (("--prompt", "a __colour__", "--wildcards_dir", "{place}/words"), ("colour", "did you mean color")),
    (("--from_file", "{place}/none.txt"), ("{place}/none.txt", "no such file")),
    (("--from_file", "{place}/empty.txt"), ("{place}/empty.txt", "holds no prompt")),
    (("--from_file", "{place}/latin.txt"), ("{place}/latin.txt", "cannot be read as text")),
    # adapters
    (tag("<lora:heroo:1>"), ("--prompt, <lora:heroo:1>", "there is no adapter 'heroo'", "did you mean hero?")),
    (tag("<lora:one:1>"), ("'one' is the name of other/one.safetensors, twin/one.safetensors", "write the path")),
    (tag("<lora:xl:1>"), ("xl.safetensors", "is an adapter for Stable Diffusion XL", "Stable Diffusion 1.x")),
    (tag("<lora:text:1>"), ("text.safetensors",)),
    (tag("<lora:hero:0.5:0.9>"), ("<lora:hero:0.5:0.9>", "--lora_tag_style a1111")),
    (tag("<lora:hero:strong>"), ("<lora:hero:strong>", "strong")),
    (tag("<lora:hero:1:weight=2>"), ("<lora:hero:1:weight=2>", "weight")),
    (tag("<lora:hero:1:lbw=INN>"), ("INN", "did you mean INS")),
    (tag("<lora:hero:1:te=0.1@1,0.6>"), ("te=0.1@1,0.6", "@")),
    (tag("<hypernet:hero:1>"), ("<hypernet:hero:1>",)),
    (("--prompt", "a <lora:hero:1>"), ("there is no adapter 'hero'", "--lora_dir")),
    (("--prompt", "a", "--network_weights", "{place}/loras/strange.safetensors"), ("strange.safetensors",)),
    # pictures
    (("--prompt", "a", "--image_path", "{place}/text.png"), ("{place}/text.png",)),
    (("--prompt", "a", "--image_path", "{place}/pictures"), ("{place}/pictures", "holds no")),
    (("--image_path", "{place}/red.png"), ("{place}/red.png", "does not say how it was made")),
    (("--prompt", "a", "--mask_path", "{place}/red.png"), ("--mask_path {place}/red.png", "--image_path")),
    (("--prompt", "a", "--guide_image_path", "{place}/red.png"), ("--guide_image_path", "--control_net_models")),
    (("--prompt", "a", "--control_net_models", "{place}/loras/hero.safetensors", "--guide_image_path", "{place}/red.png"),
     ("hero.safetensors", "ControlNet")),
    (("--prompt", "a", "--textual_inversion_embeddings", "{place}/wide.safetensors"), ("wide.safetensors", "7")),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(words)[:60] for words, _ in MISTAKES])
def test_a_mistake_is_a_sentence_and_nothing_is_drawn(capsys, monkeypatch, tiny_sd1_folder, place, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    command = ["--ckpt", str(tiny_sd1_folder), "--outdir", str(tmp_path / "out"), "--W", "64", "--H", "64"]
    arguments = [word.format(place=place) if "{place}" in word else word for word in words]
    given = {word for word in arguments if word.startswith("--")}
    own = [word for pair in zip(command[::2], command[1::2], strict=True) if pair[0] not in given for word in pair]
    assert gen_img_diffusers.main([*own, *arguments]) == 2
    err = capsys.readouterr().err
    for part in said:
        assert part.replace("{place}", str(place)) in err
    assert "Traceback" not in err
    assert all(line.startswith("gen_img_diffusers: ") for line in err.splitlines())
    assert not list((tmp_path).rglob("*.png"))


def test_there_are_enough_mistakes():
    assert len(MISTAKES) >= 40
