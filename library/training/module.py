"""The one trainable module: the adapter network, and everything frozen that turns a batch into a loss.

Only the network is registered, so what accelerate prepares, synchronises and counts is the adapter and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.dataset.batches import Batch
from library.diffusion.losses import LossOptions, sample_losses, target_of
from library.diffusion.noise import NoiseOptions, noise_of, posterior_sample
from library.diffusion.schedule import NoiseSchedule
from library.families.family import ModelFamily, PredictionType
from library.training.conditions import ConditionsOf


@dataclass(frozen=True, kw_only=True)
class FrozenParts:
    """The base model as the loss needs it; none of it is trained. Adapters may sit in what gives the conditions."""

    family: ModelFamily
    denoiser: nn.Module
    conditions_of: ConditionsOf
    schedule: NoiseSchedule
    prediction_type: PredictionType
    dtype: torch.dtype


class TrainableModule(nn.Module):
    """From a batch to its loss, with gradients in the network only.

    Args:
        network: the adapter network, attached to the frozen parts.
    """

    def __init__(
        self,
        network: nn.Module,
        parts: FrozenParts,
        *,
        noise: NoiseOptions,
        loss: LossOptions,
    ) -> None:
        super().__init__()
        self.network = network
        self._parts = (parts,)  # a tuple, so that torch does not register what is frozen
        self._noise, self._loss = noise, loss

    @property
    def parts(self) -> FrozenParts:
        return self._parts[0]

    def forward(self, batch: Batch, latent_mean: Tensor, latent_std: Tensor, divisor: float) -> Tensor:
        """The batch's share of the loss of its optimizer step.

        Args:
            batch: on the device.
            latent_mean, latent_std: (B, C, h, w) fp32, the VAE's posterior in the VAE's units.
            divisor: samples of the whole optimizer step over the number of processes, whose gradients are averaged.

        Returns:
            () fp32.
        """
        parts, draws = self.parts, batch.draws
        latents = posterior_sample(latent_mean, latent_std, draws, parts.family.latent_scale)
        target_noise, input_noise = noise_of(draws, latents, self._noise)
        noisy = parts.schedule.add_noise(latents, input_noise, draws.timestep)
        told = parts.conditions_of(batch.captions).to(dtype=parts.dtype).denoiser_arguments(batch.sizes)
        prediction = parts.denoiser(noisy.to(parts.dtype), draws.timestep, return_dict=False, **told)[0]
        target = target_of(parts.prediction_type, parts.schedule, latents, target_noise, draws.timestep)
        losses = sample_losses(
            self._loss,
            parts.schedule,
            prediction,
            target,
            draws.timestep,
            batch.masks,
            prediction_type=parts.prediction_type,
        )
        return (losses * batch.loss_weights).sum() / divisor
