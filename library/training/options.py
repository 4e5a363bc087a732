"""What one training run does: frozen dataclasses, each owned by the part of this room that obeys it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.checkpoints.packed_weights import WeightFormat
    from library.dataset.options import DatasetOptions
    from library.diffusion.losses import LossOptions
    from library.diffusion.noise import NoiseOptions


@dataclass(frozen=True, kw_only=True)
class BaseModelOptions:
    """Which base model. `v2` and `v_parameterization` are None where the user said nothing.

    Attributes:
        family: name of the only one that is taken; None takes all.
    """

    path: str
    vae: str | None = None
    v2: bool | None = None
    v_parameterization: bool | None = None
    family: str | None = None


@dataclass(frozen=True, kw_only=True)
class CaptionEncodingOptions:
    """How captions become conditions.

    Attributes:
        clip_skip: the layer that is used, counted from the end; None for each text encoder's own.
        max_token_length: 75, 150 or 225.
        cache: encode all captions before the denoiser is loaded.
        cache_to_disk: keep what comes of it in files; implies `cache`.
    """

    clip_skip: int | None = None
    max_token_length: int = 75
    weighted_captions: bool = False
    cache: bool = False
    cache_to_disk: bool = False

    @property
    def caches(self) -> bool:
        return self.cache or self.cache_to_disk


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The adapter network. `dim` and `alpha` are handed to the module, whose own defaults stand for None."""

    module: str
    dim: int | None = None
    alpha: float | None = 1.0
    dropout: float | None = None
    args: Mapping[str, str] = field(default_factory=dict)
    weights: Path | None = None
    dim_from_weights: bool = False
    train_unet: bool = True
    train_text_encoder: bool = True
    scale_weight_norms: float | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer and learning rates. A rate of None falls back to `learning_rate`; 0 leaves that part as it is."""

    type: str = "AdamW"
    args: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-6
    unet_lr: float | None = None
    text_encoder_lr: tuple[float, ...] = ()
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How the learning rate changes. `warmup` and `decay` are steps, or shares of the whole run below 1."""

    name: str = "constant"
    custom_type: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    warmup: int | float = 0
    decay: int | float = 0
    num_cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    min_lr_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """How long: `epochs` wins over `steps`. Steps are optimizer steps."""

    steps: int = 1600
    epochs: int | None = None
    accumulation: int = 1
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Precision, memory and the machine.

    Attributes:
        format_option: the one of `FORMAT_OPTIONS` that counts; None for weights in the dtype of the arithmetic.
    """

    mixed_precision: str = "no"
    format_option: str | None = None
    gradient_checkpointing: bool = False
    xformers: bool = False
    data_workers: int = 8

    @property
    def unet_format(self) -> WeightFormat | None:
        """What the U-Net's frozen weights are kept in; None for the dtype of the arithmetic."""
        return None if self.format_option is None else FORMAT_OPTIONS[self.format_option][0]

    @property
    def text_encoder_format(self) -> WeightFormat | None:
        """The same of the text encoders."""
        weight_format, text_encoders = FORMAT_OPTIONS.get(self.format_option or "", (None, False))
        return weight_format if text_encoders else None


FORMAT_OPTIONS: Mapping[str, tuple[WeightFormat, bool]] = {
    "fp8_base_unet": ("fp8", False),
    "fp8_base": ("fp8", True),
    "nf4_base_unet": ("nf4", False),
    "nf4_base": ("nf4", True),
}
"""Option -> what weights are kept in, and whether those of the text encoders are. The first that is given counts, as in
sd-scripts."""


@dataclass(frozen=True, kw_only=True)
class SavingOptions:
    """What is written, when, and what is removed again."""

    output_dir: Path
    output_name: str | None = None
    format: str = "safetensors"
    precision: str | None = None
    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    epoch_ratio: int | None = None
    last_n_epochs: int | None = None
    last_n_steps: int | None = None
    minimal_metadata: bool = False
    comment: str | None = None
    model_spec: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PreviewOptions:
    """Pictures drawn while training; none without `prompts`."""

    prompts: Path | None = None
    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    at_first: bool = False
    sampler: str = "ddim"


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """TensorBoard curves; none without `folder`."""

    folder: Path | None = None
    prefix: str = ""
    tracker_name: str = "network_train"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """One run, whole."""

    base: BaseModelOptions
    dataset: DatasetOptions
    captions: CaptionEncodingOptions
    network: NetworkOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    noise: NoiseOptions
    zero_terminal_snr: bool
    loss: LossOptions
    length: LengthOptions
    compute: ComputeOptions
    saving: SavingOptions
    previews: PreviewOptions
    logging: LoggingOptions
    notes: tuple[str, ...] = ()
    plan_only: bool = False
    debug_dataset: bool = False
