"""A file of low-rank adapters at lower ranks: each layer's best approximation, fixed or by what its singular values say.

The values come from the thin factors, so nothing as large as a layer's weight is formed where they are. Factors keep the
file's scale, alpha / rank, and one alpha: where ranks differ, the factors of lower ranks take up what is left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from library.checkpoints.tensor_files import open_tensor_file
from library.errors import UserError, counted, some_names
from library.families.detect import DEFAULT_FAMILY
from library.parallel import one_thread, over_cores
from networks.core.additive import AdditiveAdapter
from networks.core.products import balanced_factors
from networks.formats.file_adapters import default_lines, family_of_adapter_file, stream_layers
from networks.formats.files import save_tensors
from networks.formats.readers import readers_sentence, readings
from networks.formats.traits import read_header
from networks.tools.conversion import DOWN, UP, LayerError, LayerTensors, SourceLayer, with_alpha
from networks.tools.file_conversion import flat, prove, rounded
from networks.tools.layer_errors import Kept, approximation_panels, layers_content, relative_error, table_of_parts
from networks.tools.reports import ToolReport

if TYPE_CHECKING:
    from library.families.family import ModelFamily

DynamicMethod = Literal["sv_ratio", "sv_fro", "sv_cumulative"]
_LOW_RANK = ("LoRA", "LoHa", "LoKr")


@dataclass(frozen=True, kw_only=True)
class Resizing:
    """What is asked for.

    Attributes:
        source, target: files.
        rank: of every layer at most.
        conv_rank: the same of kernels larger than 1x1.
        method: how a layer's rank is found; None for the highest that is allowed.
        param: what the method keeps to; see `rank_for`.
        dtype: of the numbers.
        device: of the decompositions.
        verbose: tell of each layer what is retained of its singular values.
    """

    source: Path
    target: Path
    rank: int
    conv_rank: int
    method: DynamicMethod | None = None
    param: float = 0.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class Resized:
    """What became of a layer.

    Attributes:
        name: ours.
        tensors: to save, with alpha = rank.
        scale: alpha / rank that it had.
        values: singular values of its change, largest first.
        rank: that was kept; 0 for a norm, which stays as it is.
    """

    name: str
    tensors: LayerTensors
    scale: float
    values: Tensor
    rank: int

    @property
    def norms(self) -> tuple[float, float]:
        """Frobenius norms of what was left out and of the whole."""
        values = self.values.double()
        return float(values[self.rank :].norm()), float(values.norm())


def rank_for(values: Tensor, limit: int, method: DynamicMethod | None, param: float) -> int:
    """The rank to keep: at least 1, and at most the limit and the number of values.

    Args:
        values: singular values, largest first.
        limit: the highest rank allowed.
        method: "sv_ratio" keeps values above the largest / param; "sv_cumulative" the fewest whose sum is at least param of
            the sum of all; "sv_fro" the fewest whose norm is at least param of the norm of all; None the limit.
        param: of the method.
    """
    values = values.double()
    if method is None:
        wanted = limit
    elif not values[0] > 0:
        wanted = 1
    elif method == "sv_ratio":
        wanted = int((values > values[0] / param).sum())
    else:
        kept = values.cumsum(0) if method == "sv_cumulative" else values.square().cumsum(0).sqrt()
        wanted = int((kept < param * kept[-1]).sum()) + 1
    return max(1, min(wanted, limit, len(values)))


def retained(layer: Resized) -> dict[str, float]:
    """Shares of the sum and of the norm of a layer's singular values that its rank keeps, and the ratio of the largest to
    the smallest of them."""
    values, kept = layer.values.double(), layer.values.double()[: layer.rank]
    smallest = float(kept[-1])
    return {
        "sum_retained": float(kept.sum() / values.sum()) if values.any() else 1.0,
        "fro_retained": float(kept.norm() / values.norm()) if values.any() else 1.0,
        "max_ratio": float(kept[0]) / smallest if smallest else math.inf,
    }


@torch.no_grad()
def resize_file(options: Resizing, *, progress: Callable[[int, int], None] | None = None) -> ToolReport:
    """Write a file at lower ranks, and open it again.

    Args:
        options: what is asked for.
        progress: called with the layers done and their number.

    Raises:
        UserError: what cannot be resized, before anything is written; or a place that cannot be written to.
    """
    file = open_tensor_file(options.source)
    family = family_of_adapter_file(file, DEFAULT_FAMILY)
    try:
        layers = tuple(_resized_layers(stream_layers(file, family), options, family, progress))
    except LayerError as error:
        raise UserError(error.what, where=f"{options.source}, {error.where}", remedy=error.remedy) from None
    if not any(layer.rank for layer in layers):
        raise UserError("has no layer with a rank", where=str(options.source), remedy="there is nothing to resize")
    scale = Counter(layer.scale for layer in layers if layer.rank).most_common(1)[0][0]
    alpha = float(torch.tensor(scale * max(layer.rank for layer in layers)))

    def finish(layer: Resized) -> tuple[LayerTensors, tuple[float, float]]:
        meant = with_alpha(layer.tensors, alpha) if layer.rank else layer.tensors
        saved = {key: rounded(value, options.dtype) for key, value in meant.items()}
        return saved, _norms(layer, meant, saved) if layer.rank else (0.0, 0.0)

    written, kept = {}, {}
    for layer, (saved, (lost, had)) in zip(layers, over_cores(finish, layers), strict=True):
        written[layer.name] = saved
        if layer.rank:
            kept[layer.name] = Kept(rank=layer.rank, lost=lost, had=had)
    with one_thread():
        save_tensors(options.target, flat(written), None, _metadata(file.metadata, layers, alpha, options))
        prove(options.target, flat(written), written, family)
    spectra = {layer.name: layer.values.tolist() for layer in layers if layer.rank}
    return ToolReport(
        lines=[
            *(_verbose_lines(layers) if options.verbose else ()),
            *default_lines(file, family),
            *_lines(options, layers, kept, alpha, family),
        ],
        content=lambda: _content(layers, kept, spectra, alpha),
        panels=lambda: approximation_panels(kept, spectra, family),
    )


def _resized_layers(
    layers: Iterator[tuple[str, dict[str, Tensor]]],
    options: Resizing,
    family: ModelFamily,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Resized]:
    read = list(layers)

    def work(layer: tuple[str, dict[str, Tensor]]) -> Resized:
        return _resized(SourceLayer.read(*layer, family, None), options)

    for done, resized in enumerate(over_cores(work, read), start=1):
        if progress is not None:
            progress(done, len(read))
        yield resized


def _resized(layer: SourceLayer, options: Resizing) -> Resized:
    adapter = layer.adapter
    if adapter is not None and adapter.spec.is_norm:
        return Resized(name=layer.name, tensors=layer.tensors, scale=1.0, values=torch.zeros(1), rank=0)
    if not isinstance(adapter, AdditiveAdapter) or adapter.title not in _LOW_RANK:
        title = "of another kind" if adapter is None else adapter.title
        remedy = "bring it to LoRA first: convert_lora.py --algorithm lora, with --rank for a limit"
        raise LayerError(f"is {title}, which has no rank to lower", where=layer.name, remedy=remedy)
    left, values, right = (tensor.cpu() for tensor in adapter.to(options.device).svd())
    limit = options.conv_rank if adapter.spec.is_wide else options.rank
    own = adapter.rank if adapter.title == "LoRA" else len(values)
    rank = rank_for(values, min(limit, own), options.method, options.param)
    up, down = balanced_factors(left, values, right, rank)
    shape = adapter.spec.weight_shape
    beside = {name: tensor.cpu() for name, tensor in adapter.tensors().items() if name in ("dora_scale", "diff_b")}
    tensors = {
        DOWN: down.reshape(-1, *shape[1:]).contiguous(),
        UP: up.reshape(*up.shape, *(1 for _ in shape[2:])).contiguous(),
        "alpha": torch.tensor(float(rank)),
        **beside,
    }
    return Resized(name=layer.name, tensors=tensors, scale=adapter.scale, values=values, rank=rank)


def _norms(layer: Resized, meant: LayerTensors, written: LayerTensors) -> tuple[float, float]:
    """Frobenius norms of a layer's loss and of its change before any decomposition.

    What rounding moves within the kept directions adds to what the cut left out. With d = the change of a factor,
    (U + dU)(D + dD) - U D = dU (D + dD) + U dD, so nothing cancels.
    """
    scale = float(meant["alpha"]) / layer.rank
    up, down = (meant[name].double().flatten(1) for name in (UP, DOWN))
    new_up, new_down = (written[name].double().flatten(1) for name in (UP, DOWN))
    left, right = torch.cat([new_up - up, up], dim=1), torch.cat([new_down, new_down - down])
    squared = float(((left.t() @ left) * (right @ right.t())).sum().clamp(min=0))
    lost, had = layer.norms
    return math.hypot(lost, abs(scale) * math.sqrt(squared)), had


def _ranks(layers: tuple[Resized, ...]) -> set[int]:
    return {layer.rank for layer in layers if layer.rank}


def _metadata(source: Mapping[str, str], layers: tuple[Resized, ...], alpha: float, options: Resizing) -> dict[str, str]:
    """The source's metadata with what is different now; hashes are the writer's to add."""
    stale = ("lora_adapter_metadata", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "ss_network_args")
    kept = {key: text for key, text in source.items() if key not in stale}
    old, ranks = kept.get("ss_network_dim", "?"), _ranks(layers)
    to = f"at most {max(ranks)}" if options.method else str(max(ranks))
    told = f"resized from {old} to {to} ({options.source.name})"
    if options.method:
        told = f"{told} by {options.method} {options.param:g}"
    comment = kept.get("ss_training_comment", "None")
    kept["ss_training_comment"] = told if comment in ("None", "") else f"{told}; {comment}"
    kept["ss_network_module"] = "networks.lora"
    kept["ss_network_dim"] = str(max(ranks)) if len(ranks) == 1 else "Dynamic"
    kept["ss_network_alpha"] = f"{alpha:g}" if len(ranks) == 1 else "Dynamic"
    if "ss_output_name" in kept:
        kept["ss_output_name"] = options.target.stem
    return kept


def _content(
    layers: tuple[Resized, ...], kept: Mapping[str, Kept], spectra: Mapping[str, list[float]], alpha: float
) -> dict[str, object]:
    shares = {layer.name: retained(layer) for layer in layers if layer.rank}
    return {
        "alpha": alpha,
        "relative_error": relative_error(kept.values()),
        "layers": {name: {**content, **shares[name]} for name, content in layers_content(kept, spectra).items()},
        "kept_as_they_are": [layer.name for layer in layers if not layer.rank],
    }


def _verbose_lines(layers: tuple[Resized, ...]) -> Iterator[str]:
    """A line for each layer: what of its singular values is retained, and its rank."""
    width = max(len(layer.name) for layer in layers)
    for layer in layers:
        if layer.rank:
            share = retained(layer)
            yield (
                f"{layer.name:{width}} | sum(S) retained: {share['sum_retained']:6.1%}, fro retained: "
                f"{share['fro_retained']:6.1%}, max(S) ratio: {share['max_ratio']:.1f}, new dim: {layer.rank}"
            )


def _lines(
    options: Resizing,
    layers: tuple[Resized, ...],
    kept: Mapping[str, Kept],
    alpha: float,
    family: ModelFamily,
) -> Iterator[str]:
    yield from table_of_parts(kept, family)
    magnitudes = sum("dora_scale" in layer.tensors for layer in layers)
    if magnitudes:
        yield f"{counted(magnitudes, 'layer')} of DoRA: magnitudes are kept, the error is that of the change before them"
    norms = [layer.name for layer in layers if not layer.rank]
    if norms:
        yield f"kept as they are, without a rank: {some_names(norms, 3)}"
    size = options.target.stat().st_size
    yield f"{options.target}: {counted(len(layers), 'layer')}, alpha {alpha:g}; {size / 2**20:.1f} MiB"
    yield readers_sentence(readings(read_header(open_tensor_file(options.target), family)))
