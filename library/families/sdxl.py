"""Stable Diffusion XL: two text encoders, a pooled text and sizes beside the text, three levels, transformers up to 10 deep.

Podell et al., arXiv:2307.01952; the configurations are those of stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

import re
from dataclasses import replace

from library.families.family import EPSILON, SIZE_CONDITIONS, V_PREDICTION
from library.families.sd1 import CLIP_L, SD1
from library.families.sd2 import OPEN_CLIP_H, SD2

_LAYER = re.compile(r"(down|up)_blocks[._](\d+)[._](resnets|attentions|downsamplers|upsamplers)[._](\d+)")
_MIDDLE = re.compile(r"mid_block[._](resnets|attentions)[._](\d+)")
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks)[._](\d+)")
_BLOCK_COUNT = 23
_INPUT, _MIDDLE_BLOCK, _OUTPUT = 1, 10, 13  # the first place of each


def unet_block_index(layer_name: str) -> int | None:
    """The place of a U-Net layer among the 23: embeddings 0, input blocks 1-9, middle 10-12, output blocks 13-21, out 22.

    Takes saved names (`lora_unet_input_blocks_4_1_...`) and module names, in the original wording and in diffusers'.
    """
    if match := _ORIGINAL.search(layer_name):
        first = {"input_blocks": _INPUT, "middle_block": _MIDDLE_BLOCK, "output_blocks": _OUTPUT}[match[1]]
        return first + int(match[2])
    if match := _MIDDLE.search(layer_name):
        return _MIDDLE_BLOCK + (1 if match[1] == "attentions" else 2 * int(match[2]))
    if match := _LAYER.search(layer_name):
        side, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        place = 2 if kind in ("downsamplers", "upsamplers") else layer
        return (_INPUT + 1 if side == "down" else _OUTPUT) + 3 * block + place
    flat = layer_name.replace(".", "_")
    if re.search(r"(^|_)(time_embed|label_emb|add_embedding)", flat):
        return 0
    if re.search(r"(^|_)conv_in(_|$)", flat):
        return _INPUT
    return _BLOCK_COUNT - 1 if re.search(r"(^|_)(conv_out|conv_norm_out|out_[02])(_|$)", flat) else None


CLIP_L_OF_TWO = replace(
    CLIP_L,
    adapter_prefix="lora_te1",
    file_prefixes=("conditioner.embedders.0.transformer.text_model.",),
    last_used=2,
    final_norm=False,
)

OPEN_CLIP_G = replace(
    OPEN_CLIP_H,
    part="text_encoder_2",
    tokenizer="tokenizer_2",
    adapter_prefix="lora_te2",
    file_prefixes=("conditioner.embedders.1.model.",),
    layers_dropped=0,
    last_used=2,
    final_norm=False,
    gives_pooled=True,
    config={
        **OPEN_CLIP_H.config,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
)

SDXL = replace(
    SD2,
    name="sdxl",
    title="Stable Diffusion XL",
    text_encoders=(CLIP_L_OF_TWO, OPEN_CLIP_G),
    denoiser_wording="original",
    block_index=unet_block_index,
    block_sides=(range(1, 10), range(10, 13), range(13, 22)),
    block_places=(1, *range(1, 10), 13, 13, 13, *range(14, 23), None),
    size_conditions=SIZE_CONDITIONS[:6],
    depth_count="input blocks",
    latent_scale=0.13025,
    context_width=2048,
    is_v2=False,
    flag="sdxl",
    # The published model predicts the noise; fine-tunes that predict v say so.
    prediction_types=(EPSILON,),
    known_as=("sdxl", "stable-diffusion-xl"),
    # SD1 and SD2 have one transformer block where SDXL has up to ten, and none in the first upward block.
    adapter_marks=(
        r"(lora_te2_|text_encoder_2\.|clip_g\.|text_encoders\.clip_g)",
        r"(label_emb|add_embedding)[._]",
        r"(blocks|block)[._].*transformer_blocks[._][1-9]",
        r"up_blocks[._]0[._]attentions|output_blocks[._]0[._]1[._]",
    ),
    base_model_versions={EPSILON: "sdxl_base_v1-0", V_PREDICTION: "sdxl_base_v1-0"},
    architectures={EPSILON: "stable-diffusion-xl-v1-base", V_PREDICTION: "stable-diffusion-xl-v1-base"},
    default_resolution={EPSILON: 1024, V_PREDICTION: 1024},
    pipeline={"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    unet_config={
        **SD1.unet_config,
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae_config={**SD1.vae_config, "sample_size": 1024, "scaling_factor": 0.13025},
)
