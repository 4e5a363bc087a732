"""What cutting a file into ranks tells: how much of the full rank's change each file holds.

A layer's change is U diag(w) D, with w the scale of each rank. A file of rank k has other scales for the first k and 0 for
the rest, so that with G = (U'U) * (DD'), element by element, the squared norm of what it lacks is d'Gd for the difference d
of the scales: one small matrix for each layer tells of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from library.errors import counted
from library.families.family import ModelFamily
from library.parallel import over_cores
from library.tables import table
from networks.tools.layer_errors import Kept, part_of, relative_error, shares_by_block, spectra_panel, spectrum
from networks.tools.plotting import Bars, Panel
from networks.tools.rank_cutting import FACTORS, LayerTensors, LowRankFile, cut_layer
from networks.tools.reports import ToolReport


def report_of(file: LowRankFile, places: Mapping[int, Path]) -> ToolReport:
    """What cutting tells.

    Args:
        file: the source.
        places: rank -> file that was written.
    """
    found = over_cores(lambda tensors: {rank: _kept(tensors, rank) for rank in places}, file.layers.values())
    by_layer = dict(zip(file.layers, found, strict=True))
    ranks = {rank: {name: kept[rank] for name, kept in by_layer.items()} for rank in places}
    spectra = cache(lambda: {name: _spectrum(tensors) for name, tensors in file.layers.items()})

    def content() -> dict[str, object]:
        return {
            "model": str(file.path),
            "rank": file.rank,
            "layers": {
                name: {"rank": len(tensors[FACTORS[0]]), "singular_values": spectra()[name]}
                for name, tensors in file.layers.items()
            },
            "files": {
                str(place): {
                    "rank": rank,
                    "relative_error": relative_error(ranks[rank].values()),
                    "layers": {
                        name: {"rank": kept.rank, "norm": kept.had, "relative_error": kept.relative_error}
                        for name, kept in ranks[rank].items()
                    },
                }
                for rank, place in places.items()
            },
        }

    def panels() -> list[Panel]:
        errors = {f"rank {rank}": _by_block(layers, file.family) for rank, layers in ranks.items()}
        return [
            spectra_panel(spectra(), file.family),
            Bars(title="distance of each block from the full rank", series=errors),
        ]

    return ToolReport(lines=_lines(file, places, ranks), content=content, panels=panels)


def _by_block(layers: Mapping[str, Kept], family: ModelFamily) -> dict[str, float]:
    return shares_by_block({name: (kept.lost, kept.had) for name, kept in layers.items()}, family)


def _scale(tensors: LayerTensors) -> float:
    """alpha / rank, as readers find it."""
    rank = len(tensors[FACTORS[0]])
    return (float(tensors["alpha"]) or rank) / rank if "alpha" in tensors else 1.0


def _product(tensors: LayerTensors) -> tuple[Tensor, Tensor]:
    down, up = (tensors[name].double().flatten(1) for name in FACTORS)
    return up, down


def _kept(tensors: LayerTensors, rank: int) -> Kept:
    """What a file of a rank holds of a layer."""
    (up, down), cut = _product(tensors), cut_layer(tensors, rank)
    gram = (up.t() @ up) * (down @ down.t())
    scales = torch.full((len(down),), _scale(tensors), dtype=torch.float64)
    rest = scales.clone()
    rest[: len(cut[FACTORS[0]])] -= _scale(cut)
    lost, had = (math.sqrt(max(0.0, float(weights @ gram @ weights))) for weights in (rest, scales))
    return Kept(rank=len(cut[FACTORS[0]]), lost=lost, had=had)


def _spectrum(tensors: LayerTensors) -> list[float]:
    up, down = _product(tensors)
    return spectrum(up * _scale(tensors), down)


def _lines(file: LowRankFile, places: Mapping[int, Path], ranks: Mapping[int, Mapping[str, Kept]]) -> list[str]:
    parts = list(dict.fromkeys(part_of(name, file.family) for name in file.layers))
    rows = []
    for rank, layers in ranks.items():
        shares = [
            f"{relative_error(kept for name, kept in layers.items() if part_of(name, file.family) == part):.3g}"
            for part in parts
        ]
        cut = sum(len(tensors[FACTORS[0]]) > rank for tensors in file.layers.values())
        rows.append((str(rank), str(len(layers)), str(cut), *shares, f"{relative_error(layers.values()):.3g}"))
    lines = ["distance from the full rank, relative to its change:"]
    lines += table(rows, ("rank", "layers", "cut", *parts, "total"), left=())
    magnitudes = sum("dora_scale" in tensors for tensors in file.layers.values())
    if magnitudes:
        lines.append(f"{counted(magnitudes, 'layer')} of DoRA: magnitudes are kept, distances are those before them")
    return [*lines, *(f"saved {place} (re-opened and compared)" for place in places.values())]
