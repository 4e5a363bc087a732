"""Choices of layers: LyCORIS' presets by name, and its preset files."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError, attempt, near_names, raise_all
from library.families.family import ModelFamily
from library.text_files import read_toml
from networks.building.rules import Rule, matches, matches_any
from networks.building.targets import DENOISER, TEXT_ENCODERS, Part, Target
from networks.core import arguments
from networks.core.algorithms import algorithm
from networks.core.arguments import Parser

_ATTENTION = ("Attention", "CLIPAttention", "CLIPSdpaAttention")
_EMBEDDINGS = r"(time|add)_embedding\.linear_[12]"
_OUTSIDE_BLOCKS = rf"^unet\.(conv_in|conv_out|{_EMBEDDINGS})$"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a preset file calls layers by: one pattern, or a list of classes of which some may be other models'.

    Attributes:
        where: file and key, for sentences.
        names: as the file has them.
        patterns: the same as regular expressions of whole paths; none for classes.
        classes: the names, where they are classes.
        parts: of the model that it is about; one of them has to have what it names.
    """

    where: str
    names: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    parts: tuple[Part, ...] = (*TEXT_ENCODERS, DENOISER)

    def names_any(self, targets: Iterable[Target]) -> bool:
        """Whether any of these layers is meant."""
        return any(
            target.part in self.parts
            and (any(name in target.inside for name in self.classes) or matches_any(self.patterns, target))
            for target in targets
        )


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
        chosen: of a file, what it chooses layers by; each has to name some. A built-in preset is for every model.
        settings: of a file, what it leaves layers out by, and gives them settings by.
    """

    classes: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    convolution_classes: tuple[str, ...] = ()
    convolutions: bool = False
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    chosen: tuple[Entry, ...] = ()
    settings: tuple[Entry, ...] = ()

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
        patterns=(rf"^unet\.{_EMBEDDINGS}$",),
    ),
    "unet-only": lambda family: Preset(
        classes=family.denoiser_targets + family.denoiser_conv_targets, patterns=(_OUTSIDE_BLOCKS,), convolutions=True
    ),
    "unet-transformer-only": lambda family: Preset(classes=family.denoiser_targets),
    "unet-convblock-only": lambda family: Preset(
        classes=family.denoiser_conv_targets, patterns=(r"^unet\.conv_(in|out)$",), convolutions=True
    ),
    "ia3": lambda family: Preset(
        patterns=(r"^unet\..*\.(to_k|to_v|ff\.net\.2)$", r"^text_encoder(_2)?\..*\.(k_proj|v_proj|mlp\.fc2)$"),
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
_RULE_FIELDS = {"algo": "algorithm", "dim": "rank", "alpha": "alpha"}
_RULE_PARSERS: Mapping[str, Parser] = {
    "algo": arguments.as_is,
    "dim": arguments.rank_or_none,
    "alpha": arguments.not_negative,
}
_UNET, _TEXT_ENCODER = "unet", r"text_encoder(?:_2)?"
_EITHER = f"(?:{_UNET}|{_TEXT_ENCODER})"
_PARTS: Mapping[str, tuple[Part, ...]] = {
    _UNET: (DENOISER,),
    _TEXT_ENCODER: TEXT_ENCODERS,
    _EITHER: (*TEXT_ENCODERS, DENOISER),
}
"""Pattern of what stands before a path -> the parts that it stands for."""


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
    """Names of the file's lists are matched from the path's beginning, as LyCORIS does it.

    Raises:
        UserErrors: everything that is wrong in the file, as far as it can be told without the model.
    """
    where = f"--network_args preset {path}"
    problems = [problem for key, value in content.items() for problem in _wrong_key(key, value, where)]
    raise_all(problems)
    globs = content.get("use_fnmatch", False)

    def entry(key: str, name: str, part: str) -> Entry | None:
        place = f"{where}, {key}"
        pattern = attempt(lambda: _anchored(name, part, globs=globs, where=place), problems)
        return None if pattern is None else Entry(where=place, names=(name,), patterns=(pattern,), parts=_PARTS[part])

    def listed(key: str, part: str) -> tuple[Entry, ...]:
        entries = [entry(key, name, part) for name in content.get(key, [])]
        return tuple(each for each in entries if each is not None)

    def classes(key: str, part: str) -> tuple[Entry, ...]:
        names = tuple(content.get(key, ()))
        return (Entry(where=f"{where}, {key}", names=names, classes=names, parts=_PARTS[part]),) if names else ()

    chosen = (
        *classes("unet_target_module", _UNET),
        *classes("text_encoder_target_module", _TEXT_ENCODER),
        *listed("unet_target_name", _UNET),
        *listed("text_encoder_target_name", _TEXT_ENCODER),
    )
    left_out = listed("exclude_name", _EITHER)
    ruled: list[tuple[Entry, Any]] = [
        (each, settings)
        for name, settings in content.get("name_algo_map", {}).items()
        if (each := entry("name_algo_map", name, _EITHER)) is not None
    ]
    ruled += [
        (Entry(where=f"{where}, module_algo_map", names=(name,), classes=(name,)), settings)
        for name, settings in content.get("module_algo_map", {}).items()
    ]
    rules = [attempt(lambda each=each, settings=settings: _rule(each, settings), problems) for each, settings in ruled]  # type: ignore[misc]
    raise_all(problems)
    return Preset(
        classes=tuple(name for each in chosen for name in each.classes),
        patterns=tuple(pattern for each in chosen for pattern in each.patterns),
        convolutions=content.get("enable_conv", True),
        exclude=tuple(pattern for each in left_out for pattern in each.patterns),
        rules=tuple(rule for rule in rules if rule is not None),
        chosen=chosen,
        settings=(*left_out, *(each for each, _ in ruled)),
    )


def _wrong_key(key: str, value: Any, where: str) -> list[UserError]:
    """What is wrong with a key of a file, or with the kind of its value."""
    if key not in _FILE_KEYS:
        return [UserError(f"unknown key '{key}'", where=where, remedy=near_names(key, _FILE_KEYS))]
    if not isinstance(value, _FILE_KEYS[key]):
        return [UserError(f"{key} is {value!r}, not a {_FILE_KEYS[key].__name__}", where=where)]
    strange = [each for each in value if not isinstance(each, str)] if isinstance(value, list) else []
    return [UserError(f"{key} holds {each!r}, which is no name", where=where) for each in strange]


def _anchored(name: str, part: str, *, globs: bool, where: str) -> str:
    pattern = fnmatch.translate(name) if globs else name
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"'{name}' is no regular expression ({error})", where=where) from None
    return rf"^{part}\.(?:{pattern})"


def _rule(entry: Entry, settings: Any) -> Rule:
    """The rule of one entry: algo, dim, alpha, and arguments of the algorithm.

    Raises:
        UserErrors: all that is wrong with the settings.
    """
    where = f"{entry.where}.{entry.names[0]}"
    if not isinstance(settings, Mapping):
        raise UserError(f"is {settings!r}, not a table of settings", where=where)
    chosen = algorithm(str(settings["algo"]), where=where) if "algo" in settings else None
    if chosen is not None and chosen.norms:
        raise UserError("norms are not chosen by pattern", where=where, remedy="use train_norm=True")
    known = chosen.arguments | chosen.training_arguments if chosen is not None else {}
    options, found, problems = {}, {}, []
    for key, value in settings.items():
        parser = known.get(key) or _RULE_PARSERS.get(key)
        if parser is None:
            remedy = near_names(key, [*_RULE_PARSERS, *known])
            problems.append(UserError(f"unknown key '{key}'", where=where, remedy=remedy))
            continue
        try:
            parsed = parser(str(value), key)
        except UserError as error:
            problems.append(UserError(error.what, where=f"{where}, {key}", remedy=error.remedy))
            continue
        if key in known:
            options[key] = parsed
        else:
            found[_RULE_FIELDS[key]] = parsed
    raise_all(problems)
    pattern = entry.patterns[0] if entry.patterns else ""
    inside = entry.classes[0] if entry.classes else ""
    return Rule(pattern=pattern, where=where, inside=inside, options=options, **found)
