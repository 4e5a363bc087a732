"""What is said about the data: before training, for --debug_dataset, and in the saved file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from library.dataset.buckets import Size
from library.dataset.captions import process_caption, tag_frequency
from library.dataset.dataset import Dataset, DatasetImage
from library.dataset.options import DatasetSettings, SubsetSettings
from library.errors import some_names
from library.streams import python_stream

BYTES_PER_LATENT = 2 * 4 * 4  # mean and spread, 4 channels, fp32
NOTABLE_CROP = 0.25  # share of the image
NOTABLE_ENLARGEMENT = 1.5


@dataclass(frozen=True)
class SubsetSummary:
    """One subset: how many images it has, and how often they are used in an epoch."""

    dataset: int
    settings: SubsetSettings
    images: int
    samples: int
    share: float
    exposures: tuple[int, int]  # fewest and most of an image, per epoch


@dataclass(frozen=True)
class BucketSummary:
    """One bucket: its images, the batches they give, and what scaling and cutting does to them."""

    dataset: int
    size: Size
    images: int
    samples: int
    batches: int
    mean_crop: float


def subset_summaries(dataset: Dataset) -> list[SubsetSummary]:
    """All subsets in order; a subset whose images are all surplus has none."""
    summaries = []
    for number, settings in enumerate(dataset.settings):
        for place, subset in enumerate(settings.subsets):
            repeats = [image.repeats for image in dataset.images if (image.dataset, image.subset) == (number, place)]
            share, exposures = sum(repeats) / len(dataset.samples), (min(repeats, default=0), max(repeats, default=0))
            summaries.append(SubsetSummary(number, subset, len(repeats), sum(repeats), share, exposures))
    return summaries


def bucket_summaries(dataset: Dataset, *, processes: int = 1) -> list[BucketSummary]:
    """All buckets that have images, by dataset and size."""
    members: dict[tuple[int, Size], list[DatasetImage]] = {}
    for image in dataset.images:
        members.setdefault((image.dataset, image.fit.bucket), []).append(image)
    summaries = []
    for (number, size), samples in dataset.buckets.items():
        images = members[number, size]
        batches = -(-len(samples) // (dataset.settings[number].batch_size * processes))
        crop = sum(image.fit.cropped_share for image in images) / len(images)
        summaries.append(BucketSummary(number, size, len(images), len(samples), batches, crop))
    return summaries


def sample_counts(dataset: Dataset) -> tuple[int, int]:
    """(training, regularisation) samples of an epoch, repeats included."""
    reg = sum(image.repeats for image in dataset.images if dataset.subset_of(image).is_reg)
    return len(dataset.samples) - reg, reg


def report_lines(dataset: Dataset, *, processes: int = 1, epochs: int | None = None, cut_short: bool = False) -> list[str]:
    """The part of the plan about the data, for people.

    Args:
        epochs: adds how often each image is seen in the run.
        cut_short: the run ends within the last of them.
    """
    train, reg = sample_counts(dataset)
    total = f"{train + reg} samples an epoch"
    total += f" ({train} training, {reg} regularisation)" if reg else ""
    lines = [f"{len(dataset.images)} images, {total}, {dataset.batches_per_epoch(processes)} batches an epoch"]
    subsets, buckets = subset_summaries(dataset), bucket_summaries(dataset, processes=processes)
    for number, settings in enumerate(dataset.settings):
        lines.append(_dataset_line(number, settings))
        lines += [_subset_line(dataset, one, epochs, cut_short) for one in subsets if one.dataset == number]
        lines += [_bucket_line(one) for one in buckets if one.dataset == number]
        surplus = dataset.surplus_reg_images[number]
        if surplus:
            lines.append(f"  {surplus} regularisation images are not used: there are not as many training samples")
    lines += _remarkable(dataset)
    if dataset.options.caches_latents:
        lines.append(_cache_line(dataset))
    lines += [f"note: {notice}" for notice in dataset.notices]
    lines += [f"left out: {path}: {reason}" for path, reason in dataset.bad_images]
    return lines


def debug_lines(dataset: Dataset, *, seed: int, epoch: int = 1) -> list[str]:
    """Every sample of an epoch in its order: batch, bucket, image, cut, and the caption as the text encoder gets it."""
    from library.dataset.pixels import draw_reading

    lines = []
    for number, batch in enumerate(dataset.epoch(epoch, seed=seed)):
        lines.append(f"batch {number}: dataset {batch.dataset + 1}, {_by(batch.bucket)}")
        for index in batch.samples:
            sample = dataset.samples[index]
            image = sample.image
            reading = draw_reading(dataset, sample, seed=seed, epoch=epoch)
            captions = dataset.subset_of(image).captions
            caption = process_caption(image.caption, captions, python_stream(seed, "caption", epoch, index), epoch=epoch)
            left, top = reading.offset
            way = (
                f"{_by(image.size)} -> {_by(reading.fit.resized)}, cut at {left},{top}{', mirrored' if reading.flip else ''}"
            )
            lines.append(f"  sample {index}: {image.path}, {way}, weight {dataset.loss_weight(image):g}: {caption!r}")
    return lines


def dataset_metadata(dataset: Dataset, *, processes: int = 1, accumulation: int = 1) -> dict[str, str]:
    """The ss_* fields about images, captions and buckets, as other tools expect them in the saved file."""
    subsets = subset_summaries(dataset)
    frequency = {
        name: tag_frequency(image.tags for image in _images_of(dataset, one))
        for name, one in _named(one for one in subsets if not one.settings.is_reg)
    }
    fields: dict[str, Any] = {
        "ss_tag_frequency": json.dumps(frequency, ensure_ascii=False),
        "ss_dataset_dirs": json.dumps(_folders(one for one in subsets if not one.settings.is_reg), ensure_ascii=False),
    }
    if dataset.options.dataset_config is not None:
        described = [_described(dataset, number, subsets) for number in range(len(dataset.settings))]
        fields["ss_datasets"] = json.dumps(described, ensure_ascii=False)
        return fields
    (settings,), options = dataset.settings, dataset.options
    fields |= {
        "ss_batch_size_per_device": settings.batch_size,
        "ss_total_batch_size": settings.batch_size * processes * accumulation,
        "ss_resolution": settings.buckets.resolution,
        "ss_color_aug": options.color_aug,
        "ss_flip_aug": options.flip_aug,
        "ss_random_crop": options.random_crop,
        "ss_shuffle_caption": options.shuffle_caption,
        "ss_enable_bucket": settings.buckets.enabled,
        "ss_bucket_no_upscale": settings.buckets.no_upscale,
        "ss_min_bucket_reso": settings.buckets.min_reso,
        "ss_max_bucket_reso": settings.buckets.max_reso,
        "ss_keep_tokens": options.keep_tokens,
        "ss_reg_dataset_dirs": json.dumps(_folders(one for one in subsets if one.settings.is_reg), ensure_ascii=False),
        "ss_bucket_info": json.dumps(_bucket_info(dataset, 0)),
    }
    return {name: str(value) for name, value in fields.items()}


def _dataset_line(number: int, settings: DatasetSettings) -> str:
    buckets = settings.buckets
    shape = f"every image at {_by(buckets.resolution)}"
    if buckets.enabled:
        limits = "nothing enlarged" if buckets.no_upscale else f"sides {buckets.limits[0]} to {buckets.limits[1]}"
        shape = f"buckets of the area of {_by(buckets.resolution)}, {limits} by {buckets.step}"
    return f"dataset {number + 1}: batch size {settings.batch_size}, {shape}"


def _subset_line(dataset: Dataset, one: SubsetSummary, epochs: int | None, cut_short: bool) -> str:
    low, high = one.exposures
    seen = f"each {_from_to(low, high)} {'time' if high == 1 else 'times'} an epoch"
    if epochs is not None:
        seen += f" ({_from_to(low * (epochs - cut_short), high * epochs)} in the run)"
    kind = f", regularisation with loss weight {dataset.options.prior_loss_weight:g}" if one.settings.is_reg else ""
    return f"  {one.settings.title}: {one.images} images, {seen}, {one.share:.0%} of the samples{kind}"


def _from_to(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _bucket_line(one: BucketSummary) -> str:
    return (
        f"  {_by(one.size)}: {one.images} images, {one.samples} samples, {one.batches} batches, "
        f"{one.mean_crop:.0%} cut off on average"
    )


def _remarkable(dataset: Dataset) -> list[str]:
    """Images that lose much to the cut, or are enlarged much, by name."""
    cropped = sorted((image for image in dataset.images if image.fit.cropped_share >= NOTABLE_CROP), key=_crop, reverse=True)
    enlarged = sorted((image for image in dataset.images if _scale(image) >= NOTABLE_ENLARGEMENT), key=_scale, reverse=True)
    lines = []
    if cropped:
        names = some_names([f"{image.path.name} ({_crop(image):.0%})" for image in cropped])
        lines.append(f"note: {len(cropped)} images lose a quarter or more of their area to the cut: {names}")
    if enlarged:
        names = some_names([f"{image.path.name} ({_scale(image):.1f}x)" for image in enlarged])
        lines.append(f"note: {len(enlarged)} images are enlarged {NOTABLE_ENLARGEMENT} times or more: {names}")
    return lines


def _crop(image: DatasetImage) -> float:
    return image.fit.cropped_share


def _scale(image: DatasetImage) -> float:
    return max(image.fit.resized[0] / image.size[0], image.fit.resized[1] / image.size[1])


def _cache_line(dataset: Dataset) -> str:
    place = "on disk, in latent_cache beside the images" if dataset.options.cache_latents_to_disk else "in memory"
    pixels = sum(
        image.fit.bucket[0] * image.fit.bucket[1] * (2 if dataset.subset_of(image).flip_aug else 1)
        for image in dataset.images
    )
    return f"latents are cached {place}, {pixels / dataset.latent_factor**2 * BYTES_PER_LATENT / 2**20:.0f} MiB"


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _images_of(dataset: Dataset, one: SubsetSummary) -> Iterable[DatasetImage]:
    return (image for image in dataset.images if image.dataset == one.dataset and dataset.subset_of(image) is one.settings)


def _named(subsets: Iterable[SubsetSummary]) -> list[tuple[str, SubsetSummary]]:
    """Subsets by the base name of their folder; a name that comes again gets a number."""
    named: dict[str, SubsetSummary] = {}
    for one in subsets:
        base, number = one.settings.title, 1
        name = base
        while name in named:
            number += 1
            name = f"{base} ({number})"
        named[name] = one
    return list(named.items())


def _folders(subsets: Iterable[SubsetSummary]) -> dict[str, dict[str, int]]:
    return {name: {"n_repeats": one.settings.num_repeats, "img_count": one.images} for name, one in _named(subsets)}


def _described(dataset: Dataset, number: int, subsets: Iterable[SubsetSummary]) -> dict[str, Any]:
    """One entry of ss_datasets."""
    settings = dataset.settings[number]
    own = [one for one in subsets if one.dataset == number]
    buckets = settings.buckets
    return {
        "is_dreambooth": settings.is_dreambooth,
        "batch_size_per_device": settings.batch_size,
        "num_train_images": sum(one.samples for one in own if not one.settings.is_reg),
        "num_reg_images": sum(one.samples for one in own if one.settings.is_reg),
        "resolution": buckets.resolution,
        "enable_bucket": buckets.enabled,
        "min_bucket_reso": buckets.min_reso,
        "max_bucket_reso": buckets.max_reso,
        "tag_frequency": {
            name: tag_frequency(image.tags for image in _images_of(dataset, one))
            for name, one in _named(one for one in own if not one.settings.is_reg)
        },
        "bucket_info": _bucket_info(dataset, number),
        "resize_interpolation": settings.resize_interpolation,
        "subsets": [_described_subset(one) for one in own],
    }


def _described_subset(one: SubsetSummary) -> dict[str, Any]:
    settings, captions = one.settings, one.settings.captions
    described: dict[str, Any] = {
        "img_count": one.images,
        "num_repeats": settings.num_repeats,
        "color_aug": settings.color_aug,
        "flip_aug": settings.flip_aug,
        "random_crop": settings.random_crop,
        "shuffle_caption": captions.shuffle_caption,
        "keep_tokens": captions.keep_tokens,
        "keep_tokens_separator": captions.keep_tokens_separator,
        "secondary_separator": captions.secondary_separator,
        "enable_wildcard": captions.enable_wildcard,
        "caption_prefix": captions.caption_prefix,
        "caption_suffix": captions.caption_suffix,
        "resize_interpolation": settings.resize_interpolation,
    }
    if settings.image_dir is not None:
        described["image_dir"] = os.path.basename(settings.image_dir)
    if settings.metadata_file is not None:
        return described | {"metadata_file": os.path.basename(settings.metadata_file)}
    return described | {"class_tokens": settings.class_tokens, "is_reg": settings.is_reg}


def _bucket_info(dataset: Dataset, number: int) -> dict[str, Any]:
    """Buckets in order with their samples, and the mean difference of width/height between images and their buckets."""
    buckets = [one for one in bucket_summaries(dataset) if one.dataset == number]
    images = [image for image in dataset.images if image.dataset == number]
    errors = [abs(image.size[0] / image.size[1] - image.fit.bucket[0] / image.fit.bucket[1]) for image in images]
    return {
        "buckets": {str(place): {"resolution": one.size, "count": one.samples} for place, one in enumerate(buckets)},
        "mean_img_ar_error": sum(errors) / len(errors),
    }
