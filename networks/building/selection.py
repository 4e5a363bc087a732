"""Which layers get an adapter, and with which settings: a preset, patterns that leave layers out, and rules."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import UserError, near_names, raise_all, some_names
from library.families.family import ModelFamily
from networks.building.presets import Entry, Preset, find_preset
from networks.building.rules import Rule, full_path, matches, matches_any
from networks.building.targets import DENOISER, Target
from networks.core import arguments
from networks.core.algorithms import algorithm
from networks.core.arguments import Parser

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the arguments of `SELECTION_ARGUMENTS` say.

    Attributes:
        preset: the layers to choose from.
        include: patterns of layers that are taken whatever the preset and `exclude` say.
        exclude: patterns of layers that are left out.
        rules: settings by pattern.
        norms: train the norms among the layers as well.
    """

    preset: Preset
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    norms: bool = False

    def layers(self, targets: Sequence[Target], *, with_convolutions: bool) -> list[Target]:
        """The chosen ones of a model's layers.

        Raises:
            UserError: the preset chooses none of them.
            UserErrors: every pattern that matches no layer, with near names.
        """
        layers = [target for target in targets if self.norms or not target.spec.is_norm]
        raise_all(_naming_nothing(self.preset.chosen, layers))
        of_preset = [target for target in layers if self.preset.takes(target, with_convolutions=with_convolutions)]
        if not of_preset:
            raise UserError(
                f"the preset chooses none of the model's {len(targets)} layers",
                where="--network_args preset",
                remedy="give another preset, or a whole model of Stable Diffusion",
            )
        self._check_patterns(layers, of_preset)
        left_out = self.exclude + self.preset.exclude
        return [
            target
            for target in layers
            if matches_any(self.include, target)
            or (self.preset.takes(target, with_convolutions=with_convolutions) and not matches_any(left_out, target))
        ]

    def _check_patterns(self, layers: Sequence[Target], of_preset: Sequence[Target]) -> None:
        taken = [*of_preset, *(target for target in layers if matches_any(self.include, target))]
        of_file = _naming_nothing(self.preset.settings, taken)
        if len({target.part == DENOISER for target in layers}) == 1:
            # What names nothing may be about the side that is not there.
            for problem in of_file:
                logger.warning("%s", problem)
            of_file = []
        given = [
            *((pattern, "include_patterns", layers) for pattern in self.include),
            *((pattern, "exclude_patterns", of_preset) for pattern in self.exclude),
            *((rule.pattern, rule.where, taken) for rule in self.rules if rule not in self.preset.rules),
        ]
        raise_all(
            of_file
            + [
                UserError(
                    f"'{pattern}' matches none of the {len(targets)} layers",
                    where=f"--network_args {name}",
                    remedy=near_names(_last_word(pattern), _words(targets)),
                )
                for pattern, name, targets in given
                if not any(matches(pattern, target) for target in targets)
            ]
        )


def _naming_nothing(entries: Iterable[Entry], targets: Sequence[Target]) -> list[UserError]:
    """A sentence for each entry of a preset file that names none of the layers, though its part is there."""
    parts = {target.part for target in targets}
    return [
        UserError(
            f"{some_names([repr(name) for name in entry.names])} {'match' if len(entry.names) > 1 else 'matches'} "
            f"none of the {len(targets)} layers",
            where=entry.where,
            remedy=near_names(
                _last_word(entry.names[0]),
                {name for target in targets for name in target.inside} if entry.classes else _words(targets),
            ),
        )
        for entry in entries
        if not parts.isdisjoint(entry.parts) and not entry.names_any(targets)
    ]


def _words(targets: Iterable[Target]) -> list[str]:
    """What paths consist of, without numbers."""
    return sorted({word for target in targets for word in full_path(target).split(".") if not word.isdigit()})


def _last_word(pattern: str) -> str:
    """The last thing in a pattern that looks like a name."""
    return (re.findall(r"[A-Za-z]\w+", pattern) or [pattern])[-1]


def read_selection(values: Mapping[str, Any], family: ModelFamily, *, default_preset: str) -> Selection:
    """The selection that the arguments describe.

    Raises:
        UserErrors: an unknown preset or algorithm, a pattern that is no regular expression, a value that is no number.
    """
    preset = find_preset(values.get("preset", default_preset), family)
    return Selection(
        preset=preset,
        include=_patterns(values, "include_patterns"),
        exclude=_patterns(values, "exclude_patterns"),
        rules=(
            *_rules(values, "network_reg_algos", "algorithm", _algorithm_name),
            *_rules(values, "network_reg_dims", "rank", arguments.rank_or_none),
            *_rules(values, "network_reg_alphas", "alpha", arguments.positive),
            *_rules(values, "network_reg_lrs", "rate", arguments.not_negative),
            *preset.rules,
        ),
        norms=values.get("train_norm", False),
    )


def _algorithm_name(text: str, name: str) -> str:
    found = algorithm(text, where=f"--network_args {name}")
    if found.norms:
        raise UserError("norms are not chosen by pattern", where=f"--network_args {name}", remedy="use train_norm=True")
    return found.name


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
