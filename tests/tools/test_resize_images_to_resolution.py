"""The door of the image resizer: the documented command, exit status, sentences."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from tests.support.command_lines import Finished, assert_refused, draw_images, run_script
from tools.resize_images_to_resolution import work

DOOR = "tools/resize_images_to_resolution.py"


def test_the_documented_command_runs(tmp_path):
    draw_images(tmp_path / "source_image_folder", 2, [(640, 480), (300, 500)])
    finished = run_script(
        DOOR,
        *("--max_resolution", "512x512,384x384,256x256", "--save_as_png"),
        *("--copy_associated_files", "source_image_folder", "destination_folder"),
        cwd=tmp_path,
    ).require_success()
    names = [f"{stem}{end}" for stem in ("00", "01") for end in ("", "+256x256", "+384x384", "+512x512")]
    assert sorted(os.listdir(tmp_path / "destination_folder")) == sorted(f"{n}{e}" for n in names for e in (".png", ".txt"))
    assert Image.open(tmp_path / "destination_folder" / "00+256x256.png").size == (296, 222)
    assert Image.open(tmp_path / "destination_folder" / "01+512x512.png").size == (300, 500), "never enlarged"
    assert finished.last_line == (
        "destination_folder: 2 images at 512x512, 384x384, 256x256; pictures: 6 made, 0 up to date;"
        " files: 10 copied, 0 up to date"
    )


def test_a_broken_image_is_named_at_the_end_with_status_1(tmp_path, capsys):
    folder = draw_images(tmp_path / "images", 1)
    (folder / "bad.jpg").write_bytes(b"bad")
    status = work(["--max_resolution=32x32", str(folder), str(tmp_path / "out")])
    assert status == 1
    assert capsys.readouterr().err.splitlines() == [f"resize_images_to_resolution: {folder / 'bad.jpg'}: is not an image"]
    assert (tmp_path / "out" / "00+32x32.jpg").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max_resolution", "512"], "--max_resolution: '512' is not a width and a height, as in 512x512"),
        (["--max_resolution", "512x0"], "'512x0' is not a width and a height"),
        (["--divisible_by", "0"], "--divisible_by 0: must be 1 or more"),
        (["--interpolation", "lanczos"], "--interpolation: 'lanczos' is not known; did you mean lanczos4?"),
        (["--save_as_jpg"], "--save_as_jpg: unknown option; did you mean save_as_png?"),
        (["third"], "what is 'third'?"),
    ],
)
def test_mistakes_are_sentences(arguments, sentence, tmp_path, capsys):
    from library.cli.doors import run_door

    draw_images(tmp_path / "images", 1)
    status = run_door("resize", work, [str(tmp_path / "images"), str(tmp_path / "out"), *arguments])
    captured = capsys.readouterr()
    assert_refused(Finished(status, captured.out, captured.err), sentence)
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_name_is_a_sentence(tmp_path):
    assert_refused(run_script(DOOR, "only_one", cwd=tmp_path), "the following arguments are required: dst_img_folder")
