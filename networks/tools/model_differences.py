"""Two models of one kind, side by side: what of their difference LoRA can hold, and what it cannot. Told from names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.checkpoints.base_model import BaseModelFiles, open_base_model
from library.checkpoints.parts import PART_TITLES, UNET
from library.errors import UserError, attempt, raise_all, some_names
from networks.formats.layer_names import layer_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.checkpoints.parts import TensorSource
    from library.families.family import ModelFamily

SHOWN = 3  # tensors that a sentence names
_ATTENTION = re.compile(r"\.(self_attn|mlp|attentions)\.")
_RESIDUAL = re.compile(r"\.(resnets|downsamplers|upsamplers)\.")
_KINDS = (
    ("embeddings", re.compile(r"^(text_model\.)?embeddings\.")),
    ("norms", re.compile(r"norm[^.]*\.(weight|bias)$")),
    ("biases", re.compile(r"\.bias$")),
    ("conv_in and conv_out", re.compile(r"^conv_(in|out)\.")),
    ("time embedding", re.compile(r"^time_embedding\.")),
    ("size embedding", re.compile(r"^add_embedding\.")),
    ("text projection", re.compile(r"^text_projection\.")),
    ("residual blocks and resampling", _RESIDUAL),
)


@dataclass(frozen=True, kw_only=True)
class TensorPair:
    """A tensor that both models have.

    Attributes:
        part: kind of the part.
        name: in the part's module.
        layer: our name of its layer; None where adapters have no name for it (embeddings).
        rank_name: the option that decides on its rank, "dim" or "conv_dim"; None where it gets no LoRA.
        kind: of what gets no LoRA, for tables.
        base, tuned: where the values are.
    """

    part: str
    name: str
    layer: str | None
    rank_name: str | None
    kind: str
    base: TensorSource
    tuned: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base model's tensor; the tuned one's may have other axes of length 1."""
        return self.base.shape

    @property
    def where(self) -> str:
        """How sentences name it."""
        return f"{self.name} of the {PART_TITLES[self.part]}"

    def difference(self, device: str, dtype: torch.dtype | None) -> Tensor:
        """Tuned less base, fp32, of the base tensor's shape.

        Args:
            device: where to compute.
            dtype: a type to round both to first; None for none.

        Raises:
            UserError: values that are not finite.
        """
        import torch

        base, tuned = (_rounded(source.read().to(device), dtype) for source in (self.base, self.tuned))
        result = tuned.to(torch.float32, copy=True).reshape(self.shape)
        result.sub_((base if base.itemsize > 1 else base.float()).reshape(self.shape))
        self._check_finite(torch.stack(result.aminmax()))
        return result

    def size_of_difference(self, dtype: torch.dtype | None) -> tuple[float, float]:
        """Its sum of squares, and its largest absolute value; of `difference`, with less memory.

        Args, Raises: see `difference`.
        """
        base, tuned = (_rounded(source.read(), dtype).flatten() for source in (self.base, self.tuned))
        squares, largest = 0.0, 0.0
        for old, new in zip(base.split(_CHUNK), tuned.split(_CHUNK), strict=True):
            piece = new.float() - old.float()
            squares += float(piece.dot(piece))
            largest = max(largest, float(piece.abs().max()))
        if not math.isfinite(squares):
            self._check_finite(tuned.float() - base.float())
        return squares, largest

    def _check_finite(self, values: Tensor) -> None:
        """Name the model at fault where a difference is not finite."""
        if bool(values.isfinite().all()):
            return
        for source in (self.base, self.tuned):
            if not bool(source.read().float().isfinite().all()):
                raise UserError(f"has values that are not finite in {self.where}", where=str(source.file.path))
        raise UserError("is too large for --load_precision", where=self.where, remedy="use bf16 or float")


_CHUNK = 1 << 16  # elements at a time: they stay in the processor's cache


def _rounded(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return values if dtype is None else values.to(dtype)


def open_pair(
    base: str, tuned: str, *, said: ModelFamily | None, v_parameterization: bool | None
) -> tuple[BaseModelFiles, BaseModelFiles]:
    """Both models, known from their headers.

    Args:
        base, tuned: files, diffusers folders, or ids at the Hub.
        said: the family that the user says both are of; None where nothing is said.
        v_parameterization: what the user says of both; likewise.

    Raises:
        UserError: what is wrong with either, or that they are of two families, or have other tensors.
    """
    problems: list[UserError] = []
    models = [
        attempt(lambda path=path: open_base_model(path, v_parameterization=v_parameterization), problems)  # type: ignore[misc]
        for path in (base, tuned)
    ]
    raise_all(problems)
    first, second = models
    assert first is not None
    assert second is not None
    if said is not None and first.family != said:
        what = f"--{said.flag} was given, but this is {first.family.title}"
        raise UserError(what, where=str(first.path), remedy=f"leave out --{said.flag}")
    if first.family != second.family:
        what = f"is {second.family.title}, while {first.path} is {first.family.title}"
        raise UserError(what, where=str(second.path), remedy="give two models of one kind")
    raise_all([problem for kind in first.family.adapter_prefixes for problem in _mismatches(kind, first, second)])
    return first, second


def _mismatches(kind: str, base: BaseModelFiles, tuned: BaseModelFiles) -> Iterator[UserError]:
    """What keeps a part of two models from being compared, one sentence at most."""
    first, second = base.parts[kind].sources, tuned.parts[kind].sources
    one_has = [name for name in (*first, *second) if (name in first) != (name in second)]
    other = [name for name in first if name in second and _squeezed(first[name]) != _squeezed(second[name])]
    for names, what in ((one_has, "has not the same tensors as"), (other, "has other shapes than")):
        if names:
            told = f"its {PART_TITLES[kind]} {what} that of {base.path} ({some_names(names, SHOWN)})"
            yield UserError(told, where=str(tuned.path), remedy="give the model that it was tuned from")
            return


def _squeezed(source: TensorSource) -> tuple[int, ...]:
    return tuple(size for size in source.shape if size != 1)


def tensor_pairs(base: BaseModelFiles, tuned: BaseModelFiles, *, with_convolutions: bool) -> list[TensorPair]:
    """Every tensor of the text encoders and the U-Net, in the order of the base model.

    Args:
        base, tuned: as `open_pair` gives them.
        with_convolutions: layers of residual blocks and resampling get LoRA too, as sd-scripts does it with conv_dim.
    """
    pairs = []
    for kind in base.family.adapter_prefixes:
        sources = tuned.parts[kind].sources
        for name, source in base.parts[kind].sources.items():
            rank_name = _rank_name(kind, name, source.shape, with_convolutions=with_convolutions)
            pairs.append(
                TensorPair(
                    part=kind,
                    name=name,
                    layer=_layer_name(kind, name, base.family),
                    rank_name=rank_name,
                    kind="" if rank_name else next((kind for kind, names in _KINDS if names.search(name)), "others"),
                    base=source,
                    tuned=sources[name],
                )
            )
    return pairs


def _rank_name(kind: str, name: str, shape: tuple[int, ...], *, with_convolutions: bool) -> str | None:
    """Which rank a tensor's layer has in a LoRA network of sd-scripts; None where it is none of its layers."""
    if not name.endswith(".weight") or len(shape) not in (2, 4):
        return None
    if _ATTENTION.search(name):
        return "dim"
    if not with_convolutions or kind != UNET or not _RESIDUAL.search(name):
        return None
    return "conv_dim" if any(size > 1 for size in shape[2:]) else "dim"


def _layer_name(kind: str, name: str, family: ModelFamily) -> str | None:
    found = layer_names(family).find(f"{family.adapter_prefixes[kind]}_{name.rpartition('.')[0]}")
    return None if found is None else found.saved
