"""Trigger words come from the surest place first, and into a prompt only once."""

import json

import pytest

from library.generation.trigger_words import ALL_NAMED, chosen_words, trigger_words, with_trigger_words

METADATA = {
    "modelspec.trigger_phrase": "zxc portrait",
    "ss_dataset_dirs": json.dumps({"10_my subject": {"n_repeats": 10, "img_count": 5}, "3_img": {"img_count": 2}}),
    "ss_reg_dataset_dirs": json.dumps({"1_person": {"img_count": 9}}),
    "ss_tag_frequency": json.dumps(
        {
            "10_my subject": {"my subject": 5, "outdoors": 2, "hat": 1},
            "10_my subject (2)": {"sunny": 2},
            "3_img": {"outdoors": 2, "long hair": 3},
            "1_person": {"person": 9},
        }
    ),
}


def test_named_words_come_first_and_tags_by_the_number_of_their_images():
    assert trigger_words(METADATA) == ("zxc portrait", "my subject", "outdoors", "long hair", "sunny")


def test_all_named_words_or_the_first_of_all_are_chosen():
    assert chosen_words(METADATA, ALL_NAMED) == ("zxc portrait", "my subject")
    assert chosen_words(METADATA, 3) == ("zxc portrait", "my subject", "outdoors")
    assert chosen_words(METADATA, 0) == ()


def test_a_data_set_file_names_its_classes():
    subsets = [{"class_tokens": "sks dog", "is_reg": False}, {"class_tokens": "dog", "is_reg": True}, {"class_tokens": None}]
    metadata = {"ss_datasets": json.dumps([{"subsets": subsets}]), "ss_tag_frequency": '{"photos": {"sks dog": 3, "x": 2}}'}
    assert trigger_words(metadata) == ("sks dog", "x")
    assert chosen_words(metadata, ALL_NAMED) == ("sks dog",)


@pytest.mark.parametrize(
    ("frequency", "words"),
    [
        ({"2_img": {"one sentence": 1, "another sentence": 1}}, ()),
        ({"2_img": {"the only caption": 1}}, ("the only caption",)),
    ],
)
def test_captions_that_are_all_different_are_no_trigger_words(frequency, words):
    images = len(frequency["2_img"])
    metadata = {"ss_tag_frequency": json.dumps(frequency), "ss_dataset_dirs": json.dumps({"2_img": {"img_count": images}})}
    assert trigger_words(metadata) == words


@pytest.mark.parametrize("damaged", ["", "{", "[]", "3", '{"a": 3}', '{"5_": {"x": "y"}}', '[{"subsets": 3}]', "[1]"])
def test_damaged_metadata_hold_no_words(damaged):
    fields = ("ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_datasets")
    assert trigger_words(dict.fromkeys(fields, damaged)) == ()


PROMPTS = {
    ("a cat", ("sks",)): "a cat, sks",
    ("a cat, ", ("sks", "hat")): "a cat, sks, hat",
    ("", ("sks",)): "sks",
    ("SKS  dog on grass", ("sks dog",)): "SKS  dog on grass",
    ("a ((sks) dog:1.2) here", ("sks dog",)): "a ((sks) dog:1.2) here",
    ("[sks] dog", ("sks dog",)): "[sks] dog",
    ("sksy dog", ("sks",)): "sksy dog, sks",
    ("<lora:sks:1> a dog", ("sks",)): "<lora:sks:1> a dog, sks",
    (r"saber \(fate\)", ("saber (fate)",)): r"saber \(fate\)",
    ("a knight", ("saber (fate)",)): r"a knight, saber \(fate\)",
    ("a knight", (r"saber \(fate\)",)): r"a knight, saber \(fate\)",
    ("as it is, ", ()): "as it is, ",
}


@pytest.mark.parametrize(("prompt", "words"), PROMPTS)
def test_a_prompt_gets_the_words_that_it_does_not_hold(prompt, words):
    assert with_trigger_words(prompt, words) == PROMPTS[prompt, words]
