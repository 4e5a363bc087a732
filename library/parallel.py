"""Work on one layer or tensor after the other, several at a time, with few of them in memory."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Lock
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_cores(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The result for every item, in their order; about as many are worked on as torch has threads.

    Each works with one thread, which suits many small matrices better than all threads on each of them. Items are taken
    from their iterator by the caller's thread, and not many before their turn. The first exception ends it.

    Args:
        work: called on other threads, at once for several items, with gradients off.
        items: read lazily.
    """
    import torch

    threads = min(torch.get_num_threads(), os.cpu_count() or 1)
    source = iter(items)
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting: deque[Future[Result]] = deque(
            pool.submit(_without_gradients, work, item) for item in islice(source, threads + 1)
        )
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(_without_gradients, work, item) for item in islice(source, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use the caller's thread alone: over many small tensors, threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def ticks(progress: Callable[[int, int], object], total: int) -> Callable[[], None]:
    """A function for several threads to call when one of `total` items is done; it tells (done so far, total)."""
    done, lock = 0, Lock()

    def tick() -> None:
        nonlocal done
        with lock:
            done += 1
            progress(done, total)

    return tick


def _without_gradients(work: Callable[[Item], Result], item: Item) -> Result:
    import torch

    with torch.no_grad():
        return work(item)
