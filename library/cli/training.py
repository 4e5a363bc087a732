"""From the options of train_network.py to `TrainingOptions`: the Namespace dies here.

What can be judged from the command line alone is judged here, all at once; what needs files is judged by their rooms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from library.cli.key_values import key_literals, key_values
from library.cli.no_effect import options_without_effect
from library.cli.optimizer_choice import optimizer_args, optimizer_name, relative_steps
from library.cli.options import ParsedOptions, parse
from library.cli.training_options import TRAINING_OPTIONS
from library.errors import UserError, attempt, raise_all
from library.generation.samplers import canonical
from library.training.options import (
    FORMAT_OPTIONS,
    BaseModelOptions,
    CaptionEncodingOptions,
    ComputeOptions,
    LengthOptions,
    LoggingOptions,
    NetworkOptions,
    OptimizerOptions,
    PreviewOptions,
    SavingOptions,
    ScheduleOptions,
    TrainingOptions,
)

DESCRIPTION = "Train a LoRA-type adapter for Stable Diffusion 1.x, 2.x or XL."
REQUIRED = {
    "pretrained_model_name_or_path": "a checkpoint file, a diffusers folder or a Hugging Face id",
    "output_dir": "the folder for the trained file",
    "network_module": "networks.lora for a LoRA",
}
AT_LEAST = {
    1: (
        *("network_dim", "max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "train_batch_size"),
        *("vae_batch_size", "clip_skip", "save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio"),
        *("save_last_n_epochs", "save_last_n_steps", "sample_every_n_steps", "sample_every_n_epochs"),
        *("dataset_repeats", "bucket_reso_steps", "lr_scheduler_num_cycles", "lr_scheduler_timescale"),
    ),
    0: (
        *("network_alpha", "learning_rate", "unet_lr", "max_grad_norm", "max_data_loader_n_workers", "keep_tokens"),
        *("prior_loss_weight", "lr_scheduler_min_lr_ratio", "caption_dropout_every_n_epochs", "seed"),
    ),
}
ABOVE_0 = ("scale_weight_norms",)
SHARES = ("network_dropout", "caption_dropout_rate", "caption_tag_dropout_rate", "lr_scheduler_min_lr_ratio")


def parse_training(argv: Sequence[str]) -> ParsedOptions:
    """Parse the command line of train_network.py or sdxl_train_network.py."""
    return parse(argv, TRAINING_OPTIONS, description=DESCRIPTION)


def training_options(parsed: ParsedOptions, *, family: str | None = None) -> TrainingOptions:
    """The options of one run.

    Args:
        family: name of the only one whose models are taken; None takes all.

    Raises:
        UserError: every problem that the command line alone shows, at once.
    """
    problems = _missing(parsed) + _out_of_range(parsed) + _contradictions(parsed)
    parts: dict[str, Any] = {}
    for name, build in _BUILDERS.items():
        parts[name] = attempt(partial(build, parsed), problems)
    raise_all(problems)
    parts["base"] = replace(parts["base"], family=family)
    return TrainingOptions(
        **parts,
        zero_terminal_snr=parsed["zero_terminal_snr"],
        notes=tuple(options_without_effect(parsed) + _advice(parsed)),
        plan_only=parsed["plan_only"],
        debug_dataset=parsed["debug_dataset"],
    )


def _missing(parsed: ParsedOptions) -> list[UserError]:
    problems = [
        UserError("is missing", where=f"--{name}", remedy=f"give {what}")
        for name, what in REQUIRED.items()
        if not parsed[name]
    ]
    if not any(parsed[name] for name in ("dataset_config", "train_data_dir", "in_json")):
        problems.append(
            UserError("no dataset is given", remedy="give --dataset_config FILE.toml or --train_data_dir FOLDER")
        )
    return problems


def _out_of_range(parsed: ParsedOptions) -> list[UserError]:
    problems = []
    for least, names in AT_LEAST.items():
        for name in names:
            value = parsed[name]
            if value is not None and not value >= least:
                problems.append(UserError(f"is below {least}", where=parsed.where(name)))
    problems += [
        UserError("is not above 0", where=parsed.where(name), remedy="leave it out to do without")
        for name in ABOVE_0
        if parsed[name] is not None and not parsed[name] > 0
    ]
    for name in SHARES:
        if parsed[name] is not None and not 0 <= parsed[name] <= 1:
            problems.append(UserError("is not between 0 and 1", where=parsed.where(name)))
    problems += [
        UserError("is below 0", where=parsed.where("text_encoder_lr"))
        for rate in parsed["text_encoder_lr"] or ()
        if not rate >= 0
    ]
    return problems


def _contradictions(parsed: ParsedOptions) -> list[UserError]:
    problems = []

    def refuse(wrong: Any, what: str, where: str, remedy: str) -> None:
        if wrong:
            problems.append(UserError(what, where=where, remedy=remedy))

    caches = parsed["cache_latents"] or parsed["cache_latents_to_disk"]
    for name in ("color_aug", "random_crop"):
        refuse(caches and parsed[name], "cannot be used with cached latents", f"--{name}", "leave out --cache_latents or it")
    for name in ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"):
        refuse(
            parsed[name] and not parsed["network_train_unet_only"],
            "cannot be used with text encoders that are trained, whose outputs change",
            f"--{name}",
            "give --network_train_unet_only as well, or leave it out",
        )
    refuse(
        parsed["network_train_unet_only"] and parsed["network_train_text_encoder_only"],
        "leaves nothing to train beside --network_train_text_encoder_only",
        "--network_train_unet_only",
        "give one of the two",
    )
    in_8_bits, in_4_bits = (
        " ".join(f"--{name}" for name, (kept_in, _) in FORMAT_OPTIONS.items() if kept_in == each and parsed[name])
        for each in ("fp8", "nf4")
    )
    refuse(
        in_8_bits and in_4_bits,
        "a base model in 4 bits is not kept in 8 as well",
        in_8_bits,
        f"leave it out, or leave out {in_4_bits}",
    )
    legacy = [name for name in ("use_8bit_adam", "use_lion_optimizer") if parsed[name]]
    for name in legacy:
        refuse(
            parsed["optimizer_type"] or len(legacy) > 1, "contradicts the other optimizer", f"--{name}", "give one of them"
        )
    refuse(
        parsed["log_with"] in ("wandb", "all"),
        "is not available yet: trackers beside TensorBoard come later",
        f"--log_with {parsed['log_with']}",
        "use tensorboard",
    )
    refuse(
        parsed["sample_prompts"] and not Path(parsed["sample_prompts"]).is_file(),
        "no such file",
        f"--sample_prompts {parsed['sample_prompts']}",
        "name a .txt, .toml or .json file",
    )
    refuse(
        parsed["network_weights"] and not Path(parsed["network_weights"]).is_file(),
        "no such file",
        f"--network_weights {parsed['network_weights']}",
        "name an adapter file",
    )
    refuse(
        re.search(r"[/\\]", parsed["output_name"] or ""),
        "is a path",
        f"--output_name {parsed['output_name']}",
        "put folders in --output_dir",
    )
    refuse(
        parsed["output_config"] and not parsed["config_file"], "writes to --config_file", "--output_config", "name the file"
    )
    return problems


def _advice(parsed: ParsedOptions) -> list[str]:
    """What is likely not meant, though it can be done."""
    notes = []
    parts = [
        (parsed["unet_lr"], not parsed["network_train_text_encoder_only"]),
        (parsed["text_encoder_lr"], not parsed["network_train_unet_only"]),
    ]
    default_used = not parsed.given("learning_rate") and any(rate is None and trains for rate, trains in parts)
    if default_used and not relative_steps(parsed):
        notes.append("--learning_rate is left at 2e-6, which hardly trains a LoRA; 1e-4 is usual")
    if parsed["zero_terminal_snr"] and not parsed["v_parameterization"]:
        notes.append("--zero_terminal_snr suits v-prediction: a noise prediction cannot learn from a step of pure noise")
    return notes


def _base(parsed: ParsedOptions) -> BaseModelOptions:
    return BaseModelOptions(
        path=parsed["pretrained_model_name_or_path"] or "",
        vae=parsed["vae"] or None,
        v2=parsed["v2"] if parsed.given("v2") else None,
        v_parameterization=parsed["v_parameterization"] if parsed.given("v_parameterization") else None,
    )


def _captions(parsed: ParsedOptions) -> CaptionEncodingOptions:
    return CaptionEncodingOptions(
        clip_skip=parsed["clip_skip"],
        max_token_length=parsed["max_token_length"] or 75,
        weighted_captions=parsed["weighted_captions"],
        cache=parsed["cache_text_encoder_outputs"],
        cache_to_disk=parsed["cache_text_encoder_outputs_to_disk"],
    )


def _network(parsed: ParsedOptions) -> NetworkOptions:
    return NetworkOptions(
        module=parsed["network_module"] or "",
        dim=parsed["network_dim"],
        alpha=parsed["network_alpha"],
        dropout=parsed["network_dropout"],
        args=key_values(parsed["network_args"], "--network_args"),
        weights=_path(parsed["network_weights"]),
        dim_from_weights=parsed["dim_from_weights"],
        train_unet=not parsed["network_train_text_encoder_only"],
        train_text_encoder=not parsed["network_train_unet_only"],
        scale_weight_norms=parsed["scale_weight_norms"],
    )


def _optimizer(parsed: ParsedOptions) -> OptimizerOptions:
    return OptimizerOptions(
        type=optimizer_name(parsed),
        args=optimizer_args(parsed),
        learning_rate=parsed["learning_rate"],
        unet_lr=parsed["unet_lr"],
        text_encoder_lr=parsed["text_encoder_lr"] or (),
        max_grad_norm=parsed["max_grad_norm"],
    )


def _schedule(parsed: ParsedOptions) -> ScheduleOptions:
    from library.training.lr_schedules import check_schedule

    options = ScheduleOptions(
        name=parsed["lr_scheduler"],
        custom_type=parsed["lr_scheduler_type"] or None,
        args=key_literals(parsed["lr_scheduler_args"], "--lr_scheduler_args"),
        warmup=parsed["lr_warmup_steps"],
        decay=parsed["lr_decay_steps"],
        num_cycles=parsed["lr_scheduler_num_cycles"],
        power=parsed["lr_scheduler_power"],
        timescale=parsed["lr_scheduler_timescale"],
        min_lr_ratio=parsed["lr_scheduler_min_lr_ratio"],
    )
    check_schedule(options, relative_steps=relative_steps(parsed))
    return options


def _length(parsed: ParsedOptions) -> LengthOptions:
    return LengthOptions(
        steps=parsed["max_train_steps"],
        epochs=parsed["max_train_epochs"],
        accumulation=parsed["gradient_accumulation_steps"],
        seed=parsed["seed"],
    )


def _compute(parsed: ParsedOptions) -> ComputeOptions:
    return ComputeOptions(
        mixed_precision=parsed["mixed_precision"],
        format_option=next((name for name in FORMAT_OPTIONS if parsed[name]), None),
        gradient_checkpointing=parsed["gradient_checkpointing"],
        xformers=parsed["xformers"],
        data_workers=parsed["max_data_loader_n_workers"],
    )


def _saving(parsed: ParsedOptions) -> SavingOptions:
    from library.training.metadata import thumbnail_url

    if parsed["metadata_thumbnail"]:
        thumbnail_url(parsed["metadata_thumbnail"])
    fields = [name for name in parsed.values if name.startswith("metadata_")]
    return SavingOptions(
        output_dir=Path(parsed["output_dir"] or "."),
        output_name=parsed["output_name"],
        format=parsed["save_model_as"],
        precision=parsed["save_precision"],
        every_n_epochs=parsed["save_every_n_epochs"],
        every_n_steps=parsed["save_every_n_steps"],
        epoch_ratio=parsed["save_n_epoch_ratio"],
        last_n_epochs=parsed["save_last_n_epochs"],
        last_n_steps=parsed["save_last_n_steps"],
        minimal_metadata=parsed["no_metadata"],
        comment=parsed["training_comment"],
        model_spec={name.removeprefix("metadata_"): parsed[name] for name in fields if parsed[name]},
    )


def _previews(parsed: ParsedOptions) -> PreviewOptions:
    return PreviewOptions(
        prompts=_path(parsed["sample_prompts"]),
        every_n_steps=None if parsed["sample_every_n_epochs"] else parsed["sample_every_n_steps"],
        every_n_epochs=parsed["sample_every_n_epochs"],
        at_first=parsed["sample_at_first"],
        sampler=canonical(parsed["sample_sampler"], where="--sample_sampler"),
    )


def _logging(parsed: ParsedOptions) -> LoggingOptions:
    return LoggingOptions(
        folder=_path(parsed["logging_dir"]),
        prefix=parsed["log_prefix"] or "",
        tracker_name=parsed["log_tracker_name"] or "network_train",
    )


def _noise(parsed: ParsedOptions) -> Any:
    from library.diffusion.noise import NoiseOptions

    return NoiseOptions(**_fields(NoiseOptions, parsed))


def _loss(parsed: ParsedOptions) -> Any:
    from library.diffusion.losses import LossOptions

    return LossOptions(**_fields(LossOptions, parsed))


def _dataset(parsed: ParsedOptions) -> Any:
    from library.dataset.options import DatasetOptions

    values = _fields(DatasetOptions, parsed)
    for name in ("dataset_config", "train_data_dir", "reg_data_dir", "in_json"):
        values[name] = _path(values[name])
    values["caption_extension"] = parsed["caption_extention"] or values["caption_extension"]
    return DatasetOptions(**values)


def _fields(options_class: Any, parsed: ParsedOptions) -> dict[str, Any]:
    """The values of a dataclass whose fields are named like the options."""
    return {name: parsed[name] for name in options_class.__dataclass_fields__}


def _path(text: str | Path | None) -> Path | None:
    return Path(text) if text else None


_BUILDERS: Mapping[str, Callable[[ParsedOptions], Any]] = {
    "base": _base,
    "dataset": _dataset,
    "captions": _captions,
    "network": _network,
    "optimizer": _optimizer,
    "schedule": _schedule,
    "noise": _noise,
    "loss": _loss,
    "length": _length,
    "compute": _compute,
    "saving": _saving,
    "previews": _previews,
    "logging": _logging,
}


def write_config(parsed: ParsedOptions) -> int:
    """Write the options that were given to --config_file, which must not exist yet.

    Raises:
        UserError: no file is named, or it exists.
    """
    import toml

    from library.checkpoints.atomic import atomic_write

    raise_all(_contradictions(parsed))
    path = Path(parsed["config_file"]).with_suffix(".toml")
    if path.exists():
        raise UserError("exists already", where=f"--config_file {path}", remedy="name another file or remove it")
    given = {
        name: parsed[name] for name in parsed.values if parsed.given(name) and name not in ("config_file", "output_config")
    }
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    with atomic_write(path) as file:
        file.write(toml.dumps(plain).encode())
    print(f"wrote {len(plain)} options to {path}")
    return 0
