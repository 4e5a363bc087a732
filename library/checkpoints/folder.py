"""The parts of a model in a diffusers folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.checkpoints.ldm_keys import modern_vae_name
from library.checkpoints.parts import PART_TITLES, TEXT_CLASSES, TEXT_ENCODER, VAE, ModelPart, TensorSource
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_places import TensorFile
from library.errors import UserError
from library.families.family import EPSILON, PREDICTION_TYPES, ModelFamily, PredictionType
from library.text_files import read_json_object

_WEIGHTS_STEMS = dict.fromkeys(TEXT_CLASSES, ("model", "pytorch_model"))
_DIFFUSERS_STEMS = ("diffusion_pytorch_model",)
_SUFFIXES = (".safetensors", ".bin")

# Beside a text encoder's own tensors, folders may hold these: a computed buffer, and the projection where it is not used.
_COMPUTED = "position_ids"
_PROJECTION = "text_projection."


def parts_of_folder(path: Path, family: ModelFamily, variant: str | None = None) -> dict[str, ModelPart]:
    """Every part of a model folder by kind, from configurations and headers.

    Args:
        variant: which of several sets of weights ("fp16"); None for the plain one, or the only one.

    Raises:
        UserError: where a part, its configuration or its weights are missing.
    """
    return {kind: part_of_folder(path / kind, kind, variant) for kind in family.parts}


def part_of_folder(path: Path, kind: str, variant: str | None = None) -> ModelPart:
    """One part from its own folder (`unet/`, `vae/`, `text_encoder/`)."""
    config = read_json_object(path / "config.json", where=str(path / "config.json"))
    sources = {
        _module_name(kind, key): TensorSource(file, key)
        for file in _weight_files(path, kind, variant)
        for key in file.places
        if not _is_unused(kind, key)
    }
    return ModelPart(kind=kind, config=config, sources=sources, where=str(path))


def _is_unused(kind: str, key: str) -> bool:
    return kind in TEXT_CLASSES and (key.endswith(_COMPUTED) or (kind == TEXT_ENCODER and key.startswith(_PROJECTION)))


def _module_name(kind: str, key: str) -> str:
    if kind == TEXT_ENCODER:
        return key.removeprefix("text_model.")  # transformers before 5.6 has this level
    return modern_vae_name(key) if kind == VAE else key


def _weight_files(path: Path, kind: str, variant: str | None) -> Iterator[TensorFile]:
    """The file of a part, or all of them where it is split."""
    found = _find_weights(path, kind, variant)
    if found.suffix != ".json":
        yield open_tensor_file(found)
        return
    weight_map = read_json_object(found, where=str(found)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError("has no weight_map", where=str(found))
    for name in sorted(set(weight_map.values())):
        yield open_tensor_file(path / name)


def _find_weights(path: Path, kind: str, variant: str | None) -> Path:
    stems = _WEIGHTS_STEMS.get(kind, _DIFFUSERS_STEMS)
    infixes = [f".{variant}"] if variant else [""]
    if variant is None:
        infixes += sorted(_variants_in(path, stems))
    for infix in infixes:
        for suffix in _SUFFIXES:
            for stem in stems:
                for name in (f"{stem}{infix}{suffix}", f"{stem}{suffix}.index{infix}.json"):
                    if (path / name).is_file():
                        return path / name
    looked_for = f"{stems[0]}{infixes[0]}.safetensors"
    raise UserError(f"has no weights of the {PART_TITLES[kind]} (no {looked_for}, nor .bin)", where=str(path))


def _variants_in(path: Path, stems: tuple[str, ...]) -> set[str]:
    """Such as ".fp16" of `model.fp16.safetensors`; averages and what they were taken of are left to --variant."""
    pattern = re.compile(rf"(?:{'|'.join(stems)})(\.[a-z]\w*)\.(?:safetensors|bin)$")
    return {match[1] for entry in path.iterdir() if (match := pattern.match(entry.name)) and "ema" not in match[1]}


def scheduler_config(path: Path) -> Mapping[str, Any] | None:
    """The scheduler's configuration of a model folder; None where it has none."""
    file = path / "scheduler" / "scheduler_config.json"
    return read_json_object(file, where=str(file)) if file.is_file() else None


def prediction_type_of_folder(path: Path) -> PredictionType | None:
    """What a model folder says it predicts; None where it has no scheduler.

    Raises:
        UserError: for a type that is neither noise nor v.
    """
    config = scheduler_config(path)
    if config is None:
        return None
    said = config.get("prediction_type", EPSILON)  # diffusers before 0.8 knew only this one and did not write it
    for known in PREDICTION_TYPES:
        if said == known:
            return known
    raise UserError(f"predicts {said!r}, which is not supported", where=str(path / "scheduler"))
