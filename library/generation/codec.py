"""The VAE: latents to pictures and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.generation.placing import on_device

if TYPE_CHECKING:
    from PIL.Image import Image


class LatentCodec:
    """Decodes and encodes with a VAE.

    Args:
        vae: of diffusers.
        scale: factor from its units to the denoiser's.
        batch_size: pictures at the same time.
        stays: whether it is on the device all the time, and not just while it computes.
        note: is told what a user should know.
    """

    def __init__(
        self, vae: nn.Module, *, scale: float, batch_size: int = 1, stays: bool = True, note: Callable[[str], None]
    ) -> None:
        self._vae: Any = vae
        self._scale, self._batch_size, self._stays, self._note = scale, batch_size, stays, note

    def decode(self, latents: Tensor) -> Iterator[Image]:
        """Pictures of (B, C, h, w), in the denoiser's units; a VAE in half precision that overflows is asked again in fp32.

        Raises:
            UserError: even then it gives no numbers.
        """
        with on_device(self._vae, latents.device, stays=self._stays):
            for group in latents.split(self._batch_size):
                yield from map(_to_image, self._pixels(group))

    def _pixels(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) fp32, in [-1, 1] but for what goes beyond."""
        pixels = self._decoded(latents)
        if not torch.isfinite(pixels).all():
            dtype = next(self._vae.parameters()).dtype
            self._note(
                f"the VAE overflowed in {dtype}; this picture is decoded in fp32 (--no_half_vae avoids the repetition)"
            )
            try:
                self._vae.float()
                pixels = self._decoded(latents)
            finally:
                self._vae.to(dtype)
        if not torch.isfinite(pixels).all():
            raise UserError("the VAE gives no numbers (NaN) even in fp32", remedy="use another VAE file with --vae")
        return pixels

    def _decoded(self, latents: Tensor) -> Tensor:
        dtype = next(self._vae.parameters()).dtype
        with torch.autocast(latents.device.type, enabled=False):
            decoded: Tensor = self._vae.decode((latents / self._scale).to(dtype)).sample.float()
        return decoded

    def encode(self, pictures: Sequence[Tensor], generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
        """(B, C, h, w) fp32, in the denoiser's units: a sample of each picture's posterior, from its own generator.

        Args:
            pictures: (3, H, W) in [-1, 1] each, of one size.
        """
        with on_device(self._vae, device, stays=self._stays), torch.autocast(device.type, enabled=False):
            dtype = next(self._vae.parameters()).dtype
            samples = [
                self._vae.encode(picture[None].to(device, dtype)).latent_dist.sample(generator).float()
                for picture, generator in zip(pictures, generators, strict=True)
            ]
        return torch.cat(samples) * self._scale


def _to_image(pixels: Tensor) -> Image:
    """(3, H, W) in [-1, 1] to an 8-bit picture."""
    from PIL import Image

    scaled = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(scaled.permute(1, 2, 0).contiguous().numpy())
