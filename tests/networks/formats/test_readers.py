"""What programs make of adapter files: the rules of their readers, on headers of full-size layers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from library.families.sd1 import SD1
from library.families.sd2 import SD2
from networks.formats.readers import READERS, readers_sentence, readings
from networks.formats.reading import read_by
from networks.formats.traits import Header, Trait, file_layers, name_trait, split_any_key

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
FF = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_{}_proj"

LORA = {"lora_down.weight": (4, 768), "lora_up.weight": (320, 4), "alpha": ()}
KINDS = {
    "lora": LORA,
    "loha": {"hada_w1_a": (320, 4), "hada_w1_b": (4, 768), "hada_w2_a": (320, 4), "hada_w2_b": (4, 768), "alpha": ()},
    "lokr": {"lokr_w1": (8, 8), "lokr_w2": (40, 96), "alpha": ()},
    "lokr decomposed": {"lokr_w1": (8, 8), "lokr_w2_a": (40, 4), "lokr_w2_b": (4, 96), "alpha": ()},
    "glora": {"a1.weight": (768, 4), "a2.weight": (4, 768), "b1.weight": (320, 4), "b2.weight": (4, 768), "alpha": ()},
    "old glora": {"a1.weight": (4, 768), "a2.weight": (768, 4), "b1.weight": (4, 768), "b2.weight": (320, 4), "alpha": ()},
    "ia3": {"weight": (768,), "on_input": ()},
    "oft": {"oft_blocks": (40, 8, 8), "alpha": ()},
    "boft": {"oft_blocks": (5, 40, 8, 8), "alpha": ()},
    "full": {"diff": (320, 768)},
    "dora in": LORA | {"dora_scale": (1, 768)},
    "dora out": LORA | {"dora_scale": (320, 1)},
    "loha dora in": {"hada_w1_a": (320, 4), "hada_w1_b": (4, 768), "hada_w2_a": (320, 4), "hada_w2_b": (4, 768)}
    | {"alpha": (), "dora_scale": (1, 768)},
    "bias beside": LORA | {"diff_b": (320,)},
    "no alpha": {"lora_down.weight": (4, 768), "lora_up.weight": (320, 4)},
    "alpha alone": {"alpha": ()},
    "half": {"lora_up.weight": (320, 4), "alpha": ()},
}


def header(layers, family=SD1, alpha=2.0):
    """Layer name -> tensor shapes, as a header; alphas are `alpha`, or by layer."""
    shapes = {f"{name}.{tensor}": shape for name, tensors in layers.items() for tensor, shape in tensors.items()}
    values = {f"{name}.alpha": alpha[name] if isinstance(alpha, dict) else alpha for name in layers}
    return Header(shapes=shapes, scalars={key: value for key, value in values.items() if key in shapes}, family=family)


def letters(given):
    """One letter for each reader in the order of the table: right, wrong, dropped, refused."""
    found = []
    for result in readings(given):
        found.append("f" if result.refused else "d" if result.dropped else "w" if result.wrong else "r")
    return "".join(found)


# ComfyUI, A1111, Forge, SD.Next, diffusers, LyCORIS, InvokeAI
EXPECTED = {
    "lora": "rrrrrrr",
    "loha": "rrrrfrr",
    "lokr": "rrrrfrr",
    "lokr decomposed": "rrrrfrf",  # InvokeAI cannot tell the base by it
    "glora": "rdrdfrf",
    "old glora": "rrrrfff",
    "ia3": "drdrfff",
    "oft": "wrdrfrf",
    "boft": "wrddfrf",
    "full": "rrrrfrr",
    "dora in": "rrrrwfr",
    "dora out": "wwwrwrw",
    "loha dora in": "rrrrfff",
    "bias beside": "rwrrfww",
    "no alpha": "rrrrrfr",
    "alpha alone": "dfddfff",
    "half": "fffdfff",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_has_a_verdict_on_every_kind(kind):
    assert set(EXPECTED) == set(KINDS)
    assert letters(header({K: KINDS[kind]})) == EXPECTED[kind]


NAMES = {
    K: "rrrrrrr",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k": "rrrrfdd",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "rrrdrdf",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": "dddddff",
    "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": "rdrdfrf",
    "base_model.model.down_blocks.0.attentions.0.proj_in": "ddddfff",
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k": "rfrdfdf",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_decide_who_finds_a_layer(name):
    expected = NAMES[name]
    tensors = KINDS["lora"]
    if name.startswith(("unet.", "base_model")):
        tensors = {"lora_A.weight": (4, 768), "lora_B.weight": (320, 4)}
        expected = {"unet.": "dddd" + "rdf", "base_": "dddd" + "fdf"}[name[:5]]
    assert letters(header({name: tensors})) == expected


def test_a_kohya_file_with_an_embedding_is_no_longer_diffusers():
    given = header({K: LORA, "bundle_emb.sks": {"string_to_param.*": (2, 768)}})
    assert "embedding" in (read_by(READERS["diffusers"], given).refused or "")
    assert read_by(READERS["a1111"], given).is_right


def test_forge_refuses_a_file_with_more_than_12_strangers():
    few = {f"{K[:-1]}{number}": KINDS["ia3"] for number in range(6)}
    assert read_by(READERS["forge"], header({Q: LORA, **few})).refused is None
    assert len(read_by(READERS["forge"], header({Q: LORA, **few})).dropped) == 6
    many = few | {"lora_unet_mid_block_attentions_0_proj_in": KINDS["ia3"]}
    assert "14 tensors" in read_by(READERS["forge"], header({Q: LORA, **many})).refused


def test_diffusers_gives_attention_the_most_common_alpha():
    layers = {Q: LORA, K: LORA, FF: LORA, TEXT.format("out"): LORA}
    assert read_by(READERS["diffusers"], header(layers)).is_right
    alphas = {Q: 2.0, K: 4.0, FF: 8.0, TEXT.format("out"): 16.0}  # each part counts for itself; ff may have its own
    result = read_by(READERS["diffusers"], header(layers, alpha=alphas))
    assert set(result.wrong) == {K}
    assert "alpha 2" in result.wrong[K]


def test_attention_of_a_text_encoder_wants_all_four_projections():
    some = {TEXT.format(letter): LORA for letter in "qkv"}
    assert read_by(READERS["a1111"], header(some)).is_right
    assert len(read_by(READERS["a1111"], header(some, SD2)).dropped) == 3
    assert read_by(READERS["diffusers"], header(some)).refused
    whole = some | {TEXT.format("out"): LORA}
    assert read_by(READERS["a1111"], header(whole, SD2)).is_right
    beside = some | {"lora_te_text_model_encoder_layers_0_mlp_fc1": LORA}
    assert set(read_by(READERS["diffusers"], header(beside)).dropped) == set(some)


def test_diffusers_finds_magnitudes_of_a_text_encoder_by_their_whole_name():
    factors = {"lora_A.weight": (4, 768), "lora_B.weight": (768, 4)}
    path = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
    assert read_by(READERS["diffusers"], header({path: factors | {"lora_magnitude_vector.weight": (768,)}})).is_right
    assert read_by(READERS["diffusers"], header({path: factors | {"lora_magnitude_vector": (768,)}})).wrong
    unet = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert read_by(READERS["diffusers"], header({unet: factors | {"lora_magnitude_vector": (768,)}})).is_right


def test_comfyui_takes_no_alpha_from_metadata():
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    given = header({path: {"lora_A.weight": (4, 1280), "lora_B.weight": (320, 4)}})
    assert read_by(READERS["comfyui"], given).is_right
    for alpha, is_right in ((4, True), (2, False)):
        metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": alpha})}
        assert read_by(READERS["comfyui"], replace(given, metadata=metadata)).is_right is is_right
        assert read_by(READERS["diffusers"], replace(given, metadata=metadata)).is_right


def test_invokeai_tells_the_base_by_one_width():
    wide = {"lora_down.weight": (4, 1280), "lora_up.weight": (320, 4), "alpha": ()}
    time = {"lora_unet_down_blocks_0_resnets_0_time_emb_proj": wide}
    invoke = READERS["invokeai"]
    assert "1280" in read_by(invoke, header({**time, K: LORA})).refused
    assert read_by(invoke, header({K: LORA, **time})).is_right
    assert "no layer" in read_by(invoke, header({Q: LORA})).refused
    assert "Stable Diffusion 2.x" in read_by(invoke, header({K: LORA}, SD2)).refused


def test_the_sentence_names_who_reads_it_and_what_the_others_do():
    line = readers_sentence(readings(header({K: KINDS["loha"], Q: LORA})))
    assert line == ("read rightly by ComfyUI, A1111, Forge, SD.Next, LyCORIS, InvokeAI; diffusers would refuse it (LoHa)")
    line = readers_sentence(readings(header({K: KINDS["dora out"], Q: LORA})))
    assert line.startswith(
        "read rightly by SD.Next, LyCORIS; ComfyUI applies 1 of 2 layers wrongly (DoRA along the outputs:"
    )


def test_keys_of_any_layout_are_split():
    assert split_any_key("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight")[1] == "lora_up.weight"
    old = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"
    assert split_any_key(old)[1] == "lora_down.weight"
    assert name_trait(split_any_key(old)[0], SD1) is Trait.OLD_DIFFUSERS_NAME
    assert split_any_key("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight") == (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "lora_up.weight",
    )


def test_layers_keep_the_keys_of_the_file():
    layer = file_layers(header({K: LORA}))[K]
    assert layer.keys["alpha"] == f"{K}.alpha"
    assert layer.traits == (Trait.KOHYA_NAME, Trait.LORA)
