"""Pictures beside those of the base model alone: the same request without adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.atomic import atomic_write
from library.errors import UserError
from library.generation.output import free_path
from library.generation.requests import ImageRequest
from library.prompts.tag_editing import without_adapters

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.generation.options import AdapterOptions, GenerationOptions
    from library.generation.planning import PlannedPicture

_ENDING = "_compared"


def of_the_base(request: ImageRequest, networks: int) -> ImageRequest:
    """The request without adapters; the same one where it has none.

    Args:
        networks: how many adapters the command line gives.
    """
    return replace(request, prompt=without_adapters(request.prompt), network_strengths=(0.0,) if networks else ())


def check_comparisons(pictures: Sequence[PlannedPicture], options: GenerationOptions) -> None:
    """Refuse what cannot be compared.

    Raises:
        UserError: no picture has an adapter, or adapters become part of the model.
    """
    adapters = options.adapters
    if adapters.merged:
        what = "adapters that are merged into the model cannot be taken away again"
        raise UserError(what, where="--compare_base", remedy="leave out --network_merge")
    if pictures and not Comparisons(pictures, adapters).bases:
        remedy = "give --network_weights, or <lora:FILE:1> in the prompt"
        raise UserError("no picture has an adapter", where="--compare_base", remedy=remedy)


class Comparisons:
    """Puts a batch of pictures beside the base's, each as soon as both are there.

    The base's picture is drawn once where several pictures have the same, and kept until the last of them is done.

    Pictures without adapters stand alone.

    Attributes:
        bases: requests to draw beside those of the pictures.
    """

    def __init__(self, pictures: Sequence[PlannedPicture], adapters: AdapterOptions) -> None:
        bases = [of_the_base(picture.request, len(adapters.networks)) for picture in pictures]
        self._wanted = {number: base for number, base in enumerate(bases) if base != pictures[number].request}
        self.bases = list(dict.fromkeys(self._wanted.values()))
        self._drawn: dict[ImageRequest, Image] = {}
        self._saved: dict[int, Path] = {}

    def picture_saved(self, number: int, path: Path) -> None:
        """A picture is there, under a path."""
        if number in self._wanted:
            self._saved[number] = path
            self._write_complete()

    def base_drawn(self, number: int, image: Image) -> None:
        """One of `bases` is there."""
        self._drawn[self.bases[number]] = image
        self._write_complete()

    def _write_complete(self) -> None:
        complete = [number for number in self._saved if self._wanted[number] in self._drawn]
        for number in complete:
            path, base = self._saved.pop(number), self._wanted.pop(number)
            write_comparison(path, self._drawn[base])
            if base not in self._wanted.values():
                del self._drawn[base]


def write_comparison(path: Path, base: Image) -> Path:
    """Write a saved picture beside the base's, in a file beside it."""
    from PIL import Image

    from library.generation.grid_sheet import labelled_row

    with Image.open(path) as picture:
        sheet = labelled_row([(base, "base model"), (picture.convert("RGB"), "with adapters")])
    target = free_path(path.with_stem(path.stem + _ENDING))
    with atomic_write(target) as file:
        sheet.save(file, format="PNG")
    return target
