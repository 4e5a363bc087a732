"""The denoiser's predictions for a batch, guided, with conditions and adapters as they are at each step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.conditioning.condition import Condition, joined
from library.generation.adapters import AdapterRack
from library.generation.compiling import CompiledDenoiser
from library.generation.encoding import PromptEncoder
from library.generation.requests import ImageRequest
from library.generation.rows import Row, RowMix


class Control(Protocol):
    """What takes part in every call of the denoiser, such as ControlNets."""

    def denoiser_arguments(
        self, *, share: float, latents: Tensor, timestep: Tensor, told: Mapping[str, Any], owners: Sequence[ImageRequest]
    ) -> dict[str, Any]:
        """Further arguments of the call.

        Args:
            share: how far sampling is, from 0 at the first step to below 1 at the last.
            latents: (rows, C, h, w), as the denoiser gets them.
            told: the call's other keywords, of all rows: `Condition.denoiser_arguments`.
            owners: the request of each row.
        """


class BatchPredictions:
    """Asks the denoiser about all rows of a batch at once.

    Args:
        denoiser: a U-Net of diffusers.
        requests: the pictures of the batch.
        pictures: the rows of each.
        chunks: of every condition.
        encoder: of the texts.
        rack: of the adapters; None where they are in the weights.
        control: see there.
        compiled: the denoiser, where its blocks are compiled.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        requests: Sequence[ImageRequest],
        pictures: Sequence[Sequence[Row]],
        *,
        chunks: int,
        encoder: PromptEncoder,
        rack: AdapterRack | None,
        control: Control | None,
        compiled: CompiledDenoiser | None = None,
    ) -> None:
        parameter = next(denoiser.parameters())
        self._denoiser, self._compiled = denoiser, compiled
        self._device, self._dtype = parameter.device, parameter.dtype
        self._rows = [row for picture in pictures for row in picture]
        self._mix = RowMix(pictures, [request.guidance_rescale for request in requests], parameter.device)
        self._owners = [requests[number] for number in self._mix.owners]
        self._chunks, self._encoder, self._rack, self._control = chunks, encoder, rack, control
        sizes = [row.sizes for row in self._rows]
        self._sizes = torch.tensor(sizes, device=parameter.device) if any(sizes) else None
        self._states: list[Hashable] = []
        self._condition = Condition(torch.empty(0))

    def of(self, latents: Tensor, timestep: Tensor, step: int, steps: int) -> Tensor:
        """(B, C, h, w) fp32.

        Args:
            latents: (B, C, h, w), scaled for the denoiser.
            step, steps: of the sampler, which may ask several times a step.
        """
        self._set_conditions(step, steps)
        if self._rack is not None:
            self._rack.set_denoiser([row.acting for row in self._rows], step, steps)
        inputs = self._mix.spread(latents).to(self._dtype)
        told = self._condition.denoiser_arguments(self._sizes)
        if self._control is not None:
            told |= self._control.denoiser_arguments(
                share=step / steps, latents=inputs, timestep=timestep, told=told, owners=self._owners
            )
        predictions: Tensor = self._call(inputs, timestep, **told).sample
        return self._mix(predictions.float())

    def _call(self, *inputs: Any, **keywords: Any) -> Any:
        if self._compiled is None:
            return self._denoiser(*inputs, **keywords)
        hooked = self._rack is not None and self._rack.has_hooks
        return self._compiled(*inputs, hooked=hooked, **keywords)

    def _set_conditions(self, step: int, steps: int) -> None:
        """Of all rows, in the denoiser's type; put together anew only where adapters change a text encoder."""
        if self._rack is None:
            states: list[Hashable] = [frozenset(row.acting.items()) for row in self._rows]
            prepares = [lambda: None for _ in self._rows]
        else:
            acting = [self._rack.on_text_encoder(row.acting, step, steps) for row in self._rows]
            states = [frozenset(values.items()) for values in acting]
            prepares = [partial(self._rack.set_text_encoder, values) for values in acting]
        if states != self._states:
            places = zip(self._rows, self._owners, states, prepares, strict=True)
            conditions = [
                self._encoder.encode(
                    row.text,
                    row.text_2,
                    chunks=self._chunks,
                    clip_skip=owner.clip_skip,
                    extended=owner.extended,
                    state=state,
                    prepare=prepare,
                    device=self._device,
                )
                for row, owner, state, prepare in places
            ]
            self._states, self._condition = states, joined(conditions).to(dtype=self._dtype)
