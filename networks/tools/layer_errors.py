"""How much of the change of each layer a file holds: as a table of the parts, and by block for a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from library.checkpoints.parts import PART_TITLES, UNET
from library.families.block_weights import PLACES, place_of
from library.families.family import ModelFamily
from library.tables import table
from networks.core.products import svd_of_product
from networks.formats.layer_names import DENOISER, layer_names
from networks.tools.plotting import Bars, Curves, Panel

SPECTRUM = 64  # singular values of a layer that reports hold


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a file holds of one layer.

    Attributes:
        rank: of its LoRA; 0 where it is none.
        lost: Frobenius norm of the change that was wanted, less what the file holds.
        had: Frobenius norm of the change that was wanted.
    """

    rank: int
    lost: float
    had: float

    @property
    def relative_error(self) -> float:
        """lost / had; 0 where nothing was wanted."""
        return self.lost / self.had if self.had else 0.0


def relative_error(layers: Iterable[Kept]) -> float:
    """||what was lost|| / ||what was wanted|| over layers."""
    columns = [(layer.lost, layer.had) for layer in layers]
    lost, had = (math.hypot(*(row[column] for row in columns)) for column in (0, 1))
    return Kept(rank=0, lost=lost, had=had).relative_error


def table_of_parts(layers: Mapping[str, Kept], family: ModelFamily) -> list[str]:
    """A row for each part of the model and one for all: layers, ranks, relative error, and that of the worst layer.

    Args:
        layers: by our names.
    """
    parts: dict[str, list[Kept]] = {PART_TITLES[kind]: [] for kind in family.adapter_prefixes}
    for name, kept in layers.items():
        parts[part_of(name, family)].append(kept)
    rows = [_row(title, found) for title, found in {**parts, "total": list(layers.values())}.items() if found]
    return table(rows, ("part", "layers", "ranks", "relative error", "largest"), left=(0, 2))


def _row(title: str, layers: Sequence[Kept]) -> tuple[str, ...]:
    worst = max(layer.relative_error for layer in layers)
    return title, str(len(layers)), ranks_text(layers), f"{relative_error(layers):.3g}", f"{worst:.3g}"


def ranks_text(layers: Iterable[Kept]) -> str:
    """ "4", "4 to 16", "4 to 16, whole" where some are no LoRA."""
    found = sorted({layer.rank for layer in layers})
    ranks = [rank for rank in found if rank]
    shown = [f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])] if ranks else []
    return ", ".join([*shown, "whole"] if 0 in found else shown)


def part_of(layer: str, family: ModelFamily) -> str:
    """ "U-Net", "text encoder" or "second text encoder"; "other" for a layer that the models have not."""
    found = layer_names(family).find(layer)
    return _OTHER if found is None else PART_TITLES[UNET if found.part == DENOISER else found.part]


def spectrum(up: Tensor, down: Tensor) -> list[float]:
    """The largest singular values of up (out, rank) @ down (rank, rest), for reports."""
    return [float(value) for value in svd_of_product(up, down)[1][:SPECTRUM]]


def layers_content(layers: Mapping[str, Kept], spectra: Mapping[str, Sequence[float]]) -> dict[str, dict[str, object]]:
    """Layer -> all that is known of it, for a JSON file."""
    return {
        name: {
            "rank": kept.rank,
            "norm": kept.had,
            "relative_error": kept.relative_error,
            "singular_values": list(spectra.get(name, ())),
        }
        for name, kept in layers.items()
    }


def approximation_panels(
    layers: Mapping[str, Kept], spectra: Mapping[str, Sequence[float]], family: ModelFamily
) -> list[Panel]:
    """The singular values of the layers' changes, and the relative error of each block."""
    errors = shares_by_block({name: (kept.lost, kept.had) for name, kept in layers.items()}, family)
    return [spectra_panel(spectra, family), Bars(title="relative error of each block", series={"lost / change": errors})]


def spectra_panel(spectra: Mapping[str, Sequence[float]], family: ModelFamily) -> Curves:
    """A curve for each layer; those of one part share a colour."""
    groups: dict[str, list[Sequence[float]]] = {}
    for name, values in spectra.items():
        groups.setdefault(part_of(name, family), []).append(values)
    return Curves(title="singular values of each layer, relative to its largest", groups=groups)


def shares_by_block(norms: Mapping[str, tuple[float, float]], family: ModelFamily) -> dict[str, float]:
    """Block -> ||a|| / ||b|| over its layers, from norms of a and b of each; blocks in the order of the model.

    Blocks are the places of block weights (`--lbws`), with each text encoder named as such, and "other" for what is outside.
    """
    blocks: dict[str, list[Kept]] = {}
    for name, (lost, had) in norms.items():
        place = place_of(name, family)
        block = _OTHER if place is None else PLACES[place] if place else part_of(name, family)
        blocks.setdefault(block, []).append(Kept(rank=0, lost=lost, had=had))
    order = (*(PART_TITLES[encoder.part] for encoder in family.text_encoders), *PLACES, _OTHER)
    return {block: relative_error(blocks[block]) for block in order if block in blocks}


_OTHER = "other"
