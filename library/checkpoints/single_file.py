"""The parts of a model in one file of the original layout, and what else the file holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from library.checkpoints.inferred_configs import config_hints, infer_config, pooled_width
from library.checkpoints.ldm_keys import (
    UNET_PREFIX,
    VAE_PREFIX,
    VIEWS,
    KeyTable,
    modern_vae_name,
    text_table,
    unet_table,
    vae_table,
)
from library.checkpoints.parts import UNET, VAE, ModelPart, TensorSource
from library.checkpoints.tensor_places import TensorFile
from library.errors import UserError
from library.families.detect import family_of_checkpoint
from library.families.family import EPSILON, V_PREDICTION, ModelFamily, PredictionType

# Tensors that belong to no part by right: averages and schedules of training, counters, and CLIP's other half.
_IGNORED = re.compile(
    r"^model_ema\.|^(cond_stage_model\.model|first_stage_model)\.model_ema|^first_stage_model\.loss\.|^loss\.|^safety_checker\."
    r"|position_ids$|\.attn_mask$|logit_scale$|text_projection(\.weight)?$|^(v_pred|ztsnr)$|^scale_factor$|^denoiser\.sigmas$"
    r"|^(betas|logvar|lvlb_weights)$|^(alphas|sqrt|log_one_minus|posterior)_\w+$|^cond_stage_model\.transformer\.vision_model\."
)


@dataclass(frozen=True)
class CheckpointContent:
    """What a single file holds.

    Attributes:
        family: which models it is one of.
        parts: by kind.
        beside: keys that are known and belong to no part (averages, schedules, the text encoder's unused layer).
        unmatched: keys that nobody knows.
        prediction_type: what the file says it predicts; None where it does not say.
    """

    family: ModelFamily
    parts: Mapping[str, ModelPart]
    beside: tuple[str, ...]
    unmatched: tuple[str, ...]
    prediction_type: PredictionType | None


def read_checkpoint(file: TensorFile) -> CheckpointContent:
    """Account for every key of a checkpoint.

    Raises:
        UserError: for files of other families or kinds, or without one of the parts.
    """
    where = str(file.path)
    shapes = file.shapes()
    family = family_of_checkpoint(shapes, where=where)
    parts = _parts(file, family)
    used = {source.key for part in parts.values() for source in part.sources.values()}
    rest = [key for key in file.places if key not in used]
    dropped = tuple(_dropped_text_layers(family, shapes, parts))
    beside = tuple(key for key in rest if _IGNORED.search(key) or key.startswith(dropped))
    unmatched = tuple(key for key in rest if key not in set(beside))
    return CheckpointContent(family, parts, beside, unmatched, _prediction_type_said(file, family))


def _parts(file: TensorFile, family: ModelFamily) -> dict[str, ModelPart]:
    prefixes = {kind: _prefix_in(file.places, kind, family) for kind in family.parts}
    texts = {kind: _part(file, kind, prefixes[kind], family) for kind in family.parts if kind not in (UNET, VAE)}
    pooled = pooled_width(family, {kind: part.config for kind, part in texts.items()})
    images = {kind: _part(file, kind, prefixes[kind], family, pooled=pooled) for kind in (UNET, VAE)}
    return images | texts


def original_prefixes(kind: str, family: ModelFamily) -> tuple[str, ...]:
    """How the keys of a part may begin in single files; the first is written."""
    known = {UNET: (UNET_PREFIX,), VAE: (VAE_PREFIX,)}
    return known[kind] if kind in known else family.text_encoder(kind).file_prefixes


def _prefix_in(shapes: Iterable[str], kind: str, family: ModelFamily) -> str:
    """The one that a file has."""
    prefixes = original_prefixes(kind, family)
    return next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in shapes)), prefixes[0])


def _dropped_text_layers(family: ModelFamily, shapes: Iterable[str], parts: Mapping[str, ModelPart]) -> Iterator[str]:
    """Beginnings of the keys of layers that the family leaves out."""
    for encoder in family.text_encoders:
        prefix, kept = _prefix_in(shapes, encoder.part, family), parts[encoder.part].config["num_hidden_layers"]
        for number in range(encoder.layers_dropped):
            yield f"{prefix}transformer.resblocks.{kept + number}."


def _part(file: TensorFile, kind: str, prefix: str, family: ModelFamily, *, pooled: int | None = None) -> ModelPart:
    shapes = {key.removeprefix(prefix): shape for key, shape in file.shapes().items() if key.startswith(prefix)}
    where = str(file.path)
    config = infer_config(kind, shapes, family, where, pooled=pooled)
    config |= config_hints(file.metadata, where).get(kind, {})
    sources = dict(_sources(file, prefix, original_table(kind, config, family)))
    return ModelPart(kind=kind, config=config, sources=sources, where=where)


def original_table(kind: str, config: Mapping[str, object], family: ModelFamily) -> KeyTable:
    """The table of names for one part of one model."""
    if kind == UNET:
        return unet_table(config)
    if kind == VAE:
        return vae_table(config)
    layers = config["num_hidden_layers"]
    if not isinstance(layers, int):
        raise TypeError("num_hidden_layers is not a number")
    return text_table(family.text_encoder(kind), layers)


def _sources(file: TensorFile, prefix: str, table: KeyTable) -> Iterator[tuple[str, TensorSource]]:
    for key in file.places:
        if not key.startswith(prefix) or key.endswith("position_ids"):
            continue
        name = table.to_module(key.removeprefix(prefix))
        if name is not None:
            yield name, TensorSource(file, key)
            continue
        for view in VIEWS:
            name = table.to_module(f"{key.removeprefix(prefix)}[{view}]")
            if name is not None:
                yield name, TensorSource(file, key, view)


_SAID: Mapping[str, PredictionType] = {
    "epsilon": EPSILON,
    "eps": EPSILON,
    "v": V_PREDICTION,
    "v_prediction": V_PREDICTION,
    "v-prediction": V_PREDICTION,
}


def _prediction_type_said(file: TensorFile, family: ModelFamily) -> PredictionType | None:
    """From the key that v-predicting fine-tunes carry, from ModelSpec's field, or from its architecture's name."""
    if "v_pred" in file:
        return V_PREDICTION
    said = _SAID.get(file.metadata.get("modelspec.prediction_type", "").lower())
    names = family.architectures
    tells = names[V_PREDICTION] != names[EPSILON]
    if said is None and tells and file.metadata.get("modelspec.architecture") == names[V_PREDICTION]:
        return V_PREDICTION
    return said


def vae_of_file(file: TensorFile, family: ModelFamily) -> ModelPart:
    """The VAE of a file: a whole checkpoint, or a VAE alone in the original layout or in diffusers'.

    Raises:
        UserError: for files without one, and for models whose VAE is another one.
    """
    shapes, where = file.shapes(), str(file.path)
    if any(key.startswith(UNET_PREFIX) for key in shapes):
        whole = family_of_checkpoint(shapes, where=where)
        check_vae(whole.vae_config, family, where)  # the VAEs of families may have the same shapes, and other latents
    prefix = VAE_PREFIX if any(key.startswith(VAE_PREFIX) for key in shapes) else ""
    if f"{prefix}encoder.conv_in.weight" not in shapes:
        raise UserError("holds no VAE", where=where, remedy="give a VAE file, a checkpoint, or a diffusers folder")
    if f"{prefix}encoder.down_blocks.0.resnets.0.conv2.weight" in shapes:
        part = _diffusers_vae(file, prefix, family)
    else:
        part = _part(file, VAE, prefix, family)
    check_vae(part.config, family, where)
    return part


def _diffusers_vae(file: TensorFile, prefix: str, family: ModelFamily) -> ModelPart:
    """A VAE file in diffusers' layout: its sizes are found by renaming it to the original one's names first."""
    where = str(file.path)
    names = {key: modern_vae_name(key.removeprefix(prefix)) for key in file.places if key.startswith(prefix)}
    levels = 1 + max(int(match[1]) for name in names.values() if (match := re.match(r"encoder\.down_blocks\.(\d+)\.", name)))
    layers = len(
        [name for name in names.values() if re.match(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight$", name)]
    )
    table = vae_table({"block_out_channels": (0,) * levels, "layers_per_block": layers})
    originals = {table.to_original(name): file.shape(key) for key, name in names.items()}
    shapes = {original: shape for original, shape in originals.items() if original is not None}
    config = infer_config(VAE, shapes, family, where) | config_hints(file.metadata, where).get(VAE, {})
    return ModelPart(
        kind=VAE,
        config=config,
        sources={name: TensorSource(file, key) for key, name in names.items()},
        where=where,
    )


_SCALE_OF_OLD_CONFIGS = 0.18215  # diffusers before 0.10 did not write it


def check_vae(config: Mapping[str, object], family: ModelFamily, where: str) -> None:
    """Refuse a VAE that loads but speaks of other latents.

    Raises:
        UserError: other channels, or another scale (the VAEs of families may have the same shapes).
    """
    channels = config.get("latent_channels", family.latent_channels)
    if channels != family.latent_channels:
        raise UserError(f"its VAE has {channels} latent channels, not {family.latent_channels}", where=where)
    scale = config.get("scaling_factor", _SCALE_OF_OLD_CONFIGS)
    if scale != family.latent_scale:
        raise UserError(
            f"its VAE scales latents by {scale}, while {family.title} takes {family.latent_scale}",
            where=where,
            remedy="give a VAE of the same family",
        )
