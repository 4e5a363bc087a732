"""The difference of two models as LoRA: read layer by layer, approximated, measured as it is saved, written, proved."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.checkpoints.atomic import check_writable
from library.checkpoints.metadata import ModelDescription, modelspec_metadata
from library.checkpoints.parts import PART_TITLES, TEXT_CLASSES, UNET, VAE
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_writing import PlannedTensor, write_tensors
from library.errors import UserError
from library.parallel import over_cores
from networks.formats.file_adapters import stream_layers
from networks.tools.conversion import DOWN, UP, LayerTensors, with_whole_attention
from networks.tools.file_conversion import DTYPES, rounded
from networks.tools.layer_errors import SPECTRUM
from networks.tools.model_differences import TensorPair, open_pair, tensor_pairs
from networks.tools.rank_choice import RankRule, decompose, squared_norm

if TYPE_CHECKING:
    from library.checkpoints.base_model import BaseModelFiles
    from library.families.family import ModelFamily

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What is asked for.

    Attributes:
        base, tuned: checkpoints, diffusers folders, or ids at the Hub.
        target: file to write.
        rules: "dim" and, where 3x3 convolutions are wanted, "conv_dim" -> how ranks are chosen.
        alpha: of every layer; what it changes is made up for in the factors.
        clamp_quantile: factors are clamped at this quantile of their absolute values; 1 for not at all.
        min_diff: the text encoders are left out where no weight of their layers differs by more than this.
        device: where to compute.
        rounded_to: in `DTYPES`, what both models are rounded to first; None for not at all.
        precision: in `DTYPES`, of the file.
        said, v_parameterization: what family the user says the models are of, and what they predict; None where nothing is
            said.
        with_modelspec: write ModelSpec's fields.
        store_rest: store what LoRA does not hold as differences.
    """

    base: str
    tuned: str
    target: Path
    rules: Mapping[str, RankRule]
    alpha: float
    clamp_quantile: float = 1.0
    min_diff: float = 0.01
    device: str = "cpu"
    rounded_to: str | None = None
    precision: str = "float"
    said: ModelFamily | None = None
    v_parameterization: bool | None = None
    with_modelspec: bool = True
    store_rest: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one tensor, sums of squares over its elements.

    Attributes:
        pair: the tensor.
        change: of the difference.
        lost: of the difference less what the file holds.
        unclamped: the same without the clamping; equal to `lost` where there is none.
        largest: absolute difference.
        rank: of its LoRA; 0 without one.
        values: the largest singular values that were looked for.
        tensors: its LoRA as saved; empty without one.
    """

    pair: TensorPair
    change: float
    lost: float
    unclamped: float
    largest: float
    rank: int = 0
    values: tuple[float, ...] = ()
    tensors: LayerTensors = field(default_factory=dict)


@dataclass
class Extracted:
    """What was found and written.

    Attributes:
        options: what was asked for.
        models: base and tuned.
        layers: those that got LoRA, by our names.
        rest: all other tensors that were looked at.
        equal: layers that LoRA could hold, and that are the same in both models.
        stored: tensors of `rest` that the file holds as differences, by part and name.
        text_difference: the largest absolute one of the text encoders' layers; None where that was left in.
        vae_differs: which no adapter holds.
        reader_line: who applies the file rightly.
    """

    options: Extraction
    models: tuple[BaseModelFiles, BaseModelFiles]
    layers: dict[str, Measured] = field(default_factory=dict)
    rest: list[Measured] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    stored: set[tuple[str, str]] = field(default_factory=set)
    text_difference: float | None = None
    vae_differs: bool = False
    reader_line: str = ""


@torch.no_grad()
def extract(options: Extraction, *, progress: Progress) -> Extracted:
    """Extract, write and prove.

    Args:
        progress: counted in tensors.

    Raises:
        UserError: models that cannot be used or compared, or are the same; a place that cannot be written to.
    """
    models = open_pair(options.base, options.tuned, said=options.said, v_parameterization=options.v_parameterization)
    check_writable(options.target)
    pairs = tensor_pairs(*models, with_convolutions="conv_dim" in options.rules)
    found = Extracted(options=options, models=models)
    largest = _text_difference(pairs, options)
    if largest <= options.min_diff:
        found.text_difference = largest
        pairs = [pair for pair in pairs if pair.part == UNET]
    work = _Measuring(options)
    for done, measured in enumerate(over_cores(work, pairs), start=1):
        _sort_in(found, measured)
        progress(done, len(pairs))
    _refuse_nothing(found)
    found.vae_differs = _vae_differs(*models)
    planned = _planned_tensors(found)
    write_tensors(options.target, planned, _metadata(found), add_hashes=True)
    _prove(found, planned)
    found.reader_line = _reader_line(found)
    return found


def _text_difference(pairs: list[TensorPair], options: Extraction) -> float:
    """The largest absolute difference of the text encoders' layers, or the first that is above the limit."""
    dtype = DTYPES[options.rounded_to] if options.rounded_to else None
    largest = 0.0
    for pair in pairs:
        if pair.part != UNET and pair.rank_name:
            largest = max(largest, _largest(pair.difference(options.device, dtype)))
            if largest > options.min_diff:
                break
    return largest


def _vae_differs(base: BaseModelFiles, tuned: BaseModelFiles) -> bool:
    first, second = base.parts[VAE].sources, tuned.parts[VAE].sources
    return any(
        name not in second or not torch.equal(source.read().float().flatten(), second[name].read().float().flatten())
        for name, source in first.items()
    )


def _largest(difference: Tensor) -> float:
    low, high = difference.aminmax()
    return max(-float(low), float(high))


class _Measuring:
    """Makes `Measured` of a pair; called on several threads."""

    def __init__(self, options: Extraction) -> None:
        self._options = options
        self._rounded_to = DTYPES[options.rounded_to] if options.rounded_to else None
        self._saved = DTYPES[options.precision]

    def __call__(self, pair: TensorPair) -> Measured:
        if not pair.rank_name:
            change, largest = pair.size_of_difference(self._rounded_to)
            return Measured(pair=pair, change=change, lost=change, unclamped=change, largest=largest)
        difference = pair.difference(self._options.device, self._rounded_to)
        change, largest = squared_norm(difference), _largest(difference)
        if not largest:
            return Measured(pair=pair, change=change, lost=change, unclamped=change, largest=largest)
        matrix = difference.flatten(1)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{pair.part}.{pair.name}".encode()))
        left, values, right, seen = decompose(matrix, self._options.rules[pair.rank_name], generator)
        up, down = self._factors(left, values, right)
        tensors = self._tensors(up, down, pair.shape)
        clamps = self._options.clamp_quantile < 1
        unclamped = squared_norm(matrix - (left * values) @ right) if clamps else math.nan
        lost = squared_norm(_less_what_is_saved(matrix, tensors))
        return Measured(
            pair=pair,
            change=change,
            lost=lost,
            unclamped=unclamped if clamps else lost,
            largest=largest,
            rank=len(values),
            values=tuple(seen[:SPECTRUM].tolist()),
            tensors=tensors,
        )

    def _factors(self, left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Up (out, rank) and down (rank, rest) whose product is the change: of equal size, or clamped as sd-scripts does."""
        if self._options.clamp_quantile >= 1:
            root = values.sqrt()
            return left * root, root[:, None] * right
        up = left * values
        entries = torch.cat([up.flatten(), right.flatten()]).sort().values
        bound = entries[round(self._options.clamp_quantile * (len(entries) - 1))]
        return up.clamp(-bound, bound), right.clamp(-bound, bound)

    def _tensors(self, up: Tensor, down: Tensor, shape: tuple[int, ...]) -> LayerTensors:
        """As the file holds them: with the alpha of all layers, in the type to save."""
        share = math.sqrt(len(down) / self._options.alpha)
        return {
            DOWN: rounded((down * share).reshape(-1, *shape[1:]), self._saved),
            UP: rounded((up * share).reshape(*up.shape, *(1 for _ in shape[2:])), self._saved),
            "alpha": rounded(torch.tensor(self._options.alpha), self._saved),
        }


def _less_what_is_saved(matrix: Tensor, tensors: LayerTensors) -> Tensor:
    """Take the change that tensors mean from a matrix, in place."""
    up, down = (tensors[name].to(matrix.device, torch.float32).flatten(1) for name in (UP, DOWN))
    return matrix.addmm_(up, down, alpha=-float(tensors["alpha"]) / len(down))


def _sort_in(found: Extracted, measured: Measured) -> None:
    pair = measured.pair
    if measured.tensors:
        assert pair.layer is not None
        found.layers[pair.layer] = measured
    elif pair.rank_name:
        found.equal.append(pair.layer or pair.name)
    else:
        found.rest.append(measured)


def _refuse_nothing(found: Extracted) -> None:
    """Models without a difference that the file could hold.

    Raises:
        UserError: why.
    """
    options = found.options
    if found.layers or (options.store_rest and any(measured.change for measured in found.rest)):
        return
    where, remedy = f"--model_tuned {options.tuned}", "give a model that was tuned"
    if found.text_difference:
        what = (
            f"the U-Net is that of --model_org, and no weight of the text encoder differs by more than {options.min_diff:g}"
        )
        raise UserError(what, where=where, remedy=f"give --min_diff below {found.text_difference:.2g}")
    if any(measured.change for measured in found.rest):
        what = "differs from --model_org only where LoRA does not reach"
        raise UserError(what, where=where, remedy="use --store_rest, or --conv_dim for convolutions")
    raise UserError("is equal to --model_org: there is nothing to extract", where=where, remedy=remedy)


def _planned_tensors(found: Extracted) -> dict[str, Tensor | PlannedTensor]:
    """The file's tensors; differences are made when their turn comes."""
    saved = DTYPES[found.options.precision]
    layers = with_whole_attention({name: measured.tensors for name, measured in found.layers.items()})
    planned: dict[str, Tensor | PlannedTensor] = {
        f"{name}.{key}": rounded(value, saved) for name, tensors in layers.items() for key, value in tensors.items()
    }
    if found.options.store_rest:
        for measured, key in _stored_rest(found):
            planned[key] = _planned_difference(measured, found.options)
            found.stored.add((measured.pair.part, measured.pair.name))
    return planned


def _stored_rest(found: Extracted) -> Iterator[tuple[Measured, str]]:
    """What is stored as a difference, and its key: of each layer that differs weight and bias, as readers want both."""
    changed = {measured.pair.layer for measured in found.rest if measured.change and measured.pair.layer}
    for measured in found.rest:
        pair = measured.pair
        if pair.layer not in changed or pair.layer is None:
            continue
        is_weight = pair.name.endswith(".weight")
        if pair.kind == "norms":
            yield measured, f"{pair.layer}.{'w_norm' if is_weight else 'b_norm'}"
        else:
            yield measured, f"{pair.layer}.{'diff' if is_weight else 'diff_b'}"


def _planned_difference(measured: Measured, options: Extraction) -> PlannedTensor:
    limit = torch.finfo(DTYPES[options.precision]).max
    dtype = DTYPES[options.precision] if measured.largest <= limit else torch.float32
    rounded_to = DTYPES[options.rounded_to] if options.rounded_to else None

    def make() -> Tensor:
        return measured.pair.difference("cpu", rounded_to).to(dtype)

    return PlannedTensor(measured.pair.shape, str(dtype).removeprefix("torch."), make)


def _metadata(found: Extracted) -> dict[str, str]:
    """What sd-scripts writes beside an extracted LoRA, and ModelSpec's fields."""
    options, (base, tuned) = found.options, found.models
    family, prediction = base.family, tuned.resolved_prediction_type
    ranks = {str(measured.rank) for measured in found.layers.values()}
    rank = next(iter(ranks)) if len(ranks) == 1 else "Dynamic"
    metadata = {
        "ss_v2": str(family.is_v2),
        "ss_base_model_version": family.base_model_versions[prediction],
        "ss_sd_model_name": base.name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": f"{options.alpha:g}",
        "ss_training_comment": f"extracted from {tuned.name}, less {base.name}",
    }
    if "conv_dim" in options.rules:
        wide = {measured.rank for measured in found.layers.values() if measured.pair.rank_name == "conv_dim"}
        conv_rank = str(wide.pop()) if len(wide) == 1 else "Dynamic"
        metadata["ss_network_args"] = json.dumps({"conv_dim": conv_rank, "conv_alpha": f"{options.alpha:g}"})
    if options.with_modelspec:
        description = ModelDescription(title=options.target.stem)
        metadata |= modelspec_metadata(family, prediction, description, saved_at=datetime.now(), adapter=True)
    return metadata


def _prove(found: Extracted, planned: Mapping[str, Tensor | PlannedTensor]) -> None:
    """Open the file again: its tensors are those that were measured, and its layers those that were meant.

    Raises:
        UserError: they are not; the file stays for inspection.
    """
    target = found.options.target
    file = open_tensor_file(target)
    same = set(file.keys()) == set(planned) and all(
        torch.equal(file.read(key), value if isinstance(value, Tensor) else value.make()) for key, value in planned.items()
    )
    meant = {key.partition(".")[0] for key in planned}
    if not same or {name for name, _ in stream_layers(file, found.models[0].family)} != meant:
        raise UserError("differs from what was meant", where=str(target), remedy="the disk may be at fault; save elsewhere")


def _reader_line(found: Extracted) -> str:
    from networks.formats.readers import readers_sentence, readings
    from networks.formats.traits import read_header

    return readers_sentence(readings(read_header(open_tensor_file(found.options.target), found.models[0].family)))


def title_of_place(measured: Measured) -> str:
    """The row of a table that a layer belongs to."""
    if measured.pair.part != UNET:
        return PART_TITLES[measured.pair.part]
    name = measured.pair.name
    place = next((title for beginning, title in _PLACES.items() if name.startswith(beginning)), "other")
    return f"U-Net {place}"


_PLACES = {"down_blocks": "in", "mid_block": "mid", "up_blocks": "out"}
PLACE_TITLES = (*(PART_TITLES[part] for part in TEXT_CLASSES), *(f"U-Net {place}" for place in (*_PLACES.values(), "other")))
"""All that `title_of_place` gives, in the order of tables."""
