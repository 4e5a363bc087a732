"""A folder of images: names, copies, what a second run does, and what goes wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.errors import UserError
from library.resizing.folder import ResizeOptions, plan_folder
from library.resizing.pictures import Recipe
from library.resizing.run import Outcome, outcome_lines, resize_folder


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(["wide.png", "tall.jpg", "small.JPG"]):
        size = [(200, 100), (100, 200), (20, 20)][number]
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    (folder / "wide.caption").write_text("another")
    (folder / "wide.npz").write_bytes(b"latents")
    (folder / "notes.md").write_text("about them all")
    (folder / "inside").mkdir()
    return folder


def options(source: Path, *, areas=((64, 64), (32, 32)), associated: bool = True, **recipe: object) -> ResizeOptions:
    recipes = tuple(Recipe(**{"area": area, **recipe}) for area in areas)
    return ResizeOptions(source=source, target=source.parent / "out", recipes=recipes, copy_associated_files=associated)


def run(asked: ResizeOptions, processes: int = 1) -> Outcome:
    return resize_folder(plan_folder(asked), asked.target, progress=lambda done, total: None, processes=processes)


def test_the_target_holds_the_images_their_pictures_and_all_other_files(source):
    outcome = run(options(source))
    out = source.parent / "out"
    pictures = {f"{stem}+{side}x{side}.jpg" for stem in ("wide", "tall", "small") for side in (64, 32)}
    texts = {f"{stem}+{side}x{side}.txt" for stem in ("wide", "tall", "small") for side in (64, 32)}
    originals = {entry.name for entry in source.iterdir() if entry.is_file()}
    assert set(os.listdir(out)) == pictures | texts | originals | {"wide+64x64.caption", "wide+32x32.caption"}
    assert {name: Image.open(out / name).size for name in pictures} == {
        "wide+64x64.jpg": (91, 45),
        "wide+32x32.jpg": (45, 23),
        "tall+64x64.jpg": (45, 91),
        "tall+32x32.jpg": (23, 45),
        "small+64x64.jpg": (20, 20),
        "small+32x32.jpg": (20, 20),
    }
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in originals)
    assert (out / "tall+32x32.txt").read_text() == "caption of tall.jpg"
    assert (outcome.made, outcome.full_size, outcome.problems) == (6, 2, ())


def test_captions_get_new_names_only_when_asked(source):
    run(options(source, associated=False))
    assert not list((source.parent / "out").glob("*+*.txt"))
    assert (source.parent / "out" / "wide.txt").is_file()


def test_several_processes_do_the_same_as_one(source):
    one = run(options(source))
    first = {path.name: path.read_bytes() for path in (source.parent / "out").iterdir()}
    (source.parent / "out").rename(source.parent / "first")
    assert run(options(source), processes=2) == one
    assert {path.name: path.read_bytes() for path in (source.parent / "out").iterdir()} == first


def test_a_second_run_does_only_what_is_missing_or_changed(source):
    run(options(source))
    out = source.parent / "out"
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    def changed() -> set[str]:
        return {path.name for path in out.iterdir() if path.stat().st_mtime_ns != times.get(path.name)}

    again = run(options(source))
    assert (again.made, again.copied) == (0, 0)
    assert changed() == set()
    (out / "tall+64x64.jpg").unlink()
    (out / "wide.txt").unlink()
    (source / "small.txt").write_text("CAPTION of small.JPG")
    os.utime(source / "wide.png", ns=(1, 1))
    again = run(options(source))
    assert (again.made, again.current) == (3, 3)
    captions = {"small.txt", "small+64x64.txt", "small+32x32.txt"}
    assert changed() - {"wide.txt"} == {"tall+64x64.jpg", "wide+64x64.jpg", "wide+32x32.jpg"} | captions
    assert (out / "small+32x32.txt").read_text() == "CAPTION of small.JPG"


@pytest.mark.parametrize("change", [{"divisible_by": 8}, {"interpolation": "cubic"}])
def test_other_options_make_the_pictures_anew(change, source):
    run(options(source))
    assert run(options(source, **change)).made == 6


def test_a_file_that_is_no_picture_of_ours_is_replaced(source):
    run(options(source))
    (source.parent / "out" / "wide+64x64.jpg").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(source.parent / "out" / "wide+32x32.jpg")
    assert run(options(source)).made == 2


def test_broken_images_are_named_and_the_others_are_done(source):
    (source / "broken.png").write_bytes(b"nothing")
    (source / "broken.txt").write_text("its caption")
    (source / "thin.png").write_bytes((source / "wide.png").read_bytes())
    Image.new("RGB", (400, 8)).save(source / "thin.png")
    outcome = run(options(source, divisible_by=8))
    assert outcome.problems == (
        f"{source / 'broken.png'}: is not an image",
        f"{source / 'thin.png'}: at 32x32 it would be 226x5, which cannot be cut to multiples of 8",
    )
    written = set(os.listdir(source.parent / "out"))
    assert {"wide+64x64.jpg", "thin+64x64.jpg", "thin.png", "broken.txt"} <= written
    assert not {"broken.png", "broken+64x64.txt", "thin+32x32.jpg"} & written


def test_a_mistake_found_in_another_process_keeps_its_sentence(source):
    asked = options(source)
    plan = plan_folder(asked)
    (source.parent / "out" / "wide+64x64.jpg").mkdir(parents=True)
    with pytest.raises(UserError, match=r"wide\+64x64\.jpg: is a folder; name a file in it") as error:
        resize_folder(plan, asked.target, progress=lambda done, total: None, processes=2)
    assert error.value.what == "is a folder"


def test_transparency_that_jpeg_cannot_hold_is_told(source):
    Image.new("RGBA", (90, 90)).save(source / "clear.png")
    asked = options(source)
    lines = outcome_lines(plan_folder(asked), asked, run(asked))
    assert "images put on white, because JPEG has no transparency (--save_as_png keeps it): 1" in lines
    assert "folders in the source, which are not searched: 1" in lines
    assert lines[-1].endswith("4 images at 64x64, 32x32; pictures: 8 made, 0 up to date; files: 18 copied, 0 up to date")


def test_what_cannot_be_meant_is_refused_before_anything_is_written(source, tmp_path):
    def refused(match: str, **changes: object) -> None:
        with pytest.raises(UserError, match=match):
            plan_folder(ResizeOptions(**{**vars(options(source)), **changes}))

    refused("is the folder of the images", target=source)
    refused("is the folder of the images", target=source / "inside" / "..")
    refused("no such folder", source=tmp_path / "nothing")
    refused("is a file, not a folder", source=source / "wide.png")
    refused("is a file, not a folder", target=source / "wide.png")
    refused("holds no images", source=source / "inside")
    (source / "wide.jpg").write_bytes((source / "tall.jpg").read_bytes())
    refused(r"wide\.jpg, .*wide\.png: would become one file, wide\+64x64\.jpg")
    assert not (tmp_path / "out").exists()
