"""Seeds follow one documented rule, sizes are rounded with a word, and requests refuse what no picture can have."""

import pytest

from library.errors import UserError
from library.generation.planning import (
    Plan,
    image_seed,
    planned_pictures,
    preview_requests,
    repetition_notes,
    rounding_notes,
    with_pictures,
)
from library.generation.prompt_options import PromptLine
from library.generation.requests import ImageRequest

DEFAULTS = {"width": 512, "height": 640, "steps": 30, "scale": 7.5, "sampler": "ddim"}


def image_requests(lines, defaults, **plan):
    problems = []
    pictures = planned_pictures(lines, defaults, Plan(**plan), problems)
    assert problems == []
    return [picture.request for picture in pictures]


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
    line = PromptLine(
        prompt="a",
        settings={"negative_prompt": "n", "width": 64, "height": 72, "steps": 3, "scale": 0.0, "sampler": "euler"},
    )
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
    line = PromptLine(prompt="a", settings={"width": 515}, where="line 1")
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


def test_one_seed_for_all_pictures_of_an_iteration():
    requests = image_requests(LINES[:1] + LINES[2:], DEFAULTS, seed=7, iterations=2, same_seed=True)
    assert [request.seed for request in requests] == [7, 7, image_seed(7, 1), image_seed(7, 1)]


def test_prompts_come_in_another_order_in_each_iteration_and_all_come():
    lines = [PromptLine(prompt=str(number)) for number in range(8)]
    requests = image_requests(lines, DEFAULTS, seed=7, iterations=2, shuffled=True)
    orders = [[request.prompt for request in requests[start : start + 8]] for start in (0, 8)]
    assert sorted(orders[0]) == sorted(orders[1]) == [line.prompt for line in lines]
    assert orders[0] != orders[1]
    assert requests == image_requests(lines, DEFAULTS, seed=7, iterations=2, shuffled=True)


def test_choices_follow_the_seed_of_the_picture_and_enumerations_share_one():
    chosen = [image_requests([PromptLine(prompt="{a|b|c|d}")], DEFAULTS, seed=seed)[0].prompt for seed in range(20)]
    assert set(chosen) == set("abcd")
    listed = image_requests([PromptLine(prompt="{e$$a|b} {e$$x|y}"), LINES[0]], DEFAULTS, seed=7)
    assert [request.prompt for request in listed] == ["a x", "a y", "b x", "b y", "a"]
    assert [request.seed for request in listed] == [7, 7, 7, 7, image_seed(7, 1)]


def test_what_is_wrong_with_a_line_leaves_the_others_their_pictures():
    problems = []
    wrong = PromptLine(prompt="a", settings={"strength": 2.0}, where="line 2")
    pictures = planned_pictures([LINES[0], wrong, LINES[2]], DEFAULTS, Plan(seed=7), problems)
    assert [picture.request.prompt for picture in pictures] == ["a", "c"]
    assert [str(problem) for problem in problems] == ["line 2: strength 2.0 is out of range; give 0 to 1"]


def test_pictures_go_to_prompts_one_by_one_or_one_to_all():
    assert [line.settings["image"] for line in with_pictures(LINES, "image", ["x"], where="w")] == ["x"] * 3
    assert [(line.prompt, line.settings["image"]) for line in with_pictures(LINES[:1], "image", ["x", "y"], where="w")] == [
        ("a", "x"),
        ("a", "y"),
    ]
    assert [line.settings["image"] for line in with_pictures(LINES, "image", ["x", "y", "z"], where="w")] == ["x", "y", "z"]
    with pytest.raises(UserError, match="w: 2 pictures for 3 prompts; give one, or one for each prompt"):
        with_pictures(LINES, "image", ["x", "y"], where="w")
