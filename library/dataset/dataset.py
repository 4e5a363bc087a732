"""The data of a run: which images there are, at which sizes, how often, and in which order an epoch goes through them.

A sample is one repeat of one image. Its `index` is its number in every random stream, so that what it draws depends on
neither batch size, buckets, workers nor processes. Epochs are counted from 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from library.dataset.buckets import BucketSettings, Fit, Size, TooSmallError, fit_image, predefined_sizes
from library.dataset.options import DatasetOptions, DatasetSettings, SubsetSettings
from library.errors import UserError, counted, raise_all
from library.streams import python_stream

SHOWN_BAD_IMAGES = 50


@dataclass(frozen=True, slots=True)
class DatasetImage:
    """One image that is trained on.

    Args:
        dataset, subset: numbers in `Dataset.settings` and its `subsets`.
        size: (width, height) as viewers show it.
        caption: before processing; several lines are alternatives.
        tags: the part of the caption that counts as tags.
        fit: its bucket, and the size it is scaled to.
        repeats: samples in an epoch.
    """

    dataset: int
    subset: int
    path: Path
    size: Size
    caption: str
    tags: str
    fit: Fit
    repeats: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One repeat of one image; `index` numbers all samples of the run."""

    index: int
    image: DatasetImage
    repeat: int


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """What all processes together work on at one time: samples of one dataset and bucket.

    Args:
        samples: indices of the samples; fewer than the batch size where the bucket ran out.
    """

    dataset: int
    bucket: Size
    samples: tuple[int, ...]

    def share(self, rank: int, processes: int) -> list[tuple[int, bool]]:
        """(sample index, whether it counts) for one process.

        Every process gets equally many and at least one, because all have to take part in every step; what is missing is
        filled with the batch's first sample, which then must not count.
        """
        length = -(-len(self.samples) // processes)
        own = [(index, True) for index in self.samples[rank * length : (rank + 1) * length]]
        return own + [(self.samples[0], False)] * (length - len(own))


@dataclass(frozen=True, eq=False)
class Dataset:
    """All data of a run. Build it with `scan_dataset`.

    Args:
        options: as the command line gave them.
        settings: one for each dataset, complete.
        images: all that are trained on, in order.
        notices: sentences that the user should read before training.
        bad_images: (image, why) of those left out.
        latent_factor: pixels per latent, each way.
        surplus_reg_images: regularisation images without use, for each dataset.
    """

    options: DatasetOptions
    settings: tuple[DatasetSettings, ...]
    images: tuple[DatasetImage, ...]
    latent_factor: int
    notices: tuple[str, ...] = ()
    bad_images: tuple[tuple[Path, str], ...] = ()
    surplus_reg_images: tuple[int, ...] = field(default=())

    def subset_of(self, image: DatasetImage) -> SubsetSettings:
        return self.settings[image.dataset].subsets[image.subset]

    def loss_weight(self, image: DatasetImage) -> float:
        """prior_loss_weight for regularisation images, else 1."""
        return self.options.prior_loss_weight if self.subset_of(image).is_reg else 1.0

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """Every repeat of every image, by index."""
        pairs = ((image, repeat) for image in self.images for repeat in range(image.repeats))
        return tuple(Sample(index, image, repeat) for index, (image, repeat) in enumerate(pairs))

    @cached_property
    def buckets(self) -> dict[tuple[int, Size], tuple[int, ...]]:
        """Sample indices by (dataset, bucket), in order of dataset and size."""
        members: dict[tuple[int, Size], list[int]] = {}
        for sample in self.samples:
            members.setdefault((sample.image.dataset, sample.image.fit.bucket), []).append(sample.index)
        return {key: tuple(members[key]) for key in sorted(members)}

    def epoch(self, epoch: int, *, seed: int, processes: int = 1) -> list[GlobalBatch]:
        """The batches of one epoch in their order; every sample is in exactly one.

        Args:
            epoch: counted from 1.
            processes: a global batch holds batch_size x processes samples.
        """
        if epoch < 1:
            raise ValueError(f"epochs are counted from 1, not {epoch}")
        batches = []
        for (dataset, bucket), members in self.buckets.items():
            indices = list(members)
            python_stream(seed, "order of samples", epoch, dataset, *bucket).shuffle(indices)
            size = self.settings[dataset].batch_size * processes
            for start in range(0, len(indices), size):
                batches.append(GlobalBatch(dataset, bucket, tuple(indices[start : start + size])))
        python_stream(seed, "order of batches", epoch).shuffle(batches)
        return batches

    def batches_per_epoch(self, processes: int = 1) -> int:
        """How many global batches every epoch has."""
        sizes = ((self.settings[dataset].batch_size * processes, len(m)) for (dataset, _), m in self.buckets.items())
        return sum(-(-count // size) for size, count in sizes)

    def without(self, bad_images: Iterable[tuple[Path, str]]) -> Dataset:
        """The same without some images (path, why), as though they had never been there; a cache stays valid.

        Raises:
            UserError: nothing is left to learn from.
        """
        bad = dict(bad_images)
        images = [image for image in self.images if image.path not in bad]
        return arrange(replace(self, bad_images=self.bad_images + tuple(bad.items())), images)


def arrange(dataset: Dataset, images: Sequence[DatasetImage]) -> Dataset:
    """The dataset with these images: numbered in order, regularisation images balanced.

    Raises:
        UserError: a dataset has no images to learn from.
    """
    problems: list[UserError] = []
    arranged: list[DatasetImage] = []
    surplus: list[int] = []
    for number, settings in enumerate(dataset.settings):
        own = [image for image in images if image.dataset == number]
        reg = [image for image in own if settings.subsets[image.subset].is_reg]
        train_count = sum(
            settings.subsets[image.subset].num_repeats for image in own if not settings.subsets[image.subset].is_reg
        )
        if not train_count:
            problems.append(UserError("no usable image to learn from", where=settings.where))
        repeats = balance_regularisation([settings.subsets[image.subset].num_repeats for image in reg], train_count)
        reg_repeats = {(image.subset, image.path): count for image, count in zip(reg, repeats, strict=True)}
        for image in own:
            subset = settings.subsets[image.subset]
            count = reg_repeats[image.subset, image.path] if subset.is_reg else subset.num_repeats
            if count:
                arranged.append(replace(image, repeats=count))
        surplus.append(repeats.count(0))
    raise_all(problems)
    return replace(dataset, images=tuple(arranged), surplus_reg_images=tuple(surplus))


def balance_regularisation(num_repeats: Sequence[int], train_count: int) -> list[int]:
    """How often each regularisation image is used, so that together they reach the number of (repeated) training images.

    First every image with its own repeats, in order, until the number is reached; then one more of each, in order,
    as often as needed.

    Returns:
        A count for each image; 0 where the number was reached before its turn.
    """
    counts = [0] * len(num_repeats)
    total, turn = 0, 0
    while num_repeats and total < train_count:
        place = turn % len(num_repeats)
        added = num_repeats[place] if turn < len(num_repeats) else 1
        counts[place] += added
        total += added
        turn += 1
    return counts


def scan_dataset(options: DatasetOptions, *, latent_factor: int = 8, size_multiple: int = 64) -> Dataset:
    """Find all data of a run; headers and captions are read, no image is decoded.

    Args:
        latent_factor: pixels per latent, each way (8 for Stable Diffusion).
        size_multiple: what image sides must be a multiple of: latent_factor times what the U-Net halves (64).

    Raises:
        UserError: everything that is wrong with the settings and, if none is, with the data; all at once.
    """
    from library.dataset.duplicates import duplicate_images
    from library.dataset.scan import scan_subsets
    from library.dataset.sources import Findings, read_settings

    settings, notices = read_settings(options, size_multiple=size_multiple)
    findings = Findings(notices=notices)
    images: list[DatasetImage] = []
    bad: list[tuple[Path, str]] = []
    scans = iter(scan_subsets([subset for dataset in settings for subset in dataset.subsets], findings))
    for number, dataset in enumerate(settings):
        sizes = predefined_sizes(dataset.buckets) if dataset.buckets.enabled else []
        for place, _ in enumerate(dataset.subsets):
            scan = next(scans)
            bad.extend((image.path, image.reason) for image in scan.bad_images)
            for found in scan.images:
                fit = _fit(found.size, dataset.buckets, sizes)
                if isinstance(fit, str):
                    bad.append((found.path, fit))
                    continue
                images.append(DatasetImage(number, place, found.path, found.size, found.caption, found.tags, fit, 0))
    findings.notices.extend(
        f"the same picture under several names: {', '.join(map(str, group))}"
        for group in duplicate_images(image.path for image in images)
    )
    raise_all(findings.problems + (bad_image_problems(bad) if options.on_bad_image == "stop" else []))
    found_data = Dataset(
        options=options,
        settings=tuple(settings),
        images=(),
        latent_factor=latent_factor,
        notices=tuple(findings.notices),
        bad_images=tuple(bad),
    )
    return arrange(found_data, images)


def bad_image_problems(bad_images: Sequence[tuple[Path, str]]) -> list[UserError]:
    """A sentence for each image that cannot be used, and one on what to do about them."""
    problems = [UserError(reason, where=str(path)) for path, reason in bad_images[:SHOWN_BAD_IMAGES]]
    if bad_images:
        rest = len(bad_images) - len(problems)
        what = f"{counted(len(bad_images), 'image')} cannot be used{f' ({rest} more than are named here)' if rest else ''}"
        problems.append(UserError(what, remedy="repair or remove them, or leave them out with --on_bad_image skip"))
    return problems


def _fit(size: Size, buckets: BucketSettings, sizes: Sequence[Size]) -> Fit | str:
    """The image's fit, or why it has none."""
    try:
        return fit_image(size, buckets, sizes)
    except TooSmallError:
        width, height = size
        return f"is {width}x{height}: with bucket_no_upscale a side would be below bucket_reso_steps {buckets.step}"
