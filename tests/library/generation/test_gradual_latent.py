"""Sizes grow as the settings say, and enlarging before a step of euler_a is enlarging between its two halves."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from library.errors import UserError
from library.generation.gradual_latent import GradualLatent, gradual_sizes, grown
from library.generation.samplers import make_scheduler

TIMESTEPS = [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


def test_a_picture_grows_below_a_timestep_every_few_steps_to_its_size():
    settings = GradualLatent(below=750, ratio=0.5, ratio_step=0.25, every_n_steps=3)
    sizes = gradual_sizes(settings, TIMESTEPS, (64, 72))
    assert sizes == [(32, 36)] * 4 + [(48, 48)] * 3 + [(64, 72)] * 4  # 54 is brought down to a multiple of 8


def test_the_last_size_is_the_pictures_even_where_it_is_no_multiple_of_8():
    assert gradual_sizes(GradualLatent(below=1000, ratio_step=0.5), TIMESTEPS, (65, 67))[-1] == (65, 67)


def test_steps_that_end_too_early_are_refused():
    with pytest.raises(UserError, match=r"Gradual Latent ends at 0.625 of the picture's size; take more steps"):
        gradual_sizes(GradualLatent(below=150), TIMESTEPS, (64, 64))


def test_values_out_of_range_are_told_at_once():
    with pytest.raises(UserError) as told:
        GradualLatent(below=0, ratio=2, ratio_step=0, every_n_steps=0)
    assert len(told.value.problems) == 4


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_enlarging_before_a_step_is_enlarging_between_taking_noise_away_and_adding_it(prediction_type):
    scheduler = make_scheduler("euler_a", steps=4, prediction_type=prediction_type)
    stream = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=stream) * scheduler.init_noise_sigma
    prediction = torch.randn(1, 4, 8, 8, generator=stream)
    timestep, sigma, sigma_to = scheduler.timesteps[0], scheduler.sigmas[0], scheduler.sigmas[1]
    scheduler.scale_model_input(latents, timestep)
    size = (12, 16)
    found = scheduler.step(
        grown(prediction, size), timestep, grown(latents, size), generator=torch.Generator().manual_seed(1)
    ).prev_sample

    # Ancestral Euler of Karras et al., arXiv:2206.00364, and Katherine Crowson's k-diffusion, written out
    clean = latents - sigma * prediction
    if prediction_type == "v_prediction":
        clean = latents / (sigma**2 + 1) - prediction * sigma / (sigma**2 + 1) ** 0.5
    sigma_up = (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2) ** 0.5
    sigma_down = (sigma_to**2 - sigma_up**2) ** 0.5
    without_noise = latents + (latents - clean) / sigma * (sigma_down - sigma)
    enlarged = functional.interpolate(without_noise, size=size, mode="bicubic", align_corners=False)
    noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, enlarged + noise * sigma_up, rtol=1e-4, atol=1e-4)


def test_a_tensor_of_its_size_is_left_as_it_is():
    tensor = torch.ones(1, 4, 8, 8)
    assert grown(tensor, (8, 8)) is tensor
