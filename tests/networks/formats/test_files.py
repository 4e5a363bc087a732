"""Adapter files: what is in them to the byte, that they come back the same, and that no layer gets lost on the way."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from library.errors import UserError
from networks import lora
from networks.formats import files


@pytest.fixture
def network(sd1, perturb):
    return perturb(lora.create_network(1.0, 4, 2, None, sd1.text_encoder, sd1.unet, conv_dim=2))


@pytest.fixture
def tensors(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def test_a_new_network_has_no_line_on_a_load(network):
    assert network.load_report is None


def fresh(models, file=None, weights=None, **args):
    return lora.create_network_from_weights(1.0, file, None, models.text_encoder, models.unet, weights, **args)


def test_names_dtypes_and_alpha(network, tmp_path):
    path = tmp_path / "a.safetensors"
    network.save_weights(path, torch.float16, {"ss_network_dim": "4", "note": "x"})
    saved = load_file(path)
    assert saved.keys() == network.state_dict().keys()
    assert {value.dtype for value in saved.values()} == {torch.float16}
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert saved[f"{key}.lora_down.weight"].shape == (4, 32)
    assert saved[f"{key}.lora_up.weight"].shape == (32, 4)
    assert saved[f"{key}.alpha"].shape == ()
    assert saved[f"{key}.alpha"] == 2
    conv = "lora_unet_down_blocks_0_downsamplers_0_conv"
    assert saved[f"{conv}.lora_down.weight"].shape == (2, 32, 3, 3)
    assert saved[f"{conv}.lora_up.weight"].shape == (32, 2, 1, 1)
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in saved


def test_hashes_as_other_programs_compute_them(network, tmp_path):
    path = tmp_path / "a.safetensors"
    network.save_weights(path, None, {"ss_network_dim": "4", "note": "x"})
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    with_ss_only = save(load_file(path), {"ss_network_dim": "4"})
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(with_ss_only[0x100000:0x110000]).hexdigest()[:8]
    assert (metadata["ss_network_dim"], metadata["note"]) == ("4", "x")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
@torch.no_grad()
def test_what_is_saved_comes_back_bit_for_bit(sd1, network, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    network.save_weights(path, None, None)
    network.attach()
    expected = sd1.both()
    network.detach()
    again, weights = fresh(sd1, path)
    again.apply_to(sd1.text_encoder, sd1.unet)
    again.load_state_dict(weights)
    assert torch.equal(sd1.both(), expected)
    other = lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet, conv_dim=2)
    report = other.load_weights(path)
    assert str(report) == f"{len(network.targets)} layers matched, 0 unmatched, 0 ignored"
    loaded = other.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())
    assert {adapter.scale for _, adapter in other.items()} == {0.5}, "the file's alpha holds"


def test_values_beyond_half_precision_are_kept_and_told(network, tmp_path, caplog):
    with torch.no_grad():
        next(network.parameters())[0, 0] = 1e6
    network.save_weights(tmp_path / "a.safetensors", torch.float16, None)
    assert "beyond the range of torch.float16" in caplog.text
    saved = load_file(tmp_path / "a.safetensors")
    assert max(value.abs().max().item() for value in saved.values()) == 1e6


def test_a_file_with_other_ranks_names_the_layer(sd1, network, tmp_path):
    network.save_weights(tmp_path / "a.safetensors", None, None)
    other = lora.create_network(1.0, 8, 1, None, sd1.text_encoder, sd1.unet, conv_dim=2)
    with pytest.raises(
        UserError, match=r"a\.safetensors: lora_te_\w+ has rank 4 in the file and 8 in the network; use --dim_from"
    ):
        other.load_weights(tmp_path / "a.safetensors")


def test_layers_that_the_network_has_not_are_told(sd1, network, tmp_path):
    network.save_weights(tmp_path / "a.safetensors", None, None)
    lierla = lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet)
    extra = len(network.targets) - len(lierla.targets)
    with pytest.raises(UserError, match=rf"{extra} of its {len(network.targets)} layers have no place .*resnets_0_conv1"):
        lierla.load_weights(tmp_path / "a.safetensors")
    assert len(lierla.load_weights(tmp_path / "a.safetensors", allow_unmatched=True).unmatched) == extra


def test_layers_that_the_file_has_not_are_told(sd1, network, tmp_path):
    partial = lora.create_network(1.0, 4, 1, None, None, sd1.unet, conv_dim=2)
    partial.save_weights(tmp_path / "a.safetensors", None, None)
    with pytest.raises(UserError, match="has no weights for 18 layers of the network"):
        network.load_weights(tmp_path / "a.safetensors")
    assert len(network.load_weights(tmp_path / "a.safetensors", allow_missing=True).missing) == 18


def test_one_renamed_layer_is_told(sd1, tensors):
    name = next(iter(tensors))
    layer = name.partition(".")[0]
    renamed = {
        key.replace(layer, layer + "_x") if key.startswith(layer + ".") else key: value for key, value in tensors.items()
    }
    with pytest.raises(UserError, match=f"1 of its {len(tensors) // 3} layers have no place in the network .{layer}_x"):
        fresh(sd1, weights=renamed)
    network, used = fresh(sd1, weights=renamed, allow_unmatched=True)
    assert len(network.targets) == len(tensors) // 3 - 1
    network.load_state_dict(used)


@pytest.mark.parametrize("dropped", ["lora_up.weight", "lora_down.weight"])
def test_half_a_layer_is_told(sd1, tensors, dropped):
    key = next(key for key in tensors if key.endswith(dropped))
    del tensors[key]
    with pytest.raises(UserError, match=key.partition(".")[0]):
        fresh(sd1, weights=tensors)


def test_an_unknown_tensor_is_told(sd1, tensors):
    layer = next(iter(tensors)).partition(".")[0]
    tensors[f"{layer}.lora_side.weight"] = torch.zeros(4, 4)
    with pytest.raises(UserError, match=rf"{layer}: has tensors that do not belong to a LoRA layer: lora_side.weight"):
        fresh(sd1, weights=tensors)


def test_a_width_of_another_model_is_told(sd1, tensors):
    layer = next(iter(tensors)).partition(".")[0]
    tensors[f"{layer}.lora_down.weight"] = torch.zeros(4, 999)
    with pytest.raises(UserError, match=rf"{layer}: does not fit: .*\.weight is \(4, 999\), the layer wants \(4, "):
        fresh(sd1, weights=tensors)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"nonsense": torch.zeros(4, 4)}, r"the adapter: none of its 1 layer fits .nonsense.; give an adapter made for"),
        (
            {f"unet:{number}:up": torch.zeros(4, 4) for number in range(5)},
            r"none of its 5 layers fits .unet:0:up, unet:1:up, unet:2:up and 2 more.",
        ),
        ({}, "the adapter: holds no adapter: it has no tensors of any layer"),
        ({"bundle_emb.cat.clip_l": torch.zeros(4, 4)}, "the adapter: holds no adapter: it has no tensors of any layer"),
    ],
)
def test_a_file_of_which_nothing_fits_is_refused_always(sd1, weights, sentence):
    for allowed in (False, True):
        with pytest.raises(UserError, match=sentence):
            fresh(sd1, weights=weights, allow_unmatched=allowed)


@pytest.mark.parametrize(
    ("key", "width", "title"),
    [
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", 1024, "Stable Diffusion 2.x"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", 2048, "Stable Diffusion XL"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", 3072, "FLUX"),
    ],
)
def test_an_adapter_for_another_family_is_called_by_its_name(sd1, key, width, title):
    sentence = f"the adapter: is an adapter for {title}, and the model is Stable Diffusion 1.x; give a model of the kind"
    with pytest.raises(UserError, match=sentence):
        fresh(sd1, weights={key: torch.zeros(4, width)}, allow_unmatched=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_a_tensor_that_is_not_finite_is_told_by_name(sd1, tensors, tmp_path, bad, dtype):
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    key = list(tensors)[7]
    tensors[key].view(-1)[-1] = bad
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"a\.safetensors: has values that are not finite in 1 of its \d+ tensors .{key}"):
        fresh(sd1, tmp_path / "a.safetensors")
    network = lora.create_network(1.0, 4, 2, None, sd1.text_encoder, sd1.unet, conv_dim=2)
    before = network.state_dict()
    with pytest.raises(UserError, match=key):
        network.load_weights(tmp_path / "a.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_every_type_of_number_is_read(sd1, tensors, tmp_path, dtype):
    stored = {key: value.to(dtype) for key, value in tensors.items()}
    save_file(stored, tmp_path / "a.safetensors")
    network, _ = fresh(sd1, tmp_path / "a.safetensors")
    for key, value in network.file_tensors().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[key].to(torch.float32)), key


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "under state_dict"])
@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_pytorch_files_are_read(sd1, tensors, tmp_path, nested, suffix):
    torch.save({"state_dict": tensors, "epoch": 3} if nested else tensors, tmp_path / f"a{suffix}")
    network, _ = fresh(sd1, tmp_path / f"a{suffix}")
    assert all(torch.equal(value, tensors[key]) for key, value in network.file_tensors().items())


def test_code_in_a_file_is_never_run(sd1, tensors, tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the file's code was run",))

    torch.save({**tensors, "trap": Trap()}, tmp_path / "a.pt")
    network, _ = fresh(sd1, tmp_path / "a.pt")
    assert network.file_tensors().keys() == tensors.keys()


def test_the_line_on_a_load_counts_what_matched_and_what_did_not(sd1, network, tensors, tmp_path):
    layers = len(network.targets)
    tensors |= {"lora_unet_x.alpha": torch.ones(()), "bundle_emb.cat.clip_l": torch.ones(2, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    made, _ = fresh(sd1, tmp_path / "a.safetensors", allow_unmatched=True)
    assert made.load_report == f"{layers} layers matched, 1 unmatched, 1 ignored"
    network.load_weights(tmp_path / "a.safetensors", allow_unmatched=True)
    assert network.load_report == made.load_report
    partial = {key: value for key, value in tensors.items() if "mid_block" in key}
    save_file(partial, tmp_path / "b.safetensors")
    network.load_weights(tmp_path / "b.safetensors", allow_missing=True)
    matched = len({key.partition(".")[0] for key in partial})
    assert (
        network.load_report
        == f"{matched} layers matched, 0 unmatched, 0 ignored, {layers - matched} of the network not in the file"
    )


@pytest.mark.parametrize("through", ["a new network", "a network"])
def test_a_layer_of_an_unknown_algorithm_is_told_with_its_tensors(sd1, network, tensors, tmp_path, through):
    layer = next(iter(tensors)).partition(".")[0]
    strange = {key: value for key, value in tensors.items() if not key.startswith(f"{layer}.")}
    strange |= {f"{layer}.oft_R.weight": torch.ones(4, 4), f"{layer}.alpha": torch.ones(())}
    save_file(strange, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"a\.safetensors: {layer} is of no known algorithm .*tensors are .*oft_R\.weight"):
        fresh(sd1, tmp_path / "a.safetensors") if through == "a new network" else network.load_weights(
            tmp_path / "a.safetensors"
        )


@pytest.mark.parametrize(("left", "lost"), [("lora_up.weight", "lora_down.weight"), ("lora_down.weight", "lora_up.weight")])
def test_half_a_layer_is_told_in_every_layout(sd1, left, lost):
    peft = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}[left]
    weights = {f"unet.mid_block.attentions.0.proj_in.{peft}": torch.zeros(4, 4)}
    with pytest.raises(UserError, match=f"lora_unet_mid_block_attentions_0_proj_in has {left} without {lost}"):
        fresh(sd1, weights=weights)


def test_settings_that_the_file_decides_are_refused(sd1, tensors):
    with pytest.raises(UserError, match="conv_dim: has no effect with ranks and weights from a file"):
        fresh(sd1, weights=tensors, conv_dim="4")
    network, _ = fresh(sd1, weights=tensors, rank_dropout="0.1", loraplus_lr_ratio="4")
    assert {adapter.rank_dropout for _, adapter in network.items()} == {0.1}
    assert network.rate_factors.denoiser_plus_ratio == 4


def test_numbered_text_encoder_names_are_read(sd1, tensors):
    numbered = {key.replace("lora_te_", "lora_te1_"): value for key, value in tensors.items()}
    network, weights = fresh(sd1, weights=numbered)
    assert weights.keys() == tensors.keys()
    network.load_state_dict(numbered)


def test_ranks_and_alphas_differ_by_layer_as_in_the_file(sd1, network, tmp_path):
    dims = ",".join(map(str, range(1, 26)))
    by_block = lora.create_network(1.0, 4, 3, None, sd1.text_encoder, sd1.unet, block_dims=dims)
    by_block.save_weights(tmp_path / "a.safetensors", torch.bfloat16, None)
    again, _ = fresh(sd1, tmp_path / "a.safetensors")
    settings = {name: (by_block.adapter(name).rank, by_block.adapter(name).scale) for name in by_block.targets}
    assert {name: (again.adapter(name).rank, again.adapter(name).scale) for name in again.targets} == settings


def shapes_of_the_twin(tensors):
    """Projections as 1x1 convolutions where they were linear, and the other way round."""
    twin = dict(tensors)
    for key, value in tensors.items():
        if "proj_in.lora" in key or "proj_out.lora" in key:
            twin[key] = value[:, :, None, None] if value.dim() == 2 else value.flatten(1)
    return twin


@pytest.mark.parametrize("models", ["sd1", "sd2"])
@torch.no_grad()
def test_projections_load_in_either_shape(request, perturb, tmp_path, models):
    models = request.getfixturevalue(models)
    network = perturb(lora.create_network(1.0, 4, 2, None, models.text_encoder, models.unet))
    network.attach()
    expected = models.both()
    network.detach()
    twin = shapes_of_the_twin(network.state_dict())
    assert any(value.shape != twin[key].shape for key, value in network.state_dict().items())
    save_file({key: value.contiguous() for key, value in twin.items()}, tmp_path / "twin.safetensors")
    again, weights = fresh(models, tmp_path / "twin.safetensors")
    again.load_state_dict(weights)
    again.attach()
    assert torch.equal(models.both(), expected)
    again.detach()
    network.load_weights(tmp_path / "twin.safetensors")


def test_files_that_are_none(sd1, tmp_path):
    (tmp_path / "a.safetensors").write_text(json.dumps({}))
    for path in (tmp_path / "a.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(UserError, match=path.name):
            fresh(sd1, path)


def test_a_single_number_that_the_format_would_round_keeps_its_precision(tmp_path):
    tensors = {"a.alpha": torch.tensor(4 * 12**0.5), "b.alpha": torch.tensor(4.0), "a.lora_up.weight": torch.rand(3, 2)}
    files.save_tensors(tmp_path / "a.safetensors", tensors, torch.bfloat16, {})
    saved = load_file(tmp_path / "a.safetensors")
    assert {key: tensor.dtype for key, tensor in saved.items()} == {
        "a.alpha": torch.float32,
        "b.alpha": torch.bfloat16,
        "a.lora_up.weight": torch.bfloat16,
    }
    assert torch.equal(saved["a.alpha"], tensors["a.alpha"])
