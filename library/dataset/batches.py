"""What one process trains on at a time: batches of tensors, made in the workers of a data loader.

A batch is a pure function of its address (epoch, number, step) and the seed, so any number of workers gives the same batches
bit for bit, workers may live through all epochs, and a run can begin anywhere.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.data
from torch import Tensor

from library.dataset.caches import LatentCache, StoredLatents
from library.dataset.captions import process_caption
from library.dataset.dataset import Dataset, DatasetImage, GlobalBatch, Sample
from library.dataset.images import BadImageError
from library.dataset.pixels import Prepared, Reading, centred, draw_flip, draw_reading, load, size_conditions
from library.diffusion.noise import SampleDraws, stack_draws
from library.errors import UserError
from library.streams import python_stream

Draw = Callable[[int, int, tuple[int, int, int]], SampleDraws]  # (epoch, sample index, latent shape) -> draws; picklable


class BatchAddress(NamedTuple):
    """Where a batch is in the run.

    Args:
        epoch: counted from 1.
        number: among the batches of the epoch, from 0.
        step: optimizer steps done before it, for token warm-up.
    """

    epoch: int
    number: int
    step: int


@dataclass(kw_only=True)
class Batch:
    """One process's share of a global batch; tensors on the CPU until `to`.

    Args:
        captions: processed, one for each sample.
        draws: the samples' random numbers, stacked.
        loss_weights: (B,) fp32: prior_loss_weight or 1; 0 for what must not count.
        real: (B,) bool: False for the filling of an incomplete batch, and for an image that could not be read.
        samples: indices of the samples.
        latent_mean, latent_std: (B, C, h, w) fp32, the VAE's posterior in its own units, where latents are cached.
        pixels: (B, 3, H, W) fp32 in [-1, 1], where they are not.
        sizes: (B, n) fp32, the size conditions that were asked for, in pixels; None where none were.
        masks: (B, 1, h, w) fp32 in 0..1, where a subset of the dataset has alpha_mask; 1 counts fully.
        skipped: sentences about images that could not be read.
    """

    address: BatchAddress
    captions: list[str]
    draws: SampleDraws
    loss_weights: Tensor
    real: Tensor
    samples: list[int]
    latent_mean: Tensor | None = None
    latent_std: Tensor | None = None
    pixels: Tensor | None = None
    sizes: Tensor | None = None
    masks: Tensor | None = None
    skipped: tuple[str, ...] = ()

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's data loader calls it by this name."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Every tensor put through a function, those of the draws too."""
        parts: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            changes = isinstance(value, Tensor)
            parts[part.name] = change(value) if changes else value.map(change) if part.name == "draws" else value
        return Batch(**parts)


class TrainingBatches(torch.utils.data.Dataset[Batch]):
    """The batches of one process, by address.

    Args:
        draw: gives the random numbers of (epoch, sample index, latent shape); has to be picklable where workers are spawned.
        latents: a cache that holds every image; None reads pixels.
        latent_channels: of the VAE.
        size_conditions: names of those that each sample carries, in their order; see `pixels.size_conditions`.
        max_train_steps: length of the run, for a token warm-up given as a fraction.

    With workers that are forked (Linux up to Python 3.13) a cache in memory is shared with them and copied nowhere;
    where they are spawned it goes to each of them through shared memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        draw: Draw,
        rank: int = 0,
        processes: int = 1,
        latents: LatentCache | None = None,
        latent_channels: int = 4,
        size_conditions: Sequence[str] = (),
        max_train_steps: int = 0,
    ) -> None:
        self.dataset, self.seed, self.draw = dataset, seed, draw
        self.rank, self.processes = rank, processes
        self.latents, self.latent_channels = latents, latent_channels
        self.size_conditions = size_conditions
        self.max_train_steps = max_train_steps

    def __getitem__(self, address: BatchAddress) -> Batch:
        """One batch.

        Raises:
            UserError: an image cannot be read, and on_bad_image is "stop".
        """
        batch = _epoch(self.dataset, address.epoch, self.seed, self.processes)[address.number]
        share = batch.share(self.rank, self.processes)
        samples = [self.dataset.samples[index] for index, _ in share]
        counts = [counts for _, counts in share]
        shape = self._latent_shape(batch)
        readings = [self._reading(sample, address.epoch) for sample in samples]
        images, skipped = self._images(samples, readings)
        counts = [counted and place not in skipped for place, counted in enumerate(counts)]
        weights = [self.dataset.loss_weight(sample.image) * counted for sample, counted in zip(samples, counts, strict=True)]
        return Batch(
            address=address,
            captions=[self._caption(sample, address) for sample in samples],
            draws=stack_draws([self.draw(address.epoch, sample.index, shape) for sample in samples]),
            loss_weights=torch.tensor(weights, dtype=torch.float32),
            real=torch.tensor(counts),
            samples=[sample.index for sample in samples],
            sizes=self._sizes(samples, readings),
            masks=self._masks(batch, images.pop("masks"), shape),
            skipped=tuple(skipped.values()),
            **{name: torch.stack(parts) for name, parts in images.items()},
        )

    def captions(self, addresses: Iterable[BatchAddress]) -> Iterator[tuple[str, DatasetImage]]:
        """Every caption that is read at these addresses, in all processes, with its image; no image is opened."""
        for address in addresses:
            for index in _epoch(self.dataset, address.epoch, self.seed, self.processes)[address.number].samples:
                sample = self.dataset.samples[index]
                yield self._caption(sample, address), sample.image

    def _images(self, samples: list[Sample], readings: list[Reading]) -> tuple[dict[str, list[Any]], dict[int, str]]:
        """Latents or pixels, and masks, of each sample; and a sentence about each that could not be read."""
        read: list[Any] = []
        skipped: dict[int, str] = {}
        for place, (sample, reading) in enumerate(zip(samples, readings, strict=True)):
            try:
                read.append(self._read(sample, reading))
            except BadImageError as error:
                sentence = UserError(str(error), where=str(sample.image.path))
                if self.dataset.options.on_bad_image == "stop":
                    raise sentence from None
                skipped[place] = str(sentence)
                read.append(self._blank(sample))
        names = {"pixels": "pixels", "mask": "masks"}
        if self.latents is not None:
            names = {"mean": "latent_mean", "std": "latent_std", "mask": "masks"}
        return {name: [getattr(one, part) for one in read] for part, name in names.items()}, skipped

    def _reading(self, sample: Sample, epoch: int) -> Reading:
        """How a sample is read; where its latents are cached, only mirroring is left to chance."""
        if self.latents is None:
            return draw_reading(self.dataset, sample, seed=self.seed, epoch=epoch)
        return centred(sample.image, flip=draw_flip(self.dataset, sample, seed=self.seed, epoch=epoch))

    def _read(self, sample: Sample, reading: Reading) -> StoredLatents | Prepared:
        if self.latents is None:
            return load(self.dataset, sample.image, reading)
        return self.latents.read(sample.image, reading.flip)

    def _sizes(self, samples: list[Sample], readings: list[Reading]) -> Tensor | None:
        """(B, n): the size conditions that are wanted; None where none are."""
        if not self.size_conditions:
            return None
        known = [size_conditions(sample.image, reading) for sample, reading in zip(samples, readings, strict=True)]
        return torch.tensor([[values[name] for name in self.size_conditions] for values in known], dtype=torch.float32)

    def _blank(self, sample: Sample) -> StoredLatents | Prepared:
        """What stands in for an image that could not be read."""
        width, height = sample.image.fit.bucket
        if self.latents is None:
            return Prepared(torch.zeros(3, height, width), None)
        factor = self.dataset.latent_factor
        zeros = torch.zeros(self.latent_channels, height // factor, width // factor)
        return StoredLatents(zeros, zeros, None)

    def _masks(self, batch: GlobalBatch, masks: list[Tensor | None], latent_shape: tuple[int, int, int]) -> Tensor | None:
        """Masks, stacked; images without one count fully. None where no subset of the dataset asks for masks."""
        if not any(subset.alpha_mask for subset in self.dataset.settings[batch.dataset].subsets):
            return None
        whole = torch.ones(1, *latent_shape[1:])
        return torch.stack([whole if mask is None else mask for mask in masks])

    def _caption(self, sample: Sample, address: BatchAddress) -> str:
        return process_caption(
            sample.image.caption,
            self.dataset.subset_of(sample.image).captions,
            python_stream(self.seed, "caption", address.epoch, sample.index),
            epoch=address.epoch,
            step=address.step,
            max_train_steps=self.max_train_steps,
        )

    def _latent_shape(self, batch: GlobalBatch) -> tuple[int, int, int]:
        width, height = batch.bucket
        factor = self.dataset.latent_factor
        return self.latent_channels, height // factor, width // factor


def epoch_addresses(
    dataset: Dataset, epoch: int, *, processes: int = 1, accumulation: int = 1, first: int = 0
) -> list[BatchAddress]:
    """The addresses of one epoch, from batch `first` on.

    An optimizer step takes `accumulation` batches, the last of an epoch what is left.
    """
    count = dataset.batches_per_epoch(processes)
    steps_before = (epoch - 1) * -(-count // accumulation)
    return [BatchAddress(epoch, number, steps_before + number // accumulation) for number in range(first, count)]


def load_batches(
    batches: TrainingBatches,
    addresses: Iterable[BatchAddress],
    *,
    workers: int = 0,
    ahead: int = 4,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches at these addresses, in order, made `ahead` of their use by each worker.

    Pass the addresses of all epochs at once, and no worker is started twice.

    Raises:
        UserError: as `TrainingBatches` does, also out of a worker.
    """
    loader: Iterable[Batch | _Failure] = torch.utils.data.DataLoader(
        _InWorker(batches),
        sampler=list(addresses),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    for batch in loader:
        if isinstance(batch, _Failure):
            raise UserError(batch.what, where=batch.where, remedy=batch.remedy)
        yield batch


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Let a worker live on when Ctrl-C or SIGTERM goes to the whole process group: the trainer still ends its step.

    A second SIGTERM ends it; that is how Python clears up processes that are left at its exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _once)


def _once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


class _Failure(NamedTuple):
    """A mistake on its way out of a worker: torch would turn the exception into one with a traceback as its text."""

    what: str
    where: str | None
    remedy: str | None


class _InWorker(torch.utils.data.Dataset[Batch | _Failure]):
    def __init__(self, batches: TrainingBatches) -> None:
        self.batches = batches

    def __getitem__(self, address: BatchAddress) -> Batch | _Failure:
        try:
            return self.batches[address]
        except UserError as error:
            return _Failure(error.what, error.where, error.remedy)


@lru_cache(maxsize=2)
def _epoch(dataset: Dataset, epoch: int, seed: int, processes: int) -> list[GlobalBatch]:
    """An epoch's order, remembered while its batches are asked for."""
    return dataset.epoch(epoch, seed=seed, processes=processes)
