"""Stable Diffusion 2.x: OpenCLIP-H without its last layer, heads 64 wide, projections as matrices, noise or v predicted."""

from __future__ import annotations

from dataclasses import replace

from library.families.family import EPSILON, V_PREDICTION, heads_of_64
from library.families.sd1 import CLIP_L, SD1

OPEN_CLIP_H = replace(
    CLIP_L,
    layout="open_clip",
    file_prefixes=("cond_stage_model.model.",),
    layers_dropped=1,
    pad_token="!",
    pad_token_id=0,
    config={
        **CLIP_L.config,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
        "pad_token_id": 0,
    },
)

SD2 = replace(
    SD1,
    name="sd2",
    title="Stable Diffusion 2.x",
    text_encoders=(OPEN_CLIP_H,),
    context_width=1024,
    is_v2=True,
    flag="v2",
    prediction_types=(EPSILON, V_PREDICTION),
    known_as=("sd_v2", "stable-diffusion-v2"),
    base_model_versions={EPSILON: "sd_v2", V_PREDICTION: "sd_v2_v"},
    architectures={EPSILON: "stable-diffusion-v2-512", V_PREDICTION: "stable-diffusion-v2-768-v"},
    default_resolution={EPSILON: 512, V_PREDICTION: 768},
    linear_projections=True,
    attention_heads=lambda channels: [heads_of_64(width) for width in channels],
    unet_config={
        **SD1.unet_config,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
)
