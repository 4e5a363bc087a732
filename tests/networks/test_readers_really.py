"""The tables against the programs themselves: what diffusers and LyCORIS are said to take they take, and mean the same; what
they are said to refuse raises."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints.tensor_files import open_tensor_file
from library.families.sd1 import SD1
from networks.core.adapter import LayerSpec
from networks.formats.file_adapters import adapter_of_layer
from networks.formats.readers import READERS
from networks.formats.reading import read_by
from networks.formats.traits import Header, read_header

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
FEED = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"
WIDE = "lora_unet_down_blocks_0_resnets_0_conv1"
PROJECTION = "lora_unet_down_blocks_0_attentions_0_proj_in"
TEXT = "lora_te_text_model_encoder_layers_0_{}"


@pytest.fixture(scope="module")
def pipe(tiny_sd1_folder):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny_sd1_folder, local_files_only=True)


NAMES = {"lora_te1": "lora_te", "unet": "lora_unet"}


def lora(outputs=32, inputs=32, rank=4, alpha=2.0, kernel=None):
    ends = [(), ()] if kernel is None else [(kernel, kernel), (1, 1)]
    stream = torch.Generator().manual_seed(rank)
    return {
        "lora_down.weight": torch.randn(rank, inputs, *ends[0], generator=stream),
        "lora_up.weight": torch.randn(outputs, rank, *ends[1], generator=stream),
        "alpha": torch.tensor(alpha),
    }


def peft(tensors):
    return {"lora_A.weight": tensors["lora_down.weight"], "lora_B.weight": tensors["lora_up.weight"]}


FILES = {
    "attention": {ATTENTION: lora()},
    "convolution": {ATTENTION: lora(), WIDE: lora(kernel=3), PROJECTION: lora(kernel=1)},
    "flat convolution": {ATTENTION: lora(), WIDE: lora(inputs=32 * 9)},
    "flat projection": {PROJECTION: lora()},
    "other names of the text encoder": {TEXT.format("self_attn_out_proj").replace("te_", "te1_"): lora()},
    "original names": {"lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k": lora()},
    "PEFT": {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": peft(lora())},
    "base_model": {"base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": peft(lora())},
    "PEFT with alpha": {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": lora()},
    "both": {ATTENTION: lora(), "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q": peft(lora())},
    "LyCORIS": {ATTENTION.replace("lora_unet", "lycoris"): lora()},
    "LoHa": {ATTENTION: lora(), FEED: {f"hada_w{n}_{half}": torch.ones(4, 4) for n in (1, 2) for half in "ab"}},
    "full": {ATTENTION: {"diff": torch.ones(32, 32)}},
    "bias": {ATTENTION: lora() | {"diff_b": torch.ones(32)}},
    "magnitude": {ATTENTION: lora() | {"dora_scale": torch.ones(1, 32)}},
    "Tucker": {WIDE: lora() | {"lora_mid.weight": torch.ones(4, 4, 3, 3)}},
    "alpha alone": {ATTENTION: lora(), FEED: {"alpha": torch.tensor(1.0)}},
    "no alpha": {ATTENTION: {key: value for key, value in lora().items() if key != "alpha"}},
    "half": {ATTENTION: {"lora_up.weight": torch.ones(32, 4)}},
    "alphas": {ATTENTION: lora(alpha=1.0), ATTENTION.replace("to_k", "to_v"): lora(), FEED: lora(outputs=256, alpha=7.0)}
    | {ATTENTION.replace("to_k", "to_q"): lora(rank=8)},
    "some alphas": {ATTENTION: lora()}
    | {ATTENTION.replace("to_k", "to_v"): {key: value for key, value in lora().items() if key != "alpha"}},
    "queries alone": {TEXT.format("self_attn_q_proj"): lora()},
    "queries and mlp": {TEXT.format("self_attn_q_proj"): lora(), TEXT.format("mlp_fc1"): lora(outputs=64)},
    "mlp alone": {TEXT.format("mlp_fc1"): lora(outputs=64)},
    "text alphas": {TEXT.format("self_attn_out_proj"): lora(), TEXT.format("mlp_fc1"): lora(outputs=64, alpha=4.0)},
    "norm": {"lora_unet_conv_norm_out": {"w_norm": torch.ones(32), "b_norm": torch.ones(32)}},
    "embedding": {ATTENTION: lora(), "bundle_emb.sks": {"string_to_param": torch.ones(2, 32)}},
}


def scales_in(pipe):
    """Saved layer name -> the factor that diffusers applies it with."""
    found = {}
    for prefix, model in (("lora_unet", pipe.unet), ("lora_te", pipe.text_encoder)):
        for path, module in model.named_modules():
            if hasattr(module, "lora_A") and len(module.lora_A):
                path = f"text_model.{path}" if path.startswith("encoder") else path
                found[f"{prefix}_{path.replace('.', '_')}"] = next(iter(module.scaling.values()))
    return found


@pytest.mark.parametrize("kind", FILES)
def test_the_table_says_what_diffusers_does(kind, pipe, tmp_path):
    layers = FILES[kind]
    tensors = {f"{layer}.{name}": tensor.contiguous() for layer, of in layers.items() for name, tensor in of.items()}
    save_file(tensors, tmp_path / "file.safetensors")
    said = read_by(READERS["diffusers"], read_header(open_tensor_file(tmp_path / "file.safetensors"), SD1))
    logging.disable(logging.WARNING)
    try:
        pipe.load_lora_weights(tmp_path, weight_name="file.safetensors")
        scales = scales_in(pipe)
    except Exception as error:
        scales, raised = {}, error
    else:
        raised = None
    finally:
        logging.disable(logging.NOTSET)
        pipe.unload_lora_weights()
    if said.refused is not None:
        assert raised is not None or not scales, f"diffusers took {list(scales)} and was said to refuse: {said.refused}"
        return
    assert raised is None, f"diffusers raised {raised!r} and was said to take it: {said}"
    names = {re.sub("^lora_te1|^unet", lambda found: NAMES[found[0]], name.replace(".", "_")): name for name in layers}
    assert {names[name] for name in scales} == set(said.right) | set(said.wrong)
    for name, scale in scales.items():
        given = layers[names[name]]
        meant = float(given["alpha"]) / len(given["lora_down.weight"]) if "alpha" in given else 1.0
        if "dora_scale" not in given:
            assert (scale == pytest.approx(meant)) is (names[name] in said.right), (name, scale, meant)


LINEAR = (24, 16)  # outputs and inputs of the layer that LyCORIS gets
HADAMARD = {f"hada_w{n}_a": (24, 4) for n in (1, 2)} | {f"hada_w{n}_b": (4, 16) for n in (1, 2)}
LYCORIS_LAYERS = {
    "lora": {"lora_down.weight": (4, 16), "lora_up.weight": (24, 4), "alpha": ()},
    "no alpha": {"lora_down.weight": (4, 16), "lora_up.weight": (24, 4)},
    "DoRA out": {"lora_down.weight": (4, 16), "lora_up.weight": (24, 4), "alpha": (), "dora_scale": (24, 1)},
    "DoRA in": {"lora_down.weight": (4, 16), "lora_up.weight": (24, 4), "alpha": (), "dora_scale": (1, 16)},
    "bias beside": {"lora_down.weight": (4, 16), "lora_up.weight": (24, 4), "alpha": (), "diff_b": (24,)},
    "half": {"lora_up.weight": (24, 4), "alpha": ()},
    "LoHa": HADAMARD | {"alpha": ()},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 4), "alpha": ()},
    "GLoRA": {"a1.weight": (16, 4), "a2.weight": (4, 16), "b1.weight": (24, 4), "b2.weight": (4, 16), "alpha": ()},
    "old GLoRA": {"a1.weight": (4, 16), "a2.weight": (16, 4), "b1.weight": (4, 16), "b2.weight": (24, 4), "alpha": ()},
    "(IA)3": {"weight": (16,), "on_input": ()},
    "OFT": {"oft_blocks": (6, 4, 4), "alpha": ()},
    "BOFT": {"oft_blocks": (3, 4, 6, 6), "alpha": ()},
}


@pytest.mark.parametrize("kind", LYCORIS_LAYERS)
@torch.no_grad()
def test_the_table_says_what_lycoris_does(kind):
    modules = pytest.importorskip("lycoris.modules")
    stream = torch.Generator().manual_seed(3)
    tensors = {name: 0.3 * torch.randn(shape, generator=stream) for name, shape in LYCORIS_LAYERS[kind].items()}
    tensors |= {"alpha": torch.tensor(2.0)} if "alpha" in tensors else {}
    tensors |= {"dora_scale": tensors["dora_scale"].abs() + 1} if "dora_scale" in tensors else {}
    header = Header(
        shapes={f"{ATTENTION}.{name}": tuple(tensor.shape) for name, tensor in tensors.items()},
        scalars={f"{ATTENTION}.alpha": 2.0},
        family=SD1,
    )
    said = read_by(READERS["lycoris"], header)
    layer, x = torch.nn.Linear(*reversed(LINEAR)), torch.randn(3, LINEAR[1], generator=stream)
    weight, bias = layer.weight.clone(), layer.bias.clone()

    def theirs():
        prefixed = {f"{ATTENTION}.{name}": tensor.clone() for name, tensor in tensors.items()}
        module = modules.make_module(*modules.get_module(prefixed, ATTENTION), ATTENTION, layer)
        module.apply_to()
        module.load_state_dict(tensors, strict=False)
        return layer(x)

    if said.refused is not None:
        with pytest.raises((TypeError, RuntimeError, AttributeError)):
            theirs()
        return
    output = theirs()
    spec = LayerSpec(weight_shape=LINEAR, has_bias=True)
    adapter = adapter_of_layer(ATTENTION, tensors, spec)
    ours = torch.nn.functional.linear(x, weight + adapter.delta_weight(weight), bias)
    if adapter.delta_bias() is not None:
        ours = ours + adapter.delta_bias()
    assert torch.allclose(output, ours, rtol=1e-4, atol=1e-4) is bool(said.right)
