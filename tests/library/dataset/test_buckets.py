"""The sizes are those that sd-scripts was measured to give; the choice among them is the one that loses least."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from library.dataset.buckets import (
    BucketSettings,
    Fit,
    TooSmallError,
    bucket_problems,
    fit_image,
    predefined_sizes,
)


def settings(side: int = 512, low: int = 256, high: int = 1024, step: int = 64, **more) -> BucketSettings:
    return BucketSettings(resolution=(side, side), enabled=True, min_reso=low, max_reso=high, step=step, **more)


@pytest.mark.parametrize(
    ("side", "low", "high", "step", "count"),
    [
        (512, 256, 1024, 64, 17),
        (768, 256, 1024, 64, 19),
        (1024, 256, 2048, 64, 41),
        (1024, 256, 1024, 64, 25),
        (1024, 512, 2048, 32, 65),
    ],
)
def test_the_number_of_predefined_sizes_is_as_measured(side, low, high, step, count):
    sizes = predefined_sizes(settings(side, low, high, step))
    assert len(sizes) == count
    assert sizes == sorted(set(sizes))
    assert all(width % step == 0 and height % step == 0 and low <= min(width, height) for width, height in sizes)


def test_the_sizes_at_512_are_as_measured():
    portrait = [(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576)]
    landscape = sorted((height, width) for width, height in portrait)
    assert predefined_sizes(settings()) == [*portrait, (512, 512), *landscape]


@pytest.mark.parametrize(
    ("size", "more", "fit"),
    [
        ((640, 960), {}, Fit((384, 640), (427, 640))),
        ((1920, 1080), {}, Fit((640, 384), (683, 384))),
        ((512, 512), {}, Fit((512, 512), (512, 512))),
        ((832, 256), {}, Fit((832, 256), (832, 256))),
        ((640, 960), {"no_upscale": True}, Fit((384, 576), (384, 576))),
        ((300, 200), {"no_upscale": True}, Fit((256, 192), (300, 200))),
    ],
)
def test_an_image_is_scaled_and_cut_as_measured(size, more, fit):
    chosen = settings(**more)
    assert fit_image(size, chosen, predefined_sizes(chosen)) == fit


def test_the_chosen_size_loses_least_of_the_image_by_brute_force():
    chosen = settings()
    sizes = predefined_sizes(chosen)
    draws = random.Random(1)
    for _ in range(500):
        size = draws.randint(40, 4000), draws.randint(40, 4000)
        losses = {bucket: lost_share(size, bucket) for bucket in sizes}
        bucket = fit_image(size, chosen, sizes).bucket
        assert losses[bucket] == min(losses.values()), size


def lost_share(size: tuple[int, int], bucket: tuple[int, int]) -> Fraction:
    """Scale until both sides are covered, cut the rest: exact, and written another way than in the code."""
    scale = max(Fraction(bucket[0], size[0]), Fraction(bucket[1], size[1]))
    return 1 - Fraction(bucket[0] * bucket[1]) / (scale * size[0] * scale * size[1])


def test_turning_an_image_turns_its_bucket():
    chosen = settings()
    sizes = predefined_sizes(chosen)
    draws = random.Random(2)
    for _ in range(200):
        width, height = draws.randint(100, 3000), draws.randint(100, 3000)
        across, down = fit_image((width, height), chosen, sizes), fit_image((height, width), chosen, sizes)
        assert across.bucket == down.bucket[::-1]


@pytest.mark.parametrize("no_upscale", [False, True])
def test_every_fit_covers_its_bucket_on_both_sides_and_exactly_on_one(no_upscale):
    chosen = settings(no_upscale=no_upscale)
    sizes = predefined_sizes(chosen)
    draws = random.Random(3)
    for _ in range(500):
        size = draws.randint(64, 3000), draws.randint(64, 3000)
        try:
            fit = fit_image(size, chosen, sizes)
        except TooSmallError:
            continue
        assert min(fit.excess) >= 0
        if no_upscale:
            assert fit.resized[0] <= size[0] + 1
            assert max(fit.excess) < 64 + 1 or min(fit.excess) == 0
            assert fit.bucket[0] * fit.bucket[1] <= 512 * 512
        else:
            assert min(fit.excess) == 0


@pytest.mark.parametrize("size", [(60, 500), (500, 60), (1, 1), (40000, 30)])
def test_an_image_below_one_step_has_no_bucket_instead_of_an_empty_one(size):
    with pytest.raises(TooSmallError):
        fit_image(size, settings(no_upscale=True), [])


def test_without_buckets_every_image_is_scaled_to_cover_the_resolution():
    alone = BucketSettings(resolution=(64, 64))
    assert fit_image((128, 96), alone, []) == Fit((64, 64), (85, 64))
    assert fit_image((10, 30), alone, []) == Fit((64, 64), (64, 192))


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        (
            BucketSettings(resolution=(500, 500)),
            "resolution 500x500 is not a multiple of 64, which the model needs; give 448,448",
        ),
        (settings(step=32), "bucket_reso_steps 32 is not a multiple of 64"),
        (settings(low=640), "min_bucket_reso 640 must lie between bucket_reso_steps and the resolution's shorter side"),
        (settings(side=2048), "max_bucket_reso 1024 is below the resolution's longer side; give 2048 or more"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence_with_what_to_give(chosen, sentence):
    (problem,) = bucket_problems(chosen, 64)
    assert sentence in str(problem)


@pytest.mark.parametrize("chosen", [BucketSettings(resolution=(64, 64)), settings(low=300, high=1000), settings(500)])
def test_settings_that_work_are_left_alone(chosen):
    assert bucket_problems(chosen, 64) == []
