"""The two layouts: one relation, both ways, checked on the full-size models' own names and against diffusers' converter."""

from __future__ import annotations

from functools import cache

import pytest

from library.checkpoints.inferred_configs import infer_config
from library.checkpoints.ldm_keys import TRANSPOSED, KeyTable, modern_vae_name, split_view
from library.checkpoints.parts import TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE, ModelPart
from library.checkpoints.single_file import original_table, read_checkpoint
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_places import TensorFile
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from library.families.sdxl import SDXL

FAMILIES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
FULL_CONFIGS = {family.name: {part: family.config(part) for part in family.parts} for family in FAMILIES.values()}


@cache
def full_shapes(name: str, kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the full-size module, as diffusers and transformers build it."""
    return ModelPart(kind=kind, config=FULL_CONFIGS[name][kind], sources={}, where="").module_shapes()


def original_shapes(name: str, kind: str) -> dict[str, tuple[int, ...]]:
    """The same in the original layout, without the prefix."""
    table = original_table(kind, FULL_CONFIGS[name][kind], FAMILIES[name])
    shapes = {}
    for key, shape in full_shapes(name, kind).items():
        original = table.to_original(key)
        assert original is not None, key
        whole, view = split_view(original)
        shapes[whole] = shape[::-1] if view == TRANSPOSED else (3 * shape[0], *shape[1:]) if view else shape
    return shapes


# Tensors in the published checkpoints, averages and position_ids not counted; SD2's text encoder without its last layer
# (12), text_projection and logit_scale.
PUBLISHED_COUNTS = {
    ("sd1", UNET): 686, ("sd1", VAE): 248, ("sd1", TEXT_ENCODER): 196,
    ("sd2", UNET): 686, ("sd2", VAE): 248, ("sd2", TEXT_ENCODER): 280,
    ("sdxl", UNET): 1680, ("sdxl", VAE): 248, ("sdxl", TEXT_ENCODER): 196, ("sdxl", TEXT_ENCODER_2): 389,
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), PUBLISHED_COUNTS)
def test_every_tensor_of_the_full_size_models_has_one_name_in_each_layout(name, kind):
    table = original_table(kind, FULL_CONFIGS[name][kind], FAMILIES[name])
    names = list(full_shapes(name, kind))
    originals = [table.to_original(key) for key in names]
    assert [table.to_module(original) for original in originals if original] == names
    assert len(set(originals)) == len(names)
    assert len(original_shapes(name, kind)) == PUBLISHED_COUNTS[name, kind]


@pytest.mark.parametrize(("name", "kind"), PUBLISHED_COUNTS)
def test_full_size_configurations_follow_from_the_shapes_alone(name, kind):
    shapes = original_shapes(name, kind)
    if kind == TEXT_ENCODER and name == "sd2":
        last = {key.replace("resblocks.22.", "resblocks.23."): shape for key, shape in shapes.items() if ".22." in key}
        assert infer_config(kind, {**shapes, **last}, SD2, "") == dict(FULL_CONFIGS[name][kind])
    assert infer_config(kind, shapes, FAMILIES[name], "") == dict(FULL_CONFIGS[name][kind])


PUBLISHED_PAIRS = {
    UNET: {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
        ),
        "down_blocks.0.resnets.0.conv1.weight": "input_blocks.1.0.in_layers.2.weight",
        "down_blocks.0.downsamplers.0.conv.bias": "input_blocks.3.0.op.bias",
        "down_blocks.3.resnets.1.norm2.weight": "input_blocks.11.0.out_layers.0.weight",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
        "time_embedding.linear_2.weight": "time_embed.2.weight",
        "conv_norm_out.bias": "out.0.bias",
    },
    VAE: {
        "decoder.up_blocks.0.resnets.2.conv1.weight": "decoder.up.3.block.2.conv1.weight",
        "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": "decoder.up.1.block.0.nin_shortcut.weight",
        "encoder.mid_block.attentions.0.to_out.0.weight": "encoder.mid.attn_1.proj_out.weight",
        "encoder.down_blocks.2.downsamplers.0.conv.weight": "encoder.down.2.downsample.conv.weight",
    },
}


@pytest.mark.parametrize("kind", PUBLISHED_PAIRS)
def test_published_pairs_of_names(kind):
    table = original_table(kind, FULL_CONFIGS["sd1"][kind], SD1)
    for module, original in PUBLISHED_PAIRS[kind].items():
        assert table.to_original(module) == original


def test_names_that_no_layer_has_are_not_translated():
    table = original_table(UNET, SD1.unet_config, SD1)
    for stranger in ("input_blocks.99.0.op.weight", "label_emb.0.0.weight", "input_blocks", ""):
        assert table.to_module(stranger) is None
    with pytest.raises(ValueError, match="one to one"):
        KeyTable([("a", "x"), ("b", "x")])


def test_old_names_of_the_vaes_attention_become_todays():
    assert modern_vae_name("encoder.mid_block.attentions.0.query.weight") == "encoder.mid_block.attentions.0.to_q.weight"
    assert modern_vae_name("decoder.mid_block.attentions.0.proj_attn.bias") == "decoder.mid_block.attentions.0.to_out.0.bias"
    assert modern_vae_name("encoder.conv_in.weight") == "encoder.conv_in.weight"


def stored(file: TensorFile) -> dict:
    return {key: file.read(key) for key in file.places}


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_diffusers_own_converter_finds_the_same_tensors_under_the_same_names(name, request):
    """An independent reading of the same file: diffusers' single-file functions."""
    import torch
    from diffusers.loaders import single_file_utils as reference

    file = open_tensor_file(request.getfixturevalue(f"tiny_{name}_file"))
    parts = read_checkpoint(file).parts
    unet_config = {**parts[UNET].config, "class_embed_type": None, "addition_embed_type": None}
    theirs = {
        UNET: reference.convert_ldm_unet_checkpoint(stored(file), config=unet_config),
        VAE: reference.convert_ldm_vae_checkpoint(stored(file), config=dict(parts[VAE].config)),
    }
    if name == "sd1":
        found = reference.convert_ldm_clip_checkpoint(stored(file))
        theirs[TEXT_ENCODER] = {key.removeprefix("text_model."): tensor for key, tensor in found.items()}
    for kind, tensors in theirs.items():
        assert set(tensors) == set(parts[kind].sources)
        for key, tensor in tensors.items():
            assert torch.equal(tensor.flatten(), parts[kind].sources[key].read().flatten()), key


def test_sd2s_text_encoder_computes_what_open_clips_layout_means(tiny_sd2_file, tiny_sd2_folder):
    """Reference: queries, keys and values as torch's own attention reads them out of in_proj_weight."""
    import torch

    file = open_tensor_file(tiny_sd2_file)
    weight = file.read("cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight")
    folder = open_tensor_file(tiny_sd2_folder / "text_encoder" / "model.safetensors")
    names = {key.removeprefix("text_model."): key for key in folder.places}
    expected = [folder.read(names[f"encoder.layers.1.self_attn.{part}_proj.weight"]) for part in "qkv"]
    assert torch.equal(weight, torch.cat(expected))


def test_parts_and_what_lies_beside_them_account_for_every_key(tiny_sd2_file):
    content = read_checkpoint(open_tensor_file(tiny_sd2_file))
    used = {source.key for part in content.parts.values() for source in part.sources.values()}
    assert used | set(content.beside) == set(open_tensor_file(tiny_sd2_file).keys())
    assert content.unmatched == ()
    assert len(content.beside) == 12 + 2, "the dropped layer, text_projection and logit_scale"
