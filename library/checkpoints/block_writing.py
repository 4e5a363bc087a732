"""Writing in large blocks, each of which is read back from the disk and compared.

Where the system allows it the blocks go past its page cache. A file of 2 GB there is memory that has to be found, filled
and written back, which can take several times longer than the disk does; and what is read back is then the disk's.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import BinaryIO

BLOCK = 1 << 22  # bytes
_SECTOR = 4096  # bytes; past the cache, places and lengths are multiples of it
_UNDERWAY = 2  # blocks on their way to the disk and back

Buffers = tuple[mmap.mmap, mmap.mmap]
"""What a block is collected in, and what it is read back into; their starts are what a disk wants."""


def write_and_compare(file: BinaryIO, chunks: Iterable[bytes | memoryview]) -> None:
    """Fill a file; while blocks are on their way, the next chunks are asked for.

    Args:
        file: new, open for reading and writing.
        chunks: its content, in pieces of any size.

    Raises:
        OSError: no space, or a disk that gives back something else than it got.
    """
    if not hasattr(os, "preadv"):
        file.writelines(chunks)
        return
    size, underway = 0, deque[Future[None]]()
    with _past_cache(file.fileno()), ThreadPoolExecutor(_UNDERWAY) as disk:
        for buffers, length in _blocks(chunks):
            underway.append(disk.submit(_write_block, file.fileno(), buffers, length, size))
            size += length
            if len(underway) > _UNDERWAY:
                underway.popleft().result()
        for block in underway:
            block.result()
    os.ftruncate(file.fileno(), size)


def _blocks(chunks: Iterable[bytes | memoryview]) -> Iterator[tuple[Buffers, int]]:
    """The chunks' bytes in blocks of full length, but for the last; each buffer is used again when its turn comes."""
    turns = cycle([(mmap.mmap(-1, BLOCK), mmap.mmap(-1, BLOCK)) for _ in range(_UNDERWAY + 1)])
    buffers, filled = next(turns), 0
    for chunk in chunks:
        done = 0
        while done < len(chunk):
            count = min(len(chunk) - done, BLOCK - filled)
            buffers[0][filled : filled + count] = chunk[done : done + count]
            done, filled = done + count, filled + count
            if filled == BLOCK:
                yield buffers, filled
                buffers, filled = next(turns), 0
    if filled:
        yield buffers, filled


def _write_block(descriptor: int, buffers: Buffers, length: int, start: int) -> None:
    """Write the first `length` bytes of a buffer to a place, and at most a sector more, and compare."""
    import numpy as np

    length = -(-length // _SECTOR) * _SECTOR
    given, found = (memoryview(buffer)[:length] for buffer in buffers)
    done = 0
    while done < length:
        done += os.pwrite(descriptor, given[done:], start + done)
    done = 0
    while done < length and (count := os.preadv(descriptor, [found[done:]], start + done)):
        done += count
    if done < length or not np.array_equal(np.frombuffer(given, np.uint64), np.frombuffer(found, np.uint64)):
        raise OSError(errno.EIO, "the disk gives back something else than it got")


@contextlib.contextmanager
def _past_cache(descriptor: int) -> Iterator[None]:
    """Write and read a new file without the system's page cache, where there is a way."""
    if not hasattr(os, "O_DIRECT"):
        yield
        return
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.pwrite(descriptor, mmap.mmap(-1, _SECTOR), 0)  # some file systems have no way, and some of them say so only here
    except OSError:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    try:
        yield
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
