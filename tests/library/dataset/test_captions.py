"""Captions step by step, as section 2 of the formats describes them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from library.dataset.captions import (
    CaptionSettings,
    expand_wildcards,
    join_caption_and_tags,
    process_caption,
    tag_frequency,
)

TAGS = "sks dog, sitting, grass, red ball, sky"


def process(caption: str, *, seed: int = 0, epoch: int = 1, step: int = 0, steps: int = 0, **keys) -> str:
    return process_caption(
        caption, CaptionSettings(**keys), random.Random(seed), epoch=epoch, step=step, max_train_steps=steps
    )


@pytest.mark.parametrize(
    ("caption", "keys", "text"),
    [
        ("a dog,  on grass", {}, "a dog,  on grass"),
        ("first\nsecond", {}, "first"),
        ("\n\n first \n", {}, "first"),
        ("", {}, ""),
        ("a dog", {"caption_prefix": "photo of", "caption_suffix": "outside"}, "photo of a dog outside"),
        ("", {"caption_prefix": "sks"}, "sks"),
        (TAGS, {"caption_tag_dropout_rate": 1.0}, ""),
        (TAGS, {"caption_tag_dropout_rate": 1.0, "keep_tokens": 2}, "sks dog, sitting"),
        ("a;b;c", {"caption_separator": ";", "token_warmup_step": 1e-9}, "a, b, c"),
        ("a ||| b, c", {"caption_tag_dropout_rate": 1.0, "keep_tokens_separator": "|||"}, "a"),
        ("a ||| b, c ||| d, e", {"caption_tag_dropout_rate": 1.0, "keep_tokens_separator": "|||"}, "a, d, e"),
        ("a, b, c", {"caption_tag_dropout_rate": 1.0, "keep_tokens_separator": "|||", "keep_tokens": 1}, "a"),
        ("a ||| b", {"keep_tokens_separator": "|||"}, "a ||| b"),
        ("a;;;b, c", {"secondary_separator": ";;;"}, "a,b, c"),
        ("a;;;b, c", {"secondary_separator": ";;;", "caption_tag_dropout_rate": 1.0, "keep_tokens": 1}, "a,b"),
        ("a, , b", {"token_warmup_step": 1e-9}, "a, b"),
        (TAGS, {"caption_dropout_rate": 1.0, "caption_prefix": "sks"}, ""),
    ],
)
def test_a_caption_becomes_this_text(caption, keys, text):
    assert process(caption, **keys, step=1, steps=1) == text


def test_shuffling_keeps_the_first_tags_and_every_tag_once():
    seen = {process(TAGS, seed=seed, shuffle_caption=True, keep_tokens=1) for seed in range(200)}
    assert len(seen) == 24, "all orders of the four flexible tags"
    for text in seen:
        tags = text.split(", ")
        assert tags[0] == "sks dog"
        assert sorted(tags) == sorted(TAGS.split(", "))


def test_a_secondary_separator_keeps_its_tags_together():
    for seed in range(20):
        assert "x,y" in process("a, x;y, b", seed=seed, shuffle_caption=True, secondary_separator=";")


@pytest.mark.parametrize(
    ("rate_key", "is_hit"),
    [("caption_dropout_rate", lambda text: text == ""), ("caption_tag_dropout_rate", lambda text: "sitting" not in text)],
)
def test_a_rate_is_the_share_of_readings_that_are_hit(rate_key, is_hit):
    draws = random.Random(0)
    chosen = CaptionSettings(**{rate_key: 0.3})
    hits = sum(is_hit(process_caption(TAGS, chosen, draws, epoch=1)) for _ in range(4000))
    assert hits / 4000 == pytest.approx(0.3, abs=0.03)


def test_every_third_epoch_all_captions_are_empty_and_no_other():
    empty = [epoch for epoch in range(1, 10) if process("a", epoch=epoch, caption_dropout_every_n_epochs=3) == ""]
    assert empty == [3, 6, 9]


@pytest.mark.parametrize(
    ("step", "warmup", "count"), [(0, 10, 1), (5, 10, 3), (9, 10, 4), (10, 10, 5), (50, 0.5, 5), (25, 0.5, 3), (0, 0.5, 1)]
)
def test_token_warmup_uses_more_of_the_tags_step_by_step(step, warmup, count):
    assert process(TAGS, token_warmup_step=warmup, step=step, steps=100).split(", ") == TAGS.split(", ")[:count]


def test_a_wildcard_takes_each_alternative_equally_often():
    draws = random.Random(0)
    counts = Counter(expand_wildcards("a {red|blue|} car", draws) for _ in range(3000))
    assert set(counts) == {"a red car", "a blue car", "a  car"}
    assert all(count == pytest.approx(1000, abs=120) for count in counts.values())


@pytest.mark.parametrize(
    ("text", "expanded"), [("{{a|b}}", "{a|b}"), ("{one}", "one"), ("plain", "plain"), ("a { b", "a { b")]
)
def test_doubled_braces_are_braces_and_lone_ones_stay(text, expanded):
    assert expand_wildcards(text, random.Random(0)) == expanded


def test_with_wildcards_any_line_may_be_picked_and_each_has_prefix_and_suffix():
    seen = {
        process("one\n\ntwo {x|x}", seed=seed, enable_wildcard=True, caption_prefix="p", caption_suffix="s")
        for seed in range(30)
    }
    assert seen == {"p one s", "p two x s"}


def test_without_wildcards_braces_stay_as_they_are():
    assert process("a {b|c}") == "a {b|c}"


@pytest.mark.parametrize(
    ("caption", "tags", "joined"),
    [
        ("a dog", "x, y", "a dog,x, y"),
        ("one\ntwo", "x", "one,x\ntwo,x"),
        ("a dog", "x\ny", "a dog,x,y"),
        ("", "x", "x"),
        ("a dog", "", "a dog"),
        ("", "", ""),
    ],
)
def test_tags_of_a_metadata_entry_go_to_the_end_of_every_line(caption, tags, joined):
    assert join_caption_and_tags(caption, tags, ",") == joined


def test_tag_frequency_counts_lower_cased_stripped_tags():
    assert tag_frequency(["A dog, Sky", "sky , grass,", ""]) == {"a dog": 1, "sky": 2, "grass": 1}
