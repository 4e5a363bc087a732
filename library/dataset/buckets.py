"""Which size an image is trained at: the list of bucket sizes, and the best of them for one image.

Sizes are (width, height) in pixels. The list and the rule without upscaling are those of sd-scripts, so that a dataset
gives the same shapes here and there. The choice among listed sizes differs on purpose: sd-scripts takes the smallest
difference of width/height, which treats portrait and landscape unequally; here the size wins that cuts off least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from library.errors import UserError

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class BucketSettings:
    """How the images of one dataset are sized.

    Args:
        resolution: (width, height); with buckets only its area counts, without them every image gets exactly this size.
        enabled: sort images into buckets of like shape.
        min_reso, max_reso: limits of a bucket's side; not used with `no_upscale`.
        step: every bucket side is a multiple of this.
        no_upscale: no image is enlarged; its bucket follows from its own size.
    """

    resolution: Size
    enabled: bool = False
    min_reso: int = 256
    max_reso: int = 1024
    step: int = 64
    no_upscale: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """(smallest, largest) bucket side: min_reso rounded down and max_reso up to multiples of the step."""
        return self.min_reso // self.step * self.step, -(-self.max_reso // self.step) * self.step


@dataclass(frozen=True, slots=True)
class Fit:
    """What happens to one image: scaled to `resized`, which covers `bucket` on both sides, then cut to `bucket`."""

    bucket: Size
    resized: Size

    @property
    def excess(self) -> Size:
        """Columns and rows that the cut removes."""
        return self.resized[0] - self.bucket[0], self.resized[1] - self.bucket[1]

    @property
    def cropped_share(self) -> float:
        """How much of the image's area the cut removes, 0..1."""
        return 1 - (self.bucket[0] * self.bucket[1]) / (self.resized[0] * self.resized[1])


class TooSmallError(Exception):
    """The image fits no bucket: a side would be 0."""


def bucket_problems(settings: BucketSettings, size_multiple: int) -> list[UserError]:
    """What is wrong with the settings themselves; `where` is left to the caller.

    Args:
        size_multiple: what the model asks of an image's sides (64 for Stable Diffusion 1 and 2).
    """
    problems = []
    if not settings.enabled:
        if any(side % size_multiple for side in settings.resolution):
            width, height = settings.resolution
            good = {
                (near_multiple(width, size_multiple, up=up), near_multiple(height, size_multiple, up=up)) for up in (0, 1)
            }
            what = f"resolution {width}x{height} is not a multiple of {size_multiple}, which the model needs"
            near = " or ".join(f"{w},{h}" for w, h in sorted(good))
            problems.append(UserError(what, remedy=f"give {near}, or turn enable_bucket on"))
        return problems
    if settings.step % size_multiple:
        what = f"bucket_reso_steps {settings.step} is not a multiple of {size_multiple}, which the model needs"
        problems.append(UserError(what, remedy=f"give {near_multiple(settings.step, size_multiple, up=1)}"))
    if settings.no_upscale:
        return problems
    smallest, largest = settings.limits
    if smallest < settings.step or smallest > min(settings.resolution):
        what = f"min_bucket_reso {settings.min_reso} must lie between bucket_reso_steps and the resolution's shorter side"
        problems.append(UserError(what, remedy=f"give {settings.step} to {min(settings.resolution)}"))
    if largest < max(settings.resolution):
        what = f"max_bucket_reso {settings.max_reso} is below the resolution's longer side"
        problems.append(UserError(what, remedy=f"give {max(settings.resolution)} or more"))
    return problems


def near_multiple(number: int, of: int, *, up: int) -> int:
    """The multiple of `of` at or below `number` (up=0; at least one), or at or above it (up=1)."""
    return max(of, -(-number // of) * of if up else number // of * of)


def predefined_sizes(settings: BucketSettings) -> list[Size]:
    """All bucket sizes of a run with buckets and upscaling, ascending.

    >>> len(predefined_sizes(BucketSettings(resolution=(512, 512), enabled=True)))
    17
    """
    area, step = settings.resolution[0] * settings.resolution[1], settings.step
    smallest, largest = settings.limits
    square = math.isqrt(area) // step * step
    sizes = {(square, square)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, area // width // step * step)
        if height >= smallest:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def fit_image(size: Size, settings: BucketSettings, sizes: Sequence[Size]) -> Fit:
    """How an image of `size` is scaled and cut.

    Args:
        size: (width, height) as viewers show the image.
        sizes: what `predefined_sizes` gave for the same settings.

    Raises:
        TooSmallError: without upscaling, a side is below one step.
    """
    if not settings.enabled:
        return cover(size, settings.resolution)
    if settings.no_upscale:
        return fit_without_upscaling(size, settings)
    return cover(size, size if size in sizes else best_size(size, sizes))


def best_size(size: Size, sizes: Sequence[Size]) -> Size:
    """The size that keeps the largest share of the image; among equals the one with most pixels, then the first."""
    return max(sizes, key=lambda bucket: (kept_share(size, bucket), bucket[0] * bucket[1]))


def kept_share(size: Size, bucket: Size) -> float:
    """The share of the image's area that is left when it is scaled to cover the bucket and cut, before rounding, 0..1."""
    across, down = size[0] * bucket[1], size[1] * bucket[0]
    return min(across, down) / max(across, down)


def cover(size: Size, bucket: Size) -> Fit:
    """Scale as little as covers the bucket: one side fits exactly, the other has the excess."""
    (width, height), (bucket_width, bucket_height) = size, bucket
    if width * bucket_height > bucket_width * height:
        return Fit(bucket, (max(bucket_width, int(width * bucket_height / height + 0.5)), bucket_height))
    return Fit(bucket, (bucket_width, max(bucket_height, int(height * bucket_width / width + 0.5))))


def fit_without_upscaling(size: Size, settings: BucketSettings) -> Fit:
    """The image as it is, or scaled down to the resolution's area; the bucket is each side rounded down to the step.

    When scaling down, one side becomes a multiple of the step: the one that leaves the shape more as it was.
    """
    (width, height), step = size, settings.step
    area = settings.resolution[0] * settings.resolution[1]
    resized = size
    if width * height > area:
        aspect = width / height
        by_width = int(math.sqrt(area * aspect) + 0.5) // step * step
        by_height = int(area / math.sqrt(area * aspect) + 0.5) // step * step
        height_of_first = int(by_width / aspect + 0.5) // step * step
        width_of_second = int(by_height * aspect + 0.5) // step * step
        if not (by_width and by_height and height_of_first and width_of_second):
            raise TooSmallError
        if abs(by_width / height_of_first - aspect) < abs(width_of_second / by_height - aspect):
            resized = (by_width, int(by_width / aspect + 0.5))
        else:
            resized = (int(by_height * aspect + 0.5), by_height)
    bucket = (resized[0] // step * step, resized[1] // step * step)
    if 0 in bucket:
        raise TooSmallError
    return Fit(bucket, resized)
