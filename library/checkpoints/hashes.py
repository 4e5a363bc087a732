"""Hashes by which programs know a model, and a memory for those that take long to compute."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from library.checkpoints.atomic import atomic_write
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_writing import LEGACY_WINDOW, SectionHasher, data_section
from library.errors import UserError

_KEPT = 500  # remembered entries; the oldest go first


def legacy_model_hash(path: Path | str) -> str:
    """The old 8-digit hash of web UIs: SHA-256 of 64 KiB at 1 MiB. "NOFILE" and "IsADirectory" as sd-scripts says them."""
    path = Path(path)
    if path.is_dir():
        return "IsADirectory"
    if not path.is_file():
        return "NOFILE"
    start, length = LEGACY_WINDOW
    with open(path, "rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(length)).hexdigest()[:8]


def sha256_of_file(path: Path | str) -> str:
    """SHA-256 of a whole file in hex, computed once per state of the file."""
    path = Path(path)
    if path.is_dir():
        return "IsADirectory"
    if not path.is_file():
        return "NOFILE"

    def compute() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered("sha256", [path], compute)


def sshs_hashes(path: Path | str) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a safetensors file, streamed.

    Both depend on the tensors and, the second, on the length of the ss_* entries; other metadata may be edited freely.

    Raises:
        UserError: for a file that is no safetensors file.
    """
    file = open_tensor_file(path)
    layout = [(key, place.dtype, place.shape) for key, place in sorted(file.places.items(), key=lambda item: item[1].offset)]
    hasher = SectionHasher.for_file(layout, file.metadata)
    for chunk in data_section(file.path):
        hasher.update(chunk)
    return hasher.hashes()


def _memory_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "lora-toolkit" / "hashes.json"


def _state_of(files: Iterable[Path]) -> list[list[str | int]]:
    states: list[list[str | int]] = []
    for file in files:
        state = file.stat()
        states.append([os.path.realpath(file), state.st_size, state.st_mtime_ns])
    return states


def remembered(purpose: str, files: Iterable[Path], compute: Callable[[], str]) -> str:
    """A value that depends on the content of files: computed once for each state (path, size, time) of them.

    The memory is a convenience: where it cannot be read or written, the value is computed.
    """
    key = json.dumps([purpose, *_state_of(files)])
    memory = _read_memory()
    if key in memory:
        return memory[key]
    value = compute()
    memory = {**_read_memory(), key: value}
    with contextlib.suppress(OSError, UserError):
        path = _memory_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(dict(list(memory.items())[-_KEPT:])).encode())
    return value


def _read_memory() -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(_memory_file().read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return {key: value for key, value in content.items() if isinstance(value, str)}
    return {}
