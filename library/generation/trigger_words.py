"""Trigger words of an adapter: the words it was trained with, as its metadata hold them.

Three places have them, from the surest to a guess: the phrase that the author wrote (ModelSpec), the classes of the data set
(kohya's folders `10_my subject`, `class_tokens` of a data set file), and the tags that most captions have.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from library.checkpoints.metadata import read_modelspec

ALL_NAMED = -1
"""In place of a number of words: all that the author named, and no tags of captions."""

_FOLDER = re.compile(r"\d+_(.+?)(?: \(\d+\))?$")  # repeats_class; sd-scripts numbers folders of one name "(2)"
_OF_NOTHING = {"img", "imgs", "image", "images", "dataset", "data", "train", "training", "input", "class", "reg"}
"""Names that folders have for want of another."""


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """All that the metadata of a file say, each once: what its author named, then tags by the number of their captions.

    Tags of one caption alone are left out where there are more: they describe an image, not the subject.
    """
    return _each_once([*_named_words(metadata), *_frequent_tags(metadata)])


def chosen_words(metadata: Mapping[str, str], count: int) -> tuple[str, ...]:
    """The first `count` words, or with `ALL_NAMED` all that the author named."""
    return _each_once(_named_words(metadata)) if count == ALL_NAMED else trigger_words(metadata)[:count]


def with_trigger_words(prompt: str, words: Sequence[str]) -> str:
    """The prompt with the words that it does not hold behind it, parted by commas.

    It holds a word that stands in it whole, in small letters or capitals, with whatever brackets and weights. Brackets of a
    word are escaped, since in a prompt they are weights.
    """
    held = _plain(prompt)
    missing = [word for word in words if not re.search(rf"(?<!\w){re.escape(_plain(word))}(?!\w)", held)]
    beginning = [prompt.rstrip().rstrip(",")] if prompt.strip() else []
    return ", ".join([*beginning, *map(_escaped, missing)]) if missing else prompt


def _named_words(metadata: Mapping[str, str]) -> Iterator[str]:
    yield from read_modelspec(metadata).get("trigger_phrase", "").split(",")
    without_subject = _json_object(metadata, "ss_reg_dataset_dirs")
    for field in ("ss_dataset_dirs", "ss_tag_frequency"):
        for folder in _json_object(metadata, field):
            found = _FOLDER.match(folder)
            if found and folder not in without_subject and found[1].strip().lower() not in _OF_NOTHING:
                yield from found[1].split(",")
    for subset in _subsets(metadata):
        if isinstance(subset.get("class_tokens"), str) and subset.get("is_reg") is not True:
            yield from subset["class_tokens"].split(",")


def _frequent_tags(metadata: Mapping[str, str]) -> Iterator[str]:
    without_subject = _json_object(metadata, "ss_reg_dataset_dirs")
    captions: Counter[str] = Counter()
    for folder, tags in _json_object(metadata, "ss_tag_frequency").items():
        if isinstance(tags, dict) and folder not in without_subject:
            captions.update({tag: number for tag, number in tags.items() if isinstance(number, int)})
    folders = [folder for folder in _json_object(metadata, "ss_dataset_dirs").values() if isinstance(folder, dict)]
    images = sum(folder["img_count"] for folder in folders if isinstance(folder.get("img_count"), int))
    least = 2 if max([images, *captions.values()]) > 1 else 1
    yield from (tag for tag, number in captions.most_common() if number >= least)


def _json_object(metadata: Mapping[str, str], field: str) -> dict[str, Any]:
    """A field as the object it should be; empty where it is missing or something else."""
    found = _json(metadata, field)
    return found if isinstance(found, dict) else {}


def _subsets(metadata: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for dataset in _objects(_json(metadata, "ss_datasets")):
        yield from _objects(dataset.get("subsets"))


def _objects(found: Any) -> list[dict[str, Any]]:
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _json(metadata: Mapping[str, str], field: str) -> Any:
    try:
        return json.loads(metadata.get(field, "null"))
    except ValueError:
        return None


def _each_once(words: Iterable[str]) -> tuple[str, ...]:
    """Stripped, without empty ones, and without those that differ from an earlier one in capitals or brackets alone."""
    kept: dict[str, str] = {}
    for word in words:
        if _plain(word):
            kept.setdefault(_plain(word), " ".join(word.split()))
    return tuple(kept.values())


def _plain(text: str) -> str:
    """For comparison: without tags of adapters, weights, brackets and escapes, in small letters."""
    text = re.sub(r"<[^>]*>", " ", text)
    text = re.sub(r":\s*[-+]?[\d.]+\s*(?=[)\]])", "", text)
    return " ".join(re.sub(r"[()\[\]\\]", "", text).lower().split())


def _escaped(word: str) -> str:
    return re.sub(r"(?<!\\)([()\[\]])", r"\\\1", word)
