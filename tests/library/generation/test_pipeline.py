"""Pictures are those of diffusers' own pipeline; batches, hooks and guests change nothing they should not."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from library.errors import UserError
from library.generation.pipeline import Hooks, Pipeline, PipelineSettings
from library.generation.requests import ImageRequest
from tests.library.generation.conftest import tiny_models
from tests.library.generation.diffusers_reference import ROUNDING, diffusers_picture


def request(**changes) -> ImageRequest:
    settings = {"prompt": "a red cat", "negative_prompt": "blurry", "width": 64, "height": 64, "seed": 1, "steps": 3}
    return ImageRequest(**settings | changes)


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmsolver++"])
def test_pictures_are_those_of_diffusers(any_models, sampler):
    asked = request(width=72, sampler=sampler)
    (picture,) = Pipeline(any_models).generate([asked])
    expected = diffusers_picture(any_models, asked)
    assert picture.size == (72, 64)
    assert expected.std() > 0.05, "a flat picture would prove nothing"
    assert np.abs(pixels(picture) / 255 - expected).max() <= ROUNDING


def test_seeds_prompts_and_negative_prompts_matter(sd1_models):
    pipeline = Pipeline(sd1_models)
    requests = [request(), request(seed=2), request(prompt="a house"), request(negative_prompt="a house")]
    pictures = [pixels(picture) for picture in pipeline.generate(requests)]
    for other in pictures[1:]:
        assert np.abs(pictures[0] - other).max() > 2


@pytest.mark.parametrize("sampler", ["ddim", "dpm_2_a"])
def test_a_picture_does_not_depend_on_its_batch(sd1_models, sampler):
    pipeline = Pipeline(sd1_models)
    requests = [request(seed=seed, prompt=f"cat number {seed}", scale=3.0 + seed, sampler=sampler) for seed in range(3)]
    alone, together = pipeline.generate(requests), pipeline.generate(requests, batch_size=3)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def count_calls(models, requests, batch_size) -> list[int]:
    """Rows of every call of the denoiser."""
    rows = []
    handle = models.denoiser.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        Pipeline(models).generate(requests, batch_size=batch_size)
    finally:
        handle.remove()
    return rows


def test_requests_that_fit_share_a_batch_and_come_back_in_order(sd1_models):
    requests = [request(steps=1), request(steps=1, width=72), request(steps=1, seed=3), request(steps=1, height=72)]
    assert sorted(count_calls(sd1_models, requests, 4)) == [2, 2, 4]
    pictures = Pipeline(sd1_models).generate(requests, batch_size=4)
    assert [picture.size for picture in pictures] == [(64, 64), (72, 64), (64, 64), (64, 72)]


def test_a_longer_prompt_elsewhere_does_not_lengthen_a_short_one(sd1_models):
    long = request(prompt="cat " * 100, steps=1)
    pipeline = Pipeline(sd1_models)
    (alone,) = pipeline.generate([request(steps=1)])
    together, _ = pipeline.generate([request(steps=1), long], batch_size=2)
    assert np.abs(pixels(alone) - pixels(together)).max() <= 1


def test_words_beyond_the_first_75_tokens_count(sd1_models):
    start = "cat " * 80
    pipeline = Pipeline(sd1_models)
    one, other = pipeline.generate([request(prompt=start + "house", steps=1), request(prompt=start + "dog", steps=1)])
    assert np.abs(pixels(one) - pixels(other)).max() > 0


def test_what_is_cut_off_is_said(sd1_models):
    notes = []
    Pipeline(sd1_models, PipelineSettings(max_chunks=1), note=notes.append).generate([request(prompt="cat " * 80, steps=1)])
    assert len(notes) == 1
    assert notes[0].endswith("has 80 tokens; the last 5 are left out")


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_scale_of_one_or_less_is_without_guidance(sd1_models, scale):
    requests = [request(scale=scale), request(scale=scale, negative_prompt="a house")]
    assert set(count_calls(sd1_models, requests[:1], 1)) == {1}
    one, other = Pipeline(sd1_models).generate(requests)
    assert np.array_equal(pixels(one), pixels(other))


def test_hooks_see_every_batch_and_step_and_keep_requests_apart(sd1_models):
    seen = []
    hooks = Hooks(
        batch_key=lambda asked: asked.prompt,
        before_encoding=lambda requests: seen.append([asked.prompt for asked in requests]),
        before_step=lambda step: seen.append((step.number, step.count)),
    )
    requests = [request(steps=2), request(steps=2, prompt="a house"), request(steps=2, seed=9)]
    Pipeline(sd1_models).generate(requests, batch_size=4, hooks=hooks)
    assert seen == [["a red cat"] * 2, (0, 2), (1, 2), ["a house"], (0, 2), (1, 2)]


def test_strengths_may_change_between_steps(sd1_models):
    """What a step's hook does acts from that very step on."""
    layer = sd1_models.denoiser.conv_out
    strength = {"now": 1.0}
    handle = layer.register_forward_hook(lambda *_: _[-1] * strength["now"])

    def halve_from(number: int) -> Hooks:
        return Hooks(before_step=lambda step: strength.update(now=1.0 if step.number < number else 0.5))

    try:
        pictures = [pixels(Pipeline(sd1_models).generate([request()], hooks=halve_from(number))[0]) for number in (0, 2, 3)]
        (plain,) = Pipeline(sd1_models).generate([request()], hooks=halve_from(99))
    finally:
        handle.remove()
    assert np.array_equal(pictures[2], pixels(plain))
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2])


class Guest(nn.Module):
    """A module in training mode that only stands by."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout()


def test_a_training_finds_everything_as_it_was(sd1_models):
    guest = Guest()
    models = replace(sd1_models, others=[guest])
    models.denoiser.train()
    models.denoiser.mid_block.eval()
    before = {name: module.training for name, module in models.denoiser.named_modules()}
    seen = []

    def draw_from_everything(_) -> None:
        random.random()
        torch.rand(3)
        seen.append((guest.training, guest.inner.training, models.denoiser.training, torch.is_grad_enabled()))

    python_state, torch_state = random.getstate(), torch.get_rng_state()
    try:
        Pipeline(models).generate([request(steps=1)], hooks=Hooks(before_step=draw_from_everything))
        assert seen == [(False, False, False, False)]
        assert (guest.training, guest.inner.training) == (True, True)
        assert {name: module.training for name, module in models.denoiser.named_modules()} == before
        assert not models.vae.training
        assert random.getstate() == python_state
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert torch.is_grad_enabled()
    finally:
        models.denoiser.eval()


def test_models_are_given_back_after_an_error_or_a_stop_in_the_middle(sd1_models):
    sd1_models.denoiser.train()
    try:
        stream = Pipeline(sd1_models).stream([request(steps=1), request(steps=1, seed=2)])
        next(stream)
        assert not sd1_models.denoiser.training
        stream.close()
        assert sd1_models.denoiser.training

        def fail(_) -> None:
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            Pipeline(sd1_models).generate([request()], hooks=Hooks(before_step=fail))
        assert sd1_models.denoiser.training
    finally:
        sd1_models.denoiser.eval()


def test_numbers_that_are_none_are_a_sentence_and_no_black_picture(sd1_models):
    handle = sd1_models.denoiser.conv_out.register_forward_hook(lambda *_: _[-1] * float("nan"))
    try:
        with pytest.raises(UserError, match="the picture of seed 1 came out as no numbers"):
            Pipeline(sd1_models).generate([request(steps=1)])
    finally:
        handle.remove()


class HalfVAE(nn.Module):
    """A VAE that overflows below fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    def decode(self, latents):
        from types import SimpleNamespace

        picture = torch.zeros(1, 3, 64, 64, dtype=latents.dtype) * self.weight
        return SimpleNamespace(sample=picture if latents.dtype == torch.float32 else picture + float("inf"))


def test_a_vae_that_overflows_is_asked_again_in_fp32_and_left_as_it_was(sd1_models):
    vae, notes = HalfVAE(), []
    (picture,) = Pipeline(replace(sd1_models, vae=vae), note=notes.append).generate([request(steps=1)])
    assert pixels(picture).min() == pixels(picture).max() == 128
    assert vae.weight.dtype == torch.bfloat16
    assert "overflowed" in notes[0]


def test_half_precision_models_draw_nearly_the_same_picture(sd1_models):
    from copy import deepcopy

    half = replace(
        sd1_models,
        denoiser=deepcopy(sd1_models.denoiser).bfloat16(),
        text_encoders=[deepcopy(sd1_models.text_encoders[0]).bfloat16()],
    )
    (exact,), (rounded,) = Pipeline(sd1_models).generate([request()]), Pipeline(half).generate([request()])
    difference = np.abs(pixels(exact) - pixels(rounded))
    assert 0 < difference.mean() < 6


def test_autocast_computes_the_step_in_the_type_of_the_training(sd1_models):
    types = []
    handle = sd1_models.denoiser.conv_in.register_forward_hook(lambda *_: types.append(_[-1].dtype))
    try:
        Pipeline(sd1_models, PipelineSettings(autocast=torch.bfloat16)).generate([request(steps=1)])
    finally:
        handle.remove()
    assert types == [torch.bfloat16]


def test_what_a_picture_is_said_to_be_counts_as_in_diffusers():
    models = tiny_models("sdxl")
    sizes = {"original_width": 1024, "original_height": 512, "crop_top": 16, "crop_left": 32}
    asked = request(
        **sizes, original_width_negative=256, original_height_negative=128, prompt_2="a dog", negative_prompt_2="old"
    )
    told = {
        **{"original_size": (512, 1024), "crops_coords_top_left": (16, 32), "target_size": (64, 64)},
        **{"negative_original_size": (128, 256), "negative_crops_coords_top_left": (16, 32)},
        **{"negative_target_size": (64, 64), "prompt_2": "a dog", "negative_prompt_2": "old"},
    }
    expected = diffusers_picture(models, asked, lambda _: told)
    drawn = pixels(Pipeline(models).generate([asked])[0]) / 255
    assert np.abs(drawn - expected).max() <= ROUNDING
    for field in ("original_width", "crop_left", "original_height_negative", "prompt_2", "negative_prompt_2"):
        default = getattr(request(), field)
        (other,) = Pipeline(models).generate([replace(asked, **{field: default})])
        assert np.abs(pixels(other) / 255 - drawn).max() > 1 / 255, field
