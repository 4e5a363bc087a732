"""Samplers go from noise to what a perfect model predicts, and draw each picture's noise from its own generator."""

import pytest
import torch

from library.errors import UserError
from library.generation.samplers import SAMPLERS, find_sampler, make_scheduler, takes_generator

SPREAD_OF_FIRST_TIMESTEP = 0.02915
DIFFERENT = [name for name in SAMPLERS if not name.startswith("k_")]


def sample(name, *, steps=9, prediction_type="epsilon", seeds=(0, 1), content=0.5, zero_terminal_snr=False):
    """Sampling with the exact prediction for pictures that are `content` everywhere."""
    scheduler = make_scheduler(name, steps=steps, prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators]) * scheduler.init_noise_sigma
    noise = {"generator": generators} if takes_generator(scheduler) else {}
    for timestep in scheduler.timesteps:
        abar = torch.as_tensor(scheduler.alphas_cumprod[int(timestep)])
        model_input = scheduler.scale_model_input(x, timestep)
        eps = (model_input - abar.sqrt() * content) / (1 - abar).sqrt()
        prediction = eps if prediction_type == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * content
        x = scheduler.step(prediction, timestep, x, **noise).prev_sample
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_every_sampler_finds_what_a_perfect_model_knows(name, prediction_type):
    picture = sample(name, prediction_type=prediction_type)
    # ddim, pndm and plain dpmsolver end at the noise level of the first timestep, as Stable Diffusion was released.
    assert (picture - 0.5).abs().max() < 5 * SPREAD_OF_FIRST_TIMESTEP


@pytest.mark.parametrize("name", DIFFERENT)
def test_models_of_zero_terminal_snr_are_sampled_from_the_last_timestep(name):
    scheduler = make_scheduler(name, steps=10, prediction_type="v_prediction", zero_terminal_snr=True)
    assert int(scheduler.timesteps[0]) == 999
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    picture = sample(name, prediction_type="v_prediction", zero_terminal_snr=True)
    assert (picture - 0.5).abs().max() < (0.5 if name == "pndm" else 5 * SPREAD_OF_FIRST_TIMESTEP)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", DIFFERENT)
def test_few_and_odd_numbers_of_steps_work(name, steps):
    assert torch.isfinite(sample(name, steps=steps)).all()


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_pictures_noise_does_not_depend_on_its_batch(name):
    together, alone = sample(name, seeds=(3, 4, 5)), sample(name, seeds=(4,))
    torch.testing.assert_close(together[1:2], alone)


def test_ancestral_samplers_draw_noise_and_others_do_not():
    drawing = set()
    for name in DIFFERENT:
        scheduler = make_scheduler(name, steps=4, prediction_type="epsilon")
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        x = torch.zeros(1, 4, 8, 8)
        noise = {"generator": [generator]} if takes_generator(scheduler) else {}
        for timestep in scheduler.timesteps:
            x = scheduler.step(scheduler.scale_model_input(x, timestep), timestep, x, **noise).prev_sample
        if not torch.equal(generator.get_state(), before):
            drawing.add(name)
    assert drawing == {"euler_a", "dpm_2_a"}


def test_the_older_names_are_the_same_samplers():
    older = [name for name in SAMPLERS if name.startswith("k_")]
    assert older == ["k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"]
    assert all(SAMPLERS[name] is SAMPLERS[name.removeprefix("k_")] for name in older)


def test_the_coefficients_of_lms_are_its_integrals():
    """Against a fine midpoint rule over the Lagrange polynomials."""
    scheduler = make_scheduler("lms", steps=10, prediction_type="epsilon")
    sigmas = scheduler.sigmas.double()
    order, place = 4, 5
    nodes = [float(sigmas[place - k]) for k in range(order)]
    start, end = float(sigmas[place]), float(sigmas[place + 1])
    points = start + (end - start) * (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    for index in range(order):
        basis = torch.ones_like(points)
        for other, node in enumerate(nodes):
            if other != index:
                basis *= (points - node) / (nodes[index] - node)
        expected = float(basis.mean() * (end - start))
        assert scheduler.get_lms_coefficient(order, place, index) == pytest.approx(expected, rel=1e-6)


def test_an_unknown_sampler_is_answered_with_the_near_ones():
    with pytest.raises(UserError, match=r"no sampler is called 'eulera'; did you mean euler"):
        find_sampler("eulera")


def test_too_few_steps_for_a_sampler_are_a_sentence():
    with pytest.raises(UserError, match="take more steps"):
        make_scheduler("dpm_2_a", steps=2, prediction_type="v_prediction", zero_terminal_snr=True)
