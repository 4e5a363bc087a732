"""SDXL's refiner: a second model for the last steps of a picture, with OpenCLIP's text encoder alone.

Podell et al., arXiv:2307.01952, section 2.5; the configurations are those of stabilityai/stable-diffusion-xl-refiner-1.0.
"""

from __future__ import annotations

from dataclasses import replace

from library.families.family import SIZE_CONDITIONS
from library.families.sdxl import OPEN_CLIP_G, SDXL

SDXL_REFINER = replace(
    SDXL,
    name="sdxl_refiner",
    title="Stable Diffusion XL's refiner",
    refines=SDXL.name,
    text_encoders=(replace(OPEN_CLIP_G, file_prefixes=("conditioner.embedders.0.model.",)),),
    size_conditions=(*SIZE_CONDITIONS[:4], "aesthetic_score"),
    context_width=1280,
    adapter_marks=(),
    known_as=("stable-diffusion-xl-v1-refiner",),
    unet_config={
        **SDXL.unet_config,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (384, 768, 1536, 1536),
        "cross_attention_dim": 1280,
        "attention_head_dim": [6, 12, 24, 24],
        "transformer_layers_per_block": [1, 4, 4, 4],
        "projection_class_embeddings_input_dim": 2560,
    },
    pipeline={
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    },
)
