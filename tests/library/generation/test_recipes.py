"""Pictures again from what they say of themselves: the same pixels, and with options the same picture varied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import gen_img_diffusers
from library.generation.png_info import RECIPE, read_recipe
from tests.support.drawing import draw, pixels, refused, write_lora

pytestmark = pytest.mark.usefixtures("_tokenizers_are_read_once")


def again(picture: Path, *arguments: object) -> Path:
    """Drawn from its recipe, into a folder beside it."""
    folder = picture.parent / "again"
    shutil.rmtree(folder, ignore_errors=True)
    assert gen_img_diffusers.main(["--from_png", str(picture), "--outdir", str(folder), *map(str, arguments)]) == 0
    (drawn,) = folder.glob("*.png")
    return drawn


def with_recipe(source: Path, target: Path, **made_with: object) -> Path:
    """A copy of a picture whose recipe says something else."""
    with Image.open(source) as image:
        recipe = json.loads(image.info[RECIPE])
        recipe["made_with"] |= made_with
        texts = PngInfo()
        texts.add_text(RECIPE, json.dumps(recipe))
        image.save(target, pnginfo=texts)
    return target


@pytest.fixture
def beginning(tmp_path) -> Path:
    """A picture to begin from, whose halves are colours of regions too."""
    array = np.zeros((64, 64, 3), np.uint8)
    array[:, :32, 0] = array[:, 32:, 1] = 255
    Image.fromarray(array).save(tmp_path / "halves.png")
    return tmp_path / "halves.png"


def test_a_picture_is_made_again_with_all_that_made_it(tiny_sd1_folder, tiny_sd1_lora, beginning, tmp_path):
    model = ("--ckpt", tiny_sd1_folder, "--seed", 3)
    network = ("--network_weights", tiny_sd1_lora, tiny_sd1_lora, "--network_mul", 0.5, 0.25)
    large = ("--W", 128, "--H", 128, "--steps", 3)
    ways = {
        "plain": ("--prompt", r"a \{b|c\} {cat|dog} --n blurry --s 3 --l 5", "--sampler", "euler_a", "--clip_skip", 2),
        "two adapters, bf16": ("--prompt", "a", *network, "--bf16"),
        "merged": ("--prompt", "a --am 0.5", *network, "--network_merge_n_models", 1),
        "tags": ("--prompt", "a <lora:mine:te=0.5:unet=0@0,1@1> --s 3", "--lora_dir", tiny_sd1_lora.parent),
        "tags of a1111": ("--prompt", f"a <lora:{tiny_sd1_lora}:0.5:1:2>", "--lora_tag_style", "a1111"),
        "regions": ("--prompt", f"a AND b <lora:{tiny_sd1_lora}>", "--mask_path", beginning),
        "from a picture": ("--prompt", "a --s 3", "--image_path", beginning, "--strength", 0.6, "--mask_path", beginning),
        "two stages": ("--prompt", "a", "--highres_fix_scale", 0.5, "--highres_fix_steps", 2, *large),
        "zero snr, long": ("--prompt", "a " * 100, "--zero_terminal_snr", "--max_embeddings_multiples", 1),
    }
    for name, arguments in ways.items():
        (picture,) = draw(*model, *arguments, "--outdir", tmp_path / name)
        drawn = again(picture)
        assert np.array_equal(pixels(drawn), pixels(picture)), name
        assert read_recipe(drawn)[0] == read_recipe(picture)[0], name


def test_options_come_before_the_recipe(tiny_sd1_folder, tiny_sd1_lora, tmp_path):
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a --s 2", "--network_weights", tiny_sd1_lora)
    (picture,) = draw(*command, "--seed", 3, "--outdir", tmp_path)
    first = read_recipe(picture)[0]
    varied = read_recipe(again(picture, "--steps", 4, "--seed", 5, "--network_mul", 0.5))[0]
    assert {**vars(first), "steps": 4, "seed": 5, "network_strengths": (0.5,)} == vars(varied)
    weaker = draw(*command, "--seed", 3, "--network_mul", 0.5, "--outdir", tmp_path / "weaker")
    assert np.array_equal(pixels(again(picture, "--network_mul", 0.5)), pixels(weaker[0]))


def test_strengths_without_adapters_are_refused(capsys, tiny_sd1_folder, tiny_sd1_lora, tmp_path):
    command = ("--ckpt", tiny_sd1_folder, "--prompt", f"a <lora:{tiny_sd1_lora}> --s 2", "--outdir", tmp_path)
    (picture,) = draw(*command)
    said = refused(capsys, "--from_png", picture, "--network_mul", 0.5)
    assert "--network_mul 0.5: 1 strength for 0 adapters beside those in tags; give one for each, or change" in said


def test_several_pictures_of_a_recipe_have_seeds_of_their_own(tiny_sd1_folder, tmp_path):
    (picture,) = draw("--ckpt", tiny_sd1_folder, "--prompt", "a", "--seed", 3, "--outdir", tmp_path)
    folder = tmp_path / "more"
    three = draw("--from_png", picture, "--images_per_prompt", 3, "--outdir", folder)
    seeds = [read_recipe(path)[0].seed for path in three]
    assert seeds[0] == 3
    assert len(set(seeds)) == 3


def test_recipes_go_into_grids_and_beside_the_base(tiny_sd1_folder, tiny_sd1_lora, tmp_path):
    command = ("--ckpt", tiny_sd1_folder, "--prompt", f"a <lora:{tiny_sd1_lora}>", "--seed", 3, "--outdir", tmp_path)
    (picture,) = draw(*command)
    out = ("--outdir", str(tmp_path / "out"))
    assert gen_img_diffusers.main(["--from_png", str(picture), "--compare_base", *out]) == 0
    assert len(list((tmp_path / "out").glob("*_compared.png"))) == 1
    assert gen_img_diffusers.main(["--from_png", str(picture), "--grid", "x=strength:0,1", *out]) == 0
    cell = tmp_path / "out" / "grid_001" / "pictures" / "strength 1.png"
    assert np.array_equal(pixels(cell), pixels(picture))


def test_an_adapter_that_has_changed_is_told(capsys, tiny_sd1_folder, tmp_path):
    file = write_lora(tmp_path / "mine.safetensors", tiny_sd1_folder)
    for number, how in enumerate((("--prompt", "a", "--network_weights", file), ("--prompt", f"a <lora:{file}>"))):
        (picture,) = draw("--ckpt", tiny_sd1_folder, *how, "--outdir", tmp_path / str(number))
        again(picture)
        assert "has changed" not in capsys.readouterr().out
        write_lora(file, tiny_sd1_folder, seed=1000 * (number + 1))
        again(picture)
        assert f"{file} has changed since {picture} was drawn" in capsys.readouterr().out


def test_what_is_not_there_is_named_with_the_option_to_give(capsys, tiny_sd1_folder, tiny_sd1_lora, beginning, tmp_path):
    file = Path(shutil.copy(tiny_sd1_lora, tmp_path / "gone.safetensors"))
    model = Path(shutil.copytree(tiny_sd1_folder, tmp_path / "model"))
    common = ("--ckpt", model, "--image_path", beginning)
    (given,) = draw(*common, "--prompt", "a", "--network_weights", file, "--outdir", tmp_path / "given")
    (tagged,) = draw(*common, "--prompt", f"a <lora:{file.stem}>", "--lora_dir", tmp_path, "--outdir", tmp_path / "tagged")
    shutil.rmtree(model)
    file.unlink()
    sentences = refused(capsys, "--from_png", given)
    assert f"{given}: it was drawn with {model}, which is not there; give it with --ckpt" in sentences
    assert f"it was drawn with the adapter {file}, which is not there; give it with --network_weights" in sentences
    sentences = refused(capsys, "--from_png", tagged, "--ckpt", tiny_sd1_folder)
    assert f"its <lora:gone> was {file}, which is not there; give the folder where it is with --lora_dir" in sentences
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(tiny_sd1_lora, moved / file.name)
    for picture, option in ((tagged, ("--lora_dir", moved)), (given, ("--network_weights", moved / file.name))):
        drawn = again(picture, "--ckpt", tiny_sd1_folder, *option)
        assert np.array_equal(pixels(drawn), pixels(picture))
    beginning.unlink()
    sentences = refused(capsys, "--from_png", tagged, "--ckpt", tiny_sd1_folder, "--lora_dir", moved)
    assert f"it was drawn with the picture {beginning}, which is not there; give it with --image_path" in sentences


def test_recipes_of_different_models_or_adapters_are_refused(
    capsys, tiny_sd1_folder, tiny_sd2_folder, tiny_sd1_lora, tmp_path
):
    (plain,) = draw("--ckpt", tiny_sd1_folder, "--prompt", "a", "--outdir", tmp_path / "a")
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a", "--network_weights", tiny_sd1_lora)
    (adapted,) = draw(*command, "--outdir", tmp_path / "b")
    (other,) = draw("--ckpt", tiny_sd2_folder, "--prompt", "a", "--bf16", "--outdir", tmp_path / "c")
    sentences = refused(capsys, "--from_png", plain, adapted, other)
    assert f"{plain} and {adapted} were drawn with different adapters; draw them in two commands" in sentences
    assert f"{plain} and {other} were drawn with different base models" in sentences
    assert f"{plain} and {other} were drawn with different precision" in sentences
    together = ("--from_png", plain, adapted, "--network_weights", tiny_sd1_lora, "--outdir", tmp_path / "d")
    assert len(draw(*together)) == 2


def test_what_holds_no_recipe_or_a_damaged_one_is_refused_by_name(capsys, tiny_sd1_folder, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "empty.png")
    assert "empty.png: does not say how it was made" in refused(capsys, "--from_png", tmp_path / "empty.png")
    assert "no.png" in refused(capsys, "--from_png", tmp_path / "no.png")
    assert "names no picture" in refused(capsys, "--from_png")
    assert f"{tmp_path}: is a folder; give its pictures" in refused(capsys, "--from_png", tmp_path)
    assert "--prompt --from_png: both give prompts" in refused(capsys, "--from_png", "a.png", "--prompt", "a")
    (picture,) = draw("--ckpt", tiny_sd1_folder, "--prompt", "a", "--outdir", tmp_path / "a")
    for number, changes in enumerate(({"networks": [{"file": 1}]}, {"control": [{"a": 1}]}, {"computed": {"b": 1}})):
        damaged = with_recipe(picture, tmp_path / f"{number}.png", **changes)
        assert f"{damaged}: holds a recipe that cannot be read" in refused(capsys, "--from_png", damaged)


def test_a_picture_of_a_web_ui_is_drawn_with_a_model_that_is_given(capsys, tiny_sd1_folder, tiny_sd1_lora, tmp_path):
    texts = PngInfo()
    settings = "Steps: 2, Sampler: Euler a, CFG scale: 4, Seed: 8, Size: 64x64, Model: nice"
    texts.add_text("parameters", f"a {{cat|dog}} <lora:mine:0.5>\nNegative prompt: blurry\n{settings}")
    picture = tmp_path / "web.png"
    Image.new("RGB", (64, 64)).save(picture, pnginfo=texts)
    assert "it does not say which file its base model is but the name nice; give it with --ckpt" in refused(
        capsys, "--from_png", picture
    )
    drawn = again(picture, "--ckpt", tiny_sd1_folder, "--lora_dir", tiny_sd1_lora.parent)
    request = read_recipe(drawn)[0]
    assert (request.prompt, request.negative_prompt) == ("a {cat|dog} <lora:mine:0.5>", "blurry")
    assert (request.seed, request.steps, request.scale, request.sampler) == (8, 2, 4, "euler_a")
    assert f"{picture}: another program drew the picture" in capsys.readouterr().out
