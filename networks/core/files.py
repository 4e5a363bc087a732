"""Adapter files: reading, matching with a network's layers, and writing. Every layer of a file is accounted for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError, some_names
from library.families.family import ModelFamily
from networks.core.adapter import Adapter
from networks.core.algorithms import algorithm, algorithm_of
from networks.core.keys import by_layer, other_layout

logger = logging.getLogger(__name__)

SHOWN = 3  # layers that a sentence names

LayerTensors = dict[str, Tensor]


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of an adapter file, on the CPU.

    Raises:
        UserError: a file that is missing, damaged, or holds something else than tensors.
    """
    from library.checkpoints.tensor_files import open_tensor_file

    file = open_tensor_file(path)
    return {key: file.read(key) for key in file.keys()}  # noqa: SIM118 (a TensorFile is no mapping)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How a file's layers and a network's layers meet.

    Attributes:
        matched: layer name -> tensors, for the layers that both have.
        unmatched: layers of the file that the network has not.
        missing: layers of the network that the file has not.
        layout: the name of a layout that the file is in and that is not read.
    """

    matched: dict[str, LayerTensors]
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]
    layout: str | None = None

    def __str__(self) -> str:
        return f"{len(self.matched)} layers loaded, {len(self.unmatched)} left out, {len(self.missing)} not in the file"

    def check(self, where: str, family: ModelFamily, *, allow_unmatched: bool = False, allow_missing: bool = False) -> None:
        """Refuse what is not allowed; a file of which nothing fits is never allowed.

        Raises:
            UserError: with numbers and examples.
        """
        total = len(self.matched) + len(self.unmatched)
        if not self.matched:
            what = f"it is in {self.layout}, which is not read" if self.layout else f"none of its {total} layers fits"
            raise UserError(
                f"{what} ({some_names(self.unmatched, SHOWN) or 'the file is empty'})",
                where=where,
                remedy=f"give a kohya-style adapter made for {family.title}",
            )
        if self.unmatched and not allow_unmatched:
            shown = some_names(self.unmatched, SHOWN)
            raise UserError(
                f"{len(self.unmatched)} of its {total} layers have no place in the network ({shown})",
                where=where,
                remedy="train or load the same parts and kinds of layers as the file has (conv_dim for convolutions)",
            )
        if self.missing and not allow_missing:
            raise UserError(
                f"has no weights for {len(self.missing)} layers of the network ({some_names(self.missing, SHOWN)})",
                where=where,
                remedy="train only the parts and kinds of layers that the file has, or use --dim_from_weights",
            )


def match_layers(tensors: Mapping[str, Tensor], names: Collection[str]) -> LoadReport:
    """Pair the file's layers with the network's by name."""
    layers = by_layer(tensors)
    return LoadReport(
        matched={name: layers[name] for name in layers if name in names},
        unmatched=tuple(name for name in layers if name not in names),
        missing=tuple(name for name in names if name not in layers),
        layout=other_layout(tensors),
    )


def load_layer(adapter: Adapter, tensors: LayerTensors, name: str, where: str) -> None:
    """Load one layer's tensors, naming the layer if they do not fit.

    Raises:
        UserError: another algorithm or rank, unknown or missing tensors.
    """
    found = algorithm_of({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    try:
        in_file = algorithm(found).adapter.from_tensors(adapter.spec, tensors) if found else None
    except ValueError as error:
        raise UserError(f"{name}: {error}", where=where) from None
    if in_file is not None and in_file.title != adapter.title_in_files():
        raise UserError(
            f"{name} is {in_file.title} in the file and {adapter.title} in the network",
            where=where,
            remedy=f"use --dim_from_weights, or --network_module {type(in_file).__module__}",
        )
    if in_file is not None and in_file.rank not in (adapter.rank, adapter.rank_in_files):
        raise UserError(
            f"{name} has rank {in_file.rank} in the file and {adapter.rank} in the network",
            where=where,
            remedy=f"use --dim_from_weights, or --network_dim {in_file.rank}",
        )
    try:
        adapter.load_tensors(tensors)
    except ValueError as error:
        raise UserError(f"{name}: {error}", where=where) from None


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> None:
    """Write tensors under their saved names, in the given dtype; None keeps each one's own, and whole numbers keep theirs.

    A tensor with values beyond that dtype's range is kept in fp32, with a warning: better a mixed file than infinities or
    no file.
    """
    from library.checkpoints.tensor_writing import write_tensors

    converted = {}
    for key, tensor in tensors.items():
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        value = tensor.detach().to("cpu", wanted)
        if not torch.isfinite(value).all() and torch.isfinite(tensor).all():
            logger.warning("%s: %s has values beyond the range of %s; it is saved in fp32", path, key, wanted)
            value = tensor.detach().to("cpu", torch.float32)
        converted[key] = value.contiguous()
    write_tensors(path, converted, metadata, add_hashes=True)
