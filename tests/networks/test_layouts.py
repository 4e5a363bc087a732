"""Files that diffusers, peft and LyCORIS really write act here as they do there, and ours in their layout do there."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.tensor_files import open_tensor_file
from networks import lora
from networks.formats.file_adapters import stream_layers
from networks.formats.keys import to_original, to_peft
from tests.networks.test_interchange import outputs, pipeline

pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module")

SETTINGS = {
    "plain": {"lora_alpha": 2},
    "ranks and alphas by layer": {
        "lora_alpha": 2,
        "rank_pattern": {"to_v": 3, "mid_block.attentions.0.proj_in": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"to_k": 7, "encoder.layers.0.self_attn.k_proj": 1},
    },
    "rsLoRA": {"lora_alpha": 3, "use_rslora": True},
    "DoRA": {"lora_alpha": 2, "use_dora": True},
}
ONE_FAMILY = pytest.mark.parametrize("models", ["sd1"], indirect=True)
"""For what does not depend on the shapes of a family's layers."""

UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "downsamplers.0.conv", "conv_in"]
TEXT_ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


@pytest.fixture(scope="module")
def pipelines(tiny_sd1_folder, tiny_sd2_folder, tiny_sdxl_folder):
    folders = {"sd1": tiny_sd1_folder, "sd2": tiny_sd2_folder, "sdxl": tiny_sdxl_folder}
    return {name: pipeline(folder) for name, folder in folders.items()}


@pytest.fixture
def pipe(models, pipelines):
    """diffusers' pipeline, with models of its own."""
    loaded = pipelines[models.family.name]
    own = {part: deepcopy(loaded.components[part]) for part in models.family.adapter_prefixes}
    return type(loaded)(**loaded.components | own)


def text_encoders(pipe):
    """Name -> text encoder of a pipeline."""
    return {name: model for name, model in pipe.components.items() if name.startswith("text_encoder")}


def adapted(pipe, setting: str):
    """diffusers' models with PEFT's adapters, every value of which acts."""
    from peft import LoraConfig

    settings = dict(SETTINGS[setting])
    for model, targets in ((pipe.unet, UNET), *((model, TEXT_ENCODER) for model in text_encoders(pipe).values())):
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings))
        stream = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=stream))
                elif "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=stream))
    return pipe


def assert_acts_like(models, file, expected, **args) -> lora.LoRANetwork:
    """A file on our models gives the expected outputs, and leaves no trace."""
    with torch.no_grad():
        base = outputs(models)
        network, sd = lora.create_network_from_weights(1.0, file, None, models.text_encoder, models.unet, **args)
        network.apply_to(models.text_encoder, models.unet)
        network.load_state_dict(sd)
        ours = outputs(models)
        network.set_multiplier(0)
        assert all(map(torch.equal, outputs(models), base))
        network.detach()
    for mine, theirs, plain in zip(ours, expected, base, strict=True):
        if theirs is not None:
            assert (theirs - plain).abs().max() > 0.05, "the file must act, or this test says nothing"
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-4 * plain.abs().max().item())
    return network


def peft_tensors(model):
    from peft.utils import get_peft_model_state_dict

    return {key: value.contiguous() for key, value in get_peft_model_state_dict(model).items()}


def described(model) -> dict:
    return {
        key: list(value) if isinstance(value, set) else value
        for key, value in model.peft_config["default"].to_dict().items()
    }


@pytest.mark.parametrize("setting", SETTINGS)
def test_diffusers_pipeline_files(models, pipe, tmp_path, setting):
    adapted(pipe, setting)
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft_tensors(pipe.unet),
        unet_lora_adapter_metadata=described(pipe.unet),
        **{f"{name}_lora_layers": peft_tensors(model) for name, model in text_encoders(pipe).items()},
        **{f"{name}_lora_adapter_metadata": described(model) for name, model in text_encoders(pipe).items()},
    )
    with torch.no_grad():
        expected = outputs(models, pipe)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    network = assert_acts_like(models, file, expected)
    assert len(network.targets) == sum(key.endswith("lora_A.weight") for key in load_file(file))


@ONE_FAMILY
def test_a_diffusers_file_without_metadata_has_alpha_equal_to_rank(models, pipe, tmp_path):
    from diffusers import StableDiffusionPipeline

    adapted(pipe, "ranks and alphas by layer")
    file = tmp_path / "a.safetensors"
    tensors = {f"unet.{key}": value for key, value in peft_tensors(pipe.unet).items()}
    save_file(tensors, file)
    again = StableDiffusionPipeline.from_pipe(pipe)
    again.unet.delete_adapters("default")
    again.load_lora_weights(tmp_path, weight_name=file.name)
    with torch.no_grad():
        expected = models.picture(again.unet)
    assert_acts_like(models, file, (expected, None))


@ONE_FAMILY
def test_files_of_a_diffusers_unet_alone(models, pipe, tmp_path):
    adapted(pipe, "ranks and alphas by layer").unet.save_lora_adapter(tmp_path)
    with torch.no_grad():
        expected = models.picture(pipe.unet)
    assert_acts_like(models, tmp_path / "pytorch_lora_weights.safetensors", (expected, None))


@ONE_FAMILY
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_folders_that_peft_saves(models, pipe, tmp_path, part):
    """Their scale is in a second file, adapter_config.json."""
    from peft import LoraConfig, get_peft_model

    targets = UNET if part == "unet" else TEXT_ENCODER
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, alpha_pattern={"to_q": 3, "fc1": 2}, init_lora_weights=False
    )
    model = get_peft_model(getattr(pipe, part), config)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        unet, text_encoder = outputs(models, pipe)
    expected = (unet, None) if part == "unet" else (None, text_encoder)
    network = assert_acts_like(models, tmp_path / "adapter_model.safetensors", expected)
    streamed = dict(stream_layers(open_tensor_file(tmp_path / "adapter_model.safetensors"), models.family))
    assert {name: own["alpha"] / 4 for name, own in streamed.items()} == {t.name: a.scale for t, a in network.items()}


KRONECKER = {
    "LoHa": ("LoHaConfig", {"alpha": 6, "alpha_pattern": {"to_q": 3}}),
    "LoHa, effective convolutions": ("LoHaConfig", {"alpha": 6, "use_effective_conv2d": True}),
    "LoKr": ("LoKrConfig", {"alpha": 3, "rank_pattern": {"to_v": 2}, "decompose_both": True}),
    "LoKr, full": ("LoKrConfig", {"alpha": 3, "r": 64, "rank_pattern": {"to_v": 32}, "alpha_pattern": {"to_k": 5}}),
}


@ONE_FAMILY
@pytest.mark.parametrize("kind", KRONECKER)
def test_folders_that_peft_saves_of_other_algorithms(models, pipe, tmp_path, kind):
    import peft

    name, settings = KRONECKER[kind]
    config = getattr(peft, name)(
        target_modules=["to_q", "to_k", "to_v", "conv1"], init_weights=False, **({"r": 4} | settings)
    )
    peft.get_peft_model(pipe.unet, config).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = models.picture(pipe.unet)
    assert_acts_like(models, tmp_path / "adapter_model.safetensors", (expected, None))


@ONE_FAMILY
@pytest.mark.parametrize("spelling", ["{0}.{1}", "{0}.base_model.model.{1}", "{0}.{1} with its name"])
def test_variants_of_diffusers_names(models, pipe, tmp_path, spelling):
    adapted(pipe, "DoRA")
    tensors = {}
    for part in ("unet", "text_encoder"):
        for key, value in peft_tensors(getattr(pipe, part)).items():
            if spelling.endswith("name"):
                layer, _, tensor = key.partition(".lora_")
                key = f"{layer}.lora_{tensor.removesuffix('.weight')}.default.weight"
            tensors[spelling.partition(" ")[0].format(part, key)] = value
    metadata = {
        f"{part}.{key}": value for part in ("unet", "text_encoder") for key, value in described(getattr(pipe, part)).items()
    }
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    with torch.no_grad():
        expected = outputs(models, pipe)
    assert_acts_like(models, tmp_path / "a.safetensors", expected)


@ONE_FAMILY
def test_the_kohya_export_of_diffusers(models, pipe, tmp_path):
    """It calls the only text encoder `lora_te1`, leaves magnitudes as they were, and writes the rank for alpha."""
    from diffusers.utils import convert_state_dict_to_kohya

    adapted(pipe, "DoRA")
    state = {f"unet.{key}": value for key, value in peft_tensors(pipe.unet).items()}
    state |= {f"text_encoder.{key}": value for key, value in peft_tensors(pipe.text_encoder).items()}
    kohya = {key: value.contiguous() for key, value in convert_state_dict_to_kohya(state).items()}
    kohya = {key: torch.tensor(2.0) if key.endswith("alpha") else value for key, value in kohya.items()}
    assert any(key.startswith("lora_te1") for key in kohya)
    save_file(kohya, tmp_path / "a.safetensors")
    with torch.no_grad():
        expected = outputs(models, pipe)
    assert_acts_like(models, tmp_path / "a.safetensors", expected)


OLD_UNET = "unet.{block}.transformer_blocks.0.{attention}.processor.{matrix}_lora.{half}.weight"
OLD_TEXT = "text_encoder.text_model.encoder.layers.{layer}.self_attn.{matrix}_proj.lora_linear_layer.{half}.weight"


@pytest.mark.parametrize("models", ["sd1", "sd2"], indirect=True)
def test_old_diffusers_files_act_as_in_diffusers(models, pipe, tmp_path):
    """The layout of its training scripts until 2023: the factors are modules of the attention's processor."""
    stream = torch.Generator().manual_seed(3)
    tensors = {}
    for block in ("down_blocks.0.attentions.1", "mid_block.attentions.0", "up_blocks.2.attentions.2"):
        for attention in ("attn1", "attn2"):
            for matrix in ("to_q", "to_k", "to_v", "to_out"):
                layer = pipe.unet.get_submodule(f"{block}.transformer_blocks.0.{attention}").get_submodule(
                    "to_out.0" if matrix == "to_out" else matrix
                )
                place = {"block": block, "attention": attention, "matrix": matrix}
                tensors[OLD_UNET.format(**place, half="up")] = torch.randn(layer.out_features, 2, generator=stream) / 3
                tensors[OLD_UNET.format(**place, half="down")] = torch.randn(2, layer.in_features, generator=stream) / 3
    for matrix in ("q", "k", "v", "out"):
        for half, shape in (("up", (32, 2)), ("down", (2, 32))):
            tensors[OLD_TEXT.format(layer=1, matrix=matrix, half=half)] = torch.randn(shape, generator=stream) / 3
    save_file(tensors, tmp_path / "old.safetensors")
    torch.save(tensors, tmp_path / "old.bin")
    pipe.load_lora_weights(tmp_path, weight_name="old.safetensors")
    with torch.no_grad():
        expected = outputs(models, pipe)
    for file in ("old.safetensors", "old.bin"):
        network = assert_acts_like(models, tmp_path / file, expected)
        assert len(network.targets) == 3 * 8 + 4


@ONE_FAMILY
@pytest.mark.parametrize("algo", ["lora", "loha", "lokr", "diag-oft", "full"])
def test_files_of_lycoris_wrapped_around_a_unet(models, pipe, tmp_path, algo):
    lycoris = pytest.importorskip("lycoris")
    wrapper = lycoris.LycorisNetwork
    wrapper.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    try:
        network = lycoris.create_lycoris(pipe.unet, 1.0, linear_dim=4, linear_alpha=2, algo=algo)
    finally:
        wrapper.apply_preset(lycoris.config.PRESET["full"])
    network.apply_to()
    stream = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
        expected = models.picture(pipe.unet)
    network.save_weights(tmp_path / "a.safetensors", torch.float32, {})
    assert all(key.startswith("lycoris_") for key in load_file(tmp_path / "a.safetensors"))
    assert_acts_like(models, tmp_path / "a.safetensors", (expected, None))


@pytest.fixture
def ours(models, perturb):
    """A network with another rank and alpha on every block, and what the models give with it."""
    dims = {"block_dims": ",".join(str(1 + block % 4) for block in range(models.family.block_count)), "conv_dim": 3}
    network = perturb(lora.create_network(1.0, 4, 3, None, models.text_encoder, models.unet, **dims), spread=0.1)
    with torch.no_grad():
        network.attach()
        expected = outputs(models)
        network.detach()
    return network.file_tensors(), expected


@torch.no_grad()
def test_diffusers_reads_what_we_write_in_its_layout(models, pipe, ours, tmp_path):
    tensors, expected = ours
    theirs, metadata = to_peft(tensors, models.family)
    save_file({key: value.contiguous() for key, value in theirs.items()}, tmp_path / "a.safetensors", metadata)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    found = outputs(models, pipe)
    for mine, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-4, atol=2e-4 * mine.abs().max().item())


@pytest.mark.parametrize("layout", ["PEFT", "original names"])
def test_what_we_write_in_other_layouts_comes_back(models, ours, tmp_path, layout):
    tensors, expected = ours
    written, metadata = to_peft(tensors, models.family) if layout == "PEFT" else (to_original(tensors, models.family), {})
    save_file({key: value.detach().contiguous() for key, value in written.items()}, tmp_path / "a.safetensors", metadata)
    assert_acts_like(models, tmp_path / "a.safetensors", expected)
