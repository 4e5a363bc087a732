"""Grids on tiny models: pictures as single commands draw them, kept where they are there, and named for what they show."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

import gen_img_diffusers
from library.generation.png_info import read_recipe
from tests.support.drawing import SMALL, draw, pixels, refused, write_lora

pytestmark = pytest.mark.usefixtures("_tokenizers_are_read_once")


@pytest.fixture(scope="module")
def epochs(tmp_path_factory, tiny_sd1_folder) -> Path:
    """A folder with the files of a run."""
    folder = tmp_path_factory.mktemp("epochs")
    for number, name in enumerate(("mine-000002", "mine-000010", "mine", "other")):
        write_lora(folder / f"{name}.safetensors", tiny_sd1_folder, {"ss_training_comment": str(number)})
    return folder


def grid(*arguments: object, folder: str = "grid_001") -> Path:
    """A grid drawn in this process; its folder."""
    arguments = tuple(map(str, arguments))
    assert gen_img_diffusers.main([*arguments, *SMALL]) == 0
    return Path(arguments[arguments.index("--outdir") + 1]) / folder


def prompts_of(folder: Path) -> set[str]:
    return {read_recipe(path)[0].prompt for path in (folder / "pictures").glob("*.png")}


def test_cells_are_the_pictures_that_single_commands_draw(capsys, tiny_sd1_folder, tiny_sd1_lora, tmp_path):
    common = ("--ckpt", tiny_sd1_folder, "--seed", 5, "--network_weights", tiny_sd1_lora)
    folder = grid(*common, "--prompt", "a cat", "--outdir", tmp_path, "--grid", "x=strength:0,0.5,1", "y=scale:1,7.5")
    lines = capsys.readouterr().out.splitlines()
    assert "1 grid of 3 x 2: 6 pictures, 6 steps" in lines
    assert lines[-3:-1] == [str(folder / "sheet.png"), str(folder / "index.html")]
    assert lines[-1].startswith(f"6 pictures in {tmp_path}")
    for strength in (0, 0.5, 1):
        for scale in (1, 7.5):
            command = (*common, "--prompt", f"a cat --l {scale}", "--network_mul", strength)
            (alone,) = draw(*command, "--outdir", tmp_path / f"{strength} {scale}")
            (cell,) = (folder / "pictures").glob(f"strength {strength:g}, scale {scale:g}.png")
            assert np.array_equal(pixels(alone), pixels(cell))
    assert read_recipe(cell)[0].network_strengths == (1,)


def test_epochs_come_in_the_order_in_which_people_count(tiny_sd1_folder, epochs, tmp_path):
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a cat", "--outdir", tmp_path)
    folder = grid(*command, "--grid", f"x=lora:none,{epochs}/mine*.safetensors")
    page = (folder / "index.html").read_text()
    assert re.findall(r'<th scope="col">([^<]*)', page) == ["none", "mine-000002", "mine-000010", "mine"]
    files = [epochs / f"{name}.safetensors" for name in ("mine-000002", "mine-000010", "mine")]
    assert prompts_of(folder) == {"a cat", *(f"a cat <lora:{file}:1>" for file in files)}
    (picture,) = (folder / "pictures").glob("lora mine-000010.png")
    assert read_recipe(picture)[1]["tag_files"] == {str(files[1]): str(files[1])}


def test_names_and_patterns_are_looked_up_in_the_folder_of_adapters(tiny_sd1_folder, epochs, tmp_path):
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a <lora:other:0.5> cat", "--outdir", tmp_path, "--lora_dir", epochs)
    folder = grid(*command, "--grid", "y=lora:mine,mine-*", "x=lbw:ALL,MIDD")
    assert prompts_of(folder) == {
        f"a <lora:{name}:0.5:lbw={preset}> cat"
        for name in ("mine", "mine-000002.safetensors", "mine-000010.safetensors")
        for preset in ("ALL", "MIDD")
    }


def test_what_is_there_is_kept_and_what_has_changed_is_drawn_again(capsys, tiny_sd1_folder, epochs, tmp_path):
    mine = shutil.copy(epochs / "mine.safetensors", tmp_path)
    command = ("--ckpt", tiny_sd1_folder, "--prompt", f"a cat <lora:{mine}>", "--outdir", tmp_path / "out", "--grid")
    folder = grid(*command, "x=seed:1-3")
    before = {path: path.stat().st_mtime_ns for path in (folder / "pictures").iterdir()}
    gone = folder / "pictures" / "seed 2.png"
    old = pixels(gone)
    gone.unlink()
    capsys.readouterr()
    assert grid(*command, "x=seed:1-4") == folder
    assert "4 pictures; 2 of them are in" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in (folder / "pictures").iterdir()}
    assert {path for path in after if before.get(path) != after[path]} == {gone, gone.with_name("seed 4.png")}
    assert np.array_equal(pixels(gone), old)
    # another adapter under the same name
    write_lora(Path(mine), tiny_sd1_folder, seed=1000)
    capsys.readouterr()
    changed = grid(*command, "x=seed:1-4", folder="grid_002")
    assert "4 pictures, 4 steps" in capsys.readouterr().out
    assert not np.array_equal(pixels(changed / "pictures" / "seed 2.png"), old)


def test_a_grid_that_is_complete_needs_no_model(capsys, monkeypatch, tiny_sd1_folder, tmp_path):
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a cat", "--outdir", tmp_path, "--grid", "x=seed:1,2")
    folder = grid(*command)
    (folder / "sheet.png").unlink()
    monkeypatch.setattr("library.generation.loading.load_pipeline", None)
    grid(*command)
    assert (folder / "sheet.png").is_file()
    assert "2 of them are in" in capsys.readouterr().out


def test_another_grid_has_a_folder_of_its_own(tiny_sd1_folder, tmp_path):
    command = ("--ckpt", tiny_sd1_folder, "--outdir", tmp_path, "--grid")
    grid(*command, "x=seed:1,2", "--prompt", "a cat")
    grid(*command, "x=seed:1,2", "--prompt", "a dog", folder="grid_002")
    assert prompts_of(tmp_path / "grid_002") == {"a dog"}
    assert json.loads((tmp_path / "grid_002" / "grid.json").read_text())["axes"] == {"x": "seed"}


def test_each_prompt_has_a_sheet_and_without_a_seed_the_grid_is_the_same_again(tiny_sd1_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat --n red things\na red & small <dog\n")
    command = ("--ckpt", tiny_sd1_folder, "--from_file", prompts, "--outdir", tmp_path / "out")
    folder = grid(*command, "--grid", "x=prompt:red|blue", "y=sampler:ddim,euler_a")
    assert {path.name for path in folder.iterdir()} == {
        *("sheet_1.png", "sheet_2.png", "index.html", "grid.json", "pictures")
    }
    requests = [read_recipe(path)[0] for path in (folder / "pictures").iterdir()]
    assert len(requests) == 8
    assert {(each.prompt, each.negative_prompt) for each in requests} == {
        *(("a red cat", "red things"), ("a blue cat", "blue things")),
        *(("a red & small <dog", ""), ("a blue & small <dog", "")),
    }
    for first in ("cat", "dog"):
        assert len({each.seed for each in requests if first in each.prompt}) == 1


def test_the_page_works_alone_and_says_how_each_picture_was_drawn(tiny_sd1_folder, tmp_path):
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a <b>cat</b> & 100%", "--outdir", tmp_path)
    folder = grid(*command, "--grid", "x=steps:1,2")
    page = (folder / "index.html").read_text()
    assert "<script" not in page
    assert "://" not in page
    assert "<b>cat</b>" not in page
    assert "a <b>cat</b> & 100%" in unescape(page)
    links = {unquote(unescape(link)) for link in re.findall(r'(?:src|href)="([^"]*)"', page)}
    assert links == {"sheet.png", "pictures/steps 1.png", "pictures/steps 2.png"}
    assert all((folder / link).is_file() for link in links)
    assert "seed 1, 2 steps, scale 7.5, ddim, 64x64" in page


def test_a_rank_is_cut_from_a_file_as_a_tag_does_it(tiny_sd1_folder, tiny_sd1_lora, tmp_path):
    common = ("--ckpt", tiny_sd1_folder, "--prompt", "a cat", "--seed", 1, "--network_weights", tiny_sd1_lora)
    folder = grid(*common, "--network_mul", 0.5, "--outdir", tmp_path, "--grid", "x=rank:1,2,4")
    drawn = [pixels(folder / "pictures" / f"rank {rank}.png") for rank in (1, 2, 4)]
    assert not np.array_equal(drawn[0], drawn[1])
    (whole,) = draw(*common, "--network_mul", 0.5, "--outdir", tmp_path / "whole")
    assert np.array_equal(drawn[2], pixels(whole))
    tagged = ("--ckpt", tiny_sd1_folder, "--seed", 1, "--prompt", f"a cat <lora:{tiny_sd1_lora}:0.5:dyn=2>")
    (cut,) = draw(*tagged, "--outdir", tmp_path / "cut")
    assert np.array_equal(drawn[1], pixels(cut))


def test_the_strength_of_a_beginning_is_called_denoising(tiny_sd1_folder, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a", "--image_path", tmp_path / "red.png")
    folder = grid(*command, "--outdir", tmp_path / "out", "--grid", "x=denoising:0-1:0.5")
    assert {read_recipe(path)[0].strength for path in (folder / "pictures").iterdir()} == {0, 0.5, 1}


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        (("x=strenght:0,1",), "'strenght' cannot be varied; did you mean strength"),
        (("x=steps:1,0",), "0 steps is out of range"),
        (("x=clip_skip:1,4",), "the text encoder has 3 layers"),
        (("x=strength:0,1",), "there is no adapter to vary in 'a cat'; write <lora:FILE:1> into the prompt"),
        (("x=rank:4", "y=seed:1,2"), "there is no adapter to vary"),
        (("x=prompt:dog|bird",), "'dog' does not stand in the prompt 'a cat'"),
        (("x=lora:none/*.safetensors",), "no adapter file fits none/*.safetensors"),
        (("x=lora:gone",), "there is no adapter 'gone'"),
        (("x=seed:1,2", "--compare_base"), "a grid can show the base itself; give the axis strength:0,1"),
        (("x=seed:1,2", "--sequential_file_name"), "the pictures of a grid are named after its axes"),
        ((), "names no axis"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(capsys, tiny_sd1_folder, tmp_path, axes, sentence):
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a cat", "--outdir", tmp_path / "out", "--grid", *axes)
    assert sentence in refused(capsys, *command)
    assert not list((tmp_path / "out").glob("*"))


def test_a_rank_that_a_file_has_not_is_refused_and_so_is_an_adapter_that_is_merged(
    capsys, tiny_sd1_folder, tiny_sd1_lora, tmp_path
):
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a cat", "--outdir", tmp_path, "--network_weights", tiny_sd1_lora)
    assert "has no rank 5; give 1 to 4" in refused(capsys, *command, "--grid", "x=rank:4,5")
    assert "one that is merged stays as it is" in refused(capsys, *command, "--network_merge", "--grid", "x=strength:0,1")
