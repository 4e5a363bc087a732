"""Weights of a sample's loss, from its timestep alone.

All of them are factors, so their order does not matter. They take the SNR as a tensor, and each is finite at SNR 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.families.family import V_PREDICTION, PredictionType

# Above this SNR (the first three timesteps) the weights of sd-scripts stand still.
MAX_SNR = 1000.0


def min_snr(snr: Tensor, gamma: float, prediction_type: PredictionType) -> Tensor:
    """min(SNR, gamma) / SNR for noise prediction, min(SNR, gamma) / (SNR + 1) for velocity.

    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv:2303.09556, sec. 3.4.

    Args and returns: (B,). Noise prediction at SNR 0 has the limit, 1.
    """
    if prediction_type == V_PREDICTION:
        return snr.clamp(max=gamma) / (snr + 1)
    return gamma / snr.clamp(min=gamma)


def velocity_to_noise(snr: Tensor) -> Tensor:
    """SNR / (SNR + 1): by how much the squared error of v exceeds that of the noise it stands for. (B,) to (B,)."""
    snr = snr.clamp(max=MAX_SNR)
    return snr / (snr + 1)


def velocity_like(snr: Tensor, strength: float) -> Tensor:
    """1 + strength * (SNR + 1) / SNR: adds the loss as velocity would weigh it, `strength` times. (B,) to (B,).

    At SNR 0, where noise prediction says nothing about the picture, the added part is left out.
    """
    share = velocity_to_noise(snr)
    return 1 + torch.where(share > 0, strength / share.clamp(min=torch.finfo(share.dtype).tiny), 0.0)


def debiased(snr: Tensor, prediction_type: PredictionType) -> Tensor:
    """1 / sqrt(SNR) for noise prediction, 1 / (SNR + 1) for velocity; (B,) to (B,).

    Yu et al., "Debias the Training of Diffusion Models", arXiv:2310.08442, eq. 12. Noise prediction at SNR 0, where the
    weight has no bound and the error no meaning, has weight 0.
    """
    snr = snr.clamp(max=MAX_SNR)
    if prediction_type == V_PREDICTION:
        return 1 / (snr + 1)
    return torch.where(snr > 0, snr.clamp(min=torch.finfo(snr.dtype).tiny).rsqrt(), 0.0)
