"""Strengths by part, block, step and sub-prompt act as they read: against loops written out with diffusers' parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from library.families.block_weights import PLACES, read_block_weights
from library.generation import adapters
from library.generation.loading import load_rack
from library.generation.options import AdapterOptions, NetworkUse
from library.generation.pipeline import Pipeline, PipelineModels
from library.generation.requests import ImageRequest
from library.generation.samplers import make_scheduler
from networks import dylora, glora, lora, oft
from networks.building.network import AdapterNetwork
from tests.library.generation.conftest import tiny_models

STEPS = 4
ASKED = ImageRequest(prompt="a red cat", negative_prompt="blurry", width=64, height=64, seed=1, steps=STEPS, scale=3.0)
MODULES = {"lora": lora, "glora": glora, "oft": oft, "dylora": dylora}
SETTINGS = {"lora": {"dora_wd": True}, "dylora": {"unit": 2}}


@pytest.fixture(scope="module")
def models() -> PipelineModels:
    return tiny_models("sd1")


@pytest.fixture(scope="module")
def files(models, tmp_path_factory) -> dict[str, Path]:
    """An adapter of each of several algorithms, whose every tensor acts: a plain LoRA, and ones that read the base."""
    folder = tmp_path_factory.mktemp("loras")
    found = {}
    for number, (name, settings) in enumerate({"plain": {}, **{name: SETTINGS.get(name, {}) for name in MODULES}}.items()):
        module = MODULES.get(name, lora)
        network = module.create_network(1.0, 4, 4, None, models.text_encoders, models.denoiser, **settings)
        stream = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=stream))
        found[name] = folder / f"{name}.safetensors"
        network.save_weights(found[name], torch.float32, {"ss_network_module": f"networks.{name}"})
    return found


def draw(models, files, prompt, *, networks=(), merges=False, **changes) -> np.ndarray:
    """(H, W, 3) of a prompt with tags, 0..255."""
    rack = load_rack(
        AdapterOptions(networks=tuple(networks), merge_for_batches=merges), models, find=lambda tag: files[tag.name]
    )
    (picture,) = Pipeline(models, rack=rack).generate([replace(ASKED, prompt=prompt, **changes)])
    return np.asarray(picture).astype(int)


def network_of(models, file) -> AdapterNetwork:
    network, _ = lora.create_network_from_weights(1.0, file, None, models.text_encoders, models.denoiser)
    return network.eval()


@torch.no_grad()
def written_out(models, set_strengths) -> np.ndarray:
    """The picture of a plain loop; `set_strengths(step)` is called before the text is encoded for that step."""
    tokenizer, encoder, denoiser = models.tokenizers[0], models.text_encoders[0], models.denoiser
    scheduler = make_scheduler("ddim", steps=STEPS, prediction_type="epsilon")
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(ASKED.seed))
    texts = [ASKED.negative_prompt, ASKED.prompt]
    ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    for step, timestep in enumerate(scheduler.timesteps):
        set_strengths(step)
        negative, positive = denoiser(
            torch.cat([latents] * 2), timestep, encoder_hidden_states=encoder(ids).last_hidden_state
        ).sample.chunk(2)
        guided = negative + ASKED.scale * (positive - negative)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    pixels = models.vae.decode(latents / models.family.latent_scale).sample[0]
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).int().numpy()


def close(one, other) -> bool:
    return np.abs(one - other).max() <= 1


@pytest.fixture(scope="module")
def base(models) -> np.ndarray:
    return written_out(models, lambda _: None)


@pytest.mark.parametrize("name", ["plain", *MODULES])
def test_a_schedule_acts_at_every_step_of_every_algorithm(models, files, base, name):
    network = network_of(models, files[name])
    network.attach()
    strengths = [0.25, 0.25, 0.625, 1.0]
    try:
        expected = written_out(models, lambda step: network.set_multiplier(strengths[step]))
    finally:
        network.detach()
    got = draw(models, files, f"a red cat<lora:{name}:0.25@1,1@3>")
    assert close(got, expected)
    assert np.abs(expected - base).mean() > 1, "the adapter must act, or this test says nothing"
    assert not close(got, draw(models, files, f"a red cat<lora:{name}:0.25>"))


@pytest.mark.parametrize(
    ("arguments", "text", "section"),
    [
        ("1:te=0.5:unet=-0.5", 0.5, {"I": -0.5, "M": -0.5, "O": -0.5}),
        ("1.0:in=0:mid=1:out=0.3", 1.0, {"I": 0, "M": 1, "O": 0.3}),
        ("te=0.1@0,0.7@3", None, {"I": None, "M": None, "O": None}),
        ("1:lbw=OUTALL", 1.0, "OUTALL"),
        ("0.5:module=unet", 0.0, {"I": 0.5, "M": 0.5, "O": 0.5}),
    ],
)
def test_parts_and_blocks_have_strengths_of_their_own(models, files, base, arguments, text, section):
    network = network_of(models, files["plain"])
    weights = read_block_weights(section) if isinstance(section, str) else None
    rising = [0.1, 0.3, 0.5, 0.7]

    def set_strengths(step: int) -> None:
        if weights is not None:
            blocks = weights[1:]
        else:
            blocks = [rising[step] if section[name[0]] is None else section[name[0]] for name in PLACES[1:]]
        text_encoder = rising[step] if text is None else text * (weights[0] if weights is not None else 1)
        network.set_multipliers(text_encoder=text_encoder, denoiser=blocks[-1], blocks=blocks)

    network.attach()
    try:
        expected = written_out(models, set_strengths)
    finally:
        network.detach()
    assert close(draw(models, files, f"a red cat<lora:plain:{arguments}>"), expected)
    assert np.abs(expected - base).mean() > 0.5, "the adapter must act, or this test says nothing"


def test_start_and_stop_are_steps_without_the_adapter(models, files):
    network = network_of(models, files["plain"])
    network.attach()
    try:
        expected = written_out(models, lambda step: network.set_multiplier(0.8 * (1 <= step < 3)))
    finally:
        network.detach()
    assert close(draw(models, files, "a red cat<lora:plain:0.8:start=1:stop=3>"), expected)


def test_several_adapters_add_up_and_one_asked_for_twice_counts_twice(models, files):
    both = draw(models, files, "a red cat<lora:plain:0.5><lora:dylora:-0.5>")
    again = draw(models, files, "<lora:dylora:-0.25>a red cat<lora:plain:0.5><lora:dylora:-0.25>")
    assert close(both, again)
    assert not close(both, draw(models, files, "a red cat<lora:plain:0.5><lora:dylora:-0.25>"))


def test_pictures_of_one_batch_have_adapters_of_their_own(models, files):
    prompts = ["a red cat", "a red cat<lora:plain:1>", "a red cat<lora:plain:0.3@0,1@1>", "a red cat<lora:glora:0.5>"]
    requests = [replace(ASKED, prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    rack = load_rack(AdapterOptions(), models, find=lambda tag: files[tag.name])
    rows = []
    handle = models.denoiser.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        together = Pipeline(models, rack=rack).generate(requests, batch_size=4)
    finally:
        handle.remove()
    assert rows == [8] * STEPS
    for prompt, picture, request in zip(prompts, together, requests, strict=True):
        assert close(np.asarray(picture).astype(int), draw(models, files, prompt, seed=request.seed))


def test_adapters_that_nothing_wants_any_more_are_let_go(models, files, monkeypatch):
    """With room for one: each is loaded when it is wanted, and pictures do not depend on what was there before."""
    monkeypatch.setattr(adapters, "KEPT", 1)
    loaded = []
    rack = load_rack(AdapterOptions(), models, find=lambda tag: files[tag.name])
    load = rack._load
    monkeypatch.setattr(rack, "_load", lambda key: loaded.append(key.file.stem) or load(key))
    names = ["plain", "glora", "glora", "oft", "plain"]
    requests = [replace(ASKED, prompt=f"a red cat<lora:{name}:1>", seed=seed) for seed, name in enumerate(names)]
    pictures = Pipeline(models, rack=rack).generate(requests)
    assert loaded == ["plain", "glora", "oft", "plain"]
    for name, picture, request in zip(names, pictures, requests, strict=True):
        alone = draw(models, files, f"a red cat<lora:{name}:1>", seed=request.seed)
        assert np.array_equal(np.asarray(picture).astype(int), alone)


def test_the_model_is_bit_for_bit_what_it_was_afterwards(models, files):
    before = {name: value.clone() for name, value in models.denoiser.state_dict().items()}
    for merges in (False, True):
        draw(models, files, "a<lora:plain:1><lora:lora:0.5>", merges=merges)
        assert all(torch.equal(value, before[name]) for name, value in models.denoiser.state_dict().items())
        assert not any(module._forward_hooks for module in models.denoiser.modules())
        assert not any(module._forward_hooks for module in models.text_encoders[0].modules())


def test_weights_rewritten_for_a_batch_draw_the_same(models, files, base):
    prompt = "a red cat<lora:plain:0.7:in=0.2><lora:lora:0.5><lora:glora:0.3>"
    attached, merged = (draw(models, files, prompt, merges=merges) for merges in (False, True))
    assert np.abs(attached - base).mean() > 1
    assert np.abs(attached - merged).max() <= 1


def test_hooks_of_one_batch_do_not_reach_the_next_that_has_its_adapters_in_the_weights(models, files):
    prompts = ["a red cat<lora:lora:0@0,1@1>", "a red cat<lora:plain:1>", "a red cat<lora:lora:0.2@0,0.7@1>", "a red cat"]
    requests = [replace(ASKED, prompt=prompt) for prompt in prompts]
    rack = load_rack(AdapterOptions(merge_for_batches=True), models, find=lambda tag: files[tag.name])
    for prompt, picture in zip(prompts, Pipeline(models, rack=rack).generate(requests), strict=True):
        assert np.abs(np.asarray(picture).astype(int) - draw(models, files, prompt)).max() <= 1


def test_adapters_go_into_the_weights_once_for_all_pictures_that_want_them(models, files, monkeypatch):
    merged = []
    merge = AdapterNetwork.merge
    monkeypatch.setattr(AdapterNetwork, "merge", lambda network: [merged.append(network), merge(network)])
    requests = [replace(ASKED, prompt=f"a red cat<lora:{name}:1>", steps=1) for name in ("plain", "lora", "plain")]
    rack = load_rack(AdapterOptions(merge_for_batches=True), models, find=lambda tag: files[tag.name])
    Pipeline(models, rack=rack).generate(requests)
    assert len(merged) == len(set(merged)) == 2


def test_a_prompt_takes_the_place_of_the_strengths_of_the_command_line(models, files):
    networks = [NetworkUse(file=files["plain"], strength=0.9), NetworkUse(file=files["glora"], strength=0.9)]
    asked = draw(models, files, "a red cat", networks=networks, network_strengths=(0.5,))
    assert close(asked, draw(models, files, "a red cat<lora:plain:0.5><lora:glora:0.5>"))


def test_a_rank_cut_from_a_dylora_file_acts_as_it_was_trained(models, files):
    network = network_of(models, files["dylora"])
    for _, adapter in network.items():
        adapter.lora_down.weight.data[2:] = 0
        adapter.scale *= 2**0.5  # sqrt(rank / kept rank), arXiv:2210.07558 as networks/dylora.py writes it
    network.attach()
    try:
        expected = written_out(models, lambda _: None)
    finally:
        network.detach()
    assert close(draw(models, files, "a red cat<lora:dylora:1:dyn=2>"), expected)


def test_a_rank_cut_from_another_file_keeps_its_scale_as_web_uis_do(models, files):
    network = network_of(models, files["plain"])
    for _, adapter in network.items():
        adapter.lora_down.weight.data[2:] = 0
    network.attach()
    try:
        expected = written_out(models, lambda _: None)
    finally:
        network.detach()
    assert close(draw(models, files, "a red cat<lora:plain:1:dyn=2>"), expected)


def test_regions_have_prompts_and_adapters_of_their_own(models, files, tmp_path):
    """Where the map is whole, the picture is that of the sub-prompt alone; a half and half map differs from both."""
    from PIL import Image

    whole = tmp_path / "red.png"
    Image.new("RGB", (64, 64), (255, 0, 0)).save(whole)
    halves = tmp_path / "halves.png"
    array = np.zeros((64, 64, 3), np.uint8)
    array[:, :32, 0], array[:, 32:, 1] = 255, 255
    Image.fromarray(array).save(halves)
    prompt = "a red cat<lora:plain:1> AND a house<lora:glora:1>"
    first = draw(models, files, "a red cat<lora:plain:1>")
    second = draw(models, files, "a house<lora:glora:1>")
    green = np.array(Image.open(whole))[..., [1, 0, 2]]
    Image.fromarray(green).save(tmp_path / "green.png")
    both = draw(models, files, prompt, regions=str(halves))
    assert not close(both, first)
    assert not close(both, second)
    # A channel that is empty counts everywhere, so a whole red map shares with the second: half and half.
    shared = draw(models, files, prompt, regions=str(whole))
    assert not close(shared, first)
    codes = draw(models, files, "a red cat<lora:plain:1>", regions=str(whole), region_colors=1)
    assert close(codes, first)


def test_tags_of_sub_prompts_without_regions_act_on_all_of_them(models, files):
    one = draw(models, files, "a red cat<lora:plain:0.5> AND a house")
    other = draw(models, files, "a red cat AND a house<lora:plain:0.5>")
    assert close(one, other)
    assert not close(one, draw(models, files, "a red cat AND a house"))
