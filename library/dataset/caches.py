"""Latent caches: every image goes through the VAE once, and its posterior (mean and spread) is kept, in memory or on disk.

The posterior is kept in fp32 and a new latent is drawn from it at every use, so cached training sees exactly what uncached
training sees. On disk an entry is one safetensors file in `latent_cache/` beside the image,

    <image name>_<key>.safetensors     mean, std: (C, h, w) fp32; mask: (1, h, w) fp32, where alpha_mask is on

128 KiB for 512x512. The key is a hash of everything but the image that decides about the latents: sizes, filter, flip, mask,
the VAE and its precision. So other settings get entries of their own, and going back finds the old ones. The image itself is
recognised by size, times and inode, and where one of these differs by a hash of its content. An entry that is damaged or
belongs to another content is rebuilt, alone. The .npz caches of sd-scripts are not read: they do not say what they hold.

With several processes each builds a share of the entries on disk; a cache in memory is built whole by each of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from library.dataset.buckets import Size
from library.dataset.cache_files import CacheKind, DamagedError, prepare_folders, read_entry, tensors_of, write_entry
from library.dataset.dataset import Dataset, DatasetImage, bad_image_problems
from library.dataset.images import BadImageError
from library.dataset.pixels import Prepared, centred, load
from library.errors import UserError, raise_all

FOLDER = "latent_cache"
LAYOUT = 1  # raised when entries of before can no longer be used
THREADS = 8
READ_AHEAD = 32  # images
NO_ENTRY = "could not be decoded when the latents were cached"
LATENTS = CacheKind("latents", "keep latents in memory with --cache_latents alone")

Progress = Callable[[int, int], None]  # (images done, images to do)


@dataclass(frozen=True)
class StoredLatents:
    """The posterior of one image: `mean`, `std` (C, h, w) fp32 in the VAE's units; `mask` (1, h, w) fp32 or None."""

    mean: Tensor
    std: Tensor
    mask: Tensor | None


class LatentCache(Protocol):
    """Where the latents of all images of a run are found."""

    bad_images: dict[Path, str]

    def read(self, image: DatasetImage, flip: bool) -> StoredLatents: ...


@dataclass(frozen=True)
class _Source:
    """An image file at one moment: what is cheap to compare, and its content's hash."""

    state: list[int]
    content: str


@dataclass(frozen=True)
class _Entry:
    """One posterior to be made."""

    image: DatasetImage
    flip: bool


def encode_posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The VAE's posterior of pixels; training without a cache uses this too.

    Args:
        vae: an AutoencoderKL; runs where it is and in its own precision.
        pixels: (B, 3, H, W) in [-1, 1].

    Returns:
        mean and standard deviation, (B, C, h, w) fp32 in the VAE's units, on its device.
    """
    parameter = next(vae.parameters())
    with torch.no_grad():
        posterior = vae.encode(pixels.to(parameter.device, parameter.dtype)).latent_dist
    return posterior.mean.float(), posterior.std.float()


def build_latent_cache(
    dataset: Dataset,
    vae: Any,
    vae_fingerprint: str,
    *,
    rank: int = 0,
    processes: int = 1,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> LatentCache:
    """Encode every image that has no valid entry yet. With several processes, wait for all of them after this.

    Args:
        vae: an AutoencoderKL, where and in the precision that it is to run.
        vae_fingerprint: tells VAEs apart, part of the key.
        rank, processes: this process builds its share of the entries on disk.
        say: is told what there is to do, and which images are left out.
        progress: is told how far it is, in posteriors.

    Raises:
        UserError: latents that are not finite, a folder that cannot be written, or (on_bad_image "stop") unreadable images.
    """
    say = say or (lambda line: None)
    precision = str(next(vae.parameters()).dtype)
    cache: DiskLatents | MemoryLatents = MemoryLatents()
    entries = all_entries(dataset)
    if dataset.options.cache_latents_to_disk:
        cache = DiskLatents(dataset, f"{vae_fingerprint} {precision}")
        prepare_folders((image.path.parent / FOLDER for image in dataset.images), LATENTS)
        own = entries[rank::processes]
        entries = cache.missing(own, trust=dataset.options.skip_cache_check)
        say(f"latent cache: {len(entries)} of {len(own)} entries are missing or out of date")
    elif not dataset.options.cache_latents:
        raise ValueError("the options do not ask for cached latents")
    _encode_all(dataset, vae, entries, cache, progress or (lambda done, total: None))
    if dataset.options.on_bad_image == "stop":
        raise_all(bad_image_problems(list(cache.bad_images.items())))
    for path, reason in cache.bad_images.items():
        say(f"left out: {path}: {reason}")
    return cache


def all_entries(dataset: Dataset) -> list[_Entry]:
    """Every posterior that the dataset needs: with flip_aug two of an image."""
    return [
        _Entry(image, flip)
        for image in dataset.images
        for flip in ((False, True) if dataset.subset_of(image).flip_aug else (False,))
    ]


class MemoryLatents:
    """A cache in memory: one tensor for each bucket, so that few objects go to the workers."""

    def __init__(self) -> None:
        self.bad_images: dict[Path, str] = {}
        self._places: dict[tuple[int, int, Path, bool], tuple[Size, int]] = {}
        self._waiting: dict[Size, list[Tensor]] = {}
        self._stacks: dict[Size, Tensor] = {}
        self._masks: dict[tuple[int, int, Path, bool], Tensor] = {}

    def read(self, image: DatasetImage, flip: bool) -> StoredLatents:
        """One entry.

        Raises:
            BadImageError: the image could not be decoded.
        """
        key = (image.dataset, image.subset, image.path, flip)
        if key not in self._places:
            raise BadImageError(NO_ENTRY)
        bucket, row = self._places[key]
        mean, std = self._stacks[bucket][row]
        return StoredLatents(mean, std, self._masks.get(key))

    def store(self, entry: _Entry, source: _Source, latents: StoredLatents) -> None:
        image = entry.image
        key = (image.dataset, image.subset, image.path, entry.flip)
        rows = self._waiting.setdefault(image.fit.bucket, [])
        self._places[key] = image.fit.bucket, len(rows)
        rows.append(torch.stack([latents.mean, latents.std]))
        if latents.mask is not None:
            self._masks[key] = latents.mask

    def finish(self) -> None:
        while self._waiting:
            bucket, rows = self._waiting.popitem()
            self._stacks[bucket] = torch.stack(rows)


class DiskLatents:
    """A cache on disk; see the head of this file."""

    def __init__(self, dataset: Dataset, vae_identity: str) -> None:
        self.dataset, self.vae_identity = dataset, vae_identity
        self.bad_images: dict[Path, str] = {}

    def settings(self, image: DatasetImage, flip: bool) -> str:
        """All that decides about an entry except the image's content, as text."""
        subset = self.dataset.subset_of(image)
        facts = {
            "layout": LAYOUT,
            "vae": self.vae_identity,
            "bucket": image.fit.bucket,
            "resized": image.fit.resized,
            "interpolation": subset.resize_interpolation,
            "flip": flip,
            "mask": subset.alpha_mask,
        }
        return json.dumps(facts, sort_keys=True)

    def path(self, image: DatasetImage, flip: bool) -> Path:
        key = hashlib.blake2b(self.settings(image, flip).encode(), digest_size=6).hexdigest()
        return image.path.parent / FOLDER / f"{image.path.name}_{key}.safetensors"

    def read(self, image: DatasetImage, flip: bool) -> StoredLatents:
        """One entry.

        Raises:
            BadImageError: there is none, because the image could not be decoded.
            UserError: it was damaged after the cache was checked.
        """
        try:
            tensors = tensors_of(self.path(image, flip), LATENTS)
        except FileNotFoundError:
            raise BadImageError(NO_ENTRY) from None
        return StoredLatents(tensors["mean"], tensors["std"], tensors.get("mask"))

    def missing(self, entries: Sequence[_Entry], *, trust: bool) -> list[_Entry]:
        """The entries that have to be made: no valid file. `trust` looks at names alone."""
        unique = {self.path(entry.image, entry.flip): entry for entry in entries}
        if trust:
            return [entry for path, entry in unique.items() if not path.is_file()]
        with ThreadPoolExecutor(THREADS) as pool:
            return [
                entry
                for entry, valid in zip(unique.values(), pool.map(self._is_valid, unique.values()), strict=True)
                if not valid
            ]

    def store(self, entry: _Entry, source: _Source, latents: StoredLatents) -> None:
        facts = {
            "settings": self.settings(entry.image, entry.flip),
            "content": source.content,
            "source": json.dumps(source.state),
        }
        tensors = {"mean": latents.mean, "std": latents.std}
        if latents.mask is not None:
            tensors["mask"] = latents.mask
        write_entry(self.path(entry.image, entry.flip), tensors, facts, LATENTS)

    def finish(self) -> None:
        """Nothing is left to do: entries are complete as they are written."""

    def _is_valid(self, entry: _Entry) -> bool:
        """Whether an entry is whole, made with these settings and of what the image file holds now."""
        from safetensors.torch import load as load_tensors

        path = self.path(entry.image, entry.flip)
        try:
            data, facts = read_entry(path)
            state = json.loads(facts["source"])
        except (DamagedError, FileNotFoundError, KeyError, ValueError):
            return False
        if facts.get("settings") != self.settings(entry.image, entry.flip):
            return False
        source = entry.image.path
        try:
            state_now = source_state(source)
            if state == state_now:
                return True
            if facts.get("content") != content_hash(source.read_bytes()):
                return False
        except OSError:
            return False
        with suppress(UserError):  # then only the short way of the next check is lost
            known = {name: facts[name] for name in ("settings", "content")}
            write_entry(path, load_tensors(data), {**known, "source": json.dumps(state_now)}, LATENTS)
        return True


def source_state(path: Path) -> list[int]:
    """What changes whenever a file is edited, replaced or renamed: size, time of content, time of status, inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def content_hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _encode_all(
    dataset: Dataset, vae: Any, entries: Sequence[_Entry], cache: DiskLatents | MemoryLatents, progress: Progress
) -> None:
    """Decode ahead in threads, encode by bucket, store in threads."""
    batches = _batches(entries, dataset.options.vae_batch_size)
    stored: deque[Future[None]] = deque()
    done = 0
    with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(1) as writer:
        for batch in _load_ahead(dataset, batches, readers):
            good = [(entry, *result) for entry, result in batch if not isinstance(result, BadImageError)]
            cache.bad_images.update((entry.image.path, str(r)) for entry, r in batch if isinstance(r, BadImageError))
            if good:
                mean, std = encode_posterior(vae, torch.stack([prepared.pixels for _, prepared, _ in good]))
                for (entry, prepared, source), one_mean, one_std in zip(good, mean.cpu(), std.cpu(), strict=True):
                    _check_finite(entry, one_mean, one_std)
                    latents = StoredLatents(one_mean, one_std, prepared.mask)
                    stored.append(writer.submit(cache.store, entry, source, latents))
            while stored and (stored[0].done() or len(stored) > READ_AHEAD):
                stored.popleft().result()
            done += len(batch)
            progress(done, len(entries))
        for future in stored:
            future.result()
    cache.finish()


def _batches(entries: Sequence[_Entry], size: int) -> list[list[_Entry]]:
    """Entries of one bucket each, at most `size` together."""
    by_bucket: dict[Size, list[_Entry]] = {}
    for entry in entries:
        by_bucket.setdefault(entry.image.fit.bucket, []).append(entry)
    return [group[start : start + size] for group in by_bucket.values() for start in range(0, len(group), size)]


_Loaded = tuple[Prepared, _Source] | BadImageError


def _load_ahead(
    dataset: Dataset, batches: Sequence[list[_Entry]], pool: ThreadPoolExecutor
) -> Iterator[list[tuple[_Entry, _Loaded]]]:
    """Every batch with its images decoded; at least READ_AHEAD images are in the making."""
    waiting: deque[list[tuple[_Entry, Future[_Loaded]]]] = deque()
    ahead = 0
    for batch in batches:
        waiting.append([(entry, pool.submit(_load, dataset, entry)) for entry in batch])
        ahead += len(batch)
        while ahead - len(waiting[0]) >= READ_AHEAD:
            first = waiting.popleft()
            ahead -= len(first)
            yield [(entry, future.result()) for entry, future in first]
    for rest in waiting:
        yield [(entry, future.result()) for entry, future in rest]


def _load(dataset: Dataset, entry: _Entry) -> _Loaded:
    """One image, decoded and prepared from the very bytes that are hashed."""
    image = entry.image
    try:
        state = source_state(image.path)
        data = image.path.read_bytes()
        prepared = load(dataset, image, centred(image, flip=entry.flip), data=BytesIO(data))
    except BadImageError as error:
        return error
    except OSError as error:
        return BadImageError(f"cannot be read ({error.strerror})")
    return prepared, _Source(state, content_hash(data))


def _check_finite(entry: _Entry, mean: Tensor, std: Tensor) -> None:
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        remedy = "run the VAE in fp32 (--no_half_vae), or give another --vae"
        raise UserError("the VAE gives latents that are not numbers", where=str(entry.image.path), remedy=remedy)
