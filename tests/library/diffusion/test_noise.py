"""Draws are pure, independent of each other and of the batch; the noise made of them has the documented size."""

import math

import pytest
import torch

from library.diffusion.noise import NoiseOptions, SampleDraws, draw_sample, noise_of, posterior_sample, stack_draws
from library.errors import UserError

SHAPE = (4, 8, 8)
EVERYTHING = NoiseOptions(
    noise_offset=0.1,
    noise_offset_random_strength=True,
    multires_noise_iterations=6,
    ip_noise_gamma=0.1,
    ip_noise_gamma_random_strength=True,
)


def draws_of(options: NoiseOptions, count: int, shape=SHAPE) -> SampleDraws:
    return stack_draws([draw_sample(options, seed=1, epoch=0, sample=i, latent_shape=shape) for i in range(count)])


def equal(one: SampleDraws, other: SampleDraws) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def test_the_same_place_gives_the_same_draws_and_global_state_plays_no_part():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw_sample(EVERYTHING, seed=7, epoch=2, sample=3, latent_shape=SHAPE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(first, draw_sample(EVERYTHING, seed=7, epoch=2, sample=3, latent_shape=SHAPE))


@pytest.mark.parametrize("change", [{"seed": 8}, {"epoch": 3}, {"sample": 4}])
def test_another_seed_epoch_or_sample_gives_other_draws(change):
    place = {"seed": 7, "epoch": 2, "sample": 3}
    one = draw_sample(EVERYTHING, **place, latent_shape=SHAPE)
    other = draw_sample(EVERYTHING, **place | change, latent_shape=SHAPE)
    for name, part in vars(one).items():
        if name != "timestep":  # one of a thousand: may be the same
            assert not torch.equal(part, getattr(other, name)), name


def test_no_two_draws_of_a_sample_are_the_same_numbers():
    draws = draw_sample(EVERYTHING, seed=1, epoch=0, sample=0, latent_shape=SHAPE)
    assert not torch.equal(draws.noise, draws.posterior_noise)
    assert not torch.equal(draws.noise, draws.ip_noise)
    assert draws.ip_strength != draws.offset_strength


@pytest.mark.parametrize(
    "options",
    [
        NoiseOptions(),
        NoiseOptions(noise_offset=0.1),
        NoiseOptions(multires_noise_iterations=6),
        NoiseOptions(ip_noise_gamma=0.1),
        NoiseOptions(noise_offset=0.1, ip_noise_gamma=0.1),
    ],
)
def test_switching_an_option_changes_no_other_draw(options):
    draws = draw_sample(options, seed=1, epoch=0, sample=0, latent_shape=SHAPE)
    everything = draw_sample(EVERYTHING, seed=1, epoch=0, sample=0, latent_shape=SHAPE)
    for name, part in vars(draws).items():
        if part is not None:
            assert torch.equal(part, getattr(everything, name)), name


def test_timesteps_fill_their_range_evenly_and_keep_out_of_the_upper_bound():
    options = NoiseOptions(min_timestep=10, max_timestep=20)
    drawn = torch.stack(
        [draw_sample(options, seed=1, epoch=0, sample=i, latent_shape=(1, 1, 1)).timestep for i in range(2000)]
    )
    counts = torch.bincount(drawn, minlength=20)
    assert counts[:10].sum() == 0
    assert len(counts) == 20
    assert (counts[10:] - 200).abs().max() < 5 * math.sqrt(200)


def test_equal_bounds_are_one_timestep():
    options = NoiseOptions(min_timestep=500, max_timestep=500)
    assert {int(draw_sample(options, seed=1, epoch=e, sample=0, latent_shape=(1, 1, 1)).timestep) for e in range(20)} == {
        500
    }


def test_plain_noise_is_the_draw_itself_for_target_and_input():
    draws = draws_of(NoiseOptions(), 2)
    target, model_input = noise_of(draws, torch.zeros(2, *SHAPE), NoiseOptions())
    assert target is model_input
    assert torch.equal(target, draws.noise)


def test_offset_moves_whole_channels_by_its_strength():
    options = NoiseOptions(noise_offset=0.5)
    draws = draws_of(options, 300)
    moved = noise_of(draws, torch.zeros(300, *SHAPE), options)[0] - draws.noise
    torch.testing.assert_close(moved, 0.5 * draws.offset.expand_as(moved), rtol=1e-4, atol=1e-5)
    assert moved.std() == pytest.approx(0.5, rel=0.1)


def test_a_random_offset_strength_is_drawn_for_every_sample():
    options = NoiseOptions(noise_offset=0.5, noise_offset_random_strength=True)
    draws = draws_of(options, 300)
    moved = noise_of(draws, torch.zeros(300, *SHAPE), options)[0] - draws.noise
    strengths = (moved / draws.offset).mean(dim=(1, 2, 3))
    assert 0 <= strengths.min() < 0.05
    assert 0.45 < strengths.max() < 0.5
    assert strengths.mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("scale", "expected"), [(0.1, 0.25), (-0.1, 0.15), (-1.0, 0.0)])
def test_the_adaptive_part_follows_the_mean_of_the_latent_and_ends_at_zero(scale, expected):
    options = NoiseOptions(noise_offset=0.2, adaptive_noise_scale=scale)
    draws = draws_of(options, 2)
    moved = noise_of(draws, torch.full((2, *SHAPE), -0.5), options)[0] - draws.noise
    torch.testing.assert_close(moved, (expected * draws.offset).expand_as(moved), rtol=1e-4, atol=1e-5)


def test_multires_noise_has_unit_spread_in_every_sample_and_is_smoother_than_plain_noise():
    options = NoiseOptions(multires_noise_iterations=6, multires_noise_discount=0.8)
    draws = draws_of(options, 50, (4, 32, 32))
    noise = noise_of(draws, torch.zeros(50, 4, 32, 32), options)[0]
    torch.testing.assert_close(noise.std(dim=(1, 2, 3)), torch.ones(50))
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean()
    assert neighbours > 0.2
    assert abs((draws.noise[..., 1:] * draws.noise[..., :-1]).mean()) < 0.02


def test_a_samples_noise_does_not_depend_on_its_neighbours():
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    draws = draws_of(EVERYTHING, 3)
    together = noise_of(draws, latents, EVERYTHING)
    alone = noise_of(draws.map(lambda part: part[1:2]), latents[1:2], EVERYTHING)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[1:2], other)


def test_input_noise_reaches_the_input_alone():
    options = NoiseOptions(ip_noise_gamma=0.1)
    draws = draws_of(options, 300)
    target, model_input = noise_of(draws, torch.zeros(300, *SHAPE), options)
    assert torch.equal(target, draws.noise)
    assert (model_input - target).std() == pytest.approx(0.1, rel=0.05)
    assert model_input.std() == pytest.approx(math.sqrt(1.01), rel=0.02)


def test_the_posterior_sample_has_its_mean_and_spread():
    draws = draws_of(NoiseOptions(), 500)
    sample = posterior_sample(torch.full((500, *SHAPE), 2.0), torch.full((500, *SHAPE), 0.5), draws, 0.18215)
    assert sample.mean() == pytest.approx(2 * 0.18215, rel=0.01)
    assert sample.std() == pytest.approx(0.5 * 0.18215, rel=0.01)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as error:
        NoiseOptions(noise_offset=-1, multires_noise_discount=0, min_timestep=600, max_timestep=500)
    sentences = str(error.value).splitlines()
    assert len(sentences) == 3
    assert sentences[2].startswith("--max_timestep 500: below --min_timestep 600")


@pytest.mark.parametrize(
    "wrong",
    [
        {"adaptive_noise_scale": 0.1},
        {"noise_offset_random_strength": True},
        {"ip_noise_gamma_random_strength": True},
        {"multires_noise_iterations": -1},
        {"ip_noise_gamma": -0.1},
        {"min_timestep": 1000},
        {"max_timestep": 1001},
        {"max_timestep": -1},
    ],
)
def test_a_value_that_is_wrong_or_does_nothing_is_refused_by_name(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        NoiseOptions(**wrong)
