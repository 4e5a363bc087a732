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


def diffusers_picture(
    models: PipelineModels, asked: ImageRequest, prepare: Callable[[Any], dict[str, Any]] = lambda _: {}
) -> np.ndarray:
    """(H, W, 3) in 0..1 from StableDiffusionPipeline with the same models, scheduler and generator.

    Args:
        prepare: is given the pipeline first, and returns more arguments of its call.
    """
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=models.vae,
        text_encoder=models.text_encoders[0],
        tokenizer=models.tokenizers[0],
        unet=models.denoiser,
        scheduler=make_scheduler(asked.sampler, steps=asked.steps, prediction_type=models.prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
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
