"""Samplers go from noise to what a perfect model predicts, and draw each picture's noise from its own generator."""

from types import SimpleNamespace

import pytest
import torch

from library.errors import UserError
from library.generation.samplers import (
    SAMPLERS,
    canonical,
    denoising_timesteps,
    find_sampler,
    make_scheduler,
    takes_generator,
)

SPREAD_OF_FIRST_TIMESTEP = 0.02915
DIFFERENT = [name for name in SAMPLERS if not name.startswith("k_")]
PLAIN = [name for name in DIFFERENT if not SAMPLERS[name].schedule]


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


@pytest.mark.parametrize("name", DIFFERENT)
def test_few_and_odd_numbers_of_steps_work(name):
    for steps in (1, 2, 5):
        assert torch.isfinite(sample(name, steps=steps)).all()


@pytest.mark.parametrize("name", PLAIN)
def test_a_pictures_noise_does_not_depend_on_its_batch(name):
    together, alone = sample(name, seeds=(3, 4, 5)), sample(name, seeds=(4,))
    torch.testing.assert_close(together[1:2], alone)


def test_ancestral_samplers_draw_noise_and_others_do_not():
    drawing = set()
    for name in PLAIN:
        scheduler = make_scheduler(name, steps=4, prediction_type="epsilon")
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        x = torch.zeros(1, 4, 8, 8)
        noise = {"generator": [generator]} if takes_generator(scheduler) else {}
        for timestep in scheduler.timesteps:
            x = scheduler.step(scheduler.scale_model_input(x, timestep), timestep, x, **noise).prev_sample
        if not torch.equal(generator.get_state(), before):
            drawing.add(name)
    families = ("euler_a", "dpm_2_a", "ddpm", "lcm", "tcd")
    assert drawing == {name for name in PLAIN if name.startswith(families) or "_sde" in name}


# What each sampler stands for, in diffusers' words: class, and settings beside betas and prediction type.
STAND_FOR = {
    "ddim": ("DDIMScheduler", {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}),
    "pndm": ("PNDMScheduler", {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1}),
    "dpm_2": ("KDPM2DiscreteScheduler", {"steps_offset": 1}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {"steps_offset": 1}),
    "dpmsolver": (
        "DPMSolverMultistepScheduler",
        {"steps_offset": 1, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
    "dpmsolver++_sde": ("DPMSolverMultistepScheduler", {"steps_offset": 1, "algorithm_type": "sde-dpmsolver++"}),
    "dpmsolver++_sde_heun": (
        "DPMSolverMultistepScheduler",
        {"steps_offset": 1, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    "dpmsolver++_3m_sde": (
        "DPMSolverMultistepScheduler",
        {"steps_offset": 1, "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "dpmsingle_sde": (
        "DPMSolverSinglestepScheduler",
        {"lower_order_final": True, "algorithm_type": "sde-dpmsolver++"},
    ),
    "uni_pc": ("UniPCMultistepScheduler", {"steps_offset": 1}),
    "deis": ("DEISMultistepScheduler", {"steps_offset": 1}),
    "ddpm": ("DDPMScheduler", {"steps_offset": 1, "clip_sample": False}),
    "lcm": ("LCMScheduler", {"set_alpha_to_one": False}),
    "tcd": ("TCDScheduler", {"set_alpha_to_one": False}),
}
SCHEDULE_SETTINGS = {
    "_karras": {"use_karras_sigmas": True},
    "_exponential": {"use_exponential_sigmas": True},
    "_sgm_uniform": {"timestep_spacing": "trailing"},
    "": {},
}


def plain_diffusers(name, prediction_type):
    import diffusers

    ending = next(ending for ending in SCHEDULE_SETTINGS if name.endswith(ending))
    kind, settings = STAND_FOR[name.removesuffix(ending)]
    betas = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, kind)(**betas, **settings, **SCHEDULE_SETTINGS[ending], prediction_type=prediction_type)
    scheduler.set_timesteps(7)
    return scheduler


def one_loop(scheduler):
    """A whole loop with something that depends on input and time for a model."""
    generator = torch.Generator().manual_seed(5)
    noise = {"generator": generator} if takes_generator(scheduler) else {}
    x = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = torch.tanh(scheduler.scale_model_input(x, timestep) + timestep / 1000)
        x = scheduler.step(prediction, timestep, x, **noise).prev_sample
    return x


@pytest.mark.filterwarnings("ignore:.*dpmsolver:FutureWarning")
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", [name for name in DIFFERENT if not name.startswith("lms")])  # diffusers' needs scipy
def test_a_sampler_is_the_scheduler_it_stands_for(name, prediction_type):
    ours = make_scheduler(name, steps=7, prediction_type=prediction_type)
    theirs = plain_diffusers(name, prediction_type)
    assert type(ours) is type(theirs)
    assert torch.equal(one_loop(ours), one_loop(theirs))


@pytest.mark.parametrize("schedule", ["", "_karras", "_exponential", "_sgm_uniform"])
def test_schedules_of_lms_are_those_of_euler(schedule):
    lms, euler = (make_scheduler(name + schedule, steps=7, prediction_type="epsilon") for name in ("lms", "euler"))
    torch.testing.assert_close(lms.sigmas, euler.sigmas)
    torch.testing.assert_close(lms.timesteps.float(), euler.timesteps.float())


NAMES = {
    "DPM++ 2M Karras": "dpmsolver++_karras",
    "dpm++ 2m karras": "dpmsolver++_karras",
    "DPM++ 2M SDE Exponential": "dpmsolver++_sde_exponential",
    "DPM++ SDE Karras": "dpmsingle_sde_karras",
    "DPM++ 3M SDE": "dpmsolver++_3m_sde",
    "DPM2 a Karras": "dpm_2_a_karras",
    "Euler a": "euler_a",
    "EULER": "euler",
    "Euler SGM Uniform": "euler_sgm_uniform",
    "Heun": "heun",
    "UniPC": "uni_pc",
    "LCM": "lcm",
    "DDIM": "ddim",
    "PLMS": "pndm",
    "LMS Karras": "lms_karras",
    "dpmpp_2m_sde_karras": "dpmsolver++_sde_karras",
    "k_dpmpp_2m": "dpmsolver++",
    "euler_ancestral": "euler_a",
    "k_euler_a": "euler_a",
}


@pytest.mark.parametrize("name", NAMES)
def test_web_names_are_understood(name):
    assert canonical(name) == NAMES[name]
    assert make_scheduler(name, steps=3, prediction_type="epsilon").config == (
        make_scheduler(NAMES[name], steps=3, prediction_type="epsilon").config
    )


def test_titles_lead_back_to_their_samplers():
    for name, row in SAMPLERS.items():
        assert canonical(f"{row.title} {row.schedule}") == name.removeprefix("k_") == canonical(name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("DPM++ 2S a Karras", "the sampler 'DPM.. 2S a Karras' is not available: diffusers has no ancestral form"),
        ("DPM adaptive", "is not available: diffusers has no such sampler; use another sampler"),
        ("DPM++ 2M Beta", r"the schedule Beta of the sampler 'DPM.. 2M Beta' needs scipy; use the sampler dpmsolver\+\+,"),
        ("euler_align_your_steps", "the schedule Align Your Steps of .* is not in diffusers"),
        ("Euler a Karras", r"did you mean"),
        ("zzz", "known are ddim, ddpm, deis"),
    ],
)
def test_what_nothing_stands_for_is_refused_with_the_reason(name, sentence):
    with pytest.raises(UserError, match=f"^--sampler: .*{sentence}"):
        canonical(name, where="--sampler")


def test_a_scheduler_begins_anew_for_each_picture():
    """Those that remember earlier predictions too."""
    for name in PLAIN:
        first, second = (one_loop(make_scheduler(name, steps=4, prediction_type="epsilon")) for _ in range(2))
        assert torch.equal(first, second)


def test_more_steps_than_a_sampler_has_are_a_sentence():
    with pytest.raises(UserError, match="51 steps are more than the sampler LCM has; give 50 or fewer"):
        make_scheduler("LCM", steps=51, prediction_type="epsilon")


@pytest.mark.parametrize("name", PLAIN)
def test_a_part_of_the_steps_is_that_of_diffusers(name):
    from diffusers import StableDiffusionImg2ImgPipeline

    ours, theirs = (make_scheduler(name, steps=8, prediction_type="epsilon") for _ in range(2))
    for strength in (0.0, 0.05, 0.3, 0.75, 1.0):
        taken = denoising_timesteps(ours, strength, 8)
        expected, _ = StableDiffusionImg2ImgPipeline.get_timesteps(SimpleNamespace(scheduler=theirs), 8, strength, "cpu")
        assert torch.equal(taken, expected)
        assert getattr(ours, "begin_index", None) == getattr(theirs, "begin_index", None)
    assert torch.equal(taken, ours.timesteps)


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_picture_with_noise_on_it_is_found_again(name):
    """With the exact prediction for a picture that is 0.5 everywhere."""
    scheduler = make_scheduler(name, steps=10, prediction_type="epsilon")
    generator = torch.Generator().manual_seed(0)
    timesteps = denoising_timesteps(scheduler, 0.5, 10)
    content = torch.full((1, 4, 8, 8), 0.5)
    x = scheduler.add_noise(content, torch.randn(1, 4, 8, 8, generator=generator), timesteps[:1])
    noise = {"generator": [generator]} if takes_generator(scheduler) else {}
    for timestep in timesteps:
        abar = torch.as_tensor(scheduler.alphas_cumprod[int(timestep)])
        eps = (scheduler.scale_model_input(x, timestep) - abar.sqrt() * content) / (1 - abar).sqrt()
        x = scheduler.step(eps, timestep, x, **noise).prev_sample
    assert (x - content).abs().max() < 5 * SPREAD_OF_FIRST_TIMESTEP


def test_the_older_names_are_the_same_samplers():
    older = [name for name in SAMPLERS if name.startswith("k_")]
    assert older == ["k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"]
    assert all(SAMPLERS[name] is SAMPLERS[name.removeprefix("k_")] for name in older)


def test_the_coefficients_of_lms_are_its_integrals():
    """Against a fine midpoint rule over the Lagrange polynomials."""
    scheduler = make_scheduler("lms", steps=10, prediction_type="epsilon")
    sigmas = scheduler.sigmas.double()
    order, place = 4, 5
    scheduler.derivatives = [torch.zeros(1)] * order
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
