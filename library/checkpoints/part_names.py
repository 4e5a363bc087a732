"""Whether a part has all its tensors, told from names alone: without diffusers, transformers or a module.

Layers of one kind have tensors of the same names, so what one has and another of its kind lacks is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from library.checkpoints.ldm_keys import KeyTable, transformer_depth
from library.checkpoints.parts import PART_TITLES, SHOWN, TEXT_CLASSES, UNET, ModelPart
from library.errors import UserError, some_names

_TEXT_LAYERS = "encoder.layers."
_OF_SOME = "conv_shortcut"  # a block has this one only where its number of channels changes


def check_names(part: ModelPart, table: KeyTable) -> None:
    """Every layer of the configuration is there, as whole as the others of its kind, and nothing else is.

    Args:
        part: of a file or folder.
        table: `single_file.original_table` for its configuration.

    Raises:
        UserError: naming some of what is missing, or of what has no place.
    """
    own: dict[str, set[str]] = {layer: set() for layer in _layers(part, table)}
    strange = []
    for name in part.sources:
        layer = _owner(name, own)
        if layer is None:
            strange.append(name)
        else:
            own[layer].add(name[len(layer) :])
    whole: dict[str, set[str]] = {}
    for layer, tensors in own.items():
        whole.setdefault(_kind(layer), set()).update(tensors)
    missing = [
        layer + tensor
        for layer, tensors in own.items()
        if tensors or not layer.endswith(_OF_SOME)
        for tensor in sorted(whole[_kind(layer)] - tensors)
    ]
    missing += [layer for layer in own if not whole[_kind(layer)] and not layer.endswith(_OF_SOME)]
    title = PART_TITLES[part.kind]
    if missing:
        named = some_names(missing, SHOWN)
        raise UserError(f"lacks {named} of its {title}", where=part.where, remedy="fetch or convert it again")
    if strange:
        raise UserError(f"has tensors that its {title} has no place for: {some_names(strange, SHOWN)}", where=part.where)


def _layers(part: ModelPart, table: KeyTable) -> Iterator[str]:
    """The beginnings of names in the module."""
    for _, module in table.pairs():
        if part.kind in TEXT_CLASSES and module == "encoder":
            yield from (f"{_TEXT_LAYERS}{number}" for number in range(part.config["num_hidden_layers"]))
            continue
        yield module
        if part.kind == UNET and ".attentions." in module:
            depth = transformer_depth(part.config, module)
            yield from (f"{module}.transformer_blocks.{number}" for number in range(depth))


def _owner(name: str, layers: dict[str, set[str]]) -> str | None:
    """The longest known beginning of a name."""
    cut = len(name)
    while cut > 0:
        if name[:cut] in layers:
            return name[:cut]
        cut = name.rfind(".", 0, cut)
    return None


def _kind(layer: str) -> str:
    """What layers of one kind have in common: the name without its numbers, blocks being like each other."""
    return re.sub(r"\d+", "#", re.sub(r"mid_block|(down|up)_blocks\.\d+", "block", layer))
