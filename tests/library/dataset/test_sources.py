"""Every key is looked up in subset, dataset, general, command line and default; what cannot work is said at once."""

from __future__ import annotations

import pytest

from library.dataset.options import DatasetOptions
from library.dataset.sources import read_settings
from library.errors import UserError


def settings_of(tmp_path, text: str, **options):
    path = tmp_path / "data.toml"
    path.write_text(text, encoding="utf-8")
    return read_settings(DatasetOptions(dataset_config=path, **options), size_multiple=64)


def levels(folder, general: str = "", dataset: str = "", subset: str = "") -> str:
    tables = f"[general]\n{general}\n[[datasets]]\nresolution = 64\n{dataset}\n[[datasets.subsets]]\n"
    return f"{tables}image_dir = '{folder}'\n{subset}\n"


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, 0),
        ({"options": 1}, 1),
        ({"options": 1, "general": 2}, 2),
        ({"general": 2, "dataset": 3}, 3),
        ({"options": 1, "general": 2, "dataset": 3, "subset": 0}, 0),
    ],
)
def test_the_nearest_level_wins(tmp_path, where, expected):
    options = {"keep_tokens": where["options"]} if "options" in where else {}
    tables = {level: f"keep_tokens = {value}" for level, value in where.items() if level != "options"}
    ((dataset,), _) = settings_of(tmp_path, levels(tmp_path, **tables), **options)
    assert dataset.subsets[0].captions.keep_tokens == expected


def test_false_counts_as_set(tmp_path):
    text = levels(tmp_path, general="flip_aug = true", subset="flip_aug = false")
    ((dataset,), _) = settings_of(tmp_path, text, flip_aug=True)
    assert dataset.subsets[0].flip_aug is False


def test_defaults_are_as_documented(tmp_path):
    ((dataset,), notices) = settings_of(tmp_path, levels(tmp_path))
    buckets, subset = dataset.buckets, dataset.subsets[0]
    assert (dataset.batch_size, buckets.enabled, buckets.min_reso, buckets.max_reso, buckets.step) == (
        1,
        False,
        256,
        1024,
        64,
    )
    assert (subset.num_repeats, subset.caption_extension, subset.captions.caption_separator) == (1, ".caption", ",")
    assert notices == []


def test_the_older_names_of_the_command_line_are_fall_backs_too(tmp_path):
    ((dataset,), _) = settings_of(tmp_path, levels(tmp_path), train_batch_size=3, dataset_repeats=7)
    assert (dataset.batch_size, dataset.subsets[0].num_repeats) == (3, 7)


def test_a_caption_extension_gets_its_dot(tmp_path):
    ((dataset,), _) = settings_of(tmp_path, levels(tmp_path, subset="caption_extension = 'txt'"))
    assert dataset.subsets[0].caption_extension == ".txt"


@pytest.mark.parametrize(
    ("subset", "options", "sentence"),
    [
        ("conditioning_data_dir = 'm'", {}, "conditioning_data_dir (masks, ControlNet) is not offered yet"),
        ("color_aug = true", {"cache_latents": True}, "color_aug cannot be used with cached latents"),
        ("random_crop = true", {"cache_latents_to_disk": True}, "random_crop cannot be used with cached latents"),
        ("custom_attributes = {diff_output_preservation = true}", {}, "diff_output_preservation is not offered"),
        ("is_reg = true", {}, "all images are regularisation images; add images to learn from"),
        ("metadata_file = 'none.json'\nis_reg = true", {}, "is_reg has no meaning beside metadata_file"),
        ("metadata_file = 'none.json'", {}, "metadata_file none.json: no such file"),
    ],
)
def test_what_does_not_go_together_is_named_with_its_subset(tmp_path, subset, options, sentence):
    with pytest.raises(UserError) as caught:
        settings_of(tmp_path, levels(tmp_path, subset=subset), **options)
    assert sentence in str(caught.value)
    assert "data.toml: [[datasets]] 1" in str(caught.value)


def test_all_missing_folders_and_other_mistakes_come_at_once(tmp_path):
    text = levels("/none/a") + "[[datasets]]\nresolution = 100\n[[datasets.subsets]]\nimage_dir = '/none/b'\n"
    with pytest.raises(UserError) as caught:
        settings_of(tmp_path, text)
    message = str(caught.value)
    assert "[[datasets]] 1, [[datasets.subsets]] 1: image_dir /none/a: no such folder" in message
    assert "[[datasets]] 2, [[datasets.subsets]] 1: image_dir /none/b: no such folder" in message
    assert (
        "[[datasets]] 2: resolution 100x100 is not a multiple of 64, which the model needs; give 64,64 or 128,128" in message
    )


def test_mixed_subset_kinds_are_refused(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    text = levels(tmp_path) + f"[[datasets.subsets]]\nmetadata_file = '{tmp_path}/meta.json'\n"
    with pytest.raises(UserError, match="subsets with and without metadata_file are mixed"):
        settings_of(tmp_path, text)


def test_a_subset_without_a_source_is_refused(tmp_path):
    with pytest.raises(UserError, match="'image_dir' is missing; name the folder"):
        settings_of(tmp_path, "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nnum_repeats = 2\n")


def test_a_missing_resolution_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="the resolution is missing; give --resolution"):
        settings_of(tmp_path, levels(tmp_path).replace("resolution = 64", ""))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"resolution": "512x512"}, "--resolution 512x512: should be a size or a width and a height"),
        ({"caption_dropout_rate": 2.0}, "--caption_dropout_rate 2.0: should be 1 or less"),
        ({"train_batch_size": 0}, "--train_batch_size 0: should be 1 or more"),
        ({"bucket_reso_steps": 0, "enable_bucket": True}, "--bucket_reso_steps 0: should be 1 or more"),
        ({"vae_batch_size": 0}, "--vae_batch_size 0: should be 1 or more"),
        ({"prior_loss_weight": -1.0}, "--prior_loss_weight -1.0: should be 0 or more"),
    ],
)
def test_the_command_line_is_held_to_the_same_rules(tmp_path, options, sentence):
    with pytest.raises(UserError) as caught:
        settings_of(tmp_path, levels(tmp_path), **options)
    assert sentence in str(caught.value)


def test_a_wrong_resolution_is_not_called_missing_too(tmp_path):
    with pytest.raises(UserError) as caught:
        settings_of(tmp_path, levels(tmp_path).replace("resolution = 64", ""), resolution="big")
    assert str(caught.value) == "--resolution big: should be a size or a width and a height in pixels (512 or [512, 768])"


@pytest.mark.parametrize(
    ("table", "notice"),
    [
        ({"subset": "num_repeats = 0"}, "left out, because num_repeats is 0"),
        ({"dataset": "network_multiplier = 0.5"}, "network_multiplier changes nothing"),
        (
            {"general": "enable_bucket = true\nface_crop_aug_range = [1, 2]\nmin_bucket_reso = 64"},
            "face_crop_aug_range changes nothing while",
        ),
    ],
)
def test_what_has_no_effect_is_said(tmp_path, table, notice):
    second = f"[[datasets.subsets]]\nimage_dir = '{tmp_path.parent}'\n"
    _, notices = settings_of(tmp_path, levels(tmp_path, **table) + second)
    assert any(notice in line for line in notices)


def test_rounded_bucket_limits_are_said(tmp_path):
    text = levels(tmp_path, dataset="enable_bucket = true\nmin_bucket_reso = 100\nmax_bucket_reso = 1000").replace(
        "64\n", "512\n"
    )
    _, notices = settings_of(tmp_path, text)
    assert "bucket sides go from 64 to 1024" in notices[0]


def test_a_folder_named_twice_in_a_dataset_counts_once_and_is_said(tmp_path):
    text = levels(tmp_path) + f"[[datasets.subsets]]\nimage_dir = '{tmp_path}'\n"
    ((dataset,), notices) = settings_of(tmp_path, text)
    assert len(dataset.subsets) == 1
    assert "[[datasets.subsets]] 2: left out, because" in notices[0]


def test_the_folder_convention_gives_repeats_and_words_in_order(tmp_path):
    for name in ("10_sks dog", "2_a_b", "0_off", "notes", "10_cat"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "reg" / "1_dog").mkdir(parents=True)
    options = DatasetOptions(train_data_dir=tmp_path / "train", reg_data_dir=tmp_path / "reg", resolution="64")
    ((dataset,), notices) = read_settings(options, size_multiple=64)
    found = [(subset.num_repeats, subset.class_tokens, subset.is_reg) for subset in dataset.subsets]
    assert found == [(10, "cat", False), (10, "sks dog", False), (2, "a_b", False), (1, "dog", True)]
    assert any("0 repeats" in notice for notice in notices)
    assert any("does not begin with a number and _: notes" in notice for notice in notices)


def test_a_parent_folder_without_such_names_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="no folder is named like 10_sks dog; images go in a folder such as"):
        read_settings(DatasetOptions(train_data_dir=tmp_path, resolution="64"), size_multiple=64)


def test_no_source_at_all_is_a_sentence():
    with pytest.raises(UserError, match="no training data is named; give --dataset_config, or --train_data_dir"):
        read_settings(DatasetOptions(resolution="64"), size_multiple=64)


def test_sources_that_the_dataset_file_replaces_are_named(tmp_path):
    _, notices = settings_of(tmp_path, levels(tmp_path), train_data_dir=tmp_path)
    assert notices == ["--train_data_dir: not used, because --dataset_config names the data"]


@pytest.mark.parametrize(
    ("tables", "said"),
    [({}, False), ({"general": "keep_tokens = 2"}, True), ({"subset": "keep_tokens = 2"}, True)],
)
def test_an_option_that_the_file_sets_everywhere_is_named(tmp_path, tables, said):
    (_, notices) = settings_of(tmp_path, levels(tmp_path, **tables), keep_tokens=1)
    sentence = "--keep_tokens: not used, because the dataset file sets keep_tokens everywhere"
    assert (sentence in notices) == said
