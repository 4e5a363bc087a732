"""Network modules of other packages under our trainer and our picture maker: lycoris-lora itself, and one of a few lines."""

from __future__ import annotations

import importlib
import json
import logging
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from networks.building.third_party import ThirdPartyModule
from networks.registry import load_network_module
from tests.support.command_lines import assert_refused, dataset_file, draw_images, train_here

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("third_party")
    return dataset_file(folder / "dataset.toml", draw_images(folder / "images", 2))


@pytest.fixture
def train(request, capsys, tmp_path, tiny_sd1_folder, dataset):
    """Runs a short training with given options, and returns how it ended and the file it should have written."""

    def run(*options: object, out: str = "theirs", base=tiny_sd1_folder, **named: object):
        arguments = {
            "pretrained_model_name_or_path": base,
            "dataset_config": dataset,
            "output_dir": tmp_path,
            "output_name": out,
            "network_dim": 4,
            "network_alpha": 2,
            "learning_rate": 1e-2,
            "max_train_steps": 1,
            "seed": 7,
            "max_data_loader_n_workers": 0,
        } | named
        flat = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        return train_here(capsys, *flat, *options), tmp_path / f"{out}.safetensors"

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("of_lycoris")


@pytest.fixture
def trained(train, folder, lycoris):
    """Trains once for each algorithm of LyCORIS, and returns the file."""

    def of(algo: str):
        path = folder / f"{algo}.safetensors"
        if not path.exists():
            options = {"network_module": "lycoris.kohya", "learning_rate": 0.05, "output_dir": folder}
            finished, _ = train("--network_args", f"algo={algo}", out=algo, **options)
            finished.require_success()
            assert "lycoris.kohya, " in finished.out
        return path

    return of


@pytest.fixture
def lycoris():
    """lycoris.kohya, which then says nothing on a screen that is gone by the next test."""
    module = pytest.importorskip("lycoris.kohya")
    logging.getLogger("LyCORIS").handlers.clear()
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    return module


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@torch.no_grad()
def outputs_with(models, module_name: str, path) -> torch.Tensor:
    """What a model makes of the fixture's inputs with a file that a module reads."""
    module = load_network_module(module_name)
    network, weights = module.create_network_from_weights(1.0, str(path), None, models.text_encoder, models.unet)
    try:
        network.apply_to(models.text_encoder, models.unet, True, True)
        assert not network.load_state_dict(weights, strict=False).unexpected_keys
        return models.eval_both(network)
    finally:
        (network.detach if hasattr(network, "detach") else network.restore)()


@pytest.fixture
def models(sd1):
    def eval_both(network: nn.Module) -> torch.Tensor:
        network.eval()
        return sd1.both()

    sd1.eval_both = eval_both
    return sd1


ALGORITHMS = {"locon": "networks.lora", "loha": "networks.loha", "lokr": "networks.lokr"}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_lycoris_trains_and_its_file_means_the_same_everywhere(algo, trained, models):
    path = trained(algo)
    metadata = metadata_of(path)
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert json.loads(metadata["ss_network_args"]) == {"algo": algo}
    layers = {name.partition(".")[0] for name in load_file(path)}
    assert {"lora_unet_conv_in", "lora_unet_time_embedding_linear_1"} <= layers, "the preset is for the whole U-Net"
    assert {name for name in layers if name.startswith("lora_te_")} == {
        f"lora_te_text_model_encoder_layers_{number}_{part}"
        for number in range(3)
        for part in ("mlp_fc1", "mlp_fc2", *(f"self_attn_{name}_proj" for name in ("q", "k", "v", "out")))
    }
    base = models.both().detach()
    ours, theirs = (outputs_with(models, name, path) for name in (ALGORITHMS[algo], "lycoris.kohya"))
    assert torch.equal(models.both(), base)
    assert (ours - base).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * base.abs().max().item())


@pytest.mark.parametrize("preset", ["full", "full-lin", "unet-only", "attn-mlp"])
def test_each_of_lycoris_presets_makes_every_layer_once(preset, sd1, lycoris):
    module = load_network_module("lycoris.kohya")
    network = module.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet, neuron_dropout=None, preset=preset)
    wanted = lycoris.PRESET[preset]
    names = [layer.lora_name for layer in network.loras]
    assert len(names) == len(set(names))
    given = {name: layer for name, layer in sd1.unet.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    chosen = {
        f"lora_unet_{path.replace('.', '_')}"
        for path, layer in given.items()
        if path in wanted["unet_target_name"] or _inside(sd1.unet, path, wanted["unet_target_module"])
        if wanted["enable_conv"] or isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)
    }
    assert {name for name in names if name.startswith("lora_unet")} == chosen


def _inside(model: nn.Module, path: str, classes: list[str]) -> bool:
    parts = path.split(".")
    return any(type(model.get_submodule(".".join(parts[:end]))).__name__ in classes for end in range(1, len(parts) + 1))


def test_a_second_training_goes_on_from_a_file_of_lycoris(train, trained):
    path = trained("lokr")
    options = ("--network_args", "algo=lokr")
    finished, second = train(*options, network_module="lycoris.kohya", network_weights=path, learning_rate=1e-9, out="b")
    finished.require_success()
    first, again = load_file(path), load_file(second)
    assert first.keys() == again.keys()
    assert all(torch.allclose(again[name], first[name], atol=1e-6) for name in first)
    finished, third = train(
        "--dim_from_weights", network_module="lycoris.kohya", network_weights=path, learning_rate=1e-9, out="c"
    )
    finished.require_success()
    assert all(torch.allclose(tensor, first[name], atol=1e-6) for name, tensor in load_file(third).items())
    refused, _ = train("--network_args", "algo=loha", network_module="lycoris.kohya", network_weights=path, out="d")
    assert_refused(refused, f"--network_weights {path}", "have no place in the network")


def test_weight_norms_dropout_lora_plus_and_checkpointing_with_lycoris(train, lycoris):
    finished, path = train(
        *("--gradient_checkpointing", "--network_args", "algo=locon", "dora_wd=True", "loraplus_lr_ratio=4"),
        network_module="lycoris.kohya",
        network_dropout=0.2,
        scale_weight_norms=0.05,
    )
    finished.require_success()
    assert json.loads(metadata_of(path)["ss_network_args"])["dropout"] == "0.2"
    refused, _ = train("--network_args", "algo=lora_with_no_such_name", network_module="lycoris.kohya")
    assert_refused(refused, "--network_module lycoris.kohya: makes no network for this base model (KeyError")


def test_lycoris_with_the_other_family(train, tiny_sd2_folder, lycoris):
    finished, path = train("--network_args", "algo=loha", network_module="lycoris.kohya", base=tiny_sd2_folder)
    finished.require_success()
    assert metadata_of(path)["ss_base_model_version"] == "sd_v2"


def test_pictures_with_lycoris(trained, tiny_sd1_folder, tmp_path):
    import gen_img_diffusers

    path = trained("lokr")
    drawn = {}
    for name, strength in (("networks.lokr", 0.8), ("lycoris.kohya", 0.8), ("networks.lokr", 0)):
        folder = tmp_path / f"{name} {strength}"
        options = {
            **{"ckpt": tiny_sd1_folder, "outdir": folder, "prompt": "sks thing", "W": 64, "H": 64, "steps": 2, "seed": 1},
            **{"network_module": name, "network_weights": path, "network_mul": strength},
        }
        assert gen_img_diffusers.main([str(part) for key, value in options.items() for part in (f"--{key}", value)]) == 0
        (picture,) = folder.glob("*.png")
        drawn[name, strength] = np.asarray(Image.open(picture)).astype(int)
    ours, theirs, plain = drawn.values()
    assert np.abs(ours - plain).mean() > 2
    assert np.abs(ours - theirs).max() <= 1


# A module of one's own

OWN_MODULE = '''
"""One factor for each output of the text encoder's and U-Net's queries."""
import torch
from safetensors.torch import load_file, save_file

called = []


class Factors(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers
        self.factors = torch.nn.ParameterDict(
            {name.replace(".", "_"): torch.zeros(layer.out_features) for name, layer in layers.items()}
        )

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        for name, layer in self.layers.items():
            factor = self.factors[name.replace(".", "_")]
            layer.forward = lambda x, factor=factor, forward=layer.forward: forward(x) * (1 + factor)

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr):
        called.append(("rates", text_encoder_lr, unet_lr, default_lr))
        return [{"params": list(self.parameters()), "lr": unet_lr}]

    def enable_gradient_checkpointing(self):
        called.append("checkpointing")

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        called.append("epoch")
        self.train()

    def on_step_start(self):
        called.append("step")

    def get_trainable_params(self):
        return self.parameters()

    def load_weights(self, file):
        return self.load_state_dict(load_file(file), strict=False)

    def save_weights(self, file, dtype, metadata):
        save_file({name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}, file, metadata)


def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
    called.append(("create", multiplier, network_dim, network_alpha, neuron_dropout, kwargs))
    layers = {f"te.{name}": layer for name, layer in text_encoder.named_modules() if name.endswith("q_proj")}
    assert all(name.startswith("te.text_model.encoder.layers.") for name in layers)
    assert text_encoder.config.hidden_size
    layers |= {f"unet.{name}": layer for name, layer in unet.named_modules() if name.endswith("attn2.to_q")}
    if "refuse" in kwargs:
        raise ValueError("no refusals, please")
    return Factors(layers)
'''


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "their_factors.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield importlib.import_module("their_factors")
    sys.modules.pop("their_factors")


def test_a_module_of_ones_own_trains(own_module, train, sd1):
    finished, path = train("--network_args", "colour=red", network_module="their_factors", network_dropout=0.1, unet_lr=1e-3)
    finished.require_success()
    created = [call for call in own_module.called if call[0] == "create"]
    assert created == [("create", 1.0, 4, 2.0, 0.1, {"dropout": 0.1, "colour": "red"})] * 2
    assert ("rates", 1e-2, 1e-3, 1e-2) in own_module.called
    assert own_module.called.count("step") == 1
    assert own_module.called.count("epoch") == 1
    tensors = load_file(path)
    assert any(tensor.abs().max() > 0 for tensor in tensors.values())
    assert "factors.te_text_model_encoder_layers_0_self_attn_q_proj" in tensors
    assert metadata_of(path)["ss_network_module"] == "their_factors"


def test_what_it_lacks_or_refuses_is_a_sentence(own_module, train, tmp_path, sd1):
    refused, _ = train("--network_args", "refuse=1", network_module="their_factors")
    assert_refused(refused, "--network_module their_factors: makes no network for this base model (ValueError: no refusals")
    module = load_network_module("their_factors")
    assert isinstance(module, ThirdPartyModule)
    with pytest.raises(UserError, match="--network_module their_factors: cannot read adapter files"):
        module.create_network_from_weights(1.0, "a.safetensors", None, sd1.text_encoder, sd1.unet)


def test_merging_is_refused_where_the_package_does_it_wrongly(trained, tiny_sd1_folder, tmp_path):
    import gen_img_diffusers

    arguments = ["--ckpt", tiny_sd1_folder, "--network_module", "lycoris.kohya", "--network_weights", trained("lokr")]
    arguments += ["--network_merge", "--prompt", "a", "--outdir", tmp_path / "out", "--steps", "1"]
    assert gen_img_diffusers.main([str(argument) for argument in arguments]) == 2
