"""Adapters merged into a base model: W + sum of ratio * delta(W), tensor by tensor on its way from one file to the other.

Every change is computed from the original weight, in 32 bits, and rounded once, when it is saved.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoints.atomic import check_writable, unfinished
from library.checkpoints.base_model import BaseModelFiles, open_base_model
from library.checkpoints.metadata import ModelDescription, modelspec_metadata
from library.checkpoints.model_writing import config_metadata, counters_of, plan_single_file, write_folder
from library.checkpoints.parts import PART_TITLES
from library.checkpoints.tensor_writing import with_progress, write_tensors, write_torch_file
from library.errors import UserError, counted
from library.families.family import ModelFamily
from library.parallel import ticks
from networks.core.adapter import Adapter
from networks.formats.base_weights import BaseWeights
from networks.formats.file_adapters import adapter_of_layer
from networks.tools.layer_errors import shares_by_block
from networks.tools.merge_sources import MergeInput, Source, known_layers, open_sources
from networks.tools.plotting import Bars, Panel
from networks.tools.reports import ToolReport

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

RECIPE_KEY = "merge_recipe"
_PYTORCH = (".ckpt", ".pt", ".pth", ".bin")
_CHUNK = 1 << 16  # elements at a time: all that is computed on the way stays in the processor's cache


@dataclass(frozen=True, kw_only=True)
class CheckpointMerge:
    """What is asked for.

    Attributes:
        base: checkpoint, diffusers folder or Hub id.
        inputs: the adapters.
        target: a file of the original layout, by its suffix; a diffusers folder where it has none.
        arithmetic: torch's name of the type in which weights and changes are added.
        saved: torch's name of the type to save in; None for each tensor's own.
        v2: whether the user says that all is SD2.
        family: name of the only one whose models and adapters are taken; None takes all.
        allow_unmatched: go on without layers that the base has not.
        with_metadata: write ModelSpec's fields.
    """

    base: str
    inputs: tuple[MergeInput, ...]
    target: Path
    arithmetic: str = "float32"
    saved: str | None = None
    v2: bool = False
    family: str | None = None
    allow_unmatched: bool = False
    with_metadata: bool = True


@dataclass(frozen=True)
class Altered:
    """Of one tensor, sums of squares over its elements.

    Attributes:
        layer: by our name.
        base: of what it was.
        change: of what was to be added.
        lost: of what rounding kept from it, the sum's less the saved tensor's.
    """

    layer: str
    base: float
    change: float
    lost: float


@dataclass
class CheckpointReport:
    """What was done.

    Attributes:
        altered: (part, tensor) -> what happened to it.
        skipped: file -> its layers that have no place in the base.
        layers: that have one.
    """

    altered: dict[tuple[str, str], Altered] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)


class MergedWeights:
    """The change that adds the adapters to a model's tensors, for `plan_single_file` and `write_folder`.

    It keeps what it did, and the names of the tensors that it gave.
    """

    def __init__(self, base: BaseWeights, sources: Sequence[Source], options: CheckpointMerge) -> None:
        self._base, self._sources = base, sources
        self._arithmetic: torch.dtype = getattr(torch, options.arithmetic)
        self._saved: torch.dtype | None = getattr(torch, options.saved) if options.saved else None
        layers, skipped = known_layers(
            sources,
            base.model.family,
            allow_unmatched=options.allow_unmatched,
            has_layer=lambda name: base.place(name, "weight"),
        )
        self.report = CheckpointReport(skipped=skipped, layers=layers)
        self._layers = {
            place: (name, tensor)
            for name in layers
            for tensor in ("weight", "bias")
            if (place := base.place(name, tensor)) is not None
        }
        self.given: set[tuple[str, str]] = set()

    @torch.no_grad()
    def __call__(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """The tensor to save, in the type to save."""
        found = self._layers.get((kind, name))
        saved = self._saved if self._saved is not None and tensor.is_floating_point() else tensor.dtype
        change = None if found is None else self._change(*found, tensor)
        if found is None or change is None:
            result = self._finite(tensor.to(saved), tensor, name)
        else:
            result = self._sum(tensor, change, saved, (kind, name), found[0])
        self.given.add((kind, name))
        return result

    def _change(self, layer: str, which: str, tensor: Tensor) -> Tensor | None:
        """The sum of all adapters' changes of a tensor, fp32 of its size; None where there is none."""
        total: Tensor | None = None
        for source in self._sources:
            factor = source.factor(layer)
            if factor == 0 or layer not in source.layers:
                continue
            adapter = self._adapter(source, layer)
            if which == "weight":
                change: Tensor | None = adapter.delta_weight(tensor.reshape(adapter.spec.weight_shape))
            else:
                change = adapter.delta_bias()
            if change is None:
                continue
            change = change.float() if factor == 1 else change.float() * factor
            total = change if total is None else total.add_(change)
        return total

    def _adapter(self, source: Source, layer: str) -> Adapter:
        try:
            return adapter_of_layer(layer, source.read(layer), self._base.spec(layer))
        except ValueError as error:
            raise UserError(f"{layer}: {error}", where=source.where) from None

    def _sum(self, tensor: Tensor, change: Tensor, saved: torch.dtype, place: tuple[str, str], layer: str) -> Tensor:
        before, added = tensor.flatten(), change.flatten()
        result = torch.empty(before.shape, dtype=saved)
        squares = [0.0, 0.0, 0.0]
        for start in range(0, len(before), _CHUNK):
            piece, more = before[start : start + _CHUNK].float(), added[start : start + _CHUNK]
            result[start : start + _CHUNK] = piece.to(self._arithmetic) + more.to(self._arithmetic)
            kept = result[start : start + _CHUNK].float()
            measured = (piece, more, (piece + more).sub_(kept))
            squares = [total + float(values.dot(values)) for total, values in zip(squares, measured, strict=True)]
        if not math.isfinite(sum(squares)):
            self._finite(result, tensor, place[1])
        self.report.altered[place] = Altered(layer, *squares)
        return result.reshape(tensor.shape)

    def _finite(self, result: Tensor, tensor: Tensor, name: str) -> Tensor:
        """The result; a tensor that was finite has to stay so.

        Raises:
            UserError
        """
        if result is tensor:
            return result
        if bool(result.float().isfinite().all()) or not bool(tensor.float().isfinite().all()):
            return result
        dtype = str(result.dtype).removeprefix("torch.")
        raise UserError(
            f"{name} is larger than {dtype} holds", where="--save_precision", remedy="use bf16 or float, or smaller ratios"
        )


def merge_into_checkpoint(options: CheckpointMerge, *, progress: Progress) -> ToolReport:
    """Write the merged model, compared with what was computed as it is written; it is opened again.

    Args:
        options: what is asked for.
        progress: counted in tensors.

    Raises:
        UserError: what does not fit together, before anything is written; or a place that cannot be written to.
        RuntimeError: what was written is not what was computed.
    """
    is_folder = options.target.suffix == ""
    _check_target(options, is_folder)
    model = open_base_model(options.base, v2=options.v2 or None, family=options.family)
    sources = open_sources(options.inputs, v2=options.v2, default=model.family)
    if model.family != sources[0].family:
        what = f"is {model.family.title}, and {sources[0].where} is for {sources[0].family.title}"
        raise UserError(what, where=str(model.path), remedy="merge adapters into a model of the kind they were trained on")
    change = MergedWeights(BaseWeights(model), sources, options)
    if is_folder:
        _write_folder(model, change, options, progress)
    else:
        _write_file(model, change, sources, options, progress)
    _check_written(options.target, change)
    report = change.report
    return ToolReport(
        lines=_lines(report, sources, model, options),
        content=lambda: _content(report, options),
        panels=lambda: _panels(report, model.family),
    )


def _check_target(options: CheckpointMerge, is_folder: bool) -> None:
    target = options.target
    if not is_folder:
        check_writable(target)
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("exists already", where=f"--save_to {target}", remedy="remove it, or name another folder")


def _metadata(model: BaseModelFiles, sources: Sequence[Source], options: CheckpointMerge) -> dict[str, str]:
    recipe = {
        "base": model.name,
        "models": [source.given.path.stem for source in sources],
        "unet_ratios": [source.given.denoiser_ratio for source in sources],
        "te_ratios": [source.given.text_encoder_ratio for source in sources],
        "block_weights": [source.given.block_weights for source in sources],
    }
    described: dict[str, str] = {}
    if options.with_metadata:
        names = ", ".join([model.name, *(source.given.path.stem for source in sources)])
        description = ModelDescription(title=options.target.stem, merged_from=names)
        described = modelspec_metadata(model.family, model.resolved_prediction_type, description, saved_at=datetime.now())
    return {**described, RECIPE_KEY: json.dumps(recipe)}


def _write_file(
    model: BaseModelFiles,
    change: MergedWeights,
    sources: Sequence[Source],
    options: CheckpointMerge,
    progress: Progress,
) -> None:
    planned = plan_single_file(model, dtype=options.saved, change=change, from_headers=True)
    written = with_progress(planned, progress)
    if options.target.suffix in _PYTORCH:
        write_torch_file(options.target, written, counters_of(model))
    else:
        metadata = {**_metadata(model, sources, options), **config_metadata(model, planned)}
        write_tensors(options.target, written, metadata)


def _write_folder(model: BaseModelFiles, change: MergedWeights, options: CheckpointMerge, progress: Progress) -> None:
    """Write beside the place, and move there when all is done."""
    target = options.target
    tick = ticks(progress, sum(len(part.sources) for part in model.parts.values()))

    def counting(kind: str, name: str, tensor: Tensor) -> Tensor:
        made = change(kind, name, tensor)
        tick()
        return made

    with unfinished(target) as temporary:
        try:
            write_folder(model, temporary, dtype=options.saved, change=counting)
            os.replace(temporary, target)
        except UserError as error:
            where = error.where and error.where.replace(str(temporary), str(target))
            raise UserError(error.what, where=where, remedy=error.remedy) from None
        except OSError as error:
            raise UserError(f"could not be written ({error.strerror or error})", where=str(target)) from error


def _check_written(target: Path, change: MergedWeights) -> None:
    """The writer has compared the bytes; this tells whether they are read as the tensors that were meant."""
    written = open_base_model(target)
    found = {(kind, name) for kind, part in written.parts.items() for name in part.sources}
    if found != change.given:
        raise RuntimeError(f"{target}: its tensors are not those that were meant ({sorted(found ^ change.given)[:3]})")


def _lines(
    report: CheckpointReport, sources: Sequence[Source], model: BaseModelFiles, options: CheckpointMerge
) -> list[str]:
    """What was done to each part, how large it was and how much of it rounding lost; a last line about the file."""
    parts = [kind for kind in model.parts if kind in model.family.adapter_prefixes]
    wide = 2 + max(len(PART_TITLES[kind]) for kind in parts)
    lines = [f"{'part':{wide}}{'layers':>8}{'tensors':>9}{'change / weights':>18}{'lost by rounding':>18}"]
    groups = {PART_TITLES[kind]: [each for (part, _), each in report.altered.items() if part == kind] for kind in parts}
    for title, altered in {**groups, "total": list(report.altered.values())}.items():
        layers = len({each.layer for each in altered})
        change = math.sqrt(sum(each.change for each in altered))
        size = math.sqrt(sum(each.base for each in altered))
        lost = math.sqrt(sum(each.lost for each in altered))
        shares = f"{change / size if size else 0:18.2e}{lost / change if change else 0:18.1e}"
        lines.append(f"{title:{wide}}{layers:8}{len(altered):9}{shares}")
    for where, names in report.skipped.items():
        lines.append(f"{where}: {counted(len(names), 'layer')} left out ({', '.join(names)})")
    lines += model.notes()
    terms = " + ".join(f"{_ratio(source)} * {source.given.path.stem}" for source in sources)
    lines.append(f"{options.target}: {model.family.title}, {model.name} + {terms}; opened again and compared")
    return lines


def _content(report: CheckpointReport, options: CheckpointMerge) -> dict[str, object]:
    tensors = {
        f"{kind}.{name}": {
            "layer": each.layer,
            "norm": math.sqrt(each.base),
            "change": math.sqrt(each.change),
            "lost_by_rounding": math.sqrt(each.lost),
        }
        for (kind, name), each in sorted(report.altered.items())
    }
    models = [str(given.path) for given in options.inputs]
    return {
        "save_to": str(options.target),
        "sd_model": options.base,
        "models": models,
        "tensors": tensors,
        "skipped": report.skipped,
    }


def _panels(report: CheckpointReport, family: ModelFamily) -> list[Panel]:
    """By block, the size of the change beside the weights, and what of it rounding lost."""
    columns = ("base", "change", "lost")
    sums = {each.layer: dict.fromkeys(columns, 0.0) for each in report.altered.values()}
    for each in report.altered.values():
        for column in columns:
            sums[each.layer][column] += getattr(each, column)

    def shares(part: str, whole: str) -> dict[str, float]:
        norms = {layer: (math.sqrt(found[part]), math.sqrt(found[whole])) for layer, found in sums.items()}
        return shares_by_block(norms, family)

    return [
        Bars(title="size of the change of each block", series={"change / weights": shares("change", "base")}),
        Bars(title="what rounding lost of the change", series={"lost / change": shares("lost", "change")}),
    ]


def _ratio(source: Source) -> str:
    unet, text = source.given.denoiser_ratio, source.given.text_encoder_ratio
    shown = f"{unet:g}" if unet == text else f"(U-Net {unet:g}, text encoder {text:g})"
    return shown if source.given.block_weights is None else f"{shown} by blocks"
