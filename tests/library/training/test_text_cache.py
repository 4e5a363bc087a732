"""Cached conditions are those that a step would compute, whatever happened to the cache; only the stale is made again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from library.checkpoints.base_model import open_base_model
from library.conditioning.text_encoders import TextEncoders
from library.errors import UserError
from library.families.sd1 import SD1
from library.families.sdxl import SDXL
from library.training import conditions, text_cache
from library.training.conditions import RememberedConditions, encoded
from library.training.options import CaptionEncodingOptions

CAPTIONS = ["sks thing", "a (red:1.3) thing", "", "sks  THING"]


@pytest.fixture(params=[SD1, SDXL], ids=lambda family: family.name)
def texts(request):
    family = request.param
    base = open_base_model(request.getfixturevalue(f"tiny_{family.name}_folder"))
    modules = base.load_text_encoders(dtype=torch.float32, device="cpu")
    return TextEncoders(specs=family.text_encoders, tokenizers=base.load_tokenizers(), modules=modules)


@pytest.fixture
def cache(texts, tmp_path):
    folders = dict.fromkeys(CAPTIONS, tmp_path)
    made = text_cache.DiskTexts(folders=folders, texts=texts, options=CaptionEncodingOptions(), fingerprint="tiny fp32")
    made.prepare()
    return made


def fill(cache, texts) -> list[str]:
    """The captions that had to be encoded."""
    asked: list[str] = []

    def encode(captions):
        asked.extend(captions)
        return encoded(captions, texts, getattr(cache, "options", CaptionEncodingOptions()))

    text_cache.fill(cache, CAPTIONS, lambda: encode, progress=lambda done, total: None)
    return asked


def assert_same(condition, other) -> None:
    assert torch.allclose(condition.context, other.context, atol=1e-5)
    assert (condition.pooled is None) == (other.pooled is None)
    assert condition.pooled is None or torch.allclose(condition.pooled, other.pooled, atol=1e-5)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_cache_gives_what_is_computed_at_every_use(texts, cache, where):
    kept = cache if where == "disk" else text_cache.MemoryTexts()
    assert fill(kept, texts) == CAPTIONS
    wanted = [CAPTIONS[2], CAPTIONS[0], CAPTIONS[2]]
    read = text_cache.reader(kept, torch.device("cpu"))
    assert_same(read(wanted), encoded(wanted, texts, CaptionEncodingOptions()))
    assert fill(kept, texts) == []


def test_captions_of_the_same_tokens_share_an_entry(texts, cache):
    fill(cache, texts)
    assert cache.path("sks thing") == cache.path("sks  THING")
    assert len(list((cache.folders[""] / text_cache.FOLDER).iterdir())) == 3


@pytest.mark.parametrize(
    "change",
    [{"clip_skip": 3}, {"max_token_length": 150}, {"weighted_captions": True}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_have_entries_of_their_own(texts, cache, change):
    fill(cache, texts)
    other = replace(cache, options=replace(cache.options, **change))
    assert fill(other, texts) == CAPTIONS
    read = text_cache.reader(other, torch.device("cpu"))
    assert_same(read(CAPTIONS), encoded(CAPTIONS, texts, other.options))
    assert fill(cache, texts) == []


def test_other_text_encoders_have_entries_of_their_own(texts, cache):
    fill(cache, texts)
    assert fill(replace(cache, fingerprint="others fp32"), texts) == CAPTIONS


@pytest.mark.parametrize("harm", [lambda data: data[:-5], lambda data: b"", lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_entry_is_made_again_alone(texts, cache, harm):
    fill(cache, texts)
    path = cache.path(CAPTIONS[1])
    whole = path.read_bytes()
    path.write_bytes(harm(whole))
    with pytest.raises(UserError, match="the cached text encoder outputs are damaged; delete it"):
        cache.read(CAPTIONS[1])
    assert fill(cache, texts) == [CAPTIONS[1]]
    assert_same(cache.read(CAPTIONS[1]), encoded([CAPTIONS[1]], texts, cache.options))


def test_a_folder_that_cannot_be_written_is_one_sentence(cache, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / text_cache.FOLDER).write_text("in the way")
    with pytest.raises(UserError, match="text encoder outputs cannot be written here; make it writable, or keep them in"):
        replace(cache, folders={"a": tmp_path / "other"}).prepare()


def test_conditions_that_are_not_numbers_are_refused_by_caption(texts):
    with torch.no_grad():
        next(texts.modules[0].parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="caption 'sks thing': the text encoders give numbers that are not finite"):
        fill(text_cache.MemoryTexts(), texts)


def test_what_is_remembered_has_an_end(texts, monkeypatch):
    asked: list[str] = []
    make = partial(encoded, texts=texts, options=CaptionEncodingOptions())
    remembered = RememberedConditions(lambda captions: asked.extend(captions) or make(captions))
    monkeypatch.setattr(conditions, "REMEMBERED_BYTES", 2 * remembered(["one"]).nbytes)
    for captions in (["one"], ["two", "one"], ["three"], ["two"], ["one"]):
        assert_same(remembered(captions), make(captions))
    assert asked == ["one", "two", "three", "one"]
