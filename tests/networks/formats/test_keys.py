"""The names of layers and tensors in every layout: each is read as ours, and comes back from where it was written to."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from networks.building.targets import model_layers
from networks.formats.keys import by_layer, ignored_keys, kohya_key, split_key, to_kohya, to_original, to_peft
from networks.formats.layer_names import layer_names
from tests.networks.cases import CASES, layer_and_input, new_adapter

GOLDEN = json.loads(gzip.decompress((Path(__file__).parents[1] / "data/lora_modules.json.gz").read_bytes()))

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
OUT = "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0"
CONV = "lora_unet_down_blocks_1_resnets_0_conv1"
UPSAMPLER = "lora_unet_up_blocks_0_upsamplers_0_conv"
TIME = "lora_unet_down_blocks_0_resnets_1_time_emb_proj"
TEXT = "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
TEXT_OUT = "lora_te_text_model_encoder_layers_3_self_attn_out_proj"


def golden_names(family) -> list[str]:
    lists = [GOLDEN[f"{family.name}_{kind}"] for kind in ("lierla", "c3lier")]
    return sorted(
        {*(row[0] for own in lists for row in own["unet"]), *(name for own in lists for name in own["text_encoder"])}
    )


@pytest.fixture(params=[SD1, SD2], ids=lambda family: family.name)
def family(request):
    return request.param


def as_file(names, rank=lambda number: 4, alpha=lambda number: 2.0) -> dict[str, torch.Tensor]:
    """A LoRA on every layer, in our names; convolutions where the name says so."""
    tensors = {}
    for number, name in enumerate(names):
        kernel = (3, 3) if name.endswith(("conv", "conv1", "conv2")) else ()
        tensors[f"{name}.lora_down.weight"] = torch.full((rank(number), 3, *kernel), float(number))
        tensors[f"{name}.lora_up.weight"] = torch.full((5, rank(number), *(1 for _ in kernel)), float(number))
        tensors[f"{name}.alpha"] = torch.tensor(alpha(number))
    return tensors


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


class TestLayers:
    def test_every_name_leads_to_one_layer_and_back(self, family):
        names = golden_names(family)
        assert len(names) == {"sd1": 72 + 278, "sd2": 138 + 278}[family.name]
        layers = [layer_names(family).find(name) for name in names]
        assert [layer.saved for layer in layers] == names
        for spelling in ("path", "saved_original", "original"):
            spellings = [getattr(layer, spelling) for layer in layers if getattr(layer, spelling)]
            assert len(set(spellings)) == len(spellings)
            found = [layer_names(family).find(each).saved for each in spellings]
            assert found == [layer.saved for layer in layers if getattr(layer, spelling)]

    def test_the_table_has_every_layer_of_the_full_size_models(self, family):
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        with torch.device("meta"):
            unet = UNet2DConditionModel(**family.unet_config)
            text_encoder = CLIPTextModel(CLIPTextConfig(**family.text_encoders[0].config))
        for target in model_layers(family, text_encoder, unet):
            layer = layer_names(family).find(target.name)
            assert layer is not None, target.name
            assert (layer.saved, layer.part) == (target.name, target.part)
            assert layer.path.removeprefix("text_model.") == target.path.removeprefix("text_model.")

    @pytest.mark.parametrize("name", ["nonsense", "lora_unet_down_blocks_9_attentions_0_proj_in", "vae.encoder.conv_in"])
    def test_other_names_lead_nowhere(self, family, name):
        assert layer_names(family).find(name) is None


DOTS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_DOTS = "encoder.layers.3.self_attn.q_proj"
ORIGINAL = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
OLD = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
OLD_OUT = "up_blocks.1.attentions.2.transformer_blocks.0.attn2.processor.to_out_lora"

LAYOUTS = {
    "kohya": (f"{ATTENTION}.lora_down.weight", f"{ATTENTION}.lora_down.weight"),
    "kohya, text encoder": (f"{TEXT}.alpha", f"{TEXT}.alpha"),
    "kohya, other tensors": (f"{ATTENTION}.oft_R.weight", f"{ATTENTION}.oft_R.weight"),
    "a numbered text encoder": (f"{TEXT.replace('lora_te_', 'lora_te1_')}.lora_up.weight", f"{TEXT}.lora_up.weight"),
    "without text_model": (f"{TEXT.replace('_text_model', '')}.lora_up.weight", f"{TEXT}.lora_up.weight"),
    "PEFT's factors under kohya's names": (f"{ATTENTION}.lora_A.weight", f"{ATTENTION}.lora_down.weight"),
    "original names": (f"lora_unet_{ORIGINAL.replace('.', '_')}.lora_up.weight", f"{ATTENTION}.lora_up.weight"),
    "original names, resnet": ("lora_unet_input_blocks_4_0_in_layers_2.lora_up.weight", f"{CONV}.lora_up.weight"),
    "original names, time": ("lora_unet_input_blocks_2_0_emb_layers_1.alpha", f"{TIME}.alpha"),
    "original names, upsampler": ("lora_unet_output_blocks_2_1_conv.alpha", f"{UPSAMPLER}.alpha"),
    "PEFT": (f"unet.{DOTS}.lora_A.weight", f"{ATTENTION}.lora_down.weight"),
    "PEFT, up": (f"unet.{DOTS}.lora_B.weight", f"{ATTENTION}.lora_up.weight"),
    "PEFT, adapter's name": (f"unet.{DOTS}.lora_A.default.weight", f"{ATTENTION}.lora_down.weight"),
    "PEFT, whole model": (f"base_model.model.{DOTS}.lora_A.weight", f"{ATTENTION}.lora_down.weight"),
    "PEFT, whole model in a part": (f"unet.base_model.model.{DOTS}.lora_A.weight", f"{ATTENTION}.lora_down.weight"),
    "PEFT, whole text encoder": (f"base_model.model.text_model.{TEXT_DOTS}.lora_B.weight", f"{TEXT}.lora_up.weight"),
    "PEFT, whole new text encoder": (f"base_model.model.{TEXT_DOTS}.lora_B.weight", f"{TEXT}.lora_up.weight"),
    "PEFT, text encoder": (f"text_encoder.text_model.{TEXT_DOTS}.lora_B.weight", f"{TEXT}.lora_up.weight"),
    "PEFT, new text encoder": (f"text_encoder.{TEXT_DOTS}.lora_B.weight", f"{TEXT}.lora_up.weight"),
    "PEFT, LoHa": (f"unet.{DOTS}.hada_w1_a.default", f"{ATTENTION}.hada_w1_a"),
    "PEFT, DoRA": (f"unet.{DOTS}.lora_magnitude_vector", f"{ATTENTION}.dora_scale"),
    "PEFT, DoRA with a name": (f"unet.{DOTS}.lora_magnitude_vector.default.weight", f"{ATTENTION}.dora_scale"),
    "PEFT, a bias": (f"unet.{DOTS}.lora_B.bias", f"{ATTENTION}.lora_B.bias"),
    "diffusers' kohya export, DoRA": (f"lora_unet.{DOTS}.lora_magnitude_vector", f"{ATTENTION}.dora_scale"),
    "module names": (f"{DOTS}.lora_A.weight", f"{ATTENTION}.lora_down.weight"),
    "diffusers 0.18": (f"unet.{DOTS}.lora.down.weight", f"{ATTENTION}.lora_down.weight"),
    "old diffusers": (f"unet.{OLD}.down.weight", f"{ATTENTION}.lora_down.weight"),
    "old diffusers, U-Net alone": (f"{OLD}.up.weight", f"{ATTENTION}.lora_up.weight"),
    "old diffusers, output": (f"unet.{OLD_OUT}.up.weight", f"{OUT}.lora_up.weight"),
    "old diffusers, text": (f"text_encoder.text_model.{TEXT_DOTS}.lora_linear_layer.up.weight", f"{TEXT}.lora_up.weight"),
    "oldest diffusers, text": (
        "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.down.weight",
        f"{TEXT_OUT}.lora_down.weight",
    ),
    "ComfyUI": (f"diffusion_model.{ORIGINAL}.lora_A.weight", f"{ATTENTION}.lora_down.weight"),
    "ComfyUI, diffusers' names": (f"diffusion_model.{DOTS}.lora_up.weight", f"{ATTENTION}.lora_up.weight"),
    "ComfyUI, whole model": (f"model.diffusion_model.{ORIGINAL}.diff", f"{ATTENTION}.diff"),
    "ComfyUI, text encoder": (f"text_encoders.clip_l.transformer.text_model.{TEXT_DOTS}.alpha", f"{TEXT}.alpha"),
    "ComfyUI, SD2's text encoder": (f"text_encoders.clip_h.transformer.text_model.{TEXT_DOTS}.alpha", f"{TEXT}.alpha"),
    "LyCORIS alone": (f"lycoris_{DOTS.replace('.', '_')}.lokr_w1", f"{ATTENTION}.lokr_w1"),
    "LyCORIS alone, text encoder": (f"lycoris_text_model_{TEXT_DOTS.replace('.', '_')}.lokr_w1", f"{TEXT}.lokr_w1"),
    "LyCORIS alone, GLoRA": (f"lycoris_{DOTS.replace('.', '_')}.a1.weight", f"{ATTENTION}.a1.weight"),
    "OMI": (f"unet.{ORIGINAL}.lora_up.weight", f"{ATTENTION}.lora_up.weight"),
    "OMI, upsampler": ("unet.output_blocks.2.2.conv.alpha", f"{UPSAMPLER}.alpha"),
    "OMI, text encoder": (f"clip_l.text_model.{TEXT_DOTS}.dora_scale", f"{TEXT}.dora_scale"),
    "OMI, GLoRA": (f"unet.{ORIGINAL}.b2.weight", f"{ATTENTION}.b2.weight"),
    "sd-scripts' OFT": (f"{ATTENTION.replace('lora_unet', 'oft_unet')}.oft_blocks", f"{ATTENTION}.oft_blocks"),
    "sd-scripts' OFT, original names": (f"oft_unet_{ORIGINAL.replace('.', '_')}.oft_blocks", f"{ATTENTION}.oft_blocks"),
    "ai-toolkit's DoRA": (f"unet.{DOTS}.magnitude", f"{ATTENTION}.dora_scale"),
    "a layer beyond the models": ("lora_unet_new_layer.lora_up.weight", "lora_unet_new_layer.lora_up.weight"),
    "no layout": ("nonsense", "nonsense"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_under_our_names(family, layout):
    theirs, ours = LAYOUTS[layout]
    assert kohya_key(theirs, family) == ours
    assert kohya_key(ours, family) == ours


@pytest.mark.parametrize("case", CASES, ids=str)
def test_names_of_our_own_tensors_stay_as_they_are(family, case):
    """Those of files, and those that a training run's state is stored under."""
    layer, _ = layer_and_input(case.layers[0])
    adapter = new_adapter(case, layer)
    for name in {**adapter.state_dict(), **adapter.tensors()}:
        assert kohya_key(f"{ATTENTION}.{name}", family) == f"{ATTENTION}.{name}"
        assert split_key(f"{ATTENTION}.{name}") == (ATTENTION, name)


def test_keys_are_split_between_layer_and_tensor():
    assert split_key(f"{ATTENTION}.a1.weight") == (ATTENTION, "a1.weight")
    assert split_key("unet.x.y.lora_A.default.weight") == ("unet.x.y", "lora_A.default.weight")
    assert split_key("lora_te_alpha_x.alpha") == ("lora_te_alpha_x", "alpha")
    assert split_key("nonsense") == ("nonsense", "")
    assert by_layer({"a.alpha": 1, "b.alpha": 2, "a.diff": 3}) == {"a": {"alpha": 1, "diff": 3}, "b": {"alpha": 2}}


def test_embeddings_beside_the_adapter_are_left_out(family):
    tensors = {f"{ATTENTION}.diff": torch.ones(2, 2), "bundle_emb.cat.clip_l": torch.ones(1, 768)}
    assert ignored_keys(tensors) == ["bundle_emb.cat.clip_l"]
    assert to_kohya(tensors, family).keys() == {f"{ATTENTION}.diff"}


def test_one_tensor_under_two_names_is_refused(family):
    tensors = {f"{ATTENTION}.alpha": torch.ones(()), f"lora_unet_{ORIGINAL.replace('.', '_')}.alpha": torch.ones(())}
    with pytest.raises(UserError, match=rf"holds {ATTENTION}.alpha twice: as {ATTENTION}.alpha and as lora_unet_input"):
        to_kohya(tensors, family)


class TestValues:
    @pytest.mark.parametrize(
        ("name", "shape", "down", "expected"),
        [
            ("lora_magnitude_vector", (5,), (2, 5), (5, 1)),
            ("lora_magnitude_vector.weight", (5,), (2, 4), (5, 1)),
            ("lora_magnitude_vector", (1, 5, 1, 1), (2, 5, 3, 3), (5, 1, 1, 1)),
            ("magnitude", (5,), (2, 5, 1, 1), (5, 1, 1, 1)),
            ("dora_scale", (1, 5), (2, 5), (1, 5)),
            ("dora_scale", (5, 1), (2, 5), (5, 1)),
            ("dora_scale", (1, 5, 1, 1), (2, 5, 3, 3), (1, 5, 1, 1)),
        ],
    )
    def test_the_name_of_a_magnitude_tells_its_axis(self, family, name, shape, down, expected):
        """Also where the layer is square, and the shape says nothing."""
        values = torch.arange(5.0)
        tensors = {f"unet.{DOTS}.lora_A.weight": torch.ones(down), f"unet.{DOTS}.{name}": values.reshape(shape)}
        found = to_kohya(tensors, family)[f"{ATTENTION}.dora_scale"]
        assert found.shape == expected
        assert torch.equal(found.flatten(), values)

    @pytest.mark.parametrize(("prefix", "alpha", "turns"), [("oft", 0.0, False), ("oft", 0.1, True), ("lora", 0.0, True)])
    def test_no_alpha_means_no_rotation_in_sd_scripts_files_alone(self, family, prefix, alpha, turns):
        name = ATTENTION.replace("lora_", f"{prefix}_", 1)
        tensors = {f"{name}.oft_blocks": torch.ones(2, 4, 4), f"{name}.alpha": torch.tensor(alpha)}
        assert bool(to_kohya(tensors, family)[f"{ATTENTION}.oft_blocks"].any()) is turns

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_float8_is_read_as_fp32(self, family, dtype):
        values = torch.tensor([0.5, -2.0]).to(dtype)
        found = to_kohya({f"{ATTENTION}.diff_b": values}, family)[f"{ATTENTION}.diff_b"]
        assert (found.dtype, found.tolist()) == (torch.float32, [0.5, -2.0])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int16])
    def test_other_types_stay(self, family, dtype):
        assert to_kohya({f"{ATTENTION}.diff_b": torch.ones(2, dtype=dtype)}, family)[f"{ATTENTION}.diff_b"].dtype == dtype


def peft_file(settings) -> tuple[dict, dict]:
    layers = (f"unet.{DOTS}", f"text_encoder.text_model.{TEXT_DOTS}")
    tensors = {f"{layer}.lora_{half}.weight": torch.ones(4, 4) for layer in layers for half in "AB"}
    return tensors, {"lora_adapter_metadata": json.dumps(settings)}


class TestPeftsSettings:
    @pytest.mark.parametrize(
        ("settings", "unet", "text"),
        [
            ({"unet.lora_alpha": 8, "text_encoder.lora_alpha": 2}, 8.0, 2.0),
            ({"unet.lora_alpha": 8}, 8.0, None),
            ({"lora_alpha": 3}, 3.0, 3.0),
            ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 16.0, None),
            ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 5}}, 5.0, None),
            ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k": 5}}, 8.0, None),
            ({"text_encoder.lora_alpha": 8, "text_encoder.alpha_pattern": {TEXT_DOTS: 5}}, None, 5.0),
            ({"unet.r": 4}, None, None),
        ],
    )
    def test_alphas_come_from_the_metadata(self, family, settings, unet, text):
        tensors = to_kohya(*_file_and_family(settings, family))
        assert [tensors.get(f"{layer}.alpha") for layer in (ATTENTION, TEXT)] == [unet, text]

    def test_an_alpha_in_the_file_holds(self, family):
        tensors, metadata = peft_file({"unet.lora_alpha": 8})
        tensors[f"unet.{DOTS}.alpha"] = torch.tensor(3.0)
        assert to_kohya(tensors, family, metadata)[f"{ATTENTION}.alpha"] == 3

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_damaged_metadata_are_told(self, family, text):
        with pytest.raises(UserError, match="has damaged metadata: lora_adapter_metadata is no JSON object"):
            to_kohya({}, family, {"lora_adapter_metadata": text})


def _file_and_family(settings, family):
    tensors, metadata = peft_file(settings)
    return tensors, family, metadata


class TestWriting:
    def test_original_names_and_back(self, family):
        tensors = as_file(golden_names(family))
        theirs = to_original(tensors, family)
        assert not any("_resnets_" in key or "_attentions_" in key for key in theirs)
        assert_same(to_kohya(theirs, family), tensors)

    @pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "mixed ranks and alphas"])
    def test_pefts_names_and_back(self, family, mixed):
        settings = {"rank": lambda number: 1 + number % 5, "alpha": lambda number: 0.1 + number % 7} if mixed else {}
        tensors = as_file(golden_names(family), **settings)
        theirs, metadata = to_peft(tensors, family)
        assert all(key.startswith(("unet.", "text_encoder.text_model.")) for key in theirs)
        assert {key.rpartition(".lora_")[2] for key in theirs} == {"A.weight", "B.weight"}
        assert_same(to_kohya(theirs, family, metadata), dict(sorted_like(tensors, to_kohya(theirs, family, metadata))))

    def test_dora_along_outputs_goes_to_peft_and_back(self, family):
        tensors = as_file([ATTENTION, CONV])
        tensors |= {f"{ATTENTION}.dora_scale": torch.arange(5.0)[:, None]}
        tensors |= {f"{CONV}.dora_scale": torch.arange(5.0).reshape(5, 1, 1, 1)}
        theirs, metadata = to_peft(tensors, family)
        shapes = {key: value.shape for key, value in theirs.items() if key.endswith("lora_magnitude_vector")}
        assert sorted(shapes.values()) == [(1, 5, 1, 1), (5,)]
        found = to_kohya(theirs, family, metadata)
        assert_same(found, dict(sorted_like(tensors, found)))

    @pytest.mark.parametrize(
        ("tensors", "sentence"),
        [
            ({f"{ATTENTION}.dora_scale": torch.ones(1, 3)}, "has DoRA magnitudes along its inputs"),
            ({f"{ATTENTION}.lora_mid.weight": torch.ones(4, 4)}, "is no plain LoRA layer .lora_mid.weight.; PEFT's layout"),
            ({f"{TEXT}.hada_w1_a": torch.ones(4, 4)}, f"{TEXT} is no plain LoRA layer .hada_w1_a."),
            ({"lora_unet_x.alpha": torch.ones(())}, "lora_unet_x is no layer of Stable Diffusion"),
            (
                as_file([TEXT, f"{TEXT_OUT}"]) | {f"{TEXT}.dora_scale": torch.ones(5, 1)},
                "has DoRA on some layers only, which PEFT's layout cannot say",
            ),
        ],
        ids=["axis", "tucker", "loha", "strange", "some"],
    )
    def test_what_pefts_layout_cannot_hold_is_refused(self, family, tensors, sentence):
        with pytest.raises(UserError, match=sentence):
            to_peft(as_file([ATTENTION]) | tensors, family)


def sorted_like(tensors, other):
    """The tensors in the order of other's keys."""
    assert tensors.keys() == other.keys()
    return [(key, tensors[key]) for key in other]
