"""The text of web UIs, as they write it and as they read it."""

import re

import pytest

from library.generation.requests import ImageRequest
from library.generation.samplers import SAMPLERS
from library.generation.web_parameters import read_parameters, web_parameters

REQUEST = ImageRequest(
    prompt='a (cat:1.2), "ж猫"\nwith two lines',
    negative_prompt="blurry",
    width=72,
    height=64,
    seed=2**40,
    steps=7,
    scale=6.5,
    sampler="dpmsolver++",
    clip_skip=2,
)


def test_everything_is_where_a1111_has_it():
    networks = [{"name": "mine", "strength": 0.8, "hash": "0123456789ab"}, {"name": "plain", "strength": 1.0}]
    made_with = {
        "model": "tiny, small",
        "model_hash": "cc6cb27103",
        "vae": "/models/best.vae.pt",
        "networks": networks,
        "lora_hashes": {"tag:ged": "ba9876543210"},
        "version": "v9",
    }
    assert web_parameters(REQUEST, made_with) == (
        'a (cat:1.2), "ж猫"\nwith two lines <lora:mine:0.8> <lora:plain:1>\nNegative prompt: blurry\n'
        "Steps: 7, Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale: 6.5, Seed: 1099511627776, Size: 72x64, "
        'Model hash: cc6cb27103, Model: "tiny, small", VAE: best.vae.pt, Clip skip: 2, '
        'Lora hashes: "mine: 0123456789ab, tagged: ba9876543210", Version: v9'
    )


def test_what_there_is_not_is_left_out():
    text = web_parameters(ImageRequest(prompt="a", seed=1), {"model": "tiny", "networks": []})
    assert text == (
        "a\nSteps: 50, Sampler: DDIM, Schedule type: Automatic, CFG scale: 7.5, Seed: 1, Size: 512x512, Model: tiny"
    )


def test_a_pictures_own_strengths_are_written():
    request = ImageRequest(prompt="a", seed=1, network_strengths=(0.25,))
    assert "a <lora:mine:0.25>\n" in web_parameters(request, {"networks": [{"name": "mine", "strength": 1.0}]})


def test_files_in_tags_are_written_as_web_uis_name_them():
    request = ImageRequest(prompt="a <lora:loras/my.best.safetensors:0.5:lbw=INS> <lyco:v1.5> <b:c/d.pt> (e:1.2)", seed=1)
    text = web_parameters(request, {})
    assert text.startswith("a <lora:my.best:0.5:lbw=INS> <lyco:v1.5> <b:c/d.pt> (e:1.2)\n")


def a1111_pairs(line: str) -> dict[str, str]:
    """The last line as A1111's web UI parts it: its own pattern and its own way with quotes."""
    import json

    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line)
    return {name: json.loads(value) if value.startswith('"') else value for name, value in found}


@pytest.mark.parametrize("model", ["plain", "with, comma", "with: colon", 'a "quote", and \\ more', "new\nline", "猫, ж"])
def test_a1111_reads_what_is_written(model):
    *_, line = web_parameters(REQUEST, {"model": model, "version": "v1"}).splitlines()
    pairs = a1111_pairs(line)
    assert (pairs["Model"], pairs["Version"], pairs["Steps"]) == (model, "v1", "7")


VARIANTS = {
    "plain": {},
    "guidance": {"guidance_rescale": 0.7, "scale": 1.0},
    "no clip skip": {"clip_skip": None},
    "two stages": {"width": 768, "height": 1152, "highres_scale": 0.666667, "highres_steps": 12, "strength": 0.55},
    "two stages by latents": {"width": 512, "height": 640, "highres_scale": 0.5, "highres_latents": True, "strength": 0.4},
    "an odd ratio": {"width": 520, "height": 1000, "highres_scale": 0.7},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_what_is_written_is_read_again(changes):
    request = ImageRequest(**vars(REQUEST) | {"lora_tag_style": "a1111"} | changes)
    found = read_parameters(web_parameters(request, {"model": "m, n", "version": "v1"}))
    assert found.notes == ()
    again = ImageRequest(**found.fields)
    assert again.first_stage == request.first_stage
    assert ImageRequest(**vars(again) | {"highres_scale": request.highres_scale}) == request
    assert found.made_with == {"model": "m, n", "version": "v1"}


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("k_")])
def test_every_sampler_is_read_again(name):
    found = read_parameters(web_parameters(ImageRequest(prompt="a", seed=1, sampler=name), {}))
    assert (found.fields["sampler"], found.notes) == (name, ())


SAMPLER_LINES = {
    "Sampler: DPM++ 2M Karras": "dpmsolver++_karras",
    "Sampler: DPM++ 2M, Schedule type: Karras": "dpmsolver++_karras",
    "Sampler: DPM++ 2M, Schedule type: Automatic": "dpmsolver++_karras",
    "Sampler: DPM++ 2M SDE, Schedule type: Automatic": "dpmsolver++_sde_exponential",
    "Sampler: DPM++ 2M": "dpmsolver++",
    "Sampler: DPM++ 2M Karras, Schedule type: karras": "dpmsolver++_karras",
    "Sampler: Euler a, Schedule type: Automatic": "euler_a",
    "Sampler: Euler, Schedule type: SGM Uniform": "euler_sgm_uniform",
    "Sampler: UniPC, Schedule type: Normal": "uni_pc",
}


@pytest.mark.parametrize("line", SAMPLER_LINES)
def test_samplers_of_all_ages_are_read(line):
    found = read_parameters(f"a\nSteps: 9, {line}, Seed: 1")
    assert (found.fields["sampler"], found.notes) == (SAMPLER_LINES[line], ())


NOTES = {
    "Sampler: DPM adaptive": "not taken: the sampler 'DPM adaptive' is not available",
    "Sampler: Euler a, Schedule type: Beta": "not taken: Schedule type Beta, which Euler a has not here",
    "Denoising strength: 0.5": "the picture was drawn from another one, which its text does not name",
    "Steps: many": "not read: Steps 'many'",
    "Seed: -1": "not taken: Seed -1 (seed -1 is out of range)",
    "Size: 8x8": "not taken: Size 8x8 (8 is not a width a picture can have)",
    "Size: large": "not read: Size 'large'",
    "ENSD: 31337, Tiling: True": "not read: ENSD, Tiling",
    "Hires upscale: 2, Hires upscaler: ESRGAN_4x": "not taken: Hires upscaler ESRGAN_4x; the first stage is enlarged by",
    "Hires upscale: huge": "not read: Hires upscale 'huge'",
    "Hires resize: 1600x1600, Size: 72x72": "not taken: the second stage (a first stage of 0.045 is out of range)",
    "Size: 200x200, Hires upscale: 2": "the first stage is drawn at 192x192 instead of 200x200",
}


@pytest.mark.parametrize("line", NOTES)
def test_what_is_not_understood_is_said(line):
    found = read_parameters(f"a\nCFG scale: 5, Size: 512x512, Clip skip: 1, {line}")
    assert [note[: len(NOTES[line])] for note in found.notes] == [NOTES[line]]
    ImageRequest(**{"seed": 1} | found.fields)


def test_prompts_over_many_lines_are_kept_apart():
    found = read_parameters(
        'one, "Steps: 3"\n\nAND two: half\nNegative prompt: bad\nworse\nSteps: 3, Seed: 1, Size: 64x64, Version: v1.9.4\n'
    )
    assert found.fields["prompt"] == 'one, "Steps: 3"\n\nAND two: half'
    assert found.fields["negative_prompt"] == "bad\nworse"


def test_a_text_without_settings_is_a_prompt():
    found = read_parameters("a cat: black, small\nNegative prompt: dog")
    assert found.fields == {"prompt": "a cat: black, small", "negative_prompt": "dog", "lora_tag_style": "a1111"}
    assert found.notes == ("the text names no settings, only a prompt",)
    assert read_parameters("").fields["prompt"] == ""


@pytest.mark.parametrize(
    ("prompt", "edited"), [("[a:b:0.5]", True), ("x [a|b]", True), ("[a] (b:1.2)", False), (r"\[a:b]", False)]
)
def test_prompts_that_change_while_they_are_drawn_are_said(prompt, edited):
    found = read_parameters(f"{prompt}\nSteps: 3, Seed: 1, Size: 64x64")
    assert any("is edited while it is drawn" in note for note in found.notes) is edited


def test_tags_of_sd_next_are_read_its_way():
    found = read_parameters("a\nSteps: 3, Seed: 1, Size: 64x64, App: SD.Next, Version: 1")
    assert (found.fields["lora_tag_style"], found.notes) == ("sdnext", ())
