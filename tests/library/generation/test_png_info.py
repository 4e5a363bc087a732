"""A PNG tells how it was made, to three kinds of readers, and exactly."""

import json

import pytest
from PIL import Image

from library.errors import UserError
from library.generation.png_info import read_recipe, web_parameters, write_png
from library.generation.requests import ImageRequest

REQUEST = ImageRequest(
    prompt='a (cat:1.2), "ж猫"\nwith two lines',
    negative_prompt="blurry",
    width=72,
    height=64,
    seed=2**40,
    steps=7,
    scale=6.5,
    sampler="dpmsolver++",
    clip_skip=2,
)
MADE_WITH = {"model": "tiny", "networks": [{"name": "mine", "strength": 0.8}]}


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "picture.png"
    write_png(path, Image.new("RGB", (72, 64), "red"), REQUEST, MADE_WITH)
    return path


def test_the_recipe_comes_back_exactly(png):
    assert read_recipe(png) == (REQUEST, MADE_WITH)


def test_web_interfaces_find_their_text(png):
    with Image.open(png) as image:
        text = image.info["parameters"]
    assert text == (
        'a (cat:1.2), "ж猫"\nwith two lines\nNegative prompt: blurry\n'
        "Steps: 7, Sampler: DPM++ 2M, CFG scale: 6.5, Seed: 1099511627776, Size: 72x64, Model: tiny, Clip skip: 2, "
        'Networks: "mine: 0.8"'
    )


def test_without_negative_prompt_and_adapters_their_places_are_left_out():
    text = web_parameters(ImageRequest(prompt="a", seed=1), {"model": "tiny", "networks": []})
    assert text == "a\nSteps: 50, Sampler: DDIM, CFG scale: 7.5, Seed: 1, Size: 512x512, Model: tiny"


def test_sd_scripts_own_texts_are_there(png):
    with Image.open(png) as image:
        info = image.info
    assert (info["negative-prompt"], info["seed"], info["sampler"]) == ("blurry", str(2**40), "dpmsolver++")
    assert (info["steps"], info["scale"], info["prompt"]) == ("7", "6.5", REQUEST.prompt)


def test_nothing_else_is_left_in_the_folder(png):
    assert [path.name for path in png.parent.iterdir()] == ["picture.png"]


def test_pictures_without_a_recipe_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="holds no recipe"):
        read_recipe(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="is no readable picture"):
        read_recipe(tmp_path / "text.png")


def test_a_damaged_recipe_is_a_sentence(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    for text in ("{", "[]", json.dumps({"image": {"prompt": "a"}, "made_with": {}})):
        info = PngInfo()
        info.add_text("recipe", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "p.png", pnginfo=info)
        with pytest.raises(UserError, match="holds a recipe that cannot be read"):
            read_recipe(tmp_path / "p.png")
