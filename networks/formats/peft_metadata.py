"""PEFT's configurations in the metadata of adapter files: where its layout keeps ranks and alphas, which have no tensors."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.errors import UserError
from networks.formats.layer_names import DENOISER, TEXT_ENCODERS, TEXT_LEVEL, LayerName, Part

METADATA_KEY = "lora_adapter_metadata"
"""Of diffusers' files; its value is JSON, with a part (`unet.`, `text_encoder.`, ...) before names of PEFT's settings."""

COMPONENTS: Mapping[Part, str] = {**{part: part for part in TEXT_ENCODERS}, DENOISER: "unet"}
"""Part -> what diffusers' layout calls it."""


@dataclass(frozen=True)
class PeftScales:
    """How PEFT scales the layers of a file.

    Attributes:
        settings: part -> PEFT's settings by name; empty for a file that says nothing.
    """

    settings: Mapping[Part, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> PeftScales:
        """From a file's metadata.

        Raises:
            UserError: what they say is no JSON object.
        """
        text = metadata.get(METADATA_KEY)
        if not text:
            return cls()
        try:
            said = json.loads(text)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise UserError(f"has damaged metadata: {METADATA_KEY} is no JSON object")
        settings: dict[Part, dict[str, Any]] = {}
        for part, component in COMPONENTS.items():
            own = {
                key.removeprefix(f"{component}."): value for key, value in said.items() if key.startswith(f"{component}.")
            }
            # A file of one model alone names its settings without the component.
            settings[part] = own or {key: value for key, value in said.items() if "." not in key}
        return cls(settings)

    def __bool__(self) -> bool:
        return any(self.settings.values())

    def alpha(self, layer: LayerName, *, rank: int) -> float | None:
        """The alpha that says by `alpha / rank` how PEFT scales a layer; None where its settings do not say."""
        settings = self.settings.get(layer.part, {})
        alpha = _setting(settings, layer, "lora_alpha", "alpha_pattern")
        if alpha is None:
            alpha = _setting(settings, layer, "alpha", "alpha_pattern")  # LoHa and LoKr
        if alpha is None:
            return None
        return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha

    def scale_of_full(self, layer: LayerName) -> float:
        """How PEFT scales a LoKr layer whose parts are both full, and which has a rank in its settings alone."""
        settings = self.settings.get(layer.part, {})
        alpha, rank = _setting(settings, layer, "alpha", "alpha_pattern"), _setting(settings, layer, "r", "rank_pattern")
        return alpha / rank if alpha is not None and rank else 1.0


def _setting(settings: Mapping[str, Any], layer: LayerName, name: str, pattern_name: str) -> float | None:
    """A number for one layer: that of the first pattern that fits, by PEFT's own rule, else that of all layers."""
    value = settings.get(name)
    for pattern, own in (settings.get(pattern_name) or {}).items():
        if value is not None and re.match(rf"(.*\.)?({pattern})$", layer.path):
            value = own
            break
    return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, kw_only=True)
class PeftLayer:
    """What PEFT has to be told of a LoRA layer."""

    name: LayerName
    rank: int
    alpha: float
    decomposed: bool


def peft_metadata(layers: list[PeftLayer]) -> dict[str, str]:
    """The metadata that let diffusers and PEFT read a file's layers with their ranks and alphas.

    Raises:
        UserError: DoRA on some layers of a part and not on others.
    """
    said: dict[str, Any] = {}
    for part, component in COMPONENTS.items():
        own = [layer for layer in layers if layer.name.part == part]
        if own:
            said |= {f"{component}.{key}": value for key, value in _settings(own).items()}
    return {METADATA_KEY: json.dumps(said, sort_keys=True)}


def _settings(layers: list[PeftLayer]) -> dict[str, Any]:
    if len({layer.decomposed for layer in layers}) > 1:
        raise UserError("has DoRA on some layers only, which PEFT's layout cannot say")
    rank = Counter(layer.rank for layer in layers).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers).most_common(1)[0][0]
    # Without their first level, text-encoder paths fit models of every version of transformers.
    paths = {id(layer): layer.name.path.removeprefix(TEXT_LEVEL) for layer in layers}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _as_number(alpha),
        "rank_pattern": {paths[id(layer)]: layer.rank for layer in layers if layer.rank != rank},
        "alpha_pattern": {paths[id(layer)]: _as_number(layer.alpha) for layer in layers if layer.alpha != alpha},
        "target_modules": sorted(paths.values()),
        "use_dora": layers[0].decomposed,
    }


def _as_number(value: float) -> int | float:
    return int(value) if value.is_integer() else value
