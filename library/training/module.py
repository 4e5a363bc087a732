"""The one trainable module: the adapter network, and everything frozen that turns a batch into a loss.

Only the network is registered, so what accelerate prepares, synchronises and counts is the adapter and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.conditioning.condition import Condition, joined
from library.conditioning.text_encoders import TextEncoders
from library.dataset.batches import Batch
from library.diffusion.losses import LossOptions, sample_losses, target_of
from library.diffusion.noise import NoiseOptions, noise_of, posterior_sample
from library.diffusion.schedule import NoiseSchedule
from library.families.family import ModelFamily, PredictionType
from library.training.options import CaptionEncodingOptions

REMEMBERED_CONDITIONS = 2048  # captions; 77 x 768 in fp32 is 0.23 MiB each


@dataclass(frozen=True, kw_only=True)
class FrozenParts:
    """The base model as the loss needs it; none of it is trained."""

    family: ModelFamily
    denoiser: nn.Module
    text_encoders: Sequence[nn.Module]
    tokenizers: Sequence[Any]
    schedule: NoiseSchedule
    prediction_type: PredictionType
    dtype: torch.dtype

    @property
    def texts(self) -> TextEncoders:
        """The text encoders as one."""
        return TextEncoders(specs=self.family.text_encoders, tokenizers=self.tokenizers, modules=self.text_encoders)


class TrainableModule(nn.Module):
    """From a batch to its loss, with gradients in the network only.

    Args:
        network: the adapter network, attached to the frozen parts.
        text_encoders_train: whether any adapter sits in them; else what they give is remembered per caption.
    """

    def __init__(
        self,
        network: nn.Module,
        parts: FrozenParts,
        *,
        captions: CaptionEncodingOptions,
        noise: NoiseOptions,
        loss: LossOptions,
        text_encoders_train: bool,
    ) -> None:
        super().__init__()
        self.network = network
        self._parts = (parts,)  # a tuple, so that torch does not register what is frozen
        self._captions, self._noise, self._loss = captions, noise, loss
        self._text_encoders_train = text_encoders_train
        self._conditions: OrderedDict[str, Condition] = OrderedDict()

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
        told = self.encode(batch.captions).to(parts.dtype).denoiser_arguments(batch.sizes)
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

    def encode(self, captions: Sequence[str]) -> Condition:
        """Conditions of captions; contexts (B, n * 75 + 2, D)."""
        if self._text_encoders_train:
            return self._encode(captions)
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._conditions]
        if missing:
            with torch.no_grad():
                self._conditions.update(zip(missing, self._encode(missing).split(), strict=True))
        conditions = joined([self._conditions[caption] for caption in captions])
        while len(self._conditions) > REMEMBERED_CONDITIONS:
            self._conditions.popitem(last=False)
        return conditions

    def _encode(self, captions: Sequence[str]) -> Condition:
        options, texts = self._captions, self.parts.texts
        tokens = texts.tokenize(captions, max_length=options.max_token_length, weighted=options.weighted_captions)
        return texts.encode(tokens, clip_skip=options.clip_skip)
