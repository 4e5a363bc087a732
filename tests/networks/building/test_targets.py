"""Which layers of the full-size models are adapted: as in data/lora_modules.json.gz, read off sd-scripts 48d368f."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from library.families.sdxl import SDXL
from networks import lora
from networks.building.targets import family_of_models
from networks.formats.keys import saved_name

GOLDEN = json.loads(gzip.decompress((Path(__file__).parents[1] / "data/lora_modules.json.gz").read_bytes()))


@pytest.fixture(scope="module", params=["sd1", "sd2", "sd2_linear"])
def full_size(request):
    """The full-size models without memory for their weights; SD2 with convolutions for projections, as single files load."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    family = SD1 if request.param == "sd1" else SD2
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**family.unet_config, "use_linear_projection": request.param == "sd2_linear"})
        text_encoder = CLIPTextModel(CLIPTextConfig(**family.text_encoders[0].config))
    return request.param, text_encoder, unet


@pytest.mark.parametrize(("kind", "args"), [("lierla", {}), ("c3lier", {"conv_dim": "4"})])
def test_layers_shapes_and_blocks_of_the_full_size_models(full_size, kind, args):
    name, text_encoder, unet = full_size
    network = lora.create_network(1.0, 8, 1, None, text_encoder, unet, **args)
    golden = GOLDEN[f"{name}_{kind}"]
    rows = [
        [
            target.name,
            type(target.layer).__name__,
            list(adapter.lora_down.weight.shape),
            list(adapter.lora_up.weight.shape),
            target.block,
        ]
        for target, adapter in network.items()
        if target.part == "denoiser"
    ]
    assert [target.name for target in network.targets.values() if target.part == "text_encoder"] == golden["text_encoder"]
    assert sorted(rows) == sorted(golden["unet"])
    assert len(rows) == {"lierla": 192, "c3lier": 278}[kind]


def test_a_c3lier_network_leaves_later_ones_as_they_are(sd1):
    def layers(**args):
        return list(lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet, **args).targets)

    before = layers()
    assert len(layers(conv_dim=4)) > len(before)
    assert layers() == before


@pytest.mark.parametrize(("args", "count"), [({}, 722), ({"conv_dim": "4"}, 788)])
def test_layers_and_blocks_of_full_size_models_with_two_text_encoders(args, count):
    """As many as sd-scripts 48d368f has, under its names and at its blocks."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs = [CLIPTextConfig(**encoder.config) for encoder in SDXL.text_encoders]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL.unet_config)
        encoders = [CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])]
    network = lora.create_network(1.0, 8, 1, None, encoders, unet, **args)
    parts = Counter(target.part for target in network.targets.values())
    assert parts == {"text_encoder": 72, "text_encoder_2": 192, "denoiser": count}
    names = (
        "lora_te1_text_model_encoder_layers_11_mlp_fc2",
        "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn1_to_v",
    )
    wide = (
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_8_0_skip_connection",
    )
    assert set(names) <= network.targets.keys()
    assert (set(wide) <= network.targets.keys()) is bool(args)
    blocks = Counter(target.block for target in network.targets.values() if target.part == "denoiser")
    lierla = {5: 22, 6: 22, 8: 102, 9: 102, 11: 102, 13: 102, 14: 102, 15: 102, 16: 22, 17: 22, 18: 22}
    assert all(blocks[block] >= number for block, number in lierla.items())
    assert blocks == lierla or args


def test_families_are_told_by_the_models(sd1, sd2, sdxl):
    assert family_of_models(sdxl.text_encoder, sdxl.unet) is SDXL
    assert family_of_models(sd1.text_encoder, sd1.unet) is SD1
    assert family_of_models([sd2.text_encoder], sd2.unet) is SD2
    with pytest.raises(UserError, match="2 text encoders given with a U-Net of Stable Diffusion 1.x"):
        family_of_models([sd1.text_encoder, sd1.text_encoder], sd1.unet)


def test_a_model_without_target_layers_is_an_error():
    with pytest.raises(UserError, match="the preset chooses none of the model's 1 layers"):
        lora.create_network(1.0, 4, 1, None, None, nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("path", ["encoder.layers.3.self_attn.q_proj", "text_model.encoder.layers.3.self_attn.q_proj"])
def test_text_encoder_names_do_not_depend_on_transformers(path):
    assert saved_name("lora_te", path, SD1) == "lora_te_text_model_encoder_layers_3_self_attn_q_proj"


def test_initial_values_depend_on_seed_and_layer_alone(sd1):
    def values(torch_seed, models, text_encoder, **args):
        torch.manual_seed(torch_seed)
        torch.rand(torch_seed)  # what was drawn before does not matter
        network = lora.create_network(1.0, 4, 1, None, text_encoder, models.unet, **args)
        return {name: network.adapter(name).lora_down.weight.detach() for name in network.targets}

    plain, fewer, more = values(1, sd1, sd1.text_encoder), values(1, sd1, None), values(1, sd1, sd1.text_encoder, conv_dim=2)
    assert all(torch.equal(value, plain[name]) for name, value in fewer.items())
    assert all(torch.equal(value, more[name]) for name, value in plain.items())
    other = values(2, sd1, sd1.text_encoder)
    assert not any(torch.equal(value, other[name]) for name, value in plain.items())
    seeded = values(7, sd1, sd1.text_encoder, seed="1")
    assert all(torch.equal(value, seeded[name]) for name, value in plain.items())


def test_making_a_network_draws_nothing_from_the_global_stream(sd1):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet)
    assert torch.equal(torch.get_rng_state(), before)
