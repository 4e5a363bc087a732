"""Base models: whatever the container, the same numbers come out; what contradicts or is missing is told in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.checkpoints.base_model import open_base_model, resolve_prediction_type
from library.checkpoints.model_writing import plan_single_file
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_writing import write_tensors
from library.errors import UserError

CPU = {"dtype": torch.float32, "device": "cpu"}
UNET_KEY = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


def contents(path: Path) -> dict[str, Tensor]:
    file = open_tensor_file(path)
    return {key: file.read(key) for key in file.places}


def edited(path: Path, folder: Path, metadata: dict | None = None, **changes: Tensor | None) -> Path:
    """A copy of a single file with tensors replaced, added or (None) left out."""
    tensors = {**contents(path), **changes}
    target = folder / "edited.safetensors"
    kept = open_tensor_file(path).metadata
    write_tensors(target, {key: value for key, value in tensors.items() if value is not None}, kept | (metadata or {}))
    return target


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def name(request):
    return request.param


@pytest.fixture
def folder(name, request) -> Path:
    return request.getfixturevalue(f"tiny_{name}_folder")


@pytest.fixture
def single_file(name, request) -> Path:
    return request.getfixturevalue(f"tiny_{name}_file")


def states(path: Path) -> dict[str, dict[str, Tensor]]:
    model = open_base_model(path)
    loaded = {
        "unet": model.load_denoiser(**CPU),
        "vae": model.load_vae(**CPU),
    }
    encoders = zip(model.family.text_encoders, model.load_text_encoders(**CPU), strict=True)
    loaded |= {encoder.part: module for encoder, module in encoders}
    return {kind: module.state_dict() for kind, module in loaded.items()}


def test_a_folder_loads_what_diffusers_loads_from_it(folder):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    references = {kind: classes[kind].from_pretrained(folder / kind) for kind in states(folder)}
    for kind, state in states(folder).items():
        expected = references[kind].state_dict()
        assert set(state) == set(expected)
        assert all(torch.equal(state[key], expected[key]) for key in expected), kind


def test_a_single_file_loads_the_same_model_as_its_folder(folder, single_file):
    of_folder, of_file = states(folder), states(single_file)
    for kind in of_folder:
        assert set(of_folder[kind]) == set(of_file[kind])
        for key, tensor in of_folder[kind].items():
            assert torch.equal(tensor, of_file[kind][key]), key


def test_what_a_size_becomes_is_known_without_our_converters_hint(tiny_sdxl_folder, tiny_sdxl_file, tmp_path):
    bare = tmp_path / "bare.safetensors"
    write_tensors(bare, contents(tiny_sdxl_file))
    told, found = (open_base_model(path).parts["unet"].config for path in (tiny_sdxl_folder, bare))
    assert found["addition_time_embed_dim"] == told["addition_time_embed_dim"]
    key = "conditioner.embedders.1.model.text_projection"
    narrow = edited(tiny_sdxl_file, tmp_path, **{key: contents(tiny_sdxl_file)[key][:, :-1].contiguous()})
    with pytest.raises(UserError, match="takes 88 numbers beside the text, which are not a pooled text of 39 and 6 sizes"):
        open_base_model(narrow)


def test_both_containers_compute_the_same(folder, single_file):
    outputs = []
    for path in (folder, single_file):
        model = open_base_model(path)
        stream = torch.Generator().manual_seed(1)
        latents, image = torch.randn(1, 4, 8, 8, generator=stream), torch.randn(1, 3, 32, 32, generator=stream)
        ids = torch.tensor([[49406, 320, 2368, 49407]])
        with torch.no_grad():
            texts = [encoder(ids) for encoder in model.load_text_encoders(**CPU)]
            text = torch.cat([each.last_hidden_state for each in texts], dim=-1)
            more = {"text_embeds": texts[-1].get("text_embeds"), "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]])}
            noise = model.load_denoiser(**CPU)(latents, 500, text, added_cond_kwargs=more).sample
            encoded = model.load_vae(**CPU).encode(image).latent_dist.mean
        outputs.append((text, noise, encoded))
    for of_folder, of_file in zip(*outputs, strict=True):
        assert of_folder.std() > 0.01
        assert torch.equal(of_folder, of_file)


def test_weights_are_loaded_into_the_asked_type_frozen_and_ready(single_file):
    model = open_base_model(single_file)
    for module in (model.load_denoiser(dtype=torch.bfloat16, device="cpu"), *model.load_text_encoders(**CPU)):
        assert not module.training
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
    assert model.load_denoiser(dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


def test_the_family_and_the_name_are_known_from_headers_alone(name, folder, single_file):
    for path in (folder, single_file):
        model = open_base_model(path)
        assert model.family.name == name
        assert model.name == folder.name


def test_tokenizers_of_both_containers_pad_alike_and_read_alike(folder, single_file):
    of_folder, of_file = (open_base_model(path).load_tokenizers()[0] for path in (folder, single_file))
    for text in ("a photo of a cat", "", "Ünïcode 猫 (x) 3.5"):
        settings = {"padding": "max_length", "truncation": True, "max_length": 77}
        assert of_folder(text, **settings).input_ids == of_file(text, **settings).input_ids


def test_a_folders_own_tokenizer_wins_and_a_missing_one_is_made_up_for(tiny_sd1_folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_sd1_folder, copy)
    tokenizer = open_base_model(copy).load_tokenizers()[0]
    tokenizer.add_tokens(["<mascot>"])
    tokenizer.save_pretrained(str(copy / "tokenizer"))
    assert open_base_model(copy).load_tokenizers()[0].convert_tokens_to_ids("<mascot>") == 49408
    shutil.rmtree(copy / "tokenizer")
    assert len(open_base_model(copy).load_tokenizers()[0]) == 49408


def test_the_vaes_fingerprint_is_of_its_values_and_not_of_its_container(tiny_sd1_folder, tiny_sd1_file, tmp_path):
    of_folder = open_base_model(tiny_sd1_folder).vae_fingerprint()
    assert open_base_model(tiny_sd1_file).vae_fingerprint() == of_folder
    key = "first_stage_model.encoder.conv_in.bias"
    changed = edited(tiny_sd1_file, tmp_path, **{key: contents(tiny_sd1_file)[key] + 1})
    assert open_base_model(changed).vae_fingerprint() != of_folder


def test_old_text_encoder_keys_and_old_folders_read_like_new_ones(tiny_sd1_folder, tiny_sd1_file, tmp_path):
    expected = states(tiny_sd1_folder)
    renamed = {key.replace(".text_model.", "."): tensor for key, tensor in contents(tiny_sd1_file).items()}
    renamed["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    old_file = tmp_path / "old.ckpt"
    write_tensors(old_file, renamed)
    assert states(old_file)["text_encoder"].keys() == expected["text_encoder"].keys()

    old_folder = tmp_path / "old"
    shutil.copytree(tiny_sd1_folder, old_folder)
    text = {f"text_model.{key}": t for key, t in expected["text_encoder"].items()}
    (old_folder / "text_encoder" / "model.safetensors").unlink()
    torch.save(
        text | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, old_folder / "text_encoder/pytorch_model.bin"
    )
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = {}
    for key, tensor in expected["vae"].items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        vae[key] = tensor
    write_tensors(old_folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
    for kind, state in states(old_folder).items():
        assert all(torch.equal(tensor, expected[kind][key]) for key, tensor in state.items())


def test_variants_and_split_weights_of_folders_read(tiny_sd1_folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_sd1_folder, copy)
    whole = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = contents(whole)
    half = len(tensors) // 2
    shards = {"a.safetensors": dict(list(tensors.items())[:half]), "b.safetensors": dict(list(tensors.items())[half:])}
    for shard, content in shards.items():
        write_tensors(copy / "unet" / shard, content)
    weight_map = {key: shard for shard, content in shards.items() for key in content}
    (copy / "unet" / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole.unlink()
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    expected = states(tiny_sd1_folder)
    for kind, state in states(copy).items():
        assert all(torch.equal(tensor, expected[kind][key]) for key, tensor in state.items())
    with pytest.raises(UserError, match=r"has no weights of the U-Net .no diffusion_pytorch_model\.bf16\.safetensors"):
        open_base_model(copy, variant="bf16")


def test_averages_and_schedules_are_beside_the_model_and_strangers_are_reported(tiny_sd1_file, tmp_path):
    extra = {"model_ema.decay": torch.ones(1), "betas": torch.ones(3), "stranger.weight": torch.ones(2)}
    model = open_base_model(edited(tiny_sd1_file, tmp_path, **extra))
    assert set(model.beside) == {"model_ema.decay", "betas"}
    assert model.unmatched == ("stranger.weight",)


def test_a_lost_tensor_is_named(tiny_sd1_file, tiny_sd1_folder, tmp_path):
    model = open_base_model(edited(tiny_sd1_file, tmp_path, **{UNET_KEY: None}))
    with pytest.raises(
        UserError, match=r"edited\.safetensors: lacks down_blocks\.0\.resnets\.0\.conv1\.weight of its U-Net"
    ):
        model.load_denoiser(**CPU)
    wrong = open_base_model(edited(tiny_sd1_file, tmp_path, **{UNET_KEY: torch.ones(2, 2)}))
    with pytest.raises(UserError, match="its U-Net does not fit together: .* is .2, 2. instead of .32, 32, 3, 3."):
        wrong.load_denoiser(**CPU)


def test_one_file_with_matrices_and_one_with_1x1_convolutions_are_the_same_model(tiny_sd2_file, tmp_path):
    """sd-scripts writes SD2's projections as convolutions, Stability as matrices."""
    is_projection = (".proj_in.weight", ".proj_out.weight")
    convolutions = {
        key: tensor[..., None, None]
        for key, tensor in contents(tiny_sd2_file).items()
        if key.endswith(is_projection) and "attn" not in key and tensor.ndim == 2
    }
    path = edited(tiny_sd2_file, tmp_path, **convolutions)
    assert len(convolutions) == 32
    model, latents, text = open_base_model(path), torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    with torch.no_grad():
        expected = open_base_model(tiny_sd2_file).load_denoiser(**CPU)(latents, 10, text).sample
        torch.testing.assert_close(model.load_denoiser(**CPU)(latents, 10, text).sample, expected, rtol=1e-4, atol=1e-5)


def test_what_is_said_about_the_family_must_be_true(tiny_sd1_file, tiny_sd2_file):
    with pytest.raises(UserError, match=r"tiny_sd1\.safetensors: --v2 was given, but this is Stable Diffusion 1\.x"):
        open_base_model(tiny_sd1_file, v2=True)
    with pytest.raises(UserError, match=r"v2 is false, but this is Stable Diffusion 2\.x; set --v2"):
        open_base_model(tiny_sd2_file, v2=False)
    assert open_base_model(tiny_sd2_file, v2=True).family.name == "sd2"


def test_the_prediction_type_is_found_wherever_it_stands(tiny_sd1_folder, tiny_sd2_v_folder, tiny_sd2_file, tmp_path):
    assert open_base_model(tiny_sd1_folder).prediction_type == "epsilon"
    assert open_base_model(tiny_sd2_v_folder).prediction_type == "v_prediction"
    assert open_base_model(tiny_sd2_file).prediction_type is None
    assert open_base_model(tiny_sd2_file).prediction_type_assumed
    assert not open_base_model(tiny_sd2_file, v_parameterization=True).prediction_type_assumed
    for metadata in ({"modelspec.prediction_type": "v"}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}):
        assert open_base_model(edited(tiny_sd2_file, tmp_path, metadata)).prediction_type == "v_prediction"
    assert open_base_model(edited(tiny_sd2_file, tmp_path, v_pred=torch.ones(1))).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("said", "flag", "resolved"),
    [
        (None, None, "epsilon"),
        (None, True, "v_prediction"),
        (None, False, "epsilon"),
        ("v_prediction", None, "v_prediction"),
        ("v_prediction", True, "v_prediction"),
        ("epsilon", None, "epsilon"),
        ("epsilon", False, "epsilon"),
    ],
)
def test_the_model_decides_what_it_predicts_and_the_user_where_it_does_not_say(said, flag, resolved):
    assert resolve_prediction_type(said, flag, "x") == resolved


def test_contradictions_about_the_prediction_are_refused(tiny_sd1_folder, tiny_sd2_v_folder):
    with pytest.raises(UserError, match="predicts the noise .epsilon., not v; leave out --v_parameterization"):
        open_base_model(tiny_sd1_folder, v_parameterization=True)
    with pytest.raises(UserError, match="predicts v, but v_parameterization is false"):
        open_base_model(tiny_sd2_v_folder, v_parameterization=False)


def vae_state(folder: Path) -> dict[str, Tensor]:
    return contents(folder / "vae" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory, request) -> Path:
    """A model folder whose VAE has other values."""
    from library.families.sd1 import SD1
    from tests.support.tiny_models import build_tiny_folder

    return build_tiny_folder(tmp_path_factory.mktemp("other") / "model", SD1, seed=7)


@pytest.mark.parametrize(
    "form", ["model folder", "vae folder", "checkpoint", "diffusers file", "ldm file", "ldm file, prefixed"]
)
def test_another_vae_is_taken_from_every_form(form, other_vae, tiny_sd1_folder, tmp_path):
    from library.checkpoints.model_writing import plan_single_file

    planned = plan_single_file(open_base_model(other_vae))
    prefix = "first_stage_model."
    original = {key: tensor.make() for key, tensor in planned.items() if key.startswith(prefix)}
    path = tmp_path / "vae.safetensors"
    if form == "checkpoint":
        write_tensors(path, planned)
    elif form == "diffusers file":
        write_tensors(path, vae_state(other_vae))
    elif form == "ldm file":
        write_tensors(path, {key.removeprefix(prefix): t for key, t in original.items()} | {"loss.logvar": torch.ones(1)})
    elif form == "ldm file, prefixed":
        write_tensors(path, original)
    given = {"model folder": other_vae, "vae folder": other_vae / "vae"}.get(form, path)
    model = open_base_model(tiny_sd1_folder, vae_path=given)
    state = model.load_vae(**CPU).state_dict()
    expected = vae_state(other_vae)
    assert not torch.equal(expected["encoder.conv_in.weight"], vae_state(tiny_sd1_folder)["encoder.conv_in.weight"])
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_a_vae_of_other_latents_is_refused(tiny_sd1_folder, tiny_sd1_file, tiny_sdxl_folder, tiny_sdxl_file, tmp_path):
    copy = tmp_path / "vae"
    shutil.copytree(tiny_sd1_folder / "vae", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13025}))
    with pytest.raises(UserError, match=r"scales latents by 0\.13025, while Stable Diffusion 1\.x takes 0\.18215"):
        open_base_model(tiny_sd1_folder, vae_path=copy)
    for base, other, scale in (
        (tiny_sd1_folder, tiny_sdxl_file, 0.13025),
        (tiny_sdxl_folder, tiny_sd1_file, 0.18215),
    ):
        with pytest.raises(UserError, match=f"scales latents by {scale}, while Stable Diffusion"):
            open_base_model(base, vae_path=other)
    lora = tmp_path / "lora.safetensors"
    write_tensors(lora, {"lora_unet_x.lora_down.weight": torch.ones(2, 2)})
    with pytest.raises(UserError, match="holds no VAE"):
        open_base_model(tiny_sd1_folder, vae_path=lora)


def test_paths_that_do_not_exist_are_answered_with_near_names(tiny_sd1_file, monkeypatch):
    misspelt = tiny_sd1_file.with_name("tiny_sd.safetensors")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean .*tiny_sd1\.safetensors"):
        open_base_model(misspelt)
    with pytest.raises(UserError, match="the folder /no/such does not exist either"):
        open_base_model("/no/such/model.safetensors")
    monkeypatch.chdir(tiny_sd1_file.parent)
    (tiny_sd1_file.parent / "local").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="no such file or folder"):
        open_base_model("local/model")


def test_a_name_of_the_hub_is_asked_for_only_where_nothing_local_has_it(tiny_sd1_folder, monkeypatch, tmp_path):
    asked = []

    def download(name: str, **settings: object) -> str:
        asked.append(name)
        return str(tiny_sd1_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert open_base_model("owner/some-model").family.name == "sd1"
    assert asked == ["owner/some-model"]
    monkeypatch.chdir(tiny_sd1_folder.parent)
    open_base_model(tiny_sd1_folder.name)
    open_base_model(f"./{tiny_sd1_folder.name}/")
    assert asked == ["owner/some-model"]


def test_an_unreachable_hub_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"owner/some-model: no such file or folder, and it could not be fetched") as caught:
        open_base_model("owner/some-model")
    assert "\n" not in str(caught.value)


def test_a_published_folders_tokenizer_files_are_read(tiny_sd1_folder, tmp_path):
    """SD 1.5's folder holds vocab.json and merges.txt, not tokenizer.json."""
    from library.checkpoints.tokenizers import clip_merges, clip_vocabulary

    copy = tmp_path / "model"
    shutil.copytree(tiny_sd1_folder, copy)
    tokenizer = copy / "tokenizer"
    shutil.rmtree(tokenizer)
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps(clip_vocabulary()), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in clip_merges())])
    (tokenizer / "merges.txt").write_text(merges, encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
    }
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    ids = open_base_model(copy).load_tokenizers()[0]("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_a_model_is_planned_from_its_headers_as_from_its_modules(folder, single_file):
    for path in (folder, single_file):
        model = open_base_model(path)
        planned = plan_single_file(model, from_headers=True)
        of_modules = plan_single_file(model)
        assert {key: tensor.dtype for key, tensor in planned.items()} == {
            key: tensor.dtype for key, tensor in of_modules.items()
        }


def test_what_a_model_lacks_is_told_from_its_headers(single_file, tmp_path):
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.norm2.weight"
    model = open_base_model(edited(single_file, tmp_path, **{key: None}))
    with pytest.raises(UserError, match=r"lacks mid_block.attentions.0.transformer_blocks.0.norm2.weight of its U-Net"):
        plan_single_file(model, from_headers=True)
