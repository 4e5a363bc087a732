"""Writing a whole model, as one file of the original layout or as a diffusers folder, tensor by tensor.

`change` lets a caller alter tensors on their way (merging an adapter, say) without a copy of the model in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.atomic import atomic_write
from library.checkpoints.base_model import BaseModelFiles
from library.checkpoints.folder import scheduler_config
from library.checkpoints.inferred_configs import CONFIG_KEY, config_differences, infer_config, pooled_width
from library.checkpoints.ldm_keys import TRANSPOSED, split_view
from library.checkpoints.part_names import check_names
from library.checkpoints.parts import TEXT_CLASSES, UNET, VAE, ModelPart, check_tensors
from library.checkpoints.single_file import original_prefixes, original_table
from library.checkpoints.tensor_places import TensorFile
from library.checkpoints.tensor_writing import PlannedTensor, write_tensors
from library.errors import UserError
from library.families.family import NOISE_SCHEDULE, ModelFamily

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Change = Callable[[str, str, "Tensor"], "Tensor"]
"""(part, name in its module, tensor as stored) -> the tensor to write, of the same shape."""

_FLOATING = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")


def _saved_dtype(stored: str, wished: str | None) -> str:
    return wished if wished is not None and stored in _FLOATING else stored


def _plan(part: ModelPart, name: str, shape: tuple[int, ...], dtype: str | None, change: Change | None) -> PlannedTensor:
    """One tensor of a module, to be written in `shape` (its own, or that with ones behind it)."""
    source = part.sources[name]
    saved = _saved_dtype(source.file.places[source.key].dtype, dtype)

    def make() -> Tensor:
        import torch

        tensor = source.read()
        tensor = tensor if change is None else change(part.kind, name, tensor)
        return tensor.reshape(shape).to(getattr(torch, saved))

    return PlannedTensor(shape=shape, dtype=saved, make=make)


def _joined(thirds: list[PlannedTensor]) -> PlannedTensor:
    """Queries, keys and values as the one tensor of OpenCLIP."""

    def make() -> Tensor:
        import torch

        return torch.cat([third.make() for third in thirds])

    first = thirds[0]
    return PlannedTensor(shape=(3 * first.shape[0], *first.shape[1:]), dtype=first.dtype, make=make)


def _transposed(matrix: PlannedTensor) -> PlannedTensor:
    return PlannedTensor(shape=matrix.shape[::-1], dtype=matrix.dtype, make=lambda: matrix.make().T.contiguous())


def _prefix(kind: str, model: BaseModelFiles) -> str:
    return original_prefixes(kind, model.family)[0]


def _original_shape(kind: str, name: str, shape: tuple[int, ...], linear_projections: bool) -> tuple[int, ...]:
    """The shape that the original layout has: matrices or 1x1 convolutions, which hold the same numbers."""
    is_projection = kind == UNET and name.endswith((".proj_in.weight", ".proj_out.weight"))
    is_vae_attention = kind == VAE and ".attentions." in name and len(shape) >= 2
    if is_vae_attention or (is_projection and not linear_projections):
        return (*shape[:2], 1, 1)
    return shape[:2] if is_projection else shape


def plan_single_file(
    model: BaseModelFiles, *, dtype: str | None = None, change: Change | None = None, from_headers: bool = False
) -> dict[str, PlannedTensor]:
    """Every tensor of a checkpoint in the original layout.

    Args:
        model: from a folder or a file; a file's tensors beside its parts are kept, except for averages.
        dtype: "float16", "bfloat16" or "float32"; None keeps what is stored.
        change: applied to each tensor of the parts.
        from_headers: trust the shapes in the files instead of building the modules, which takes diffusers and transformers;
            it is still seen where a tensor is missing.

    Raises:
        UserError: where the model lacks tensors.
    """
    planned: dict[str, PlannedTensor] = {}
    thirds: dict[str, dict[int, PlannedTensor]] = {}
    for kind, part in model.parts.items():
        table = original_table(kind, part.config, model.family)
        if from_headers:
            check_names(part, table)
            shapes = {name: source.shape for name, source in part.sources.items()}
        else:
            shapes = part.module_shapes()
            check_tensors(part, shapes)
        for name, module_shape in shapes.items():
            original = table.to_original(name)
            if original is None:
                raise UserError(f"{name} has no place in the original layout", where=part.where)
            shape = _original_shape(kind, name, module_shape, model.family.linear_projections)
            tensor = _plan(part, name, shape, dtype, change)
            key, view = split_view(_prefix(kind, model) + original)
            if view in ("", TRANSPOSED):
                planned[key] = _transposed(tensor) if view else tensor
            else:
                thirds.setdefault(key, {})[int(view)] = tensor
    # A module lists its projections in an order of its own (keys, values, queries).
    planned |= {key: _joined([of_key[third] for third in range(3)]) for key, of_key in thirds.items()}
    kept = dict(_kept_beside(model, dtype))
    return {**planned, **(kept or _unused_text_layers(model, planned))}


def _kept_beside(model: BaseModelFiles, dtype: str | None) -> Iterator[tuple[str, PlannedTensor]]:
    """What a single file holds beside its parts; of averages there is none that fits changed weights."""
    file = next(iter(model.parts[UNET].sources.values())).file
    for key in (*model.beside, *model.unmatched):
        if not key.startswith("model_ema."):
            yield key, _copied(file, key, dtype)


def counters_of(model: BaseModelFiles) -> dict[str, int]:
    """What a checkpoint file of PyTorch counts beside its tensors ("epoch", "global_step"); empty for other models."""
    return dict(next(iter(model.parts[UNET].sources.values())).file.counters)


def _copied(file: TensorFile, key: str, dtype: str | None) -> PlannedTensor:
    place = file.places[key]
    saved = _saved_dtype(place.dtype, dtype)

    def make() -> Tensor:
        import torch

        return file.read(key).to(getattr(torch, saved))

    return PlannedTensor(shape=place.shape, dtype=saved, make=make)


def _unused_text_layers(model: BaseModelFiles, planned: Mapping[str, PlannedTensor]) -> dict[str, PlannedTensor]:
    """What OpenCLIP's text encoders have and no model uses, for readers that count it (SD2: the last layer).

    Its values mean nothing, so the last layer that is used stands in, as do ones for the scale, and the projection where a
    family has no use for it.
    """
    fabricated: dict[str, PlannedTensor] = {}
    for encoder in model.family.text_encoders:
        if encoder.layout != "open_clip":
            continue
        prefix, kept = encoder.file_prefixes[0], model.parts[encoder.part].config["num_hidden_layers"]
        last = f"{prefix}transformer.resblocks.{kept - 1}."
        for number in range(encoder.layers_dropped):
            unused = f"{prefix}transformer.resblocks.{kept + number}."
            fabricated |= {key.replace(last, unused): planned[key] for key in planned if key.startswith(last)}
        norm = planned[f"{prefix}ln_final.weight"]
        if not encoder.gives_pooled:
            fabricated[f"{prefix}text_projection"] = _ones((norm.shape[0], norm.shape[0]), norm.dtype)
        fabricated[f"{prefix}logit_scale"] = _ones((), norm.dtype)
    return fabricated


def _ones(shape: tuple[int, ...], dtype: str) -> PlannedTensor:
    def make() -> Tensor:
        import torch

        return torch.ones(shape, dtype=getattr(torch, dtype))

    return PlannedTensor(shape=shape, dtype=dtype, make=make)


def config_metadata(model: BaseModelFiles, planned: Mapping[str, PlannedTensor]) -> dict[str, str]:
    """The metadata entry that says what a single file's shapes do not; empty for models of the published sizes."""
    hints = {}
    pooled = pooled_width(model.family, {kind: part.config for kind, part in model.parts.items()})
    for kind, part in model.parts.items():
        prefix = _prefix(kind, model)
        shapes = {key.removeprefix(prefix): tensor.shape for key, tensor in planned.items() if key.startswith(prefix)}
        inferred = infer_config(kind, shapes, model.family, str(model.path), pooled=pooled)
        differences = config_differences(part.config, inferred)
        if differences:
            hints[kind] = differences
    return {CONFIG_KEY: json.dumps(hints)} if hints else {}


_WEIGHTS_NAMES = {UNET: "diffusion_pytorch_model", VAE: "diffusion_pytorch_model", **dict.fromkeys(TEXT_CLASSES, "model")}


def write_folder(
    model: BaseModelFiles,
    path: Path,
    *,
    dtype: str | None = None,
    change: Change | None = None,
    variant: str | None = None,
    reference: Path | None = None,
) -> None:
    """Write a diffusers folder: weights as safetensors, configurations, tokenizer, scheduler.

    Args:
        model: from a folder or a file.
        path: the folder, made where it is missing; files of the same names in it are replaced.
        dtype, change: as for `plan_single_file`.
        variant: goes into the names of the weights ("fp16").
        reference: a model folder whose scheduler and tokenizer are copied.

    Raises:
        UserError: where the model lacks tensors, or the folder cannot be written.
    """
    try:
        for name in (*model.parts, "scheduler", *(encoder.tokenizer for encoder in model.family.text_encoders)):
            (path / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder cannot be made ({error.strerror})", where=str(path)) from None
    for kind, part in model.parts.items():
        _write_part(part, path / kind, dtype, change, variant)
    source = reference or (model.path if model.path.is_dir() else None)
    _write_tokenizers(model, source, path)
    known = scheduler_config(source) if source else None
    schedule = known if known is not None else {"_class_name": "DDIMScheduler", **NOISE_SCHEDULE}
    scheduler = {**schedule, "prediction_type": model.resolved_prediction_type}
    _write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(path / "model_index.json", model_index(model.family, scheduler.get("_class_name", "DDIMScheduler")))


def _write_part(part: ModelPart, folder: Path, dtype: str | None, change: Change | None, variant: str | None) -> None:
    module = part.build_empty()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_tensors(part, shapes)
    # transformers before 5.6 knows its tensors by this level only, later ones by either name.
    prefix = "text_model." if part.kind in TEXT_CLASSES and "final_layer_norm.weight" in shapes else ""
    planned = {prefix + name: _plan(part, name, shape, dtype, change) for name, shape in shapes.items()}
    infix = f".{variant}" if variant else ""
    write_tensors(folder / f"{_WEIGHTS_NAMES[part.kind]}{infix}.safetensors", planned, {"format": "pt"})
    if part.kind in TEXT_CLASSES:
        module.config.architectures = [TEXT_CLASSES[part.kind]]
        module.config.save_pretrained(folder)
    else:
        module.save_config(folder)


def _write_tokenizers(model: BaseModelFiles, source: Path | None, path: Path) -> None:
    for encoder, tokenizer in zip(model.family.text_encoders, model.load_tokenizers(), strict=True):
        folder = path / encoder.tokenizer
        own = source / encoder.tokenizer if source else None
        if own is None or not own.is_dir():
            tokenizer.save_pretrained(str(folder))
        elif own.resolve() != folder.resolve():
            shutil.copytree(own, folder, dirs_exist_ok=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def model_index(family: ModelFamily, scheduler_class: str) -> dict[str, Any]:
    """What a folder's `model_index.json` says: diffusers finds the parts by it."""
    return {
        **family.pipeline,
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", scheduler_class],
        **{encoder.part: ["transformers", TEXT_CLASSES[encoder.part]] for encoder in family.text_encoders},
        **{encoder.tokenizer: ["transformers", "CLIPTokenizer"] for encoder in family.text_encoders},
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def same_tensors(written: BaseModelFiles, model: BaseModelFiles, dtype: str | None) -> None:
    """Compare what was written, re-opened, with what it was made from.

    Raises:
        RuntimeError: where a tensor differs; the writer is at fault then.
    """
    import torch

    for kind, mine in model.parts.items():
        theirs = written.parts[kind]
        if set(mine.sources) != set(theirs.sources):
            raise RuntimeError(f"{written.path}: the names of the {kind} differ from those of {model.path}")
        for name, source in mine.sources.items():
            expected = source.read()
            saved: torch.dtype = getattr(torch, _saved_dtype(str(expected.dtype).removeprefix("torch."), dtype))
            found = theirs.sources[name].read()
            if found.dtype != saved or not _equal(expected.to(saved).flatten(), found.flatten()):
                raise RuntimeError(f"{written.path}: {name} of the {kind} is not what was read from {model.path}")


def _equal(tensor: Tensor, other: Tensor) -> bool:
    """Bit for bit, so that a NaN equals itself."""
    import torch

    same_size = tensor.shape == other.shape
    return same_size and torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
