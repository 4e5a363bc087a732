"""The weighted sum of whole models, tensor by tensor: each is read, summed, rounded once and written in its turn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.base_model import BaseModelFiles, open_base_model
from library.checkpoints.metadata import ModelDescription, modelspec_metadata
from library.checkpoints.model_writing import config_metadata, plan_single_file
from library.checkpoints.parts import PART_TITLES, SHOWN, UNET, ModelPart, same_up_to_ones
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_writing import PlannedTensor, with_progress, write_tensors
from library.errors import UserError, counted, raise_all, some_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

RECIPE_KEY = "merge_recipe"
_CHUNK = 1 << 16  # elements summed at a time: all that is computed on the way stays in the processor's cache


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """One merge.

    Attributes:
        models: files, diffusers folders, or ids at the Hub.
        ratios: a factor for each.
        target: the .safetensors file to write.
        unet_only: merge the U-Nets; the other parts are the first model's.
        device: where tensors are summed.
        precision: torch's name of the type they are summed in; "float32" rounds once only, at the end.
        saving_precision: torch's name of the type they are saved in.
    """

    models: tuple[str, ...]
    ratios: tuple[float, ...]
    target: Path
    unet_only: bool = False
    device: str = "cpu"
    precision: str = "float32"
    saving_precision: str = "float32"

    def merges(self, kind: str) -> bool:
        """Whether a part is merged."""
        return kind == UNET or not self.unet_only


@dataclass(frozen=True)
class TensorReport:
    """Of one tensor, sums of squares over its elements.

    Attributes:
        merged: of the sum.
        rounding: of the saved tensor less the sum as 32 bits give it.
        models: of each model's tensor; of the first alone in a part that is not merged.
        distances: of the saved tensor less that of each of them.
    """

    merged: float
    rounding: float
    models: tuple[float, ...]
    distances: tuple[float, ...]


def open_models(options: MergeOptions) -> list[BaseModelFiles]:
    """The models, known from their headers.

    Raises:
        UserError: what is wrong with any, or with all together: another family, prediction, or other tensors.
    """
    problems: list[UserError] = []
    models: list[BaseModelFiles] = []
    for path in options.models:
        try:
            models.append(open_base_model(path))
        except UserError as error:
            problems += error.problems
    raise_all(problems)
    for model in models[1:]:
        problems += _mismatches(models[0], model, [kind for kind in model.parts if options.merges(kind)])
    raise_all(problems)
    return models


def _mismatches(first: BaseModelFiles, model: BaseModelFiles, parts: Sequence[str]) -> list[UserError]:
    where = str(model.path)
    if model.family != first.family:
        return [UserError(f"is {model.family.title}, while {first.path} is {first.family.title}", where=where)]
    if model.resolved_prediction_type != first.resolved_prediction_type:
        what = f"predicts {model.resolved_prediction_type}, while {first.path} predicts {first.resolved_prediction_type}"
        return [UserError(what, where=where)]
    return [problem for kind in parts for problem in _part_mismatches(first.parts[kind], model.parts[kind])]


def _part_mismatches(first: ModelPart, part: ModelPart) -> list[UserError]:
    title = PART_TITLES[part.kind]
    missing = [name for name in first.sources if name not in part.sources]
    extra = [name for name in part.sources if name not in first.sources]
    found = []
    for names, what in ((missing, f"its {title} lacks"), (extra, f"its {title} has, unlike {first.where},")):
        if names:
            found.append(UserError(f"{what} {counted(len(names), 'tensor')}: {some_names(names, SHOWN)}", where=part.where))
    shapes = [
        f"{name} is {part.sources[name].shape} and not {source.shape}"
        for name, source in first.sources.items()
        if name in part.sources and not same_up_to_ones(part.sources[name].shape, source.shape)
    ]
    if shapes:
        what = f"its {title} has other shapes than that of {first.where}: {some_names(shapes, SHOWN)}"
        found.append(UserError(what, where=part.where))
    return found


class WeightedSum:
    """The change that turns the first model's tensors into the sum, for `plan_single_file`; it keeps what it did."""

    def __init__(self, models: Sequence[BaseModelFiles], options: MergeOptions) -> None:
        import torch

        self._models, self._options = models, options
        self._arithmetic: torch.dtype = getattr(torch, options.precision)
        self._saved: torch.dtype = getattr(torch, options.saving_precision)
        self.reports: dict[tuple[str, str], TensorReport] = {}

    def __call__(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """The tensor to save, in the type to save."""
        import torch

        if not tensor.is_floating_point():
            return tensor
        merges = self._options.merges(kind)
        others = [model.parts[kind].sources[name].read().flatten() for model in self._models[1:]] if merges else []
        ratios = self._options.ratios if merges else (1.0,)
        flat, saved = tensor.flatten(), torch.empty(tensor.numel(), dtype=self._saved)
        squares = [0.0] * (2 + 2 * len(ratios))
        for start in range(0, len(flat), _CHUNK):
            pieces = [self._moved(whole[start : start + _CHUNK], self._arithmetic) for whole in (flat, *others)]
            merged = _sum(pieces, ratios)
            saved[start : start + _CHUNK] = merged
            if merged.dtype != torch.float32:  # what another arithmetic loses is told too
                pieces = [self._moved(whole[start : start + _CHUNK], torch.float32) for whole in (flat, *others)]
            exact = merged if merged.dtype == torch.float32 else _sum(pieces, ratios)
            kept = saved[start : start + _CHUNK].to(exact.device, torch.float32)
            measured = (exact, kept - exact, *pieces, *(kept - piece for piece in pieces))
            squares = [total + _square(values) for total, values in zip(squares, measured, strict=True)]
        if not math.isfinite(sum(squares)) and not saved.isfinite().all():  # squares of large values may overflow
            raise self._not_finite(kind, name)
        merged_size, rounding, *rest = squares
        self.reports[kind, name] = TensorReport(
            merged=merged_size, rounding=rounding, models=tuple(rest[: len(ratios)]), distances=tuple(rest[len(ratios) :])
        )
        return saved.reshape(tensor.shape)

    def _moved(self, piece: Tensor, dtype: torch.dtype) -> Tensor:
        return piece.to(self._options.device, dtype)

    def _not_finite(self, kind: str, name: str) -> UserError:
        where = f"{name} of the {PART_TITLES[kind]}"
        models = self._models if self._options.merges(kind) else self._models[:1]
        faulty = [str(model.path) for model in models if not model.parts[kind].sources[name].read().float().isfinite().all()]
        if faulty:
            return UserError(f"has values that are not finite in {', '.join(faulty)}", where=where)
        types = f"--precision {self._options.precision} and --saving_precision {self._options.saving_precision}"
        remedy = "use bf16 or float, or smaller ratios"
        return UserError(f"the sum is larger than {types} hold", where=where, remedy=remedy)


def _sum(pieces: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    total = pieces[0] * ratios[0]
    for piece, ratio in zip(pieces[1:], ratios[1:], strict=True):
        total.add_(piece, alpha=ratio)
    return total


def _square(values: Tensor) -> float:
    """The sum of squares of a vector."""
    values = values.float()
    return float(values.dot(values))


def merge_models(models: Sequence[BaseModelFiles], options: MergeOptions, *, progress: Progress) -> WeightedSum:
    """Write the sum, compared with what was computed as it is written; the file is opened again.

    Args:
        models: as `open_models` gives them.
        progress: counted in tensors.

    Returns:
        The sum, with a report for each tensor.

    Raises:
        UserError: no right, no space, or a sum that cannot be saved; there is no file then, or the old one.
        RuntimeError: where what was written is not what was computed.
    """
    first, change = models[0], WeightedSum(models, options)
    planned = plan_single_file(first, dtype=options.saving_precision, change=change, from_headers=True)
    metadata = {
        **modelspec_metadata(
            first.family,
            first.resolved_prediction_type,
            ModelDescription(title=options.target.stem, merged_from=", ".join(model.name for model in models)),
            saved_at=datetime.now(),
        ),
        **config_metadata(first, planned),
        RECIPE_KEY: json.dumps(_recipe(models, options)),
    }
    write_tensors(options.target, with_progress(planned, progress), metadata, add_hashes=True)
    _check_written(options.target, first, planned)
    return change


def _recipe(models: Sequence[BaseModelFiles], options: MergeOptions) -> dict[str, object]:
    return {
        "models": [model.name for model in models],
        "ratios": list(options.ratios),
        "parts": [kind for kind in models[0].parts if options.merges(kind)],
        "precision": options.precision,
    }


def _check_written(target: Path, first: BaseModelFiles, planned: Mapping[str, PlannedTensor]) -> None:
    """The writer has compared the bytes; this tells whether they are read as the tensors that were meant."""
    file, model = open_tensor_file(target), open_base_model(target)
    found = {key: (place.shape, place.dtype) for key, place in file.places.items()}
    if found != {key: (tensor.shape, tensor.dtype) for key, tensor in planned.items()}:
        raise RuntimeError(f"{target}: the tensors are not those that were planned")
    if any(set(model.parts[kind].sources) != set(first.parts[kind].sources) for kind in first.family.parts):
        raise RuntimeError(f"{target}: the parts are not those of {first.path}")


def left_out(models: Sequence[BaseModelFiles]) -> dict[str, list[str]]:
    """Model -> tensors that belong to no part, of which only the first model's are kept."""
    return {str(model.path): [*model.beside, *model.unmatched] for model in models[1:] if model.beside or model.unmatched}
