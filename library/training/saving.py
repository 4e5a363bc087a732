"""Files of a run: their names, their retention, and the proof that what was written is what was meant."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.families.family import ModelFamily
from library.training.options import SavingOptions


def epoch_file(options: SavingOptions, epoch: int) -> str:
    """Name of the file saved after an epoch, counted from 1."""
    return f"{options.output_name or 'epoch'}-{epoch:06d}.{options.format}"


def step_file(options: SavingOptions, step: int) -> str:
    """Name of the file saved after an optimizer step, counted from 1."""
    return f"{options.output_name or 'at'}-step{step:08d}.{options.format}"


def final_file(options: SavingOptions) -> str:
    """Name of the file saved at the end."""
    return f"{options.output_name or 'last'}.{options.format}"


def epochs_between_saves(options: SavingOptions, total_epochs: int) -> int | None:
    """Every how many epochs a file is saved; `epoch_ratio` asks for about that many files in all."""
    if options.epoch_ratio:
        return max(1, total_epochs // options.epoch_ratio)
    return options.every_n_epochs


def check_output_folder(options: SavingOptions, needed_bytes: int) -> None:
    """Find out before training whether the result can be written.

    Raises:
        UserError: the folder cannot be made, is a file, or has no right or no room to write.
    """
    import shutil

    folder = options.output_dir
    where = f"--output_dir {folder}"
    make_writable_folder(folder, where)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        sizes = f"{free / 2**20:.0f} MiB are free and one file needs about {needed_bytes / 2**20:.0f} MiB"
        raise UserError(f"has no room: {sizes}", where=where, remedy="make room or name another folder")


def make_writable_folder(folder: Path, where: str) -> None:
    """Make a folder if it is missing, and try whether files can be written in it.

    Raises:
        UserError: it cannot be made, is a file, or has no right to write.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise UserError("is a file, not a folder", where=where, remedy="name another folder") from None
    except OSError as error:
        raise UserError(f"cannot be written to ({error.strerror})", where=where, remedy="name another folder") from None


class SavingFailed(UserError):
    """A file could not be written, which says nothing about the weights: the run may go on and try again."""


@dataclass
class RunFiles:
    """Writes the files of one run.

    Attributes:
        network: a network module's network; its `save_weights` writes.
        metadata_at: metadata of a file saved after (step, epochs), all strings.
        dtype: number format of saved weights, a torch dtype; None keeps the network's.
        total_epochs: epochs of the whole run.
        family: of the base model, whose readers are asked about each file.
    """

    options: SavingOptions
    network: Any
    metadata_at: Callable[[int, int], Mapping[str, str]]
    dtype: Any
    total_epochs: int
    family: ModelFamily
    written: list[Path] = field(default_factory=list)
    readers_said: str = ""

    def due(self, step: int, epoch_ended: int | None, total_steps: int) -> bool:
        """Whether a file is written after `step` steps, which ended that epoch; the final file is not counted."""
        every_epochs = epochs_between_saves(self.options, self.total_epochs)
        epoch_due = bool(
            every_epochs and epoch_ended and epoch_ended % every_epochs == 0 and epoch_ended < self.total_epochs
        )
        every = self.options.every_n_steps
        return epoch_due or bool(every and step % every == 0 and step < total_steps)

    def save_epoch(self, epoch: int, step: int) -> Path | None:
        """Save after an epoch if it is its turn, and remove the file that is too old; the last epoch has its own file."""
        every = epochs_between_saves(self.options, self.total_epochs)
        if not every or epoch % every or epoch >= self.total_epochs:
            return None
        path = self._save(epoch_file(self.options, epoch), step, epoch)
        if self.options.last_n_epochs:
            self._remove(epoch_file(self.options, epoch - every * self.options.last_n_epochs))
        return path

    def save_step(self, step: int, epochs: int, total_steps: int) -> Path | None:
        """Save after an optimizer step if it is its turn, and remove the file that is too old."""
        every = self.options.every_n_steps
        if not every or step % every or step >= total_steps:
            return None
        path = self._save(step_file(self.options, step), step, epochs)
        if self.options.last_n_steps:
            oldest_kept = step - self.options.last_n_steps
            self._remove(step_file(self.options, (oldest_kept - 1) // every * every))
        return path

    def save_interrupted(self, step: int, epochs: int) -> Path:
        """Save what an interrupted run has reached, under the name of its step."""
        return self._save_somewhere(step_file(self.options, step), step, epochs)

    def save_final(self, step: int, epochs: int) -> Path:
        """Save the result."""
        return self._save_somewhere(final_file(self.options), step, epochs)

    def news_of_readers(self, path: Path) -> str | None:
        """Which programs read a saved file rightly and what the others make of it; None where that was said already."""
        from library.checkpoints.tensor_files import open_tensor_file
        from networks.formats.readers import readers_sentence, readings
        from networks.formats.traits import read_header

        sentence = readers_sentence(readings(read_header(open_tensor_file(path), self.family)))
        if sentence == self.readers_said:
            return None
        self.readers_said = sentence
        return sentence

    def _save_somewhere(self, name: str, step: int, epochs: int) -> Path:
        """Save what nothing will save again; in the system's temporary folder where the output folder fails.

        Raises:
            SavingFailed: naming the file that was saved instead, if that worked.
        """
        try:
            return self._save(name, step, epochs)
        except SavingFailed as error:
            try:
                spare = self._save(name, step, epochs, folder=Path(tempfile.mkdtemp(prefix="trained_")))
            except (UserError, OSError):
                raise error from None
            remedy = f"what was trained is saved as {spare} instead: move it to a folder that is kept"
            raise SavingFailed(error.what, where=error.where, remedy=remedy) from error

    def _save(self, name: str, step: int, epochs: int, *, folder: Path | None = None) -> Path:
        tensors = tensors_to_save(self.network)
        require_finite(tensors, name)
        path = (folder or self.options.output_dir) / name
        metadata = None if self.options.format != "safetensors" else dict(self.metadata_at(step, epochs))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # it may be gone since the run began
            self.network.save_weights(str(path), self.dtype, metadata)
            verify_saved(path, tensors, self.dtype)
        except UserError as error:
            raise SavingFailed(error.what, where=error.where, remedy=error.remedy) from error
        except OSError as error:
            raise SavingFailed(f"could not be written ({error.strerror or error})", where=str(path)) from error
        self.written.append(path)
        return path

    def _remove(self, name: str) -> None:
        path = self.options.output_dir / name
        if path in self.written:
            path.unlink(missing_ok=True)
            self.written.remove(path)


def tensors_to_save(network: Any) -> Mapping[str, Any]:
    """What a file of the network should hold; a third-party module's `state_dict` is the nearest thing to it."""
    tensors: Mapping[str, Any] = network.file_tensors() if hasattr(network, "file_tensors") else network.state_dict()
    return tensors


def require_finite(state: Mapping[str, Any], name: str) -> None:
    """Refuse to save weights that are not numbers; what was saved before stays the last good file.

    Raises:
        UserError: naming the first tensor at fault.
    """
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(
                f"is not written, since {key} holds values that are not finite",
                where=name,
                remedy="lower the learning rate, or use --mixed_precision bf16 or no; files saved before are good",
            )


def verify_saved(path: Path, state: Mapping[str, Any], dtype: Any) -> None:
    """Re-open a written file and compare it with the network it came from, bit for bit.

    Tensors are compared where file and network name them alike; a third-party module may name or shape its own differently,
    and is then held to finite values only.

    Raises:
        UserError: the file is not what was meant; it stays for inspection.
    """
    from library.checkpoints.tensor_files import open_tensor_file

    file = open_tensor_file(path)
    keys = file.keys()
    if not keys:
        raise UserError("was written without a single tensor", where=str(path))
    for key in keys:
        saved = file.read(key)
        meant = state.get(key)
        same = meant is None or meant.shape != saved.shape or _is_rounded(saved, meant.detach().cpu(), dtype or meant.dtype)
        if not same or (saved.is_floating_point() and not bool(saved.isfinite().all())):
            remedy = "the disk or --save_precision may be at fault; save again elsewhere or in another precision"
            raise UserError(f"differs from what was trained at {key}", where=str(path), remedy=remedy)


def _is_rounded(saved: Any, meant: Any, dtype: Any) -> bool:
    """Whether a saved tensor is the one that was meant in the asked number format, or in its own (see `save_tensors`)."""
    return saved.dtype in (dtype, meant.dtype) and bool((saved == meant.to(saved.dtype)).all())
