"""What the text encoders give for every caption of a run, computed before the denoiser is loaded: in memory or on disk.

On disk an entry is one safetensors file in `text_cache/` beside the first image that has the caption,

    <key>.safetensors     context: (1, L, D); pooled: (1, P), where the family takes one; in the precision of the run

The key is a hash of all that decides about a condition: the tokens as every text encoder reads them (and so the caption as
it is processed, its weights and its length), clip skip, the text encoders' values and the precision. An entry that is
damaged is made again, alone. sd-scripts' `_te_outputs.npz` are not read: they do not say which caption they hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.conditioning.condition import Condition, joined
from library.conditioning.text_encoders import TextEncoders
from library.dataset.cache_files import CacheKind, DamagedError, prepare_folders, read_entry, tensors_of, write_entry
from library.errors import UserError
from library.training.conditions import ConditionsOf, tokens_of
from library.training.options import CaptionEncodingOptions

FOLDER = "text_cache"
LAYOUT = 1  # raised when entries of before can no longer be used
TEXTS = CacheKind("text encoder outputs", "keep them in memory with --cache_text_encoder_outputs alone")
MOST_BYTES = 2**32
AT_ONCE = 16  # captions
SHOWN = 60  # characters of a caption in a sentence

Progress = Callable[[int, int], None]  # (captions done, captions to do)


class MemoryTexts:
    """Conditions in the host's memory, by caption."""

    def __init__(self) -> None:
        self._conditions: dict[str, Condition] = {}

    def missing(self, captions: Sequence[str]) -> list[str]:
        return [caption for caption in captions if caption not in self._conditions]

    def store(self, caption: str, condition: Condition) -> None:
        self._conditions[caption] = condition

    def read(self, caption: str) -> Condition:
        return self._conditions[caption]


@dataclass(frozen=True, kw_only=True)
class DiskTexts:
    """Conditions on disk; see the head of this file.

    Attributes:
        folders: caption -> the folder of the image that it stands beside.
        texts: the tokenizers that read the captions; its modules are not used.
        fingerprint: of the text encoders' values and of the precision in which they compute.
        trust: look at names alone.
    """

    folders: Mapping[str, Path]
    texts: TextEncoders
    options: CaptionEncodingOptions
    fingerprint: str
    trust: bool = False

    def prepare(self) -> None:
        """Make the folders; `UserError` for those that cannot be written."""
        prepare_folders((folder / FOLDER for folder in self.folders.values()), TEXTS)

    def settings(self, caption: str) -> str:
        """All that decides about a condition, as text."""
        tokens = hashlib.blake2b(digest_size=16)
        for batch in tokens_of([caption], self.texts, self.options):
            weights = [] if batch.weights is None else [batch.weights]
            for part in (batch.ids, *weights):
                tokens.update(f"{tuple(part.shape)}".encode() + part.numpy().tobytes())
        facts = {
            "layout": LAYOUT,
            "text encoders": self.fingerprint,
            "clip_skip": self.options.clip_skip,
            "tokens": tokens.hexdigest(),
        }
        return json.dumps(facts, sort_keys=True)

    def path(self, caption: str) -> Path:
        return self._path(caption, self.settings(caption))

    def missing(self, captions: Sequence[str]) -> list[str]:
        return [caption for caption in captions if not self._is_valid(caption)]

    def store(self, caption: str, condition: Condition) -> None:
        tensors = {"context": condition.context} | ({} if condition.pooled is None else {"pooled": condition.pooled})
        settings = self.settings(caption)
        write_entry(self._path(caption, settings), tensors, {"settings": settings, "caption": caption}, TEXTS)

    def read(self, caption: str) -> Condition:
        tensors = tensors_of(self.path(caption), TEXTS)
        return Condition(tensors["context"], tensors.get("pooled"))

    def _path(self, caption: str, settings: str) -> Path:
        key = hashlib.blake2b(settings.encode(), digest_size=10).hexdigest()
        return self.folders[caption] / FOLDER / f"{key}.safetensors"

    def _is_valid(self, caption: str) -> bool:
        settings = self.settings(caption)
        path = self._path(caption, settings)
        if self.trust:
            return path.is_file()
        try:
            return read_entry(path)[1].get("settings") == settings
        except (DamagedError, OSError):
            return False


def folders_of_captions(pairs: Iterable[tuple[str, Any]], *, most: int) -> dict[str, Path] | None:
    """Every different caption of (caption, image), with the folder of its first image; None for more than `most`."""
    folders: dict[str, Path] = {}
    for caption, image in pairs:
        folders.setdefault(caption, image.path.parent)
        if len(folders) > most:
            return None
    return folders


def fill(
    cache: MemoryTexts | DiskTexts, captions: Sequence[str], load: Callable[[], ConditionsOf], *, progress: Progress
) -> None:
    """Encode the captions that the cache lacks.

    Args:
        load: loads the text encoders; called if there is something to encode.

    Raises:
        UserError: conditions that are not finite, or that cannot be written.
    """
    missing = cache.missing(captions)
    if not missing:
        return
    encode = load()
    for start in range(0, len(missing), AT_ONCE):
        several = missing[start : start + AT_ONCE]
        with torch.no_grad():
            conditions = encode(several).to(device=torch.device("cpu")).split()
        for caption, condition in zip(several, conditions, strict=True):
            _check_finite(caption, condition)
            # a copy: what is split off a batch would keep the whole batch in memory
            cache.store(caption, Condition(condition.context.clone(), _cloned(condition.pooled)))
        progress(start + len(several), len(missing))


def reader(cache: MemoryTexts | DiskTexts, device: torch.device) -> ConditionsOf:
    """The cache's conditions, on a device."""
    return lambda captions: joined([cache.read(caption) for caption in captions]).to(device)


def _cloned(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _check_finite(caption: str, condition: Condition) -> None:
    parts = [condition.context] if condition.pooled is None else [condition.context, condition.pooled]
    if not all(bool(part.isfinite().all()) for part in parts):
        shown = caption if len(caption) <= SHOWN else f"{caption[:SHOWN]}..."
        remedy = "use --mixed_precision bf16 or no"
        raise UserError("the text encoders give numbers that are not finite", where=f"caption {shown!r}", remedy=remedy)
