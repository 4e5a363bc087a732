"""Stable Diffusion 1.x: CLIP-L text encoder, 8 heads on every level, projections as 1x1 convolutions."""

from __future__ import annotations

import re

from library.families.family import EPSILON, V_PREDICTION, ModelFamily, TextEncoder

_LAYER = re.compile(r"(down|up)_blocks[._](\d+)[._](resnets|attentions|downsamplers|upsamplers)[._](\d+)")
_BLOCK_COUNT = 25


def unet_block_index(layer_name: str) -> int | None:
    """The place of a U-Net layer among the 25: conv_in and time embedding 0, down 1-11, middle 12, up 13-24.

    Takes saved names (`lora_unet_down_blocks_0_...`) and module names (`down_blocks.0...`).
    Three places a block: its layers and, in the third (down) or with the third layer (up), its resampling.
    """
    if "mid_block" in layer_name:
        return 12
    match = _LAYER.search(layer_name)
    if match is None:
        outside = ("conv_in", "time_embedding")
        return 0 if any(part in layer_name.replace(".", "_") for part in outside) else None
    side, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
    place = 2 if kind in ("downsamplers", "upsamplers") else layer
    index = (1 if side == "down" else 13) + 3 * block + place
    return index if index < _BLOCK_COUNT else None


CLIP_L = TextEncoder(
    part="text_encoder",
    tokenizer="tokenizer",
    adapter_prefix="lora_te",
    layout="clip",
    # Files from before transformers had `text_model` lack that level.
    file_prefixes=("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    config={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 768,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    },
)

SD1 = ModelFamily(
    name="sd1",
    title="Stable Diffusion 1.x",
    text_encoders=(CLIP_L,),
    denoiser_prefix="lora_unet",
    denoiser_wording="diffusers",
    text_encoder_targets=("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"),
    denoiser_targets=("Transformer2DModel",),
    denoiser_conv_targets=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
    block_index=unet_block_index,
    block_sides=(range(12), range(12, 13), range(13, _BLOCK_COUNT)),
    block_places=tuple(range(1, _BLOCK_COUNT + 1)),
    size_conditions=(),
    depth_count="levels",
    latent_scale=0.18215,
    latent_channels=4,
    latent_factor=8,
    context_width=768,
    is_v2=False,
    # The published models all predict the noise; fine-tunes that predict v exist and say so.
    prediction_types=(EPSILON,),
    known_as=("sd_v1", "stable-diffusion-v1"),
    base_model_versions={EPSILON: "sd_v1", V_PREDICTION: "sd_v1_v"},
    architectures={EPSILON: "stable-diffusion-v1", V_PREDICTION: "stable-diffusion-v1"},
    default_resolution={EPSILON: 512, V_PREDICTION: 512},
    linear_projections=False,
    attention_heads=lambda _channels: 8,
    pipeline={
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    },
    unet_config={
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "use_linear_projection": False,
        "upcast_attention": False,
        "norm_num_groups": 32,
    },
    vae_config={
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    },
)
