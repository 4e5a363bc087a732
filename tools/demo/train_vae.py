"""The demo model's autoencoder: training, and scaling of its latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tools.demo.models import SCALING_FACTOR, build_vae
from tools.demo.training import Meter, Run, step_generator

BATCH_SIZE = 16
EDGE_WEIGHT = 0.5
KL_WEIGHT = 1e-4


def to_batch(pictures: np.ndarray) -> Tensor:
    """uint8 pictures (B, H, W, 3) as floats (B, 3, H, W) in -1 .. 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def edge_error(output: Tensor, target: Tensor) -> Tensor:
    """How far neighbouring pixels' differences are off: sharp edges cost what soft ones would save."""
    error = output - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def train_vae(pictures: np.ndarray, *, checkpoint: Path, minutes: float, seed: int, device: torch.device) -> AutoencoderKL:
    """Train on pictures, uint8 (N, 64, 64, 3), for some minutes; returns the averaged weights."""
    torch.manual_seed(seed)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    run = Run(vae, checkpoint=checkpoint, minutes=minutes, peak_rate=1.5e-3, ema_decay=0.995)
    # Squares find rough colours and places fast; only then can absolute errors make edges sharp.
    _train(vae, run, pictures, seed=seed, sharpness=lambda: min(1.0, 2.0 * run.progress))
    return vae


def sharpen_decoder(
    vae: AutoencoderKL, pictures: np.ndarray, *, checkpoint: Path, minutes: float, seed: int, device: torch.device
) -> None:
    """Train the decoder further, in place; latents stay what they are, so a denoiser trained on them stays valid."""
    vae.to(device, memory_format=torch.channels_last)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    run = Run(vae, checkpoint=checkpoint, minutes=minutes, peak_rate=7e-4, ema_decay=0.99)
    _train(vae, run, pictures, seed=seed + 1, sharpness=lambda: 1.0)
    vae.requires_grad_(True)


def _train(vae: AutoencoderKL, run: Run, pictures: np.ndarray, *, seed: int, sharpness: Callable[[], float]) -> None:
    """Reconstruct random pictures until the run's time is spent; `sharpness` weighs absolute errors and edges."""
    device = next(vae.parameters()).device
    meter = Meter(every=50)
    for step in run.steps():
        generator = step_generator(seed, step)
        chosen = torch.randint(len(pictures), (BATCH_SIZE,), generator=generator)
        target = to_batch(pictures[chosen.numpy()]).to(device, memory_format=torch.channels_last)
        noise = torch.randn(BATCH_SIZE, 4, 8, 8, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        squares, pixels = (output - target).square().mean(), (output - target).abs().mean()
        edges = edge_error(output, target)
        divergence = posterior.kl().mean() / noise[0].numel()
        run.update(squares + sharpness() * (pixels + EDGE_WEIGHT * edges) + KL_WEIGHT * divergence)
        meter.add(run, squares=squares, pixels=pixels, edges=edges, divergence=divergence)
    run.load_average()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and spread of the latents of many pictures: two of (N, 4, 8, 8), unscaled."""
    device = next(vae.parameters()).device
    means, spreads = [], []
    for start in range(0, len(pictures), batch_size):
        batch = to_batch(pictures[start : start + batch_size]).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
        means.append(posterior.mean.float().cpu())
        spreads.append(posterior.std.float().cpu())
    return torch.cat(means), torch.cat(spreads)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, means: Tensor, spreads: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a scale into the weights so that `SCALING_FACTOR` times the latents has mean 0 and spread 1 per channel.

    Args:
        means, spreads: latents of a large set of pictures as the autoencoder encodes them before the change.

    Returns:
        The same pictures' means and spreads after the change.
    """
    centre = means.mean(dim=(0, 2, 3))
    scale = means.std(dim=(0, 2, 3)) * SCALING_FACTOR
    fold_scale(vae, centre.to(vae.quant_conv.bias), scale.to(vae.quant_conv.bias))
    centre, scale = centre[:, None, None], scale[:, None, None]
    return (means - centre) / scale, spreads / scale


@torch.no_grad()
def fold_scale(vae: AutoencoderKL, centre: Tensor, scale: Tensor) -> None:
    """Change latents z to (z - centre) / scale, both (4,), without changing what an encoded picture decodes to."""
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:4] /= scale[:, None, None, None]
    bias[:4] = (bias[:4] - centre) / scale
    bias[4:] -= 2.0 * scale.log()  # the second half is the logarithm of the variance
    weight, bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
    bias += (weight[:, :, 0, 0] * centre).sum(dim=1)
    weight *= scale[None, :, None, None]
