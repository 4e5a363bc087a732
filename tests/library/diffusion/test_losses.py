"""Losses against their closed forms, weights against diffusers' SNR, masks against their meaning."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from library.diffusion import weighting
from library.diffusion.losses import LossOptions, huber_threshold, sample_losses, sample_weights, target_of
from library.diffusion.schedule import NoiseSchedule
from library.errors import UserError

SCHEDULE = NoiseSchedule.scaled_linear()
TIMESTEPS = torch.tensor([5, 100, 400, 800, 990])


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 4, 6, 6, generator=generator)


def losses(options, prediction, target, mask=None, schedule=SCHEDULE, prediction_type="epsilon"):
    return sample_losses(options, schedule, prediction, target, TIMESTEPS, mask, prediction_type=prediction_type)


@pytest.mark.parametrize(("loss_type", "of_one"), [("l2", 4.0), ("l1", 2.0)])
def test_plain_losses_of_a_constant_error(loss_type, of_one):
    zeros = torch.zeros(5, 4, 6, 6)
    torch.testing.assert_close(losses(LossOptions(loss_type=loss_type), zeros + 2, zeros), torch.full((5,), of_one))


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize(("loss_type", "factor"), [("huber", lambda c: 2 * c), ("smooth_l1", lambda c: 2.0)])
def test_pseudo_huber_is_its_closed_form(pair, schedule, loss_type, factor):
    options = LossOptions(loss_type=loss_type, huber_schedule=schedule, huber_c=0.3, huber_scale=0.7)
    prediction, target = pair
    for row, timestep in enumerate(TIMESTEPS.tolist()):
        abar = float(SCHEDULE.alphas_cumprod[timestep])
        c = {
            "constant": 0.3 * 0.7,
            "exponential": math.exp(timestep * math.log(0.3) / 1000) * 0.7,
            "snr": 0.7 / (1 + math.sqrt((1 - abar) / abar)) ** 2 + 0.3,
        }[schedule]
        difference = (prediction[row] - target[row]).double()
        expected = (factor(c) * ((difference**2 + c**2).sqrt() - c)).mean()
        assert float(losses(options, prediction, target)[row]) == pytest.approx(float(expected), rel=1e-4)


def test_huber_begins_as_l2_and_smooth_l1_ends_as_twice_l1():
    zeros = torch.zeros(5, 4, 6, 6)
    small = losses(LossOptions(loss_type="huber", huber_schedule="constant"), zeros + 1e-4, zeros)
    torch.testing.assert_close(small, torch.full((5,), 1e-8), rtol=1e-4, atol=0)
    large = losses(LossOptions(loss_type="smooth_l1", huber_schedule="constant"), zeros + 1e4, zeros)
    torch.testing.assert_close(large, torch.full((5,), 2e4), rtol=1e-4, atol=0)


def test_the_snr_schedule_of_huber_ends_at_huber_c_without_signal():
    schedule = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
    threshold = huber_threshold(LossOptions(loss_type="huber", huber_c=0.2), schedule, torch.tensor([999]))
    assert float(threshold) == pytest.approx(0.2)


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_nothing_flows_back_from_under_the_mask(pair, loss_type):
    prediction, target = pair
    prediction = prediction.clone().requires_grad_()
    mask = torch.zeros(5, 1, 6, 6)
    mask[..., :3] = 1
    losses(LossOptions(loss_type=loss_type), prediction, target, mask).sum().backward()
    assert prediction.grad[..., 3:].abs().max() == 0
    assert prediction.grad[..., :3].abs().max() > 0


def test_the_loss_does_not_depend_on_how_much_is_masked():
    zeros = torch.zeros(5, 4, 6, 6)
    mask = (torch.arange(36).view(1, 1, 6, 6) < torch.tensor([1, 7, 18, 30, 36]).view(5, 1, 1, 1)).float()
    torch.testing.assert_close(losses(LossOptions(), zeros + 2, zeros, mask), torch.full((5,), 4.0))


def test_a_mask_of_another_size_is_reduced_by_area(pair):
    mask = torch.zeros(5, 1, 48, 48)
    mask[..., :24] = 1
    small = torch.zeros(5, 1, 6, 6)
    small[..., :3] = 1
    torch.testing.assert_close(losses(LossOptions(), *pair, mask), losses(LossOptions(), *pair, small))


def test_a_fully_masked_sample_has_no_loss_and_no_nan(pair):
    assert torch.equal(losses(LossOptions(), *pair, torch.zeros(5, 1, 6, 6)), torch.zeros(5))


def snr_of_diffusers():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return compute_snr(scheduler, TIMESTEPS)


@pytest.mark.parametrize(
    ("options", "prediction_type", "formula"),
    [
        ({"min_snr_gamma": 5.0}, "epsilon", lambda snr: snr.clamp(max=5) / snr),
        ({"min_snr_gamma": 5.0}, "v_prediction", lambda snr: snr.clamp(max=5) / (snr + 1)),
        ({"scale_v_pred_loss_like_noise_pred": True}, "v_prediction", lambda snr: snr / (snr + 1)),
        ({"v_pred_like_loss": 0.5}, "epsilon", lambda snr: 1 + 0.5 * (snr + 1) / snr),
        ({"debiased_estimation_loss": True}, "epsilon", lambda snr: snr**-0.5),
        ({"debiased_estimation_loss": True}, "v_prediction", lambda snr: 1 / (snr + 1)),
        (
            {"min_snr_gamma": 5.0, "scale_v_pred_loss_like_noise_pred": True, "debiased_estimation_loss": True},
            "v_prediction",
            lambda snr: snr.clamp(max=5) / (snr + 1) * snr / (snr + 1) / (snr + 1),
        ),
        ({"min_snr_gamma": 0.0, "v_pred_like_loss": 0.0}, "epsilon", torch.ones_like),
    ],
)
def test_weights_are_their_formulas_of_the_snr(options, prediction_type, formula):
    weights = sample_weights(LossOptions(**options), SCHEDULE, TIMESTEPS, prediction_type=prediction_type)
    torch.testing.assert_close(weights, formula(snr_of_diffusers()), rtol=1e-3, atol=0)


def test_weights_of_sd_scripts_stand_still_above_snr_1000():
    snr = torch.tensor([1000.0, 5000.0])
    for weights in (weighting.debiased(snr, "epsilon"), weighting.velocity_to_noise(snr), weighting.velocity_like(snr, 1.0)):
        assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "weights",
    [
        lambda snr: weighting.min_snr(snr, 5.0, "epsilon"),
        lambda snr: weighting.min_snr(snr, 5.0, "v_prediction"),
        weighting.velocity_to_noise,
        lambda snr: weighting.velocity_like(snr, 1.0),
        lambda snr: weighting.debiased(snr, "epsilon"),
        lambda snr: weighting.debiased(snr, "v_prediction"),
    ],
)
def test_every_weight_is_finite_without_signal(weights):
    assert torch.isfinite(weights(torch.zeros(1))).all()


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_a_terminal_step_without_signal_trains_without_nan(pair, loss_type):
    prediction, target = pair
    prediction = prediction.clone().requires_grad_()
    options = LossOptions(
        loss_type=loss_type, min_snr_gamma=5.0, scale_v_pred_loss_like_noise_pred=True, debiased_estimation_loss=True
    )
    schedule = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
    timesteps = torch.full((5,), 999)
    values = sample_losses(options, schedule, prediction, target, timesteps, prediction_type="v_prediction")
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(prediction.grad).all()


def test_the_velocity_weight_turns_its_error_into_that_of_the_noise(pair):
    """scale_v_pred_loss_like_noise_pred is exact: an error dv of v at x_t is an error signal * dv of the noise."""
    velocity_error, _ = pair
    signal = SCHEDULE.signal[TIMESTEPS].view(-1, 1, 1, 1)
    zeros = torch.zeros_like(velocity_error)
    scaled = LossOptions(scale_v_pred_loss_like_noise_pred=True)
    torch.testing.assert_close(
        losses(scaled, velocity_error, zeros, prediction_type="v_prediction"),
        losses(LossOptions(), signal * velocity_error, zeros),
        rtol=1e-3,
        atol=0,
    )


def test_half_precision_predictions_are_measured_in_fp32(pair):
    prediction, target = (part.bfloat16() for part in pair)
    value = losses(LossOptions(), prediction, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ((prediction.float() - target.float()) ** 2).mean(dim=(1, 2, 3)))


def test_the_target_is_noise_or_velocity(pair):
    latents, noise = pair
    assert target_of("epsilon", SCHEDULE, latents, noise, TIMESTEPS) is noise
    torch.testing.assert_close(
        target_of("v_prediction", SCHEDULE, latents, noise, TIMESTEPS), SCHEDULE.velocity(latents, noise, TIMESTEPS)
    )
    with pytest.raises(ValueError, match="sample"):
        target_of("sample", SCHEDULE, latents, noise, TIMESTEPS)


def test_unknown_names_are_answered_with_the_known_ones_and_all_at_once():
    with pytest.raises(UserError) as error:
        LossOptions(loss_type="hubber", huber_schedule="snrr", huber_c=0, min_snr_gamma=-1)
    sentences = str(error.value).splitlines()
    assert len(sentences) == 4
    assert sentences[0] == "--loss_type hubber: no such name; did you mean huber?"


@pytest.mark.parametrize(
    ("options", "prediction_type"),
    [({"scale_v_pred_loss_like_noise_pred": True}, "epsilon"), ({"v_pred_like_loss": 1.0}, "v_prediction")],
)
def test_weights_without_meaning_for_the_prediction_are_refused(options, prediction_type):
    with pytest.raises(UserError, match=next(iter(options))):
        LossOptions(**options).check_prediction_type(prediction_type)
    other = "epsilon" if prediction_type == "v_prediction" else "v_prediction"
    LossOptions(**options).check_prediction_type(other)
