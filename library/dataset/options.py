"""What the command line says about the data, and what every dataset and subset means once all sources are put together.

`DatasetOptions` comes from the door. `DatasetSettings` and `SubsetSettings` are the result of the lookup subset -> dataset
-> general -> command line -> default (`sources.py`); nothing further in looks anything up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from library.dataset.buckets import BucketSettings
from library.dataset.captions import CaptionSettings

DEFAULT_CAPTION_EXTENSION = ".caption"
INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """The data of one run. Fields are named as the options of the command line; all but the first five are fall-backs
    for keys that the dataset file leaves out.

    Args:
        dataset_config: dataset file, .toml or .json; the next three are then not used.
        train_data_dir: parent of folders like "10_sks dog"; with `in_json` the folder of the images.
        reg_data_dir: the same for regularisation images.
        in_json: metadata file, .json or .jsonl.
        on_bad_image: an unreadable image: "stop" ends the command with all such images named, "skip" trains without them.
        dataset_repeats, train_batch_size: `num_repeats` and `batch_size` of the dataset file.
        resolution: "width,height" or "size", pixels.
        face_crop_aug_range: "min,max": side of the crop in face sizes.
        prior_loss_weight: loss weight of regularisation images.
        cache_latents: encode every image once and keep the result in memory.
        cache_latents_to_disk: keep it in files instead; implies `cache_latents`.
        vae_batch_size: images per call of the VAE while caching.
        skip_cache_check: trust cache files by their names alone.
    """

    dataset_config: Path | None = None
    train_data_dir: Path | None = None
    reg_data_dir: Path | None = None
    in_json: Path | None = None
    on_bad_image: Literal["stop", "skip"] = "stop"

    train_batch_size: int = 1
    dataset_repeats: int = 1
    resolution: str | None = None
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    resize_interpolation: str | None = None

    caption_extension: str = DEFAULT_CAPTION_EXTENSION
    caption_separator: str = ","
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0

    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: str | None = None
    alpha_mask: bool = False
    cache_info: bool = False

    prior_loss_weight: float = 1.0
    cache_latents: bool = False
    cache_latents_to_disk: bool = False
    vae_batch_size: int = 1
    skip_cache_check: bool = False

    @property
    def caches_latents(self) -> bool:
        return self.cache_latents or self.cache_latents_to_disk


@dataclass(frozen=True, kw_only=True)
class SubsetSettings:
    """One subset, complete.

    Args:
        where: its place, for sentences ("data.toml: [[datasets]] 1, [[datasets.subsets]] 2", "--train_data_dir x/10_dog").
        image_dir: folder of the images; for metadata with absolute paths it may be None.
        metadata_file: makes this a fine-tuning subset.
        is_reg: regularisation images.
        class_tokens: the caption of an image without a caption file.
        alpha_mask: transparent parts do not count in the loss.
    """

    where: str
    image_dir: Path | None
    metadata_file: Path | None = None
    is_reg: bool = False
    class_tokens: str | None = None
    num_repeats: int = 1
    caption_extension: str = DEFAULT_CAPTION_EXTENSION
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    resize_interpolation: str | None = None
    alpha_mask: bool = False
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """A short name for tables: the folder's or the metadata file's."""
        source = self.image_dir if self.metadata_file is None else self.metadata_file
        return source.name if source else self.where


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """One dataset, complete: what is batched together."""

    where: str
    batch_size: int
    buckets: BucketSettings
    subsets: tuple[SubsetSettings, ...]
    resize_interpolation: str | None = None

    @property
    def is_dreambooth(self) -> bool:
        return all(subset.metadata_file is None for subset in self.subsets)
