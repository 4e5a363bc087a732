"""Reading tensor files: one face for .safetensors and for PyTorch's .ckpt, .pt and .bin.

Every format comes down to a table that says where in the file each tensor lies. A tensor is read when it is asked for, with
plain reads: a mapped file would count as memory of the process, page after page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError, near_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The format's own names (https://huggingface.co/docs/safetensors, "Format") in the order of its writer, and torch's.
SAFETENSORS_DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
ITEM_SIZES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e5m2": 1,
    "float8_e4m3fn": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "float64": 8,
    "int64": 8,
    "uint64": 8,
}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in its file.

    Attributes:
        dtype: torch's name without "torch.".
        shape: of the tensor.
        offset: of its first element in the file, in bytes.
        strides: in elements, for tensors that were saved as views; None for contiguous ones.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        if 0 in self.shape:
            return 0
        if self.strides is None:
            elements = math.prod(self.shape)
        else:
            elements = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return elements * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file: names, shapes and types from its header, values when asked for.

    Attributes:
        path: the file.
        places: key -> where the tensor lies.
        metadata: the texts of a safetensors header; empty for PyTorch's formats.
        counters: whole numbers beside the tensors of a PyTorch checkpoint ("epoch", "global_step").
    """

    path: Path
    places: Mapping[str, TensorPlace]
    metadata: dict[str, str] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)

    def keys(self) -> list[str]:
        return list(self.places)

    def __contains__(self, key: object) -> bool:
        return key in self.places

    def shape(self, key: str) -> tuple[int, ...]:
        return self.places[key].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: place.shape for key, place in self.places.items()}

    def dtype(self, key: str) -> torch.dtype:
        import torch

        return getattr(torch, self.places[key].dtype)

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, contiguous, in memory of its own."""
        import torch

        place = self.places[key]
        dtype = getattr(torch, place.dtype)
        if place.span == 0:
            return torch.empty(place.shape, dtype=dtype)
        raw = torch.empty(place.span, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(place.offset)
            _read_fully(file, raw.numpy().data, self.path)
        elements = raw.view(dtype)
        if place.strides is None:
            return elements.view(place.shape)
        return elements.as_strided(place.shape, place.strides).contiguous()


def _read_fully(file: Any, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise UserError("ended while it was read: it is truncated or was replaced", where=str(path))
        done += count


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
        from library.checkpoints.torch_pickle import read_torch_places

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
