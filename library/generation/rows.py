"""The rows of a batch: the texts that the denoiser is asked about, and how its answers make up each picture's prediction.

Whatever guides a picture, its prediction is a weighted sum over rows, in one place:

    one prompt             u + s (c - u)                         Ho and Salimans, arXiv:2207.12598
    a negative scale n     e + s (c - e) - n (u - e)             e: of the empty text, as in sd-scripts
    sub-prompts            u + s sum_i w_i (c_i - u)             Liu et al., arXiv:2206.01714, eq. 11
    regions                sum_i M_i (u_i + s w_i (c_i - u_i))   M_i: maps that add up to 1 everywhere

with c of the prompt, u of the negative prompt, and the scale s. Rows of one picture that ask the same are one row.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from library.generation.adapters import Acting
from library.generation.requests import ImageRequest
from library.prompts.sub_prompts import SubPrompt

Weight = float | Tensor
"""A number, or a map (h, w) over the latents."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text for the denoiser.

    Attributes:
        text: without tags.
        text_2: what the text encoders behind the first are told instead; None for the same.
        sizes: what the picture is said to be, see `ImageRequest.size_conditions`.
        acting: the adapters that act on it.
        weight: of its prediction in the picture's.
        share: of its prediction in that of the prompt alone, without guidance.
    """

    text: str
    acting: Acting
    weight: Weight
    share: Weight
    text_2: str | None = None
    sizes: tuple[float, ...] = ()

    @property
    def question(self) -> Hashable:
        """Equal for rows to which the denoiser gives the same answer."""
        return self.text, self.text_2, self.sizes, frozenset(self.acting.items())


def rows_of(
    request: ImageRequest,
    sub_prompts: Sequence[SubPrompt],
    acting: Sequence[Acting],
    maps: Sequence[Tensor] | None = None,
    size_conditions: Sequence[str] = (),
) -> list[Row]:
    """The rows of one picture, texts that count for first.

    Args:
        sub_prompts: of its prompt, one or more.
        acting: the adapters of each.
        maps: (h, w) of each, adding up to 1; None where there are no regions.
        size_conditions: those that the denoiser takes.
    """
    prompted: Mapping[str, Any] = {"text_2": request.prompt_2, "sizes": request.size_conditions(size_conditions)}
    negative_sizes = request.size_conditions(size_conditions, negative=True)
    negative: Mapping[str, Any] = {
        "text": request.negative_prompt,
        "text_2": request.negative_prompt_2,
        "sizes": negative_sizes,
    }
    empty: Mapping[str, Any] = {"text": "", "text_2": None, "sizes": negative_sizes}
    count = len(sub_prompts)
    shares: Sequence[Weight] = maps if maps is not None else [1.0 / count] * count
    total = sum(each.weight for each in sub_prompts) or 1.0
    # Without regions, every sub-prompt guides the whole picture.
    pulls: list[Weight] = [
        each.weight * (share if maps is not None else 1.0) for each, share in zip(sub_prompts, shares, strict=True)
    ]
    alone: list[Weight] = list(shares) if maps is not None else [each.weight / total for each in sub_prompts]
    rows: list[Row] = []
    for sub_prompt, uses, pull, own in zip(sub_prompts, acting, pulls, alone, strict=True):
        weight = request.scale * pull if request.guided else own
        rows.append(Row(text=sub_prompt.text, acting=uses, weight=weight, share=own, **prompted))
    if not request.guided:
        return _joined(rows)
    for uses, pull, share in zip(acting, pulls, shares, strict=True):
        away = request.negative_scale
        if away is None:
            weight = share - request.scale * pull
            rows.append(Row(acting=uses, weight=weight, share=0.0, **negative))
        else:
            weight = share - request.scale * pull + away * share
            rows.append(Row(acting=uses, weight=weight, share=0.0, **empty))
            rows.append(Row(acting=uses, weight=-away * share, share=0.0, **negative))
    return _joined(rows)


def _joined(rows: Sequence[Row]) -> list[Row]:
    """Rows that ask the same as one, in the order of their first appearance."""
    joined: list[Row] = []
    for row in rows:
        place = next((n for n, other in enumerate(joined) if other.question == row.question), None)
        if place is None:
            joined.append(row)
        else:
            first = joined[place]
            weight, share = first.weight + row.weight, first.share + row.share
            joined[place] = replace(row, weight=weight, share=share)
    return joined


class RowMix:
    """How the predictions of a batch's rows become those of its pictures.

    Args:
        pictures: the rows of each picture.
        rescales: of each picture, `ImageRequest.guidance_rescale`.
        device: of the predictions.
    """

    def __init__(self, pictures: Sequence[Sequence[Row]], rescales: Sequence[float], device: torch.device) -> None:
        rows = [row for picture in pictures for row in picture]
        self.owners = [number for number, picture in enumerate(pictures) for _ in picture]
        self._sizes = [len(picture) for picture in pictures]
        self._weights = _stacked([row.weight for row in rows], device)
        self._shares = _stacked([row.share for row in rows], device)
        self._rescales = torch.tensor(list(rescales), device=device).view(-1, 1, 1, 1)
        self._rescaled = any(rescales)

    def spread(self, latents: Tensor) -> Tensor:
        """(pictures, ...) as (rows, ...)."""
        return latents[self.owners] if len(self.owners) > len(latents) else latents

    def __call__(self, predictions: Tensor) -> Tensor:
        """(rows, C, h, w) fp32 as (pictures, C, h, w)."""
        mixed = self._sum(predictions, self._weights)
        if not self._rescaled:
            return mixed
        # Lin et al., arXiv:2305.08891, eq. 15 and 16.
        alone = self._sum(predictions, self._shares)
        spreads = [each.std(dim=(1, 2, 3), keepdim=True) for each in (alone, mixed)]
        return mixed * (self._rescales * spreads[0] / spreads[1] + 1 - self._rescales)

    def _sum(self, predictions: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([picture.sum(0) for picture in (predictions * weights).split(self._sizes)])


def _stacked(weights: Sequence[Weight], device: torch.device) -> Tensor:
    """(rows, 1, h or 1, w or 1) fp32."""
    tensors = [weight if isinstance(weight, Tensor) else torch.tensor([[weight]]) for weight in weights]
    size = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    return torch.stack([tensor.float().expand(size) for tensor in tensors]).unsqueeze(1).to(device)
