"""Axes of grids: how they are written, and what each value makes of a request."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.generation.grid_axes import applied, read_axes
from library.generation.requests import ImageRequest


def labels(text: str) -> list[str]:
    (axis,) = read_axes([text])
    return [value.label for value in axis.values]


def varied(request: ImageRequest, *texts: str) -> list[ImageRequest]:
    """A request with the first value of each axis, with the second, and so on."""
    axes = read_axes(texts)
    return [
        applied(request, list(zip(axes, values, strict=True)))
        for values in zip(*(axis.values for axis in axes), strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=strength:0,0.5,1", ["0", "0.5", "1"]),
        ("x=strength:0-1:0.25", ["0", "0.25", "0.5", "0.75", "1"]),
        ("x=strength:0-0.3:0.1", ["0", "0.1", "0.2", "0.3"]),
        ("y=strength:-1-1,3", ["-1", "0", "1", "3"]),
        ("y = seed = 1-4", ["1", "2", "3", "4"]),
        ("x=steps:10-30:10,50", ["10", "20", "30", "50"]),
        ("x=seed:10,9223372036854775807", ["10", "9223372036854775807"]),
        ("x=scale:1e1", ["10"]),
        ("x=lbw:ALL,[1,0,0,0,0,0,0,0,0,0,0,0],MIDD", ["ALL", "1,0,0,0,0,0,0,0,0,0,0,0", "MIDD"]),
        ("x=sampler:euler_a, ddim", ["euler_a", "ddim"]),
        ("x=prompt:red|dark green|", ["red", "dark green", "(nothing)"]),
        ("x=lora:a/*.safetensors,none", ["a/*.safetensors", "none"]),
    ],
)
def test_values_and_ranges_are_read(text, expected):
    assert labels(text) == expected


def test_columns_come_first_whatever_the_order():
    assert [axis.side for axis in read_axes(["y=seed:1,2", "x=steps:1,2"])] == ["x", "y"]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ([], "names no axis"),
        (["strength:0,1"], "is no axis; write x=strength:0,0.5,1"),
        (["z=strength:0,1"], "is no axis"),
        (["x=strenght:0,1"], "did you mean strength"),
        (["x=strength:"], "'' is no number"),
        (["x=lora:,"], "has no values"),
        (["x=strength:a"], "'a' is no number; give values between commas, or a range"),
        (["x=strength:nan"], "'nan' is no number"),
        (["x=seed:0.5"], "'0.5' is no whole number"),
        (["x=strength:1-0:0.5"], "is a range without values"),
        (["x=strength:0-1:0"], "is a range without values"),
        (["x=seed:1-1000"], "'1-1000' has 1000 values; give 100 at most"),
        (["x=seed:1,2,1"], "has 1 twice"),
        (["x=steps:0-10:5"], "0 steps is out of range; give 1 to 1000"),
        (["x=seed:-1,0"], "seed -1 is out of range"),
        (["x=denoising:0.5,1.5"], "strength 1.5 is out of range; give 0 to 1"),
        (["x=clip_skip:0"], "clip skip 0 is out of range"),
        (["x=rank:0,4"], "0 is no number of ranks"),
        (["x=sampler:eulera"], "did you mean euler"),
        (["x=lbw:INSS"], "did you mean INS"),
        (["x=prompt:red"], "names no words to put in place of others"),
        (["x=seed:1", "x=steps:2"], "x: is given twice"),
        (["x=seed:1", "y=seed:2"], "seed: is on both sides"),
    ],
)
def test_what_cannot_be_an_axis_is_refused_with_what_can(texts, sentence):
    with pytest.raises(UserError) as refusal:
        read_axes(texts)
    assert sentence in str(refusal.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as refusal:
        read_axes(["x=strenght:1", "y=steps:0"])
    assert len(refusal.value.problems) == 2


@pytest.mark.parametrize(
    ("what", "field", "texts", "values"),
    [
        ("seed", "seed", "3,4", (3, 4)),
        ("steps", "steps", "3,4", (3, 4)),
        ("scale", "scale", "0,2.5", (0, 2.5)),
        ("negative_scale", "negative_scale", "0,2.5", (0, 2.5)),
        ("guidance_rescale", "guidance_rescale", "0,0.7", (0, 0.7)),
        ("sampler", "sampler", "euler,heun", ("euler", "heun")),
        ("clip_skip", "clip_skip", "1,2", (1, 2)),
        ("denoising", "strength", "0.1,0.2", (0.1, 0.2)),
    ],
)
def test_values_become_fields(what, field, texts, values):
    request = ImageRequest(prompt="a", seed=9, highres_scale=0.5)
    changed = varied(request, f"x={what}:{texts}")
    assert tuple(getattr(each, field) for each in changed) == values
    assert all({**vars(each), field: None} == {**vars(request), field: None} for each in changed)


def test_without_a_beginning_there_is_no_denoising():
    with pytest.raises(UserError, match="there is no picture to begin from; give one with --image_path"):
        varied(ImageRequest(prompt="a", seed=9), "x=denoising:0.5")


def test_words_change_everywhere_and_adapters_before_their_strengths():
    request = ImageRequest(prompt="red cat <lora:x:0.5:lbw=INS>", negative_prompt="a red dog", seed=1)
    first, second = varied(request, "x=prompt:red|blue")
    assert (first, second.prompt, second.negative_prompt) == (
        request,
        "blue cat <lora:x:0.5:lbw=INS>",
        "a blue dog",
    )
    (changed,) = varied(request, "y=lora:y", "x=strength:2")
    assert changed.prompt == "red cat <lora:y:2:lbw=INS>"
    (changed,) = varied(request, "y=lbw:MIDD", "x=rank:2")
    assert changed.prompt == "red cat <lora:x:0.5:lbw=MIDD:dyn=2>"
    with pytest.raises(UserError, match="'pink' does not stand in the prompt"):
        varied(request, "x=prompt:pink|blue")


def test_without_a_tag_the_strength_is_that_of_the_first_adapter_of_the_command_line():
    request = ImageRequest(prompt="cat", seed=1, network_strengths=(1.0, 0.5))
    assert [each.network_strengths for each in varied(request, "x=strength:0,2")] == [(0, 0.5), (2, 0.5)]
