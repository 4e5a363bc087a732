"""A mistake in a dataset file is one sentence with its file, its place, its key and a hint; all mistakes come at once."""

from __future__ import annotations

import json

import pytest

from library.dataset.schema import place, read_dataset_file
from library.errors import UserError

SUBSET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'x'\n"
TWO = SUBSET + "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'y'\n[[datasets.subsets]]\nimage_dir = 'z'\n"
SECOND = "[[datasets]] 2, [[datasets.subsets]] 2: "


def read(tmp_path, text: str, name: str = "data.toml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_dataset_file(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (TWO + "image_dirr = 'a'", SECOND + "unknown key 'image_dirr'; did you mean image_dir?"),
        (TWO + "num_repeats = 'ten'", SECOND + 'num_repeats should be a whole number, not "ten"'),
        (TWO + "num_repeats = 1.5", SECOND + "num_repeats should be a whole number, not 1.5"),
        (TWO + "num_repeats = -1", SECOND + "num_repeats should be 0 or more, not -1"),
        (TWO + "flip_aug = 1", SECOND + "flip_aug should be true or false, not 1"),
        (TWO + "caption_prefix = 3", SECOND + "caption_prefix should be text in quotes, not 3"),
        (TWO + "caption_dropout_rate = 1.5", SECOND + "caption_dropout_rate should be 1 or less, not 1.5"),
        (TWO + "caption_dropout_rate = true", SECOND + "caption_dropout_rate should be a number, not true"),
        (TWO + "resize_interpolation = 'lanczos4'", SECOND + "resize_interpolation should be one of 'lanczos'"),
        (TWO + "face_crop_aug_range = [3, 1]", SECOND + "face_crop_aug_range should be two numbers above 0"),
        (TWO + "batch_size = 4", SECOND + "unknown key 'batch_size'; it belongs in [general] or [[datasets]]"),
        (TWO + "train_batch_size = 4", SECOND + "unknown key 'train_batch_size'; in a dataset file it is batch_size"),
        (
            SUBSET.replace("\n[[datasets.subsets]]", "\nis_reg = true\n[[datasets.subsets]]"),
            "[[datasets]] 1: unknown key 'is_reg'; it belongs in [[datasets.subsets]]",
        ),
        (
            "[general]\nresolution = 'big'\n" + SUBSET,
            '[general]: resolution should be a size or a width and a height in pixels (512 or [512, 768]), not "big"',
        ),
        ("[general]\nresolution = [1, 2, 3]\n" + SUBSET, "[general]: resolution should be a size"),
        (
            "[general]\nenable_buckets = true\n" + SUBSET,
            "[general]: unknown key 'enable_buckets'; did you mean enable_bucket?",
        ),
        (
            "[[datasets]]\nresolution = 512\n",
            "[[datasets]] 1: 'subsets' is missing; name the images in [[datasets.subsets]]",
        ),
        ("[[datasets]]\nsubsets = []\n", "[[datasets]] 1: subsets should have at least one entry"),
        ("[[dataset]]\n", "unknown key 'dataset'; did you mean datasets?"),
        ("datasets = 3\n", "datasets should be an array of tables, not 3"),
        ("", "'datasets' is missing"),
        ("[general]\nresolution = = 3\n", "is not valid TOML: Invalid value (at line 2, column 14)"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\Users\\me"\n', "write folders with / or in 'single quotes'"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_a_hint(tmp_path, text, sentence):
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert sentence in str(caught.value)
    assert "data.toml" in str(caught.value)


def test_all_mistakes_come_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, "[general]\nresolutoin = 3\n" + TWO + "keep_token = 1\nshuffle_caption = 'yes'\n")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("network_multiplier", "1", 1.0),
        ("caption_tag_dropout_rate", "0", 0.0),
        ("face_crop_aug_range", "[1, 2]", (1.0, 2.0)),
        ("token_warmup_step", "100", 100.0),
        ("resolution", "512", (512, 512)),
        ("resolution", "[512, 768]", (512, 768)),
        ("resolution", "'512,768'", (512, 768)),
    ],
)
def test_whole_numbers_do_for_floats_and_sizes_come_in_every_spelling(tmp_path, key, value, meant):
    assert getattr(read(tmp_path, f"[general]\n{key} = {value}\n" + SUBSET).general, key) == meant


def test_json_says_the_same_as_toml(tmp_path):
    tables = {"general": {"shuffle_caption": True}, "datasets": [{"resolution": 512, "subsets": [{"image_dir": "x"}]}]}
    from_json = read(tmp_path, json.dumps(tables), "data.json")
    from_toml = read(
        tmp_path, "[general]\nshuffle_caption = true\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'x'"
    )
    assert from_json == from_toml


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"datasets": [{"subsets": [{"image_dir": 3}]}]}',
            "datasets 1, subsets 1: image_dir should be text in quotes, not 3",
        ),
        ('{"datasets": [', "is not valid JSON: Expecting value (at line 1, column 15)"),
        ("[]", "should be a table with the keys general and datasets"),
    ],
)
def test_mistakes_in_json_are_named_by_place_too(tmp_path, text, sentence):
    with pytest.raises(UserError) as caught:
        read(tmp_path, text, "data.json")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("data.yaml", "ends in .toml or .json"), ("missing.json", "no such file"), ("missing.toml", "no such file")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        read_dataset_file(tmp_path / name)
    assert name in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "data.toml").write_bytes(b"\xef\xbb\xbf" + SUBSET.encode())
    assert read_dataset_file(tmp_path / "data.toml").datasets[0].subsets[0].image_dir == "x"


def test_places_count_from_one(tmp_path):
    assert place(tmp_path / "a.toml", 1, 2).endswith("a.toml: [[datasets]] 1, [[datasets.subsets]] 2")
