"""What is in an adapter file: its tensors, its layers with rank, alpha and size, and who reads them; as lines of text.

Tensors are read one layer at a time, and singular values come from the factors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.checkpoints.parts import PART_TITLES
from library.errors import counted, some_names
from library.families.family import ModelFamily
from library.tables import table
from networks.core.algorithms import algorithm_of
from networks.core.products import effective_rank
from networks.formats.file_adapters import adapter_of_layer, spec_of_tensors, stream_layers
from networks.formats.files import unknown_tensors
from networks.formats.layer_names import TEXT_ENCODERS, layer_names
from networks.formats.readers import readers_sentence, readings
from networks.formats.reading import Effect, Reading
from networks.formats.traits import Trait, file_layers, is_scalar, read_header, split_any_key

if TYPE_CHECKING:
    from library.checkpoints.tensor_places import TensorFile

SHOWN = 3  # layers that a line names


def tensor_lines(file: TensorFile, *, all_keys: bool = False) -> Iterator[str]:
    """How many tensors hold the change, then a line for each: key, shape, mean and smallest absolute value.

    Args:
        all_keys: also the others (alphas, and tensors of no adapter), behind those, with a count of all.
    """
    keys = file.keys()
    weights = [key for key in keys if _holds_weights(key, file)]
    yield f"number of LoRA tensors: {len(weights)}"
    if all_keys:
        yield f"number of all tensors: {len(keys)}"
    for key in [*weights, *(key for key in keys if key not in set(weights))] if all_keys else weights:
        size = file.read(key).float().abs()
        mean, smallest = (float(size.mean()), float(size.min())) if size.numel() else (0.0, 0.0)
        yield f"{key},({'-'.join(map(str, size.shape))}),{mean},{smallest}"


_FACTORS = (
    "lora_",
    "hada_",
    "lokr_",
    "oft_",
    "diff",
    "w_norm",
    "b_norm",
    "a1.",
    "a2.",
    "b1.",
    "b2.",
    "dora_scale",
    "rescale",
)


def _holds_weights(key: str, file: TensorFile) -> bool:
    tensor = split_any_key(key)[1]
    is_ia3 = tensor == "weight" and key.removesuffix("weight") + "on_input" in file
    return is_ia3 or (tensor.startswith(_FACTORS) and not is_scalar(key, file.shape(key)))


@dataclass(frozen=True, kw_only=True)
class LayerMeasure:
    """One layer of a file.

    Attributes:
        name: ours.
        place: "text encoder", "second text encoder", "block 7", or "elsewhere" for a layer that the models have not.
        algorithm: its title ("LoHa", "DoRA on LoRA").
        rank: 0 where the algorithm has none.
        alpha: as the file says it; None where it does not.
        norm: Frobenius norm of the change; None where it depends on the base.
        effective_rank: see `products.effective_rank`; None where it depends on the base, or there are no factors.
        bad: names of tensors with values that are not finite.
        fault: why nothing can be made of its tensors; None where all is well.
    """

    name: str
    place: str
    algorithm: str
    rank: int
    alpha: float | None
    norm: float | None = None
    effective_rank: float | None = None
    bad: tuple[str, ...] = ()
    fault: str | None = None


@torch.no_grad()
def measure_layer(name: str, tensors: Mapping[str, Tensor], family: ModelFamily) -> LayerMeasure:
    """Measure one layer by its tensors."""
    measure = LayerMeasure(
        name=name,
        place=_place(name, family),
        algorithm=_algorithm_by_name(tensors),
        rank=_block_size(tensors),
        alpha=float(tensors["alpha"].flatten()[0]) if "alpha" in tensors else None,
        bad=tuple(tensor for tensor, value in tensors.items() if not _is_sound(tensor, value, tensors)),
    )
    fault = _fault(tensors)
    if fault is not None:
        return replace(measure, fault=fault)
    spec = spec_of_tensors(name, tensors, family)
    if spec is None:
        return measure
    try:
        adapter = adapter_of_layer(name, tensors, spec)
    except ValueError as error:
        return replace(measure, fault=str(error))
    title = f"DoRA on {adapter.title}" if "dora_scale" in tensors else adapter.title
    measure = replace(measure, algorithm=title, rank=adapter.rank)
    if measure.bad:
        return measure
    values = adapter.singular_values()
    if values is not None:
        norm = float(torch.linalg.vector_norm(values))
        return replace(measure, norm=norm, effective_rank=effective_rank(values))
    return measure if adapter.reads_base else replace(measure, norm=float(adapter.delta_norm(torch.empty(0))))


def _fault(tensors: Mapping[str, Tensor]) -> str | None:
    """Why tensors make no layer, whatever the base model; None where nothing is seen."""
    whole = [f"{tensor} ({value.dtype})" for tensor, value in tensors.items() if _is_whole(tensor, value)]
    if whole:
        return f"has whole numbers for weights: {', '.join(whole)}".replace("torch.", "")
    known = algorithm_of({tensor: tuple(value.shape) for tensor, value in tensors.items()})
    return unknown_tensors(tensors) if known is None else None


def _is_whole(tensor: str, value: Tensor) -> bool:
    """Whether a tensor of numbers has none with a fraction by its type; alphas and (IA)3's marks may be so."""
    return not value.is_floating_point() and value.dim() > 0 and tensor not in ("alpha", "on_input")


def _is_sound(tensor: str, value: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is finite, or the alpha of a LoKr layer without a rank, which means nothing."""
    if tensor == "alpha" and "lokr_w1" in tensors and "lokr_w2" in tensors:
        return True
    return bool(value.float().isfinite().all())


def _place(name: str, family: ModelFamily) -> str:
    found = layer_names(family).find(name)
    if found is None:
        return "elsewhere"
    if found.part in TEXT_ENCODERS:
        return PART_TITLES[found.part]
    block = family.block_index(found.saved)
    return "U-Net's ends" if block is None else f"block {block}"


def _algorithm_by_name(tensors: Mapping[str, Tensor]) -> str:
    if "on_input" in tensors:
        return "(IA)3"
    if "oft_blocks" in tensors or "oft_diag" in tensors:
        return "BOFT" if tensors.get("oft_blocks", torch.empty(0)).dim() == 4 else "OFT"
    return "bias alone" if "diff_b" in tensors else "unknown"


def _block_size(tensors: Mapping[str, Tensor]) -> int:
    blocks = tensors.get("oft_blocks", tensors.get("oft_diag"))
    return 0 if blocks is None else blocks.shape[-1]


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was found.

    Attributes:
        lines: of the report, in order.
        bad: keys with values that are not finite, by layer.
        unreadable: layers of whose tensors nothing can be made.
    """

    lines: tuple[str, ...]
    bad: tuple[str, ...]
    unreadable: tuple[str, ...]


def check_file(file: TensorFile, family: ModelFamily, *, every_layer: bool = False) -> CheckReport:
    """Measure every layer of an opened adapter file, and ask the readers.

    Args:
        every_layer: a line for each layer beside those for each place, and the names of all layers that are not read.
    """
    measures = [measure_layer(name, tensors, family) for name, tensors in stream_layers(file, family)]
    header = read_header(file, family)
    results = readings(header)
    layouts = Counter(layer.traits[0] for layer in file_layers(header).values())
    kinds = Counter(measure.algorithm for measure in measures)
    lines = [
        f"{family.title}: {counted(len(measures), 'layer')} ({_counts(kinds)}), {_layout_words(layouts)}",
        *table([_row(group[0].place, str(len(group)), group) for group in _by_place(measures)], _TITLES),
    ]
    if every_layer:
        lines += [
            "",
            *table([_row(measure.name, measure.place, [measure]) for measure in measures], ("layer", "place", *_TITLES[2:])),
        ]
    lines += [*_difference_lines(measures), *_fault_lines(measures)]
    lines += ["", *(line for result in results for line in reading_lines(result, every_layer=every_layer))]
    lines.append(readers_sentence(results))
    return CheckReport(
        lines=tuple(lines),
        bad=tuple(f"{measure.name}.{tensor}" for measure in measures for tensor in measure.bad),
        unreadable=tuple(measure.name for measure in measures if measure.fault),
    )


def _counts(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {number}" for kind, number in counter.items())


def _layout_words(layouts: Mapping[Trait, int]) -> str:
    return " and ".join(f"{trait} ({number})" if len(layouts) > 1 else str(trait) for trait, number in layouts.items())


_TITLES = ("place", "layers", "algorithm", "rank", "alpha", "norm", "effective rank")


def _by_place(measures: Sequence[LayerMeasure]) -> list[list[LayerMeasure]]:
    """Groups of one place each: text encoders, blocks in order, the rest."""
    groups: dict[str, list[LayerMeasure]] = {}
    for measure in measures:
        groups.setdefault(measure.place, []).append(measure)

    encoders = [PART_TITLES[part] for part in TEXT_ENCODERS]

    def order(place: str) -> tuple[int, int]:
        number = place.partition("block ")[2]
        if number:
            return 1, int(number)
        return (0, encoders.index(place)) if place in encoders else (2, 0)

    return [groups[place] for place in sorted(groups, key=order)]


def _row(first: str, second: str, group: Sequence[LayerMeasure]) -> tuple[str, ...]:
    norms = [measure.norm for measure in group if measure.norm is not None]
    return (
        first,
        second,
        "/".join(dict.fromkeys(measure.algorithm for measure in group)),
        _range([measure.rank for measure in group if measure.rank]),
        _range([measure.alpha for measure in group if measure.alpha is not None]),
        f"{math.hypot(*norms):.4g}" if norms else "-",
        _range([measure.effective_rank for measure in group if measure.effective_rank is not None], digits=1),
    )


def _range(values: Iterable[float], digits: int | None = None) -> str:
    """ "4", "4 to 8", "-"."""
    shown = list(dict.fromkeys(f"{value:g}" if digits is None else f"{value:.{digits}f}" for value in sorted(values)))
    return "-" if not shown else shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def _difference_lines(measures: Sequence[LayerMeasure]) -> Iterator[str]:
    """Ranks and alphas that differ by layer, which some readers do not expect."""
    for word, values in (
        ("ranks", Counter(measure.rank for measure in measures if measure.rank)),
        ("alphas", Counter(measure.alpha for measure in measures if measure.alpha is not None)),
    ):
        if len(values) > 1:
            shares = ", ".join(f"{value:g} in {counted(number, 'layer')}" for value, number in values.most_common(5))
            yield f"{word} differ by layer: {shares}{'' if len(values) <= 5 else ', ...'}"
    without = [measure.name for measure in measures if measure.rank and measure.alpha is None]
    if without:
        yield f"{counted(len(without), 'layer')} without alpha (alpha = rank is meant): {some_names(without, SHOWN)}"


def _fault_lines(measures: Sequence[LayerMeasure]) -> Iterator[str]:
    yield from (f"unreadable: {measure.name}: {measure.fault}" for measure in measures if measure.fault)
    strangers = [measure.name for measure in measures if measure.place == "elsewhere"]
    if strangers:
        yield f"{counted(len(strangers), 'layer')} that the models have not: {some_names(strangers, SHOWN)}"
    for measure in measures:
        if measure.bad:
            yield f"not finite: {measure.name} ({', '.join(measure.bad)})"


def reading_lines(result: Reading, *, every_layer: bool = False) -> Iterator[str]:
    """What one reader makes of the file: how many layers it applies rightly, and which not, with the reasons.

    Args:
        every_layer: name all of them, not the first few.
    """
    title = f"{result.reader.title} {result.reader.version}"
    if result.refused is not None:
        yield f"{title}: refuses the whole file ({result.refused})"
        return
    total = len(result.right) + len(result.wrong) + len(result.dropped)
    yield f"{title}: applies {len(result.right)} of {counted(total, 'layer')} rightly"
    for effect, reasons in ((Effect.WRONG, result.wrong), (Effect.DROPPED, result.dropped)):
        by_reason: dict[str, list[str]] = {}
        for name, why in reasons.items():
            by_reason.setdefault(why, []).append(name)
        for why, names in by_reason.items():
            shown = some_names(names, len(names) if every_layer else SHOWN)
            yield f"    {effect} {len(names)}: {why} ({shown})"
