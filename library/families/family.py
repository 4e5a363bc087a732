"""What differs between the model families, as data.

A family is one `ModelFamily` in a file of its own; the rest of the code asks its fields and never for its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

PredictionType = Literal["epsilon", "v_prediction"]
EPSILON: Final = "epsilon"
V_PREDICTION: Final = "v_prediction"
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One family of base models.

    Attributes:
        name: short and stable, for code and file names ("sd1").
        title: for sentences ("Stable Diffusion 1.x").
        text_encoder_prefixes: how saved layer names of adapters begin, one per text encoder.
        denoiser_prefix: the same for the denoiser (here always a U-Net).
        text_encoder_targets: module classes inside which every Linear layer may get an adapter.
        denoiser_targets: module classes inside which every Linear and Conv2d layer may get one (LierLa).
        denoiser_conv_targets: the classes in addition when 3x3 convolutions are trained as well (C3Lier).
        block_count: places in a list of block weights.
        block_index: saved or module name of a U-Net layer -> its place among them; None where it has none.
        latent_scale: factor from the VAE's own units to the U-Net's.
        latent_channels: of a latent.
        latent_factor: pixels along one side of a latent's pixel.
        context_width: of the full-size model's text condition.
        is_v2: what sd-scripts' `--v2` and `ss_v2` say of the family.
        prediction_types: what models of the family predict; with one entry, a file need not say it.
        base_model_versions: prediction type -> `ss_base_model_version`.
        architectures: prediction type -> `modelspec.architecture` of a checkpoint.
        default_resolution: prediction type -> pixels along one side.
        pad_token, pad_token_id: what the tokenizer pads with.
        text_layers_dropped: layers at the end of a single file's text encoder that are not used (SD2: the last of 24).
        text_encoder_layout: how single files name the text encoder: "clip" or "open_clip".
        linear_projections: the attention blocks' projections are matrices, not 1x1 convolutions.
        attention_heads: channels per level -> diffusers' `attention_head_dim`, which in spite of its name is a number of
            heads (one for all levels, or one per level).
        unet_config, text_encoder_config, vae_config: the full-size parts, in the words of diffusers and transformers.
    """

    name: str
    title: str
    text_encoder_prefixes: tuple[str, ...]
    denoiser_prefix: str
    text_encoder_targets: tuple[str, ...]
    denoiser_targets: tuple[str, ...]
    denoiser_conv_targets: tuple[str, ...]
    block_count: int
    block_index: Callable[[str], int | None]
    latent_scale: float
    latent_channels: int
    latent_factor: int
    context_width: int
    is_v2: bool
    prediction_types: tuple[str, ...]
    base_model_versions: Mapping[str, str]
    architectures: Mapping[str, str]
    default_resolution: Mapping[str, int]
    pad_token: str
    pad_token_id: int
    text_layers_dropped: int
    text_encoder_layout: str
    linear_projections: bool
    attention_heads: Callable[[Sequence[int]], int | list[int]]
    unet_config: Mapping[str, Any]
    text_encoder_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]


def heads_of_64(width: int) -> int:
    """Heads of an attention layer whose heads are 64 wide in every full-size model; narrower (tiny) layers have one."""
    return max(1, width // 64)


NOISE_SCHEDULE: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""What both families were trained with, in diffusers' words; a scheduler's prediction type is set beside it."""
