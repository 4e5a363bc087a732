"""Writing tensor files: whole or not at all, one tensor at a time, compared with what the disk got, with the hashes that
other programs look for.

The safetensors layout follows that library's own writer (types from wide to narrow, then names), so that the hash of the
data section is the same whoever writes the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.atomic import atomic_write
from library.checkpoints.block_writing import write_and_compare
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_places import ITEM_SIZES, SAFETENSORS_DTYPES
from library.errors import UserError
from library.parallel import over_cores, ticks

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {torch_name: name for name, torch_name in SAFETENSORS_DTYPES.items()}
_TYPE_ORDER = {torch_name: place for place, torch_name in enumerate(SAFETENSORS_DTYPES.values())}
LEGACY_WINDOW = (0x100000, 0x10000)
"""Start and length, in bytes, of what the old short hash looks at."""


TensorLayout = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is made only when its turn to be written comes, on another thread: `make` must return exactly this shape
    and type.

    Attributes:
        dtype: torch's name without "torch.".
    """

    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def with_progress(planned: Mapping[str, PlannedTensor], progress: Callable[[int, int], object]) -> dict[str, PlannedTensor]:
    """The same tensors, which tell (made so far, in all) as they are made."""
    tick = ticks(progress, len(planned))

    def counting(tensor: PlannedTensor) -> PlannedTensor:
        def make() -> Tensor:
            made = tensor.make()
            tick()
            return made

        return replace(tensor, make=make)

    return {key: counting(tensor) for key, tensor in planned.items()}


def write_tensors(
    path: Path | str,
    tensors: Mapping[str, Tensor | PlannedTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    add_hashes: bool = False,
) -> None:
    """Write a tensor file; a file of that name is replaced only when the new one is complete.

    `.ckpt`, `.pt`, `.pth` and `.bin` get PyTorch's format, which holds no metadata; every other name gets safetensors.

    Args:
        path: where to.
        tensors: on any device; planned ones are made when their turn comes, a few at once on other threads.
        metadata: texts for the header.
        add_hashes: add `sshs_model_hash` and `sshs_legacy_hash`, as adapter files carry them.

    Raises:
        UserError: no folder, no right, no space.
    """
    planned = {key: _planned(tensor) for key, tensor in tensors.items()}
    if Path(path).suffix in (".ckpt", ".pt", ".pth", ".bin"):
        write_torch_file(path, planned)
        return
    _write_safetensors(Path(path), planned, dict(metadata or {}), add_hashes)


def _planned(tensor: Tensor | PlannedTensor) -> PlannedTensor:
    if isinstance(tensor, PlannedTensor):
        return tensor
    return PlannedTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor)


def write_torch_file(
    path: Path | str, planned: Mapping[str, PlannedTensor], counters: Mapping[str, int] | None = None
) -> None:
    """PyTorch's own format: the tensors alone, or with `counters` the shape of an original checkpoint, `state_dict` and all.

    torch.save wants every tensor at hand, so here (and only here) the whole file is in memory at once.
    """
    import torch

    made = over_cores(lambda tensor: tensor.make().detach().cpu(), planned.values())
    state = dict(zip(planned, made, strict=True))
    content = state if counters is None else {"state_dict": state, **counters}
    with atomic_write(path, size=sum(tensor.size for tensor in planned.values())) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's, when it ends a file that the system refused to go on with
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    written = open_tensor_file(path)
    if not all(_same_bytes(written.read(key), tensor) for key, tensor in state.items()):
        raise UserError("differs from what was meant", where=str(path), remedy="the disk may be at fault; save elsewhere")


def _same_bytes(tensor: Tensor, other: Tensor) -> bool:
    import torch

    first, second = (each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, other))
    return torch.equal(first, second)


def _write_safetensors(path: Path, planned: dict[str, PlannedTensor], metadata: dict[str, str], add_hashes: bool) -> None:
    ordered = sorted(planned.items(), key=lambda item: (-_TYPE_ORDER[item[1].dtype], item[0].encode()))
    hashes = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8} if add_hashes else {}
    layout = [(key, tensor.dtype, tensor.shape) for key, tensor in ordered]
    header = safetensors_header(layout, {**metadata, **hashes})
    hasher = SectionHasher.for_file(layout, metadata)

    def content() -> Iterator[bytes | memoryview]:
        yield header
        for chunk in over_cores(_bytes_of, ordered):
            if add_hashes:
                hasher.update(chunk)
            yield chunk

    with atomic_write(path, size=len(header) + sum(tensor.size for _, tensor in ordered)) as file:
        write_and_compare(file, content())
        if add_hashes:
            file.seek(0)
            file.write(safetensors_header(layout, {**metadata, **hasher.hashes()}))


class SectionHasher:
    """Both hashes of an adapter file from its data section, fed in order and in pieces of any size.

    Args:
        header_length: bytes before the data section (8 for the length included), which shift the short hash's window.
    """

    def __init__(self, header_length: int) -> None:
        start, length = LEGACY_WINDOW
        self._window = (max(start - header_length, 0), start + length - header_length)
        self._whole, self._part = hashlib.sha256(), hashlib.sha256()
        self._position = 0

    @classmethod
    def for_file(cls, layout: list[TensorLayout], metadata: Mapping[str, str]) -> SectionHasher:
        """For a file of these tensors: the short hash is defined on it as it would be with its ss_* entries alone."""
        kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
        return cls(len(safetensors_header(layout, kept)))

    def update(self, chunk: memoryview | bytes) -> None:
        begin, end = (min(max(edge - self._position, 0), len(chunk)) for edge in self._window)
        self._part.update(chunk[begin:end])
        self._whole.update(chunk)
        self._position += len(chunk)

    def hashes(self) -> dict[str, str]:
        return {"sshs_model_hash": self._whole.hexdigest(), "sshs_legacy_hash": self._part.hexdigest()[:8]}


def safetensors_header(layout: list[TensorLayout], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON as the safetensors library writes them: compact, UTF-8, padded to a multiple of 8.

    Args:
        layout: (key, type, shape) in the order of the data.
        metadata: texts by key.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, dtype, shape in layout:
        end = offset + math.prod(shape) * ITEM_SIZES[dtype]
        entries[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(item: tuple[str, PlannedTensor]) -> memoryview:
    import torch

    key, planned = item
    tensor = planned.make().detach().cpu().contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) != planned.shape or dtype != planned.dtype:
        raise ValueError(f"{key} was planned as {planned.dtype} {planned.shape}, but made as {dtype} {tuple(tensor.shape)}")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def data_section(path: Path) -> Iterator[bytes]:
    """The bytes of a safetensors file behind its header, in pieces."""
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(1 << 20):
            yield chunk
