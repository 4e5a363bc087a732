"""Images that are there more than once: each copy is trained on as if it were another picture, which is seldom meant."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

READERS = 8
UNCOMPRESSED = (".bmp",)  # equal sizes say nothing about these, and reading them all would take long


def duplicate_images(paths: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Groups of files with the same content; a path that comes twice counts once. Only files of equal size are read."""
    by_size: dict[int, list[Path]] = {}
    for path in dict.fromkeys(paths):
        if path.suffix.lower() not in UNCOMPRESSED:
            by_size.setdefault(os.path.getsize(path), []).append(path)
    suspects = [path for group in by_size.values() if len(group) > 1 for path in group]
    by_content: dict[bytes, list[Path]] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for path, digest in zip(suspects, pool.map(_digest, suspects), strict=True):
            by_content.setdefault(digest, []).append(path)
    return [tuple(group) for group in by_content.values() if len(group) > 1]


def _digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
