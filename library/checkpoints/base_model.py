"""A base model, whatever the path holds: known from headers alone, loaded part by part when asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.folder import part_of_folder, parts_of_folder, prediction_type_of_folder
from library.checkpoints.hashes import remembered
from library.checkpoints.hub import resolve_model_path
from library.checkpoints.parts import PART_TITLES, UNET, VAE, ModelPart, content_fingerprint
from library.checkpoints.single_file import check_vae, read_checkpoint, vae_of_file
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tokenizers import load_tokenizer, shipped_tokenizer
from library.errors import UserError
from library.families.detect import check_only_family, family_of_folder
from library.families.family import EPSILON, V_PREDICTION, ModelFamily, PredictionType

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from library.checkpoints.packed_weights import WeightFormat


@dataclass(frozen=True, kw_only=True)
class BaseModelFiles:
    """What a path holds.

    Attributes:
        family: which models it is one of.
        path: the file or folder (of a model from the Hub, its place in the cache).
        name: the path's last part, without the suffix of a file.
        prediction_type: what the model says it predicts; None where it does not say.
        resolved_prediction_type: what it is taken to predict: what it says, else what the user says, else the noise.
        prediction_type_assumed: nobody says it, and models of the family differ in it: worth a word to the user.
        parts: `ModelFamily.parts`, by kind.
        tokenizer_folders: the model's own tokenizers, where it has some, by their text encoder's kind.
        beside: keys of a single file that belong to no part (averages, schedules, unused layers).
        unmatched: keys of a single file that nobody knows; worth a word to the user.
    """

    family: ModelFamily
    path: Path
    name: str
    prediction_type: PredictionType | None
    resolved_prediction_type: PredictionType
    prediction_type_assumed: bool
    parts: Mapping[str, ModelPart]
    tokenizer_folders: Mapping[str, Path] = field(default_factory=dict)
    beside: tuple[str, ...] = field(default=())
    unmatched: tuple[str, ...] = field(default=())

    def load_denoiser(
        self, *, dtype: torch.dtype, device: torch.device | str, weight_format: WeightFormat | None = None
    ) -> UNet2DConditionModel:
        """The U-Net, frozen, in evaluation mode; `UserError` where the file lacks some of it."""
        return self.parts[UNET].load(dtype=dtype, device=device, weight_format=weight_format)

    def load_vae(self, *, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
        """The autoencoder, frozen, in evaluation mode."""
        return self.parts[VAE].load(dtype=dtype, device=device)

    def load_text_encoders(
        self, *, dtype: torch.dtype, device: torch.device | str, weight_format: WeightFormat | None = None
    ) -> list[CLIPTextModel]:
        """The text encoders, frozen, in evaluation mode, in the family's order."""
        parts = [self.parts[encoder.part] for encoder in self.family.text_encoders]
        return [part.load(dtype=dtype, device=device, weight_format=weight_format) for part in parts]

    def empty_denoiser(self) -> UNet2DConditionModel:
        """The U-Net on the meta device: its structure at no cost."""
        return self.parts[UNET].build_empty()

    def empty_text_encoders(self) -> list[CLIPTextModel]:
        """The text encoders likewise."""
        return [self.parts[encoder.part].build_empty() for encoder in self.family.text_encoders]

    def load_tokenizers(self) -> list[CLIPTokenizer]:
        """One tokenizer per text encoder: the model's own where it has one, else the one shipped with this package."""
        folders = [self.tokenizer_folders.get(encoder.part) for encoder in self.family.text_encoders]
        return [
            shipped_tokenizer(encoder) if folder is None else load_tokenizer(folder)
            for encoder, folder in zip(self.family.text_encoders, folders, strict=True)
        ]

    @property
    def own_side(self) -> int:
        """Pixels along one side of the pictures that the model was made for."""
        latents = self.parts[UNET].config.get("sample_size")
        if isinstance(latents, int) and latents != self.family.unet_config["sample_size"]:
            return latents * self.family.latent_factor
        return self.family.default_resolution[self.resolved_prediction_type]

    def notes(self) -> list[str]:
        """What is taken for granted about the model, for the user to read."""
        notes = []
        if self.prediction_type_assumed:
            what = f"{self.path} does not say what it predicts: noise is assumed"
            notes.append(f"{what}; give --v_parameterization if that is wrong")
        if self.unmatched:
            count, first = len(self.unmatched), self.unmatched[0]
            notes.append(f"{self.path}: {count} tensors belong to no known part ({first}, ...)")
        return notes

    def check_clip_skip(self, clip_skip: int | None) -> None:
        """Refuse to skip more layers than the text encoder has.

        Raises:
            UserError
        """
        parts = [self.parts[encoder.part] for encoder in self.family.text_encoders]
        fewest, part = min((part.config["num_hidden_layers"], part.kind) for part in parts)
        if clip_skip is not None and clip_skip > fewest:
            where = f"--clip_skip {clip_skip}"
            raise UserError(f"the {PART_TITLES[part]} has {fewest} layers", where=where, remedy=f"give 1 to {fewest}")

    def vae_fingerprint(self) -> str:
        """16 hex digits for the VAE's values as saved, for the keys of latent caches; remembered per file."""
        return self._fingerprint(VAE)

    def text_encoders_fingerprint(self) -> str:
        """The same for the text encoders' values, for the keys of text caches."""
        return " ".join(self._fingerprint(encoder.part) for encoder in self.family.text_encoders)

    def _fingerprint(self, kind: str) -> str:
        part = self.parts[kind]
        files = sorted({source.file.path for source in part.sources.values()})
        return remembered(f"{kind}_fingerprint", files, lambda: content_fingerprint(part))


def open_base_model(
    path: Path | str,
    *,
    vae_path: Path | str | None = None,
    v2: bool | None = None,
    v_parameterization: bool | None = None,
    variant: str | None = None,
    refiner: bool = False,
    family: str | None = None,
) -> BaseModelFiles:
    """Find out what a path holds.

    Args:
        path: a diffusers folder, a checkpoint file in the original layout, or the id of a model on the Hugging Face Hub,
            which is asked only where nothing local has that name.
        vae_path: another VAE: a diffusers VAE folder, a model folder, a checkpoint, or a VAE file.
        v2: what the user says about the family; None where nothing is said.
        v_parameterization: what the user says about the prediction; None where nothing is said.
        variant: which weights of a folder ("fp16"); None for the plain ones, or the only ones.
        refiner: take a model that finishes others' pictures, instead of one that draws.
        family: name of the only family that will do; None for any.

    Raises:
        UserError: not found, not a model of a known family, a part missing, or in contradiction to what the user says.
    """
    found = resolve_model_path(path)
    model = _open_folder(found, variant, v_parameterization) if found.is_dir() else _open_file(found, v_parameterization)
    _check_family(model, v2)
    if (model.family.refines is not None) is not refiner:
        remedy = "give a refiner" if refiner else "give a model that draws from noise"
        raise UserError(f"is {model.family.title}", where=str(model.path), remedy=remedy)
    check_only_family(model.family, family, where=str(model.path))
    if vae_path is None:
        return model
    vae = open_vae(vae_path, model.family)
    return BaseModelFiles(**{**vars(model), "parts": {**model.parts, VAE: vae}})


def _open_file(path: Path, v_parameterization: bool | None) -> BaseModelFiles:
    content = read_checkpoint(open_tensor_file(path))
    check_vae(content.parts[VAE].config, content.family, str(path))
    return BaseModelFiles(
        family=content.family,
        path=path,
        name=path.stem,
        prediction_type=content.prediction_type,
        resolved_prediction_type=resolve_prediction_type(content.prediction_type, v_parameterization, str(path)),
        prediction_type_assumed=_is_assumed(content.prediction_type, v_parameterization, content.family),
        parts=content.parts,
        beside=content.beside,
        unmatched=content.unmatched,
    )


def _open_folder(path: Path, variant: str | None, v_parameterization: bool | None) -> BaseModelFiles:
    family = family_of_folder(path)
    parts = parts_of_folder(path, family, variant)
    check_vae(parts[VAE].config, family, str(path))
    said = prediction_type_of_folder(path)
    tokenizers = {encoder.part: path / encoder.tokenizer for encoder in family.text_encoders}
    return BaseModelFiles(
        family=family,
        path=path,
        name=Path(os.path.abspath(path)).name,
        prediction_type=said,
        resolved_prediction_type=resolve_prediction_type(said, v_parameterization, str(path)),
        prediction_type_assumed=_is_assumed(said, v_parameterization, family),
        parts=parts,
        tokenizer_folders={part: folder for part, folder in tokenizers.items() if folder.is_dir()},
    )


def resolve_prediction_type(said: PredictionType | None, v_parameterization: bool | None, where: str) -> PredictionType:
    """What a model predicts, from what it says itself and what the user says (None: nothing).

    Raises:
        UserError: where the two contradict each other: such a training would learn nonsense.
    """
    wishes: dict[bool | None, PredictionType | None] = {True: V_PREDICTION, False: EPSILON, None: None}
    wished = wishes[v_parameterization]
    if said is None or wished is None or said == wished:
        return said or wished or EPSILON
    if said == EPSILON:
        raise UserError(
            "this model predicts the noise (epsilon), not v", where=where, remedy="leave out --v_parameterization"
        )
    raise UserError("this model predicts v, but v_parameterization is false", where=where, remedy="set --v_parameterization")


def _is_assumed(said: PredictionType | None, v_parameterization: bool | None, family: ModelFamily) -> bool:
    return said is None and v_parameterization is None and len(family.prediction_types) > 1


def _check_family(model: BaseModelFiles, v2: bool | None) -> None:
    if v2 is None or v2 is model.family.is_v2:
        return
    if v2:
        raise UserError(f"--v2 was given, but this is {model.family.title}", where=str(model.path), remedy="leave out --v2")
    raise UserError(f"v2 is false, but this is {model.family.title}", where=str(model.path), remedy="set --v2")


def open_vae(path: Path | str, family: ModelFamily) -> ModelPart:
    """A VAE from a folder of its own, a model folder, a checkpoint, a VAE file, or the Hub.

    Raises:
        UserError: not found, no VAE, or one of another kind of latents.
    """
    found = resolve_model_path(path)
    if not found.is_dir():
        return vae_of_file(open_tensor_file(found), family)
    folder = found / VAE if (found / VAE).is_dir() else found
    if not (folder / "config.json").is_file():
        raise UserError("holds no VAE (no config.json)", where=str(found), remedy="give a VAE folder or file")
    part = part_of_folder(folder, VAE)
    if part.config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise UserError(f"is no VAE, but {part.config['_class_name']}", where=str(found))
    check_vae(part.config, family, str(found))
    return part
