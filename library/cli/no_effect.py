"""Options that were given and do nothing in this run: each is said, none is passed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from library.cli.optimizer_choice import RATES, relative_steps, schedule_free
from library.cli.options import ParsedOptions


@dataclass(frozen=True)
class NoEffect:
    """When some options do nothing, and why."""

    names: tuple[str, ...]
    applies: Callable[[ParsedOptions], bool]
    reason: str


def _always(parsed: ParsedOptions) -> bool:
    return True


def _without(name: str) -> Callable[[ParsedOptions], bool]:
    return lambda parsed: not parsed[name]


def _unless(name: str, *values: object) -> Callable[[ParsedOptions], bool]:
    return lambda parsed: parsed[name] not in values


def _captions_stay(parsed: ParsedOptions) -> bool:
    """Whether no option touches the tags; a dataset file may, for its own subsets."""
    changes = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step", "dataset_config")
    return not any(parsed[name] for name in changes)


def _folder_dataset_options(parsed: ParsedOptions) -> bool:
    return parsed.given("dataset_config")


def _caches_nothing_on_disk(parsed: ParsedOptions) -> bool:
    return not any(parsed[name] for name in ("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"))


def _draws_no_previews(parsed: ParsedOptions) -> bool:
    return not any(parsed[name] for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"))


def _own_schedule_of_adafactor(parsed: ParsedOptions) -> bool:
    return relative_steps(parsed) and not str(parsed["lr_scheduler"]).startswith("adafactor")


SCHEDULE = ("lr_scheduler", "lr_scheduler_type", "lr_warmup_steps", "lr_decay_steps")
FILE_METADATA = (
    *("no_metadata", "training_comment", "metadata_title", "metadata_author", "metadata_description", "metadata_license"),
    *("metadata_tags", "metadata_usage_hint", "metadata_thumbnail", "metadata_merged_from", "metadata_trigger_phrase"),
    *("metadata_preprocessor", "metadata_is_negative_embedding"),
)

RULES: tuple[NoEffect, ...] = (
    NoEffect(("tokenizer_cache_dir",), _always, "tokenizers ship with this package"),
    NoEffect(("disable_mmap_load_safetensors",), _always, "files are read tensor by tensor, which takes least memory"),
    NoEffect(("cache_info",), _always, "scanning a folder needs no memory of it"),
    NoEffect(("persistent_data_loader_workers",), _always, "workers are always kept between epochs"),
    NoEffect(("fp8_base",), lambda parsed: parsed["fp8_base_unet"], "--fp8_base_unet leaves the text encoders out"),
    NoEffect(("nf4_base",), lambda parsed: parsed["nf4_base_unet"], "--nf4_base_unet leaves the text encoders out"),
    NoEffect(("lowram",), _always, "weights are always read straight to the device"),
    NoEffect(("highvram",), _always, "device memory is always kept"),
    NoEffect(("mem_eff_attn",), _always, "torch's scaled_dot_product_attention is used"),
    NoEffect(("fused_backward_pass",), _always, "the gradients of an adapter are too small to gain from it"),
    NoEffect(("sdpa",), lambda parsed: parsed["xformers"], "--xformers is given as well"),
    NoEffect(("no_half_vae",), _always, "the VAE always runs in fp32"),
    NoEffect(
        ("train_data_dir", "reg_data_dir", "in_json"), _folder_dataset_options, "--dataset_config says what is trained on"
    ),
    NoEffect(("keep_tokens",), _captions_stay, "captions are neither shuffled nor dropped from"),
    NoEffect(("noise_offset_random_strength",), _without("noise_offset"), "there is no --noise_offset"),
    NoEffect(
        ("multires_noise_discount",), _without("multires_noise_iterations"), "there are no --multires_noise_iterations"
    ),
    NoEffect(("ip_noise_gamma_random_strength",), _without("ip_noise_gamma"), "there is no --ip_noise_gamma"),
    NoEffect(
        ("huber_schedule", "huber_c", "huber_scale"), _unless("loss_type", "huber", "smooth_l1"), "--loss_type is not huber"
    ),
    NoEffect(("huber_scale",), lambda p: p["huber_schedule"] == "snr", "the snr schedule has no scale"),
    NoEffect(("lr_scheduler",), lambda p: bool(p["lr_scheduler_type"]), "--lr_scheduler_type is given"),
    NoEffect(
        ("lr_scheduler_num_cycles",),
        _unless("lr_scheduler", "cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
        "this schedule has no cycles",
    ),
    NoEffect(("lr_scheduler_power",), _unless("lr_scheduler", "polynomial"), "this schedule has no power"),
    NoEffect(("lr_scheduler_timescale",), _unless("lr_scheduler", "inverse_sqrt"), "this schedule has no time scale"),
    NoEffect(
        ("lr_scheduler_min_lr_ratio",),
        _unless("lr_scheduler", "cosine_with_min_lr", "warmup_stable_decay"),
        "this schedule ends at zero",
    ),
    NoEffect(("lr_decay_steps",), _unless("lr_scheduler", "warmup_stable_decay"), "this schedule has no decay of its own"),
    NoEffect(
        ("lr_scheduler_args",),
        lambda p: not p["lr_scheduler_type"] and p["lr_scheduler"] != "piecewise_constant",
        "they belong to --lr_scheduler_type and piecewise_constant",
    ),
    NoEffect(("max_train_steps",), lambda p: bool(p["max_train_epochs"]), "--max_train_epochs wins"),
    NoEffect(("skip_cache_check",), _caches_nothing_on_disk, "nothing is cached on disk"),
    NoEffect(
        ("save_last_n_epochs",), lambda p: not (p["save_every_n_epochs"] or p["save_n_epoch_ratio"]), "no epochs are saved"
    ),
    NoEffect(("save_every_n_epochs",), lambda p: bool(p["save_n_epoch_ratio"]), "--save_n_epoch_ratio wins"),
    NoEffect(("save_last_n_steps",), _without("save_every_n_steps"), "no steps are saved"),
    NoEffect(("save_precision",), lambda p: p["save_precision"] == "float", "weights are in fp32 already"),
    NoEffect(
        ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first", "sample_sampler"),
        _without("sample_prompts"),
        "there are no --sample_prompts",
    ),
    NoEffect(("sample_every_n_steps",), lambda p: bool(p["sample_every_n_epochs"]), "--sample_every_n_epochs wins"),
    NoEffect(("log_prefix", "log_tracker_name", "log_with"), _without("logging_dir"), "there is no --logging_dir"),
    NoEffect(("unet_lr",), lambda p: p["network_train_text_encoder_only"], "the U-Net is not trained"),
    NoEffect(("text_encoder_lr",), lambda p: p["network_train_unet_only"], "the text encoder is not trained"),
    NoEffect(
        ("min_bucket_reso", "max_bucket_reso"), lambda p: p["bucket_no_upscale"], "--bucket_no_upscale follows the images"
    ),
    NoEffect(
        ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"),
        lambda p: not p["enable_bucket"] and not p.given("dataset_config"),
        "there is no --enable_bucket",
    ),
    NoEffect(FILE_METADATA, lambda p: p["save_model_as"] != "safetensors", "only .safetensors files carry metadata"),
    NoEffect(("training_comment",), lambda p: p["no_metadata"], "--no_metadata leaves it out"),
    NoEffect(RATES, relative_steps, "Adafactor's relative steps choose the rate"),
    NoEffect(SCHEDULE, _own_schedule_of_adafactor, "Adafactor's relative steps are a schedule of their own"),
    NoEffect(SCHEDULE, schedule_free, "this optimizer needs no schedule"),
    NoEffect(
        ("sample_prompts",),
        _draws_no_previews,
        "there is no --sample_every_n_epochs, --sample_every_n_steps or --sample_at_first",
    ),
    NoEffect(("dim_from_weights",), _without("network_weights"), "there are no --network_weights"),
    NoEffect(
        ("network_dim", "network_alpha"), lambda p: p["dim_from_weights"], "--dim_from_weights takes them from the file"
    ),
)


def options_without_effect(parsed: ParsedOptions) -> list[str]:
    """One sentence for every option that was given and does nothing in this run."""
    sentences: dict[str, str] = {}
    for rule in RULES:
        for name in rule.names:
            if parsed.given(name) and parsed[name] not in (False, None) and rule.applies(parsed):
                sentences.setdefault(name, f"--{name} has no effect: {rule.reason}")
    return list(sentences.values())
