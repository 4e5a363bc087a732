"""What guidance is: rows whose predictions make up a picture's, against the formulas written out."""

from __future__ import annotations

import pytest
import torch

from library.generation.adapters import NOBODY
from library.generation.requests import ImageRequest
from library.generation.rows import RowMix, rows_of
from library.prompts.strengths import AdapterStrength
from library.prompts.sub_prompts import SubPrompt

SIZE = (2, 4, 3, 5)
"""Answers: of pictures' rows, C, h, w."""

A, B = SubPrompt(text="a"), SubPrompt(text="b", weight=0.5)
MAPS = [torch.linspace(0, 1, 15).view(3, 5), 1 - torch.linspace(0, 1, 15).view(3, 5)]
ONE, OTHER = {"x": (AdapterStrength(),)}, {"y": (AdapterStrength(),)}


def answers(rows) -> dict:
    """A prediction for each row, by (text, adapters)."""
    stream = torch.Generator().manual_seed(0)
    return {(row.text, *row.acting): torch.randn(SIZE[1:], generator=stream) for row in rows}


def mixed(request, sub_prompts, acting=None, maps=None):
    rows = rows_of(request, sub_prompts, acting or [NOBODY] * len(sub_prompts), maps)
    said = answers(rows)
    mix = RowMix([rows, rows], [request.guidance_rescale] * 2, torch.device("cpu"))
    predictions = torch.stack([said[row.text, *row.acting] for row in [*rows, *rows]])
    both = mix(predictions)
    assert torch.equal(both[0], both[1])
    return both[0], said


def request(**changes) -> ImageRequest:
    return ImageRequest(**{"prompt": "?", "negative_prompt": "n", "seed": 1, "scale": 7.0} | changes)


def test_guidance_goes_from_the_negative_prompt_to_the_prompt():
    got, say = mixed(request(), [A])
    torch.testing.assert_close(got, say["n",] + 7 * (say["a",] - say["n",]))


@pytest.mark.parametrize("scale", [1.0, 0.0, -3.0])
def test_without_guidance_only_the_prompt_is_asked(scale):
    got, say = mixed(request(scale=scale, negative_scale=2.0), [A])
    assert set(say) == {("a",)}
    torch.testing.assert_close(got, say["a",])


def test_a_negative_scale_guides_away_from_the_negative_prompt_alone():
    got, say = mixed(request(negative_scale=2.0), [A])
    torch.testing.assert_close(got, say["",] + 7 * (say["a",] - say["",]) - 2 * (say["n",] - say["",]))


def test_sub_prompts_pull_by_their_weights_and_share_the_negative_prompt():
    got, say = mixed(request(), [A, B])
    assert len(say) == 3
    torch.testing.assert_close(got, say["n",] + 7 * (say["a",] - say["n",]) + 3.5 * (say["b",] - say["n",]))


def test_equal_sub_prompts_are_asked_once():
    got, say = mixed(request(), [A, A])
    assert set(say) == {("a",), ("n",)}
    torch.testing.assert_close(got, say["n",] + 14 * (say["a",] - say["n",]))


def test_regions_are_what_their_own_prompt_and_adapters_would_draw():
    got, say = mixed(request(), [A, SubPrompt(text="b")], [ONE, OTHER], MAPS)
    regions = [say["n", name] + 7 * (say[text, name] - say["n", name]) for text, name in (("a", "x"), ("b", "y"))]
    torch.testing.assert_close(got, MAPS[0] * regions[0] + MAPS[1] * regions[1])


def test_regions_without_guidance_are_parted_alike():
    got, say = mixed(request(scale=1.0), [A, B], maps=MAPS)
    torch.testing.assert_close(got, MAPS[0] * say["a",] + MAPS[1] * say["b",])


def test_rescaled_guidance_has_the_spread_of_the_prompt_alone():
    plain, say = mixed(request(), [A])
    full, _ = mixed(request(guidance_rescale=1.0), [A])
    half, _ = mixed(request(guidance_rescale=0.5), [A])
    torch.testing.assert_close(full.std(), say["a",].std())
    torch.testing.assert_close(full, plain * say["a",].std() / plain.std())
    torch.testing.assert_close(half, (full + plain) / 2)


def test_pictures_of_a_batch_may_have_other_numbers_of_rows():
    pictures = [rows_of(request(), [A], [NOBODY]), rows_of(request(), [A, B], [NOBODY] * 2)]
    mix = RowMix(pictures, [0.0, 0.0], torch.device("cpu"))
    assert mix.owners == [0, 0, 1, 1, 1]
    assert mix.spread(torch.tensor([[5.0], [6.0]])).flatten().tolist() == [5, 5, 6, 6, 6]
    predictions = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    first, second = mix(predictions)
    torch.testing.assert_close(first, 7 * predictions[0] - 6 * predictions[1])
    torch.testing.assert_close(second, 7 * predictions[2] + 3.5 * predictions[3] - 9.5 * predictions[4])
