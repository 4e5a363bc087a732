"""Metadata files of fine-tuning datasets: JSON or JSONL, and which image each of their keys means.

    {"<key>": {"caption": "...", "tags": "...", "image_size": [w, h]}}          one object
    {"image_path": "<key>", "caption": "...", "tags": "..."}                    one object a line (.jsonl)

A key is an absolute path, a path relative to image_dir, or either of them without its extension, as the helper
scripts of the ecosystem write it. `image_size` and `train_resolution` are not used: sizes come from the images themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError, raise_all
from library.text_files import read_json, read_text


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """One image as the file describes it."""

    key: str
    caption: str
    tags: str


def read_metadata(path: Path) -> list[MetadataEntry]:
    """All entries, in the order of the file.

    Raises:
        UserError: not JSON, or entries that are not as they should be; all at once.
    """
    pairs = _json_lines(path) if path.suffix.lower() == ".jsonl" else _json_object(path)
    problems: list[UserError] = []
    entries = []
    for place, key, value in pairs:
        faults = _faults(key, value)
        problems.extend(UserError(fault, where=f"{path}: {place}") for fault in faults)
        if not faults:
            entries.append(MetadataEntry(key, value.get("caption") or "", value.get("tags") or ""))
    raise_all(problems)
    return entries


class ImageFinder:
    """Finds the file that a key means; every folder is listed once.

    Args:
        image_dir: what relative keys start from; None for the folder of the metadata file.
        extensions: of image files, lower case.
    """

    def __init__(self, image_dir: Path, extensions: Iterable[str]) -> None:
        self.image_dir = image_dir
        self.extensions = tuple(extensions)
        self._folders: dict[str, tuple[set[str], dict[str, list[str]]]] = {}

    def find(self, key: str) -> Path:
        """The image of a key.

        Raises:
            LookupError: none, or several; the message says which.
        """
        named = self.image_dir / (key if os.sep == "\\" else key.replace("\\", "/"))
        names, by_stem = self._listing(str(named.parent))
        if named.name in names:
            return named
        matches = by_stem.get(named.name, [])
        if len(matches) > 1:
            raise LookupError(f"may be any of {', '.join(matches)}; write the extension")
        if not matches:
            raise LookupError(f"is not in {named.parent}")
        return named.with_name(matches[0])

    def _listing(self, folder: str) -> tuple[set[str], dict[str, list[str]]]:
        """All file names of a folder, and the images among them by stem."""
        if folder not in self._folders:
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                names = []
            by_stem: dict[str, list[str]] = {}
            for name in names:
                stem, extension = os.path.splitext(name)
                if extension.lower() in self.extensions:
                    by_stem.setdefault(stem, []).append(name)
            self._folders[folder] = set(names), by_stem
        return self._folders[folder]


def _json_object(path: Path) -> list[tuple[str, Any, Any]]:
    """(place, key, value) of a .json file."""
    content = read_json(path, where=str(path))
    if not isinstance(content, dict):
        raise UserError("should be one JSON object with an entry for each image", where=str(path))
    return [(f"entry {key!r}", key, value) for key, value in content.items()]


def _json_lines(path: Path) -> list[tuple[str, Any, Any]]:
    """(place, key, value) of a .jsonl file."""
    problems, pairs = [], []
    for number, line in enumerate(read_text(path, where=str(path)).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(UserError(f"is not valid JSON: {error.msg}", where=f"{path}: line {number}"))
            continue
        pairs.append((f"line {number}", value.get("image_path") if isinstance(value, dict) else None, value))
    raise_all(problems)
    return pairs


def _faults(key: Any, value: Any) -> list[str]:
    """What is wrong with one entry."""
    if not isinstance(value, dict):
        return ["should be an object with caption or tags"]
    faults = [] if isinstance(key, str) and key else ["'image_path' is missing"]
    for name in ("caption", "tags"):
        if value.get(name) is not None and not isinstance(value[name], str):
            faults.append(f"{name} should be text")
    return faults
