"""The layers of an adapter file, one at a time and without a model: what each is for, and its adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from library.errors import UserError
from library.families.detect import adapter_origin, family_of_adapter, family_of_checkpoint
from library.families.family import ModelFamily
from networks.core.adapter import Adapter, LayerSpec
from networks.core.algorithms import algorithm, algorithm_of
from networks.formats.files import adapter_metadata, unknown_tensors
from networks.formats.keys import ignored_keys, kohya_key, split_key, to_kohya
from networks.formats.layer_names import layer_names
from networks.formats.traits import PROJECTION, WIDE_LAYER, holds_adapter, is_old_glora

if TYPE_CHECKING:
    from library.checkpoints.tensor_places import TensorFile

LayerTensors = Mapping[str, Tensor]


def family_of_adapter_file(file: TensorFile, default: ModelFamily) -> ModelFamily:
    """Which models an opened file is an adapter for.

    Args:
        default: of a file that does not tell.

    Raises:
        UserError: it is no adapter (a checkpoint, say), or one for models that are not supported.
    """
    shapes, where = file.shapes(), str(file.path)
    if not shapes:
        raise UserError("is empty: it has no tensors", where=where)
    if not holds_adapter(shapes):
        remedy = "give a file with LoRA or another adapter"
        try:
            checkpoint = family_of_checkpoint(shapes, where=where)
        except UserError as error:
            raise UserError(f"holds no adapter: it {error.what}", where=where, remedy=remedy) from None
        raise UserError(f"is a {checkpoint.title} checkpoint, not an adapter", where=where, remedy=remedy)
    return family_of_adapter(shapes, metadata=file.metadata, where=where, default=default)


def told_family(file: TensorFile) -> ModelFamily | None:
    """What an opened file says that it is for; None where it does not tell, or is for other models."""
    origin = adapter_origin(file.shapes(), file.metadata)
    return None if isinstance(origin, str) else origin


def default_lines(file: TensorFile, family: ModelFamily) -> list[str]:
    """A line about a file that does not tell what it is for."""
    if told_family(file) is not None:
        return []
    return [f"{file.path}: says nowhere which models it is for; taken to be for {family.title}"]


class FileLayers:
    """The layers of a file of any layout, by our names, each read when it is asked for.

    Args:
        file: opened.
        family: of the models it is for.
    """

    def __init__(self, file: TensorFile, family: ModelFamily) -> None:
        keys = file.keys()
        ignored = set(ignored_keys(keys))
        self._file, self._family, self._metadata = file, family, adapter_metadata(file)
        self._keys: dict[str, list[str]] = {}
        for key in keys:
            if key not in ignored:
                self._keys.setdefault(split_key(kohya_key(key, family))[0], []).append(key)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all layers, in the file's order; names that no layer of the family's models has are the file's own."""
        return tuple(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a layer under our names.

        Raises:
            UserError: one tensor under two names.
        """
        try:
            tensors = to_kohya({key: self._file.read(key) for key in self._keys[name]}, self._family, self._metadata)
        except UserError as error:
            raise UserError(error.what, where=str(self._file.path), remedy=error.remedy) from None
        return {split_key(key)[1]: tensor for key, tensor in tensors.items()}


def stream_layers(file: TensorFile, family: ModelFamily) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Our name of each layer of a file of any layout, and its tensors under our names; those of one layer are read at once.

    Raises:
        UserError: one tensor under two names.
    """
    layers = FileLayers(file, family)
    for name in layers.names:
        yield name, layers.read(name)


def adapter_of_layer(name: str, tensors: LayerTensors, spec: LayerSpec) -> Adapter:
    """The adapter of one layer of a file.

    Raises:
        ValueError: tensors of no known algorithm, or that do not fit the layer.
    """
    found = algorithm_of({tensor: tuple(value.shape) for tensor, value in tensors.items()})
    if found is None:
        raise ValueError(unknown_tensors(tensors))
    return algorithm(found).adapter.from_tensors(spec, tensors)


_POINTWISE = re.compile(r"conv_shortcut$")
_SIDE = 3  # of the kernels of all layers that have one


def spec_of_tensors(name: str, tensors: LayerTensors, family: ModelFamily) -> LayerSpec | None:
    """The base layer, as far as its adapter's tensors show it; None where they do not ((IA)3, OFT, a bias alone).

    Some factors have no axes for a kernel, or those of another family's projections; the layer's name tells what it has.
    """
    shapes = {tensor: tuple(value.shape) for tensor, value in tensors.items()}
    shape = _shape_by_factors(shapes)
    if shape is None:
        return None
    path = layer_names(family).path(name)
    if len(shape) == 2 and WIDE_LAYER.search(path) and shape[1] % _SIDE**2 == 0:
        shape = (shape[0], shape[1] // _SIDE**2, _SIDE, _SIDE)
    elif len(shape) > 1 and PROJECTION.search(path):
        shape = shape[:2] if family.linear_projections else (*shape[:2], 1, 1)
    elif len(shape) == 2 and _POINTWISE.search(path):
        shape = (*shape, 1, 1)
    return LayerSpec(weight_shape=shape, has_bias="diff_b" in tensors or "b_norm" in tensors)


def _shape_by_factors(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    for whole in ("diff", "w_norm", "b_norm"):
        if whole in shapes:
            return shapes[whole]
    if "lora_down.weight" in shapes and "lora_up.weight" in shapes:
        kernel = shapes.get("lora_mid.weight", shapes["lora_down.weight"])[2:]
        return (shapes["lora_up.weight"][0], shapes["lora_down.weight"][1], *kernel)
    if "hada_w1_a" in shapes and "hada_w1_b" in shapes:
        tucker = shapes.get("hada_t1")
        outputs = shapes["hada_w1_a"][0] if tucker is None else shapes["hada_w1_a"][1]
        return (outputs, shapes["hada_w1_b"][1], *(tucker or ())[2:])
    if "b1.weight" in shapes and "b2.weight" in shapes:
        up, down = ("b2.weight", "b1.weight") if is_old_glora(shapes) else ("b1.weight", "b2.weight")
        return (shapes[up][0], *shapes[down][1:])
    return _kronecker_shape(shapes)


def _kronecker_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    sizes = []
    for factor in ("lokr_w1", "lokr_w2"):
        if factor in shapes:
            sizes.append(shapes[factor])
        elif f"{factor}_a" in shapes and f"{factor}_b" in shapes:
            tucker = shapes.get("lokr_t2") if factor == "lokr_w2" else None
            rows = shapes[f"{factor}_a"][0 if tucker is None else 1]
            sizes.append((rows, shapes[f"{factor}_b"][1], *(tucker or ())[2:]))
        else:
            return None
    first, second = sizes
    return (first[0] * second[0], first[1] * second[1], *second[2:])
