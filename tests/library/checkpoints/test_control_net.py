"""ControlNets read the same from a folder, a file of diffusers and the original layout; other files are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.checkpoints.base_model import open_base_model
from library.checkpoints.control_net import open_control_net
from library.checkpoints.ldm_keys import control_net_table
from library.checkpoints.tensor_writing import write_tensors
from library.errors import UserError
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from tests.support.tiny_models import build_tiny_control_net, build_tiny_parts

FAMILIES = {"sd1": SD1, "sd2": SD2}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def unet(family) -> nn.Module:
    return build_tiny_parts(family)["unet"]


@pytest.fixture(scope="module")
def net(unet) -> nn.Module:
    return build_tiny_control_net(unet, seed=5)


def original_tensors(net: nn.Module, prefix: str = "control_model.") -> dict[str, Tensor]:
    table = control_net_table(net.config)
    return {f"{prefix}{table.to_original(name)}": tensor for name, tensor in net.state_dict().items()}


def as_folder(net: nn.Module, path: Path) -> Path:
    net.save_pretrained(path / "net")
    return path / "net"


def as_diffusers_file(net: nn.Module, path: Path) -> Path:
    write_tensors(path / "net.safetensors", net.state_dict())
    return path / "net.safetensors"


def as_original_file(net: nn.Module, path: Path) -> Path:
    write_tensors(path / "net.safetensors", original_tensors(net))
    return path / "net.safetensors"


def as_bare_original_file(net: nn.Module, path: Path) -> Path:
    write_tensors(path / "net.safetensors", original_tensors(net, prefix=""))
    return path / "net.safetensors"


def as_torch_file(net: nn.Module, path: Path) -> Path:
    # As the first published files: the base model lies beside it.
    torch.save({"state_dict": original_tensors(net) | {"model.diffusion_model.out.2.bias": torch.ones(4)}}, path / "net.pth")
    return path / "net.pth"


@pytest.mark.parametrize(
    "save",
    [as_folder, as_diffusers_file, as_original_file, as_bare_original_file, as_torch_file],
    ids=lambda save: save.__name__,
)
def test_every_form_loads_the_same_model(save, net, unet, family, tmp_path):
    files = open_control_net(save(net, tmp_path))
    assert files.family is family
    loaded = files.load(unet, dtype=torch.float32, device="cpu")
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1)),
        "controlnet_cond": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)),
        "return_dict": False,
    }
    with torch.no_grad():
        skips, middle = loaded(**inputs)
        expected_skips, expected_middle = net(**inputs)
    assert middle.std() > 1e-3
    for one, other in zip([*skips, middle], [*expected_skips, expected_middle], strict=True):
        assert torch.equal(one, other)


def test_differences_are_added_to_the_base_models_weights(net, unet, tmp_path):
    own = dict(unet.named_parameters())
    difference = {name: value - own[name].detach() if name in own else value for name, value in net.state_dict().items()}
    write_tensors(tmp_path / "net.safetensors", difference | {"difference": torch.ones(1)})
    loaded = open_control_net(tmp_path / "net.safetensors").load(unet, dtype=torch.float32, device="cpu")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)


def test_a_control_net_for_another_family_or_size_is_refused(net, family, unet, tiny_sd1_folder, tiny_sd2_folder, tmp_path):
    own, other = (tiny_sd1_folder, tiny_sd2_folder) if family is SD1 else (tiny_sd2_folder, tiny_sd1_folder)
    files = open_control_net(as_original_file(net, tmp_path))
    files.check_base_model(open_base_model(own))
    with pytest.raises(
        UserError, match=f"net.safetensors: is a ControlNet for {family.title}, and the base model is Stable"
    ):
        files.check_base_model(open_base_model(other))
    wider = type(net).from_config({**net.config, "block_out_channels": (32, 64, 64, 64)})
    with pytest.raises(
        UserError, match=r"does not fit the base model: its block_out_channels is \[32, 64, 64, 64\], the U-Net's"
    ):
        open_control_net(as_diffusers_file(wider, tmp_path)).check_base_model(open_base_model(own))


KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
OTHERS = {
    "a ControlNet-LLLite, which is for SDXL": "lllite_unet_input_blocks_4_1.conditioning1.0.weight",
    "a Control-LoRA, which is for SDXL": "lora_controlnet",
    "a ControlNet for SD3 or FLUX": "transformer_blocks.0.norm1_context.linear.weight",
    "a T2I-Adapter, not a ControlNet": "adapter.body.0.resnets.0.block1.weight",
    "a base model, not a ControlNet": "model.diffusion_model.input_blocks.0.0.weight",
    "an adapter .LoRA. file, not a ControlNet": "lora_unet_x.lora_down.weight",
    "a textual inversion embedding, not a ControlNet": "emb_params",
    "no ControlNet: it has no layers that read a hint image": "something.weight",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused_by_what_they_are(name, tmp_path):
    write_tensors(tmp_path / "net.safetensors", {OTHERS[name]: torch.ones(1, 1)})
    with pytest.raises(UserError, match=f"net.safetensors: is {name}; give a ControlNet for Stable Diffusion"):
        open_control_net(tmp_path / "net.safetensors")


def test_lost_and_strange_tensors_are_named(tmp_path, tiny_sd1_folder):
    tensors = original_tensors(build_tiny_control_net(build_tiny_parts(SD1)["unet"]))
    lost = {key: value for key, value in tensors.items() if key != "control_model.zero_convs.3.0.bias"}
    write_tensors(tmp_path / "lost.safetensors", lost)
    with pytest.raises(UserError, match=r"lacks controlnet_down_blocks.3.bias of its ControlNet"):
        open_control_net(tmp_path / "lost.safetensors")
    write_tensors(tmp_path / "strange.safetensors", tensors | {"control_model.odd": torch.ones(1)})
    with pytest.raises(UserError, match=r"has tensors that a ControlNet has no place for: control_model.odd"):
        open_control_net(tmp_path / "strange.safetensors")
    without_middle = {key: value for key, value in tensors.items() if "input_blocks" not in key}
    write_tensors(tmp_path / "half.safetensors", without_middle)
    with pytest.raises(UserError, match="lacks tensors of its control_net"):
        open_control_net(tmp_path / "half.safetensors")


def test_paths_that_hold_nothing_are_told(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_control_net(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="is a folder without config.json"):
        open_control_net(tmp_path)
