"""The noise schedule of Stable Diffusion, as tables that live on one device.

    x_t = signal_t * x_0 + spread_t * eps,   signal = sqrt(abar),  spread = sqrt(1 - abar),  SNR = abar / (1 - abar)

Ho et al., "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, eq. 4; v: Salimans and Ho, arXiv:2202.00512, app. D;
zero terminal SNR: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from library.families.family import NOISE_SCHEDULE

TRAIN_STEPS: int = NOISE_SCHEDULE["num_train_timesteps"]


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Tables over the timesteps 0 .. T-1, each (T,) fp32 on one device.

    Indexing them with timesteps of the same device never waits for that device.

    Attributes:
        alphas_cumprod: abar, the share of the signal's variance that is left.
        signal: sqrt(abar).
        spread: sqrt(1 - abar), from double precision: 1 - abar loses four digits in fp32 at small t.
        snr: abar / (1 - abar) of this very schedule; 0 at the last step under zero terminal SNR.
        weight_snr: what loss weights use: the SNR before `zero_terminal_snr`. Two reasons. It is what the values of
            min_snr_gamma in circulation were found with; and it has a lower bound (0.0047), where the rescaled SNR falls to
            0 and weights such as 1 / sqrt(SNR) have no bound (2000 and more at the step before the last). The two differ by
            less than a quarter above SNR 0.2, and far below that weights for velocity vanish either way.
    """

    alphas_cumprod: Tensor
    signal: Tensor
    spread: Tensor
    snr: Tensor
    weight_snr: Tensor

    @classmethod
    def scaled_linear(
        cls,
        *,
        beta_start: float = NOISE_SCHEDULE["beta_start"],
        beta_end: float = NOISE_SCHEDULE["beta_end"],
        steps: int = TRAIN_STEPS,
        zero_terminal_snr: bool = False,
        device: torch.device | str = "cpu",
    ) -> NoiseSchedule:
        """Betas whose square roots are evenly spaced: the schedule of every Stable Diffusion 1.x and 2.x model."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        weight_snr = alphas_cumprod / (1 - alphas_cumprod)
        if zero_terminal_snr:
            alphas_cumprod = rescale_to_zero_terminal_snr(alphas_cumprod)
        tables = {
            "alphas_cumprod": alphas_cumprod,
            "signal": alphas_cumprod.sqrt(),
            "spread": (1 - alphas_cumprod).sqrt(),
            "snr": alphas_cumprod / (1 - alphas_cumprod),
            "weight_snr": weight_snr,
        }
        return cls(**{name: table.to(device=device, dtype=torch.float32) for name, table in tables.items()})

    @property
    def steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its tables on another device."""
        return NoiseSchedule(**{name: table.to(device) for name, table in vars(self).items()})

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = signal * x_0 + spread * eps.

        Args:
            latents: x_0, (B, C, h, w), scaled.
            noise: eps, (B, C, h, w).
            timesteps: (B,) int64, on the device of the tables.

        Returns:
            (B, C, h, w), fp32 at least.
        """
        return _rows(self.signal, timesteps, latents) * latents + _rows(self.spread, timesteps, latents) * noise

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = signal * eps - spread * x_0; shapes as in `add_noise`."""
        return _rows(self.signal, timesteps, latents) * noise - _rows(self.spread, timesteps, latents) * latents


def rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and stretch sqrt(abar) so that the last value is 0 and the first stays (arXiv:2305.08891, algorithm 1).

    Args and returns: (T,).
    """
    signal = alphas_cumprod.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * first / (first - last)) ** 2


def _rows(table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """One value of the table per sample, shaped to multiply `like`: (B, 1, ...)."""
    return table[timesteps].view(-1, *[1] * (like.ndim - 1))
