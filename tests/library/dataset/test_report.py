"""The plan says what the run then does; the saved fields are as other tools expect them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from library.dataset.dataset import scan_dataset
from library.dataset.options import DatasetOptions
from library.dataset.report import (
    bucket_summaries,
    dataset_metadata,
    debug_lines,
    report_lines,
    sample_counts,
    subset_summaries,
)


@pytest.fixture
def parent(draw_images):
    draw_images("reg/1_dog", [(64, 64)] * 9)
    return draw_images("train/3_sks dog", [(64, 64), (64, 128)]).parent


@pytest.fixture
def dataset(parent):
    return scan_dataset(
        DatasetOptions(
            train_data_dir=parent, reg_data_dir=parent.parent / "reg", resolution="64", train_batch_size=2, flip_aug=True
        )
    )


def test_the_summaries_count_what_an_epoch_uses(dataset):
    train, reg = subset_summaries(dataset)
    assert (train.images, train.samples, train.exposures, train.share) == (2, 6, (3, 3), 0.5)
    assert (reg.images, reg.samples, reg.exposures) == (6, 6, (1, 1))
    assert sample_counts(dataset) == (6, 6)
    (bucket,) = bucket_summaries(dataset)
    assert (bucket.size, bucket.images, bucket.samples, bucket.batches) == ((64, 64), 8, 12, 6)
    seen = Counter(dataset.samples[index].image.path for batch in dataset.epoch(1, seed=0) for index in batch.samples)
    assert sum(seen.values()) == train.samples + reg.samples


def test_the_plan_says_images_exposures_shares_buckets_and_what_is_not_used(dataset):
    text = "\n".join(report_lines(dataset, epochs=10))
    assert "8 images, 12 samples an epoch (6 training, 6 regularisation), 6 batches an epoch" in text
    assert "3_sks dog: 2 images, each 3 times an epoch (30 in the run), 50% of the samples" in text
    assert "regularisation with loss weight 1" in text
    assert "3 regularisation images are not used" in text
    assert "64x64: 8 images, 12 samples, 6 batches" in text
    assert "1 images lose a quarter or more of their area to the cut: 001.png (50%)" in text


def test_images_that_are_enlarged_much_are_named(draw_images):
    parent = draw_images("train/1_a", [(32, 32)]).parent
    text = "\n".join(report_lines(scan_dataset(DatasetOptions(train_data_dir=parent, resolution="64"))))
    assert "1 images are enlarged 1.5 times or more: 000.png (2.0x)" in text


def test_images_left_out_are_listed(parent):
    (parent / "3_sks dog" / "bad.png").write_bytes(b"")
    dataset = scan_dataset(DatasetOptions(train_data_dir=parent, resolution="64", on_bad_image="skip", cache_latents=True))
    text = "\n".join(report_lines(dataset))
    assert "bad.png: is empty" in text
    assert "latents are cached in memory, 0 MiB" in text


def test_the_debug_listing_has_every_sample_with_its_caption(dataset):
    lines = debug_lines(dataset, seed=0)
    assert sum(line.startswith("  sample") for line in lines) == 12
    assert sum(line.startswith("batch") for line in lines) == 6
    assert any("64x128 -> 64x128, cut at 0,32" in line and "'picture 1, tag a, tag b'" in line for line in lines)


def test_the_saved_fields_of_a_folder_dataset(dataset):
    fields = dataset_metadata(dataset, processes=2, accumulation=3)
    assert json.loads(fields["ss_tag_frequency"]) == {"3_sks dog": {"picture 0": 1, "tag a": 2, "tag b": 2, "picture 1": 1}}
    assert json.loads(fields["ss_dataset_dirs"]) == {"3_sks dog": {"n_repeats": 3, "img_count": 2}}
    assert json.loads(fields["ss_reg_dataset_dirs"]) == {"1_dog": {"n_repeats": 1, "img_count": 6}}
    buckets = json.loads(fields["ss_bucket_info"])
    assert buckets == {"buckets": {"0": {"resolution": [64, 64], "count": 12}}, "mean_img_ar_error": 0.5 / 8}
    assert (fields["ss_resolution"], fields["ss_flip_aug"], fields["ss_keep_tokens"]) == ("(64, 64)", "True", "0")
    assert (fields["ss_batch_size_per_device"], fields["ss_total_batch_size"]) == ("2", "12")
    assert all(isinstance(value, str) for value in fields.values())


def test_the_saved_fields_of_a_dataset_file(parent, tmp_path):
    folder = parent / "3_sks dog"
    config = tmp_path / "data.toml"
    config.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
        "num_repeats = 2\nclass_tokens = 'dog'\n"
        f"[[datasets]]\nresolution = 128\n[[datasets.subsets]]\nimage_dir = '{folder}'\nshuffle_caption = true\n"
    )
    fields = dataset_metadata(scan_dataset(DatasetOptions(dataset_config=config)))
    assert set(fields) == {"ss_datasets", "ss_tag_frequency", "ss_dataset_dirs"}
    first, second = json.loads(fields["ss_datasets"])
    assert (first["is_dreambooth"], first["num_train_images"], first["num_reg_images"], first["resolution"]) == (
        True,
        4,
        0,
        [64, 64],
    )
    assert first["subsets"][0]["image_dir"] == "3_sks dog"
    assert first["subsets"][0]["class_tokens"] == "dog"
    assert second["subsets"][0]["shuffle_caption"] is True
    assert list(json.loads(fields["ss_dataset_dirs"])) == ["3_sks dog", "3_sks dog (2)"]
