"""One network of many algorithms: by layer pattern, in one file, read again by us and by LyCORIS."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from networks import lora
from tests.networks.cases import Case, acting, attached, layer_and_input, new_adapter

BY_LAYER = {
    "attn1.to_q": "OFT",
    "attn1.to_k": "GLoRA",
    "attn1.to_v": "Full",
    "attn2.to_q": "LoHa",
    "attn2.to_k": "LoKr",
    "attn2.to_v": "(IA)3 on outputs",
    "proj_in": "BOFT",
    "norm2": "Norm",
    "ff.net.2": "LoRA",
}
RULES = (
    "attn1.to_q=oft,attn1.to_k=glora,attn1.to_v=full,attn2.to_q=loha,attn2.to_k=lokr,attn2.to_v=ia3,attentions.*proj_in=boft"
)


@pytest.fixture
def network(sd1):
    network = lora.create_network(1.0, 8, 4, None, sd1.text_encoder, sd1.unet, network_reg_algos=RULES, train_norm="True")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def test_every_layer_has_the_algorithm_of_its_rule(network, tmp_path):
    for target, adapter in network.items():
        for ending, variant in BY_LAYER.items():
            if target.part == "denoiser" and target.path.endswith(ending):
                assert adapter.variant == variant, target.path
    network.save_weights(tmp_path / "a.safetensors", None, {})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(BY_LAYER.values()) == set(json.loads(file.metadata()["ss_network_variants"]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["glora", "ia3", "oft", "boft", "full"])
def test_module_dropout_leaves_whole_passes_out_in_training_alone(name):
    layer, x = layer_and_input("linear")
    adapter = acting(new_adapter(Case(name, {"module_dropout": 0.5} | ({"rank": 6} if name == "boft" else {})), layer))
    torch.manual_seed(0)
    without = [torch.equal(attached(layer, adapter.train(), x), layer(x)) for _ in range(40)]
    assert 10 < sum(without) < 30
    assert not any(torch.equal(attached(layer, adapter.eval(), x), layer(x)) for _ in range(10))


@torch.no_grad()
def test_file_merge_and_removal(network, sd1, tmp_path):
    base = sd1.both()
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.attach()
    attached = sd1.both()
    network.detach()
    assert (attached - base).abs().max() > 0.1
    again, _ = lora.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, sd1.text_encoder, sd1.unet)
    assert [adapter.variant for _, adapter in again.items()] == [adapter.variant for _, adapter in network.items()]
    again.merge()
    torch.testing.assert_close(sd1.both(), attached, rtol=1e-3, atol=1e-4 * attached.abs().max().item())
    again.unmerge()
    assert torch.equal(sd1.both(), base)


@torch.no_grad()
def test_lycoris_reads_the_file_to_the_same_picture(network, sd1, tmp_path, monkeypatch):
    """Without the two algorithms that its own reader fails on: Full (counted twice) and (IA)3 (a TypeError)."""
    lycoris = pytest.importorskip("lycoris.kohya")
    for name in [name for name, target in network.targets.items() if target.path.endswith(("attn1.to_v", "attn2.to_v"))]:
        del network.targets[name]
        del network._modules[name]
    network.keep_parts(["denoiser"])
    network.save_weights(tmp_path / "a.safetensors", None, {})
    base = sd1.picture()
    network.attach()
    ours = sd1.picture()
    network.detach()
    monkeypatch.setattr(lycoris.LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [])
    weights = load_file(tmp_path / "a.safetensors")
    theirs, _ = lycoris.create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, None, sd1.unet, weights_sd=weights
    )
    try:
        theirs.apply_to(None, sd1.unet, False, True)
        matched = theirs.load_state_dict(weights, strict=False)
        picture = sd1.picture()
    finally:
        for layer in theirs.unet_loras:
            layer.restore()
    assert len(theirs.unet_loras) == len(network.targets)
    assert (matched.missing_keys, matched.unexpected_keys) == ([], [])
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(picture, ours, rtol=1e-3, atol=1e-4 * ours.abs().max().item())
