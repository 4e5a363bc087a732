"""What an adapter file's header tells about it, as a line of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints.tensor_files import open_tensor_file
from library.errors import UserError, counted
from library.families.detect import FAMILIES, adapter_origin
from library.generation.trigger_words import trigger_words
from library.tables import table
from networks.formats.traits import FileLayer, Header, Trait, file_layers, holds_adapter, rank_by_shapes

HASH_DIGITS = 12  # as A1111 shows them
_WORDS = 6  # trigger words of a line
_TITLES = ("name", "family", "type", "rank", "size", "hash", "trigger words")
_DYLORA = "networks.dylora"


@dataclass(frozen=True, kw_only=True)
class ShelfEntry:
    """What is known of an adapter file.

    Attributes:
        file: with the tensors.
        name: what a tag may call it.
        size: in bytes.
        family: what models it is for; empty where nothing tells.
        algorithms: their names, those of most layers first.
        ranks: the different ones, in rising order.
        short_hash: the beginning of the tensors' hash as its writer noted it; empty where there is none.
        trigger_words: see `trigger_words`.
        fault: why it is no adapter that can be used; None for those that can.
    """

    file: Path
    name: str
    size: int = 0
    family: str = ""
    algorithms: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    short_hash: str = ""
    trigger_words: tuple[str, ...] = ()
    fault: str | None = None


def read_entry(path: Path, name: str) -> ShelfEntry:
    """From the header of a file. One that is damaged or no adapter gives an entry with its fault."""
    try:
        file = open_tensor_file(path)
        size = path.stat().st_size
    except UserError as error:
        return ShelfEntry(file=path, name=name, fault=error.what)
    except OSError as error:
        return ShelfEntry(file=path, name=name, fault=f"cannot be read ({error.strerror})")
    shapes, metadata = file.shapes(), file.metadata
    if not holds_adapter(shapes):
        return ShelfEntry(file=path, name=name, size=size, fault="holds no adapter")
    origin = adapter_origin(shapes, metadata)
    family = next((family for family in FAMILIES if family == origin), FAMILIES[0])
    # Alphas are left unread: neither algorithm nor rank depends on them.
    layers = list(file_layers(Header(shapes=shapes, scalars={}, family=family)).values())
    kinds = Counter(_kind(layer, metadata) for layer in layers if layer.traits[0] is not Trait.EMBEDDING)
    return ShelfEntry(
        file=path,
        name=name,
        size=size,
        family=origin if isinstance(origin, str) else origin.title if origin else "",
        algorithms=tuple(kind for kind, _ in kinds.most_common()),
        ranks=tuple(sorted({rank_by_shapes(layer.shapes) for layer in layers} - {0})),
        short_hash=short_hash(metadata),
        trigger_words=trigger_words(metadata),
    )


def _kind(layer: FileLayer, metadata: Mapping[str, str]) -> str:
    """The algorithm in words. DyLoRA's tensors are those of LoRA, so that only metadata tell it."""
    made_of = layer.traits[1]
    kind = "DyLoRA" if made_of is Trait.LORA and metadata.get("ss_network_module") == _DYLORA else str(made_of)
    return f"DoRA on {kind}" if "dora_scale" in layer.shapes or "lora_magnitude_vector" in layer.shapes else kind


def short_hash(metadata: Mapping[str, str]) -> str:
    """As web UIs show it and write it into pictures; empty for a file whose writer noted no hash."""
    return metadata.get("sshs_model_hash", "")[:HASH_DIGITS]


def listing_lines(entries: Iterable[ShelfEntry]) -> list[str]:
    """A table with a line for each file, and below it how many there are.

    Files that cannot be used say why in the last column.
    """
    listed = list(entries)
    faulty = sum(entry.fault is not None for entry in listed)
    end = counted(len(listed), "file") + (f", {faulty} of them no adapter that can be used" if faulty else "")
    return [*table([_cells(entry) for entry in listed], _TITLES, left=(0, 1, 2, 5, 6)), end] if listed else [end]


def _cells(entry: ShelfEntry) -> tuple[str, ...]:
    ranks = "" if not entry.ranks else "-".join(map(str, dict.fromkeys((entry.ranks[0], entry.ranks[-1]))))
    words = [*entry.trigger_words[:_WORDS], *(["..."] if len(entry.trigger_words) > _WORDS else [])]
    return (
        entry.name,
        entry.family or "-",
        ", ".join(entry.algorithms) or "-",
        ranks or "-",
        f"{entry.size / 1e6:,.1f} MB",
        entry.short_hash or "-",
        entry.fault or ", ".join(words),
    )
