"""The demo model's denoiser and text encoder: trained together on encoded drawings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tools.demo.models import (
    BETA_END,
    BETA_START,
    MAX_TOKENS,
    NUM_TIMESTEPS,
    SCALING_FACTOR,
    build_text_encoder,
    build_unet,
)
from tools.demo.training import Meter, Run, step_generator

BATCH_SIZE = 32
DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0


@dataclass(frozen=True, kw_only=True)
class EncodedSet:
    """A training set: latents as the autoencoder's mean and spread, captions as token ids of the short vocabulary.

    A picture is drawn in proportion to its weight.
    """

    means: Tensor
    spreads: Tensor
    tokens: Tensor
    weights: Tensor
    empty: Tensor


class Denoiser(nn.Module):
    """Denoiser and text encoder as one module, so that they share optimizer, average and checkpoint."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.unet: UNet2DConditionModel = build_unet()
        self.text_encoder: CLIPTextModel = build_text_encoder(vocabulary)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The noise in `noisy`, (B, 4, 8, 8), at integer timesteps (B,), given token ids (B, 77)."""
        hidden = self.text_encoder(input_ids=tokens).last_hidden_state
        return self.unet(noisy, timesteps, encoder_hidden_states=hidden, return_dict=False)[0]


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids of captions, padded as Stable Diffusion 1 pads: (N, 77)."""
    padded = tokenizer(list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True)
    return torch.tensor(padded.input_ids, dtype=torch.int32)


def caption_weights(captions: Sequence[str]) -> Tensor:
    """Plain shapes on plain grounds three times as often as the rest: what everybody asks for first must sit."""
    return torch.tensor([1.0 if {"with", "and", "inside"} & set(caption.split()) else 3.0 for caption in captions])


def used_tokens(tokens: Tensor) -> Tensor:
    """The vocabulary's ids that occur, ascending: the place of an id in it is its number in the short vocabulary.

    Some 60 of 49,408 rows are trained; the others would only slow the optimizer down. The start and end tokens have the
    highest numbers in both vocabularies.
    """
    return tokens.unique()


def signal_shares() -> Tensor:
    """The cumulated product of 1 - beta for every timestep: (1000,)."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0).float()


def min_snr_weights(shares: Tensor) -> Tensor:
    """Loss weights for noise prediction, min(SNR, gamma) / SNR (Hang et al., arXiv:2303.09556)."""
    snr = shares / (1.0 - shares)
    return snr.clamp(max=MIN_SNR_GAMMA) / snr


def train_unet(
    data: EncodedSet, *, vocabulary: int, checkpoint: Path, minutes: float, seed: int, device: torch.device
) -> Denoiser:
    """Train for some minutes; returns the averaged weights.

    Processes that train together (torch.distributed) take their shares of every batch and average their gradients.
    """
    torch.manual_seed(seed)
    model = Denoiser(vocabulary).to(device)
    model.unet.to(memory_format=torch.channels_last)
    run = Run(model, checkpoint=checkpoint, minutes=minutes, peak_rate=1.5e-3, ema_decay=0.998)
    shares = signal_shares()
    weights = min_snr_weights(shares)
    meter = Meter(every=200)
    share_of_batch = slice(run.rank, None, run.world)
    for step in run.steps():
        generator = step_generator(seed, step)
        latents, tokens = draw_batch(data, generator)
        # One timestep from each of B equal slices: the loss of a batch varies less.
        slices = torch.arange(BATCH_SIZE) + torch.rand(BATCH_SIZE, generator=generator)
        timesteps = (slices * (len(shares) / BATCH_SIZE)).long()
        noise = torch.randn(latents.shape, generator=generator)
        latents, tokens, timesteps, noise = (part[share_of_batch] for part in (latents, tokens, timesteps, noise))
        share = shares[timesteps][:, None, None, None]
        noisy = share.sqrt() * latents + (1.0 - share).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = model(noisy.to(device), timesteps.to(device), tokens.to(device))
        errors = (output.float().cpu() - noise).square().mean(dim=(1, 2, 3))
        loss = (errors * weights[timesteps]).mean()
        run.update(loss)
        meter.add(run, loss=loss)
    run.load_average()
    return model


def draw_batch(data: EncodedSet, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scaled latents (B, 4, 8, 8) and token ids (B, 77), some of them those of the empty caption."""
    chosen = torch.multinomial(data.weights, BATCH_SIZE, replacement=True, generator=generator)
    own_noise = torch.randn(BATCH_SIZE, *data.means.shape[1:], generator=generator)
    latents = (data.means[chosen] + data.spreads[chosen] * own_noise) * SCALING_FACTOR
    dropped = torch.rand(BATCH_SIZE, generator=generator) < DROPOUT
    tokens = torch.where(dropped[:, None], data.empty, data.tokens[chosen])
    return latents, tokens
