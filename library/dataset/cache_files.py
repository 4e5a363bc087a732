"""Entries of caches on disk: safetensors files that say what they hold, are complete or not there, and tell when damaged."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from library.errors import UserError, raise_all

LEFTOVER_AGE = 3600  # seconds after which a half-written file belongs to nobody


class DamagedError(Exception):
    """An entry that cannot be used; the message ends a sentence."""


@dataclass(frozen=True)
class CacheKind:
    """What sentences say of a cache: `content` ("latents"), and `instead`, what to do without room for it on disk."""

    content: str
    instead: str


def prepare_folders(folders: Iterable[Path], kind: CacheKind) -> None:
    """Make the cache folders; half-written files of a run that was killed go away.

    Raises:
        UserError: folders that cannot be written, all at once.
    """
    problems = []
    for folder in sorted(set(folders)):
        try:
            folder.mkdir(exist_ok=True)
            for leftover in folder.glob(".*.part"):
                if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
                    leftover.unlink(missing_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            remedy = f"make it writable, or {kind.instead}"
            problems.append(UserError(f"{kind.content} cannot be written here", where=str(folder), remedy=remedy))
    raise_all(problems)


def read_entry(path: Path) -> tuple[bytes, dict[str, str]]:
    """The bytes of an entry and what it says of itself, its checksum compared.

    Raises:
        FileNotFoundError: there is none.
        DamagedError
    """
    data = path.read_bytes()
    try:
        facts, checksum = _facts_and_checksum(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError("are damaged") from error
    if facts.get("checksum") != checksum:
        raise DamagedError("are damaged")
    return data, facts


def tensors_of(path: Path, kind: CacheKind) -> dict[str, Tensor]:
    """The tensors of an entry that was valid when the cache was checked.

    Raises:
        FileNotFoundError: there is none.
        UserError: it was damaged since.
    """
    from safetensors.torch import load

    try:
        return load(read_entry(path)[0])
    except DamagedError as error:
        remedy = "delete it and start again: it will be rebuilt"
        raise UserError(f"the cached {kind.content} {error}", where=str(path), remedy=remedy) from None


def write_entry(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str], kind: CacheKind) -> None:
    """Write under another name and rename, so that no half entry is seen; what a power cut leaves fails the checksum.

    Raises:
        UserError: there is no room or no permission.
    """
    from safetensors.torch import save

    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _, checksum = _facts_and_checksum(save(own, dict(facts)))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(save(own, {**facts, "checksum": checksum}))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        remedy = f"make room, or {kind.instead}"
        raise UserError(f"{kind.content} cannot be written ({error.strerror})", where=str(path), remedy=remedy) from None


def _facts_and_checksum(data: bytes) -> tuple[dict[str, str], str]:
    """What a safetensors file says of itself, and the CRC-32 of all that is in it, its own line left out.

    The header is taken apart here (8 bytes length, then JSON), because a check of all entries need not make tensors.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    facts = dict(header["__metadata__"])
    header["__metadata__"] = {name: facts[name] for name in facts if name != "checksum"}
    checksum = zlib.crc32(memoryview(data)[start:], zlib.crc32(json.dumps(header, sort_keys=True).encode()))
    return facts, f"{checksum:08x}"
