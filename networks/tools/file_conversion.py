"""Converting an adapter file: read layer by layer, planned and asked of the readers before anything is written, and proved.

What is written is opened again: its bytes are compared with what was meant, its changes with those of the source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from library.checkpoints.tensor_files import open_tensor_file
from library.errors import UserError, counted, some_names
from library.families.detect import DEFAULT_FAMILY
from library.families.family import ModelFamily
from library.parallel import over_cores
from networks.core.algorithms import algorithm_of
from networks.formats.base_weights import BaseWeights
from networks.formats.file_adapters import FileLayers, default_lines, family_of_adapter_file, stream_layers
from networks.formats.files import save_tensors
from networks.formats.keys import to_peft
from networks.formats.readers import READERS, readers_sentence, readings
from networks.formats.reading import Reader, read_by
from networks.tools.comparing import is_finite, same_values
from networks.tools.conversion import (
    DOWN,
    UP,
    CannotHold,
    LayerError,
    LayerTensors,
    SourceLayer,
    as_full,
    as_lora,
    form_for,
    header_of,
    lost_and_had,
    with_one_alpha,
    with_whole_attention,
    with_width_shown,
)
from networks.tools.layer_errors import (
    Kept,
    approximation_panels,
    layers_content,
    relative_error,
    spectrum,
    table_of_parts,
)
from networks.tools.reports import ToolReport

if TYPE_CHECKING:
    from library.checkpoints.tensor_places import TensorFile

Layout = Literal["kohya", "diffusers"]
DTYPES: Mapping[str, torch.dtype] = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class FileConversion:
    """What is asked for.

    Attributes:
        source, target: files.
        layout: of the target's keys.
        algorithm: "lora" or "full"; None for what each layer is, or what the readers want.
        rank: of LoRA at most; None for as much as is exact.
        base: checkpoint, folder or Hub id of the model that it was trained on; None without one.
        readers: names in `READERS`; every layer gets a form that all of them apply rightly. Empty: none are asked.
        precision: in `DTYPES`; None for the source's.
        leave_out: write without what the form cannot hold.
    """

    source: Path
    target: Path
    layout: Layout = "kohya"
    algorithm: Literal["lora", "full"] | None = None
    rank: int | None = None
    base: str | None = None
    readers: tuple[str, ...] = ()
    precision: str | None = None
    leave_out: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of a layer.

    Attributes:
        name: ours.
        form: "loha: LoRA".
        tensors: None where it is left out.
        dtype: to save it in.
        loss: what of it is left out; None for nothing.
        is_changed: whether the form is another one than it had.
    """

    name: str
    form: str
    tensors: LayerTensors | None
    dtype: torch.dtype
    loss: str | None
    is_changed: bool


@dataclass
class Plan:
    """What the target holds.

    Attributes:
        layers: by our names.
        dtypes: of each layer.
        forms: "loha: LoRA" -> number of layers.
        losses: layer -> what of it is left out.
        changed: layers that are written in another form than they have.
    """

    layers: dict[str, LayerTensors] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    forms: Counter[str] = field(default_factory=Counter)
    losses: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def take(self, decision: Decision) -> None:
        """Add a layer."""
        if decision.loss is not None:
            self.losses[decision.name] = decision.loss
        if decision.tensors is None:
            return
        self.forms[decision.form] += 1
        self.layers[decision.name] = decision.tensors
        self.dtypes[decision.name] = decision.dtype
        if decision.is_changed:
            self.changed.add(decision.name)


@torch.no_grad()
def convert_file(options: FileConversion, *, progress: Callable[[int, int], None] | None = None) -> ToolReport:
    """Convert a file.

    Args:
        options: what is asked for.
        progress: called with the layers done and their number.

    Raises:
        UserError: what cannot be converted so, before anything is written; or a place that cannot be written to.
    """
    try:
        return _convert(open_tensor_file(options.source), options, progress)
    except LayerError as error:
        raise UserError(error.what, where=f"{options.source}, {error.where}", remedy=error.remedy) from None


def _convert(file: TensorFile, options: FileConversion, progress: Callable[[int, int], None] | None) -> ToolReport:
    base = BaseWeights.open(options.base)
    family = family_of_adapter_file(file, base.model.family if base else DEFAULT_FAMILY)
    if base is not None:
        base.check_family(family, f"--base {options.base}")
    asked = [READERS[name] for name in options.readers]
    plan = Plan()

    def decide(layer: tuple[str, LayerTensors]) -> Decision:
        return _decision(SourceLayer.read(*layer, family, base), options, asked, family)

    total = len(FileLayers(file, family).names)
    for done, decision in enumerate(over_cores(decide, stream_layers(file, family)), start=1):
        plan.take(decision)
        if progress is not None:
            progress(done, total)
    _refuse_losses(plan, options)
    if not plan.layers:
        raise UserError("nothing is left to write", where=str(options.source))
    if asked:
        _fit_together(plan, asked, family, base, options)
    _round(plan)
    tensors, said = _named(plan.layers, options, family)
    _check_readers(asked, tensors, family, options)
    converted = _converted(file, family, base, plan)
    save_tensors(options.target, tensors, None, _metadata(file.metadata, plan, options) | said)
    prove(options.target, tensors, plan.layers, family)
    notes = [] if base else default_lines(file, family)
    spectra = cache(lambda: _spectra(plan))
    return ToolReport(
        lines=[
            *_lines(plan, options),
            *_error_lines(converted, family),
            *notes,
            _last_line(options.target, asked, family),
        ],
        content=lambda: _content(plan, options, converted, spectra()),
        panels=lambda: approximation_panels(converted, spectra(), family),
    )


def _decision(layer: SourceLayer, options: FileConversion, asked: Sequence[Reader], family: ModelFamily) -> Decision:
    """Decide on a layer's form."""
    found = algorithm_of({tensor: tuple(value.shape) for tensor, value in layer.tensors.items()}) or "unknown"
    loss, tensors = None, None
    try:
        form, tensors = _form(layer, options, asked, family)
    except CannotHold as error:
        form, loss = "LoRA without bias", str(error)
        if options.leave_out and not layer.known_adapter().spec.is_norm:
            tensors = as_lora(layer, options.rank, without_bias=True)
    floats = [value.dtype for value in layer.tensors.values() if value.is_floating_point()]
    return Decision(
        name=layer.name,
        form=f"{found}: {form}",
        tensors=tensors,
        dtype=DTYPES[options.precision] if options.precision else max(floats, key=lambda d: d.itemsize),
        loss=loss,
        is_changed=tensors is not layer.tensors,
    )


def _form(
    layer: SourceLayer, options: FileConversion, asked: Sequence[Reader], family: ModelFamily
) -> tuple[str, LayerTensors]:
    if options.algorithm == "lora":
        return "LoRA", as_lora(layer, options.rank)
    if options.algorithm == "full":
        return "the full difference", as_full(layer)
    return form_for(layer, asked, options.rank, family) if asked else ("as it is", layer.tensors)


def _refuse_losses(plan: Plan, options: FileConversion) -> None:
    """Say what would be lost, unless that is allowed."""
    if plan.losses and not options.leave_out:
        reasons = "; ".join(dict.fromkeys(plan.losses.values()))
        names = some_names(list(plan.losses), 3)
        raise UserError(
            f"something of {counted(len(plan.losses), 'layer')} would be lost ({names}): {reasons}",
            where=str(options.source),
            remedy="use --leave_out to write the file without it, or choose another form",
        )


def _fit_together(
    plan: Plan, asked: Sequence[Reader], family: ModelFamily, base: BaseWeights | None, options: FileConversion
) -> None:
    """What the readers want of the layers together: whole attention, a layer that shows the family, one alpha."""
    before = plan.layers
    if not _all_right(plan.layers, asked, family):
        plan.layers = with_whole_attention(plan.layers)
    if any(reader.wants_width and not _all_right(plan.layers, [reader], family) for reader in asked):
        plan.layers = with_width_shown(plan.layers, family, options.rank, base)
    if any(reader.wants_one_alpha for reader in asked):
        plan.layers = with_one_alpha(plan.layers)
    usual = next(iter(plan.dtypes.values()))
    plan.dtypes = {name: plan.dtypes.get(name, usual) for name in plan.layers}
    plan.changed |= {name for name, tensors in plan.layers.items() if before.get(name) is not tensors}


def _all_right(layers: Mapping[str, LayerTensors], asked: Sequence[Reader], family: ModelFamily) -> bool:
    header = header_of(flat(layers), family)
    return all(read_by(reader, header).is_right for reader in asked)


def flat(layers: Mapping[str, LayerTensors]) -> dict[str, Tensor]:
    """Layers by name as the tensors of a file."""
    return {f"{name}.{tensor}": value for name, tensors in layers.items() for tensor, value in tensors.items()}


def _round(plan: Plan) -> None:
    """Bring every tensor to its layer's type."""

    def work(name: str) -> LayerTensors:
        return {tensor: rounded(value, plan.dtypes[name]) for tensor, value in plan.layers[name].items()}

    names = list(plan.layers)
    for name, tensors in zip(names, over_cores(work, names), strict=True):
        plan.layers[name] = tensors


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the type to save; an alpha that would lose digits, and values beyond the type's range, stay in fp32."""
    value = value.detach().cpu()
    if not value.is_floating_point():
        return value.contiguous()
    rounded = value.to(dtype)
    exact = value.dim() > 0 or torch.equal(rounded.float(), value.float())
    kept = exact and (is_finite(rounded) or not is_finite(value))
    return (rounded if kept else value.float()).contiguous()


def _named(
    layers: Mapping[str, LayerTensors], options: FileConversion, family: ModelFamily
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under the names of the target's layout, and metadata that belong to it."""
    if options.layout == "kohya":
        return flat(layers), {}
    try:
        return to_peft(flat(layers), family)
    except UserError as error:
        raise UserError(error.what, where=str(options.source), remedy="use --to kohya, or --algorithm lora") from None


def _check_readers(
    asked: Sequence[Reader], tensors: Mapping[str, Tensor], family: ModelFamily, options: FileConversion
) -> None:
    results = [read_by(reader, header_of(tensors, family)) for reader in asked]
    faults = [str(result) for result in results if not result.is_right]
    if faults:
        where = f"--for {' '.join(options.readers)}"
        raise UserError(f"no form of this file is read rightly: {'; '.join(faults)}", where=where, remedy=_OTHER_READER)


_OTHER_READER = "leave --for out, or name another reader"


def _converted(file: TensorFile, family: ModelFamily, base: BaseWeights | None, plan: Plan) -> dict[str, Kept]:
    """Layer -> what is left of its change, for the layers whose tensors are not as they were."""

    def error(layer: tuple[str, LayerTensors]) -> tuple[str, Kept | None]:
        name, tensors = layer
        written = plan.layers.get(name)
        if written is None or _same(written, tensors):
            return name, None
        before, after = (SourceLayer.read(name, each, family, base) for each in (tensors, written))
        if not before.is_known or not after.is_known:
            return name, None
        lost, had = lost_and_had(before, after)
        return name, Kept(rank=len(written[DOWN]) if DOWN in written else 0, lost=lost, had=had)

    found = over_cores(error, stream_layers(file, family))
    return {name: kept for name, kept in found if kept is not None}


def _spectra(plan: Plan) -> dict[str, list[float]]:
    """Layer of LoRA -> singular values of what was written."""
    lora = {name: tensors for name, tensors in plan.layers.items() if DOWN in tensors}

    def found(tensors: LayerTensors) -> list[float]:
        up, down = (tensors[name].float().flatten(1) for name in (UP, DOWN))
        scale = float(tensors["alpha"]) / len(down) if "alpha" in tensors else 1.0
        return spectrum(up * scale, down)

    return dict(zip(lora, over_cores(found, lora.values()), strict=True))


def _content(
    plan: Plan, options: FileConversion, converted: Mapping[str, Kept], spectra: Mapping[str, list[float]]
) -> dict[str, object]:
    return {
        "model": str(options.source),
        "save_to": str(options.target),
        "forms": dict(plan.forms),
        "relative_error": relative_error(converted.values()),
        "layers": layers_content(converted, spectra),
        "as_they_were": [name for name in plan.layers if name not in converted],
        "left_out": plan.losses,
    }


def _same(written: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return written.keys() == other.keys() and all(same_values(written[name], other[name]) for name in written)


def _error_lines(converted: Mapping[str, Kept], family: ModelFamily) -> list[str]:
    if not converted:
        return ["the change is the same, bit for bit"]
    worst = max(converted, key=lambda name: converted[name].relative_error)
    return [
        *table_of_parts(converted, family),
        f"relative error of the change: {relative_error(converted.values()):.2g} of all "
        f"{counted(len(converted), 'converted layer')}, at most {converted[worst].relative_error:.2g} ({worst})",
    ]


def _lines(plan: Plan, options: FileConversion) -> list[str]:
    forms = ", ".join(f"{number} {form}" for form, number in plan.forms.items())
    ranks = sorted({len(tensors[DOWN]) for tensors in plan.layers.values() if DOWN in tensors})
    words = f"; ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"; rank {ranks[0]}" if ranks else ""
    size = sum(value.numel() * value.element_size() for tensors in plan.layers.values() for value in tensors.values())
    lines = [f"{options.target}: {counted(len(plan.layers), 'layer')} ({forms}){words}; {size / 2**20:.1f} MiB"]
    if plan.losses:
        reasons = "; ".join(dict.fromkeys(plan.losses.values()))
        lines.append(f"left out something of {counted(len(plan.losses), 'layer')}: {reasons}")
    return lines


def _last_line(target: Path, asked: Sequence[Reader], family: ModelFamily) -> str:
    from networks.formats.traits import read_header

    header = read_header(open_tensor_file(target), family)
    if not asked:
        return readers_sentence(readings(header))
    titles = ", ".join(reader.title for reader in asked if read_by(reader, header).is_right)
    return f"applied rightly by {titles} (re-opened and compared)"


_OF_THE_SOURCE = ("lora_adapter_metadata", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


def _metadata(source: Mapping[str, str], plan: Plan, options: FileConversion) -> dict[str, str]:
    """The source's metadata with what is different now; hashes are the writer's to add."""
    kept = {key: text for key, text in source.items() if key not in _OF_THE_SOURCE}
    if not plan.changed:
        return kept
    comment = kept.get("ss_training_comment", "None")
    told = f"converted from {options.source.name}"
    kept["ss_training_comment"] = told if comment in ("None", "") else f"{told}; {comment}"
    ranks = {str(len(tensors[DOWN])) for tensors in plan.layers.values() if DOWN in tensors}
    alphas = {f"{float(tensors['alpha']):g}" for tensors in plan.layers.values() if DOWN in tensors and "alpha" in tensors}
    for key, values in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
        kept.pop(key, None)
        if values:
            kept[key] = next(iter(values)) if len(values) == 1 else "Dynamic"
    kept.pop("ss_network_args", None)
    kept["ss_network_module"] = "networks.lora" if ranks else "networks.full"
    return kept


def prove(target: Path, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerTensors], family: ModelFamily) -> None:
    """Open the written file again: its tensors are those meant, and mean the layers that were meant.

    Raises:
        UserError: they are not; the file stays for inspection.
    """
    file = open_tensor_file(target)
    same = set(file.keys()) == set(tensors) and all(same_values(file.read(key), tensors[key]) for key in tensors)
    if same:
        read = dict(stream_layers(file, family))
        same = read.keys() == layers.keys() and all(_means(read[name], layers[name]) for name in layers)
    if not same:
        raise UserError("differs from what was meant", where=str(target), remedy="the disk may be at fault; save elsewhere")


def _means(read: Mapping[str, Tensor], meant: Mapping[str, Tensor]) -> bool:
    """Whether tensors say what was meant; a file may add the alpha that its absence means."""
    return all(name in read and same_values(read[name].reshape(value.shape), value) for name, value in meant.items())
