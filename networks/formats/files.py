"""Adapter files: reading, matching with a network's layers, and writing. Every layer of a file is accounted for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.errors import UserError, counted, some_names
from library.families.detect import adapter_origin
from library.families.family import ModelFamily
from library.text_files import read_text
from networks.core.adapter import Adapter
from networks.core.algorithms import algorithm, algorithm_of
from networks.formats.keys import by_layer, ignored_keys, to_kohya
from networks.formats.peft_metadata import METADATA_KEY

if TYPE_CHECKING:
    from library.checkpoints.tensor_places import TensorFile

logger = logging.getLogger(__name__)

SHOWN = 3  # layers that a sentence names

LayerTensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """What an adapter file holds, whatever its layout.

    Attributes:
        tensors: under our names; those of layers that the family's models have not keep the file's.
        metadata: of the file.
        ignored: keys that belong to no adapter (embeddings stored beside it).
        where: how sentences name the file.
    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, str]
    ignored: tuple[str, ...]
    where: str


def read_adapter(path: str | Path, family: ModelFamily) -> AdapterFile:
    """Read a whole adapter file, on the CPU.

    Args:
        path: .safetensors, or .pt and .ckpt with tensors only.
        family: of the models it is for.

    Raises:
        UserError: a file that is missing, damaged, or holds something else than tensors; and see `adapter_of_tensors`.
    """
    from library.checkpoints.tensor_files import open_tensor_file

    file = open_tensor_file(path)
    tensors = {key: file.read(key) for key in file.keys()}  # noqa: SIM118 (a TensorFile is no mapping)
    return adapter_of_tensors(tensors, family, metadata=adapter_metadata(file), where=str(path))


def adapter_metadata(file: TensorFile) -> dict[str, str]:
    """A file's metadata, with what PEFT's own folders say of their weights in a second file beside it."""
    config = file.path.with_name("adapter_config.json")
    if file.path.stem != "adapter_model" or not config.is_file():
        return file.metadata
    return file.metadata | {METADATA_KEY: read_text(config, where=str(config))}


def adapter_of_tensors(
    tensors: Mapping[str, Tensor],
    family: ModelFamily,
    *,
    metadata: Mapping[str, str] | None = None,
    where: str = "the adapter",
) -> AdapterFile:
    """The same for tensors that were read already.

    Raises:
        UserError: an adapter for another family, values that are not finite, or one tensor under two names.
    """
    metadata = metadata or {}
    origin = adapter_origin({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata)
    if origin is not None and origin != family:
        title = origin if isinstance(origin, str) else origin.title
        raise UserError(
            f"is an adapter for {title}, and the model is {family.title}",
            where=where,
            remedy="give a model of the kind it was trained on",
        )
    _check_finite(tensors, where)
    try:
        ours = to_kohya(tensors, family, metadata)
    except UserError as error:
        raise UserError(error.what, where=where, remedy=error.remedy) from None
    return AdapterFile(tensors=ours, metadata=metadata, ignored=tuple(ignored_keys(tensors)), where=where)


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    bad = [key for key, tensor in tensors.items() if not _is_finite(tensor) and not _means_nothing(key, tensors)]
    if bad:
        raise UserError(
            f"has values that are not finite in {len(bad)} of its {len(tensors)} tensors ({some_names(bad, SHOWN)})",
            where=where,
            remedy="it is damaged, or its training diverged; use another file of that run",
        )


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())


def _means_nothing(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether this is the alpha of a LoKr layer without a rank, which some programs write as infinity."""
    layer, _, name = key.rpartition(".")
    return name == "alpha" and f"{layer}.lokr_w1" in tensors and f"{layer}.lokr_w2" in tensors


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How a file's layers and a network's layers meet.

    Attributes:
        matched: layer name -> tensors, for the layers that both have.
        unmatched: layers of the file that the network has not.
        missing: layers of the network that the file has not.
        ignored: keys of the file that belong to no adapter.
    """

    matched: dict[str, LayerTensors]
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{counted(len(self.matched), 'layer')} matched, {len(self.unmatched)} unmatched, {len(self.ignored)} ignored"
        return f"{text}, {len(self.missing)} of the network not in the file" if self.missing else text

    def check(self, where: str, family: ModelFamily, *, allow_unmatched: bool = False, allow_missing: bool = False) -> None:
        """Refuse what is not allowed; a file of which nothing fits is never allowed.

        Raises:
            UserError: with numbers and examples.
        """
        total = len(self.matched) + len(self.unmatched)
        if not self.matched:
            what = f"none of its {counted(total, 'layer')} fits ({some_names(self.unmatched, SHOWN)})"
            raise UserError(
                what if total else "holds no adapter: it has no tensors of any layer",
                where=where,
                remedy=f"give an adapter made for {family.title}",
            )
        if self.unmatched and not allow_unmatched:
            shown = some_names(self.unmatched, SHOWN)
            raise UserError(
                f"{len(self.unmatched)} of its {total} layers have no place in the network ({shown})",
                where=where,
                remedy="train or load the same parts and kinds of layers as the file has (conv_dim for convolutions; a rate "
                "of 0 keeps a part as it is)",
            )
        if self.missing and not allow_missing:
            raise UserError(
                f"has no weights for {len(self.missing)} layers of the network ({some_names(self.missing, SHOWN)})",
                where=where,
                remedy="train only the parts and kinds of layers that the file has, or use --dim_from_weights",
            )


def match_layers(adapter: AdapterFile, names: Collection[str]) -> LoadReport:
    """Pair the file's layers with the network's by name."""
    layers = by_layer(adapter.tensors)
    return LoadReport(
        matched={name: layers[name] for name in layers if name in names},
        unmatched=tuple(name for name in layers if name not in names),
        missing=tuple(name for name in names if name not in layers),
        ignored=adapter.ignored,
    )


def unknown_tensors(tensors: Iterable[str]) -> str:
    """What is wrong with a layer whose tensors are no algorithm's: "has lora_up.weight without lora_down.weight"."""
    own = list(tensors)
    for half, other in (("lora_down.weight", "lora_up.weight"), ("lora_up.weight", "lora_down.weight")):
        if half in own:
            return f"has {half} without {other}"
    return f"is of no known algorithm (its tensors are {', '.join(own)})"


def unknown_algorithm(name: str, tensors: Iterable[str], where: str) -> UserError:
    """The mistake of a layer whose tensors are no algorithm's."""
    what = unknown_tensors(tensors)
    return UserError(f"{name} {what}", where=where, remedy="the file is not whole" if "without" in what else None)


def load_layer(adapter: Adapter, tensors: LayerTensors, name: str, where: str) -> None:
    """Load one layer's tensors, naming the layer if they do not fit.

    Raises:
        UserError: another algorithm, form or rank, unknown or missing tensors.
    """
    found = algorithm_of({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    if found is None:
        raise unknown_algorithm(name, tensors, where)
    try:
        in_file = algorithm(found).adapter.from_tensors(adapter.spec, tensors)
    except ValueError as error:
        raise UserError(f"{name}: {error}", where=where) from None
    if in_file.title != adapter.title_in_files():
        raise UserError(
            f"{name} is {in_file.title} in the file and {adapter.title} in the network",
            where=where,
            remedy=f"use --dim_from_weights, or --network_module {type(in_file).__module__}",
        )
    if in_file.structure != adapter.structure:
        raise UserError(
            f"{name} is {_in_words(in_file)} in the file and {_in_words(adapter)} in the network",
            where=where,
            remedy=_change_of_settings(in_file.structure, adapter.structure),
        )
    if in_file.rank not in (adapter.rank, adapter.rank_in_files):
        raise UserError(
            f"{name} has rank {in_file.rank} in the file and {adapter.rank} in the network",
            where=where,
            remedy=f"use --dim_from_weights, or --network_dim {in_file.rank}",
        )
    try:
        adapter.load_tensors(tensors)
    except ValueError as error:
        raise UserError(f"{name}: {error}", where=where) from None


def _in_words(adapter: Adapter) -> str:
    return " with ".join([adapter.title, *([" and ".join(adapter.structure)] if adapter.structure else [])])


def _change_of_settings(of_file: Mapping[str, str], of_network: Mapping[str, str]) -> str:
    """The settings to give or leave out so that a network has a file's structure, where single ones say it."""
    wanted = {setting for settings in of_file.values() for setting in settings.split()}
    given = {setting for settings in of_network.values() for setting in settings.split()}
    changes = [f"give {setting}" for setting in sorted(wanted - given)]
    changes += [f"leave out {setting}" for setting in sorted(given - wanted)]
    return f"use --dim_from_weights{', or ' if changes else ''}{' and '.join(changes)}"


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> None:
    """Write tensors under their saved names, in the given dtype; None keeps each one's own, and whole numbers keep theirs.

    A tensor with values beyond that dtype's range is kept in fp32, with a warning: better a mixed file than infinities or
    no file. So is a single number that the dtype would round (an alpha of rsLoRA, say), which costs two bytes.
    """
    from library.checkpoints.tensor_writing import write_tensors

    converted = {}
    for key, tensor in tensors.items():
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        value = tensor.detach().to("cpu", wanted)
        if not torch.isfinite(value).all() and torch.isfinite(tensor).all():
            logger.warning("%s: %s has values beyond the range of %s; it is saved in fp32", path, key, wanted)
            value = tensor.detach().to("cpu", torch.float32)
        if tensor.dim() == 0 and bool(value != tensor.detach().cpu()):
            value = tensor.detach().to("cpu", torch.float32)
        converted[key] = value.contiguous()
    write_tensors(path, converted, metadata, add_hashes=True)
