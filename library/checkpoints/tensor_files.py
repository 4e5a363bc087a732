"""Opening tensor files: one face for .safetensors and for PyTorch's .ckpt, .pt and .bin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.checkpoints.tensor_places import SAFETENSORS_DTYPES, TensorFile, TensorPlace
from library.checkpoints.torch_pickle import read_torch_places
from library.errors import UserError, near_names

_MAX_HEADER = 100_000_000  # bytes; the format's own limit


def open_tensor_file(path: Path | str) -> TensorFile:
    """Read the header of a tensor file. What the file is shows in its first bytes; its suffix does not matter.

    Raises:
        UserError: missing, empty, truncated, no tensor file, or one with code inside.
    """
    path = Path(path)
    where = str(path)
    if path.is_dir():
        raise UserError("is a folder, not a file", where=where)
    if not path.is_file():
        raise UserError("no such file", where=where, remedy=nearby_files(path))
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=where) from None
    if not head:
        raise UserError("is empty", where=where, remedy="fetch or save it again")
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:9] != b"{"):
        return read_torch_places(path)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        return _open_safetensors(path)
    raise UserError(_what_else(head), where=where, remedy="give a .safetensors, .ckpt, .pt or .bin file")


def nearby_files(path: Path) -> str | None:
    """The remedy for a path that does not exist: names in its folder that come near."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    near = near_names(path.name, names) if names else ""
    return near if near.startswith("did you mean") else None


def _what_else(head: bytes) -> str:
    """What a file is that holds no tensors, from its first bytes."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not a tensor file (the download went wrong)"
    if head.startswith(b"GGUF"):
        return "is a GGUF file, which cannot be trained"
    try:
        head[: len(head) // 4 * 4].decode("ascii")
    except UnicodeDecodeError:
        return "is not a tensor file"
    return "is a text file, not a tensor file"


def _open_safetensors(path: Path) -> TensorFile:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header_bytes = file.read(length)
    if len(header_bytes) < length:
        raise _truncated(path, 8 + length, size)
    try:
        header = json.loads(header_bytes)
        metadata = header.pop("__metadata__", None) or {}
        places = {key: _place(entry, 8 + length) for key, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"has a damaged safetensors header ({error})", where=str(path)) from None
    _check_ends(path, places, size)
    return TensorFile(path=path, places=places, metadata={key: str(value) for key, value in metadata.items()})


def _place(entry: dict[str, Any], data_start: int) -> TensorPlace:
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"unknown type {entry['dtype']!r}")
    begin, end = entry["data_offsets"]
    place = TensorPlace(dtype=dtype, shape=tuple(int(n) for n in entry["shape"]), offset=data_start + begin)
    if begin < 0 or min(place.shape, default=0) < 0 or end - begin != place.span:
        raise ValueError(f"a tensor of shape {place.shape} in {end - begin} bytes")
    return place


def _check_ends(path: Path, places: Mapping[str, TensorPlace], size: int) -> None:
    end = max((place.offset + place.span for place in places.values()), default=0)
    if end > size:
        raise _truncated(path, end, size)


def _truncated(path: Path, needed: int, size: int) -> UserError:
    return UserError(
        f"is truncated: {size:,} bytes, but its header promises {needed:,}",
        where=str(path),
        remedy="fetch or save it again",
    )
