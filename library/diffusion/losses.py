"""From a prediction to one loss per sample: element loss, mask, mean, weight.

Computed in fp32, whatever the model computes in; no step waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from library.diffusion import weighting
from library.diffusion.schedule import NoiseSchedule
from library.errors import UserError, near_names, raise_all
from library.families.family import EPSILON, PREDICTION_TYPES, V_PREDICTION, PredictionType

LossType = Literal["l2", "l1", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How a sample's error becomes its loss.

    Attributes:
        loss_type: l2 squared error; l1 absolute error; huber and smooth_l1 the pseudo-Huber loss, like l2 for errors small
            against c and like l1 for large ones, scaled so that its beginning is that of l2 (huber: 2c(sqrt(d^2 + c^2) - c))
            or its end that of 2 l1 (smooth_l1: 2(sqrt(d^2 + c^2) - c)).
        huber_schedule: how c goes from 1 at the first timestep to huber_c at the last (snr, exponential), or stays huber_c
            (constant).
        huber_c: see there; above 0.
        huber_scale: factor of c; the snr schedule has none.
        min_snr_gamma: weight min(SNR, gamma) / SNR; usual 5; None and 0 are off.
        scale_v_pred_loss_like_noise_pred: weigh velocity as noise prediction does, SNR / (SNR + 1).
        v_pred_like_loss: add the loss as velocity prediction would weigh it, this many times; None and 0 are off.
        debiased_estimation_loss: weight 1 / sqrt(SNR), for velocity 1 / (SNR + 1).

    Raises:
        UserError: an unknown name or a value out of range; all of them at once.
    """

    loss_type: LossType = "l2"
    huber_schedule: HuberSchedule = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_snr_gamma: float | None = None
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None
    debiased_estimation_loss: bool = False

    def __post_init__(self) -> None:
        problems = []
        for name, known in (("loss_type", get_args(LossType)), ("huber_schedule", get_args(HuberSchedule))):
            if getattr(self, name) not in known:
                problems.append(
                    UserError(
                        "no such name",
                        where=f"--{name} {getattr(self, name)}",
                        remedy=near_names(getattr(self, name), known),
                    )
                )
        for name in ("huber_c", "huber_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                problems.append(UserError("out of range", where=f"--{name} {value}", remedy="give a number above 0"))
        for name in ("min_snr_gamma", "v_pred_like_loss"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                problems.append(
                    UserError("out of range", where=f"--{name} {value}", remedy="give a number above 0, or 0 for off")
                )
        raise_all(problems)

    def check_prediction_type(self, prediction_type: PredictionType) -> None:
        """Refuse what has no meaning for what the base model predicts; known only once the base model is."""
        problems = []
        if self.scale_v_pred_loss_like_noise_pred and prediction_type != V_PREDICTION:
            problems.append(
                UserError(
                    "the base model predicts noise, not velocity",
                    where="--scale_v_pred_loss_like_noise_pred",
                    remedy="leave it out, or give --v_parameterization if the model was trained so",
                )
            )
        if self.v_pred_like_loss and prediction_type == V_PREDICTION:
            problems.append(
                UserError(
                    "the base model predicts velocity already",
                    where=f"--v_pred_like_loss {self.v_pred_like_loss}",
                    remedy="leave it out",
                )
            )
        raise_all(problems)


def target_of(
    prediction_type: PredictionType, schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """What the model is to predict: the noise, or v; shapes as in `NoiseSchedule.add_noise`."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction type {prediction_type!r}; known are {PREDICTION_TYPES}")
    return noise if prediction_type == EPSILON else schedule.velocity(latents, noise, timesteps)


def sample_losses(
    options: LossOptions,
    schedule: NoiseSchedule,
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    mask: Tensor | None = None,
    *,
    prediction_type: PredictionType,
) -> Tensor:
    """One loss per sample, weighted by its timestep.

    Args:
        prediction, target: (B, C, h, w).
        timesteps: (B,) int64, on the schedule's device.
        mask: (B, 1, h', w') in [0, 1], resized by area where its size is another; None counts everything.

    Returns:
        (B,) fp32. A sample whose mask is 0 everywhere has loss 0.
    """
    errors = element_losses(options, schedule, prediction.float(), target.float(), timesteps)
    weights = sample_weights(options, schedule, timesteps, prediction_type=prediction_type)
    return masked_mean(errors, mask) * weights


def element_losses(
    options: LossOptions, schedule: NoiseSchedule, prediction: Tensor, target: Tensor, timesteps: Tensor
) -> Tensor:
    """The loss of every element, (B, C, h, w)."""
    if options.loss_type == "l2":
        return F.mse_loss(prediction, target, reduction="none")
    if options.loss_type == "l1":
        return F.l1_loss(prediction, target, reduction="none")
    threshold = huber_threshold(options, schedule, timesteps).view(-1, 1, 1, 1)
    # sqrt(d^2 + c^2) - c in a form that keeps its digits for errors far below c.
    squared = (prediction - target) ** 2
    beyond = squared / ((squared + threshold**2).sqrt() + threshold)
    return 2 * beyond * (threshold if options.loss_type == "huber" else 1)


def huber_threshold(options: LossOptions, schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """c of every sample, (B,): constant, huber_c ** (t / T), or (1 - huber_c) / (1 + sigma)^2 + huber_c.

    sigma = sqrt((1 - abar) / abar) may be infinite (zero terminal SNR), which gives huber_c.
    Khrapov et al., "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss",
    arXiv:2403.16728, sec. 4.
    """
    if options.huber_schedule == "constant":
        return torch.full_like(timesteps, options.huber_c * options.huber_scale, dtype=torch.float32)
    if options.huber_schedule == "exponential":
        return options.huber_scale * options.huber_c ** (timesteps.float() / schedule.steps)
    sigma = schedule.spread[timesteps] / schedule.signal[timesteps]
    return (1 - options.huber_c) / (1 + sigma) ** 2 + options.huber_c


def masked_mean(errors: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the elements of each sample, weighed by the mask and divided by its area.

    sd-scripts multiplies by the mask and divides by the whole area, so that a small subject trains at a small rate; here the
    loss does not depend on how much is masked.

    Args:
        errors: (B, C, h, w).
        mask: (B, 1, h', w') or None.

    Returns:
        (B,).
    """
    if mask is None:
        return errors.mean(dim=(1, 2, 3))
    mask = mask.to(errors.dtype)
    if mask.shape[-2:] != errors.shape[-2:]:
        mask = F.interpolate(mask, size=errors.shape[-2:], mode="area")
    area = mask.sum(dim=(1, 2, 3)) * errors.shape[1]
    total = (errors * mask).sum(dim=(1, 2, 3))
    return total / area.clamp(min=torch.finfo(area.dtype).eps)


def sample_weights(
    options: LossOptions, schedule: NoiseSchedule, timesteps: Tensor, *, prediction_type: PredictionType
) -> Tensor:
    """The product of all weights that the options ask for, (B,)."""
    snr = schedule.weight_snr[timesteps]
    weights = torch.ones_like(snr)
    if options.min_snr_gamma:
        weights = weights * weighting.min_snr(snr, options.min_snr_gamma, prediction_type)
    if options.scale_v_pred_loss_like_noise_pred:
        weights = weights * weighting.velocity_to_noise(snr)
    if options.v_pred_like_loss:
        weights = weights * weighting.velocity_like(snr, options.v_pred_like_loss)
    if options.debiased_estimation_loss:
        weights = weights * weighting.debiased(snr, prediction_type)
    return weights
