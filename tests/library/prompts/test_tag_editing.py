"""A prompt's first tag said otherwise: read back, it says just that, and the rest of the prompt is as it was."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.families.block_weights import read_block_weights
from library.prompts.lora_tags import read_tags
from library.prompts.strengths import StepValues
from library.prompts.tag_editing import first_tag, with_adapter, with_argument, with_strength


def only_tag(prompt: str, style: str = "sdnext"):
    text, (tag,) = read_tags(prompt, where="here", style=style)
    return text, tag


def test_the_first_tag_is_that_of_an_adapter():
    assert first_tag("a <b:c> <lyco:x:1>, <lora:y>") == "<lyco:x:1>"
    assert first_tag("a < b") is None


def test_an_adapter_takes_the_place_of_another_with_all_its_arguments():
    assert with_adapter("a <lora:x:0.5:lbw=INS:stop=3> b <lora:z>", "y", where="here") == (
        "a <lora:y:0.5:lbw=INS:stop=3> b <lora:z>"
    )
    assert with_adapter("a cat", "out/x-000002.safetensors", where="here") == "a cat <lora:out/x-000002.safetensors:1>"
    assert with_adapter("a <lora:x:1>b", None, where="here") == "a b"
    assert with_adapter("a", None, where="here") == "a"


@pytest.mark.parametrize("name", ["a:b", "a>b", "lbw=ALL"])
def test_a_name_that_no_tag_can_hold_is_refused(name):
    with pytest.raises(UserError, match="cannot stand in a tag"):
        with_adapter("a cat", name, where="here")


@pytest.mark.parametrize(
    ("prompt", "style"),
    [
        ("a <lora:x> b", "sdnext"),
        ("a <lora:x:0.1:te=0.2@0,0.9@1:unet=0.3:in=0:lbw=INS> b", "sdnext"),
        ("a <lora:x:0.1:0.7:4> b", "a1111"),
    ],
)
def test_one_strength_takes_the_place_of_all_that_a_tag_says_of_strengths(prompt, style):
    before, after = only_tag(prompt, style), only_tag(with_strength(prompt, 0.25), style)
    quarter = StepValues.constant(0.25)
    strength = after[1].strength
    assert {strength.text_encoder, strength.inputs, strength.middle, strength.outputs} == {quarter}
    assert strength.block_weights == before[1].strength.block_weights
    assert (after[0], after[1].name, after[1].rank) == (before[0], before[1].name, before[1].rank)


def test_arguments_are_set_or_take_the_place_of_what_was_there():
    _, tag = only_tag(with_argument("a <lora:x:0.5:lbw=INS>", "lbw", "MIDD"))
    assert tag.strength.block_weights == read_block_weights("MIDD")
    _, tag = only_tag(with_argument("a <lora:x:0.5:0.5:8>", "dyn", "4"), "a1111")
    assert (tag.rank, tag.strength.text_encoder) == (4, StepValues.constant(0.5))
    assert with_argument("a cat", "dyn", "4") == with_strength("a cat", 2) == "a cat"
