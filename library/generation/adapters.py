"""The adapters that pictures are made with, and how strongly each acts on each row of a batch at each step.

A row is one text for the denoiser; the rows of a batch may have different adapters. Adapters stand on the base model's
layers as hooks while a picture wants them, or go into its weights where that is asked for; afterwards the model is bit for
bit what it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.errors import UserError
from library.prompts.lora_tags import LoraTag
from library.prompts.strengths import NOTHING, AdapterStrength, StrengthNow
from library.prompts.sub_prompts import SubPrompt
from networks.building.network import AdapterNetwork


@dataclass(frozen=True)
class AdapterKey:
    """One adapter.

    Attributes:
        file: that holds it.
        rank: that it is cut to; None for its own.
        given: its number on the command line, which says how it is loaded; None for one that a tag names.
    """

    file: Path
    rank: int | None = None
    given: int | None = None


Acting = Mapping[AdapterKey, tuple[AdapterStrength, ...]]
"""Which adapters act on a row, and how strongly; one that is asked for several times acts with the sum."""

NOBODY: Acting = {}
KEPT = 8
"""Adapters of tags that stay loaded, though no row of the batch has them: a grid may name a hundred."""


def strengths_at(acting: Acting, step: int, steps: int) -> dict[AdapterKey, StrengthNow]:
    """The strength of each adapter at a step."""
    return {key: StrengthNow.total([each.at(step, steps) for each in uses]) for key, uses in acting.items()}


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """What an adapter is turned to.

    Attributes:
        text_encoder: strength there.
        rows: for each row of a batch, the strengths on the denoiser (`StrengthNow`); empty while texts are encoded.
    """

    text_encoder: float = 0.0
    rows: tuple[tuple[float, ...], ...] = ()

    @property
    def acts(self) -> bool:
        """Whether any strength is not 0."""
        return bool(self.text_encoder) or any(map(any, self.rows))

    def single(self, key: AdapterKey) -> float:
        """The one strength that networks of other packages know.

        Raises:
            UserError: there are several.
        """
        values = {value for row in self.rows for value in row} or {self.text_encoder}
        if len(values) > 1:
            raise UserError(
                "is of a module that knows only one strength at a time",
                where=str(key.file),
                remedy="use --network_module networks.lora, which reads most files",
            )
        return values.pop()


class AdapterRack:
    """The adapters of a run. It loads each when a picture first wants it.

    Args:
        given: of the command line, in its order, with their strengths; they act on every picture.
        find: the file that a tag names.
        load: a network that is not attached, from a file and a rank.
        device: where rows are computed.
        merges: put adapters whose strength stays the same into the weights while pictures want them, where rows allow it.
    """

    def __init__(
        self,
        *,
        given: Sequence[tuple[AdapterKey, float]] = (),
        find: Callable[[LoraTag], Path] | None = None,
        load: Callable[[AdapterKey], Any] | None = None,
        device: torch.device | str = "cpu",
        merges: bool = False,
    ) -> None:
        self._given, self._find, self._load, self._device = list(given), find, load, device
        self.merges = merges
        self._networks: dict[AdapterKey, Any] = {}
        self._turned: dict[AdapterKey, _Turn] = {}
        self._in_weights: Acting = NOBODY
        self._merged: list[AdapterNetwork] = []

    # What acts where

    def acting(
        self, sub_prompts: Sequence[SubPrompt], strengths: Sequence[float] = (), *, regional: bool = False
    ) -> list[Acting]:
        """What acts on each sub-prompt of a picture.

        The adapters of the command line act on all of them; where there are several, the first acts on the first and so
        on, as in sd-scripts. Tags act on all sub-prompts, as in web UIs; where regions are given, on their own.

        Args:
            strengths: of the command line's adapters, instead of those given there; the last for all further ones.
            regional: whether each sub-prompt has a region of its own.
        """
        result: list[Acting] = []
        for place, sub_prompt in enumerate(sub_prompts):
            tags = sub_prompt.tags if regional else [tag for each in sub_prompts for tag in each.tags]
            uses: dict[AdapterKey, tuple[AdapterStrength, ...]] = {}
            for number, (key, strength) in enumerate(self._given):
                if len(sub_prompts) > 1 and number != place:
                    continue
                value = strengths[min(number, len(strengths) - 1)] if strengths else strength
                uses[key] = (*uses.get(key, ()), AdapterStrength.constant(value))
            for tag in tags:
                if not tag.strength.is_nothing:
                    key = self.key_of(tag)
                    uses[key] = (*uses.get(key, ()), tag.strength)
            result.append(uses)
        return result

    def key_of(self, tag: LoraTag) -> AdapterKey:
        """The adapter that a tag names."""
        if self._find is None:
            raise UserError("adapters cannot be named here", where=tag.text, remedy="leave the tag out")
        return AdapterKey(self._find(tag), tag.rank)

    # On the model

    def add(self, key: AdapterKey, network: Any) -> None:
        """Take in a network that is loaded already."""
        self._networks[key] = network

    def network(self, key: AdapterKey) -> Any:
        """The network of a key, loaded if it is not there."""
        if key not in self._networks:
            assert self._load is not None, "nothing names adapters where none can be loaded"
            self._make_room()
            self._networks[key] = self._load(key)
        self._networks[key] = self._networks.pop(key)  # the last is the one that was wanted last
        return self._networks[key]

    def _make_room(self) -> None:
        """Let go of the adapters of tags that nothing has wanted for longest; those of the command line stay."""
        at_work = {key for key, turn in self._turned.items() if turn.acts} | self._in_weights.keys()
        idle = [key for key in self._networks if key.given is None and key not in at_work]
        for key in idle[: len(idle) + 1 - KEPT]:
            del self._networks[key]
            self._turned.pop(key, None)

    def on_text_encoder(self, acting: Acting, step: int, steps: int) -> Mapping[AdapterKey, float]:
        """What acts on the text encoders at a step, and how strongly."""
        return {key: now.text_encoder for key, now in strengths_at(acting, step, steps).items() if now.text_encoder}

    def set_text_encoder(self, values: Mapping[AdapterKey, float]) -> None:
        """Let adapters act on the text encoders at these strengths, and no others."""
        for key in dict.fromkeys([*self._turned, *values]):
            self._turn(key, _Turn(text_encoder=values.get(key, 0.0)))

    def set_denoiser(self, rows: Sequence[Acting], step: int, steps: int) -> None:
        """Let adapters act on the denoiser as they do on each row of a batch at a step."""
        now = [strengths_at(acting, step, steps) for acting in rows]
        for key in dict.fromkeys([*self._turned, *(key for row in now for key in row)]):
            self._turn(key, _Turn(rows=tuple(row.get(key, NOTHING).denoiser for row in now)))

    def _turn(self, key: AdapterKey, turn: _Turn) -> None:
        """Turn one adapter to new strengths; it is on the model only while any is not 0."""
        if self._turned.get(key) == turn:
            return
        network = self.network(key)
        if not isinstance(network, AdapterNetwork):
            network.set_multiplier(turn.single(key))
        elif turn.acts:
            rows = turn.rows or (NOTHING.denoiser,)
            columns = list(zip(*rows, strict=True))
            strengths = {values: self._per_row(values) for values in set(columns)}
            _set_strengths(network, turn.text_encoder, [strengths[values] for values in columns])
            network.attach()
        else:
            network.detach()
        self._turned[key] = turn

    def _per_row(self, values: Sequence[float]) -> float | torch.Tensor:
        return values[0] if len(set(values)) == 1 else torch.tensor(values, device=self._device)

    @property
    def has_hooks(self) -> bool:
        """Whether adapters may act on the model from outside its weights; networks of other packages do not tell."""
        return any(turn.acts or not isinstance(self._networks[key], AdapterNetwork) for key, turn in self._turned.items())

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[None]:
        """The model with adapters as pictures want them, and without any afterwards."""
        try:
            yield
        finally:
            self._take_off()

    def _take_off(self) -> None:
        """Leave the model without adapters; those of other packages stay as they are."""
        while self._merged:
            self._merged.pop().unmerge()
        self._in_weights = NOBODY
        for network in self._networks.values():
            if isinstance(network, AdapterNetwork):
                network.detach()
        self._turned.clear()

    def merge(self, rows: Sequence[Acting]) -> bool:
        """Have the adapters of a batch in the weights, where that gives the same as hooks; tells whether it does.

        Rows have to have the same adapters at strengths that stay the same at every step. What is in the weights stays there
        until another batch comes, or the model is given back.
        """
        wanted = rows[0] if self._can_merge(rows) else NOBODY
        if wanted != self._in_weights:
            self._take_off()
            for key, now in strengths_at(wanted, 0, 1).items():
                network = self.network(key)
                _set_strengths(network, now.text_encoder, now.denoiser)
                network.merge()
                self._merged.append(network)
            self._in_weights = wanted
        return bool(wanted)

    def _can_merge(self, rows: Sequence[Acting]) -> bool:
        if not self.merges or any(row != rows[0] for row in rows):
            return False
        steady = all(each.is_constant for uses in rows[0].values() for each in uses)
        return steady and all(isinstance(self.network(key), AdapterNetwork) for key in rows[0])


def _set_strengths(network: AdapterNetwork, text_encoder: float, denoiser: Sequence[float | torch.Tensor]) -> None:
    """Set a network's strengths from those of `StrengthNow.denoiser`, whose places every family has some of."""
    *places, outside = denoiser
    blocks = [outside if place is None else places[place - 1] for place in network.family.block_places]
    network.set_multipliers(text_encoder=text_encoder, denoiser=outside, blocks=blocks)
