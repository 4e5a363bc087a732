"""What a merge of whole models tells: lines for the screen, the whole of it for a JSON file, and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from library.checkpoints.base_model import BaseModelFiles
from library.checkpoints.model_merging import MergeOptions, TensorReport, WeightedSum, left_out
from library.checkpoints.parts import PART_TITLES, VAE
from library.errors import counted
from library.families.family import ModelFamily
from library.tables import table
from networks.tools.layer_errors import shares_by_block
from networks.tools.plotting import Bars, Panel
from networks.tools.reports import ToolReport


def report_of(
    models: Sequence[BaseModelFiles], options: MergeOptions, done: WeightedSum, *, name_left_out: bool
) -> ToolReport:
    """What a merge tells.

    Args:
        name_left_out: name the tensors that belong to no part, in the lines too.
    """
    return ToolReport(
        lines=_lines(models, options, done, name_left_out=name_left_out),
        content=lambda: _content(models, options, done),
        panels=lambda: _panels(models, done),
    )


def _lines(models: Sequence[BaseModelFiles], options: MergeOptions, done: WeightedSum, *, name_left_out: bool) -> list[str]:
    """Notes of the models, what was left out, what was done to each part, how exact it is, and what the file is."""
    lines = list(dict.fromkeys(note for model in models for note in model.notes()))
    for path, keys in left_out(models).items():
        named = ": " + ", ".join(keys) if name_left_out else " (--show_skipped names them)"
        lines.append(f"{path}: {counted(len(keys), 'tensor')} outside the parts left out{named}")
    rows = []
    for kind in models[0].parts:
        reports = [report for (part, _), report in done.reports.items() if part == kind]
        origin = f"{len(models)} models" if options.merges(kind) else "the first model"
        rounding = _share((report.rounding, report.merged) for report in reports)
        away = [f"{_away(reports, place):.2e}" if options.merges(kind) or not place else "-" for place in range(len(models))]
        rows.append((PART_TITLES[kind], str(len(reports)), origin, *away, f"{rounding:.1e}"))
    titles = ("part", "tensors", "from", *(f"away from {place}" for place in range(1, len(models) + 1)), "rounding")
    lines += table(rows, titles, left=(0, 2))
    total = sum(options.ratios)
    if not math.isclose(total, 1, abs_tol=1e-6):
        lines.append(f"the ratios add up to {total:g}, not 1: all merged weights are scaled by that")
    terms = " + ".join(f"{ratio:g} * {model.name}" for model, ratio in zip(models, options.ratios, strict=True))
    return [*lines, f"{options.target}: {models[0].family.title}, {terms}; opened again and compared"]


def _away(reports: Iterable[TensorReport], place: int) -> float:
    """||result - model|| / ||model|| for the model of that place, over tensors that hold it."""
    return _share(pair for report in reports if (pair := _distance(report, place)))


def _distance(report: TensorReport, place: int) -> tuple[float, float] | None:
    """Squares of the result less the model of that place, and of that model; None where it did not count."""
    return (report.distances[place], report.models[place]) if place < len(report.models) else None


def _share(pairs: Iterable[tuple[float, float]]) -> float:
    """||a|| / ||b|| from sums of squares."""
    found = list(pairs)
    whole = sum(base for _, base in found)
    return math.sqrt(sum(part for part, _ in found) / whole) if whole else 0.0


def _content(models: Sequence[BaseModelFiles], options: MergeOptions, done: WeightedSum) -> dict[str, object]:
    """All of it; what is told of each model stands in the models' order."""
    return {
        "output": str(options.target),
        "models": [str(model.path) for model in models],
        "ratios": list(options.ratios),
        "parts": [PART_TITLES[kind] for kind in models[0].parts if options.merges(kind)],
        "relative_distances": [_away(done.reports.values(), place) for place in range(len(models))],
        "tensors": {
            f"{kind}.{name}": {
                "norm": math.sqrt(report.merged),
                "rounding": math.sqrt(report.rounding),
                "norms_of_models": [math.sqrt(square) for square in report.models],
                "distances": [math.sqrt(square) for square in report.distances],
            }
            for (kind, name), report in sorted(done.reports.items())
        },
        "left_out": left_out(models),
    }


def _panels(models: Sequence[BaseModelFiles], done: WeightedSum) -> list[Panel]:
    """By block, how far the result is from each model, and what rounding took."""
    family = models[0].family
    distances = {
        f"{place}: {model.name}": _by_block(done, family, partial(_distance, place=place - 1))
        for place, model in enumerate(models, start=1)
    }
    rounding = _by_block(done, family, lambda report: (report.rounding, report.merged))
    return [
        Bars(title="distance of the result from each model, relative to that model", series=distances),
        Bars(title="what rounding took", series={"rounding / weights": rounding}),
    ]


def _by_block(
    done: WeightedSum, family: ModelFamily, pair: Callable[[TensorReport], tuple[float, float] | None]
) -> dict[str, float]:
    """Block, or "VAE" -> ||a|| / ||b||, from the squares of a and b of each tensor."""
    found = {place: squares for place, report in done.reports.items() if (squares := pair(report)) is not None}
    prefixes = family.adapter_prefixes
    norms = {
        f"{prefixes[kind]}_{name}": (math.sqrt(part), math.sqrt(whole))
        for (kind, name), (part, whole) in found.items()
        if kind in prefixes
    }
    vae = [squares for (kind, _), squares in found.items() if kind == VAE]
    return shares_by_block(norms, family) | ({PART_TITLES[VAE]: _share(vae)} if vae else {})
