"""Sub-prompts: where a prompt is cut, what each part weighs, and whose tags are whose."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.prompts.sub_prompts import read_prompt

PROMPTS = {
    "": [("", 1.0)],
    "a cat": [("a cat", 1.0)],
    "a cat AND a dog": [("a cat", 1.0), ("a dog", 1.0)],
    "a cat :1.2 AND a dog :0.8": [("a cat", 1.2), ("a dog", 0.8)],
    "a cat:1.2 AND a dog : -.5 ": [("a cat", 1.2), ("a dog", -0.5)],
    "a :1\nAND\nb AND c :2": [("a", 1.0), ("b", 1.0), ("c", 2.0)],
    "(a cat:1.2) AND a (dog:0.8)": [("(a cat:1.2)", 1.0), ("a (dog:0.8)", 1.0)],
    "time 10:30": [("time 10:30", 1.0)],
    "a cat and a dog, SAND ANDY xAND": [("a cat and a dog, SAND ANDY xAND", 1.0)],
    "a cat,AND a dog": [("a cat,", 1.0), ("a dog", 1.0)],
    "a BREAK b AND c": [("a BREAK b", 1.0), ("c", 1.0)],
    "a :1.2 b AND c": [("a :1.2 b", 1.0), ("c", 1.0)],
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_are_cut_at_and(prompt):
    assert [(part.text, part.weight) for part in read_prompt(prompt, where="")] == PROMPTS[prompt]


def test_and_is_text_where_prompts_are_not_extended():
    (part,) = read_prompt("a cat :1.2 AND a dog <lora:x>", where="", extended=False)
    assert (part.text, part.weight, len(part.tags)) == ("a cat :1.2 AND a dog", 1.0, 1)


def test_each_sub_prompt_has_its_own_tags():
    first, second, third = read_prompt("a <lora:x:0.5> :1.2 AND b :0.8 <lora:y><lora:z> AND <lora:x AND y>", where="")
    assert (first.text, first.weight, [tag.name for tag in first.tags]) == ("a", 1.2, ["x"])
    assert (second.text, second.weight, [tag.name for tag in second.tags]) == ("b", 0.8, ["y", "z"])
    assert (third.text, third.weight, [tag.name for tag in third.tags]) == ("", 1.0, ["x AND y"])


def test_the_style_of_tags_is_passed_on():
    (part,) = read_prompt("<lora:x:0.5:0.9>", where="", style="a1111")
    assert part.tags[0].strength.middle.at(0, 1) == 0.9


@pytest.mark.parametrize("prompt", ["AND a dog", "a cat AND", "a AND AND b", "a AND :2"])
def test_an_and_with_nothing_on_one_side_is_refused(prompt):
    with pytest.raises(UserError, match="--prompt: AND has nothing on one side"):
        read_prompt(prompt, where="--prompt")


def test_the_mistakes_of_all_sub_prompts_come_at_once():
    with pytest.raises(UserError) as caught:
        read_prompt("a <lora:x:y> AND b <lora:z:te=?>", where="--prompt")
    assert len(caught.value.problems) == 2
