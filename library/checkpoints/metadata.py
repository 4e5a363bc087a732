"""The `modelspec.*` fields of a safetensors header (Stability AI's ModelSpec 1.0.1): built, and read back.

https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime

from library.families.family import EPSILON, V_PREDICTION, ModelFamily

SPEC_VERSION = "1.0.1"
PREFIX = "modelspec."
_ORIGINAL_CODE = "https://github.com/Stability-AI/generative-models"  # whose names the file has
_PREDICTION_NAMES = {EPSILON: "epsilon", V_PREDICTION: "v"}


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What only the author knows about a file; None is left out. The names are those of the fields."""

    title: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: str | None = None
    merged_from: str | None = None
    usage_hint: str | None = None
    thumbnail: str | None = None
    trigger_phrase: str | None = None
    preprocessor: str | None = None
    is_negative_embedding: str | None = None


def modelspec_metadata(
    family: ModelFamily,
    prediction_type: str,
    description: ModelDescription,
    *,
    saved_at: datetime,
    resolution: tuple[int, int] | None = None,
    adapter: bool = False,
    clip_skip: int | None = None,
    timestep_range: tuple[int, int] | None = None,
) -> dict[str, str]:
    """The fields of one file, all texts.

    Args:
        family: of the model, or of the model that an adapter is for.
        prediction_type: "epsilon" or "v_prediction".
        description: what the author says; a title is always written, "untitled" where none is given.
        saved_at: local time; written to the second.
        resolution: (width, height) in pixels; None for the family's own.
        adapter: a LoRA, not a whole model.
        clip_skip: layers of the text encoder counted from its end.
        timestep_range: (first, end) of the timesteps trained.
    """
    side = family.default_resolution[prediction_type]
    width, height = resolution or (side, side)
    written: dict[str, str | None] = {
        "sai_model_spec": SPEC_VERSION,
        "architecture": family.architectures[prediction_type] + ("/lora" if adapter else ""),
        "implementation": "diffusers" if adapter and family.denoiser_wording == "diffusers" else _ORIGINAL_CODE,
        "resolution": f"{width}x{height}",
        "date": saved_at.replace(microsecond=0, tzinfo=None).isoformat(),
        "prediction_type": _PREDICTION_NAMES[prediction_type],
        "encoder_layer": None if clip_skip is None else str(clip_skip),
        "timestep_range": None if timestep_range is None else f"{timestep_range[0]},{timestep_range[1]}",
        **{field.name: getattr(description, field.name) for field in fields(description)},
    }
    written["title"] = description.title or "untitled"
    return {PREFIX + name: value for name, value in written.items() if value is not None}


def read_modelspec(metadata: Mapping[str, str]) -> dict[str, str]:
    """The fields of a header by their names without the prefix; empty where there are none."""
    return {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
