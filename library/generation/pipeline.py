"""From requests to pictures, with models that belong to someone else.

The models are borrowed: what is in training mode is so again afterwards, what was on another device is back there, and no
global random state is touched, so pictures can be made in the middle of a training.

All noise of a picture comes from a CPU generator of its own, seeded with its seed: the initial latents first, then what the
sampler draws. So neither batch nor device changes it, and it is the noise that diffusers draws from such a generator.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.generation.encoding import Conditions, PromptEncoder
from library.generation.requests import LATENT_FACTOR, ImageRequest
from library.generation.samplers import make_scheduler, takes_generator

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a batch stands: before call `number` (from 0) of `count` calls of the denoiser."""

    requests: Sequence[ImageRequest]
    number: int
    count: int


def _nothing(_: Any) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Where others take part in the making of a batch, such as strengths of adapters.

    Attributes:
        batch_key: requests go into one batch only if this is equal for them.
        before_encoding: called with the requests of a batch before their texts are encoded.
        before_step: called before every call of the denoiser.
    """

    batch_key: Callable[[ImageRequest], Hashable] = _nothing
    before_encoding: Callable[[Sequence[ImageRequest]], None] = _nothing
    before_step: Callable[[Step], None] = _nothing


@dataclass(frozen=True, kw_only=True)
class PipelineModels:
    """The parts of a base model that a picture needs.

    Attributes:
        latent_scale: factor from the VAE's units to the denoiser's.
        prediction_type: "epsilon" or "v_prediction".
        zero_terminal_snr: the denoiser was trained with a schedule rescaled so.
        others: modules that only have to be in evaluation mode meanwhile, such as adapter networks.
    """

    denoiser: nn.Module
    vae: nn.Module
    text_encoders: Sequence[nn.Module]
    tokenizers: Sequence[Any]
    latent_scale: float
    latent_channels: int = 4
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False
    others: Sequence[nn.Module] = ()

    def modules(self) -> list[nn.Module]:
        """All of them, for modes."""
        return [self.denoiser, self.vae, *self.text_encoders, *self.others]


class Pipeline:
    """Makes pictures.

    Args:
        models: see there; they are borrowed for the time of a call.
        max_chunks: how many pieces of 75 tokens a prompt may have; what is longer is cut, with a note.
        autocast: compute denoiser and text encoders in this type where weights are in another one; None: as they are.
        note: is told what a user should know, one sentence each.
    """

    def __init__(
        self,
        models: PipelineModels,
        *,
        max_chunks: int = 3,
        autocast: torch.dtype | None = None,
        note: Callable[[str], None] = _nothing,
    ) -> None:
        self.models = models
        self.encoder = PromptEncoder(models.tokenizers, models.text_encoders, max_chunks=max_chunks, note=note)
        self._autocast = autocast
        self._note = note

    @property
    def device(self) -> torch.device:
        """Where pictures are made: where the denoiser is."""
        return next(self.models.denoiser.parameters()).device

    def generate(self, requests: Sequence[ImageRequest], *, batch_size: int = 1, hooks: Hooks | None = None) -> list[Image]:
        """One picture per request, in their order.

        Raises:
            UserError: the denoiser gave numbers that are none.
        """
        pictures = dict(self.stream(requests, batch_size=batch_size, hooks=hooks))
        return [pictures[number] for number in range(len(requests))]

    def stream(
        self, requests: Sequence[ImageRequest], *, batch_size: int = 1, hooks: Hooks | None = None
    ) -> Iterator[tuple[int, Image]]:
        """(number of the request, picture) as they are made; those that fit into one batch are made together.

        The models are given back when the iterator ends or is closed.
        """
        hooks = hooks or Hooks()
        with self._borrowed_models():
            for numbers in self._batches(requests, batch_size, hooks):
                yield from zip(numbers, self._make_batch([requests[number] for number in numbers], hooks), strict=True)

    def _batches(self, requests: Sequence[ImageRequest], batch_size: int, hooks: Hooks) -> Iterator[list[int]]:
        """Numbers of requests that share size, steps, sampler and length of text; groups in order of their first request."""
        groups: dict[Hashable, list[int]] = {}
        for number, request in enumerate(requests):
            size = (request.width, request.height)
            chunks = self.encoder.chunks_needed(request)
            key = (size, request.steps, request.sampler, request.guided, chunks, hooks.batch_key(request))
            groups.setdefault(key, []).append(number)
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                yield group[start : start + batch_size]

    @torch.no_grad()
    def _make_batch(self, requests: Sequence[ImageRequest], hooks: Hooks) -> list[Image]:
        with _untouched_random_state(self.device), self._precision():
            hooks.before_encoding(requests)
            conditions = self.encoder.encode(requests, self.device)
            latents = self._denoise(requests, conditions, hooks)
        if not torch.isfinite(latents).all():
            raise UserError(
                f"the picture of seed {requests[0].seed} came out as no numbers (NaN)",
                remedy="use --bf16 or full precision instead of --fp16, and check the networks' strengths",
            )
        return [self._decode(latents[row : row + 1]) for row in range(len(requests))]

    def _denoise(self, requests: Sequence[ImageRequest], conditions: Conditions, hooks: Hooks) -> Tensor:
        """(B, C, h, w) fp32, in the denoiser's units."""
        first, device = requests[0], self.device
        scheduler = make_scheduler(
            first.sampler,
            steps=first.steps,
            prediction_type=self.models.prediction_type,
            zero_terminal_snr=self.models.zero_terminal_snr,
            device=device,
        )
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        sampler_noise = {"generator": generators} if takes_generator(scheduler) else {}
        scales = torch.tensor([request.scale for request in requests], device=device).view(-1, 1, 1, 1)
        latents = self._initial_latents(requests, generators).to(device) * scheduler.init_noise_sigma
        count = len(scheduler.timesteps)
        for number, timestep in enumerate(scheduler.timesteps):
            hooks.before_step(Step(requests=requests, number=number, count=count))
            model_input = scheduler.scale_model_input(latents, timestep)
            prediction = self._predict(model_input, timestep, conditions, scales)
            latents = scheduler.step(prediction, timestep, latents, **sampler_noise).prev_sample
        return latents

    def _initial_latents(self, requests: Sequence[ImageRequest], generators: Sequence[torch.Generator]) -> Tensor:
        """(B, C, h, w), standard normal, on the CPU."""
        height, width = requests[0].height // LATENT_FACTOR, requests[0].width // LATENT_FACTOR
        shape = (1, self.models.latent_channels, height, width)
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators])

    def _predict(self, latents: Tensor, timestep: Tensor, conditions: Conditions, scales: Tensor) -> Tensor:
        """The denoiser's prediction, with classifier-free guidance where there is a negative condition.

        Ho and Salimans, arXiv:2207.12598, in the form negative + scale * (positive - negative).
        """
        context = conditions.positive
        if conditions.negative is not None:
            context = torch.cat([conditions.negative, conditions.positive])
            latents = torch.cat([latents, latents])
        dtype = next(self.models.denoiser.parameters()).dtype
        prediction = self.models.denoiser(
            latents.to(dtype), timestep, encoder_hidden_states=context.to(dtype)
        ).sample.float()
        if conditions.negative is None:
            return prediction
        negative, positive = prediction.chunk(2)
        return negative + scales * (positive - negative)

    def _decode(self, latents: Tensor) -> Image:
        """One picture from (1, C, h, w); a VAE in half precision that overflows is asked again in fp32."""
        pixels = self._decode_in_own_type(latents)
        if not torch.isfinite(pixels).all():
            vae = self.models.vae
            dtype = next(vae.parameters()).dtype
            self._note(
                f"the VAE overflowed in {dtype}; this picture is decoded in fp32 (--no_half_vae avoids the repetition)"
            )
            try:
                pixels = self._decode_in_own_type(latents, vae.float())
            finally:
                vae.to(dtype)
        if not torch.isfinite(pixels).all():
            raise UserError("the VAE gives no numbers (NaN) even in fp32", remedy="use another VAE file with --vae")
        return _to_image(pixels[0])

    def _decode_in_own_type(self, latents: Tensor, vae: nn.Module | None = None) -> Tensor:
        vae = vae or self.models.vae
        dtype = next(vae.parameters()).dtype
        return vae.decode((latents / self.models.latent_scale).to(dtype)).sample.float()  # type: ignore[operator]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._autocast)

    @contextlib.contextmanager
    def _borrowed_models(self) -> Iterator[None]:
        """All models in evaluation mode and on one device, and everything as it was afterwards."""
        in_training = [module for whole in self.models.modules() for module in whole.modules() if module.training]
        devices = [(model, next(model.parameters()).device) for model in (self.models.vae, *self.models.text_encoders)]
        try:
            for module in in_training:
                module.training = False
            for model, device in devices:
                if device != self.device:
                    model.to(self.device)
            yield
        finally:
            for module in in_training:
                module.training = True
            for model, device in devices:
                if device != self.device:
                    model.to(device)


@contextlib.contextmanager
def _untouched_random_state(device: torch.device) -> Iterator[None]:
    """Whatever a model of others draws from the global generators (networks with dropout, DyLoRA) is undone."""
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)


def _to_image(pixels: Tensor) -> Image:
    """(3, H, W) in [-1, 1] to an 8-bit picture."""
    from PIL import Image

    scaled = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(scaled.permute(1, 2, 0).contiguous().numpy())
