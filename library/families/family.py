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

TextEncoderLayout = Literal["clip", "open_clip"]
LayerWording = Literal["diffusers", "original"]
DepthCount = Literal["levels", "input blocks"]

SIZE_CONDITIONS = (
    "original_height",
    "original_width",
    "crop_top",
    "crop_left",
    "target_height",
    "target_width",
    "aesthetic_score",
)
"""Numbers that a denoiser may take beside the text (Podell et al., arXiv:2307.01952, section 2.2)."""


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """One text encoder of a family.

    Attributes:
        part: its name among a model's parts, and of its folder ("text_encoder").
        tokenizer: of its tokenizer's folder.
        adapter_prefix: how saved layer names of adapters begin ("lora_te").
        layout: how single files name its tensors.
        file_prefixes: how its keys may begin in single files; the first is written.
        layers_dropped: layers at the end of a single file's that are not used (SD2: the last of 24).
        last_used: the layer whose output is the condition, counted from the end, where a user says nothing (1: the last).
        final_norm: the final norm follows that layer.
        gives_pooled: it ends in a projection, whose output at the text's end conditions the denoiser as well.
        pad_token, pad_token_id: what its tokenizer pads with.
        config: of the full size, in transformers' words.
    """

    part: str
    tokenizer: str
    adapter_prefix: str
    layout: TextEncoderLayout
    file_prefixes: tuple[str, ...]
    layers_dropped: int = 0
    last_used: int = 1
    final_norm: bool = True
    gives_pooled: bool = False
    pad_token: str = "<|endoftext|>"
    pad_token_id: int = 49407
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One family of base models.

    Attributes:
        name: short and stable, for code and file names ("sd1").
        title: for sentences ("Stable Diffusion 1.x").
        refines: name of the family whose pictures its models finish; None for families that draw from noise.
        text_encoders: in the order of their features in the condition.
        denoiser_prefix: how saved layer names of the denoiser (here always a U-Net) begin.
        denoiser_wording: whose names of the denoiser's layers adapters are saved under.
        text_encoder_targets: module classes inside which every Linear layer may get an adapter.
        denoiser_targets: module classes inside which every Linear and Conv2d layer may get one (LierLa).
        denoiser_conv_targets: the classes in addition when 3x3 convolutions are trained as well (C3Lier).
        block_index: saved or module name of a U-Net layer -> its place in a list of block values; None where it has none.
        block_sides: those places on the way down, in the middle, and on the way up, as learning rates are given.
        block_places: the place of each among the 26 of block weights for merging (`block_weights.PLACES`); None for none.
        size_conditions: numbers that the denoiser takes beside the text, in its order; names of `SIZE_CONDITIONS`.
        depth_count: what sd-scripts counts as the depth of Deep Shrink: levels of the U-Net, or what the original calls
            input blocks.
        latent_scale: factor from the VAE's own units to the U-Net's.
        latent_channels: of a latent.
        latent_factor: pixels along one side of a latent's pixel.
        context_width: of the full-size model's text condition.
        is_v2: what sd-scripts' `--v2` and `ss_v2` say of the family.
        flag: the switch by which command lines say that a model is of the family ("v2"); None where there is none.
        prediction_types: what models of the family predict; with one entry, a file need not say it.
        known_as: how other programs' names of the family begin, in `ss_base_model_version` and `modelspec.architecture`.
        adapter_marks: patterns that only layer names of this family's adapters match, in any layout.
        base_model_versions: prediction type -> `ss_base_model_version`.
        architectures: prediction type -> `modelspec.architecture` of a checkpoint.
        default_resolution: prediction type -> pixels along one side.
        linear_projections: the attention blocks' projections are matrices, not 1x1 convolutions.
        attention_heads: channels per level -> diffusers' `attention_head_dim`, which in spite of its name is a number of
            heads (one for all levels, or one per level).
        pipeline: what diffusers' `model_index.json` says beside its parts.
        unet_config, vae_config: the full-size parts, in diffusers' words.
    """

    name: str
    title: str
    refines: str | None = None
    text_encoders: tuple[TextEncoder, ...]
    denoiser_prefix: str
    denoiser_wording: LayerWording
    text_encoder_targets: tuple[str, ...]
    denoiser_targets: tuple[str, ...]
    denoiser_conv_targets: tuple[str, ...]
    block_index: Callable[[str], int | None]
    block_sides: tuple[range, range, range]
    block_places: tuple[int | None, ...]
    size_conditions: tuple[str, ...]
    depth_count: DepthCount
    latent_scale: float
    latent_channels: int
    latent_factor: int
    context_width: int
    is_v2: bool
    flag: str | None = None
    prediction_types: tuple[str, ...]
    known_as: tuple[str, ...]
    adapter_marks: tuple[str, ...] = ()
    base_model_versions: Mapping[str, str]
    architectures: Mapping[str, str]
    default_resolution: Mapping[str, int]
    linear_projections: bool
    attention_heads: Callable[[Sequence[int]], int | list[int]]
    pipeline: Mapping[str, Any]
    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]

    @property
    def block_count(self) -> int:
        """Places in a list of block values."""
        return len(self.block_places)

    @property
    def size_multiple(self) -> int:
        """What image sides are multiples of, in pixels: each level of the U-Net but the last halves a latent's sides."""
        return self.latent_factor * 2 ** (len(self.unet_config["block_out_channels"]) - 1)

    @property
    def text_encoder_prefixes(self) -> tuple[str, ...]:
        """How saved layer names of adapters begin, one per text encoder."""
        return tuple(encoder.adapter_prefix for encoder in self.text_encoders)

    @property
    def adapter_prefixes(self) -> Mapping[str, str]:
        """The parts that adapters are for, by kind -> how saved layer names begin; in the order of a network's layers."""
        return {**{encoder.part: encoder.adapter_prefix for encoder in self.text_encoders}, "unet": self.denoiser_prefix}

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a base model, by kind: folders of these names hold them."""
        return ("unet", "vae", *(encoder.part for encoder in self.text_encoders))

    def config(self, part: str) -> Mapping[str, Any]:
        """The configuration of a part of full size."""
        known = {"unet": self.unet_config, "vae": self.vae_config}
        return known[part] if part in known else self.text_encoder(part).config

    def text_encoder(self, part: str) -> TextEncoder:
        """The text encoder that is a model's part of this name."""
        return next(encoder for encoder in self.text_encoders if encoder.part == part)


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
"""What all of them were trained with, in diffusers' words; a scheduler's prediction type is set beside it."""
