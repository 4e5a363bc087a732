"""The same change in another form: another algorithm, other names, one alpha; chosen for a reader, or as told.

Every layer is converted on its own, so that no more than one base weight is in memory.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import UserError, some_names
from library.families.family import ModelFamily
from networks.core.adapter import Adapter, LayerSpec
from networks.core.additive import AdditiveAdapter
from networks.core.algorithms import algorithm, algorithm_of
from networks.core.products import balanced_factors, norm_of_difference, norm_of_product, rank_within, svd
from networks.formats.base_weights import BaseWeights
from networks.formats.file_adapters import adapter_of_layer, spec_of_tensors
from networks.formats.files import unknown_tensors
from networks.formats.layer_names import layer_names
from networks.formats.reader_rules import ATTENTION, text_attention
from networks.formats.reading import Effect, Reader, verdict_of
from networks.formats.traits import Header, file_layers, is_scalar
from networks.tools.comparing import is_finite

LayerTensors = dict[str, Tensor]

EXACT = 1e-5
"""Share of a change's norm that a rank may leave out and still be called exact: what fp32 makes of it."""
DOWN, UP = "lora_down.weight", "lora_up.weight"


class LayerError(UserError):
    """A mistake about one layer of a file, which `where` names."""


class CannotHold(Exception):
    """A form that a layer's change has no place in; the message says what is lost."""


@dataclass(frozen=True, kw_only=True)
class SourceLayer:
    """A layer as it was read.

    Attributes:
        name, tensors: ours.
        adapter: what the tensors mean; None where only a base model would show it.
        base: of the model that it was trained on; None where it was not given.
    """

    name: str
    tensors: LayerTensors
    adapter: Adapter | None
    base: BaseWeights | None

    @classmethod
    def read(cls, name: str, tensors: LayerTensors, family: ModelFamily, base: BaseWeights | None) -> SourceLayer:
        """Make sense of a layer's tensors.

        Raises:
            LayerError: a layer that the models have not, values that are not finite, tensors of no known algorithm, or of
                another model than the base.
        """
        if layer_names(family).find(name) is None:
            raise LayerError(
                f"is no layer of {family.title}", where=name, remedy="give an adapter whose layers the models have"
            )
        if algorithm_of({tensor: tuple(value.shape) for tensor, value in tensors.items()}) is None:
            raise LayerError(unknown_tensors(tensors), where=name)
        bad = [tensor for tensor, value in tensors.items() if tensor != "alpha" and not is_finite(value)]
        if bad:
            raise LayerError(f"has values that are not finite in {some_names(bad, 3)}", where=name)
        spec = spec_of_tensors(name, tensors, family)
        if spec is None:
            spec = _spec_of_rotation(tensors) if base is None else base.spec(name)
        try:
            adapter = None if spec is None else adapter_of_layer(name, tensors, spec)
        except ValueError as error:
            raise LayerError(str(error), where=name) from None
        return cls(name=name, tensors=tensors, adapter=adapter, base=base)

    @property
    def is_known(self) -> bool:
        """Whether `delta` can be had."""
        return self.adapter is not None and (self.base is not None or not self.adapter.reads_base)

    def delta(self) -> Tensor:
        """The change of the weight, fp32.

        Raises:
            UserError: it depends on a base model that was not given, or that has another shape there.
        """
        adapter = self.known_adapter()
        if not adapter.reads_base or self.base is None:
            return adapter.delta_weight(torch.empty(0))
        weight, shape = self.base.weight(self.name), adapter.spec.weight_shape
        if weight.numel() != torch.Size(shape).numel():
            raise UserError(f"has another shape at {self.name}", where=str(self.base.model.path), remedy=_ITS_OWN)
        return adapter.delta_weight(weight.reshape(shape))

    def known_adapter(self) -> Adapter:
        """What the tensors mean.

        Raises:
            LayerError: it depends on a base model that was not given.
        """
        if self.adapter is None or not self.is_known:
            found = algorithm_of({name: tuple(tensor.shape) for name, tensor in self.tensors.items()})
            title = algorithm(found).adapter.title if found else "of no known algorithm"
            kind = "DoRA" if "dora_scale" in self.tensors else title
            raise LayerError(f"is {kind}, whose change depends on the base model", where=self.name, remedy=_GIVE_BASE)
        return self.adapter


def _spec_of_rotation(tensors: LayerTensors) -> LayerSpec | None:
    """As much of the base layer as rotations show, which is enough to spell them: how many outputs it has."""
    blocks = tensors.get("oft_blocks")
    if blocks is None or "rescale" in tensors:
        return None
    return LayerSpec(weight_shape=(blocks.shape[-3] * blocks.shape[-1], 1))


_ITS_OWN = "give the model it was trained on"
_GIVE_BASE = "give it with --base"


def as_lora(layer: SourceLayer, rank: int | None, *, without_bias: bool = False) -> LayerTensors:
    """The change as plain LoRA.

    Args:
        layer: of any algorithm.
        rank: at most; None for as much as the change needs to be exact.
        without_bias: leave the change of a bias out.

    Returns:
        down, up and alpha = rank, fp32; LoRA that needs no change keeps its tensors.

    Raises:
        CannotHold: a norm, or the change of a bias.
        UserError: see `SourceLayer.delta`.
    """
    adapter = layer.known_adapter()
    if adapter.spec.is_norm:
        raise CannotHold("the change of a norm")
    if not without_bias and changes_bias(adapter):
        raise CannotHold("the change of a bias")
    own = adapter if isinstance(adapter, AdditiveAdapter) and not adapter.reads_base else None
    product = None if own is None or adapter.title != "LoRA" else own.product()
    if product is not None and (rank is None or product[0].shape[1] <= rank):
        return _without_bias(adapter.tensors())
    left, values, right = svd(layer.delta().flatten(1)) if own is None else own.svd()
    needed = rank_within(values, EXACT)
    up, down = balanced_factors(left, values, right, needed if rank is None else min(rank, needed))
    shape = adapter.spec.weight_shape
    return {
        DOWN: down.reshape(-1, *shape[1:]).contiguous(),
        UP: up.reshape(*up.shape, *(1 for _ in shape[2:])).contiguous(),
        "alpha": torch.tensor(float(len(down))),
    }


def changes_bias(adapter: Adapter) -> bool:
    """Whether it changes the bias of its layer."""
    bias = adapter.delta_bias()
    return bias is not None and bool(bias.any())


def _without_bias(tensors: LayerTensors) -> LayerTensors:
    return {name: tensor for name, tensor in tensors.items() if name in (DOWN, UP, "alpha")}


def as_full(layer: SourceLayer) -> LayerTensors:
    """The change as the whole difference, fp32: `diff` and perhaps `diff_b`; of a norm `w_norm` and `b_norm`.

    Raises:
        UserError: see `SourceLayer.delta`.
    """
    adapter, delta = layer.known_adapter(), layer.delta()
    bias = adapter.delta_bias()
    if adapter.spec.is_norm:
        return {"w_norm": delta, "b_norm": torch.zeros_like(delta) if bias is None else bias}
    return {"diff": delta} if bias is None else {"diff": delta, "diff_b": bias}


def form_for(
    layer: SourceLayer, readers: Sequence[Reader], rank: int | None, family: ModelFamily
) -> tuple[str, LayerTensors]:
    """The first form that all the readers apply rightly; those nearest to what the layer is are tried first, and all but a
    too low rank mean the same.

    Returns:
        What was done, and tensors.

    Raises:
        CannotHold: there is none.
        UserError: the next form depends on a base model that was not given.
    """
    nearest = [] if layer.adapter is None else [("respelled", tensors) for tensors in layer.adapter.spellings()]
    for form, tensors in [("as it is", layer.tensors), *nearest]:
        if not _faults(readers, layer.name, tensors, family):
            return form, tensors
    lost = _faults(readers, layer.name, layer.tensors, family)[0]
    try:
        tensors = as_lora(layer, rank)
    except CannotHold as error:
        lost = f"{lost}, and LoRA does not hold {error}"
    else:
        if not _faults(readers, layer.name, tensors, family):
            return "LoRA", tensors
    tensors = as_full(layer)
    if not _faults(readers, layer.name, tensors, family):
        return "the full difference", tensors
    raise CannotHold(lost)


def _faults(readers: Sequence[Reader], name: str, tensors: LayerTensors, family: ModelFamily) -> list[str]:
    """What is wrong about a layer that stands alone: a reader's fault with it each; empty where all apply it rightly."""
    (found,) = file_layers(header_of({f"{name}.{key}": tensor for key, tensor in tensors.items()}, family)).values()
    verdicts = {reader.title: verdict_of(reader, found.traits) for reader in readers}
    return [f"{title} {of.effect} {trait}" for title, (trait, of) in verdicts.items() if of.effect is not Effect.RIGHT]


def header_of(tensors: Mapping[str, Tensor], family: ModelFamily) -> Header:
    """The header that a file of these tensors will have."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    scalars = {key: float(tensor.flatten()[0]) for key, tensor in tensors.items() if is_scalar(key, shapes[key])}
    return Header(shapes=shapes, scalars=scalars, family=family)


def with_one_alpha(layers: Mapping[str, LayerTensors]) -> dict[str, LayerTensors]:
    """The same LoRA layers with the alpha that most of them have; what differs goes into both factors, evenly."""
    alphas = Counter(_alpha(tensors) for tensors in layers.values() if UP in tensors)
    if not alphas:
        return dict(layers)
    common = alphas.most_common(1)[0][0]
    return {name: with_alpha(tensors, common) if UP in tensors else tensors for name, tensors in layers.items()}


def _alpha(tensors: LayerTensors) -> float:
    alpha = float(tensors["alpha"].flatten()[0]) if "alpha" in tensors else 0.0
    return alpha or float(len(tensors[DOWN]))


def with_alpha(tensors: LayerTensors, alpha: float) -> LayerTensors:
    """The same LoRA layer with this alpha; the rest of its scale goes into both factors, evenly."""
    own = _alpha(tensors)
    if own == alpha and "alpha" in tensors:
        return tensors
    root = abs(own / alpha) ** 0.5
    sign = 1.0 if own * alpha > 0 else -1.0
    scaled = {DOWN: tensors[DOWN].float() * root, UP: tensors[UP].float() * root * sign, "alpha": torch.tensor(alpha)}
    return {**tensors, **scaled}


def with_whole_attention(layers: Mapping[str, LayerTensors]) -> dict[str, LayerTensors]:
    """The same with a change of nothing for the projections of a text encoder's attention that have none, where others of
    it have: some readers want all four or none."""
    result = dict(layers)
    for beginning, present in text_attention(layers).items():
        tensors = next((layers[name] for name in present.values() if UP in layers[name]), None)
        if tensors is None:
            continue
        width, alpha = len(tensors[UP]), torch.tensor(_alpha(tensors))
        for projection in ATTENTION:
            nothing = {DOWN: torch.zeros(1, width), UP: torch.zeros(width, 1), "alpha": alpha}
            result.setdefault(beginning + projection, nothing)
    return result


def with_width_shown(
    layers: Mapping[str, LayerTensors], family: ModelFamily, rank: int | None, base: BaseWeights | None
) -> dict[str, LayerTensors]:
    """The same with one layer as plain LoRA whose inputs are as wide as the text condition, by which a reader tells the
    family: the one that is there, or one that changes nothing.

    Raises:
        UserError: see `SourceLayer.delta`.
    """
    shows = next(layer for layer in layer_names(family) if _TAKES_TEXT.match(layer.path))
    if shows.saved in layers:
        layer = SourceLayer.read(shows.saved, layers[shows.saved], family, base)
        return {**layers, shows.saved: as_lora(layer, rank)}
    level = int(shows.path.split(".")[1])
    outputs, inputs = family.unet_config["block_out_channels"][level], family.context_width
    nothing = {DOWN: torch.zeros(1, inputs), UP: torch.zeros(outputs, 1), "alpha": torch.ones(())}
    return {**layers, shows.saved: nothing}


_TAKES_TEXT = re.compile(r"down_blocks\..*\.attn2\.to_k$")


def lost_and_had(before: SourceLayer, after: SourceLayer) -> tuple[float, float]:
    """Frobenius norms of the difference of two layers' changes and of the first one; in double precision.

    From the factors where these are thin; else of the whole changes, some rows at a time.

    Raises:
        UserError: see `SourceLayer.delta`.
    """
    first, second = _thin_product(before), _thin_product(after)
    if first is not None and second is not None and 2 * (first[0].shape[1] + second[0].shape[1]) <= len(first[0]):
        return norm_of_difference(first, second), norm_of_product(*first)
    was, became = before.delta(), after.delta()
    became = became.reshape(was.shape)
    lost = had = 0.0
    for old, new in zip(was.split(_ROWS), became.split(_ROWS), strict=True):
        wide = old.double()
        had += float(wide.square().sum())
        lost += float((wide - new.double()).square().sum())
    return math.sqrt(lost), math.sqrt(had)


_ROWS = 512  # of a change that are in double precision at once


def _thin_product(layer: SourceLayer) -> tuple[Tensor, Tensor] | None:
    adapter = layer.known_adapter()
    return adapter.product() if isinstance(adapter, AdditiveAdapter) and not adapter.reads_base else None
