"""An epoch goes through every sample once, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from library.dataset.dataset import GlobalBatch, balance_regularisation, scan_dataset
from library.dataset.options import DatasetOptions

SIZES = [(64, 64), (128, 64), (64, 128), (192, 64), (100, 80), (70, 64), (64, 190)]


@pytest.fixture
def mixed(draw_images, scan_toml):
    """Two datasets with different batch sizes and resolutions, buckets, repeats and regularisation images."""
    first, second, reg = draw_images("first", SIZES), draw_images("second", SIZES[:3]), draw_images("reg", SIZES[:4])
    return scan_toml(f"""
        [general]
        enable_bucket = true
        min_bucket_reso = 64
        max_bucket_reso = 256
        [[datasets]]
        resolution = 128
        batch_size = 3
        [[datasets.subsets]]
        image_dir = '{first}'
        num_repeats = 5
        [[datasets.subsets]]
        image_dir = '{reg}'
        is_reg = true
        num_repeats = 2
        [[datasets]]
        resolution = 64
        batch_size = 2
        [[datasets.subsets]]
        image_dir = '{second}'
        num_repeats = 3
    """)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_uses_every_image_as_often_as_planned(mixed, processes):
    batches = mixed.epoch(1, seed=7, processes=processes)
    assert len(batches) == mixed.batches_per_epoch(processes)
    seen = Counter(mixed.samples[index].image.path for batch in batches for index in batch.samples)
    assert seen == {image.path: image.repeats for image in mixed.images}


def test_random_layouts_keep_the_exposures_of_the_plan(draw_images, scan_toml, tmp_path):
    draws = random.Random(5)
    for layout in range(3):
        sizes = [(draws.randint(64, 200), draws.randint(64, 200)) for _ in range(draws.randint(1, 12))]
        folder = draw_images(f"layout{layout}", sizes)
        keys = f"resolution = 128\nenable_bucket = true\nmin_bucket_reso = 64\nbatch_size = {draws.randint(1, 5)}"
        dataset = scan_toml(f"[[datasets]]\n{keys}\n[[datasets.subsets]]\nimage_dir = '{folder}'\nnum_repeats = 3")
        seen = Counter(
            dataset.samples[index].image.path.name for batch in dataset.epoch(1, seed=1) for index in batch.samples
        )
        assert set(seen.values()) == {3}
        assert len(seen) == len(sizes)


def test_a_batch_holds_one_dataset_and_one_bucket_and_at_most_its_size(mixed):
    for batch in mixed.epoch(1, seed=0, processes=2):
        images = [mixed.samples[index].image for index in batch.samples]
        assert {image.dataset for image in images} == {batch.dataset}
        assert {image.fit.bucket for image in images} == {batch.bucket}
        assert 1 <= len(images) <= 2 * mixed.settings[batch.dataset].batch_size


def test_the_order_is_new_in_every_epoch_and_the_same_for_the_same_seed(mixed):
    assert mixed.epoch(1, seed=0) == mixed.epoch(1, seed=0)
    assert mixed.epoch(1, seed=0) != mixed.epoch(2, seed=0)
    assert mixed.epoch(1, seed=0) != mixed.epoch(1, seed=1)
    groups = [{frozenset(batch.samples) for batch in mixed.epoch(epoch, seed=0)} for epoch in (1, 2)]
    assert groups[0] != groups[1], "and so are the samples that meet in a batch"
    datasets = [batch.dataset for batch in mixed.epoch(1, seed=0)]
    assert datasets != sorted(datasets), "datasets are mixed"


def test_epochs_are_counted_from_one(mixed):
    with pytest.raises(ValueError, match="counted from 1"):
        mixed.epoch(0, seed=0)


def test_samples_are_numbered_by_dataset_subset_name_and_repeat_whatever_the_batch_size(mixed):
    keys = [(s.image.dataset, s.image.subset, s.image.path.name, s.repeat) for s in mixed.samples]
    assert keys == sorted(keys)
    assert [sample.index for sample in mixed.samples] == list(range(len(keys)))


def test_two_processes_with_half_the_batch_work_on_the_same_samples(draw_images):
    parent = draw_images("train/3_x", SIZES).parent
    one = scan_dataset(DatasetOptions(train_data_dir=parent, resolution="64", train_batch_size=4))
    two = scan_dataset(DatasetOptions(train_data_dir=parent, resolution="64", train_batch_size=2))
    assert one.epoch(1, seed=3) == two.epoch(1, seed=3, processes=2)


@pytest.mark.parametrize(("count", "processes"), [(4, 2), (3, 2), (1, 2), (5, 4), (1, 4), (7, 3)])
def test_shares_are_equally_long_and_count_every_sample_once(count, processes):
    batch = GlobalBatch(0, (64, 64), tuple(range(10, 10 + count)))
    shares = [batch.share(rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) >= 1
    assert sorted(index for share in shares for index, counts in share if counts) == list(range(10, 10 + count))


@pytest.mark.parametrize(
    ("repeats", "train", "counts"),
    [
        ([1, 1, 1], 10, [4, 3, 3]),
        ([1, 1, 1], 2, [1, 1, 0]),
        ([2, 2, 2], 20, [7, 7, 6]),
        ([3, 1], 5, [4, 1]),
        ([5], 3, [5]),
        ([], 3, []),
    ],
)
def test_regularisation_images_repeat_until_they_match_the_training_samples(repeats, train, counts):
    assert balance_regularisation(repeats, train) == counts


def test_regularisation_is_balanced_in_its_own_dataset_and_weighted(draw_images, scan_toml):
    dog, reg = draw_images("dog", [(64, 64)] * 2), draw_images("reg", [(64, 64)] * 8)
    dataset = scan_toml(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{dog}'\nnum_repeats = 3\n"
        f"[[datasets.subsets]]\nimage_dir = '{reg}'\nis_reg = true\n",
        prior_loss_weight=0.5,
    )
    weights = Counter(dataset.loss_weight(sample.image) for sample in dataset.samples)
    assert weights == {1.0: 6, 0.5: 6}
    assert dataset.surplus_reg_images == (2,)


def test_every_image_stands_in_the_bucket_of_its_datasets_resolution(mixed):
    assert {image.fit.bucket for image in mixed.images if image.dataset == 1} <= {(64, 64), (128, 64), (64, 128)}
    assert all(image.fit.bucket[0] * image.fit.bucket[1] <= 128 * 128 for image in mixed.images)
