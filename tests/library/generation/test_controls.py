"""Pictures follow hint images as in diffusers' own ControlNet pipeline."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from library.checkpoints.base_model import open_base_model
from library.errors import UserError
from library.generation.controls import (
    ControlNets,
    ControlUse,
    check_hint,
    control_uses,
    hints_for,
    open_control_nets,
    prepare_hint,
)
from library.generation.pipeline import Pipeline
from library.generation.requests import ImageRequest
from tests.library.generation.conftest import tiny_models
from tests.library.generation.diffusers_reference import ROUNDING, diffusers_pipeline
from tests.support.tiny_models import build_tiny_control_net


@pytest.fixture(scope="module")
def hints(tmp_path_factory) -> list[str]:
    """Two images of other sizes than the pictures."""
    folder = tmp_path_factory.mktemp("hints")
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 255, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((110, 90), Image.Resampling.NEAREST).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(2)]


def asked(*images: str, **changes) -> ImageRequest:
    settings = {"prompt": "a red cat", "negative_prompt": "blurry", "width": 72, "height": 64, "seed": 1, "steps": 4}
    return ImageRequest(**settings | changes, control_images=images)


def drawn(models, controls: ControlNets | None, requests, **settings) -> list[np.ndarray]:
    """Pictures of our pipeline with controls; in 0..1."""
    return [np.asarray(picture) / 255 for picture in Pipeline(models, control=controls).generate(requests, **settings)]


def picture_of_diffusers(models, nets, request, images, **settings) -> np.ndarray:
    pipeline = diffusers_pipeline(models, request, "ControlNet", controlnet=nets)
    return pipeline(
        request.prompt,
        image=images,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=request.scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
        **settings,
    ).images[0]


@pytest.mark.parametrize("kind", ["sd1", "sd2 v", "sdxl"])
def test_pictures_are_those_of_diffusers(kind, hints):
    models = tiny_models(kind)
    net = build_tiny_control_net(models.denoiser, seed=5)
    request = asked(hints[0])
    (picture,) = drawn(models, ControlNets([ControlUse(path="net", multiplier=0.5)], [net]), [request])
    expected = picture_of_diffusers(models, net, request, Image.open(hints[0]), controlnet_conditioning_scale=0.5)
    other = picture_of_diffusers(models, net, request, Image.open(hints[1]), controlnet_conditioning_scale=0.5)
    assert np.abs(other - expected).max() > 0.05, "a hint that does nothing would prove nothing"
    assert np.abs(picture - expected).max() <= ROUNDING


@pytest.fixture(scope="module")
def nets(sd1_models) -> list:
    return [build_tiny_control_net(sd1_models.denoiser, seed=seed) for seed in (5, 6)]


def test_several_are_summed_each_for_its_share_of_the_steps(sd1_models, nets, hints):
    uses = control_uses(["one", "two"], preparations=["none", "canny"], multipliers=[0.5, 0.7], ratios=[0.5])
    request = asked(*hints)
    (picture,) = drawn(sd1_models, ControlNets(uses, nets), [request])
    pixels = np.asarray(Image.open(hints[1]).resize((72, 64), Image.Resampling.LANCZOS))
    edges = Image.fromarray(cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 63, 191)).convert("RGB")
    expected = picture_of_diffusers(
        sd1_models,
        nets,
        request,
        [Image.open(hints[0]), edges],
        controlnet_conditioning_scale=[0.5, 0.7],
        control_guidance_end=[0.5, 1.0],
    )
    assert np.abs(picture - expected).max() <= ROUNDING
    whole = control_uses(["one", "two"], preparations=["none", "canny"], multipliers=[0.5, 0.7])
    assert np.abs(drawn(sd1_models, ControlNets(whole, nets), [request])[0] - expected).max() > 0.02


def test_every_picture_of_a_batch_has_its_own_hint_or_none(sd1_models, nets, hints):
    controls = ControlNets([ControlUse(path="one")], nets[:1])
    requests = [asked(hints[0]), asked(hints[1]), asked()]
    together = drawn(sd1_models, controls, requests, batch_size=3)
    alone = [drawn(sd1_models, controls, [request])[0] for request in requests[:2]]
    alone += drawn(sd1_models, None, [requests[2]])
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one - other).max() <= ROUNDING * 2
    assert np.abs(together[0] - together[1]).max() > 0.02


def arguments(controls: ControlNets, request: ImageRequest, share: float = 0.0) -> dict:
    latents, context = torch.zeros(1, 4, 8, 9), torch.zeros(1, 77, 32)
    with torch.no_grad():
        return controls.denoiser_arguments(
            share=share, latents=latents, timestep=torch.tensor(1), told={"encoder_hidden_states": context}, owners=[request]
        )


def test_nothing_is_added_behind_its_share_nor_without_strength_or_hints(nets, hints):
    half, none = ControlUse(path="one", ratio=0.5), ControlUse(path="one", multiplier=0.0)
    assert set(arguments(ControlNets([half], nets[:1]), asked(hints[0]), share=0.49)) == {
        "down_block_additional_residuals",
        "mid_block_additional_residual",
    }
    assert arguments(ControlNets([half], nets[:1]), asked(hints[0]), share=0.5) == {}
    assert arguments(ControlNets([none], nets[:1]), asked(hints[0])) == {}
    assert arguments(ControlNets([half], nets[:1]), asked()) == {}


def test_a_hint_is_read_once(nets, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "hint.png")
    controls = ControlNets([ControlUse(path="one")], nets[:1])
    request = asked(str(tmp_path / "hint.png"))
    first = arguments(controls, request)
    (tmp_path / "hint.png").unlink()
    assert torch.equal(arguments(controls, request)["mid_block_additional_residual"], first["mid_block_additional_residual"])


def test_edges_are_white_where_brightness_jumps_beyond_the_thresholds(tmp_path):
    steps = np.zeros((64, 64, 3), np.uint8)
    steps[:, 20:] = 30
    steps[:, 40:] = 255
    Image.fromarray(steps).save(tmp_path / "hint.png")
    hint = prepare_hint(str(tmp_path / "hint.png"), (63, 191), 64, 64)
    assert hint.shape == (1, 3, 64, 64)
    assert set(hint.unique().tolist()) == {0.0, 1.0}
    columns = hint[0, 0].amax(0).nonzero().flatten().tolist()
    assert columns
    assert all(38 <= column <= 41 for column in columns)
    low = prepare_hint(str(tmp_path / "hint.png"), ControlUse(path="", preparation="canny_5_50").canny_thresholds, 64, 64)
    assert low[0, 0].amax(0)[18:22].any()


def test_hints_go_to_models_picture_by_picture_and_begin_again():
    paths = ["a1", "a2", "b1", "b2"]
    assert [hints_for(paths, 2, number) for number in range(3)] == [("a1", "a2"), ("b1", "b2"), ("a1", "a2")]
    assert hints_for(paths, 1, 2) == ("b1",)


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (
            lambda: hints_for(["a", "b", "c"], 2, 0),
            "--guide_image_path: 3 hint images for 2 ControlNets; give one image for",
        ),
        (lambda: hints_for([], 1, 0), "0 hint images for 1 ControlNet"),
        (
            lambda: control_uses(["net"], preparations=["depth"]),
            "ControlNet net: a hint cannot be prepared by 'depth'; give",
        ),
        (lambda: control_uses(["net"], preparations=["canny_200_100"]), "low threshold of canny_200_100 is above the high"),
        (lambda: control_uses(["net"], ratios=[1.5]), "ControlNet net: a share of the steps of 1.5 is out of range"),
        (lambda: control_uses(["net"], multipliers=[float("nan")]), "a strength of nan is no number"),
        (lambda: control_uses(["net"], multipliers=[1, 1]), "--control_net_models net: 2 multipliers for 1 ControlNet"),
        (lambda: check_hint("missing.png"), "hint image missing.png: is not there"),
        (lambda: prepare_hint(__file__, None, 64, 64), "is not an image"),
    ],
)
def test_mistakes_are_told(work, sentence):
    with pytest.raises(UserError) as told:
        work()
    assert sentence in str(told.value)


def test_a_picture_without_a_hint_for_every_model_is_refused(nets, hints):
    uses = control_uses(["one", "two"])
    with pytest.raises(UserError, match="a picture has 1 hint image for 2 ControlNets; give one for each"):
        arguments(ControlNets(uses, nets), asked(hints[0]))


def test_all_files_that_do_not_fit_are_told_at_once_and_those_that_do_are_loaded(
    sd1_models, nets, tiny_sd1_folder, tiny_sd2_folder, tmp_path
):
    nets[0].save_pretrained(tmp_path / "net")
    base = open_base_model(tiny_sd2_folder)
    with pytest.raises(UserError) as told:
        open_control_nets(control_uses([str(tmp_path / "net"), "missing.pth"]), base)
    assert [problem.what for problem in told.value.problems] == [
        "is a ControlNet for Stable Diffusion 1.x, and the base model is Stable Diffusion 2.x",
        "no such file",
    ]
    uses = control_uses([str(tmp_path / "net")])
    files = open_control_nets(uses, open_base_model(tiny_sd1_folder))
    controls = ControlNets.load(uses, files, sd1_models.denoiser, dtype=torch.float32, device="cpu")
    assert all(torch.equal(value, nets[0].state_dict()[name]) for name, value in controls.nets[0].state_dict().items())
    with pytest.raises(ValueError, match="1 ControlNets for 2 uses"):
        ControlNets([*uses, replace(uses[0], ratio=0.5)], controls.nets)
