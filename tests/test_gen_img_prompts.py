"""What prompts can say on the command line of gen_img_diffusers.py, and where they may come from."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import gen_img_diffusers
from library.checkpoints import base_model
from library.generation.png_info import read_recipe
from tests.support.drawing import SMALL, draw, pictures_in, pixels, write_lora

FREQUENCY = json.dumps({"3_sks hero": {"sks hero": 9, "hat": 4}})


LOAD_TOKENIZER = base_model.load_tokenizer


@pytest.fixture(scope="module", autouse=True)
def _tokenizers_are_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "load_tokenizer", cache(base_model.load_tokenizer))
        yield


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, tiny_sd1_folder, tiny_sd2_folder) -> Path:
    """Adapters by name: one, one in a folder of its own with a dot in its name, one for SD2, and a broken file."""
    folder = tmp_path_factory.mktemp("shelf")
    metadata = {"ss_tag_frequency": FREQUENCY, "ss_output_name": "the hero", "ss_base_model_version": "sd_v1"}
    write_lora(folder / "hero.safetensors", tiny_sd1_folder, metadata)
    write_lora(folder / "styles" / "ink.v2.safetensors", tiny_sd1_folder, seed=1000)
    write_lora(folder / "second.safetensors", tiny_sd2_folder, {"ss_base_model_version": "sd_v2"})
    (folder / "broken.safetensors").write_bytes(b"no tensors")
    return folder


@pytest.fixture
def command(tiny_sd1_folder, shelf, tmp_path):
    return ("--ckpt", tiny_sd1_folder, "--lora_dir", shelf, "--outdir", tmp_path / "out", "--seed", 1)


def one(*arguments: object) -> np.ndarray:
    (picture,) = draw(*arguments)
    return pixels(picture)


@pytest.mark.parametrize("name", ["hero", "the hero", "ink.v2", "ink_v2", "styles/ink.v2", "styles/ink.v2.safetensors"])
def test_an_adapter_is_found_by_any_of_its_names(command, shelf, tmp_path, name):
    file = shelf / ("hero.safetensors" if "hero" in name else "styles/ink.v2.safetensors")
    by_tag = one(*command, "--prompt", f"a cat<lora:{name}:0.8>")
    by_path = one(
        *command[:4], *("--outdir", tmp_path / "b", "--seed", 1, "--prompt", "a cat"),
        *("--network_weights", file, "--network_mul", 0.8),
    )  # fmt: skip
    assert np.array_equal(by_tag, by_path)
    assert np.abs(by_tag - one(*command[:4], "--outdir", tmp_path / "c", "--seed", 1, "--prompt", "a cat")).mean() > 0.5


def test_the_documented_tags_of_web_uis_draw(command, shelf, tmp_path):
    """Those of SD.Next's page and of the first tutorial, with names that are there."""
    tags = ["te=0.5:unet=1.5", "1.0:in=0:mid=1:out=0", "te=0.1@1,0.6@6", "0.8", "1:te=0.5", "0"]
    prompts = tmp_path / "p.txt"
    prompts.write_text(
        "\n".join(f"a cat <lora:hero:{tag}> --d 1 --s 4" for tag in tags) + "\na cat <lora:hero> --d 1 --s 4\n"
    )
    drawn = [pixels(path) for path in draw(*command, "--from_file", prompts, "--batch_size", 8)]
    assert len({picture.tobytes() for picture in drawn}) == len(drawn)


def test_trigger_words_go_to_prompts_that_have_them_not(command):
    draw(*command, "--prompt", "a cat<lora:hero:0.5>", "--apply_trigger_words", 2)
    (picture,) = pictures_in(command[5])
    assert read_recipe(picture)[0].prompt == "a cat<lora:hero:0.5>, sks hero, hat"


def test_a_bad_line_is_named_by_number_and_the_others_are_drawn(command, capsys, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\na dog --widht 3\n# nothing\na <lora:heroo:1>\na <lora:second:1>\na house --w 72\n")
    assert gen_img_diffusers.main([*map(str, command), "--from_file", str(prompts), *SMALL]) == 2
    said = capsys.readouterr()
    assert len(pictures_in(command[5])) == 2
    sentences = said.err.splitlines()
    assert [sentence.split(", ")[1].split(":")[0] for sentence in sentences] == ["line 2", "line 4", "line 5"]
    assert "did you mean hero?" in sentences[1]
    assert "is an adapter for Stable Diffusion 2.x, and the base model is Stable Diffusion 1.x" in sentences[2]
    assert said.out.splitlines()[-1].startswith("2 pictures in ")


def test_typed_prompts_survive_mistakes(command, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\na <lora:none:1>\n\n# nothing\na dog --s x\na house --d 5\n"))
    assert gen_img_diffusers.main([*map(str, command), "--interactive", *SMALL]) == 0
    said = capsys.readouterr()
    recipes = [read_recipe(path)[0] for path in pictures_in(command[5])]
    assert [(recipe.prompt, recipe.seed) for recipe in recipes] == [("a cat", 1), ("a house", 5)]
    assert [sentence.split(": ")[1].split(",")[0] for sentence in said.err.splitlines()] == ["prompt 2", "prompt 3"]


UNDRAWABLE = "a <lora:hero:1e38> --d 3"
"""What only drawing finds out: numbers that are none."""


def test_a_line_that_fails_while_it_is_drawn_leaves_the_others_their_pictures(command, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(f"\ufeffa cat --d 1\r\n{UNDRAWABLE}\r\na house --d 5\r\n".encode())
    arguments = [*command, "--from_file", prompts, "--batch_size", 3, *SMALL]
    assert gen_img_diffusers.main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert [read_recipe(path)[0].seed for path in pictures_in(command[5])] == [1, 5]
    (sentence,) = said.err.splitlines()
    assert sentence.startswith(f"gen_img_diffusers: --from_file {prompts}, line 2: the picture of seed 3")
    assert said.out.splitlines()[-1].startswith("2 pictures in ")


def test_a_mask_without_a_picture_leaves_out_its_line_alone(command, capsys, tmp_path):
    prompts, mask = tmp_path / "prompts.txt", tmp_path / "mask.png"
    prompts.write_text("a AND b --d 1\nplain --d 5\n")
    Image.new("RGB", (64, 64), "red").save(mask)
    arguments = [*command, "--from_file", prompts, "--mask_path", mask, *SMALL]
    assert gen_img_diffusers.main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert [read_recipe(path)[0].seed for path in pictures_in(command[5])] == [1]
    (sentence,) = said.err.splitlines()
    assert sentence.startswith(f"gen_img_diffusers: --from_file {prompts}, line 2, --mask_path {mask}: there is no picture")


def test_typed_prompts_survive_what_only_drawing_finds_out(command, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{UNDRAWABLE}\na house --d 5\n"))
    assert gen_img_diffusers.main([*map(str, command), "--interactive", *SMALL]) == 0
    assert [read_recipe(path)[0].seed for path in pictures_in(command[5])] == [5]
    assert "gen_img_diffusers: prompt 1: the picture of seed 3" in capsys.readouterr().err


def test_a_folder_is_listed_with_its_broken_files_and_nothing_else_is_done(shelf, capsys):
    assert gen_img_diffusers.main(["--list_loras", "--lora_dir", str(shelf)]) == 0
    titles, *lines, last = capsys.readouterr().out.splitlines()
    assert titles.split()[:5] == ["name", "family", "type", "rank", "size"]
    by_name = {line.split()[0]: line for line in lines}
    assert "Stable Diffusion 1.x" in by_name["hero"]
    assert by_name["hero"].endswith("sks hero, hat")
    assert "Stable Diffusion 2.x" in by_name["second"]
    assert last == "4 files, 1 of them no adapter that can be used"


def test_metadata_are_printed_on_request(command, shelf, capsys):
    draw(*command, "--prompt", "a", "--network_weights", shelf / "hero.safetensors", "--network_show_meta")
    assert "the hero" in capsys.readouterr().out


def test_pictures_begin_from_a_folder_of_pictures_with_the_prompts_they_hold(command, tmp_path):
    draw(*command, "--prompt", "a {red|blue} cat --n blurry", "--images_per_prompt", 2, "--W", 72, "--H", 64, "--steps", 1)
    sources = pictures_in(command[5])
    again = draw(
        *(*command[:4], "--outdir", tmp_path / "b", "--seed", 3, "--image_path", command[5]),
        *("--strength", 0.5, "--steps", 2, "--use_original_file_name", "--n_iter", 1),
    )
    assert [path.name for path in again] == [path.name for path in sources]
    for path, source in zip(again, sources, strict=True):
        made, original = read_recipe(path)[0], read_recipe(source)[0]
        assert (made.prompt, made.negative_prompt, made.image) == (original.prompt, "blurry", str(source))
        assert (made.strength, made.width) == (0.5, 64)


def test_a_picture_has_the_size_of_the_one_it_begins_from(command, tmp_path):
    Image.new("RGB", (83, 70), "red").save(tmp_path / "red.png")
    assert (
        gen_img_diffusers.main(
            [*map(str, command), "--prompt", "a", "--image_path", str(tmp_path / "red.png"), "--steps", "2"]
        )
        == 0
    )
    (picture,) = pictures_in(command[5])
    assert pixels(picture).shape == (64, 80, 3)


def test_masks_of_prompts_with_and_are_regions(command, tmp_path):
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, :32, 0], halves[:, 32:, 1] = 255, 255
    Image.fromarray(halves).save(tmp_path / "halves.png")
    prompt = "a cat<lora:hero:1> AND a house<lora:ink.v2:1>"
    draw(*command, "--prompt", prompt, "--mask_path", tmp_path / "halves.png")
    (picture,) = pictures_in(command[5])
    request = read_recipe(picture)[0]
    assert (request.regions, request.mask) == (str(tmp_path / "halves.png"), None)


def test_both_stages_are_saved_on_request(command):
    draw(*command, "--prompt", "a", "--highres_fix_scale", 0.5, "--highres_fix_steps", 1, "--highres_fix_save_1st",
         *("--W", 128, "--H", 128, "--steps", 2, "--sequential_file_name"))  # fmt: skip
    assert [(path.name, pixels(path).shape[0]) for path in pictures_in(command[5])] == [
        ("im_0000001.png", 64),
        ("im_000001.png", 128),
    ]


def test_first_stages_are_named_as_their_pictures(command, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a --d 3\nb --d 3\nc --d 3 --f epoch_v1.5\n")
    draw(*command, "--from_file", prompts, "--highres_fix_scale", 0.5, "--highres_fix_steps", 1, "--highres_fix_save_1st",
         *("--W", 128, "--H", 128, "--steps", 1, "--sequential_file_name", "--batch_size", 3))  # fmt: skip
    assert {path.name: read_recipe(path)[0].prompt for path in pictures_in(command[5])} == {
        "im_0000001.png": "a",
        "im_000001.png": "a",
        "im_0000002.png": "b",
        "im_000002.png": "b",
        "epoch_v1.5_0.png": "c",
        "epoch_v1.5.png": "c",
    }


def test_words_of_embeddings_act_from_files_and_from_adapters(command, shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "load_tokenizer", LOAD_TOKENIZER)  # a tokenizer that learns is not for the next run
    plain = one(*command, "--prompt", "a photo of mycat")
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": vectors}, tmp_path / "mycat.safetensors")
    files = ("--textual_inversion_embeddings", tmp_path / "mycat.safetensors")
    taught = one(*command[:4], "--outdir", tmp_path / "b", "--seed", 1, "--prompt", "a photo of mycat", *files)
    assert np.abs(plain - taught).max() > 2
    tensors = load_file(shelf / "hero.safetensors") | {"bundle_emb.mycat.string_to_param.*": vectors}
    save_file(tensors, tmp_path / "bundled.safetensors")
    tag = f"<lora:{tmp_path / 'bundled.safetensors'}:0>"
    bundled = one(*command[:4], "--outdir", tmp_path / "c", "--seed", 1, "--prompt", f"a photo of mycat{tag}")
    assert np.array_equal(bundled, taught)


def test_wildcards_are_drawn_from_files(command, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "color.txt").write_text("# colours\nred\nblue\n")
    draw(*command, "--prompt", "a __color__ cat", "--wildcards_dir", tmp_path / "words", "--images_per_prompt", 8)
    prompts = {read_recipe(path)[0].prompt for path in pictures_in(command[5])}
    assert prompts == {"a red cat", "a blue cat"}
