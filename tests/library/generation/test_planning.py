"""Seeds follow one documented rule, sizes are rounded with a word, and requests refuse what no picture can have."""

import pytest

from library.errors import UserError
from library.generation.planning import (
    ImageDefaults,
    image_requests,
    image_seed,
    preview_requests,
    repetition_notes,
    rounding_notes,
)
from library.generation.prompt_options import PromptLine
from library.generation.requests import ImageRequest

DEFAULTS = ImageDefaults(width=512, height=640, steps=30, scale=7.5, sampler="ddim")
LINES = [PromptLine(prompt="a"), PromptLine(prompt="b", seeds=(5, 6)), PromptLine(prompt="c")]


def test_one_picture_has_the_seed_of_the_command():
    assert [request.seed for request in image_requests(LINES[:1], DEFAULTS, seed=1234)] == [1234]


def test_every_picture_has_another_seed_that_depends_on_its_number_alone():
    requests = image_requests(LINES[:1], DEFAULTS, seed=7, images_per_prompt=3, iterations=2)
    seeds = [request.seed for request in requests]
    assert seeds == [image_seed(7, number) for number in range(6)]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_neighbouring_commands_share_no_seed():
    assert not {image_seed(7, n) for n in range(50)} & {image_seed(8, n) for n in range(50)}


def test_seeds_of_a_line_are_used_one_by_one_and_change_no_other_line():
    requests = image_requests(LINES, DEFAULTS, seed=7, images_per_prompt=3)
    assert [request.seed for request in requests if request.prompt == "b"] == [5, 6, 6]
    plain = image_requests([PromptLine(prompt=line.prompt) for line in LINES], DEFAULTS, seed=7, images_per_prompt=3)
    assert [r.seed for r in requests if r.prompt != "b"] == [r.seed for r in plain if r.prompt != "b"]


def test_a_line_wins_over_the_command():
    line = PromptLine(prompt="a", negative_prompt="n", width=64, height=72, steps=3, scale=0.0, sampler="euler")
    (request,) = image_requests([line], DEFAULTS, seed=1)
    assert request == ImageRequest(
        prompt="a", negative_prompt="n", width=64, height=72, seed=1, steps=3, scale=0.0, sampler="euler"
    )
    (request,) = image_requests([PromptLine(prompt="a")], DEFAULTS, seed=1)
    assert (request.width, request.height, request.steps, request.scale) == (512, 640, 30, 7.5)


def test_previews_keep_their_seed_through_a_training():
    first, again = (preview_requests(LINES, DEFAULTS, seed=3) for _ in range(2))
    assert first == again
    assert first[1].seed == 5
    assert first[0].seed != first[2].seed


def test_sizes_are_rounded_down_to_multiples_of_8_and_it_is_said():
    line = PromptLine(prompt="a", width=515, where="line 1")
    (request,) = image_requests([line], DEFAULTS, seed=1)
    assert (request.width, request.height) == (512, 640)
    assert rounding_notes([line, PromptLine(prompt="b")], DEFAULTS) == [
        "line 1: 515x640 is rounded down to 512x640, multiples of 8"
    ]


def test_seeds_that_draw_the_same_picture_twice_are_said():
    few = {"images_per_prompt": 1, "iterations": 1}
    assert repetition_notes(LINES, **few) == []
    assert repetition_notes(LINES, **few | {"images_per_prompt": 2}) == []
    (note,) = repetition_notes(LINES, **few | {"images_per_prompt": 3})
    assert note == "prompt: --d gives 2 of 3 seeds, so equal pictures are drawn"
    assert len(repetition_notes(LINES, **few | {"iterations": 2})) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0},
        {"width": 60},
        {"height": 513},
        {"steps": 0},
        {"steps": 1001},
        {"seed": -1},
        {"seed": 2**63},
        {"sampler": "none"},
        {"clip_skip": 0},
    ],
)
def test_a_request_refuses_what_no_picture_can_have(wrong):
    with pytest.raises(UserError):
        ImageRequest(**{"prompt": "a", "seed": 1} | wrong)
