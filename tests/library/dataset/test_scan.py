"""A folder with every defect is reported by name, and exactly the good images are used."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from library.dataset.dataset import scan_dataset
from library.dataset.options import DatasetOptions
from library.errors import UserError
from tests.library.dataset.conftest import noise_image


def scan_folder(folder, subset: str = "", dataset: str = "resolution = 64", **options):
    path = folder.parent / f"{folder.name}.toml"
    path.write_text(f"[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = '{folder}'\n{subset}\n", encoding="utf-8")
    return scan_dataset(DatasetOptions(dataset_config=path, **options))


def scan_metadata(folder, content, *, name="meta.json", subset="", **options):
    meta = folder / name
    meta.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    config = folder / "data.toml"
    config.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = '{meta}'\nimage_dir = '{folder}'\n{subset}\n"
    )
    return scan_dataset(DatasetOptions(dataset_config=config, **options))


@pytest.fixture
def dirty_folder(draw_images):
    folder = draw_images("dirty", [(64, 64), (96, 64)])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    noise_image(64, 64).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-3000])
    noise_image(64, 64).save(folder / "typed_wrong.JPG", format="PNG")
    return folder


def test_unreadable_images_stop_the_run_with_all_their_names(dirty_folder):
    with pytest.raises(UserError) as caught:
        scan_folder(dirty_folder)
    message = str(caught.value)
    assert "empty.png: is empty" in message
    assert "text.jpg: is not an image" in message
    assert "cut.png: cannot be decoded" in message
    assert "3 images cannot be used; repair or remove them, or leave them out with --on_bad_image skip" in message


def test_unreadable_images_are_left_out_by_name_where_that_was_asked_for(dirty_folder):
    dataset = scan_folder(dirty_folder, on_bad_image="skip")
    assert [image.path.name for image in dataset.images] == ["000.png", "001.png", "typed_wrong.JPG"]
    assert sorted(path.name for path, _ in dataset.bad_images) == ["cut.png", "empty.png", "text.jpg"]
    assert any("typed_wrong.JPG (PNG)" in notice for notice in dataset.notices)


def test_nothing_usable_is_an_error_even_when_bad_images_are_skipped(tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="no usable image to learn from"):
        scan_folder(folder, on_bad_image="skip")


def test_bad_images_and_other_problems_come_at_once(dirty_folder):
    (dirty_folder / "000.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError) as caught:
        scan_folder(dirty_folder, "caption_extension = '.txt'")
    assert "000.txt: is not UTF-8 text (byte 3); save it as UTF-8" in str(caught.value)
    assert "empty.png: is empty" in str(caught.value)


def test_images_are_sorted_found_in_any_case_of_extension_and_not_below(tmp_path):
    folder = tmp_path / "a"
    (folder / "below").mkdir(parents=True)
    for name in ("b.PNG", "a.Webp", "c.bmp", "below/d.png"):
        noise_image(64, 64).save(folder / name)
    (folder / "e.gif").write_bytes(b"GIF89a")
    dataset = scan_folder(folder)
    assert [image.path.name for image in dataset.images] == ["a.Webp", "b.PNG", "c.bmp"]
    assert any("not read, because of their kind: e.gif" in notice for notice in dataset.notices)


def test_an_empty_folder_says_where_images_lie_instead(tmp_path):
    (tmp_path / "a" / "inner").mkdir(parents=True)
    noise_image(64, 64).save(tmp_path / "a" / "inner" / "x.png")
    with pytest.raises(UserError, match="no images in .*; name its subfolders, which have some: inner"):
        scan_folder(tmp_path / "a")


def test_txt_captions_are_used_and_said_where_the_default_finds_none(draw_images):
    dataset = scan_folder(draw_images("a", [(64, 64)]))
    assert dataset.images[0].caption == "picture 0, tag a, tag b"
    assert any(
        "captions are read from the .txt files, as there are no .caption files" in notice for notice in dataset.notices
    )


def test_a_single_caption_file_keeps_the_default_extension_and_the_others_are_named(draw_images):
    folder = draw_images("a", [(64, 64), (64, 64)])
    (folder / "000.caption").write_text("the right one")
    dataset = scan_folder(folder)
    assert [image.caption for image in dataset.images] == ["the right one", ""]
    assert any(
        "no .caption file, so an empty caption (there are .txt files; caption_extension?): 001.png" in n
        for n in dataset.notices
    )


def test_class_tokens_caption_images_that_have_no_file(draw_images):
    folder = draw_images("a", [(64, 64), (64, 64)])
    (folder / "001.txt").unlink()
    dataset = scan_folder(folder, "caption_extension = 'txt'\nclass_tokens = 'sks dog'")
    assert [image.caption for image in dataset.images] == ["picture 0, tag a, tag b", "sks dog"]
    assert any("so the caption is 'sks dog': 001.png" in notice for notice in dataset.notices)


def test_captions_keep_their_lines_lose_marks_and_empty_ones_are_named(draw_images):
    folder = draw_images("a", [(64, 64)] * 3)
    (folder / "000.txt").write_bytes("\ufeffone\r\n\r\n two \r\n".encode())
    (folder / "001.txt").write_text(" \n")
    (folder / "002.txt").write_text("é")
    dataset = scan_folder(folder, "caption_extension = '.txt'")
    assert [image.caption for image in dataset.images] == ["one\ntwo", "", "é"]
    assert any("the caption file is empty: 001.png" in notice for notice in dataset.notices)
    assert any("only the first line of the caption is used" in notice and "000.png" in notice for notice in dataset.notices)


def test_face_crop_names_share_the_caption_of_their_original(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    noise_image(64, 64).save(folder / "anna_10_20_30_40.png")
    (folder / "anna.txt").write_text("anna smiling")
    assert scan_folder(folder).images[0].caption == "anna smiling"


@pytest.mark.parametrize("key", ["a.png", "a", "{folder}/a.png", "{folder}/a", "sub/b.png", "sub/b", "sub\\b"])
def test_metadata_keys_of_every_kind_find_their_image(tmp_path, key):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        noise_image(64, 64).save(tmp_path / name)
    dataset = scan_metadata(tmp_path, {key.replace("{folder}", str(tmp_path)): {"caption": "a dog", "tags": "x, y"}})
    assert dataset.images[0].path.name in ("a.png", "b.png")
    assert (dataset.images[0].caption, dataset.images[0].tags) == ("a dog,x, y", "x, y")


def test_json_lines_say_the_same(tmp_path):
    noise_image(64, 64).save(tmp_path / "a.png")
    content = '{"image_path": "a.png", "caption": "one", "image_size": [9, 9]}\n\n'
    dataset = scan_metadata(tmp_path, content, name="meta.jsonl")
    assert (dataset.images[0].caption, dataset.images[0].size) == ("one", (64, 64))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("meta.json", '{"a": 3}', "meta.json: entry 'a': should be an object with caption or tags"),
        ("meta.json", '{"a": {"caption": ["x"]}}', "meta.json: entry 'a': caption should be text"),
        ("meta.json", '{"a": {}', "meta.json: is not valid JSON: Expecting ',' delimiter (at line 1, column 9)"),
        ("meta.json", "[]", "should be one JSON object with an entry for each image"),
        ("meta.json", "{}", "names no images"),
        ("meta.jsonl", '{"caption": "x"}\n{', "meta.jsonl: line 2: is not valid JSON"),
        ("meta.jsonl", '{"caption": "x"}', "meta.jsonl: line 1: 'image_path' is missing"),
        ("meta.json", '{"gone": {}}', "gone: is not in"),
        ("meta.json", '{"twin": {}}', "twin: may be any of twin.jpg, twin.png; write the extension"),
        ("meta.json", '{"a": {}, "a.png": {}}', "a.png is named twice"),
    ],
)
def test_mistakes_in_metadata_are_named_by_entry_or_line(tmp_path, name, content, sentence):
    for image in ("a.png", "twin.png", "twin.jpg"):
        noise_image(64, 64).save(tmp_path / image)
    with pytest.raises(UserError) as caught:
        scan_metadata(tmp_path, content, name=name)
    assert sentence in str(caught.value)


def test_in_json_takes_its_images_from_train_data_dir(tmp_path):
    noise_image(64, 64).save(tmp_path / "a.png")
    (tmp_path / "meta.json").write_text('{"a": {"tags": "x"}}')
    dataset = scan_dataset(
        DatasetOptions(in_json=tmp_path / "meta.json", train_data_dir=tmp_path, resolution="64", dataset_repeats=3)
    )
    assert (dataset.images[0].caption, dataset.images[0].repeats) == ("x", 3)
    assert not dataset.settings[0].is_dreambooth


def test_an_image_too_small_for_its_bucket_is_a_sentence(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    Image.new("RGB", (60, 500)).save(folder / "thin.png")
    with pytest.raises(
        UserError, match=r"thin.png: is 60x500: with bucket_no_upscale a side would be below bucket_reso_steps 64"
    ):
        scan_folder(folder, dataset="resolution = 512\nenable_bucket = true\nbucket_no_upscale = true")


def test_no_pixel_is_decoded_by_a_scan(draw_images, monkeypatch):
    from PIL import ImageFile

    folder = draw_images("a", [(64, 64)])
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a scan reads headers alone"))
    assert scan_folder(folder).images[0].size == (64, 64)


def test_the_same_picture_under_several_names_is_said(draw_images):
    folder = draw_images("a", [(64, 64), (96, 64), (70, 64)])
    (folder / "copy.png").write_bytes((folder / "001.png").read_bytes())
    said = [notice for notice in scan_folder(folder).notices if "same picture under several names" in notice]
    assert said == [f"the same picture under several names: {folder / '001.png'}, {folder / 'copy.png'}"]
