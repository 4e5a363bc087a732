"""The same pictures by diffusers' own pipeline: the independent implementation that ours is measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from library.generation.pipeline import PipelineModels
from library.generation.requests import ImageRequest
from library.generation.samplers import make_scheduler

ROUNDING = 0.5 / 255 + 1e-4
"""What rounding to 8 bits may add to a difference of 1e-4."""


def diffusers_pipeline(models: PipelineModels, asked: ImageRequest, kind: str = "", **more: Any) -> Any:
    """The family's own pipeline for a kind of pictures ("", "Img2Img", "Inpaint", "ControlNet") with the same models.

    Args:
        more: parts beside those of the base model.
    """
    import diffusers

    family = models.family
    settings = {name: None if value == [None, None] else value for name, value in family.pipeline.items()}
    name = settings.pop("_class_name").replace("Pipeline", f"{kind}Pipeline")
    pipeline = getattr(diffusers, name)(
        vae=models.vae,
        unet=models.denoiser,
        scheduler=make_scheduler(asked.sampler, steps=asked.steps, prediction_type=models.prediction_type),
        **{encoder.part: module for encoder, module in zip(family.text_encoders, models.text_encoders, strict=True)},
        **{encoder.tokenizer: each for encoder, each in zip(family.text_encoders, models.tokenizers, strict=True)},
        **settings,
        **more,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_picture(
    models: PipelineModels, asked: ImageRequest, prepare: Callable[[Any], dict[str, Any]] = lambda _: {}
) -> np.ndarray:
    """(H, W, 3) in 0..1 from the family's own pipeline with the same models, scheduler and generator.

    Args:
        prepare: is given the pipeline first, and returns more arguments of its call.
    """
    pipeline = diffusers_pipeline(models, asked)
    more = prepare(pipeline)
    return pipeline(
        asked.prompt,
        negative_prompt=asked.negative_prompt,
        width=asked.width,
        height=asked.height,
        num_inference_steps=asked.steps,
        guidance_scale=asked.scale,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type="np",
        **more,
    ).images[0]
