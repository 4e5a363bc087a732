"""A1111's prompt syntax: every rule once, and none of them changes the words."""

from __future__ import annotations

import pytest

from library.conditioning.prompt_weights import parse

CASES = {
    "a cat": [("a cat", 1.0)],
    "": [("", 1.0)],
    "a (cat)": [("a ", 1.0), ("cat", 1.1)],
    "a ((cat))": [("a ", 1.0), ("cat", 1.21)],
    "a [cat] sits": [("a ", 1.0), ("cat", 1 / 1.1), (" sits", 1.0)],
    "(cat:1.3)": [("cat", 1.3)],
    "(cat: 0.5 )": [("cat", 0.5)],
    "(cat:.5)": [("cat", 0.5)],
    "(cat:-1)": [("cat", -1.0)],
    "(a (red:2) cat:1.5)": [("a ", 1.5), ("red", 3.0), (" cat", 1.5)],
    "[(cat)]": [("cat", 1.0)],
    "([cat:1.3)": [("cat", 1.3 / 1.1)],
    r"\(cat\) \[x\] \\": [("(cat) [x] \\", 1.0)],
    r"(a\):1.2)": [("a)", 1.2)],
    "a (cat": [("a ", 1.0), ("cat", 1.1)],
    "a cat) b": [("a cat) b", 1.0)],
    "time 10:30": [("time 10:30", 1.0)],
    "(time 10:30 pm:1.2)": [("time 10:30 pm", 1.2)],
    "cat:1.3)": [("cat:1.3)", 1.0)],
    "(a:1.2.3)": [("a:1.2.3", 1.1)],
    "()": [("", 1.0)],
    "a (cat:1.0) b": [("a cat b", 1.0)],
    # the examples that A1111's own parser is documented with (modules/prompt_parser.py)
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.3 * 1.1 * 1.1),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.5 * 1.1),
        (", sun, ", 1.1),
        ("sky", 1.1**4),
        (".", 1.1),
    ],
    "[[a]] b": [("a", 1 / 1.21), (" b", 1.0)],
    "(a]": [("a]", 1.1)],
    "[a:1.5]": [("a:1.5", 1 / 1.1)],
    "(a:b)": [("a:b", 1.1)],
    "a:b": [("a:b", 1.0)],
    "(a:1.2) (b": [("a", 1.2), (" ", 1.0), ("b", 1.1)],
    "((a:1.2)": [("a", 1.2 * 1.1)],
    "(a :1.2)": [("a ", 1.2)],
    r"a \b": [("a b", 1.0)],
    "(:1.2)": [("", 1.0)],
}


@pytest.mark.parametrize("text", CASES)
def test_weights_are_those_of_the_syntax(text):
    parts = parse(text)
    assert [part for part, _ in parts] == [part for part, _ in CASES[text]]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in CASES[text]])
