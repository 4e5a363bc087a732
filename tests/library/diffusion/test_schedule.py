"""The schedule is Stable Diffusion's: diffusers' DDPM scheduler is the independent reference."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from library.diffusion.schedule import NoiseSchedule


def reference(zero_terminal_snr: bool) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_terminal_snr
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 8, 4, 4, 4, generator=generator)
    return latents, noise, torch.tensor([0, 1, 17, 250, 500, 750, 998, 999])


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noising_and_velocity_are_those_of_ddpm(batch, zero_terminal_snr):
    schedule, ddpm = NoiseSchedule.scaled_linear(zero_terminal_snr=zero_terminal_snr), reference(zero_terminal_snr)
    torch.testing.assert_close(schedule.add_noise(*batch), ddpm.add_noise(*batch), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(schedule.velocity(*batch), ddpm.get_velocity(*batch), rtol=1e-4, atol=1e-5)


def test_the_snr_is_that_of_diffusers():
    timesteps = torch.arange(1000)
    torch.testing.assert_close(
        NoiseSchedule.scaled_linear().snr, compute_snr(reference(False), timesteps), rtol=2e-4, atol=1e-6
    )


def test_zero_terminal_snr_ends_without_signal_and_starts_as_before():
    plain, rescaled = NoiseSchedule.scaled_linear(), NoiseSchedule.scaled_linear(zero_terminal_snr=True)
    assert rescaled.signal[-1] == 0
    assert rescaled.snr[-1] == 0
    assert rescaled.spread[-1] == 1
    torch.testing.assert_close(rescaled.signal[0], plain.signal[0])
    assert torch.isfinite(rescaled.snr).all()


def test_loss_weights_keep_the_snr_of_the_schedule_before_rescaling():
    plain, rescaled = NoiseSchedule.scaled_linear(), NoiseSchedule.scaled_linear(zero_terminal_snr=True)
    assert torch.equal(rescaled.weight_snr, plain.snr)
    assert not torch.equal(rescaled.snr, plain.snr)


def test_noise_and_picture_can_be_told_apart_again(batch):
    latents, noise, timesteps = batch
    schedule = NoiseSchedule.scaled_linear()
    noisy, velocity = schedule.add_noise(*batch), schedule.velocity(*batch)
    signal, spread = (table[timesteps].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.spread))
    torch.testing.assert_close(signal * noisy - spread * velocity, latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(spread * noisy + signal * velocity, noise, rtol=1e-4, atol=1e-5)


def test_moving_a_schedule_moves_every_table():
    assert {table.device.type for table in vars(NoiseSchedule.scaled_linear().to("meta")).values()} == {"meta"}
