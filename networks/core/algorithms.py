"""The algorithms there are: what each is called, where it lives, and how its tensors are recognised.

Importing this imports neither torch nor any algorithm.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.errors import UserError, near_names

if TYPE_CHECKING:
    from networks.core.adapter import Adapter
    from networks.core.arguments import Parser


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One algorithm, as its module declares it under the name `ALGORITHM`.

    Attributes:
        name: in the table below, in `network_reg_algos` and in reports.
        adapter: the class of its adapters. It is made as `adapter(spec, rank=, alpha=, **arguments)`, without rank or
            alpha where it has none, and from a file by `adapter.from_tensors(spec, tensors, **training_arguments)`.
        arguments: its own `network_args` that decide what its tensors are, beside those that all algorithms share.
        training_arguments: its own that mean something for tensors from a file too (drop-outs).
        has_rank: whether `network_dim` means something to it.
        has_alpha: whether `network_alpha` does.
        preset: the layers it is put on where the user does not say; see `selection.PRESETS`.
        norms: whether it adapts norms (and nothing else).
        rests: whether some of its parameters have no part in some optimizer steps, which DDP has to be told.
    """

    name: str
    adapter: type[Adapter]
    arguments: dict[str, Parser] = field(default_factory=dict)
    training_arguments: dict[str, Parser] = field(default_factory=dict)
    has_rank: bool = True
    has_alpha: bool = True
    preset: str = "attn-mlp"
    norms: bool = False
    rests: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table.

    Attributes:
        place: "module:attribute" of its `Algorithm`.
        title: for help and sentences.
        markers: names of tensors that a layer of a file must have to be of this algorithm; the first entry that fits wins.
        axes: number of axes of the first marker, where that tells two algorithms apart.
    """

    place: str
    title: str
    markers: tuple[tuple[str, ...], ...]
    axes: int | None = None


ALGORITHMS: Mapping[str, Entry] = {
    "lora": Entry(
        place="networks.lora:ALGORITHM",
        title="LoRA on Linear and 1x1 layers (LierLa), with conv_dim also on 3x3 convolutions (C3Lier)",
        markers=(("lora_up.weight", "lora_down.weight"),),
    ),
    "dylora": Entry(
        place="networks.dylora:ALGORITHM",
        title="DyLoRA: one training for all ranks up to network_dim; saved as LoRA",
        markers=(),
    ),
    "loha": Entry(
        place="networks.loha:ALGORITHM",
        title="LoHa: the element-wise product of two low-rank changes",
        markers=(("hada_w1_a",),),
    ),
    "ia3": Entry(
        place="networks.ia3:ALGORITHM",
        title="(IA)3: one factor for each input or output channel",
        markers=(("on_input",),),
    ),
    "lokr": Entry(
        place="networks.lokr:ALGORITHM",
        title="LoKr: a Kronecker product of a small and a large matrix",
        markers=(("lokr_w1",), ("lokr_w1_a",)),
    ),
    "full": Entry(
        place="networks.full:ALGORITHM",
        title="Full: the whole difference of weight and bias",
        markers=(("diff",), ("diff_b",), ("set_weight",)),
    ),
    "norm": Entry(
        place="networks.full:NORM",
        title="the difference of a norm's weight and bias (train_norm)",
        markers=(("w_norm",), ("b_norm",)),
    ),
    "oft": Entry(
        place="networks.oft:ALGORITHM",
        title="OFT: rotations of blocks of outputs (diag-OFT; COFT with constraint)",
        markers=(("oft_blocks",), ("oft_diag",)),
        axes=3,
    ),
    "boft": Entry(
        place="networks.boft:ALGORITHM",
        title="BOFT: rotations in butterfly stages",
        markers=(("oft_blocks",),),
        axes=4,
    ),
    "glora": Entry(
        place="networks.glora:ALGORITHM",
        title="GLoRA: a low-rank change that also passes through the base weight",
        markers=(("a1.weight", "a2.weight", "b1.weight", "b2.weight"),),
    ),
}
"""In the order in which a file's layer is tried."""


def algorithm(name: str, *, where: str = "--network_args") -> Algorithm:
    """The algorithm of a name.

    Raises:
        UserError: an unknown name, with the near ones.
    """
    if name not in ALGORITHMS:
        raise UserError(f"'{name}' is no algorithm", where=where, remedy=near_names(name, ALGORITHMS))
    module, _, attribute = ALGORITHMS[name].place.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    assert isinstance(found, Algorithm)
    return found


def algorithm_of(shapes: Mapping[str, Collection[int]]) -> str | None:
    """The name of the algorithm that a file's layer was made with; None where no algorithm here has such tensors.

    Args:
        shapes: tensor name within the layer, in the spelling of `keys.to_kohya` -> shape.
    """
    for name, entry in ALGORITHMS.items():
        for marker in entry.markers:
            if all(tensor in shapes for tensor in marker) and entry.axes in (None, len(shapes[marker[0]])):
                return name
    return None
