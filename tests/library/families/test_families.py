"""Families: facts as published, block places as sd-scripts counts them, and every other kind of file called by its name."""

from __future__ import annotations

import json
import shutil

import pytest

from library.errors import UserError
from library.families.detect import family_of_adapter, family_of_checkpoint, family_of_folder
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from library.families.sdxl import SDXL

UNET = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}
CLIP = {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768)}
OPEN_CLIP = {"cond_stage_model.model.token_embedding.weight": (49408, 1024)}
BOTH_CLIPS = {
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
}

# sd-scripts' table of the 25 places.
PLACES = {
    "conv_in": 0,
    "time_embedding_linear_1": 0,
    "down_blocks_0_attentions_0_proj_in": 1,
    "down_blocks_0_resnets_1_conv1": 2,
    "down_blocks_0_downsamplers_0_conv": 3,
    "down_blocks_2_attentions_1_transformer_blocks_0_attn1_to_q": 8,
    "down_blocks_2_downsamplers_0_conv": 9,
    "down_blocks_3_resnets_1_conv2": 11,
    "mid_block_attentions_0_proj_out": 12,
    "mid_block_resnets_1_conv1": 12,
    "up_blocks_0_resnets_0_conv1": 13,
    "up_blocks_0_upsamplers_0_conv": 15,
    "up_blocks_1_attentions_0_proj_in": 16,
    "up_blocks_2_upsamplers_0_conv": 21,
    "up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2": 24,
}


@pytest.mark.parametrize("layer", PLACES)
def test_layers_have_their_published_places(layer):
    module_name = {"time_embedding_linear_1": "time_embedding.linear_1", "conv_in": "conv_in"}.get(layer)
    for family in (SD1, SD2):
        assert family.block_index(f"lora_unet_{layer}") == PLACES[layer]
        assert family.block_index(module_name or layer.replace("_blocks_", "_blocks.")) == PLACES[layer]


# sd-scripts' table of SDXL's 23 places, in both wordings.
PLACES_OF_SDXL = {
    "time_embed_0": 0,
    "label_emb_0_0": 0,
    "add_embedding_linear_1": 0,
    "input_blocks_0_0": 1,
    "conv_in": 1,
    "input_blocks_3_0_op": 4,
    "down_blocks_0_downsamplers_0_conv": 4,
    "input_blocks_4_1_proj_in": 5,
    "down_blocks_1_attentions_0_proj_in": 5,
    "input_blocks_8_1_transformer_blocks_9_ff_net_2": 9,
    "down_blocks_2_attentions_1_transformer_blocks_9_ff_net_2": 9,
    "middle_block_0_in_layers_2": 10,
    "mid_block_resnets_0_conv1": 10,
    "middle_block_1_transformer_blocks_9_attn2_to_k": 11,
    "mid_block_attentions_0_transformer_blocks_9_attn2_to_k": 11,
    "mid_block_resnets_1_conv2": 12,
    "output_blocks_0_1_transformer_blocks_0_attn1_to_q": 13,
    "up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": 13,
    "output_blocks_2_2_conv": 15,
    "up_blocks_0_upsamplers_0_conv": 15,
    "output_blocks_8_0_skip_connection": 21,
    "up_blocks_2_resnets_2_conv_shortcut": 21,
    "out_2": 22,
    "conv_out": 22,
}


@pytest.mark.parametrize("layer", PLACES_OF_SDXL)
def test_layers_of_sdxl_have_their_published_places(layer):
    assert SDXL.block_index(f"lora_unet_{layer}") == PLACES_OF_SDXL[layer]


def test_block_values_cover_every_place():
    for family in (SD1, SD2, SDXL):
        places = [place for side in family.block_sides for place in side]
        assert places == list(range(places[0], places[-1] + 1))
        assert set(places) <= set(range(family.block_count))
        assert [family.block_places[place] for place in places] == sorted(family.block_places[place] for place in places)


def test_layers_outside_the_places_have_none():
    assert SD1.block_index("lora_unet_conv_out") is None
    assert SD1.block_index("lora_te_text_model_encoder_layers_0_mlp_fc1") is None


def test_families_differ_where_the_models_do():
    assert (SD1.context_width, SD2.context_width) == (768, 1024)
    assert [family.text_encoders[0].pad_token_id for family in (SD1, SD2)] == [49407, 0]
    assert SD1.attention_heads((320, 640, 1280, 1280)) == 8
    assert SD2.attention_heads((320, 640, 1280, 1280)) == [5, 10, 20, 20]
    assert SD2.base_model_versions == {"epsilon": "sd_v2", "v_prediction": "sd_v2_v"}
    assert SD2.default_resolution["v_prediction"] == 768


def test_checkpoints_are_known_by_their_text_encoder():
    assert family_of_checkpoint(UNET | CLIP) is SD1
    assert family_of_checkpoint(UNET | OPEN_CLIP) is SD2
    assert family_of_checkpoint(UNET | BOTH_CLIPS) is SDXL


OTHERS = {
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": ("an SD3 checkpoint", {}),
    "double_blocks.0.img_attn.qkv.weight": ("a FLUX checkpoint", {}),
    "transformer_blocks.0.norm1_context.linear.weight": ("an SD3 or FLUX transformer", {}),
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": ("an adapter .LoRA. file", {}),
    "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": ("an adapter .LoRA. file", {}),
    "emb_params": ("a textual inversion embedding", {}),
    "control_model.input_blocks.0.0.weight": ("a ControlNet", {}),
    "down_blocks.0.resnets.0.conv1.weight": ("a U-Net in diffusers' layout", {}),
    "first_stage_model.encoder.conv_in.weight": ("a VAE without the other parts", {}),
    "decoder.conv_in.weight": ("a VAE without the other parts", {}),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": ("a text encoder without", {}),
    "some.other.tensor": ("not a Stable Diffusion model", {}),
}


@pytest.mark.parametrize("key", OTHERS)
def test_what_is_no_base_model_is_called_by_its_name(key):
    name, others = OTHERS[key]
    with pytest.raises(UserError, match=rf"^x\.safetensors: is {name}.*; give a Stable Diffusion"):
        family_of_checkpoint({key: (320, 320), **others}, where="x.safetensors")


def test_other_inputs_and_missing_text_encoders_are_told_apart():
    inpainting = {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}
    with pytest.raises(UserError, match="is an inpainting model, whose U-Net takes 9 channels instead of 4"):
        family_of_checkpoint(inpainting | CLIP)
    to_k = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}
    with pytest.raises(UserError, match=r"has the U-Net of a Stable Diffusion 2\.x model, but no text encoder"):
        family_of_checkpoint(UNET | to_k)
    with pytest.raises(UserError, match="is empty: it has no tensors"):
        family_of_checkpoint({})


def test_folders_are_known_by_their_configurations(tiny_sd1_folder, tiny_sd2_folder, tiny_sdxl_folder, tmp_path):
    assert family_of_folder(tiny_sd1_folder) is SD1
    assert family_of_folder(tiny_sd2_folder) is SD2
    assert family_of_folder(tiny_sdxl_folder) is SDXL
    lacking = tmp_path / "lacking"
    shutil.copytree(tiny_sdxl_folder, lacking, ignore=shutil.ignore_patterns("*.safetensors", "text_encoder_2"))
    with pytest.raises(UserError, match=r"is a Stable Diffusion XL model without its text_encoder_2; fetch it again"):
        family_of_folder(lacking)
    copy = tmp_path / "model"
    shutil.copytree(tiny_sd1_folder, copy)
    (copy / "text_encoder_3").mkdir()
    with pytest.raises(UserError, match="is an SD3 model"):
        family_of_folder(copy)
    shutil.rmtree(copy / "text_encoder_3")
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    with pytest.raises(UserError, match="is an inpainting model"):
        family_of_folder(copy)
    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json: is not valid JSON"):
        family_of_folder(copy)
    shutil.rmtree(copy / "unet")
    with pytest.raises(UserError, match=r"is no diffusers model folder: it has no unet/config\.json"):
        family_of_folder(copy)


CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
ADAPTERS = {
    "lora": ({f"{CROSS}.lora_down.weight": (4, 768)}, {f"{CROSS}.lora_down.weight": (4, 1024)}),
    "loha": ({f"{CROSS}.hada_w1_b": (4, 768)}, {f"{CROSS}.hada_w1_b": (4, 1024)}),
    "lokr": (
        {f"{CROSS}.lokr_w1": (16, 24), f"{CROSS}.lokr_w2_a": (20, 4), f"{CROSS}.lokr_w2_b": (4, 32)},
        {f"{CROSS}.lokr_w1": (16, 32), f"{CROSS}.lokr_w2": (20, 32)},
    ),
    "text encoder alone": (
        {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 768)},
        {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 1024)},
    ),
    "glora": ({f"{CROSS}.a1.weight": (768, 4)}, {f"{CROSS}.a1.weight": (4, 1024)}),
    "ia3": (
        {f"{CROSS}.on_input": (), f"{CROSS}.weight": (768,)},
        {f"{CROSS}.on_input": (), f"{CROSS}.weight": (1024,)},
    ),
    "full": ({f"{CROSS}.diff": (320, 768)}, {f"{CROSS}.diff": (320, 1024)}),
    "dora along the inputs": ({f"{CROSS}.dora_scale": (1, 768)}, {f"{CROSS}.dora_scale": (1, 1024)}),
    "oft on a text encoder": (
        {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.oft_blocks": (16, 48, 48)},
        {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.oft_blocks": (3, 16, 64, 64)},
    ),
    "old diffusers": (
        {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": (4, 768)},
        {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": (4, 1024)},
    ),
    "original names": (
        {"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768)},
        {"lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 1024)},
    ),
    "peft's adapter name": (
        {"base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight": (4, 768)},
        {"base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight": (4, 1024)},
    ),
    "peft": (
        {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768)},
        {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 1024)},
    ),
}


@pytest.mark.parametrize("algorithm", ADAPTERS)
def test_adapters_are_known_by_the_width_of_the_text_they_take(algorithm):
    of_sd1, of_sd2 = ADAPTERS[algorithm]
    assert family_of_adapter(of_sd1) is SD1
    assert family_of_adapter(of_sd2) is SD2


def test_adapters_of_tiny_models_are_known_by_their_metadata():
    tiny = {f"{CROSS}.lora_down.weight": (4, 32)}
    assert family_of_adapter(tiny, metadata={"ss_base_model_version": "sd_v2_v"}) is SD2
    assert family_of_adapter(tiny, metadata={"modelspec.architecture": "stable-diffusion-v1/lora"}) is SD1
    assert family_of_adapter(tiny, metadata={"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}) is SDXL
    assert family_of_adapter(tiny, metadata={"ss_v2": "True"}) is SD2
    with pytest.raises(UserError, match="says nowhere which models it is for"):
        family_of_adapter(tiny)


@pytest.mark.parametrize(
    ("key", "shape", "name"),
    [
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight", (4, 4096), "SD3 or FLUX"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", (4, 3072), "FLUX"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", (4, 1536), "SD3"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (4, 3072), "FLUX"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (4, 1536), "a diffusion transformer"),
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", (4, 5120), "a diffusion transformer"),
    ],
)
def test_adapters_of_other_families_are_called_by_their_name(key, shape, name):
    with pytest.raises(UserError, match=rf"is an adapter for {name}.*; give one for Stable Diffusion 1.x, .* or"):
        family_of_adapter({key: shape})


OF_SDXL = {
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280),
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": (4, 1280),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 1280),
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight": (4, 640),
    "unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q.lora_A.weight": (4, 1280),
    "lora_unet_up_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 1280),
    "lora_unet_output_blocks_0_1_proj_in.oft_blocks": (16, 80, 80),
    "lora_unet_label_emb_0_0.lora_down.weight": (4, 2816),
    f"{CROSS}.on_input": (),
    f"{CROSS}.lora_down.weight": (4, 2048),
}


@pytest.mark.parametrize("key", OF_SDXL)
def test_adapters_of_sdxl_are_known_by_the_layers_that_only_it_has(key):
    others = {f"{CROSS}.weight": (2048,)} if key.endswith("on_input") else {}
    assert family_of_adapter({key: OF_SDXL[key], **others}) is SDXL


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"modelspec.architecture": "flux-1-dev/lora"}, "FLUX"),
        ({"modelspec.architecture": "stable-diffusion-3-m/lora"}, "SD3"),
    ],
)
def test_adapters_whose_layers_tell_nothing_are_known_by_their_metadata(metadata, name):
    with pytest.raises(UserError, match=f"is an adapter for {name};"):
        family_of_adapter({"lora_unet_conv_in.lora_down.weight": (4, 4, 3, 3)}, metadata=metadata)
