"""Pictures beside the base's: the left half is the picture without adapters, pixel for pixel, and it is drawn once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from library.generation.comparing import Comparisons, of_the_base
from library.generation.options import AdapterOptions
from library.generation.planning import PlannedPicture
from library.generation.requests import ImageRequest
from tests.support.drawing import draw, pixels, refused

pytestmark = pytest.mark.usefixtures("_tokenizers_are_read_once")


def halves(comparison: Path) -> tuple[np.ndarray, np.ndarray]:
    """The 64 x 64 pictures below the labels."""
    sheet = pixels(comparison)
    return sheet[-64:, :64], sheet[-64:, -64:]


@pytest.mark.parametrize("how", ["tag", "command line", "both, in a batch"])
def test_a_picture_stands_beside_that_of_the_base(tiny_sd1_folder, tiny_sd1_lora, tmp_path, how):
    tag = f" <lora:{tiny_sd1_lora}>" if how != "command line" else ""
    network = ("--network_weights", tiny_sd1_lora) if how != "tag" else ()
    batch = ("--batch_size", 2) if how == "both, in a batch" else ()
    common = ("--ckpt", tiny_sd1_folder, "--seed", 3)
    prompt = f"a{tag} cat --n dog"
    picture, comparison = draw(
        *common, *network, *batch, "--prompt", prompt, "--compare_base", "--outdir", tmp_path / "compared"
    )
    assert comparison.name == f"{picture.stem}_compared.png"
    (alone,) = draw(*common, *network, "--prompt", prompt, "--outdir", tmp_path / "alone")
    (base,) = draw(*common, "--prompt", "a cat --n dog", "--outdir", tmp_path / "base")
    left, right = halves(comparison)
    assert np.abs(left - right).mean() > 2
    assert np.array_equal(right, pixels(picture))
    assert np.abs(left - pixels(base)).max() <= (1 if batch else 0)
    assert np.abs(right - pixels(alone)).max() <= (1 if batch else 0)


def test_the_base_is_drawn_once_for_pictures_that_share_it():
    requests = [ImageRequest(prompt=f"a cat <lora:{name}:1>", seed=seed) for name in "xy" for seed in (1, 2)]
    comparisons = Comparisons([PlannedPicture(request=each, raw_prompt="") for each in requests], AdapterOptions())
    assert comparisons.bases == [ImageRequest(prompt="a cat ", seed=seed) for seed in (1, 2)]


def test_all_adapters_of_the_command_line_are_off_in_the_base():
    request = ImageRequest(prompt="a", seed=1, network_strengths=(1, 0.5))
    assert of_the_base(request, 2) == ImageRequest(prompt="a", seed=1, network_strengths=(0,))


def test_a_picture_without_adapters_stands_alone(tiny_sd1_folder, tiny_sd1_lora, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a cat --f plain\na cat <lora:{tiny_sd1_lora}> --f tagged\n")
    command = ("--ckpt", tiny_sd1_folder, "--from_file", prompts, "--compare_base", "--outdir", tmp_path / "out")
    assert [path.name for path in draw(*command)] == ["plain.png", "tagged.png", "tagged_compared.png"]


def test_without_adapters_or_with_such_as_are_merged_there_is_nothing_to_compare(
    capsys, tiny_sd1_folder, tiny_sd1_lora, tmp_path
):
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a", "--outdir", tmp_path, "--compare_base")
    assert "--compare_base: no picture has an adapter; give --network_weights, or <lora:FILE:1>" in refused(capsys, *command)
    merged = ("--network_weights", tiny_sd1_lora, "--network_merge")
    assert "leave out --network_merge" in refused(capsys, *command, *merged)
    stages = ("--highres_fix_scale", 0.5, "--highres_fix_save_1st")
    assert "first stages of the base would be saved too" in refused(capsys, *command, *stages)
    assert not list(tmp_path.glob("*"))
