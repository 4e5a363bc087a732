"""What one program makes of an adapter file: its table of verdicts applied to every layer, and its rules to the whole.

A table lists what a program does not apply rightly at every strength; traits that it does not list are applied rightly.
The tables themselves are in `readers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from library.errors import counted
from networks.formats.traits import FileLayer, Header, Trait, file_layers


class Effect(StrEnum):
    """What a program makes of a layer; later ones are worse."""

    RIGHT = "applies rightly"
    WRONG = "applies wrongly"
    DROPPED = "drops"
    REFUSED = "refuses"


@dataclass(frozen=True)
class Verdict:
    """A program's way with one trait, and the reason where the trait's own words do not say it."""

    effect: Effect
    why: str = ""


@dataclass(kw_only=True)
class Findings:
    """What a rule about whole files adds to the tables: reasons by layer, or one to refuse the file."""

    wrong: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    refused: str | None = None


Layers = Mapping[str, FileLayer]
FileRule = Callable[[Header, Layers, Mapping[str, Effect]], Findings]
"""(header, layers, what the table says of each layer) -> what to add."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One program.

    Attributes:
        name: for the command line ("a1111").
        title: for sentences.
        version: that was read or run, with its date.
        verdicts: what it makes of the traits it does not apply rightly.
        rules: about the whole file.
        wants_one_alpha: whether it misreads alphas that differ by layer.
        wants_width: whether it tells the base model by one layer of a kind that it reads widths of.
    """

    name: str
    title: str
    version: str
    verdicts: Mapping[Trait, Verdict]
    rules: Sequence[FileRule] = ()
    wants_one_alpha: bool = False
    wants_width: bool = False


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one program makes of one file; layers under the names that the file has.

    Attributes:
        refused: why it takes nothing of the file; None where it takes some.
        right: layers it applies rightly.
        wrong, dropped: layer -> reason.
    """

    reader: Reader
    refused: str | None
    right: tuple[str, ...]
    wrong: Mapping[str, str]
    dropped: Mapping[str, str]

    @property
    def is_right(self) -> bool:
        """Whether the program applies every layer as it was trained."""
        return self.refused is None and not self.wrong and not self.dropped

    def __str__(self) -> str:
        """ "diffusers would refuse it (LoHa)", "A1111 drops 3 of 192 layers (conv_norm_out)"."""
        if self.refused is not None:
            return f"{self.reader.title} would refuse it ({self.refused})"
        total = len(self.right) + len(self.wrong) + len(self.dropped)
        faults = []
        for reasons, does in ((self.wrong, "applies {} wrongly"), (self.dropped, "drops {}")):
            if reasons:
                share = "every layer" if len(reasons) == total else f"{len(reasons)} of {counted(total, 'layer')}"
                faults.append(f"{does.format(share)} ({'; '.join(dict.fromkeys(reasons.values()))})")
        return (
            f"{self.reader.title} {' and '.join(faults)}" if faults else f"{self.reader.title} applies every layer rightly"
        )


_NOBODYS: Mapping[Trait, Verdict] = {
    Trait.STRANGE_LAYER: Verdict(Effect.DROPPED),
    Trait.MISFIT: Verdict(Effect.REFUSED),
}
"""Verdicts that all programs share."""


def verdict_of(reader: Reader, traits: Sequence[Trait]) -> tuple[Trait | None, Verdict]:
    """The worst of a reader's verdicts about a layer's traits, and the trait that it is about.

    A layer whose name a reader does not find is not looked at further.
    """
    order = list(Effect)
    worst: tuple[Trait | None, Verdict] = None, Verdict(Effect.RIGHT)
    for place, trait in enumerate(traits):
        verdict = _NOBODYS.get(trait) or reader.verdicts.get(trait)
        if verdict is not None and order.index(verdict.effect) > order.index(worst[1].effect):
            worst = trait, verdict
            if place == 0 and verdict.effect is Effect.DROPPED:
                break
    return worst


def read_by(reader: Reader, header: Header) -> Reading:
    """What a program makes of a file."""
    layers = file_layers(header)
    refused: str | None = None
    reasons: dict[Effect, dict[str, str]] = {effect: {} for effect in Effect}
    for name, layer in layers.items():
        trait, verdict = verdict_of(reader, layer.traits)
        reasons[verdict.effect][name] = f"{trait}: {verdict.why}" if verdict.why else str(trait)
    refused = next(iter(reasons[Effect.REFUSED].values()), None)
    effects = {name: effect for effect, of_effect in reasons.items() for name in of_effect}
    wrong, dropped = reasons[Effect.WRONG], reasons[Effect.DROPPED]
    for rule in reader.rules:
        found = rule(header, layers, effects)
        refused = refused or found.refused
        dropped = found.dropped | dropped
        effects |= dict.fromkeys(found.dropped, Effect.DROPPED)
        wrong = found.wrong | wrong
    wrong = {name: why for name, why in wrong.items() if name not in dropped}
    right = tuple(name for name in layers if name not in wrong and name not in dropped)
    return Reading(reader=reader, refused=refused, right=right, wrong=wrong, dropped=dropped)
