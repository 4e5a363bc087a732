"""Reading PyTorch checkpoints without ever running what is in them.

A checkpoint is a pickle, and a pickle is a program that names functions to call. Here no name is ever looked up: tensors
become entries of a table, the few names that describe them are answered by this module's own objects, and every other
name by an inert stand-in that does nothing whatever is done to it. So old Lightning checkpoints, which carry callbacks
and configurations, read like any other. Names from Python's standard library that do things (`os.system`,
`builtins.eval`) have no business in a checkpoint: a file with one is refused by that name. Safety rests on the stand-ins,
not on that list.

Both formats of torch.save are read: the zip archive (torch 1.6 and later) and the sequence of pickles before it.
"""

from __future__ import annotations

import pickle
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from library.checkpoints.tensor_places import ITEM_SIZES, TensorFile, TensorPlace
from library.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
_LEGACY_PROTOCOL = 1001

_STORAGE_DTYPES: Mapping[str, str] = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}

# Harmless names of the standard library that real checkpoints carry.
_HARMLESS_MODULES = frozenset({"collections", "typing", "pathlib", "argparse", "datetime", "enum", "copyreg", "_codecs"})
_HARMLESS_BUILTINS = frozenset(
    ["object", "set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "complex", "str", "bytes", "bytearray"]
    + ["slice", "range", "getattr"]
)


class _CodeInside(Exception):
    """A name in the pickle that would run something."""


class _Unsupported(Exception):
    """A tensor of a kind that cannot be located (sparse, quantized, ...)."""


@dataclass(frozen=True)
class _Storage:
    """A stretch of numbers in the file, by the name the pickle gives it."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _SavedTensor:
    """A view on a storage: offset and strides in elements."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Named:
    """An answer to a name of torch's own that describes tensors; immutable, so that a pickle cannot alter it."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a pickle may not change this")


class _StorageType(_Named):
    __slots__ = ("dtype",)

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class _RebuildTensor(_Named):
    """Stands for torch._utils._rebuild_tensor and its later versions, whose first arguments are the same."""

    __slots__ = ()

    def __call__(self, storage: object, offset: int, shape: Any, strides: Any, *_rest: object) -> _SavedTensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        dtype = next((item.dtype for item in _rest if isinstance(item, _StorageType)), storage.dtype)
        return _SavedTensor(storage, dtype, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


class _RebuildParameter(_Named):
    """Stands for torch._utils._rebuild_parameter: its data are the tensor."""

    __slots__ = ()

    def __call__(self, data: object, *_rest: object) -> object:
        return data


class _Inert:
    """What every unknown name becomes: accepts construction, state, items and calls, and does nothing."""

    def __new__(cls, *_args: object, **_settings: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_settings: object) -> None:
        pass

    def __call__(self, *_args: object, **_settings: object) -> _Inert:
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass

    def add(self, value: object) -> None:
        pass


class _ParameterTable(_Inert):
    """Stands for torch.nn.ParameterDict, in which old textual inversion files keep their vectors."""

    def __init__(self, *_args: object, **_settings: object) -> None:
        self.tensors: dict[Any, Any] = {}

    def __setstate__(self, state: object) -> None:
        inner = state.get("_parameters") if isinstance(state, dict) else None
        self.tensors = inner if isinstance(inner, dict) else {}


class _TensorUnpickler(pickle.Unpickler):
    """Reads the structure of a checkpoint; see the module's docstring for what it answers to names."""

    def find_class(self, module: str, name: str) -> Any:
        # Old protocols spell the standard library as Python 2 did (`__builtin__`).
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module.split(".")[0] == "torch":
            known = _torch_name(module, name)
            if known is not None:
                return known
        if _does_things(module, name):
            raise _CodeInside(f"{module}.{name}")
        return type(name.rpartition(".")[2] or "Inert", (_Inert,), {})

    def persistent_load(self, saved_id: Any) -> Any:
        if not isinstance(saved_id, tuple) or len(saved_id) < 5 or saved_id[0] not in ("storage", b"storage"):
            raise pickle.UnpicklingError("an unknown kind of persistent entry")
        _, kind, key, _device, count = saved_id[:5]
        if not isinstance(kind, _StorageType):
            raise _Unsupported("a storage of unknown type")
        offset_in_root = saved_id[5] if len(saved_id) > 5 else None
        if offset_in_root is not None:
            raise _Unsupported("a storage that is a view of another one (torch before 0.4)")
        return _Storage(str(key), kind.dtype, int(count))


def _torch_name(module: str, name: str) -> Any | None:
    if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGE_DTYPES:
        return _StorageType(_STORAGE_DTYPES[name])
    if module == "torch" and name in ITEM_SIZES:
        return _StorageType(name)
    if module == "torch" and name == "Size":
        return tuple
    if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        return _RebuildTensor()
    if module in ("torch._utils", "torch.nn.parameter") and name in (
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "Parameter",
    ):
        return _RebuildParameter()
    if (module, name) == ("torch.nn.modules.container", "ParameterDict"):
        return _ParameterTable
    if module == "torch._utils" and name.startswith("_rebuild"):
        raise _Unsupported(f"a tensor saved through {name}")
    return None


def _does_things(module: str, name: str) -> bool:
    top = module.split(".")[0]
    if top == "builtins":
        return name not in _HARMLESS_BUILTINS
    if top in _HARMLESS_MODULES:
        return False
    return top in sys.stdlib_module_names


def read_torch_places(path: Path) -> TensorFile:
    """The tensors of a file written by torch.save; those under "state_dict" where the file has one.

    Those of a textual inversion file are under "string_to_param", and their keys begin with it (`string_to_param.*`).

    Raises:
        UserError: for a file with code inside, damaged, truncated, or without tensors.
    """
    where = str(path)
    try:
        content, starts = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except _CodeInside as error:
        raise UserError(
            f"contains code ({error}) and was not loaded; nothing was run",
            where=where,
            remedy="don't trust its source; use a .safetensors file",
        ) from None
    except _Unsupported as error:
        raise UserError(
            f"holds {error}, which cannot be read", where=where, remedy="save it again as .safetensors"
        ) from None
    except UserError:
        raise
    except Exception as error:  # whatever bytes of others make the unpickler raise means the same: damaged
        raise UserError(
            f"is damaged, truncated or no PyTorch checkpoint ({type(error).__name__}: {error})",
            where=where,
            remedy="fetch or save it again",
        ) from None
    return _as_tensor_file(path, content, starts)


def _as_tensor_file(path: Path, content: object, starts: Mapping[str, int]) -> TensorFile:
    where = str(path)
    tensors = _table_of(content)
    if tensors is None:
        raise UserError("holds no table of tensors (a state dict)", where=where)
    size = path.stat().st_size
    places = {str(key): _place(value, starts, size, path) for key, value in _tensors_of(tensors)}
    if not places:
        raise UserError("holds no tensors", where=where)
    outer = content if isinstance(content, dict) else {}
    counters = {str(key): value for key, value in outer.items() if type(value) is int}
    return TensorFile(path=path, places=places, counters=counters)


def _table_of(content: object) -> dict[Any, Any] | None:
    """The table that holds the tensors; None where there is none."""
    if not isinstance(content, dict):
        return None
    vectors = content.get("string_to_param")
    vectors = vectors.tensors if isinstance(vectors, _ParameterTable) else vectors
    if isinstance(vectors, dict):
        return {f"string_to_param.{key}": value for key, value in vectors.items()}
    inner = content.get("state_dict")
    return inner if isinstance(inner, dict) else content


def _tensors_of(table: dict[Any, Any]) -> Iterator[tuple[Any, _SavedTensor]]:
    return ((key, value) for key, value in table.items() if isinstance(value, _SavedTensor))


def _place(tensor: _SavedTensor, starts: Mapping[str, int], size: int, path: Path) -> TensorPlace:
    item = ITEM_SIZES[tensor.dtype]
    start = starts.get(tensor.storage.key, size)
    contiguous = tensor.strides == _contiguous_strides(tensor.shape)
    place = TensorPlace(
        dtype=tensor.dtype,
        shape=tensor.shape,
        offset=start + tensor.offset * item,
        strides=None if contiguous else tensor.strides,
    )
    storage_bytes = tensor.storage.count * ITEM_SIZES[tensor.storage.dtype]
    negative = min((tensor.offset, *tensor.shape, *tensor.strides)) < 0
    outside = tensor.offset * item + place.span > storage_bytes
    if negative or outside or place.offset + place.span > size:
        raise UserError("is truncated or damaged: a tensor reaches past its data", where=str(path))
    return place


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)


def _read_zip(path: Path) -> tuple[object, dict[str, int]]:
    """The pickle of a zip archive, and where each storage's bytes begin in the file."""
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        if "data.pkl" not in names:
            raise UserError("is a zip archive, but no PyTorch checkpoint", where=str(path))
        if "constants.pkl" in names:
            raise UserError("is a TorchScript program, not a checkpoint", where=str(path))
        if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
            raise UserError("was saved on a big-endian machine", where=str(path), remedy="save it again as .safetensors")
        with archive.open(names["data.pkl"]) as file:
            content = _TensorUnpickler(file, encoding="utf-8").load()  # type: ignore[arg-type]
        with open(path, "rb") as raw:
            starts = {
                inner[len("data/") :]: _data_start(raw, archive.getinfo(name), path)
                for inner, name in names.items()
                if inner.startswith("data/")
            }
    return content, starts


def _data_start(file: BinaryIO, entry: zipfile.ZipInfo, path: Path) -> int:
    """Where an entry's bytes begin: behind its local header, whose name and padding have lengths of their own."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise UserError("is a compressed archive, which torch.save does not write", where=str(path))
    file.seek(entry.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name_length + extra_length


def _read_legacy(path: Path) -> tuple[object, dict[str, int]]:
    """The pickles of the older format: magic number, version, machine, content, storage keys; then each storage's bytes."""
    with open(path, "rb") as file:
        magic = _TensorUnpickler(file, encoding="utf-8").load()
        if magic != _LEGACY_MAGIC:
            # A plain pickle: what it would do was already read and refused; it holds no tensors.
            raise UserError("is a pickle, but no PyTorch checkpoint", where=str(path))
        if _TensorUnpickler(file, encoding="utf-8").load() != _LEGACY_PROTOCOL:
            raise UserError("is of an unknown version of PyTorch's format", where=str(path))
        machine = _TensorUnpickler(file, encoding="utf-8").load()
        if isinstance(machine, dict) and machine.get("little_endian") is False:
            raise UserError("was saved on a big-endian machine", where=str(path), remedy="save it again as .safetensors")
        reader = _RecordingUnpickler(file, encoding="utf-8")
        content = reader.load()
        keys = _TensorUnpickler(file, encoding="utf-8").load()
        position = file.tell()
    starts: dict[str, int] = {}
    for key in map(str, keys):
        storage = reader.storages[key]
        starts[key] = position + 8  # the count of elements comes first
        position += 8 + storage.count * ITEM_SIZES[storage.dtype]
    return content, starts


class _RecordingUnpickler(_TensorUnpickler):
    """Keeps the storages it meets: their lengths say where the next one begins."""

    def __init__(self, file: BinaryIO, **settings: Any) -> None:
        super().__init__(file, **settings)
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, saved_id: Any) -> Any:
        storage = super().persistent_load(saved_id)
        self.storages[storage.key] = storage
        return storage
