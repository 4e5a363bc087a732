"""From requests to pictures, with models that belong to someone else.

The models are borrowed: what is in training mode is so again afterwards, what was on another device is back there, and no
global random state is touched, so pictures can be made in the middle of a training.

All noise of a picture comes from a CPU generator of its own, seeded with its seed: of an image to begin from first its
posterior's, then the initial latents, then what the sampler draws. So neither batch nor device changes it, and it is the
noise that diffusers draws from such a generator.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.conditioning.text_encoders import TextEncoders
from library.errors import UserError
from library.families.family import ModelFamily
from library.generation import picture_files
from library.generation.adapters import AdapterRack
from library.generation.codec import LatentCodec
from library.generation.compiling import CompiledDenoiser
from library.generation.deep_shrink import deep_shrink
from library.generation.encoding import PromptEncoder, shortened
from library.generation.gradual_latent import Size, gradual_sizes, grown
from library.generation.predictions import BatchPredictions, Control
from library.generation.refiner import Refiner, noise_left
from library.generation.requests import LATENT_FACTOR, SIZES, ImageRequest
from library.generation.rows import Row, rows_of
from library.generation.samplers import denoising_timesteps, make_scheduler, takes_generator
from library.prompts.sub_prompts import read_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.prompts.sub_prompts import SubPrompt


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a batch stands: before call `number` (from 0) of `count` calls of the denoiser."""

    requests: Sequence[ImageRequest]
    number: int
    count: int


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Where others take part in the making of a batch.

    Attributes:
        batch_key: requests go into one batch only if this is equal for them.
        before_encoding: called with the requests of a batch before their texts are encoded.
        before_step: called before every call of the denoiser.
        first_stage: called with each request drawn in two stages, that of its first stage, and the picture of that.
    """

    batch_key: Callable[[ImageRequest], Hashable] = _nothing
    before_encoding: Callable[[Sequence[ImageRequest]], None] = _nothing
    before_step: Callable[[Step], None] = _nothing
    first_stage: Callable[[ImageRequest, ImageRequest, Image], None] = _nothing


@dataclass(frozen=True, kw_only=True)
class PipelineModels:
    """The parts of a base model that a picture needs.

    Attributes:
        family: what they are models of.
        text_encoders, tokenizers: in the family's order.
        prediction_type: "epsilon" or "v_prediction".
        zero_terminal_snr: the denoiser was trained with a schedule rescaled so.
        others: modules that only have to be in evaluation mode meanwhile, such as adapter networks.
    """

    family: ModelFamily
    denoiser: nn.Module
    vae: nn.Module
    text_encoders: Sequence[nn.Module]
    tokenizers: Sequence[Any]
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False
    others: Sequence[nn.Module] = ()

    @property
    def texts(self) -> TextEncoders:
        """The text encoders as one."""
        return TextEncoders(specs=self.family.text_encoders, tokenizers=self.tokenizers, modules=self.text_encoders)

    def modules(self) -> list[nn.Module]:
        """All of them, for modes."""
        return [self.denoiser, self.vae, *self.text_encoders, *self.others]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What pictures begin from instead of noise alone.

    Attributes:
        latents: (B, C, h, w), in the denoiser's units.
        strength: share of the steps that are made.
        mask: (B, 1, h, w), 1 where pictures are drawn anew; None for everywhere.
    """

    latents: Tensor
    strength: float
    mask: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """How pictures are computed.

    Attributes:
        max_chunks: how many pieces of 75 tokens a prompt may have; what is longer is cut, with a note.
        autocast: compute denoiser and text encoders in this type where weights are in another one; None: as they are.
        vae_batch_size: pictures that the VAE decodes at the same time.
        offload: keep VAE and text encoders where they are, and have them on the denoiser's device only while they compute.
    """

    max_chunks: int = 3
    autocast: torch.dtype | None = None
    vae_batch_size: int = 1
    offload: bool = False


class Pipeline:
    """Makes pictures.

    Args:
        models: see there; they are borrowed for the time of a call.
        settings: see there.
        rack: the adapters that requests may want.
        control: takes part in every call of the denoiser.
        compiled: the denoiser, where its blocks are compiled.
        refiner: models that make the last steps (their VAE is not used), without adapters and controls.
        note: is told what a user should know, one sentence each.
    """

    def __init__(
        self,
        models: PipelineModels,
        settings: PipelineSettings | None = None,
        *,
        rack: AdapterRack | None = None,
        control: Control | None = None,
        compiled: CompiledDenoiser | None = None,
        refiner: PipelineModels | None = None,
        note: Callable[[str], None] = _nothing,
    ) -> None:
        settings = settings or PipelineSettings()
        self.models, self._settings, self._note = models, settings, note
        self._rack, self._control, self._compiled = rack or AdapterRack(), control, compiled
        stays = not settings.offload
        self._encoder = PromptEncoder(models.texts, max_chunks=settings.max_chunks, note=note, stays=stays)
        self._refiner = None
        if refiner is not None:
            encoder = PromptEncoder(refiner.texts, max_chunks=settings.max_chunks, note=_nothing, stays=stays)
            self._refiner = Refiner(refiner.family, refiner.denoiser, encoder)
        batch_size = settings.vae_batch_size
        scale = models.family.latent_scale
        self._codec = LatentCodec(models.vae, scale=scale, batch_size=batch_size, stays=stays, note=note)

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
        self,
        requests: Sequence[ImageRequest],
        *,
        batch_size: int = 1,
        hooks: Hooks | None = None,
        failed: Callable[[int, UserError], None] | None = None,
    ) -> Iterator[tuple[int, Image]]:
        """(number of the request, picture) as they are made; those that fit into one batch are made together.

        The models are given back when the iterator ends or is closed.

        Args:
            failed: is told the number of each request that cannot be drawn, and why; without it the first such ends all.
        """
        hooks = hooks or Hooks()
        with self._borrowed_models(), self._rack.borrowed():
            self._encoder.forget()
            if self._refiner is not None:
                self._refiner.encoder.forget()
            for numbers in self._batches(requests, batch_size, hooks):
                yield from self._attempted(requests, numbers, hooks, failed)

    def _attempted(
        self,
        requests: Sequence[ImageRequest],
        numbers: Sequence[int],
        hooks: Hooks,
        failed: Callable[[int, UserError], None] | None,
    ) -> Iterator[tuple[int, Image]]:
        """The pictures of a batch; where it cannot be drawn, each of them alone."""
        try:
            images = self._make_batch([requests[number] for number in numbers], hooks)
        except UserError as error:
            if failed is None:
                raise
            if len(numbers) == 1:
                failed(numbers[0], error)
                return
            for number in numbers:
                yield from self._attempted(requests, [number], hooks, failed)
            return
        yield from zip(numbers, images, strict=True)

    def _batches(self, requests: Sequence[ImageRequest], batch_size: int, hooks: Hooks) -> Iterator[list[int]]:
        """Numbers of requests whose sampling goes through the same steps; groups in order of their first request."""
        groups: dict[Hashable, list[int]] = {}
        for number, request in enumerate(requests):
            begins = (request.image is None, request.mask is None, request.strength)
            first = (request.highres_scale, request.highres_steps, request.highres_strength)
            stages = (*first, request.highres_latents, request.highres_uncontrolled)
            sizes = (request.width, request.height, request.deep_shrink, request.gradual_latent)
            loop = (sizes, request.steps, request.sampler, begins, stages)
            rows = self._rows(request, maps=False)
            merged = tuple(frozenset(row.acting.items()) for row in rows) if self._rack.merges else None
            key = (
                loop,
                request.guided,
                request.refiner_start,
                self._chunks(request, rows),
                merged,
                hooks.batch_key(request),
            )
            groups.setdefault(key, []).append(number)
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                yield group[start : start + batch_size]

    def _rows(self, request: ImageRequest, *, maps: bool = True) -> list[Row]:
        sub_prompts = read_sub_prompts(request)
        regional = request.regions is not None
        acting = self._rack.acting(sub_prompts, request.network_strengths, regional=regional)
        regions = self._regions(request) if maps else None
        return rows_of(request, sub_prompts, acting, regions, self.models.family.size_conditions)

    def _regions(self, request: ImageRequest) -> Sequence[Tensor] | None:
        """(h, w) of each sub-prompt; None where there are no regions."""
        if request.regions is None:
            return None
        size, count = (request.width, request.height), len(read_sub_prompts(request))
        return picture_files.region_maps(request.regions, count, *size, colors=request.region_colors)

    def _chunks(self, request: ImageRequest, rows: Sequence[Row]) -> int:
        texts = [text for row in rows for text in (row.text, row.text_2) if text is not None]
        return self._encoder.chunks_needed(texts, extended=request.extended)

    @torch.no_grad()
    def _make_batch(self, requests: Sequence[ImageRequest], hooks: Hooks) -> list[Image]:
        with _untouched_random_state(self.device), self._precision():
            hooks.before_encoding(requests)
            acting = [row.acting for request in requests for row in self._rows(request, maps=False)]
            shrunk = deep_shrink(self.models.denoiser, requests[0].deep_shrink, self.models.family.depth_count)
            merged = self._rack.merge(acting)
            with shrunk:
                latents = self._drawn(requests, hooks, merged=merged)
        if not torch.isfinite(latents).all():
            half = torch.float16 in (self._settings.autocast, next(self.models.denoiser.parameters()).dtype)
            remedy = "use --bf16 or full precision instead of --fp16, and " if half else ""
            raise UserError(
                f"the picture of seed {requests[0].seed} came out as no numbers (NaN)",
                remedy=f"{remedy}check the networks' strengths",
            )
        return list(self._codec.decode(latents))

    def _drawn(self, requests: Sequence[ImageRequest], hooks: Hooks, *, merged: bool) -> Tensor:
        """(B, C, h, w) of finished pictures, in one stage or two."""
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        if requests[0].highres_scale is None:
            return self._denoise(requests, generators, self._source(requests, generators), hooks, merged=merged)
        firsts = [_first_of_two(request) for request in requests]
        small = self._denoise(firsts, generators, self._source(firsts, generators), hooks, merged=merged)
        # As in sd-scripts, the second stage draws from the seed behind.
        generators = [torch.Generator().manual_seed(request.seed + 1) for request in requests]
        source = self._enlarged(requests, firsts, small, generators, hooks)
        if requests[0].highres_uncontrolled:
            requests = [replace(request, control_images=()) for request in requests]
        return self._denoise(requests, generators, source, hooks, merged=merged)

    def _source(self, requests: Sequence[ImageRequest], generators: Sequence[torch.Generator]) -> _Source | None:
        """What a batch begins from; None where that is noise alone."""
        if requests[0].image is None:
            return None
        pictures = [
            picture_files.read_pixels(request.image, request.width, request.height)
            for request in requests
            if request.image is not None
        ]
        latents = self._codec.encode(pictures, generators, self.device)
        return _Source(latents=latents, strength=requests[0].strength, mask=self._mask(requests))

    def _mask(self, requests: Sequence[ImageRequest]) -> Tensor | None:
        if requests[0].mask is None:
            return None
        masks = [picture_files.read_mask(each.mask, each.width, each.height) for each in requests if each.mask is not None]
        return torch.stack(masks).to(self.device)

    def _enlarged(
        self,
        requests: Sequence[ImageRequest],
        firsts: Sequence[ImageRequest],
        small: Tensor,
        generators: Sequence[torch.Generator],
        hooks: Hooks,
    ) -> _Source:
        """A first stage's latents at the size of the second."""
        width, height = requests[0].width, requests[0].height
        if hooks.first_stage is not _nothing or not requests[0].highres_latents:
            pictures = list(self._codec.decode(small))
            for request, first, picture in zip(requests, firsts, pictures, strict=True):
                hooks.first_stage(request, first, picture)
        if requests[0].highres_latents:
            size = (height // LATENT_FACTOR, width // LATENT_FACTOR)
            latents = nn.functional.interpolate(small, size=size, mode="bicubic", align_corners=False)
        else:
            from PIL.Image import Resampling

            large = [picture_files.pixels_of(picture.resize((width, height), Resampling.LANCZOS)) for picture in pictures]
            latents = self._codec.encode(large, generators, self.device)
        return _Source(latents=latents, strength=requests[0].strength, mask=self._mask(requests))

    def _denoise(
        self,
        requests: Sequence[ImageRequest],
        generators: Sequence[torch.Generator],
        source: _Source | None,
        hooks: Hooks,
        *,
        merged: bool,
    ) -> Tensor:
        """(B, C, h, w) fp32, in the denoiser's units."""
        first, device = requests[0], self.device
        scheduler = make_scheduler(
            first.sampler,
            steps=first.steps,
            prediction_type=self.models.prediction_type,
            zero_terminal_snr=self.models.zero_terminal_snr,
            device=device,
        )
        timesteps = scheduler.timesteps
        calls_per_step = len(timesteps) / first.steps
        if source is not None:
            timesteps = denoising_timesteps(scheduler, source.strength, first.steps)
        sizes = latent_sizes(first, timesteps.tolist())
        noise = self._noise(sizes[0], generators).to(device)
        latents = _first_latents(scheduler, timesteps, noise, source)
        sampler_noise = {"generator": list(generators)} if takes_generator(scheduler) else {}
        predictions, refined = self._predictions(requests, merged=merged), None
        if self._refiner is not None:
            regions = [self._regions(request) for request in requests]
            refined = self._refiner.predictions(requests, [read_sub_prompts(request) for request in requests], regions)
            last = noise_left(first.refiner_start, scheduler)
        for number, timestep in enumerate(timesteps):
            hooks.before_step(Step(requests=requests, number=number, count=len(timesteps)))
            place, steps = int(number / calls_per_step), max(1, round(len(timesteps) / calls_per_step))
            if refined is not None and timestep < last:
                predictions = refined
            prediction = predictions.of(scheduler.scale_model_input(latents, timestep), timestep, place, steps)
            prediction, latents = (grown(each, sizes[number + 1]) for each in (prediction, latents))
            latents = scheduler.step(prediction, timestep, latents, **sampler_noise).prev_sample
            if source is not None and source.mask is not None:
                later = timesteps[number + 1 : number + 2]
                kept = scheduler.add_noise(source.latents, noise, later) if len(later) else source.latents
                latents = torch.where(source.mask > 0, latents, kept)
        return latents

    def _predictions(self, requests: Sequence[ImageRequest], *, merged: bool) -> BatchPredictions:
        pictures = [self._rows(request) for request in requests]
        return BatchPredictions(
            self.models.denoiser,
            requests,
            pictures,
            chunks=max(map(self._chunks, requests, pictures)),
            encoder=self._encoder,
            rack=None if merged else self._rack,
            control=self._control,
            compiled=self._compiled,
        )

    def _noise(self, size: Size, generators: Sequence[torch.Generator]) -> Tensor:
        """(B, C, h, w), standard normal, on the CPU."""
        shape = (1, self.models.family.latent_channels, *size)
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators])

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._settings.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._settings.autocast)

    @contextlib.contextmanager
    def _borrowed_models(self) -> Iterator[None]:
        """All models in evaluation mode and on one device, and everything as it was afterwards."""
        in_training = [module for whole in self.models.modules() for module in whole.modules() if module.training]
        devices = [(model, next(model.parameters()).device) for model in (self.models.vae, *self.models.text_encoders)]
        try:
            for module in in_training:
                module.training = False
            yield
        finally:
            for module in in_training:
                module.training = True
            for model, device in devices:
                if next(model.parameters()).device != device:
                    model.to(device)


def read_sub_prompts(request: ImageRequest) -> tuple[SubPrompt, ...]:
    """The sub-prompts of a request's prompt with their tags."""
    where = f"prompt {shortened(request.prompt)!r}"
    return read_prompt(request.prompt, where=where, style=request.lora_tag_style, extended=request.extended)


def latent_sizes(request: ImageRequest, timesteps: Sequence[float]) -> list[Size]:
    """(height, width) of a picture's latents before every step, and behind the last."""
    size = (request.height // LATENT_FACTOR, request.width // LATENT_FACTOR)
    growth = request.gradual_latent
    return [size] * (len(timesteps) + 1) if growth is None else gradual_sizes(growth, timesteps, size)


def _first_of_two(request: ImageRequest) -> ImageRequest:
    """The request of the first of two stages; sizes that it is told are smaller likewise, as in sd-scripts."""
    assert request.first_stage is not None
    assert request.highres_scale is not None
    width, height = request.first_stage
    strength = request.strength if request.highres_strength is None else request.highres_strength
    told = {name: getattr(request, name) for name in SIZES}
    scaled = {name: round(size * request.highres_scale) for name, size in told.items() if size}
    smaller: dict[str, Any] = {"width": width, "height": height, "strength": strength, **scaled}
    return replace(request, **smaller, steps=request.highres_steps, highres_scale=None)


def _first_latents(scheduler: Any, timesteps: Tensor, noise: Tensor, source: _Source | None) -> Tensor:
    """(B, C, h, w) to begin from.

    A masked picture that is drawn anew with all steps begins from noise alone, as in diffusers; without a mask the image
    still shows through the noise of the first timestep.
    """
    if source is None or (source.mask is not None and source.strength >= 1):
        return noise * scheduler.init_noise_sigma
    if not len(timesteps):
        return source.latents
    return scheduler.add_noise(source.latents, noise, timesteps[:1])


@contextlib.contextmanager
def _untouched_random_state(device: torch.device) -> Iterator[None]:
    """Whatever a model of others draws from the global generators (networks with dropout, DyLoRA) is undone."""
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
