"""The ss_* metadata of a saved adapter: what sd-scripts writes, so that web UIs and model sites read it.

Values are `str()` of Python values, or JSON where the field has always been JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.families.family import ModelFamily
from library.training.options import FORMAT_OPTIONS, TrainingOptions

MINIMAL = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the metadata tells of a run beside its options.

    Attributes:
        base_model: ss_sd_model_name, ss_sd_model_hash, ss_new_sd_model_hash and the like for the VAE.
        dataset: the fields about images, captions and buckets, as `library.dataset.report` gives them.
        train_samples, regularisation_samples: images in an epoch, repeats counted.
        optimizer: class and settings, "torch.optim.adamw.AdamW(weight_decay=0.01)".
    """

    session_id: int
    started_at: float
    seed: int
    base_model_version: str
    is_v2: bool
    base_model: Mapping[str, str]
    dataset: Mapping[str, str]
    optimizer: str
    network_dim: int | None
    network_alpha: float | None
    total_steps: int
    total_epochs: int
    batches_per_epoch: int
    train_samples: int
    regularisation_samples: int


def training_metadata(
    options: TrainingOptions, facts: RunFacts, *, step: int, epochs: int, finished_at: float
) -> dict[str, str]:
    """All ss_* fields of a file saved after `step` optimizer steps and `epochs` epochs.

    Returns:
        Name to text; only the few that readers need where the user asked for minimal metadata.
    """
    values = {
        **_about_the_run(options, facts),
        **_about_the_network(options, facts),
        **_about_the_method(options, facts),
        "ss_training_finished_at": finished_at,
        "ss_steps": step,
        "ss_epoch": epochs,
    }
    metadata = {name: str(value) for name, value in values.items()} | dict(facts.dataset) | dict(facts.base_model)
    if options.network.args or options.network.dropout is not None:
        arguments = dict(options.network.args)
        if options.network.dropout is not None:
            arguments["dropout"] = str(options.network.dropout)
        metadata["ss_network_args"] = json.dumps(arguments)
    if options.saving.minimal_metadata:
        return {name: metadata[name] for name in MINIMAL if name in metadata}
    return metadata


def base_model_metadata(path: Path, vae: str | None) -> dict[str, str]:
    """Names and hashes of the base model and of a VAE that replaces its own; hashing a file is remembered."""
    from library.checkpoints.hashes import legacy_model_hash, sha256_of_file

    files = {"sd_model": path} | ({"vae": Path(vae)} if vae else {})
    fields: dict[str, str] = {}
    for kind, file in files.items():
        fields[f"ss_{kind}_name"] = file.name
        if file.is_file():
            fields[f"ss_{kind}_hash"] = legacy_model_hash(file)
            fields[f"ss_new_{kind}_hash"] = sha256_of_file(file)
    return fields


def model_spec(
    options: TrainingOptions, family: ModelFamily, prediction_type: str, resolution: tuple[int, int]
) -> dict[str, str]:
    """The modelspec.* fields of a trained file."""
    import datetime

    from library.checkpoints.metadata import ModelDescription, modelspec_metadata

    given = dict(options.saving.model_spec)
    given.setdefault("title", options.saving.output_name or "LoRA")
    if "thumbnail" in given:
        given["thumbnail"] = thumbnail_url(given["thumbnail"])
    bounded = options.noise.min_timestep is not None or options.noise.max_timestep is not None
    return modelspec_metadata(
        family,
        prediction_type,
        ModelDescription(**given),
        saved_at=datetime.datetime.now(),
        resolution=resolution,
        adapter=True,
        clip_skip=options.captions.clip_skip,
        timestep_range=options.noise.timestep_range if bounded else None,
    )


def thumbnail_url(text: str, *, where: str | None = None) -> str:
    """A data URL as it is, or one made of an image file; `where` names the option it came with.

    Raises:
        UserError: neither.
    """
    if text.startswith("data:"):
        return text
    import base64
    import mimetypes

    path, where = Path(text), where or f"--metadata_thumbnail {text}"
    kind = mimetypes.guess_type(text)[0] or ""
    if not path.is_file() or not kind.startswith("image/"):
        raise UserError("is neither an image file nor a data URL", where=where)
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _about_the_run(options: TrainingOptions, facts: RunFacts) -> dict[str, Any]:
    return {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_output_name": options.saving.output_name,
        "ss_num_train_images": facts.train_samples,
        "ss_num_reg_images": facts.regularisation_samples,
        "ss_num_validation_images": 0,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.total_epochs,
        "ss_max_train_steps": facts.total_steps,
        "ss_gradient_accumulation_steps": options.length.accumulation,
        "ss_gradient_checkpointing": options.compute.gradient_checkpointing,
        "ss_seed": facts.seed,
        "ss_mixed_precision": options.compute.mixed_precision,
        "ss_full_fp16": False,
        **{f"ss_{name}": name == options.compute.format_option for name in FORMAT_OPTIONS},
        "ss_lowram": False,
        "ss_cache_latents": options.dataset.caches_latents,
        "ss_v2": facts.is_v2,
        "ss_base_model_version": facts.base_model_version,
        "ss_training_comment": options.saving.comment,
        "ss_sd_scripts_commit_hash": None,
        "ss_validation_seed": None,
        "ss_validation_split": 0.0,
        "ss_max_validation_steps": None,
        "ss_validate_every_n_epochs": None,
        "ss_validate_every_n_steps": None,
    }


def _about_the_network(options: TrainingOptions, facts: RunFacts) -> dict[str, Any]:
    text_encoder_lr = options.optimizer.text_encoder_lr
    return {
        "ss_network_module": options.network.module,
        "ss_network_dim": facts.network_dim,
        "ss_network_alpha": facts.network_alpha,
        "ss_network_dropout": options.network.dropout,
        "ss_scale_weight_norms": options.network.scale_weight_norms,
        "ss_learning_rate": options.optimizer.learning_rate,
        "ss_unet_lr": options.optimizer.unet_lr,
        "ss_text_encoder_lr": text_encoder_lr[0] if len(text_encoder_lr) == 1 else list(text_encoder_lr) or None,
        "ss_optimizer": facts.optimizer,
        "ss_max_grad_norm": options.optimizer.max_grad_norm,
        "ss_lr_scheduler": options.schedule.custom_type or options.schedule.name,
        "ss_lr_warmup_steps": options.schedule.warmup,
        "ss_clip_skip": options.captions.clip_skip,
        "ss_max_token_length": None if options.captions.max_token_length == 75 else options.captions.max_token_length,
    }


def _about_the_method(options: TrainingOptions, facts: RunFacts) -> dict[str, Any]:
    noise, loss, dataset = options.noise, options.loss, options.dataset
    return {
        "ss_noise_offset": noise.noise_offset,
        "ss_noise_offset_random_strength": noise.noise_offset_random_strength,
        "ss_adaptive_noise_scale": noise.adaptive_noise_scale,
        "ss_multires_noise_iterations": noise.multires_noise_iterations,
        "ss_multires_noise_discount": noise.multires_noise_discount,
        "ss_ip_noise_gamma": noise.ip_noise_gamma,
        "ss_ip_noise_gamma_random_strength": noise.ip_noise_gamma_random_strength,
        "ss_zero_terminal_snr": options.zero_terminal_snr,
        "ss_loss_type": loss.loss_type,
        "ss_huber_schedule": loss.huber_schedule,
        "ss_huber_c": loss.huber_c,
        "ss_huber_scale": loss.huber_scale,
        "ss_min_snr_gamma": loss.min_snr_gamma,
        "ss_debiased_estimation": loss.debiased_estimation_loss,
        "ss_prior_loss_weight": dataset.prior_loss_weight,
        "ss_caption_dropout_rate": dataset.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": dataset.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": dataset.caption_tag_dropout_rate,
        "ss_face_crop_aug_range": dataset.face_crop_aug_range,
        "ss_resize_interpolation": dataset.resize_interpolation,
    }
