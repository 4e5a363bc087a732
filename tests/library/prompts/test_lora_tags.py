"""Tags of adapters: the table of what SD.Next makes of them, the values of every argument, and every mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.errors import UserError
from library.families.block_weights import read_block_weights
from library.prompts.lora_tags import ARGUMENTS, STYLES, LoraTag, read_step_values, read_tags
from library.prompts.strengths import StepValues


def one_tag(text: str, style: str = "sdnext") -> LoraTag:
    rest, (tag,) = read_tags(text, where="--prompt", style=style)
    assert rest == ""
    return tag


def parts(tag: LoraTag) -> tuple[float, ...]:
    """Text encoder, IN, MID, OUT of a tag without a schedule."""
    strength = tag.strength
    assert strength.is_constant
    return tuple(values.at(0, 1) for values in (strength.text_encoder, strength.inputs, strength.middle, strength.outputs))


STRENGTHS = {
    "<lora:x>": (1.0, 1.0, 1.0, 1.0),
    "<lora:x:0.8>": (0.8, 0.8, 0.8, 0.8),
    "<lyco:x:0.8>": (0.8, 0.8, 0.8, 0.8),
    "<lora:x:-0.5>": (-0.5, -0.5, -0.5, -0.5),
    "<lora:x:0>": (0.0, 0.0, 0.0, 0.0),
    "<lora:x:.5>": (0.5, 0.5, 0.5, 0.5),
    "<lora: x : 0.5 >": (0.5, 0.5, 0.5, 0.5),
    "<lora:x:1.0:te=0.5>": (0.5, 0.5, 0.5, 0.5),
    "<lora:x:te=0.5:unet=1.5>": (0.5, 1.5, 1.5, 1.5),
    "<lora:x:1.0:te=0.5:unet=1.5>": (0.5, 1.5, 1.5, 1.5),
    "<lora:x:1.0:unet=1.5>": (1.0, 1.5, 1.5, 1.5),
    "<lora:x:unet=1.5:te=0>": (0.0, 1.5, 1.5, 1.5),
    "<lora:x:1.0:in=0:mid=1:out=0>": (1.0, 0.0, 1.0, 0.0),
    "<lora:x:in=0:mid=1:out=0>": (1.0, 0.0, 1.0, 0.0),
    "<lora:x:0.5:out=2>": (0.5, 0.5, 0.5, 2.0),
    "<lora:x:te=0.5:unet=0.25:mid=1>": (0.5, 0.25, 1.0, 0.25),
    "<lora:te=0.5:x>": (0.5, 0.5, 0.5, 0.5),
    "<lora:x:1:1>": (1.0, 1.0, 1.0, 1.0),
    "<lora:x:0.5:0.50>": (0.5, 0.5, 0.5, 0.5),
    "<lora:x:0.5:unet=0.9:0.9>": (0.5, 0.9, 0.9, 0.9),
    "<lora:x:0.8:module=unet>": (0.0, 0.8, 0.8, 0.8),
    "<lora:x:0.8:module=te>": (0.8, 0.0, 0.0, 0.0),
    "<lora:x:0.8:module=text_encoder>": (0.8, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("text", STRENGTHS)
def test_what_a_tag_leaves_out_it_inherits_and_both_styles_agree(text, style):
    tag = one_tag(text, style)
    assert tag.name == "x"
    assert tag.text == text
    assert tag.rank is None
    assert parts(tag) == STRENGTHS[text]


def test_a1111_reads_the_second_number_as_the_unets_and_the_third_as_a_rank():
    assert parts(one_tag("<lora:x:0.5:0.9>", "a1111")) == (0.5, 0.9, 0.9, 0.9)
    tag = one_tag("<lora:x:0.5:0.9:8:te=0.25>", "a1111")
    assert parts(tag) == (0.25, 0.9, 0.9, 0.9)
    assert tag.rank == 8
    assert one_tag("<lora:x:0.5:0.9:8:dyn=4>", "a1111").rank == 4


def test_a_second_number_that_sdnext_would_ignore_is_refused():
    for text in ("<lora:x:0.5:0.9>", "<lora:x:1:1:te=0.5>"):
        with pytest.raises(UserError, match=r"ignored by SD\.Next.*unet=.*--lora_tag_style a1111"):
            read_tags(text, where="--prompt")


@pytest.mark.parametrize(
    "name",
    ["a b", "v1.5-e10", "styles/old film", 'it\'s "mine"', "epoch=3-step=100", "猫_16", "{a}", "(x)", "a,b", "a AND b"],
)
def test_names_may_be_anything_without_colons_and_brackets(name):
    assert one_tag(f"<lora:{name}:0.8>").name == name
    assert one_tag(f"<lora:{name}>").name == name


def test_schedules_go_wherever_a_number_goes():
    schedule = StepValues(((1.0, 0.1), (6.0, 0.6)))
    strength = one_tag("<lora:x:0.1@1,0.6@6>").strength
    assert strength.text_encoder == strength.inputs == strength.middle == strength.outputs == schedule
    strength = one_tag("<lora:x:te=0.6~6;0.1~1:out=1>").strength
    assert strength.text_encoder == strength.inputs == schedule
    assert strength.outputs == StepValues.constant(1.0)
    assert one_tag("<lora:x:mid=0.1@1 , 0.6@6>").strength.middle == schedule


@pytest.mark.parametrize(
    ("text", "bounds"),
    {
        "start=10": (10, None),
        "stop=0.5": (None, 0.5),
        "start=0:stop=1": (0, 1),
        "start=0.0:stop=1.0": (0.0, 1.0),
        "step=5-10": (5, 10),
        "step=0.2 - 0.5": (0.2, 0.5),
        "start=0.5:stop=20": (0.5, 20),
    }.items(),
)
def test_whole_numbers_bound_steps_and_others_shares_of_the_run(text, bounds):
    strength = one_tag(f"<lora:x:0.8:{text}>").strength
    assert (strength.start, strength.stop) == bounds
    assert [type(bound) for bound in (strength.start, strength.stop)] == [type(bound) for bound in bounds]


LIST_17 = "1,0,0.5,0,0,0,0,0,0,0,0,0,0,0,0,-1,.5"


@pytest.mark.parametrize("text", [LIST_17, f"[{LIST_17}]", "OUTALL", "outall", "ALL0.5", ",".join("1" * 12)])
def test_block_weights_are_those_of_the_merge_tools(text):
    weights = one_tag(f"<lora:x:0.8:lbw={text}>").strength.block_weights
    assert weights == read_block_weights(text)
    assert weights is not None
    assert len(weights) == 26


def test_one_block_weight_is_for_all_places():
    assert one_tag("<lora:x:lbw=0.25>").strength.block_weights == (0.25,) * 26


def test_dyn_is_a_rank():
    assert one_tag("<lora:x:0.8:dyn=4>").rank == 4


TEXTS = {
    "a cat": "a cat",
    "<3 a < b > c <lora> <b: x": "<3 a < b > c <lora> <b: x",
    "a, <lora:x:1>, b": "a, , b",
    "a<lora:x>b": "ab",
    "(a <lora:x>:1.2) <lyco:y>": "(a :1.2) ",
    "a\n<lora:x:\n0.5>\nb": "a\n\nb",
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_rest_of_the_text_stays_as_it_is(text):
    assert read_tags(text, where="")[0] == TEXTS[text]


def test_tags_come_in_their_order():
    _, tags = read_tags("<lora:b:0.5> a <lora:a> <lora:b:0.25>", where="")
    assert [(tag.name, parts(tag)[0]) for tag in tags] == [("b", 0.5), ("a", 1.0), ("b", 0.25)]


MISTAKES = {
    "<lora:x:tee=0.5>": "'tee' is no argument; did you mean te?",
    "<lora:x:weight=0.5>": "'weight' is no argument; known are dyn",
    "<lora:x:0.5:te=0.1:te=0.2>": "te is given twice",
    "<lora:x:strong>": "'strong' is no number; write 0.8",
    "<lora:x:>": "'' is no number",
    "<lora:x:nan>": "'nan' is no number",
    "<lora:x:te=a=b>": "te: 'a=b' is no number",
    "<lora:x:te=>": "te: '' is no number",
    "<lora:x:0.5,0.2@0.5>": "'0.5' is one of several values, at no step; write each value with a step",
    "<lora:x:0,8>": "'0' is one of several values",
    "<lora:x:te=0.5@half>": "'half' is no step",
    "<lora:x:te=0.5@-1>": "'-1' is no step; count steps from 0",
    "<lora:x:te=0.5@3,0.2@3>": "two values at step 3",
    "<lora:x:te=0.5@>": "'' is no step",
    "<lora:x:1:OUTS>": "'OUTS' is no number; write lbw=OUTS",
    "<lora:x:1:1:OUTS>": "'OUTS' stands behind all that a tag's numbers can say; arguments are te",
    "<lora:x:1:high>": "'high' is no number",
    "<lora:C:\\loras\\x:1>": "'\\loras\\x' is no number",
    "<lora:x:lbw=OUTAL>": "lbw: is neither a list of numbers nor a known name; did you mean OUTALL",
    "<lora:x:lbw=1,2,3>": "lbw: has 3 values; give 12, 17, 20 or 26",
    "<lora:x:lbw=1,R,0>": "lbw: is not a list of numbers",
    "<lora:x:start=-1>": "'-1' is no step",
    "<lora:x:start=1.5>": "'1.5' is no step; count steps from 0, or give a share of the run from 0.0 to 1.0",
    "<lora:x:stop=late>": "'late' is no step",
    "<lora:x:step=5>": "'5' is no range of steps; write step=5-10",
    "<lora:x:start=5:stop=5>": "from 5 up to 5 there is no step",
    "<lora:x:step=0.5-0.2>": "from 0.5 up to 0.2 there is no step",
    "<lora:x:step=2-5:start=1>": "step= says what start= and stop= say",
    "<lora:x:dyn=0>": "'0' is no number of ranks",
    "<lora:x:dyn=4.5>": "'4.5' is no number of ranks",
    "<lora:x:module=unte>": "'unte' is no part of a model; did you mean unet",
    "<lora:>": "names no adapter; write it like <lora:name:0.8>",
    "<lora::0.5>": "names no adapter",
    "<lora:te=0.5>": "names no adapter",
    "<hypernet:x:1>": "'hypernet' is no kind of tag; known are lora, lyco",
    "<Lora:x>": "'Lora' is no kind of tag; did you mean lora",
    "a <lora:x:0.8, a dog": "<lora:x:0.8, a dog: is not closed; end the tag with >",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_every_mistake_is_answered_in_one_sentence(text):
    with pytest.raises(UserError) as caught:
        read_tags(text, where="--prompt")
    (problem,) = caught.value.problems
    assert str(problem).startswith("--prompt, <")
    assert MISTAKES[text] in str(problem)


def test_all_mistakes_of_a_prompt_come_at_once():
    with pytest.raises(UserError) as caught:
        read_tags("<lora:x:te=a:un=3> b <style:y> <lora:z> <lora:w:start=2:stop=1> <lora:open", where="--prompt")
    assert [str(problem).partition(": ")[0] for problem in caught.value.problems] == [
        "--prompt, <lora:x:te=a:un=3>, te",
        "--prompt, <lora:x:te=a:un=3>",
        "--prompt, <style:y>",
        "--prompt, <lora:w:start=2:stop=1>",
        "--prompt, <lora:open",
    ]


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "prompts.md").read_text(encoding="utf-8")


def test_the_page_tells_of_every_argument():
    assert [name for name in ARGUMENTS if f"`{name}=" not in PAGE] == []


def test_the_pages_tables_are_what_tags_mean():
    rows = re.findall(r"^\| `(<lora:[^`]*>)` \| (\S+) \| (\S+), (\S+), (\S+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 6
    assert [parts(one_tag(tag)) for tag, *_ in rows] == [tuple(map(float, numbers)) for _, *numbers in rows]
    schedules = re.findall(r"^\| `([\d.@,]+)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(schedules) == 2
    for text, numbers in schedules:
        values = read_step_values(text, "")
        assert [values.at(step, 20) for step in (0, 3, 6, 9, 18)] == pytest.approx(
            [float(number) for number in numbers.split(" | ")], abs=1e-3
        )
