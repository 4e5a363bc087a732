"""In-prompt options: every documented one is read, and nothing unknown, later or malformed is passed over."""

import json

import pytest

from library.errors import UserError
from library.generation.prompt_options import (
    IMAGE_OPTIONS,
    PREVIEW_OPTIONS,
    UNAVAILABLE,
    parse_prompt_line,
    read_preview_prompts,
    read_prompt_file,
)


def parse(line, **settings):
    return parse_prompt_line(line, where="--prompt", **settings)


def test_all_options_of_a_line_are_read():
    line = parse("a cat, (sitting:1.2) --n blurry, bad --w 768 --h 640 --s 30 --d 1,2,3 --l 5.5")
    assert line.prompt == "a cat, (sitting:1.2)"
    assert line.settings == {"negative_prompt": "blurry, bad", "width": 768, "height": 640, "steps": 30, "scale": 5.5}
    assert line.seeds == (1, 2, 3)


def test_options_of_adapters_and_of_other_pictures_are_read():
    line = parse("a --am 0.5,-1 --nl none --t 0.4 --ss euler_a --rescale 0.7 --f mine.png")
    assert line.settings == {
        **{"network_strengths": (0.5, -1.0), "negative_scale": None, "strength": 0.4},
        **{"sampler": "euler_a", "guidance_rescale": 0.7},
    }
    assert line.file_name == "mine.png"


def test_a_plain_prompt_leaves_everything_to_the_command():
    line = parse("a cat -- well-known --- and 3--4")
    assert line.prompt == "a cat -- well-known --- and 3--4"
    assert (line.settings, line.seeds, line.file_name) == ({}, (), None)


def test_names_are_case_insensitive_and_a_line_may_begin_with_an_option():
    line = parse("--N blurry --W 512")
    assert (line.prompt, line.settings) == ("", {"negative_prompt": "blurry", "width": 512})
    assert parse("a\t--w\t512").settings == {"width": 512}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("a --sedd 1", "--prompt, --sedd: unknown option in a prompt"),
        ("a --ss eulerr", "no sampler is called 'eulerr'; did you mean euler"),
        ("a --t 1.5", "1.5 is out of range; give 0 to 1"),
        ("a --f ../x.png", "'../x.png' is not a file name"),
        ("a --f x.webp", "'x.webp' is no PNG file"),
        ("a --am 1,x", "'x' is not a number"),
        ("a --n <lora:bad:1>", "'<lora:bad:1>' in the negative prompt has no effect"),
        ("a --w 512x512", "--prompt, --w: '512x512' is not a whole number"),
        ("a --w 512, masterpiece", "is not a whole number"),
        ("a --w", "'' is not a whole number"),
        ("a --w -64", "-64 is out of range; give 64 pixels or more"),
        ("a --s 1001", "1001 is out of range; give 1 to 1000"),
        ("a --d -1", "-1 is out of range"),
        ("a --d 1,x", "'x' is not a whole number"),
        ("a --l high", "'high' is not a number"),
        ("a --l nan", "not a finite number"),
        ("a --w 64 --w 128", "is given twice"),
    ],
)
def test_what_is_wrong_is_named(line, sentence):
    with pytest.raises(UserError) as error:
        parse(line)
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_options_of_later_and_other_models_are_refused_by_name(name):
    with pytest.raises(UserError, match=f"--{name}: is not available; "):
        parse(f"a --{name} 1")


def test_all_mistakes_of_a_line_are_told_at_once():
    with pytest.raises(UserError) as error:
        parse("a --w 1 --x 2 --am none --c 1")
    assert len(str(error.value).splitlines()) == 4


def test_a_prompt_file_skips_comments_and_blank_lines_and_names_the_line_at_fault(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# ours\n\na cat --w 64\n  \n#x --y\na dög\n", encoding="utf-8")
    lines = read_prompt_file(path, where="--from_file")
    assert [(line.prompt, line.where) for line in lines] == [
        ("a cat", "--from_file, line 3"),
        ("a dög", "--from_file, line 6"),
    ]
    path.write_text("a --x 1\na cat\na --y 2\n")
    with pytest.raises(UserError) as error:
        read_prompt_file(path, where="--from_file")
    assert [sentence.partition(":")[0] for sentence in str(error.value).splitlines()] == [
        "--from_file, line 1, --x",
        "--from_file, line 3, --y",
    ]


@pytest.mark.parametrize("content", ["", "# only\n\n"])
def test_a_file_without_prompts_is_an_error(tmp_path, content):
    (tmp_path / "p.txt").write_text(content)
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompt_file(tmp_path / "p.txt", where="--from_file")


def test_a_missing_or_binary_file_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompt_file(tmp_path / "none.txt", where="--from_file")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        read_prompt_file(tmp_path / "b.txt", where="--from_file")


PREVIEW_FILES = {
    "p.txt": "a cat --n bad --w 512 --h 640 --d 7 --s 20 --l 6 --ss euler_a\na dog\n",
    "p.json": json.dumps(
        [
            {
                "prompt": "a cat",
                "negative_prompt": "bad",
                "width": 512,
                "height": 640,
                "seed": 7,
                "sample_steps": 20,
                "scale": 6,
                "sample_sampler": "euler_a",
            },
            "a dog",
        ]
    ),
    "p.toml": '[prompt]\nwidth = 512\nheight = 8\nnegative_prompt = "bad"\nsample_steps = 20\nscale = 6\n'
    '[[prompt.subset]]\nprompt = "a cat"\nheight = 640\nseed = 7\nsample_sampler = "euler_a"\n'
    '[[prompt.subset]]\nprompt = "a dog"\nheight = 64\n',
}


@pytest.mark.parametrize("name", PREVIEW_FILES)
def test_the_three_kinds_of_preview_files_say_the_same(tmp_path, name):
    (tmp_path / name).write_text(PREVIEW_FILES[name])
    cat, dog = read_preview_prompts(tmp_path / name)
    assert (cat.prompt, cat.seeds) == ("a cat", (7,))
    assert cat.settings == {
        **{"negative_prompt": "bad", "width": 512, "height": 640},
        **{"steps": 20, "scale": 6.0, "sampler": "euler_a"},
    }
    assert dog.prompt == "a dog"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.csv", "a", "is no kind of prompt file"),
        ("p.json", "{}", "is not a list of prompts"),
        ("p.json", "[", "is not valid JSON"),
        ("p.json", "[1]", "prompt 1: is neither a text nor a table"),
        ("p.json", '[{"prompt": "a", "widht": 512}]', "did you mean width?"),
        ("p.json", '[{"prompt": "a", "controlnet_image": "x.png"}]', "control images of previews come later"),
        ("p.json", '[{"prompt": "a --w 512"}]', "options stand inside the text of a table"),
        ("p.toml", 'prompt = "a"', "holds no prompts"),
        ("p.toml", "[prompt", "is not valid TOML"),
        ("p.txt", "a --cn x.png", "control images of previews come later"),
        ("p.txt", "a --ss eulerr", "no sampler is called 'eulerr'; did you mean euler"),
        ("p.txt", "a --d 1,2", "'1,2' is not a whole number"),
        ("p.txt", "a <lora:x:1>", "'<lora:x:1>' has no effect; previews show the adapter that is trained"),
    ],
)
def test_a_wrong_preview_file_is_a_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_preview_prompts(tmp_path / name)
    assert sentence in str(error.value)


def test_previews_read_no_prompt_language_that_sd_scripts_previews_have_not(tmp_path):
    (tmp_path / "p.txt").write_text("black AND white, {a|b}\n")
    assert read_preview_prompts(tmp_path / "p.txt")[0].prompt == "black AND white, {a|b}"


def test_no_name_is_both_available_and_not():
    assert not set(UNAVAILABLE) & (set(IMAGE_OPTIONS) | set(PREVIEW_OPTIONS))
