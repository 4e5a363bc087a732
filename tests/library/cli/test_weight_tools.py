"""Places that weight tools are told to write to, and devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.cli.options import FLAG, Option, OptionGroup, parse
from library.cli.weight_tools import checked_device, place_problems, suffix_problems
from library.errors import UserError

OPTIONS = (
    OptionGroup(
        "all",
        (
            Option(name="models", many=True, help="inputs"),
            Option(name="base", help="input"),
            Option(name="save_to", type=Path, help="output"),
            Option(name="report", type=Path, help="output"),
            Option(name="plot", type=Path, help="output"),
            Option(name="v2", type=FLAG, help="a switch"),
        ),
    ),
)


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with an input file, a link to it, a model folder, and a file that nobody reads."""
    for name in ("in.safetensors", "old.json", "model/model_index.json", "model/unet/weights.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "in.safetensors")
    (tmp_path / "model_link").symlink_to(tmp_path / "model")
    return tmp_path


def problems(place: Path, *words: str) -> list[str]:
    paths = [word if word.startswith("--") else str(place / word) for word in words]
    given = parse(paths, OPTIONS, description="")
    return [str(problem).replace(f"{place}/", "") for problem in place_problems(given, ("models", "base"))]


@pytest.mark.parametrize(
    "words",
    [
        ("--save_to", "in.safetensors"),
        ("--save_to", "link.safetensors"),
        ("--save_to", "model"),
        ("--save_to", "model_link"),
        ("--save_to", "model/unet/weights.safetensors"),
        ("--report", "in.safetensors"),
        ("--plot", "model_link/unet/weights.safetensors"),
    ],
)
def test_an_input_is_never_written_over(words, place):
    found = problems(place, "--models", "in.safetensors", "--base", "model", *words)
    assert found == [f"{' '.join(words)}: is one of the inputs; name another place"]


def test_two_outputs_have_two_places(place):
    found = problems(place, "--save_to", "new", "--report", "model/../new", "--plot", "new")
    assert found == [
        "--report model/../new: is what --save_to writes; name another place",
        "--plot new: is what --report writes; name another place",
    ]


def test_reports_that_cannot_be_written_are_found_before_the_work(place):
    (found,) = problems(place, "--models", "in.safetensors", "--report", "none/r.json")
    assert "the folder none does not exist" in found


def test_what_nobody_reads_may_be_replaced(place):
    assert problems(place, "--models", "in.safetensors", "--base", "an/id-at-the-hub", "--save_to", "old.json") == []


def test_a_folder_has_no_suffix_and_is_not_every_tools():
    given = parse(["--save_to", "folder"], OPTIONS, description="")
    assert suffix_problems(given, folder=True) == []
    assert "has no suffix" in str(suffix_problems(given)[0])


@pytest.mark.parametrize("name", ["cuda:99", "meta", "quantum"])
def test_a_device_that_cannot_compute_is_refused(name):
    with pytest.raises(UserError, match=f"--device {name}: cannot be used here"):
        checked_device(name)
    assert checked_device(None) == checked_device("cpu") == "cpu"
