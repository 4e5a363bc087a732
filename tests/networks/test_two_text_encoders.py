"""Adapters of models with two text encoders: every algorithm, the names in every layout, and the weight tools."""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.base_model import open_base_model
from library.checkpoints.tensor_files import open_tensor_file
from library.cli.doors import run_door
from library.errors import UserError
from library.families.block_weights import PLACES, place_of
from library.families.sdxl import SDXL
from networks import check_lora_weights, convert_lora, extract_lora_from_models, lora, merge_lora
from networks.formats.keys import kohya_key, to_kohya
from networks.formats.layer_names import layer_names
from networks.formats.readers import readings
from networks.formats.traits import Header
from tests.support.command_lines import assert_refused, run_script

ALGORITHMS = {
    "lora": {"conv_dim": "2"},
    "lora dora": {"dora_wd": "True"},
    "dylora": {"unit": "2"},
    "loha": {"conv_dim": "2"},
    "lokr": {"factor": "4"},
    "full": {"train_norm": "True"},
    "glora": {},
    "ia3": {},
    "oft": {},
    "boft": {},
}


def saved(models, name, path, metadata=None):
    """A network whose every parameter acts, and its file."""
    module = importlib.import_module(f"networks.{name.split()[0]}")
    network = module.create_network(1.0, 6, 2, None, models.text_encoder, models.unet, **ALGORITHMS[name])
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
    network.save_weights(path, None, metadata)
    return network


def run(door, *arguments) -> int:
    return run_door(door.__name__.rpartition(".")[2], door.work, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ALGORITHMS)
@torch.no_grad()
def test_a_merged_model_is_the_one_that_the_network_is_merged_into(name, sdxl, tiny_sdxl_file, tmp_path):
    network = saved(sdxl, name, tmp_path / "a.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    assert {target.part for target in network.targets.values()} == {"text_encoder", "text_encoder_2", "denoiser"}
    loaded, _ = lora.create_network_from_weights(1, tmp_path / "a.safetensors", None, sdxl.text_encoder, sdxl.unet)
    assert loaded.targets.keys() == network.targets.keys()
    into = ("--sd_model", tiny_sdxl_file, "--models", tmp_path / "a.safetensors", "--ratios", 0.7)
    assert run(merge_lora, *into, "--save_to", tmp_path / "m.safetensors") == 0
    merged, base = open_base_model(tmp_path / "m.safetensors"), open_base_model(tiny_sdxl_file)
    loaded.set_multiplier(0.7)
    loaded.merge()
    try:
        for encoder, module in (*zip(SDXL.text_encoders, sdxl.text_encoders, strict=True), (None, sdxl.unet)):
            kind = "unet" if encoder is None else encoder.part
            changed = 0
            for key, tensor in module.state_dict().items():
                found = merged.parts[kind].sources[key].read().reshape(tensor.shape)
                torch.testing.assert_close(found, tensor, rtol=0, atol=1e-6)
                changed += not torch.equal(found, base.parts[kind].sources[key].read().reshape(tensor.shape))
            assert changed > 5, kind
    finally:
        loaded.unmerge()


FEED = "input_blocks.8.1.transformer_blocks.9.ff.net.2"
FEED_OURS = f"lora_unet_{FEED.replace('.', '_')}"
FEED_DOTS = "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2"
TEXT = "encoder.layers.3.self_attn.q_proj"
FIRST, SECOND = (f"lora_te{number}_text_model_{TEXT.replace('.', '_')}" for number in (1, 2))
NAMES = {
    f"unet.{FEED_DOTS}.lora_A.weight": f"{FEED_OURS}.lora_down.weight",
    f"lora_unet_{FEED_DOTS.replace('.', '_')}.alpha": f"{FEED_OURS}.alpha",
    f"diffusion_model.{FEED}.diff": f"{FEED_OURS}.diff",
    f"unet.{FEED}.lora_up.weight": f"{FEED_OURS}.lora_up.weight",
    f"lycoris_{FEED_DOTS.replace('.', '_')}.lokr_w1": f"{FEED_OURS}.lokr_w1",
    "lora_unet_add_embedding_linear_1.alpha": "lora_unet_label_emb_0_0.alpha",
    "lora_unet_up_blocks_0_upsamplers_0_conv.alpha": "lora_unet_output_blocks_2_2_conv.alpha",
    f"lora_te_text_model_{TEXT.replace('.', '_')}.alpha": f"{FIRST}.alpha",
    f"text_encoder.text_model.{TEXT}.lora_B.weight": f"{FIRST}.lora_up.weight",
    f"text_encoder_2.text_model.{TEXT}.lora_B.weight": f"{SECOND}.lora_up.weight",
    f"text_encoder_2.{TEXT}.lora_linear_layer.up.weight": f"{SECOND}.lora_up.weight",
    f"text_encoders.clip_l.transformer.text_model.{TEXT}.alpha": f"{FIRST}.alpha",
    f"text_encoders.clip_g.transformer.text_model.{TEXT}.alpha": f"{SECOND}.alpha",
    f"clip_l.text_model.{TEXT}.alpha": f"{FIRST}.alpha",
    f"clip_g.text_model.{TEXT}.alpha": f"{SECOND}.alpha",
    "text_encoder_2.text_projection.lora_A.weight": "lora_te2_text_projection.lora_down.weight",
    "text_encoder_2.text_model.encoder.layers.31.mlp.fc1.lora_A.weight": (
        "lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_down.weight"
    ),
}


@pytest.mark.parametrize("theirs", NAMES)
def test_names_of_every_layout(theirs):
    assert kohya_key(theirs, SDXL) == NAMES[theirs]


def test_one_layer_in_both_wordings_is_refused():
    names = (f"{FEED_OURS}.alpha", f"lora_unet_{FEED_DOTS.replace('.', '_')}.alpha")
    with pytest.raises(UserError, match=f"holds {names[0]} twice"):
        to_kohya({name: torch.ones(()) for name in names}, SDXL)


def test_a_layer_has_its_block_and_place_in_both_wordings():
    for layer in layer_names(SDXL):
        if layer.part == "denoiser":
            assert SDXL.block_index(layer.saved) == SDXL.block_index(layer.path), layer
    assert PLACES[place_of(FEED_OURS, SDXL)] == "IN08"
    assert PLACES[place_of("lora_unet_middle_block_1_proj_in", SDXL)] == "MID"
    assert PLACES[place_of("lora_unet_output_blocks_0_1_proj_in", SDXL)] == "OUT00"
    assert PLACES[place_of("lora_unet_time_embed_0", SDXL)] == "IN00", "as the time embedding of the other families"
    assert place_of("lora_unet_out_2", SDXL) is None
    assert place_of(FIRST, SDXL) == place_of(SECOND, SDXL) == 0


LORA = {"lora_down.weight": (4, 640), "lora_up.weight": (640, 4), "alpha": ()}
PROJECTIONS = [f"{{}}_text_model_encoder_layers_0_self_attn_{name}_proj" for name in ("q", "k", "v", "out")]
DIFFUSERS = f"lora_unet_{FEED_DOTS.replace('.', '_')}"

# ComfyUI, A1111, Forge, SD.Next, diffusers, LyCORIS, InvokeAI: right, dropped, refused (READERS: forms 3 to 10)
READ = {
    "original names": ([FEED_OURS], "rrrrrrr"),
    "diffusers' names": ([DIFFUSERS], "rrrrrrr"),
    "diffusers' names that A1111 loses": ([DIFFUSERS, "lora_unet_up_blocks_0_upsamplers_0_conv"], "rdrrrrr"),
    "diffusers' embedding of sizes": ([DIFFUSERS, "lora_unet_add_embedding_linear_1"], "rdrrdrr"),
    "both wordings": ([FEED_OURS, DIFFUSERS.replace("_9_", "_8_")], "rrrrdrf"),
    "both text encoders": ([name.format(te) for te in ("lora_te1", "lora_te2") for name in PROJECTIONS], "rrrrrrr"),
    "half an attention of the second": ([FEED_OURS, *(name.format("lora_te2") for name in PROJECTIONS[2:])], "rdrrrrr"),
    "half an attention of the first": ([FEED_OURS, *(name.format("lora_te1") for name in PROJECTIONS[2:])], "rrrrrrr"),
    "lora_te_": ([FEED_OURS, *(name.format("lora_te") for name in PROJECTIONS)], "rdrdrdf"),
    "text_projection": (
        [*(name.format("lora_te2") for name in PROJECTIONS), FEED_OURS, "lora_te2_text_projection"],
        "rdrrrrr",
    ),
    "text_projection alone": ([FEED_OURS, "lora_te2_text_projection"], "rdrrfrr"),
    "half an attention beside a whole one": (
        [FEED_OURS, *(name.format("lora_te1") for name in PROJECTIONS), PROJECTIONS[0].format("lora_te2")],
        "rdrrfrr",
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_what_programs_read(kind):
    names, expected = READ[kind]
    conv = {"lora_down.weight": (4, 640, 3, 3), "lora_up.weight": (640, 4, 1, 1), "alpha": ()}
    shapes = {
        f"{name}.{tensor}": shape for name in names for tensor, shape in (conv if name.endswith("_conv") else LORA).items()
    }
    scalars = {f"{name}.alpha": 2.0 for name in names}
    found = readings(Header(shapes=shapes, scalars=scalars, family=SDXL))
    letters = "".join("f" if each.refused else "d" if each.dropped else "w" if each.wrong else "r" for each in found)
    assert letters == expected, [str(each) for each in found]


def test_invokeai_adds_the_widths_of_both_text_encoders():
    shapes = {}
    for prefix, width in (("lora_te1", 768), ("lora_te2", 1280)):
        for name in PROJECTIONS:
            own = {"lora_down.weight": (4, width), "lora_up.weight": (width, 4), "alpha": ()}
            shapes |= {f"{name.format(prefix)}.{tensor}": shape for tensor, shape in own.items()}
    (found,) = [each for each in readings(Header(shapes=shapes, scalars={}, family=SDXL)) if each.reader.name == "invokeai"]
    assert found.is_right


def test_a_file_goes_to_diffusers_layout_and_back(sdxl, tmp_path, capsys):
    saved(sdxl, "lora", tmp_path / "a.safetensors")
    assert (
        run(
            convert_lora, "--model", tmp_path / "a.safetensors", "--save_to", tmp_path / "b.safetensors", "--to", "diffusers"
        )
        == 0
    )
    assert any(key.startswith("text_encoder_2.text_model.") for key in load_file(tmp_path / "b.safetensors"))
    assert run(convert_lora, "--model", tmp_path / "b.safetensors", "--save_to", tmp_path / "c.safetensors") == 0
    first, again = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "c.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    capsys.readouterr()
    assert run(check_lora_weights, tmp_path / "c.safetensors") == 0
    out = capsys.readouterr().out
    assert "\nsecond text encoder " in out
    assert out.splitlines()[-1].startswith("read rightly by ComfyUI, A1111, Forge, SD.Next, diffusers, LyCORIS, InvokeAI")


def test_what_was_merged_is_extracted(sdxl, tiny_sdxl_file, tmp_path, capsys):
    network = lora.create_network(1.0, 2, 2, None, sdxl.text_encoder, sdxl.unet)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    done = run_script("networks/sdxl_merge_lora.py", "--sd_model", tiny_sdxl_file, "--models", tmp_path / "a.safetensors",
                      "--save_to", tmp_path / "tuned.safetensors")  # fmt: skip
    done.require_success()
    options = ("--model_org", tiny_sdxl_file, "--model_tuned", tmp_path / "tuned.safetensors", "--dim", 2, "--sdxl")
    assert run(extract_lora_from_models, *options, "--save_to", tmp_path / "b.safetensors") == 0
    assert "second text encoder" in capsys.readouterr().out
    given, found = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert given.keys() == found.keys()
    assert open_tensor_file(tmp_path / "b.safetensors").metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    for name in network.targets:
        up, down = (found[f"{name}.lora_{half}.weight"].flatten(1) for half in ("up", "down"))
        wanted = given[f"{name}.lora_up.weight"].flatten(1) @ given[f"{name}.lora_down.weight"].flatten(1)
        torch.testing.assert_close(up @ down, wanted, rtol=1e-3, atol=1e-4)


def test_the_door_of_the_family_takes_no_other(tmp_path, tiny_sd1_lora, tiny_sd1_folder):
    adapter, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(load_file(tiny_sd1_lora), adapter, {"ss_base_model_version": "sd_v1"})
    for model, where in [((), adapter), (("--sd_model", tiny_sd1_folder), tiny_sd1_folder)]:
        refused = run_script("networks/sdxl_merge_lora.py", *model, "--models", adapter, adapter, "--save_to", target)
        said = "belongs to Stable Diffusion 1.x, and this script is for Stable Diffusion XL only; use the one without sdxl_"
        assert_refused(refused, f"sdxl_merge_lora: {where}: {said}")
        assert not target.exists()


def test_block_weights_of_twelve_places(sdxl, tmp_path):
    network = saved(sdxl, "lora", tmp_path / "a.safetensors")
    weights = ",".join(["0", "0", "0", "0", "0.5", *["0"] * 7])  # IN08 alone
    models = ("--models", tmp_path / "a.safetensors", "--lbws", weights)
    assert run(merge_lora, *models, "--save_to", tmp_path / "b.safetensors") == 0
    names = {key.partition(".")[0] for key in load_file(tmp_path / "b.safetensors")}
    # By block index: IN04, 05, 07 the middle, OUT00 to OUT05; IN08 has a half.
    without = {5, 6, 8, 10, 11, 12, *range(13, 19)}
    kept = {name for name, target in network.targets.items() if target.part == "denoiser" and target.block not in without}
    assert names == kept
    assert {network.targets[name].block for name in kept} >= {2, 3, 4, 7, 9, 19, 20, 21}
