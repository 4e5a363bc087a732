"""Pictures from pictures, masks and first stages: against diffusers' own pipelines for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.generation.picture_files import read_mask, region_maps
from library.generation.pipeline import Hooks, Pipeline, PipelineSettings
from library.generation.requests import ImageRequest
from tests.library.generation.diffusers_reference import ROUNDING, diffusers_pipeline

ASKED = ImageRequest(
    prompt="a red cat", negative_prompt="blurry", width=72, height=64, seed=1, steps=5, strength=0.6, scale=4.0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A picture of another size than is asked for, and a mask whose left half is white."""
    path = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 255, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((90, 80), Image.Resampling.BICUBIC).save(path / "picture.png")
    mask = np.zeros((64, 72), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(path / "mask.png")
    return path


def draw(models, request, **settings) -> np.ndarray:
    (picture,) = Pipeline(models, PipelineSettings(**settings)).generate([request])
    return np.asarray(picture) / 255


def of_diffusers(models, request, kind: str, **more) -> np.ndarray:
    made = diffusers_pipeline(models, request, kind)
    image = Image.open(request.image).convert("RGB").resize((request.width, request.height), Image.Resampling.LANCZOS)
    return made(
        request.prompt,
        image=image,
        negative_prompt=request.negative_prompt,
        strength=request.strength,
        num_inference_steps=request.steps,
        guidance_scale=request.scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
        **more,
    ).images[0]


@pytest.mark.parametrize(("sampler", "strength"), [("ddim", 0.6), ("euler_a", 0.6), ("dpmsolver++", 0.4), ("ddim", 1.0)])
def test_pictures_from_pictures_are_those_of_diffusers(any_models, folder, sampler, strength):
    request = replace(ASKED, image=str(folder / "picture.png"), sampler=sampler, strength=strength)
    expected = of_diffusers(any_models, request, "Img2Img")
    assert np.abs(draw(any_models, request) - expected).max() <= ROUNDING


@pytest.mark.parametrize(("sampler", "strength"), [("ddim", 0.6), ("dpmsolver++", 1.0)])
def test_pictures_with_masks_are_those_of_diffusers(any_models, folder, sampler, strength):
    """Samplers that draw nothing: diffusers draws noise for a masked copy too, which these models do not see."""
    request = replace(
        *(ASKED,), image=str(folder / "picture.png"), mask=str(folder / "mask.png"), sampler=sampler, strength=strength
    )
    mask = Image.open(folder / "mask.png")
    size = {"width": request.width, "height": request.height}
    expected = of_diffusers(any_models, request, "Inpaint", mask_image=mask, **size)
    assert np.abs(draw(any_models, request) - expected).max() <= ROUNDING


def test_what_is_black_in_a_mask_stays_and_what_is_white_is_drawn(sd1_models, folder):
    request = replace(ASKED, image=str(folder / "picture.png"), mask=str(folder / "mask.png"), strength=1.0)
    seeds = [draw(sd1_models, replace(request, seed=seed)) for seed in (1, 2)]
    apart = np.abs(seeds[0] - seeds[1]).mean(axis=(0, 2))
    assert apart[:24].mean() > 3 * apart[-16:].mean()


def test_no_strength_gives_the_picture_back_and_more_changes_more(sd1_models, folder):
    request = replace(ASKED, image=str(folder / "picture.png"))
    original, *changed = (draw(sd1_models, replace(request, strength=strength)) for strength in (0.0, 0.2, 0.8))
    assert np.array_equal(original, draw(sd1_models, replace(request, strength=0.0, prompt="a house")))
    near, far = (np.abs(original - picture).mean() for picture in changed)
    assert 0 < near < far


def test_a_batch_of_pictures_from_pictures_is_each_of_them_alone(sd1_models, folder):
    requests = [replace(ASKED, image=str(folder / "picture.png"), seed=seed, sampler="euler_a") for seed in (1, 2)]
    together = Pipeline(sd1_models).generate(requests, batch_size=2)
    for picture, request in zip(together, requests, strict=True):
        assert np.abs(np.asarray(picture) / 255 - draw(sd1_models, request)).max() <= 1 / 255 + 1e-6


def test_a_second_stage_begins_from_the_enlarged_first(sd1_models, tmp_path):
    """Against the two stages by hand: a small picture, enlarged, and a picture from it with the next seed."""
    request = replace(ASKED, width=128, height=64, highres_scale=0.5, highres_steps=3)
    small = replace(ASKED, width=64, height=64, steps=3)
    seen = []
    (picture,) = Pipeline(sd1_models).generate([request], hooks=Hooks(first_stage=lambda *each: seen.append(each)))
    ((asked, first, shown),) = seen
    assert asked is request
    assert (first.width, first.height, first.steps) == (64, 64, 3)
    assert np.array_equal(np.asarray(shown) / 255, draw(sd1_models, small))
    shown.resize((128, 64), Image.Resampling.LANCZOS).save(tmp_path / "large.png")
    second = replace(ASKED, width=128, image=str(tmp_path / "large.png"), seed=ASKED.seed + 1)
    assert np.abs(np.asarray(picture) / 255 - draw(sd1_models, second)).max() <= 1 / 255 + 1e-6


def test_sizes_that_the_model_is_told_are_those_of_the_stage(sd1_models):
    told = {"original_width": 300, "original_height_negative": 401, "crop_top": 6}
    request = replace(ASKED, width=128, height=64, highres_scale=0.5, highres_steps=1, **told)
    seen = []
    Pipeline(sd1_models).generate([request], hooks=Hooks(first_stage=lambda *each: seen.append(each)))
    ((_, first, _),) = seen
    assert (first.original_width, first.original_height_negative, first.crop_top) == (150, 200, 3)
    assert (first.original_height, first.crop_left) == (None, 0)


def test_latents_may_be_enlarged_instead_of_pictures(sd1_models):
    request = replace(ASKED, width=128, height=128, highres_scale=0.5, highres_steps=3)
    pixels, latents = (draw(sd1_models, replace(request, highres_latents=flag)) for flag in (False, True))
    assert np.abs(pixels - latents).max() > 0.05


def test_modules_that_wait_elsewhere_draw_the_same(sd1_models, folder):
    request = replace(ASKED, image=str(folder / "picture.png"))
    assert np.array_equal(draw(sd1_models, request), draw(sd1_models, request, offload=True, vae_batch_size=4))


def test_masks_are_read_at_the_size_of_latents(folder):
    mask = read_mask(str(folder / "mask.png"), 72, 64)
    assert mask.shape == (1, 8, 9)
    assert mask[0, :, :4].min() == 1
    assert mask[0, :, 4:].max() == 0


def save(path, array) -> str:
    Image.fromarray(np.array(array, np.uint8).repeat(32, 0).repeat(32, 1)).save(path)
    return str(path)


RED, GREEN, BLUE, YELLOW, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0)


def test_regions_are_the_channels_and_add_up_to_one(tmp_path):
    path = save(tmp_path / "r.png", [[RED, GREEN], [YELLOW, BLACK]])
    first, second = (each[::4, ::4].tolist() for each in region_maps(path, 2, 64, 64, colors=None))
    assert first == [[1.0, 0.0], [0.5, 0.5]]
    assert second == [[0.0, 1.0], [0.5, 0.5]]


def test_regions_by_code_are_whole_colours(tmp_path):
    path = save(tmp_path / "r.png", [[RED, GREEN], [YELLOW, BLUE]])
    maps = region_maps(path, 3, 64, 64, colors=4)
    assert [each[::4, ::4].tolist() for each in maps] == [
        [[1.0, 0.0], [0.0, pytest.approx(1 / 3)]],
        [[0.0, 1.0], [0.0, pytest.approx(1 / 3)]],
        [[0.0, 0.0], [1.0, pytest.approx(1 / 3)]],
    ]
    with pytest.raises(UserError, match="5 sub-prompts, and the regions have 4 colour codes"):
        region_maps(path, 5, 64, 64, colors=4)


def test_what_is_no_picture_is_a_sentence(sd1_models, tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(UserError, match=r"x\.png"):
        draw(sd1_models, replace(ASKED, image=str(tmp_path / "x.png")))
