"""Several adapters as one file: the sum of their changes, exact or at a given rank, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoints.atomic import check_writable
from library.checkpoints.metadata import ModelDescription, modelspec_metadata, read_modelspec
from library.checkpoints.tensor_files import open_tensor_file
from library.errors import UserError, counted, raise_all, some_names
from library.families.family import EPSILON
from library.parallel import one_thread, over_cores
from networks.formats.base_weights import BaseWeights
from networks.formats.file_adapters import default_lines
from networks.formats.files import save_tensors
from networks.formats.readers import readers_sentence, readings
from networks.formats.traits import read_header
from networks.tools.conversion import DOWN, LayerError, LayerTensors, SourceLayer, with_one_alpha
from networks.tools.dense_merging import Method
from networks.tools.file_conversion import flat, prove, rounded
from networks.tools.layer_errors import (
    SPECTRUM,
    Kept,
    approximation_panels,
    layers_content,
    relative_error,
    spectrum,
    table_of_parts,
)
from networks.tools.merge_sources import MergeInput, Source, known_layers, open_sources
from networks.tools.merged_changes import (
    Arithmetic,
    Change,
    RankLimit,
    Term,
    shuffled,
    tensors_of,
    wanted_change,
    written_change,
)
from networks.tools.reports import ToolReport

Progress = Callable[[int, int], None]
"""Called with (done, total)."""
SHOWN = 3  # layers that a sentence names


@dataclass(frozen=True, kw_only=True)
class AdapterMerge:
    """What is asked for.

    Attributes:
        inputs: the adapters.
        target: the file to write.
        base: the model that they were trained on; None where it was not given.
        limit: of the ranks; None for the exact sum.
        method: what is done instead of the sum; None for the sum.
        shuffle: permute the ranks of each layer.
        arithmetic: torch's name of the type in which factors and differences are multiplied by ratios and added.
        saved: torch's name of the type to save in; None for the widest that each layer has in the files.
        v2: whether the user says that all is for SD2.
        family: name of the only one whose adapters are taken; None takes all.
        device: where to compute.
        allow_unmatched: go on without layers that the family's models have not.
        with_metadata: write ModelSpec's fields.
    """

    inputs: tuple[MergeInput, ...]
    target: Path
    base: str | None = None
    limit: RankLimit | None = None
    method: Method | None = None
    shuffle: bool = False
    arithmetic: str = "float32"
    saved: str | None = None
    v2: bool = False
    family: str | None = None
    device: str = "cpu"
    allow_unmatched: bool = False
    with_metadata: bool = True


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What was made of one layer; a change of the weight's size does not outlive it.

    Attributes:
        dtype: to round its tensors to.
        norm: of the change that was wanted.
        cut: of what of that `meant` leaves out. What rounding moves is nearly orthogonal to it.
        meant: what the rounded tensors are measured against; None where they are rounded, and `cut` is all that is lost.
        values: singular values of the change that was wanted, as far as they were looked for; None where `meant` has all.
    """

    dtype: torch.dtype
    norm: float
    cut: float
    meant: Change | None
    values: Tensor | None = None

    def spectrum(self) -> list[float]:
        """The largest singular values of the change that was wanted."""
        if self.values is not None:
            return [float(value) for value in self.values[:SPECTRUM]]
        assert self.meant is not None
        assert self.meant.product is not None
        return spectrum(*self.meant.product)


@dataclass
class AdapterReport:
    """What was done.

    Attributes:
        merged: layer -> what was made of it.
        layers: layer -> what the file holds of it.
        skipped: file -> its layers that have no place.
        empty: layers of which nothing is left, because their ratios are 0.
    """

    merged: dict[str, Merged] = field(default_factory=dict)
    layers: dict[str, Kept] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)

    @cached_property
    def spectra(self) -> dict[str, list[float]]:
        """Layer of LoRA -> the largest singular values of the change that was wanted."""
        names = [name for name, kept in self.layers.items() if kept.rank]
        return dict(zip(names, over_cores(lambda name: self.merged[name].spectrum(), names), strict=True))


@torch.no_grad()
def merge_adapters(options: AdapterMerge, *, progress: Progress) -> ToolReport:
    """Write the merged adapter; it is opened again and compared with what was computed.

    Args:
        options: what is asked for.
        progress: counted in layers.

    Raises:
        UserError: what does not fit together, before anything is written; or a place that cannot be written to.
    """
    target = options.target
    check_writable(target)
    base = BaseWeights.open(options.base, family=options.family)
    default = base.model.family if base else None
    sources = open_sources(options.inputs, v2=options.v2, default=default, family=options.family)
    family = sources[0].family
    if base is not None:
        base.check_family(family, f"--base {options.base}")
    report = AdapterReport()
    names, report.skipped = known_layers(sources, family, allow_unmatched=options.allow_unmatched)
    layers = _rounded_layers(_merge_layers(names, sources, base, options, report, progress), options, report)
    _measure(layers, report)
    tensors = flat(layers)
    with one_thread():
        save_tensors(target, tensors, None, _metadata(sources, layers, options))
        prove(target, tensors, layers, family)
    notes = [] if base else [line for source in sources for line in default_lines(source.file, family)]
    return ToolReport(
        lines=[
            *table_of_parts(report.layers, family),
            *_skipped_lines(report),
            *notes,
            _last_line(options, sources),
        ],
        content=lambda: _content(report, options),
        panels=lambda: approximation_panels(report.layers, report.spectra, family),
    )


def _measure(layers: Mapping[str, LayerTensors], report: AdapterReport) -> None:
    def lost(name: str) -> float:
        layer = report.merged[name]
        if layer.meant is None:
            return layer.cut
        return math.hypot(layer.cut, layer.meant.distance(written_change(layers[name], layer.meant.spec)))

    for name, value in zip(layers, over_cores(lost, layers), strict=True):
        rank = len(layers[name][DOWN]) if DOWN in layers[name] else 0
        report.layers[name] = Kept(rank=rank, lost=value, had=report.merged[name].norm)


def _merge_layers(
    names: Sequence[str],
    sources: Sequence[Source],
    base: BaseWeights | None,
    options: AdapterMerge,
    report: AdapterReport,
    progress: Progress,
) -> dict[str, LayerTensors]:
    """Put what is made of each layer into the report.

    Returns:
        Layer -> its tensors as they are to be saved, not rounded yet.

    Raises:
        UserError: layers that depend on a base model that was not given, or do not fit together.
    """
    how = Arithmetic(method=options.method, dtype=getattr(torch, options.arithmetic), device=options.device)
    problems: dict[str, list[LayerError]] = {}

    layers: dict[str, LayerTensors] = {}

    def work(name: str) -> tuple[LayerTensors, Merged] | LayerError | None:
        try:
            terms, dtype = _terms(name, sources, base, options)
            return _merged(wanted_change(terms, how), options.limit, dtype) if terms else None
        except LayerError as error:
            return error

    for done, (name, made) in enumerate(zip(names, over_cores(work, names), strict=True), start=1):
        if isinstance(made, LayerError):
            problems.setdefault(f"{made.what}; {made.remedy}" if made.remedy else made.what, []).append(made)
        elif made is None:
            report.empty.append(name)
        else:
            layers[name], report.merged[name] = made
        progress(done, len(names))
    raise_all([_of_layers(errors) for errors in problems.values()])
    return layers


def _merged(change: Change, limit: RankLimit | None, dtype: torch.dtype) -> tuple[LayerTensors, Merged]:
    (on_device, values), norm = tensors_of(change, limit), change.norm()
    tensors, change = {key: value.cpu() for key, value in on_device.items()}, change.cpu()
    if change.product is not None:
        return tensors, Merged(dtype=dtype, norm=norm, cut=0.0, meant=change, values=values)
    if DOWN not in tensors:
        tensors = {key: rounded(value, dtype) for key, value in tensors.items()}
        cut = change.distance(written_change(tensors, change.spec))
        return tensors, Merged(dtype=dtype, norm=norm, cut=cut, meant=None)
    meant = written_change(tensors, change.spec)
    return tensors, Merged(dtype=dtype, norm=norm, cut=change.distance(meant), meant=meant, values=values)


def _rounded_layers(
    merged: Mapping[str, LayerTensors], options: AdapterMerge, report: AdapterReport
) -> dict[str, LayerTensors]:
    """Layer -> its tensors as the file holds them.

    Raises:
        UserError: there is none.
    """
    if not merged:
        raise UserError("nothing is left to write", where="--ratios", remedy="give ratios that are not all 0")
    layers = {name: shuffled(name, tensors) if options.shuffle else tensors for name, tensors in merged.items()}
    with one_thread():
        return {
            name: {key: rounded(each, report.merged[name].dtype) for key, each in own.items()}
            for name, own in with_one_alpha(layers).items()
        }


def _of_layers(errors: Sequence[LayerError]) -> UserError:
    """One sentence about the same mistake of several layers."""
    names = [error.where or "" for error in errors]
    return UserError(
        errors[0].what, where=f"{counted(len(names), 'layer')} ({some_names(names, SHOWN)})", remedy=errors[0].remedy
    )


def _terms(
    name: str, sources: Sequence[Source], base: BaseWeights | None, options: AdapterMerge
) -> tuple[list[Term], torch.dtype]:
    """Factor and layer of each adapter that has it and counts, and the type to save it in."""
    terms: list[Term] = []
    floats: list[torch.dtype] = []
    for source in sources:
        factor = source.factor(name)
        if name not in source.layers or factor == 0:
            continue
        tensors = source.read(name)
        floats += [value.dtype for value in tensors.values() if value.is_floating_point() and value.itemsize > 1]
        try:
            terms.append((factor, SourceLayer.read(name, tensors, source.family, base)))
        except LayerError as error:
            raise UserError(error.what, where=f"{source.where}, {error.where}", remedy=error.remedy) from None
    widest = max(floats, key=lambda dtype: dtype.itemsize, default=torch.float16)
    return terms, getattr(torch, options.saved) if options.saved else widest


def _metadata(sources: Sequence[Source], layers: Mapping[str, LayerTensors], options: AdapterMerge) -> dict[str, str]:
    family, headers = sources[0].family, [source.file.metadata for source in sources]
    version = next((each["ss_base_model_version"] for each in headers if each.get("ss_base_model_version")), None)
    said = [read_modelspec(each).get("prediction_type") for each in headers]
    versions = family.base_model_versions
    kinds = [kind for kind, name in versions.items() if name == version] or list(versions)
    prediction = next((kind for kind in kinds if kind != EPSILON and "v" in said), kinds[0])
    lora = {name: tensors for name, tensors in layers.items() if DOWN in tensors}
    wide = {name: tensors for name, tensors in lora.items() if tensors[DOWN].shape[2:].numel() > 1}
    plain = {name: tensors for name, tensors in lora.items() if name not in wide} or wide
    written = {
        "ss_v2": str(family.is_v2),
        "ss_base_model_version": version or versions[prediction],
        "ss_network_module": "networks.lora" if lora else "networks.full",
        "ss_training_comment": f"merged from {', '.join(source.given.path.name for source in sources)}",
    }
    if lora:
        written["ss_network_dim"] = _one({str(len(tensors[DOWN])) for tensors in plain.values()})
        written["ss_network_alpha"] = _one({f"{float(tensors['alpha']):g}" for tensors in plain.values()})
    if wide:
        settings = {
            "conv_dim": _one({str(len(tensors[DOWN])) for tensors in wide.values()}),
            "conv_alpha": _one({f"{float(tensors['alpha']):g}" for tensors in wide.values()}),
        }
        written["ss_network_args"] = json.dumps(settings)
    if not options.with_metadata:
        return written
    titles = [read_modelspec(source.file.metadata).get("title") or source.given.path.stem for source in sources]
    description = ModelDescription(title=options.target.stem, merged_from=", ".join(titles))
    return written | modelspec_metadata(family, prediction, description, saved_at=datetime.now(), adapter=True)


def _one(values: set[str]) -> str:
    return next(iter(values)) if len(values) == 1 else "Dynamic"


def _skipped_lines(report: AdapterReport) -> list[str]:
    lines = [
        f"{where}: {counted(len(names), 'layer')} left out, of no known place ({', '.join(names)})"
        for where, names in report.skipped.items()
    ]
    if report.empty:
        lines.append(f"{counted(len(report.empty), 'layer')} with a ratio of 0 left out ({some_names(report.empty, SHOWN)})")
    return lines


def _last_line(options: AdapterMerge, sources: Sequence[Source]) -> str:
    header = read_header(open_tensor_file(options.target), sources[0].family)
    return f"{options.target}: {readers_sentence(readings(header))}"


def _content(report: AdapterReport, options: AdapterMerge) -> dict[str, object]:
    return {
        "save_to": str(options.target),
        "models": [str(given.path) for given in options.inputs],
        "relative_error": relative_error(report.layers.values()),
        "layers": layers_content(report.layers, report.spectra),
        "skipped": report.skipped,
        "of_ratio_0": report.empty,
    }
