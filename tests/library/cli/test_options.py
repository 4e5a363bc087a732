"""The command line is an API: which options exist is frozen, and every mistake is one sentence that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.cli.options import FLAG, Option, OptionGroup, all_options, parse
from library.cli.training_options import OWN_OPTIONS, TRAINING_OPTIONS
from library.errors import UserError

FROZEN = Path(__file__).parent / "train_network_options.txt"
GROUPS = (
    OptionGroup(
        "all",
        (
            Option(name="network_dim", type=int, help="rank"),
            Option(name="learning_rate", type=float, default=2e-6, help="rate"),
            Option(name="network_args", many=True, help="settings"),
            Option(name="range", type=float, count=2, help="two numbers"),
            Option(name="save_model_as", choices=("ckpt", "safetensors"), default="safetensors", help="format"),
            Option(name="v2", type=FLAG, help="SD2"),
            Option(name="resume", help="state", later="it comes later"),
            Option(name="config_file", help="file"),
        ),
    ),
)


def parsed(*argv: str):
    return parse(argv, GROUPS, description="")


def test_the_options_of_sd_scripts_are_all_there_with_their_types_and_defaults():
    lines = [
        f"{o.name} {'flag' if o.type is FLAG else o.type.__name__}{'*' if o.many else ''} {o.default}"
        for name, o in all_options(TRAINING_OPTIONS).items()
        if name not in all_options(OWN_OPTIONS)
    ]
    assert lines == FROZEN.read_text().splitlines()


def test_every_option_has_help_that_fits_a_line_of_a_table():
    for option in all_options(TRAINING_OPTIONS).values():
        assert 4 <= len(option.help) <= 110, option.name


@pytest.mark.parametrize("spelling", ["--network_dim=8", "--network-dim=8", "--networkdim=8"])
def test_an_option_is_known_by_its_letters(spelling):
    assert parsed(spelling)["network_dim"] == 8


def test_what_was_given_can_be_told_from_defaults():
    options = parsed("--learning_rate", "2e-6", "--v2")
    assert options.given("learning_rate")
    assert options.given("v2")
    assert not options.given("save_model_as")
    assert options["save_model_as"] == "safetensors"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--network_dm", "4"], "--network_dm: unknown option; did you mean network_dim?"),
        (["--learning_rat", "1"], "--learning_rat: unknown option; did you mean learning_rate?"),
        (["--network_dim", "four"], "--network_dim: 'four' is not a whole number"),
        (["--learning_rate", "fast"], "--learning_rate: 'fast' is not a number"),
        (["--save_model_as", "safetensor"], "--save_model_as: 'safetensor' is not known; did you mean safetensors?"),
        (["--range", "1"], "argument --range: expected 2 arguments; --help lists all options"),
        (["--resume", "x"], "--resume: is not available yet: it comes later; leave it out for now"),
        (["stray"], "what is 'stray'? It belongs to no option; --help lists all options"),
    ],
)
def test_a_mistake_is_one_sentence(argv, sentence):
    with pytest.raises(UserError) as error:
        parsed(*argv)
    assert str(error.value) == sentence


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as error:
        parsed("--network_dim", "x", "--learning_rate", "y", "--v3")
    assert len(str(error.value).splitlines()) == 3


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return str(path)

    return write


def test_sections_of_a_configuration_file_only_group_and_the_command_line_wins(config):
    path = config('[a]\nnetwork_dim = 8\nlearning_rate = 1\n[b]\nv2 = true\nnetwork_args = ["conv_dim=4"]\n')
    options = parsed("--config_file", path, "--network_dim", "16")
    assert (options["network_dim"], options["learning_rate"], options["v2"]) == (16, 1.0, True)
    assert options["network_args"] == ("conv_dim=4",)
    assert options.where("learning_rate") == f"--learning_rate 1.0 ({path})"


def test_a_false_in_the_file_is_a_value(config):
    options = parsed("--config_file", config("v2 = false\n"))
    assert options.given("v2")
    assert options["v2"] is False


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("learning_rat = 1e-4\n", "unknown option 'learning_rat'; did you mean learning_rate?"),
        ('learning_rate = "abc"\n', "learning_rate: 'abc' is not a number"),
        ("network_dim = 4.5\n", "network_dim: 4.5 is not a whole number"),
        ('v2 = "yes"\n', "v2: 'yes' is not true or false"),
        ("[a]\nnetwork_dim = 4\n[b]\nnetwork_dim = 8\n", "'network_dim' stands in two sections"),
        ("network_dim = \n", "is not valid TOML"),
        ("[a.b]\nnetwork_dim = 4\n", "section [a.b] is nested too deep; use [a]"),
    ],
)
def test_a_mistake_in_the_file_names_the_file(config, text, part):
    path = config(text)
    with pytest.raises(UserError) as error:
        parsed("--config_file", path)
    assert str(error.value).startswith(f"--config_file {path}")
    assert part in str(error.value)


def test_a_missing_configuration_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        parsed("--config_file", str(tmp_path / "none.toml"))


def test_values_given_by_place_are_converted_and_named_without_dashes():
    places = (Option(name="source", type=Path, help="x"), Option(name="count", type=int, help="x"))
    groups = (OptionGroup("x", (Option(name="fast", type=FLAG, help="x"),)),)
    options = parse(["a/b", "--fast", "3"], groups, description="", positional=places)
    assert (options["source"], options["count"], options["fast"]) == (Path("a/b"), 3, True)
    with pytest.raises(UserError, match="^count: 'x' is not a whole number$"):
        parse(["a", "x"], groups, description="", positional=places)
    with pytest.raises(UserError, match="the following arguments are required: count"):
        parse(["a"], groups, description="", positional=places)
