"""What is drawn for one sample, and the noise that comes of it.

Every draw has a stream of its own, so switching one option on leaves all other draws as they were. Nothing is drawn per
batch: random strengths and the normalisation of multi-resolution noise belong to the sample, so a sample's noise does not
depend on its neighbours.

Noise offset: Guttenberg, "Diffusion with offset noise" (crosslabs.org, 2023). Multi-resolution noise: Whitaker, "Multi-
resolution noise for diffusion model training" (wandb.ai, 2023). Input perturbation: Ning et al., arXiv:2301.11706, eq. 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from library.diffusion.schedule import TRAIN_STEPS
from library.errors import UserError, raise_all
from library.streams import torch_stream


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """How noise and timesteps are drawn. None switches a part off.

    Attributes:
        noise_offset: strength of a normal draw per channel that is added to the whole channel; usual 0.05 to 0.1.
        noise_offset_random_strength: take the strength uniformly from [0, noise_offset), per sample.
        adaptive_noise_scale: add this times |mean of the latent's channel| to the strength, which never falls below 0.
        multires_noise_iterations: number of levels of multi-resolution noise; usual 6 to 10.
        multires_noise_discount: factor of each level to the one before.
        ip_noise_gamma: strength of noise that only the model's input gets, the target does not; usual 0.1.
        ip_noise_gamma_random_strength: take it uniformly from [0, ip_noise_gamma), per sample.
        min_timestep: lowest timestep drawn (inclusive); None is 0.
        max_timestep: upper bound of the draw (exclusive); None is 1000. Equal to min_timestep: always that timestep.

    Raises:
        UserError: a value out of its range, or one that does nothing without another; all of them at once.
    """

    noise_offset: float | None = None
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False
    min_timestep: int | None = None
    max_timestep: int | None = None

    def __post_init__(self) -> None:
        raise_all(
            [
                UserError(what, where=f"--{name} {getattr(self, name)}", remedy=remedy)
                for name, wrong, what, remedy in self._rules()
                if wrong
            ]
        )

    def _rules(self) -> list[tuple[str, bool, str, str]]:
        """(option, broken, what is wrong, remedy) of every rule."""
        low, high = self.timestep_range
        offset, gamma, levels = self.noise_offset, self.ip_noise_gamma, self.multires_noise_iterations
        return [
            ("noise_offset", offset is not None and offset < 0, "the strength is negative", "give 0 or more"),
            (
                "adaptive_noise_scale",
                self.adaptive_noise_scale is not None and offset is None,
                "it changes the noise offset, and there is none",
                "give --noise_offset as well",
            ),
            (
                "noise_offset_random_strength",
                self.noise_offset_random_strength and offset is None,
                "there is no noise offset whose strength could be random",
                "give --noise_offset as well",
            ),
            ("multires_noise_iterations", levels is not None and levels < 0, "the number is negative", "give 0 or more"),
            (
                "multires_noise_discount",
                not 0 < self.multires_noise_discount <= 1,
                "out of range",
                "give a number above 0, at most 1",
            ),
            ("ip_noise_gamma", gamma is not None and gamma < 0, "the strength is negative", "give 0 or more"),
            (
                "ip_noise_gamma_random_strength",
                self.ip_noise_gamma_random_strength and gamma is None,
                "there is no input noise whose strength could be random",
                "give --ip_noise_gamma as well",
            ),
            (
                "min_timestep",
                not 0 <= low < TRAIN_STEPS,
                "no such timestep",
                f"give 0 to {TRAIN_STEPS - 1}",
            ),
            (
                "max_timestep",
                not 0 <= high <= TRAIN_STEPS,
                "no such timestep",
                f"give 0 to {TRAIN_STEPS}",
            ),
            (
                "max_timestep",
                low > high and low < TRAIN_STEPS and high >= 0,
                f"below --min_timestep {low}",
                "give a value above it, or the same one for a single timestep",
            ),
        ]

    @property
    def timestep_range(self) -> tuple[int, int]:
        """(lowest, upper bound); the same number twice for a constant."""
        low = 0 if self.min_timestep is None else self.min_timestep
        return low, TRAIN_STEPS if self.max_timestep is None else self.max_timestep


@dataclass(frozen=True, kw_only=True)
class SampleDraws:
    """All random numbers of one sample, or with a leading batch axis of several; drawn on the CPU in fp32.

    Attributes:
        timestep: () int64.
        noise: (C, h, w), standard normal.
        posterior_noise: (C, h, w), standard normal, for the VAE's posterior.
        offset: (C, 1, 1), standard normal, for noise offset.
        offset_strength: (1, 1, 1) in [0, 1), factor of the strength where it is random.
        multires: (C, h, w), the weighted sum of all levels of multi-resolution noise.
        ip_noise: (C, h, w), standard normal, for input perturbation.
        ip_strength: (1, 1, 1) in [0, 1).
    """

    timestep: Tensor
    noise: Tensor
    posterior_noise: Tensor
    offset: Tensor | None = None
    offset_strength: Tensor | None = None
    multires: Tensor | None = None
    ip_noise: Tensor | None = None
    ip_strength: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> SampleDraws:
        """The same draws on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SampleDraws:
        """The same draws in page-locked memory; torch's data loader calls it by this name."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> SampleDraws:
        """Every part that was drawn, put through a function."""
        parts: dict[str, Any] = {name: None if part is None else change(part) for name, part in vars(self).items()}
        return SampleDraws(**parts)


def draw_sample(options: NoiseOptions, *, seed: int, epoch: int, sample: int, latent_shape: Sequence[int]) -> SampleDraws:
    """Everything random about the noise of one sample in one epoch.

    Args:
        latent_shape: (C, h, w).

    Returns:
        The draws, without a batch axis; parts that no option asks for are None.
    """
    shape = tuple(latent_shape)

    def normal(purpose: str, size: tuple[int, ...] = shape) -> Tensor:
        return torch.randn(size, generator=torch_stream(seed, purpose, epoch, sample))

    def uniform(purpose: str) -> Tensor:
        return torch.rand(1, 1, 1, generator=torch_stream(seed, purpose, epoch, sample))

    multires = None
    if options.multires_noise_iterations:
        generator = torch_stream(seed, "multires noise", epoch, sample)
        multires = pyramid_noise(shape, options.multires_noise_iterations, options.multires_noise_discount, generator)
    return SampleDraws(
        timestep=draw_timestep(options.timestep_range, torch_stream(seed, "timestep", epoch, sample)),
        noise=normal("noise"),
        posterior_noise=normal("posterior noise"),
        offset=normal("noise offset", (shape[0], 1, 1)) if options.noise_offset is not None else None,
        offset_strength=uniform("noise offset strength") if options.noise_offset_random_strength else None,
        multires=multires,
        ip_noise=normal("input noise") if options.ip_noise_gamma is not None else None,
        ip_strength=uniform("input noise strength") if options.ip_noise_gamma_random_strength else None,
    )


def draw_timestep(timestep_range: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A uniform integer in [low, high), or low itself where both are equal; () int64."""
    low, high = timestep_range
    return torch.randint(low, max(high, low + 1), (), generator=generator)


def pyramid_noise(shape: tuple[int, ...], levels: int, discount: float, generator: torch.Generator) -> Tensor:
    """Sum of ever coarser noise: level i is drawn at 1 / r**i of the size, enlarged, and counts discount**i.

    Level 0 is full-size noise. r is drawn from [2, 4) for every level; the levels end where a side has shrunk to 1.

    Args:
        shape: (C, h, w).

    Returns:
        (C, h, w), not normalised.
    """
    channels, height, width = shape
    total = torch.zeros(shape)
    for level in range(levels):
        ratio = float(2 + 2 * torch.rand((), generator=generator)) ** level
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = torch.randn(1, channels, *size, generator=generator)
        total += F.interpolate(coarse, size=(height, width), mode="bilinear")[0] * discount**level
        if min(size) == 1:
            break
    return total


def stack_draws(draws: Sequence[SampleDraws]) -> SampleDraws:
    """Draws of several samples (same options, same latent shape) with a batch axis in front."""
    columns: dict[str, Any] = {field.name: [getattr(one, field.name) for one in draws] for field in fields(SampleDraws)}
    parts: dict[str, Any] = {name: None if column[0] is None else torch.stack(column) for name, column in columns.items()}
    return SampleDraws(**parts)


def posterior_sample(mean: Tensor, std: Tensor, draws: SampleDraws, latent_scale: float) -> Tensor:
    """A draw from the VAE's posterior in the U-Net's units: (mean + std * noise) * latent_scale, all (B, C, h, w)."""
    return (mean + std * draws.posterior_noise) * latent_scale


def noise_of(draws: SampleDraws, latents: Tensor, options: NoiseOptions) -> tuple[Tensor, Tensor]:
    """The noise of a batch, from its draws and, for adaptive noise offset, its latents.

    Offset first, then multi-resolution noise with the division by the sample's standard deviation, as in sd-scripts, which
    divides by that of the batch.

    Args:
        draws: stacked, on the latents' device.
        latents: x_0, (B, C, h, w), scaled.

    Returns:
        The noise that the target is made of, and the noise that the model's input gets: the same tensor without
        ip_noise_gamma. Both (B, C, h, w) fp32.
    """
    noise = draws.noise
    if options.noise_offset is not None and draws.offset is not None:
        noise = noise + _offset_strength(draws, latents, options.noise_offset, options) * draws.offset
    if draws.multires is not None:
        noise = noise + draws.multires
        noise = noise / noise.std(dim=(1, 2, 3), keepdim=True)
    if options.ip_noise_gamma is None or draws.ip_noise is None:
        return noise, noise
    strength = options.ip_noise_gamma if draws.ip_strength is None else options.ip_noise_gamma * draws.ip_strength
    return noise, noise + strength * draws.ip_noise


def _offset_strength(draws: SampleDraws, latents: Tensor, offset: float, options: NoiseOptions) -> Tensor | float:
    """Strength of the noise offset: a number, or per sample (B, 1, 1, 1), or per channel (B, C, 1, 1)."""
    strength = offset if draws.offset_strength is None else offset * draws.offset_strength
    if options.adaptive_noise_scale is None:
        return strength
    channel_means = latents.float().mean(dim=(2, 3), keepdim=True).abs()
    return (strength + options.adaptive_noise_scale * channel_means).clamp(min=0)
