"""Adapter files by name: the folder `--lora_dir`, and what `<lora:name>` may call the files in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from library.checkpoints.tensor_files import open_tensor_file
from library.errors import UserError, near_names, some_names
from library.generation.lora_listing import ShelfEntry, read_entry
from library.prompts.lora_tags import SUFFIXES

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_FEW = 20  # names that a sentence may list in full
_READERS = 8  # threads that read headers: they wait for the disk

Result = TypeVar("Result")


@dataclass(frozen=True)
class ShelfFile:
    """A file below the folder.

    Attributes:
        path: of the file with the tensors.
        place: its path below the folder.
        adapter: the same without what belongs to no name: the suffix, and the file in a folder that PEFT wrote.
    """

    path: Path
    place: PurePosixPath
    adapter: PurePosixPath

    def names(self) -> tuple[set[str], ...]:
        """What it may be called: first what only one file can be, and last what only stands in for another name."""
        stem = self.adapter.name
        return {str(self.place)}, {str(self.adapter), stem, self.place.name}, {stem.replace(".", "_")}


class LoraShelf:
    """The adapter files below a folder, links followed, names with a dot in front left out.

    A folder that PEFT wrote (adapter_config.json beside adapter_model) is one file by the folder's name. Headers are read
    only where names of files do not suffice.

    Args:
        folder: `--lora_dir`; None for paths alone.

    Raises:
        UserError: no such folder.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "no such folder"
            raise UserError(what, where=f"--lora_dir {folder}", remedy="give the folder with the adapter files")
        self._folder = folder
        self._output_names: dict[Path, str] = {}
        self._rescan()

    def _rescan(self) -> None:
        self.files = tuple(sorted(_files_below(self._folder), key=lambda file: str(file.place))) if self._folder else ()
        self._by_name: tuple[dict[str, list[ShelfFile]], ...] = ({}, {}, {})
        for file in self.files:
            for known, names in zip(self._by_name, file.names(), strict=True):
                for name in names:
                    known.setdefault(name, []).append(file)

    def find(self, name: str, *, where: str) -> Path:
        """The file of a name, by the first of these that fits: its path below the folder ("/" on every system), the same
        without suffix or its name alone, its stem with "_" for ".", any existing path, its `ss_output_name`.

        Raises:
            UserError: no such file, with near names; several of one name, with the paths to write instead.
        """
        found = self._by_file_name(name, where) or _existing(Path(name))
        if found is None and self._folder is not None:
            self._rescan()  # files may have come since
            found = self._by_file_name(name, where) or self._by_output_name(name, where)
        if found is None:
            raise self._unknown(name, where)
        return found

    def entries(self) -> list[ShelfEntry]:
        """What is known of every file from its header, in the order of their paths."""
        return list(_in_threads(lambda file: read_entry(file.path, self.name_of(file)), self.files))

    def name_of(self, file: ShelfFile) -> str:
        """The shortest name of a file that is no other one's."""
        names = (file.adapter.name, str(file.adapter))
        return next((name for name in names if self._by_name[1].get(name) == [file]), str(file.place))

    def _by_file_name(self, name: str, where: str) -> Path | None:
        found = next((known[name] for known in self._by_name if name in known), [])
        return self._only(found, f"{name!r} is the name", where)

    def _by_output_name(self, name: str, where: str) -> Path | None:
        unread = [file for file in self.files if file.path not in self._output_names]
        self._output_names |= dict(_in_threads(lambda file: (file.path, _output_name(file.path)), unread))
        found = [file for file in self.files if self._output_names[file.path] == name]
        return self._only(found, f"{name!r} is the ss_output_name", where)

    @staticmethod
    def _only(found: list[ShelfFile], what: str, where: str) -> Path | None:
        if len(found) > 1:
            what += f" of {some_names([str(file.place) for file in found], _FEW)}"
            raise UserError(what, where=where, remedy="write the path below --lora_dir with its suffix")
        return found[0].path if found else None

    def _unknown(self, name: str, where: str) -> UserError:
        if self._folder is None:
            remedy = "give the path of a file, or with --lora_dir the folder in which names are looked up"
            return UserError(f"there is no adapter {name!r}", where=where, remedy=remedy)
        if not self.files:
            what = f"there is no adapter {name!r}: --lora_dir {self._folder} holds no {', '.join(SUFFIXES)} files"
            return UserError(what, where=where, remedy="name the folder with the adapter files")
        known = {str(file.adapter) for file in self.files} | {file.adapter.name for file in self.files}
        remedy = near_names(name, known | set(filter(None, self._output_names.values())))
        if not remedy.startswith("did you mean") and len(self.files) > _FEW:
            remedy = f"--list_loras shows the {len(self.files)} files"
        return UserError(f"there is no adapter {name!r} in --lora_dir {self._folder}", where=where, remedy=remedy)


def _files_below(folder: Path) -> Iterator[ShelfFile]:
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real in seen:  # a link to a folder above
            continue
        seen.add(real)
        below = PurePosixPath(Path(root).relative_to(folder).as_posix())
        weights = peft_weights(Path(root))
        if weights is not None:
            adapter = below if below.name else PurePosixPath(folder.resolve().name)
            yield ShelfFile(weights, below / weights.name, adapter)
            continue
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield ShelfFile(Path(root, name), below / name, (below / name).with_suffix(""))


def peft_weights(folder: Path) -> Path | None:
    """The file with the tensors in a folder that PEFT wrote; None for any other folder."""
    if not (folder / PEFT_CONFIG).is_file():
        return None
    return next((folder / name for name in PEFT_WEIGHTS if (folder / name).is_file()), None)


def _existing(path: Path) -> Path | None:
    """A file, or the one with the tensors in a folder of PEFT's."""
    if os.path.isfile(path):  # unlike Path.is_file, not an error for what cannot be a path at all
        return path
    return peft_weights(path) if os.path.isdir(path) else None


def _output_name(path: Path) -> str:
    """The `ss_output_name` of a file; empty where it has none, or cannot be read."""
    try:
        return open_tensor_file(path).metadata.get("ss_output_name", "")
    except UserError:
        return ""


def _in_threads(work: Callable[[ShelfFile], Result], files: Iterable[ShelfFile]) -> Iterator[Result]:
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(work, files)
