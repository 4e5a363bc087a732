"""The adapters of a merge: opened and known from their headers, their layers read in turn, each with its factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from library.checkpoints.tensor_files import open_tensor_file
from library.errors import UserError, attempt, counted, raise_all, some_names
from library.families.block_weights import place_of
from library.families.detect import FAMILIES, check_only_family
from library.families.family import ModelFamily
from networks.formats.file_adapters import FileLayers, family_of_adapter_file, told_family
from networks.formats.layer_names import layer_names

if TYPE_CHECKING:
    from library.checkpoints.tensor_places import TensorFile

SHOWN = 3  # layers that a sentence names


@dataclass(frozen=True, kw_only=True)
class MergeInput:
    """One adapter and how much of it.

    Attributes:
        path: of its file.
        text_encoder_ratio, denoiser_ratio: factors of its changes, of any sign and size.
        block_weights: further factors, one for each place in `block_weights.PLACES`; None for 1 everywhere.
    """

    path: Path
    text_encoder_ratio: float
    denoiser_ratio: float
    block_weights: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened adapter file.

    Attributes:
        given: what the user asked of it.
        file: opened; metadata are its `metadata`.
        family: of the models it is for.
        layers: read by name.
    """

    given: MergeInput
    file: TensorFile
    family: ModelFamily
    layers: FileLayers

    @property
    def where(self) -> str:
        """How sentences name it."""
        return str(self.given.path)

    def factor(self, layer: str) -> float:
        """What the change of a layer of our name is multiplied by."""
        of_denoiser = layer.startswith(self.family.denoiser_prefix)
        ratio = self.given.denoiser_ratio if of_denoiser else self.given.text_encoder_ratio
        weights, place = self.given.block_weights, place_of(layer, self.family)
        return ratio if weights is None or place is None else ratio * weights[place]

    def read(self, layer: str) -> dict[str, Tensor]:
        """The tensors of a layer under our names.

        Raises:
            UserError: values that are not finite.
        """
        tensors = self.layers.read(layer)
        bad = [name for name, value in tensors.items() if name != "alpha" and not bool(_wide(value).isfinite().all())]
        if bad:
            raise UserError(f"has values that are not finite in {some_names(bad, SHOWN)} of {layer}", where=self.where)
        return tensors


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.itemsize == 1 else value


def open_sources(
    inputs: Sequence[MergeInput],
    *,
    v2: bool = False,
    default: ModelFamily | None = None,
    family: str | None = None,
) -> list[Source]:
    """Open all files.

    Args:
        inputs: one or more.
        v2: whether the user says that they are for SD2.
        default: of files that do not tell; None for what another one tells, and else what `v2` or `family` says.
        family: name of the only one that will do; None for any.

    Raises:
        UserError: all that cannot be used, or adapters for different models.
    """
    problems: list[UserError] = []
    files = [attempt(partial(open_tensor_file, given.path), problems) for given in inputs]
    told = [(file, each) for file in files if file is not None and (each := told_family(file)) is not None]
    for file, each in told:
        attempt(partial(check_only_family, each, family, where=str(file.path)), problems)
    said = [each for each in FAMILIES if each.name == family] or [each for each in FAMILIES if each.is_v2 is v2]
    default = default or [*(each for _, each in told), *said][0]
    pairs = [(given, file) for given, file in zip(inputs, files, strict=True) if file is not None]
    attempted = [attempt(partial(_source, given, file, default), problems) for given, file in pairs]
    opened = [source for source in attempted if source is not None]
    raise_all(problems)
    first = opened[0]
    for source in opened[1:]:
        if source.family != first.family:
            what = f"is for {source.family.title}, while {first.where} is for {first.family.title}"
            problems.append(UserError(what, where=source.where, remedy="merge adapters for models of one kind"))
    if v2 and not first.family.is_v2:
        problems.append(UserError(f"is for {first.family.title}", where=first.where, remedy="leave out --v2"))
    raise_all(problems)
    return opened


def _source(given: MergeInput, file: TensorFile, default: ModelFamily) -> Source:
    family = family_of_adapter_file(file, default)
    return Source(given=given, file=file, family=family, layers=FileLayers(file, family))


def known_layers(
    sources: Sequence[Source],
    family: ModelFamily,
    *,
    allow_unmatched: bool,
    has_layer: Callable[[str], object] | None = None,
) -> tuple[list[str], dict[str, list[str]]]:
    """The layers of all files that have a place, in the order of their appearance; and what has none, by file.

    Args:
        sources: opened.
        family: of the models whose layers count.
        allow_unmatched: keep on without layers that have no place; a file of which nothing has one is refused all the same.
        has_layer: whether there is a layer of a name; None for all that the family's full-size models have.

    Raises:
        UserError: what is not allowed.
    """
    names = layer_names(family)
    found: dict[str, None] = {}
    strange: dict[str, list[str]] = {}
    problems: list[UserError] = []
    for source in sources:
        fits = {name: bool((has_layer or names.find)(name)) for name in source.layers.names}
        own, lost = ([name for name in fits if fits[name] is wanted] for wanted in (True, False))
        found |= dict.fromkeys(own)
        if lost:
            strange[source.where] = lost
        shown = some_names(lost, SHOWN)
        if not own:
            what = f"none of its {counted(len(lost), 'layer')} fits ({shown})"
            problems.append(UserError(what, where=source.where, remedy=f"give an adapter made for {family.title}"))
        elif lost and not allow_unmatched:
            what = f"{len(lost)} of its {len(own) + len(lost)} layers have no place ({shown})"
            problems.append(UserError(what, where=source.where, remedy="use --allow_unmatched to go on without them"))
    raise_all(problems)
    return list(found), strange
