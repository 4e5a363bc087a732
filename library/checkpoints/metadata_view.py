"""The texts of a header for people: sections, shortened values, and what two files differ in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from library.checkpoints.metadata import PREFIX
from library.checkpoints.metadata_editing import changes
from library.checkpoints.tensor_places import TensorFile
from library.errors import counted, some_names

if TYPE_CHECKING:
    from torch import Tensor

_WIDEST = 100  # characters of a value
SECTIONS: Mapping[str, str] = {PREFIX: "ModelSpec", "ss_": "training", "sshs_": "hashes of the tensors"}


def decoded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Sorted by key, with JSON objects and lists as such."""
    return {key: _decoded(value) for key, value in sorted(metadata.items())}


def _decoded(value: str) -> Any:
    if value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def file_line(file: TensorFile) -> str:
    """Size, number of tensors, and their types."""
    types = Counter(place.dtype for place in file.places.values())
    listed = ", ".join(f"{number} {dtype}" for dtype, number in types.most_common())
    return f"{file.path}: {file.path.stat().st_size / 1e6:,.1f} MB, {counted(len(file.places), 'tensor')} ({listed})"


def view_lines(file: TensorFile) -> Iterator[str]:
    """The readable table."""
    yield file_line(file)
    if not file.metadata:
        yield "no metadata" if is_safetensors(file) else "no metadata: only .safetensors files hold any"
        return
    left = dict(sorted(file.metadata.items()))
    for prefix, title in SECTIONS.items():
        fields = {key: left.pop(key) for key in list(left) if key.startswith(prefix)}
        yield from _section(title, prefix, fields)
    yield from _section("other", "", left)


def _section(title: str, prefix: str, fields: Mapping[str, str]) -> Iterator[str]:
    if not fields:
        return
    yield f"\n{title}"
    width = max(len(key) - len(prefix) for key in fields)
    for key, value in fields.items():
        for number, line in enumerate(shown(key, value)):
            yield f"  {key.removeprefix(prefix) if number == 0 else '':{width}}  {line}".rstrip()


def shown(key: str, value: str) -> list[str]:
    """A value as lines; long ones are cut and say so."""
    try:
        lines = _FORMATS[key](value) if key in _FORMATS else value.splitlines() or [""]
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
        lines = value.splitlines() or [""]
    return [_cut(line) for line in lines]


def _cut(line: str) -> str:
    return line if len(line) <= _WIDEST else f"{line[:_WIDEST]}... ({len(line)} characters; --json shows all)"


def _time(value: str) -> list[str]:
    return [datetime.fromtimestamp(float(value)).isoformat(" ", "seconds")]


def _tags(value: str) -> list[str]:
    lines = []
    for folder, tags in json.loads(value).items():
        common = [f"{tag} {number}" for tag, number in Counter(tags).most_common()]
        lines.append(f"{folder}: {some_names(common, 8)}")
    return lines


def _folders(value: str) -> list[str]:
    return [f"{name}: {of['img_count']} images x {of['n_repeats']}" for name, of in json.loads(value).items()]


def _picture(value: str) -> list[str]:
    kind, _, data = value.partition(",")
    return [f"{kind.removeprefix('data:').partition(';')[0]}, {len(data) * 3 // 4 / 1000:.1f} kB"]


_FORMATS: Mapping[str, Callable[[str], list[str]]] = {
    "ss_training_started_at": _time,
    "ss_training_finished_at": _time,
    "ss_tag_frequency": _tags,
    "ss_dataset_dirs": _folders,
    "ss_reg_dataset_dirs": _folders,
    f"{PREFIX}thumbnail": _picture,
}


def is_safetensors(file: TensorFile) -> bool:
    """Whether the file's first bytes are a safetensors header, whatever its name."""
    with open(file.path, "rb") as opened:
        return opened.read(9)[8:] == b"{"


def comparison(file: TensorFile, other: TensorFile) -> dict[str, Any]:
    """What two files differ in; tensors are read one by one.

    Returns:
        "metadata": key -> [value here, value there]; "only_here", "only_there": keys of tensors; "shapes", "types": key ->
        [here, there]; "values": key -> ||here - there|| / ||here||; "relative_difference": the same over all shared tensors;
        "same_tensors": how many are equal bit for bit.
    """
    here, there = file.places, other.places
    shared = [key for key in here if key in there]
    shapes = {key: [list(here[key].shape), list(there[key].shape)] for key in shared if here[key].shape != there[key].shape}
    differences, total = _value_differences(file, other, [key for key in shared if key not in shapes])
    types = {key: [here[key].dtype, there[key].dtype] for key in shared if here[key].dtype != there[key].dtype}
    return {
        "metadata": {one.key: [one.before, one.after] for one in changes(file.metadata, other.metadata)},
        "only_here": [key for key in here if key not in there],
        "only_there": [key for key in there if key not in here],
        "shapes": shapes,
        "types": types,
        "values": differences,
        "relative_difference": total,
        "same_tensors": len(set(shared) - {*shapes, *types, *differences}),
    }


def _value_differences(file: TensorFile, other: TensorFile, keys: list[str]) -> tuple[dict[str, float], float]:
    import torch

    differences: dict[str, float] = {}
    squares = [0.0, 0.0]
    for key in keys:
        mine, theirs = file.read(key), other.read(key)
        if mine.dtype == theirs.dtype and torch.equal(_bytes(mine), _bytes(theirs)):
            squares[0] += mine.to(torch.float64).nan_to_num().square().sum().item()
            continue
        mine, theirs = mine.to(torch.float64), theirs.to(torch.float64)
        norm, gap = mine.norm().item(), (mine - theirs).norm().item()
        squares = [squares[0] + norm**2, squares[1] + gap**2]
        if gap:
            differences[key] = gap / norm if norm else float("inf")
    return differences, (squares[1] / squares[0]) ** 0.5 if squares[0] else 0.0


def _bytes(tensor: Tensor) -> Tensor:
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def comparison_lines(file: TensorFile, other: TensorFile, found: Mapping[str, Any]) -> Iterator[str]:
    """The readable form of `comparison`."""
    yield f"- {file_line(file)}"
    yield f"+ {file_line(other)}"
    if found["metadata"]:
        yield f"\nmetadata: {counted(len(found['metadata']), 'difference')}"
    for key, values in found["metadata"].items():
        yield f"  {key}"
        for sign, value in zip("-+", values, strict=True):
            yield from (f"    {sign} {line}" for line in (shown(key, value) if value is not None else ()))
    yield f"\ntensors: {found['same_tensors']} are the same"
    for name, what in {"only_here": "only in the first", "only_there": "only in the second"}.items():
        if found[name]:
            yield f"  {len(found[name])} {what}: {some_names(found[name], 5)}"
    for name in ("shapes", "types"):
        if found[name]:
            listed = [f"{key} ({pair[0]} and {pair[1]})" for key, pair in found[name].items()]
            yield f"  {len(listed)} of other {name}: {some_names(listed, 5)}"
    if found["values"]:
        furthest = sorted(found["values"].items(), key=lambda item: -item[1])
        listed = [f"{key} ({difference:.2e})" for key, difference in furthest]
        yield f"  {len(listed)} of other values, {found['relative_difference']:.2e} in all: {some_names(listed, 5)}"
