"""Which layers get an adapter, and which settings of their own: presets, and rules by pattern.

A pattern is a regular expression that is looked for in a module's path ("down_blocks.1.attentions.0...attn2.to_k"), for
text encoders behind "text_encoder." and for the U-Net behind "unet.", or in its saved name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import UserError, near_names, raise_all
from library.families.family import ModelFamily
from networks.core import arguments
from networks.core.algorithms import algorithm
from networks.core.arguments import Parser
from networks.core.targets import Target

SELECTION_ARGUMENTS: dict[str, Parser] = {
    "preset": arguments.as_is,
    "include_patterns": arguments.as_is,
    "exclude_patterns": arguments.as_is,
    "network_reg_dims": arguments.as_is,
    "network_reg_alphas": arguments.as_is,
    "network_reg_lrs": arguments.as_is,
    "network_reg_algos": arguments.as_is,
    "train_norm": arguments.flag,
}
"""Layers by preset, and settings by pattern (the spelling of sd-scripts' newer networks)."""

_ATTENTION = ("Attention", "CLIPAttention", "CLIPSdpaAttention")
_OUTSIDE_BLOCKS = r"^unet\.(conv_in|conv_out|time_embedding\.linear_[12])$"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A choice of layers: those inside modules of some classes, and those whose path has a pattern.

    Attributes:
        classes: class names.
        patterns: regular expressions, see this module's docstring.
        convolution_classes: class names that come in addition once `conv_dim` is given.
        convolutions: larger kernels are meant, so that `conv_dim` follows `network_dim` where it is not given.
    """

    classes: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    convolution_classes: tuple[str, ...] = ()
    convolutions: bool = False

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
        patterns=(r"^unet\..*\.(to_k|to_v|ff\.net\.2)$", r"^text_encoder\..*\.(k_proj|v_proj|mlp\.fc2)$")
    ),
}
"""LyCORIS' names for choices of layers; "attn-mlp" is what sd-scripts adapts: LierLa, and C3Lier with `conv_dim`."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Settings of the layers that a pattern matches; for each setting the first rule that gives it counts.

    Attributes:
        pattern: regular expression, see this module's docstring.
        where: the argument it stands in, for sentences.
        algorithm, rank, alpha, rate: the settings; None leaves one as it is. The rate is the layers' own learning rate.
    """

    pattern: str
    where: str
    algorithm: str | None = None
    rank: int | None = None
    alpha: float | None = None
    rate: float | None = None


def matches(pattern: str, target: Target) -> bool:
    """Whether a layer's path or saved name has the pattern."""
    return bool(re.search(pattern, full_path(target)) or re.search(pattern, target.name))


def full_path(target: Target) -> str:
    """The module's path behind its part: "unet.mid_block.attentions.0.proj_in"."""
    return f"{'unet' if target.part == 'denoiser' else 'text_encoder'}.{target.path}"


def first_setting(rules: Iterable[Rule], target: Target, setting: str) -> Any:
    """The setting of the first rule that gives it and matches the layer; None without one."""
    return next(
        (getattr(rule, setting) for rule in rules if getattr(rule, setting) is not None and matches(rule.pattern, target)),
        None,
    )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the arguments of `SELECTION_ARGUMENTS` say.

    Attributes:
        preset: the layers to choose from.
        include, exclude: patterns: an excluded layer is left out, unless a pattern includes it again.
        rules: settings by pattern.
        norms: train the norms among the layers as well.
    """

    preset: Preset
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    norms: bool = False

    def layers(self, targets: Sequence[Target], *, with_convolutions: bool) -> list[Target]:
        """The chosen ones of a model's layers, norms among them.

        Raises:
            UserError: the preset chooses none of them.
            UserErrors: every pattern that matches no layer, with near names.
        """
        chosen = [target for target in targets if self.preset.takes(target, with_convolutions=with_convolutions)]
        if not chosen:
            raise UserError(
                f"the preset chooses none of the model's {len(targets)} layers",
                where="--network_args preset",
                remedy="give another preset, or a whole model of Stable Diffusion",
            )
        self._check_patterns(chosen)
        return [target for target in chosen if not self._excludes(target)]

    def _excludes(self, target: Target) -> bool:
        def has(patterns: tuple[str, ...]) -> bool:
            return any(matches(pattern, target) for pattern in patterns)

        return has(self.exclude) and not has(self.include)

    def _check_patterns(self, targets: Sequence[Target]) -> None:
        given = [
            *((pattern, "include_patterns") for pattern in self.include),
            *((pattern, "exclude_patterns") for pattern in self.exclude),
            *((rule.pattern, rule.where) for rule in self.rules),
        ]
        words = sorted({word for target in targets for word in re.split(r"[.]", full_path(target)) if not word.isdigit()})
        problems = [
            UserError(
                f"'{pattern}' matches none of the {len(targets)} layers",
                where=f"--network_args {name}",
                remedy=near_names(re.split(r"[.*^$]+", pattern.strip(".*^$"))[-1], words),
            )
            for pattern, name in given
            if not any(matches(pattern, target) for target in targets)
        ]
        raise_all(problems)


def read_selection(values: Mapping[str, Any], family: ModelFamily, *, default_preset: str) -> Selection:
    """The selection that the arguments describe.

    Raises:
        UserErrors: an unknown preset or algorithm, a pattern that is no regular expression, a value that is no number.
    """
    name = values.get("preset", default_preset)
    if name not in PRESETS:
        raise UserError(f"'{name}' is no preset", where="--network_args preset", remedy=near_names(name, PRESETS))
    return Selection(
        preset=PRESETS[name](family),
        include=_patterns(values, "include_patterns"),
        exclude=_patterns(values, "exclude_patterns"),
        rules=(
            *_rules(values, "network_reg_algos", "algorithm", _algorithm_name),
            *_rules(values, "network_reg_dims", "rank", arguments.rank_or_none),
            *_rules(values, "network_reg_alphas", "alpha", arguments.positive),
            *_rules(values, "network_reg_lrs", "rate", arguments.not_negative),
        ),
        norms=values.get("train_norm", False),
    )


def _algorithm_name(text: str, name: str) -> str:
    return algorithm(text, where=f"--network_args {name}").name


def _rules(values: Mapping[str, Any], name: str, setting: str, parse: Parser) -> list[Rule]:
    """The rules of "pattern=value,pattern=value"."""
    rules = []
    for piece in values.get(name, "").split(",") if name in values else ():
        pattern, equals, value = piece.strip().rpartition("=")
        if not equals or not pattern:
            raise UserError(f"'{piece}' is not pattern=value", where=f"--network_args {name}")
        settings: dict[str, Any] = {setting: parse(value, name)}
        rules.append(Rule(pattern=_checked(pattern, name), where=name, **settings))
    return rules


def _patterns(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The patterns of "a,b", or of a Python list as sd-scripts wants it: "['a', 'b']"."""
    text = values.get(name)
    if text is None:
        return ()
    pieces: Any = text.split(",")
    if text.lstrip().startswith("["):
        try:
            pieces = ast.literal_eval(text.strip())
        except (SyntaxError, ValueError):
            raise UserError(f"'{text}' is no list of patterns", where=f"--network_args {name}") from None
    return tuple(_checked(str(piece).strip(), name) for piece in pieces)


def _checked(pattern: str, name: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"'{pattern}' is no regular expression ({error})", where=f"--network_args {name}") from None
    return pattern
