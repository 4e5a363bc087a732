"""Choices of layers: LyCORIS' presets by name, and its preset files."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError, near_names
from library.families.family import ModelFamily
from library.text_files import read_toml
from networks.building.rules import Rule, matches
from networks.building.targets import Target
from networks.core.algorithms import algorithm

_ATTENTION = ("Attention", "CLIPAttention", "CLIPSdpaAttention")
_OUTSIDE_BLOCKS = r"^unet\.(conv_in|conv_out|time_embedding\.linear_[12])$"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A choice of layers: those inside modules of some classes, and those whose path has a pattern.

    Attributes:
        classes: class names.
        patterns: regular expressions, see `rules.py`.
        convolution_classes: class names that come in addition once `conv_dim` is given.
        convolutions: larger kernels are meant, so that `conv_dim` follows `network_dim` where it is not given.
        exclude: patterns of layers that are left out.
        rules: settings of some of the layers.
    """

    classes: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    convolution_classes: tuple[str, ...] = ()
    convolutions: bool = False
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()

    def takes(self, target: Target, *, with_convolutions: bool) -> bool:
        """Whether a layer is chosen."""
        classes = self.classes + (self.convolution_classes if with_convolutions else ())
        return any(name in classes for name in target.inside) or any(matches(pattern, target) for pattern in self.patterns)


PRESETS: Mapping[str, Callable[[ModelFamily], Preset]] = {
    "attn-mlp": lambda family: Preset(
        classes=family.text_encoder_targets + family.denoiser_targets, convolution_classes=family.denoiser_conv_targets
    ),
    "attn-only": lambda family: Preset(classes=_ATTENTION),
    "full": lambda family: Preset(
        classes=family.text_encoder_targets + family.denoiser_targets + family.denoiser_conv_targets,
        patterns=(_OUTSIDE_BLOCKS,),
        convolutions=True,
    ),
    "full-lin": lambda family: Preset(
        classes=family.text_encoder_targets + family.denoiser_targets + family.denoiser_conv_targets,
        patterns=(r"^unet\.time_embedding\.linear_[12]$",),
    ),
    "unet-only": lambda family: Preset(
        classes=family.denoiser_targets + family.denoiser_conv_targets, patterns=(_OUTSIDE_BLOCKS,), convolutions=True
    ),
    "unet-transformer-only": lambda family: Preset(classes=family.denoiser_targets),
    "unet-convblock-only": lambda family: Preset(
        classes=family.denoiser_conv_targets, patterns=(r"^unet\.conv_(in|out)$",), convolutions=True
    ),
    "ia3": lambda family: Preset(
        patterns=(r"^unet\..*\.(to_k|to_v|ff\.net\.2)$", r"^text_encoder\..*\.(k_proj|v_proj|mlp\.fc2)$"),
        rules=(Rule(pattern=r"\.(ff\.net\.2|mlp\.fc2)$", where="preset", defaults={"train_on_input": True}),),
    ),
}
"""LyCORIS' names for choices of layers; "attn-mlp" is what sd-scripts adapts: LierLa, and C3Lier with `conv_dim`."""

_FILE_KEYS: Mapping[str, type] = {
    "enable_conv": bool,
    "unet_target_module": list,
    "unet_target_name": list,
    "text_encoder_target_module": list,
    "text_encoder_target_name": list,
    "exclude_name": list,
    "use_fnmatch": bool,
    "module_algo_map": dict,
    "name_algo_map": dict,
}
_RULE_KEYS = {"algo": "algorithm", "dim": "rank", "alpha": "alpha"}


def find_preset(name: str, family: ModelFamily) -> Preset:
    """The preset of a name, or of a TOML file as LyCORIS has them.

    Raises:
        UserError: neither a name nor a file, or a file with something wrong in it.
    """
    if name in PRESETS:
        return PRESETS[name](family)
    if not name.endswith(".toml"):
        raise UserError(f"'{name}' is no preset", where="--network_args preset", remedy=near_names(name, PRESETS))
    return _preset_of_file(read_toml(Path(name), where=f"--network_args preset {name}"), name)


def _preset_of_file(content: Mapping[str, Any], path: str) -> Preset:
    """Names of the file's lists are matched from the path's beginning, as LyCORIS does it."""
    where = f"--network_args preset {path}"
    for key, value in content.items():
        if key not in _FILE_KEYS:
            raise UserError(f"unknown key '{key}'", where=where, remedy=near_names(key, _FILE_KEYS))
        if not isinstance(value, _FILE_KEYS[key]):
            raise UserError(f"{key} is {value!r}, not a {_FILE_KEYS[key].__name__}", where=where)
    globs = content.get("use_fnmatch", False)

    def patterns(names: list[str], part: str) -> tuple[str, ...]:
        return tuple(_anchored(name, part, globs=globs, where=where) for name in names)

    by_name, by_class = content.get("name_algo_map", {}), content.get("module_algo_map", {})
    return Preset(
        classes=(*content.get("unet_target_module", ()), *content.get("text_encoder_target_module", ())),
        patterns=(
            *patterns(content.get("unet_target_name", []), "unet"),
            *patterns(content.get("text_encoder_target_name", []), "text_encoder"),
        ),
        convolutions=content.get("enable_conv", True),
        exclude=patterns(content.get("exclude_name", []), "(unet|text_encoder)"),
        rules=(
            *(
                _rule(_anchored(name, "(unet|text_encoder)", globs=globs, where=where), "", settings, where)
                for name, settings in by_name.items()
            ),
            *(_rule("", name, settings, where) for name, settings in by_class.items()),
        ),
    )


def _anchored(name: str, part: str, *, globs: bool, where: str) -> str:
    pattern = fnmatch.translate(name) if globs else name
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"'{name}' is no regular expression ({error})", where=where) from None
    return rf"^{part}\.(?:{pattern})"


def _rule(pattern: str, inside: str, settings: Any, where: str) -> Rule:
    """The rule of one entry: algo, dim, alpha, and arguments of the algorithm."""
    where = f"{where}, {inside or pattern}"
    if not isinstance(settings, Mapping):
        raise UserError(f"is {settings!r}, not a table of settings", where=where)
    chosen = algorithm(str(settings["algo"]), where=where) if "algo" in settings else None
    known = chosen.arguments | chosen.training_arguments if chosen is not None else {}
    options = {}
    for key, value in settings.items():
        if key in known:
            options[key] = known[key](str(value), key)
        elif key not in _RULE_KEYS:
            raise UserError(f"unknown key '{key}'", where=where, remedy=near_names(key, [*_RULE_KEYS, *known]))
    found: dict[str, Any] = {_RULE_KEYS[key]: value for key, value in settings.items() if key in _RULE_KEYS}
    return Rule(pattern=pattern, where=where, inside=inside, options=options, **found)
