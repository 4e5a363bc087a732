"""Doing what a plan says, with as many processes as there are cores; what is up to date stays as it is."""

from __future__ import annotations

import filecmp
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from pathlib import Path

from library.checkpoints.atomic import atomic_write, tidy_when_ended
from library.dataset.images import BadImageError
from library.errors import UserError, counted
from library.resizing.folder import FolderPlan, ImageTask, ResizeOptions
from library.resizing.pictures import Original, Recipe, encode, make_picture, note_in, read_original

NOTE_VERSION = 1  # raised whenever the same recipe gives other pictures, so that a new run makes them anew
Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one image, or of all.

    Attributes:
        made, current: pictures written, and pictures that were up to date.
        full_size: pictures written that have their image's own size, because that is small enough.
        flattened: images whose transparency became white, since JPEG has none.
        copied, same: other files, likewise.
        problems: sentences about images that could not be done.
    """

    made: int = 0
    current: int = 0
    full_size: int = 0
    flattened: int = 0
    copied: int = 0
    same: int = 0
    problems: tuple[str, ...] = ()

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            **{name: getattr(self, name) + getattr(other, name) for name in (field.name for field in fields(self))}
        )


def resize_folder(plan: FolderPlan, target: Path, *, progress: Progress, processes: int | None = None) -> Outcome:
    """Make the pictures, copy the files.

    Args:
        target: made where it is missing.
        progress: counted in images and files to copy.
        processes: None for as many as there are cores.

    Raises:
        UserError: where nothing can be written. An image that cannot be read is a problem of the outcome.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder cannot be made ({error.strerror})", where=str(target)) from None
    total = len(plan.images) + len(plan.copies)
    outcome = Outcome()
    unreadable: set[Path] = set()
    for done, (task, result) in enumerate(_results(plan.images, processes or usable_cores()), start=1):
        outcome += result
        if result.problems and not result.made:
            unreadable |= {task.path, *(picture.with_suffix("") for picture, _ in task.pictures)}
        progress(done, total)
    for done, (source, copy) in enumerate(plan.copies, start=len(plan.images) + 1):
        if not {source, copy.with_suffix("")} & unreadable:
            outcome += copy_file(source, copy)
        progress(done, total)
    return replace(outcome, problems=tuple(sorted(outcome.problems)))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _results(tasks: Sequence[ImageTask], processes: int) -> Iterator[tuple[ImageTask, Outcome]]:
    """As they come; the pictures of one image are one process's work, since they share its decoding."""
    processes = min(processes, len(tasks))
    if processes == 1:
        yield from ((task, resize_image(task)) for task in tasks)
        return
    context = _process_context()
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_the_parent) as pool:
        waiting = {pool.submit(resize_image, task): task for task in tasks}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool:
            raise UserError("a process that scaled images was ended by the system", remedy="free some memory") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _process_context() -> multiprocessing.context.BaseContext:
    """Processes that start clean of our threads: from one that has the libraries loaded, where the system can do that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "cv2"])
    return context


def _end_with_the_parent() -> None:
    """Leave Ctrl-C to the parent, and end where that was ended: a pool's processes would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tidy_when_ended()
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def resize_image(task: ImageTask) -> Outcome:
    """Make those pictures of one image that are missing or out of date."""
    notes = {target: note_of(task.path, recipe) for target, recipe in task.pictures}
    wanted = [
        (target, recipe) for target, recipe in task.pictures if not target.is_file() or note_in(target) != notes[target]
    ]
    outcome = Outcome(current=len(task.pictures) - len(wanted))
    if not wanted:
        return outcome
    try:
        original = read_original(task.path, [recipe for _, recipe in wanted])
    except BadImageError as error:
        return outcome + Outcome(problems=(f"{task.path}: {error}",))
    outcome += Outcome(flattened=int(original.flattened))
    for target, recipe in wanted:
        outcome += _write_picture(task.path, original, target, recipe, notes[target])
    return outcome


def _write_picture(path: Path, original: Original, target: Path, recipe: Recipe, note: str) -> Outcome:
    try:
        picture = make_picture(original, recipe)
    except BadImageError as error:
        return Outcome(problems=(f"{path}: {error}",))
    content = encode(picture, recipe, original.profile, note)
    with atomic_write(target, size=len(content), durable=False) as file:
        file.write(content)
    return Outcome(made=1, full_size=int(recipe.scale(original.size) == 1))


def note_of(path: Path, recipe: Recipe) -> str:
    """What a picture says of itself: how it was made, and from which state of its image."""
    state = path.stat()
    return (
        f"resized {NOTE_VERSION}: {recipe.name}, {recipe.interpolation}, sides divisible by {recipe.divisible_by},"
        f" from {state.st_size} bytes of {state.st_mtime_ns}"
    )


def copy_file(source: Path, target: Path) -> Outcome:
    """Copy a file with its time, unless the copy is there: of the same size, and of the same time or content."""
    if _is_copied(source, target):
        return Outcome(same=1)
    state = source.stat()
    if not os.access(source, os.R_OK):
        return Outcome(problems=(f"{source}: no right to read it",))
    with atomic_write(target, size=state.st_size, durable=False) as file:
        shutil.copyfile(source, file.name)  # by name, so that the system copies without showing us the bytes
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))
    return Outcome(copied=1)


def _is_copied(source: Path, target: Path) -> bool:
    if not target.is_file():
        return False
    here, there = source.stat(), target.stat()
    if here.st_size != there.st_size:
        return False
    return here.st_mtime_ns == there.st_mtime_ns or filecmp.cmp(source, target, shallow=False)


def outcome_lines(plan: FolderPlan, options: ResizeOptions, outcome: Outcome) -> list[str]:
    """The report: what a user might not expect, and what was made."""
    names = ", ".join(recipe.name for recipe in options.recipes)
    counted_notes = {
        "folders in the source, which are not searched": plan.folders,
        "pictures of their image's own size, because it is small enough": outcome.full_size,
        "images put on white, because JPEG has no transparency (--save_as_png keeps it)": outcome.flattened,
    }
    return [f"{what}: {number}" for what, number in counted_notes.items() if number] + [
        f"{options.target}: {counted(len(plan.images), 'image')} at {names}; pictures: {outcome.made} made,"
        f" {outcome.current} up to date; files: {outcome.copied} copied, {outcome.same} up to date"
    ]
