"""Choices: what can come out, how often, the same for the same seed; files of options; every mistake."""

from __future__ import annotations

from collections import Counter

import pytest

from library.errors import UserError
from library.prompts.choices import Wildcards, enumerate_choices, expand_choices


@pytest.fixture
def wildcards(tmp_path):
    files = {
        "color.txt": "# a comment\nred\n\n  blue \n",
        "warm_tones.txt": "red\nyellow\n",
        "cold_tones.txt": "blue\n",
        "animals/cat.txt": "a __color__ cat\n",
        "animals/big cat.txt": "{lion|tiger}\n",
        "weighted.txt": "3::often\n1::seldom\n0::never\n",
        "empty.txt": "# nothing\n\n",
        "first.txt": "1 __second__\n",
        "second.txt": "2 {__first__}\n",
        "forever.txt": "{e$$__forever__}\n",
        "windows.txt": "\ufeffone\r\ntwo\r\n",
        "notes.md": "no wildcard",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode())
    return Wildcards(tmp_path)


def outcomes(text: str, wildcards: Wildcards | None = None, count: int = 150) -> Counter[str]:
    return Counter(expand_choices(text, seed=seed, wildcards=wildcards, where="") for seed in range(count))


OUTCOMES = {
    "a cat": {"a cat"},
    "{a|b|c}": {"a", "b", "c"},
    "x {a|b} y {c|d}": {"x a y c", "x a y d", "x b y c", "x b y d"},
    "{a}": {"a"},
    "{|a}": {"", "a"},
    "{2$$a|b|c}": {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"},
    "{1-2$$a|b}": {"a", "b", "a, b", "b, a"},
    "{-2$$a|b}": {"a", "b", "a, b", "b, a"},
    "{2-$$a|b}": {"a, b", "b, a"},
    "{-$$a|b}": {"a", "b", "a, b", "b, a"},
    "{0-1$$a}": {"", "a"},
    "{5$$a|b}": {"a, b", "b, a"},
    "{2$$ and $$a|b}": {"a and b", "b and a"},
    "{2$$$$a|b}": {"ab", "ba"},
    "{a|{b|c} d}": {"a", "b d", "c d"},
    "{2$$ {and|or} $$a|{b|c}}": {
        *(f"a {joint} {other}" for joint in ("and", "or") for other in "bc"),
        *(f"{other} {joint} a" for joint in ("and", "or") for other in "bc"),
    },
    r"\{a|b\} {c|\}}": {"{a|b} c", "{a|b} }"},
    "{0::a|b}": {"b"},
    "{2$$0::a|b}": {"b"},
    "{e$$a|b}": {"a", "b"},
    ":} a smile :{": {":} a smile :{"},
    "<lora:{x|y}:0.{5|6}>": {"<lora:x:0.5>", "<lora:x:0.6>", "<lora:y:0.5>", "<lora:y:0.6>"},
    "<lora:my__old__style>": {"<lora:my__old__style>"},
    "a | b, _c_ $$": {"a | b, _c_ $$"},
}


@pytest.mark.parametrize("text", OUTCOMES)
def test_a_choice_has_these_outcomes_and_no_others(text):
    assert set(outcomes(text)) == OUTCOMES[text]


FROM_FILES = {
    "__color__": {"red", "blue"},
    "__animals/cat__!": {"a red cat!", "a blue cat!"},
    "__animals/big cat__": {"lion", "tiger"},
    "{__color__|green}": {"red", "blue", "green"},
    "{2$$__color__}": {"red, blue", "blue, red"},
    "__{warm|cold}_tones__": {"red", "yellow", "blue"},
    "__*_tones__": {"red", "yellow", "blue"},
    "__windows__": {"one", "two"},
    "__color__ __color__": {"red red", "red blue", "blue red", "blue blue"},
}


@pytest.mark.parametrize("text", FROM_FILES)
def test_wildcards_are_lines_of_files(text, wildcards):
    assert set(outcomes(text, wildcards)) == FROM_FILES[text]


def test_a_seed_draws_the_same_wherever_it_is(wildcards):
    text = "{a|b|c|d|e|f} __color__ {2$$1|2|3|4}"
    drawn = [expand_choices(text, seed=seed, wildcards=wildcards, where="") for seed in range(20)]
    assert drawn == [expand_choices(text, seed=seed, wildcards=wildcards, where="elsewhere") for seed in range(20)]
    assert len(set(drawn)) > 10


def test_weights_say_how_likely_an_option_is(wildcards):
    for text in ("{3::often|seldom}", "__weighted__"):
        counted = outcomes(text, wildcards, count=2000)
        assert set(counted) == {"often", "seldom"}
        assert counted["often"] / 2000 == pytest.approx(0.75, abs=0.04)
    assert outcomes("{.5::a|2.5::b}", count=2000)["a"] / 2000 == pytest.approx(1 / 6, abs=0.04)


ENUMERATED = {
    "a {b|c}": ["a {b|c}"],
    "{e$$a|b}": ["a", "b"],
    "{E$$a|b} {e$$c|d}": ["a c", "a d", "b c", "b d"],
    "{e$$2$$a|b|c}": ["a, b", "a, c", "b, c"],
    "{e$$1-2$$ + $$a|b}": ["a", "b", "a + b"],
    "{e$$a|{e$$b|c}}": ["a", "b", "c"],
    "{x|{e$$b|c}}": ["{x|b}", "{x|c}"],
    "{e$$a|{b|c}}": ["a", "{b|c}"],
    "{e$$2::a|b}": ["a", "b"],
    r"\{e$$a|b\} {e$$\}|d}": [r"\{e$$a|b\} \}", r"\{e$$a|b\} d"],
    "{e$$__color__} __color__": ["red __color__", "blue __color__"],
}


@pytest.mark.parametrize("text", ENUMERATED)
def test_enumerated_choices_make_a_prompt_of_each_outcome(text, wildcards):
    assert list(enumerate_choices(text, wildcards=wildcards, where="")) == ENUMERATED[text]


MISTAKES = {
    "a {b|c": "{ is not closed in '{b|c'; close it with }, or write \\{ for the character",
    "{a|{b|c}": "{ is not closed in '{a|{b|c}'",
    "{two$$a|b}": "{two$$a|b}: 'two' is no number of options; write it like {2$$a|b|c}",
    "{$$a|b}": "'' is no number of options",
    "{1-2-3$$a|b}": "'1-2-3' is no number of options",
    "{2$$ and $$x$$a|b}": "has too many $$",
    "{3-1$$a|b|c}": "3-1 has its larger number first; write 1-3",
    "{0::a|0::b}": "all options have the weight 0",
    "__colour__": "there is no wildcard 'colour'; did you mean color?",
    "__nonsense*__": "there is no wildcard 'nonsense*'; known are",
    "{2$$__notes__}": "{2$$__notes__}: there is no wildcard 'notes'",
    "__../color__": "there is no wildcard '../color'",
    "__empty__": "the wildcard 'empty' has no lines; write one option a line",
    "__first__": "wildcards stand in wildcards more than 20 deep (first, second, first)",
    "__forever__": "more than 20 deep (forever, forever, forever)",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_every_mistake_is_answered_in_one_sentence(text, wildcards):
    with pytest.raises(UserError) as caught:
        expand_choices(text, seed=0, wildcards=wildcards, where="--prompt")
    assert str(caught.value).startswith("--prompt")
    assert MISTAKES[text] in str(caught.value)


def test_wildcards_need_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"--prompt.*: __color__ needs a folder of wildcards; name it with --wildcards_dir"):
        expand_choices("a __color__ cat", seed=0, wildcards=None, where="--prompt")
    with pytest.raises(UserError, match=r"--wildcards_dir .*missing: no such folder"):
        Wildcards(tmp_path / "missing")
    with pytest.raises(UserError, match=r"has no \.txt file"):
        expand_choices("__color__", seed=0, wildcards=Wildcards(tmp_path), where="")


def test_more_prompts_than_anybody_wants_are_refused(wildcards):
    with pytest.raises(UserError, match="--prompt: stands for more than 10000 prompts"):
        enumerate_choices("{e$$a|b|c|d|e|f|g|h|i|j}" * 5, where="--prompt")
    with pytest.raises(UserError, match="more than 20 deep"):
        enumerate_choices("{e$$__forever__}", wildcards=wildcards, where="--prompt")
