"""A PNG tells how it was made, to three kinds of readers, and exactly."""

import json

import pytest
from PIL import Image

from library.errors import UserError
from library.generation.png_info import RECIPE, read_picture, read_recipe, write_png
from library.generation.requests import ImageRequest
from library.generation.web_parameters import web_parameters

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
        assert image.info["parameters"] == web_parameters(REQUEST, MADE_WITH)


def test_sd_scripts_own_texts_are_there(png):
    with Image.open(png) as image:
        info = image.info
    assert (info["negative-prompt"], info["seed"], info["sampler"]) == ("blurry", str(2**40), "dpmsolver++")
    assert (info["steps"], info["scale"], info["prompt"]) == ("7", "6.5", REQUEST.prompt)


def test_what_is_as_it_is_by_default_is_left_out_of_the_recipe(png):
    with Image.open(png) as image:
        kept = json.loads(image.info[RECIPE])["image"]
    assert kept.keys() == {
        *("prompt", "negative_prompt", "width", "height", "seed", "steps", "scale", "sampler", "clip_skip"),
    }


def test_every_field_comes_back(tmp_path):
    request = ImageRequest(
        prompt="<lora:a:1>",
        extended=False,
        lora_tag_style="a1111",
        network_strengths=(0.5, 1.0),
        seed=3,
        negative_scale=2.0,
        guidance_rescale=0.7,
        image="a.png",
        strength=0.3,
        mask="m.png",
        regions="r.png",
        region_colors=4,
        highres_scale=0.5,
        highres_steps=9,
        highres_latents=True,
        control_images=("c.png", "d.png"),
    )
    write_png(tmp_path / "p.png", Image.new("RGB", (8, 8)), request, {})
    assert read_recipe(tmp_path / "p.png") == (request, {})
    assert ImageRequest(**read_picture(tmp_path / "p.png").fields) == request


def test_nothing_else_is_left_in_the_folder(png):
    assert [path.name for path in png.parent.iterdir()] == ["picture.png"]


def test_pictures_without_a_recipe_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="holds no recipe"):
        read_recipe(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="is no readable picture"):
        read_recipe(tmp_path / "text.png")


def picture_with(path, **texts):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword.replace("_", "-"), text)
    Image.new("RGB", (72, 65)).save(path, pnginfo=info)
    return path


DAMAGED = ("{", "[]", "3", json.dumps({"image": {"prompt": "a"}, "made_with": {}}), '{"image": [], "made_with": {}}')


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_recipe_is_a_sentence(tmp_path, text):
    path = picture_with(tmp_path / "p.png", recipe=text)
    for read in (read_recipe, read_picture):
        with pytest.raises(UserError, match="holds a recipe that cannot be read"):
            read(path)


def test_a_recipe_that_nothing_can_draw_is_a_sentence(tmp_path):
    recipe = json.dumps({"image": {"prompt": "a", "seed": -1}, "made_with": {}})
    with pytest.raises(UserError, match=r"cannot be drawn \(seed -1 is out of range"):
        read_picture(picture_with(tmp_path / "p.png", recipe=recipe))


def test_pictures_of_web_interfaces_are_read_with_what_is_lost(tmp_path):
    text = "a cat\nSteps: 4, Sampler: Euler a, CFG scale: 5, Seed: 7, Size: 64x72, Tiling: True"
    found = read_picture(picture_with(tmp_path / "p.png", parameters=text))
    assert ImageRequest(**found.fields) == ImageRequest(
        prompt="a cat", steps=4, sampler="euler_a", scale=5.0, seed=7, width=64, height=72, lora_tag_style="a1111"
    )
    assert found.notes[0] == "not read: Tiling"
    assert found.notes[1].startswith("another program drew the picture")


def test_a_jpeg_holds_the_same_text_as_a_comment(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a ж\nSteps: 4, Seed: 7, Size: 64x64".encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / "p.jpg", exif=exif)
    assert read_picture(tmp_path / "p.jpg").fields["prompt"] == "a ж"
    assert read_picture(tmp_path / "p.jpg").fields["seed"] == 7


def test_pictures_of_sd_scripts_are_read(tmp_path):
    texts = {"prompt": "a", "seed": "9", "sampler": "k_euler_a", "steps": "5", "scale": "6.5", "negative_prompt": "b"}
    found = read_picture(picture_with(tmp_path / "p.png", negative_scale="None", **texts))
    assert ImageRequest(**found.fields) == ImageRequest(
        prompt="a", negative_prompt="b", seed=9, sampler="euler_a", steps=5, scale=6.5, width=72, height=64
    )


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({}, "does not say how it was made; give a picture as"),
        ({"workflow": "{}", "prompt": "{}"}, "holds a workflow of ComfyUI"),
        ({"prompt": '{"3": {"class_type": "KSampler"}}'}, "holds a workflow of ComfyUI"),
    ],
)
def test_pictures_that_say_nothing_are_refused(tmp_path, texts, sentence):
    with pytest.raises(UserError, match=sentence):
        read_picture(picture_with(tmp_path / "p.png", **texts))
