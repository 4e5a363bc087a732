"""Where tensors lie in a file: the table that every format comes down to.

A tensor is read when it is asked for, with plain reads: a mapped file would count as memory of the process, page after page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError

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
