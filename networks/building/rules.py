"""Settings of layers by pattern.

A pattern is a regular expression that is looked for in a module's path behind its part ("unet.down_blocks.1...attn2.to_k",
"text_encoder.encoder.layers.0...q_proj", "text_encoder_2.encoder...", without a level `text_model`), or in its saved name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from networks.building.targets import Target
from networks.formats.layer_names import TEXT_LEVEL
from networks.formats.peft_metadata import COMPONENTS


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Settings of the layers that a pattern matches; for each setting the first rule that gives it counts.

    Attributes:
        pattern: regular expression, see this module's docstring.
        where: what it was given with, for sentences.
        inside: only layers inside modules of this class; empty for all.
        algorithm, rank, alpha, rate: the settings; None leaves one as it is. The rate is the layers' own learning rate.
        options: values for the algorithm's constructor; they come before those that are given for all layers.
        defaults: the same, after those.
    """

    pattern: str
    where: str
    inside: str = ""
    algorithm: str | None = None
    rank: int | None = None
    alpha: float | None = None
    rate: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def applies_to(self, target: Target) -> bool:
        """Whether the rule is about a layer."""
        return (not self.inside or self.inside in target.inside) and matches(self.pattern, target)


def matches(pattern: str, target: Target) -> bool:
    """Whether a layer's path or saved name has the pattern."""
    return bool(re.search(pattern, full_path(target)) or re.search(pattern, target.name))


def matches_any(patterns: Iterable[str], target: Target) -> bool:
    """Whether a layer has one of the patterns."""
    return any(matches(pattern, target) for pattern in patterns)


def full_path(target: Target) -> str:
    """The module's path behind its part: "unet.mid_block.attentions.0.proj_in"."""
    return f"{COMPONENTS[target.part]}.{target.path.removeprefix(TEXT_LEVEL)}"


def first_setting(rules: Iterable[Rule], target: Target, setting: str) -> Any:
    """The setting of the first rule that gives it and matches the layer; None without one."""
    return next(
        (getattr(rule, setting) for rule in rules if getattr(rule, setting) is not None and rule.applies_to(target)),
        None,
    )


def ruled_options(rules: Iterable[Rule], target: Target, *, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a layer: those of the rules about it, the ones given for all layers, and the rules' defaults, in that
    order; the first rule that gives one counts."""
    about = [rule for rule in rules if rule.applies_to(target)]
    options: dict[str, Any] = {}
    for source in (*(rule.options for rule in about), given, *(rule.defaults for rule in about)):
        options = dict(source) | options
    return options
