"""A second model for the last steps of pictures (Podell et al., arXiv:2307.01952, section 2.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from library.families.family import ModelFamily
from library.generation.encoding import PromptEncoder
from library.generation.predictions import BatchPredictions
from library.generation.requests import ImageRequest
from library.generation.rows import Row, rows_of
from library.prompts.sub_prompts import SubPrompt


@dataclass(frozen=True)
class Refiner:
    """What it takes to ask it.

    Attributes:
        encoder: of texts, with the refiner's own text encoder.
    """

    family: ModelFamily
    denoiser: nn.Module
    encoder: PromptEncoder

    def predictions(
        self,
        requests: Sequence[ImageRequest],
        sub_prompts: Sequence[Sequence[SubPrompt]],
        regions: Sequence[Sequence[Tensor] | None],
    ) -> BatchPredictions:
        """For a batch of pictures.

        Args:
            sub_prompts: of each picture's prompt.
            regions: the maps of each picture's sub-prompts.
        """
        given = zip(requests, sub_prompts, regions, strict=True)
        pictures = [self._rows(request, prompts, maps) for request, prompts, maps in given]
        chunks = [
            self.encoder.chunks_needed([row.text for row in rows], extended=request.extended)
            for request, rows in zip(requests, pictures, strict=True)
        ]
        return BatchPredictions(
            self.denoiser, requests, pictures, chunks=max(chunks), encoder=self.encoder, rack=None, control=None
        )

    def _rows(self, request: ImageRequest, sub_prompts: Sequence[SubPrompt], regions: Sequence[Tensor] | None) -> list[Row]:
        """Its only text encoder is what base models have as their second."""
        without_adapters: list[dict[Any, Any]] = [{} for _ in sub_prompts]
        rows = rows_of(request, sub_prompts, without_adapters, regions, self.family.size_conditions)
        return [replace(row, text=row.text if row.text_2 is None else row.text_2, text_2=None) for row in rows]


def noise_left(start: float, scheduler: Any) -> float:
    """The timestep below which a refiner goes on.

    Args:
        start: share of the timesteps, from the noisiest, that come before; 0 to 1.
    """
    steps = scheduler.config.num_train_timesteps
    return round(steps - start * steps)
