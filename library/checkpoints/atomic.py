"""Files that appear whole or not at all: written beside their place, made durable, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from library.errors import UserError

_MARGIN = 1 << 20  # bytes that stay free: file systems need a little for themselves


def check_writable(path: Path, size: int = 0) -> None:
    """Refuse early what writing `size` bytes to `path` would run into: no folder, no right to write, no space.

    Raises:
        UserError: with the path and the reason.
    """
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist", where=str(path), remedy="create it, or name another one")
    if path.is_dir():
        raise UserError("is a folder", where=str(path), remedy="name a file in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"no right to write in {folder}", where=str(path))
    free = shutil.disk_usage(folder).free
    if free < size + _MARGIN:
        raise UserError(
            f"needs {size / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free on its disk",
            where=str(path),
            remedy="make room, or name another place",
        )


@contextlib.contextmanager
def atomic_write(path: Path | str, *, size: int = 0, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file, to write and to read, that takes `path`'s place when the block ends, and leaves no trace when it fails
    or is interrupted.

    Args:
        path: where the file will stand; a link keeps pointing where it does and its target is replaced.
        size: the bytes that will be written, as far as known.
        durable: wait until the disk has it. Without, a loss of power may undo it; for files that are easily made again.

    Raises:
        UserError: from `check_writable`, and for what the system refuses while writing (disk full, quota).
    """
    target = Path(os.path.realpath(path))
    check_writable(target, size)
    with unfinished(target) as temporary:
        try:
            with open(temporary, "x+b") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise UserError(f"could not be written ({error.strerror or error})", where=str(path)) from error
    if durable:
        _sync_folder(target.parent)


_unfinished: dict[Path, int] = {}  # place -> the process that fills it; one that is forked has no say


@contextlib.contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A free place beside `target`, for a file or a folder that is moved there when it is whole.

    What is still there at the end of the block, or when a signal ends the process (`tidy_when_ended`), is removed.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    _unfinished[temporary] = os.getpid()
    try:
        yield temporary
    finally:
        _remove(temporary)
        del _unfinished[temporary]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def tidy_when_ended() -> None:
    """From now on, a signal that ends this process (SIGTERM, its terminal closed) has its unfinished files removed first."""
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _tidy_and_end)


def _tidy_and_end(number: int, _frame: object) -> None:
    for path, process in list(_unfinished.items()):
        if process == os.getpid():
            with contextlib.suppress(OSError):
                _remove(path)
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems refuse; the file itself is safe
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
