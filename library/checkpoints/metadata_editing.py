"""Changing the texts of a safetensors header, with the tensors behind it copied byte for byte."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from library.checkpoints.atomic import atomic_write
from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.metadata import PREFIX, ModelDescription
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_places import TensorFile
from library.checkpoints.tensor_writing import SectionHasher, data_section, safetensors_header
from library.errors import UserError, near_names, raise_all

HASHES = ("sshs_model_hash", "sshs_legacy_hash")
MODELSPEC_NAMES = (
    *(field.name for field in fields(ModelDescription)),
    *("sai_model_spec", "architecture", "implementation", "resolution", "date", "prediction_type"),
    *("encoder_layer", "timestep_range", "hash_sha256", "implementation_version"),
)

PRIVATE_FIELDS: Mapping[str, str] = {
    "ss_tag_frequency": "every tag of the captions, by folder",
    "ss_dataset_dirs": "names of folders",
    "ss_reg_dataset_dirs": "names of folders",
    "ss_training_comment": "a comment",
    "ss_session_id": "a number that ties the files of one run together",
    "ss_training_started_at": "when the author worked",
    "ss_training_finished_at": "when the author worked",
    "prompt": "ComfyUI's workflow, with names of files",
    "workflow": "ComfyUI's workflow, with names of files",
}
PRIVATE_PARTS: Mapping[str, tuple[str, ...]] = {
    "ss_datasets": (
        *("tag_frequency", "image_dir", "metadata_file", "conditioning_data_dir"),
        *("class_tokens", "caption_prefix", "caption_suffix"),
    ),
}
"""Keys that are taken out of a JSON text, at any depth."""

_FOLDERS = re.compile(r"(?<![\w:/.\\%+-])(?:[A-Za-z]:[\\/]+|~?/|\\\\)(?:[^\s\"'`,;:*?<>|\\/]+[\\/]+)+")
_WHOLE_PATH = re.compile(r"(?:[A-Za-z]:[\\/]|~?/|\\\\)[^\"\n]*[\\/]([^\\/\n\"]+)")
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Change:
    """One field before and after; None where it is not there."""

    key: str
    before: str | None
    after: str | None


def full_key(name: str, metadata: Mapping[str, str]) -> str:
    """The key that a user means: what is in the file, else ModelSpec's field of that name, else the name itself.

    >>> full_key("author", {})
    'modelspec.author'
    """
    return PREFIX + name if name in MODELSPEC_NAMES and name not in metadata else name


def with_fields(metadata: Mapping[str, str], values: Mapping[str, str], *, where: str) -> dict[str, str]:
    """With fields set, by full or ModelSpec's short names.

    Raises:
        UserError: a name that looks like a misspelt one, or a hash, which only tensors decide.
    """
    result, problems = dict(metadata), []
    for name, value in values.items():
        key = full_key(name, metadata)
        if key in HASHES:
            problems.append(UserError("is computed from the tensors", where=f"{where} {name}", remedy="leave it out"))
            continue
        short = key.removeprefix(PREFIX)
        near = difflib.get_close_matches(short, MODELSPEC_NAMES, n=1, cutoff=0.8)
        if near and near[0] != short and key not in metadata:
            problems.append(UserError("unknown field", where=f"{where} {name}", remedy=f"did you mean {near[0]}?"))
        result[key] = value
    raise_all(problems)
    return result


def without_fields(metadata: Mapping[str, str], names: Sequence[str], *, where: str) -> dict[str, str]:
    """Without the fields of these names; `*` and `?` stand for any text and letter.

    Raises:
        UserError: a name that no field has.
    """
    gone: set[str] = set()
    problems = []
    for name in names:
        pattern = full_key(name, metadata)
        matched = {key for key in metadata if fnmatchcase(key, pattern)}
        if not matched:
            remedy = near_names(pattern, metadata) if metadata else "the file has no metadata"
            problems.append(UserError("no such field", where=f"{where} {name}", remedy=remedy))
        gone |= matched
    raise_all(problems)
    return {key: value for key, value in metadata.items() if key not in gone}


def without_private(metadata: Mapping[str, str]) -> dict[str, str]:
    """Without what tells of the author's machine and data: `PRIVATE_FIELDS`, `PRIVATE_PARTS`, folders before file names."""
    kept: dict[str, str] = {}
    for key, value in metadata.items():
        if key in PRIVATE_FIELDS:
            continue
        if key in PRIVATE_PARTS:
            value = _without_parts(value, PRIVATE_PARTS[key])
        kept[key] = value if value.startswith("data:") else _without_folders(value)
    return kept


def _without_parts(text: str, names: Sequence[str]) -> str:
    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(inner) for key, inner in value.items() if key not in names}
        return [cleaned(inner) for inner in value] if isinstance(value, list) else value

    try:
        return json.dumps(cleaned(json.loads(text)))
    except ValueError:
        return ""  # no telling what is in it


def _without_folders(text: str) -> str:
    whole = _WHOLE_PATH.fullmatch(text)
    return whole[1] if whole else _FOLDERS.sub("", text)


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    """What differs, by key."""
    return [
        Change(key, before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def write_metadata(file: TensorFile, metadata: Mapping[str, str], target: Path) -> str:
    """Write the file with another header; the tensors are streamed, and compared after re-opening.

    Hashes (`sshs_*`) that the file carries are computed anew: the short one depends on the length of the ss_* fields.

    Args:
        file: a safetensors file.
        metadata: all texts of the new header.
        target: the same path or another one; replaced when the new file is complete.

    Returns:
        The tensors' hash, SHA-256 of the data section in hex.

    Raises:
        UserError: not a safetensors file, too much text, or no space.
        RuntimeError: what was written is not what was meant.
    """
    layout = _layout(file)
    carried = [key for key in HASHES if key in metadata]
    header = safetensors_header(layout, {**metadata, **{key: "0" * (64 if key == HASHES[0] else 8) for key in carried}})
    if len(header) > _LARGEST_HEADER:
        raise UserError("a header may have 100 MB at most", where=str(target), remedy="set shorter texts")
    hasher, tensors = SectionHasher.for_file(layout, metadata), hashlib.sha256()
    size = file.path.stat().st_size
    with atomic_write(target, size=size + len(header)) as output:
        output.write(header)
        for chunk in data_section(file.path):
            output.write(chunk)
            tensors.update(chunk)
            if carried:
                hasher.update(chunk)
        final = {**metadata, **{key: value for key, value in hasher.hashes().items() if key in carried}}
        output.seek(0)
        output.write(safetensors_header(layout, final))
    _check_written(target, final, layout, tensors.hexdigest())
    return tensors.hexdigest()


def _layout(file: TensorFile) -> list[tuple[str, str, tuple[int, ...]]]:
    """(key, type, shape) in the order of the data.

    Raises:
        UserError: where the tensors do not fill the data section.
    """
    with open(file.path, "rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
    places = sorted(file.places.items(), key=lambda item: (item[1].offset, item[1].span))
    end = start
    for key, place in places:
        if place.offset != end:
            raise UserError(f"there is a gap or an overlap before the tensor {key}", where=str(file.path))
        end += place.span
    if end != file.path.stat().st_size:
        raise UserError("there are bytes behind the last tensor", where=str(file.path))
    return [(key, place.dtype, place.shape) for key, place in places]


def _check_written(
    path: Path, metadata: Mapping[str, str], layout: Sequence[tuple[str, str, tuple[int, ...]]], hashed: str
) -> None:
    written = open_tensor_file(path)
    found = sshs_hashes(path)
    if written.metadata != metadata or _layout(written) != layout or found[HASHES[0]] != hashed:
        raise RuntimeError(f"{path}: what was written is not what was meant")
    if any(found[key] != metadata[key] for key in HASHES if key in metadata):
        raise RuntimeError(f"{path}: the hashes in the header are not those of the file")
