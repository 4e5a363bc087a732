"""Extracting LoRA from two models as a user does it: what is found, how exact it is, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.checkpoints.base_model import open_base_model
from library.checkpoints.model_writing import plan_single_file
from library.checkpoints.parts import TEXT_ENCODER, UNET, VAE
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_writing import write_tensors
from library.cli.doors import run_door
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from networks.building.presets import find_preset
from networks.building.selection import Selection
from networks.building.targets import model_layers
from networks.core.products import leading_singular_vectors
from networks.extract_lora_from_models import work
from networks.formats.base_weights import BaseWeights
from networks.formats.file_adapters import FileLayers, adapter_of_layer
from networks.tools.model_differences import open_pair, tensor_pairs
from networks.tools.rank_choice import RankRule, decompose
from tests.support.command_lines import ENVIRONMENT, ROOT, Finished, assert_refused, run_script

Change = Callable[[str, str, Tensor], Tensor]
RANK = 3


def run(capsys, *arguments: object) -> Finished:
    capsys.readouterr()
    status = run_door("extract_lora_from_models", work, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Finished(status, captured.out, captured.err)


def changed_model(source: Path, target: Path, change: Change, dtype: str = "float32") -> Path:
    """A copy of a model as a single file, with tensors changed by (part, name, values)."""
    write_tensors(target, plan_single_file(open_base_model(source), dtype=dtype, change=change))
    return target


def noise(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def low_rank(name: str, tensor: Tensor, rank: int = RANK) -> Tensor:
    """A change of a weight of a given rank, of about a tenth of the weight's size."""
    matrix = tensor.flatten(1)
    product = noise(name + "up", len(matrix), rank) @ noise(name + "down", rank, matrix.shape[1])
    return 0.1 * product.reshape(tensor.shape) / math.sqrt(rank * matrix.shape[1])


def in_lora(kind: str, name: str, tensor: Tensor, *, convolutions: bool = False) -> bool:
    """Whether a LoRA network of sd-scripts has the layer, told as plainly as can be."""
    beginnings = (".resnets.", ".downsamplers.", ".upsamplers.") if convolutions else ()
    inside = (".attentions.", *beginnings) if kind == UNET else (".self_attn.", ".mlp.") if kind == TEXT_ENCODER else ()
    return tensor.dim() > 1 and any(part in name for part in inside)


def with_low_rank(kind: str, name: str, tensor: Tensor) -> Tensor:
    return tensor + low_rank(name, tensor) if in_lora(kind, name, tensor, convolutions=True) else tensor


def with_noise(kind: str, name: str, tensor: Tensor) -> Tensor:
    """Every tensor of the text encoder and the U-Net is changed, at full rank."""
    return tensor if kind == VAE else tensor + 0.02 * noise(name, *tensor.shape)


@pytest.fixture(scope="module")
def tuned(tiny_sd1_folder, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tuned")
    return {
        "low_rank": changed_model(tiny_sd1_folder, root / "low_rank.safetensors", with_low_rank),
        "noise": changed_model(tiny_sd1_folder, root / "noise.safetensors", with_noise),
    }


def deltas(path: Path, base: Path) -> dict[str, Tensor]:
    """What the file's layers add to the base model's weights, by our names."""
    weights, layers = BaseWeights(open_base_model(base)), FileLayers(open_tensor_file(path), SD1)
    found = {}
    for name in layers.names:
        adapter = adapter_of_layer(name, layers.read(name), weights.spec(name))
        found[name] = adapter.delta_weight(weights.weight(name)).detach()
    return found


def differences(base: Path, tuned: Path, *, convolutions: bool = False) -> dict[str, Tensor]:
    """Tuned less base for the layers of LoRA, by our names, in double precision."""
    pairs = tensor_pairs(
        *open_pair(str(base), str(tuned), said=None, v_parameterization=None), with_convolutions=convolutions
    )
    return {
        str(pair.layer): pair.tuned.read().double().reshape(pair.shape) - pair.base.read().double()
        for pair in pairs
        if pair.rank_name
    }


def error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    lost = sum(float((found[name].double().reshape(wanted[name].shape) - wanted[name]).square().sum()) for name in wanted)
    return math.sqrt(lost / sum(float(change.square().sum()) for change in wanted.values()))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def ranks_of(path: Path) -> dict[str, int]:
    return {key.partition(".")[0]: len(value) for key, value in load_file(path).items() if "lora_down" in key}


class TestExactness:
    @pytest.mark.parametrize(("precision", "limit"), [("float", 1e-5), ("fp16", 1e-3), ("bf16", 1e-2)])
    def test_a_change_of_low_rank_comes_back(self, tiny_sd1_folder, tuned, tmp_path, capsys, precision, limit):
        path = tmp_path / "lora.safetensors"
        done = run(
            capsys, "--model_org", tiny_sd1_folder, "--model_tuned", tuned["low_rank"], "--save_to", path, "--dim", RANK,
            "--conv_dim", RANK, "--min_diff", 0, "--save_precision", precision,
        ).require_success()  # fmt: skip
        wanted = differences(tiny_sd1_folder, tuned["low_rank"], convolutions=True)
        found = deltas(path, tiny_sd1_folder)
        assert found.keys() == wanted.keys()
        assert error(found, wanted) < limit
        assert "read rightly by" in done.last_line
        assert "opened again and compared" in done.out

    def test_an_adapter_merged_into_a_half_precision_checkpoint_comes_back(self, tiny_sd1_folder, tmp_path, capsys):
        base = changed_model(tiny_sd1_folder, tmp_path / "base.safetensors", lambda kind, name, tensor: tensor, "float16")
        merged = changed_model(
            base,
            tmp_path / "merged.safetensors",
            lambda kind, name, tensor: (
                tensor.float() + 10 * low_rank(name, tensor.float()) if in_lora(kind, name, tensor) else tensor
            ),
            "float32",
        )
        path = tmp_path / "lora.safetensors"
        run(
            capsys,
            "--model_org",
            base,
            "--model_tuned",
            merged,
            "--save_to",
            path,
            "--dim",
            RANK,
            "--save_precision",
            "fp16",
        ).require_success()
        weights, wanted = BaseWeights(open_base_model(base)), {}
        for name, change in differences(base, merged).items():
            place = weights.place(name, "weight")
            assert place is not None
            wanted[name] = 10 * low_rank(place[1], change.float()).double()
        assert error(deltas(path, base), wanted) < 1e-3

    def test_a_change_of_full_rank_is_approximated_as_well_as_can_be(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        path, report = tmp_path / "lora.safetensors", tmp_path / "report.json"
        run(
            capsys, "--model_org", tiny_sd1_folder, "--model_tuned", tuned["noise"], "--save_to", path, "--report", report
        ).require_success()
        wanted = differences(tiny_sd1_folder, tuned["noise"])
        best = sum(float(torch.linalg.svdvals(change.flatten(1))[4:].square().sum()) for change in wanted.values())
        norm = sum(float(change.square().sum()) for change in wanted.values())
        found = error(deltas(path, tiny_sd1_folder), wanted)
        assert found <= 1.01 * math.sqrt(best / norm)
        assert json.loads(report.read_text())["relative_error"] == pytest.approx(found, rel=1e-4)

    def test_layers_are_those_of_a_lora_network(self, tiny_sd1_folder, tuned):
        model = open_base_model(tiny_sd1_folder)
        layers = model_layers(SD1, model.empty_text_encoders(), model.empty_denoiser())
        for convolutions in (False, True):
            chosen = Selection(preset=find_preset("attn-mlp", SD1)).layers(layers, with_convolutions=convolutions)
            wanted = {layer.name for layer in chosen}
            found = differences(tiny_sd1_folder, tuned["noise"], convolutions=convolutions)
            assert found.keys() == wanted


class TestDecomposition:
    @pytest.mark.parametrize("shape", [(320, 320), (160, 1280), (1280, 160), (160, 1440), (320, 192)])
    @pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
    def test_the_error_is_near_the_least(self, shape, decay):
        left, right = (torch.linalg.qr(noise(f"{side}", side, min(shape))).Q for side in shape)
        values = torch.arange(1, min(shape) + 1).float() ** -decay
        matrix = left * values @ right.T
        found = leading_singular_vectors(matrix, 16, torch.Generator().manual_seed(0))
        off = torch.linalg.vector_norm(matrix - (found[0] * found[1]) @ found[2])
        assert off <= 1.01 * torch.linalg.vector_norm(values[16:])

    def test_low_rank_is_exact(self):
        matrix = noise("a", 300, 5) @ noise("b", 5, 400)
        left, values, right = leading_singular_vectors(matrix, 8, torch.Generator().manual_seed(0))
        assert torch.linalg.vector_norm(matrix - (left * values) @ right) < 1e-5 * torch.linalg.vector_norm(matrix)

    @pytest.mark.parametrize("aim", [0.5, 0.05, 1e-4])
    def test_the_lowest_rank_of_an_error(self, aim):
        values = torch.arange(1, 201).float() ** -1.0
        matrix = torch.linalg.qr(noise("l", 300, 200)).Q * values @ torch.linalg.qr(noise("r", 200, 200)).Q
        tails = values.double().square().flip(0).cumsum(0).flip(0)
        best = int((tails > aim**2 * tails[0]).sum())
        _, kept, _, _ = decompose(matrix, RankRule(most=None, error=aim), torch.Generator().manual_seed(0))
        assert best <= len(kept) <= best + 1

    def test_ranks_above_a_threshold_and_a_highest_rank(self):
        values = torch.arange(200, 0, -1).float()
        matrix = torch.linalg.qr(noise("l", 300, 200)).Q * values @ torch.linalg.qr(noise("r", 200, 200)).Q
        start = torch.Generator().manual_seed(0)
        assert len(decompose(matrix, RankRule(most=None, threshold=120.5), start)[1]) == 80
        assert len(decompose(matrix, RankRule(most=50, threshold=120.5), start)[1]) == 50
        assert len(decompose(matrix, RankRule(most=None, threshold=1e6), start)[1]) == 1


class TestOptions:
    def extract(self, capsys, base: Path, tuned: Path, target: Path, *more: object) -> Finished:
        return run(capsys, "--model_org", base, "--model_tuned", tuned, "--save_to", target, *more).require_success()

    def test_ranks_that_differ_keep_one_alpha(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        path = tmp_path / "lora.safetensors"
        self.extract(capsys, tiny_sd1_folder, tuned["noise"], path, "--rank_error", 0.5, "--conv_dim", 64)
        assert len(set(ranks_of(path).values())) > 2
        assert {float(value) for key, value in load_file(path).items() if key.endswith(".alpha")} == {4.0}
        wanted = differences(tiny_sd1_folder, tuned["noise"], convolutions=True)
        found = deltas(path, tiny_sd1_folder)
        for name, change in wanted.items():
            assert error(found, {name: change}) <= 0.501 or ranks_of(path)[name] == 64
        assert metadata_of(path)["ss_network_dim"] == "Dynamic"

    def test_share_and_error_are_one_aim(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        self.extract(capsys, tiny_sd1_folder, tuned["noise"], first, "--rank_share", 0.75)
        self.extract(capsys, tiny_sd1_folder, tuned["noise"], second, "--rank_error", 0.5)
        assert ranks_of(first) == ranks_of(second)

    def test_a_threshold_counts_singular_values(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        path = tmp_path / "lora.safetensors"
        self.extract(capsys, tiny_sd1_folder, tuned["noise"], path, "--rank_threshold", 0.2)
        wanted = differences(tiny_sd1_folder, tuned["noise"])
        for name, rank in ranks_of(path).items():
            assert rank == max(1, int((torch.linalg.svdvals(wanted[name].flatten(1)) > 0.2).sum()))

    def test_dim_is_the_highest_rank_with_an_aim(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        path = tmp_path / "lora.safetensors"
        self.extract(capsys, tiny_sd1_folder, tuned["noise"], path, "--rank_error", 0.1, "--dim", 6)
        assert set(ranks_of(path).values()) == {6}

    def test_clamping_is_off_and_its_cost_is_told(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        exact, clamped, report = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "r.json"
        done = self.extract(capsys, tiny_sd1_folder, tuned["low_rank"], exact, "--dim", RANK, "--min_diff", 0)
        assert "clamping at" not in done.out
        more = ("--dim", RANK, "--min_diff", 0, "--clamp_quantile", 0.99, "--report", report)
        done = self.extract(capsys, tiny_sd1_folder, tuned["low_rank"], clamped, *more)
        wanted = differences(tiny_sd1_folder, tuned["low_rank"])
        assert error(deltas(exact, tiny_sd1_folder), wanted) < 1e-5
        cost = error(deltas(clamped, tiny_sd1_folder), wanted)
        assert cost > 0.01
        assert json.loads(report.read_text())["relative_error"] == pytest.approx(cost, rel=1e-4)
        assert "clamping at the quantile 0.99 costs" in done.out

    def test_an_equal_text_encoder_is_left_out_and_said(self, tiny_sd1_folder, tmp_path, capsys):
        def of_unet(kind: str, name: str, tensor: Tensor) -> Tensor:
            return with_low_rank(kind, name, tensor) if kind == UNET else tensor

        other = changed_model(tiny_sd1_folder, tmp_path / "unet.safetensors", of_unet)
        path = tmp_path / "lora.safetensors"
        done = self.extract(capsys, tiny_sd1_folder, other, path, "--min_diff", 0)
        assert "text encoder is the same in both models" in done.out
        assert all(name.startswith("lora_unet_") for name in ranks_of(path))

    def test_min_diff_is_a_limit(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        path = tmp_path / "lora.safetensors"
        done = self.extract(capsys, tiny_sd1_folder, tuned["noise"], path, "--min_diff", 5)
        assert "text encoder is left out: no weight differs by more than" in done.out
        assert all(name.startswith("lora_unet_") for name in ranks_of(path))

    def test_the_rest_is_reported_and_stored_on_request(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        path = tmp_path / "lora.safetensors"
        done = self.extract(capsys, tiny_sd1_folder, tuned["noise"], path)
        assert not any("diff" in key or "norm." in key.partition(".")[2] for key in load_file(path))
        for kind in ("norms", "biases", "conv_in and conv_out", "time embedding", "embeddings"):
            assert f": {kind}" in done.out
        done = self.extract(capsys, tiny_sd1_folder, tuned["noise"], path, "--store_rest", "--dim", 64)
        weights, layers = BaseWeights(open_base_model(tiny_sd1_folder)), FileLayers(open_tensor_file(path), SD1)
        other = open_base_model(tuned["noise"])
        for name in layers.names:
            adapter = adapter_of_layer(name, layers.read(name), weights.spec(name))
            for tensor, delta in (
                ("weight", adapter.delta_weight(weights.weight(name)).detach()),
                ("bias", adapter.delta_bias()),
            ):
                place = weights.place(name, tensor)
                if place is not None:
                    new, old = (model.parts[place[0]].sources[place[1]].read() for model in (other, weights.model))
                    assert delta is not None
                    torch.testing.assert_close(
                        delta.detach().reshape(old.shape), new.reshape(old.shape) - old, rtol=0, atol=2e-5
                    )
        left = [line for line in done.out.splitlines() if line.endswith("left out")]
        assert len(left) == 1
        assert "embeddings" in left[0]

    def test_models_are_rounded_first_where_that_is_asked_for(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        path = tmp_path / "lora.safetensors"
        self.extract(capsys, tiny_sd1_folder, tuned["noise"], path, "--load_precision", "bf16", "--dim", 64)
        pairs = tensor_pairs(
            *open_pair(str(tiny_sd1_folder), str(tuned["noise"]), said=None, v_parameterization=None),
            with_convolutions=False,
        )
        wanted = {
            str(pair.layer): pair.tuned.read().bfloat16().double().reshape(pair.shape) - pair.base.read().bfloat16().double()
            for pair in pairs
            if pair.rank_name
        }
        assert error(deltas(path, tiny_sd1_folder), wanted) < 1e-5

    def test_metadata_and_hashes(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        path = tmp_path / "lora.safetensors"
        self.extract(capsys, tiny_sd1_folder, tuned["noise"], path, "--conv_dim", 2)
        metadata = metadata_of(path)
        assert metadata["ss_network_module"] == "networks.lora"
        assert metadata["ss_v2"] == "False"
        assert metadata["ss_base_model_version"] == "sd_v1"
        assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "4"}
        self.extract(capsys, tiny_sd1_folder, tuned["noise"], path, "--no_metadata")
        metadata = metadata_of(path)
        assert not any(key.startswith("modelspec.") for key in metadata)
        assert metadata["ss_network_dim"] == "4"

    def test_a_picture_and_a_report(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        picture, report = tmp_path / "plot.png", tmp_path / "report.json"
        self.extract(
            capsys, tiny_sd1_folder, tuned["noise"], tmp_path / "lora.safetensors", "--plot", picture, "--report", report
        )
        assert picture.read_bytes().startswith(b"\x89PNG")
        content = json.loads(report.read_text())
        assert content["layers"].keys() == ranks_of(tmp_path / "lora.safetensors").keys()
        assert all(layer["relative_error"] < 1 for layer in content["layers"].values())

    def test_a_ckpt_as_output_and_the_same_bits_each_time(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        first, second = tmp_path / "a.safetensors", tmp_path / "b.ckpt"
        self.extract(capsys, tiny_sd1_folder, tuned["noise"], first)
        self.extract(capsys, tuned["noise"].with_name("noise.safetensors"), tiny_sd1_folder, tmp_path / "back.safetensors")
        self.extract(capsys, tiny_sd1_folder, tuned["noise"], second)
        again = torch.load(second, weights_only=True)
        assert all(torch.equal(value, again[key]) for key, value in load_file(first).items())

    def test_models_of_sd2_that_predict_v(self, tiny_sd2_v_folder, tmp_path, capsys):
        other = changed_model(tiny_sd2_v_folder, tmp_path / "tuned.safetensors", with_low_rank)
        path = tmp_path / "lora.safetensors"
        more = ("--v2", "--v_parameterization", "--dim", RANK, "--conv_dim", RANK, "--min_diff", 0)
        self.extract(capsys, tiny_sd2_v_folder, other, path, *more)
        wanted = differences(tiny_sd2_v_folder, other, convolutions=True)
        weights, layers = BaseWeights(open_base_model(tiny_sd2_v_folder)), FileLayers(open_tensor_file(path), SD2)
        found = {
            name: adapter_of_layer(name, layers.read(name), weights.spec(name)).delta_weight(torch.empty(0)).detach()
            for name in layers.names
        }
        assert error(found, wanted) < 1e-5
        assert metadata_of(path)["ss_v2"] == "True"
        assert metadata_of(path)["modelspec.prediction_type"] == "v"

    def test_another_vae_is_told(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        def with_vae(kind: str, name: str, tensor: Tensor) -> Tensor:
            return tensor + 1 if kind == VAE else with_low_rank(kind, name, tensor)

        other, path = tmp_path / "vae.safetensors", tmp_path / "lora.safetensors"
        done = self.extract(capsys, tiny_sd1_folder, changed_model(tiny_sd1_folder, other, with_vae), path)
        assert "the VAE is another one too" in done.out
        assert "VAE" not in self.extract(capsys, tiny_sd1_folder, tuned["noise"], path).out


class TestRefusals:
    def refused(self, capsys, target: Path, *arguments: object) -> Finished:
        done = run(capsys, *arguments, "--save_to", target)
        assert not target.exists()
        return done

    def test_equal_models(self, tiny_sd1_folder, tiny_sd1_file, tmp_path, capsys):
        target = tmp_path / "lora.safetensors"
        done = self.refused(capsys, target, "--model_org", tiny_sd1_folder, "--model_tuned", tiny_sd1_file)
        assert_refused(done, "is equal to --model_org")

    def test_models_that_differ_elsewhere_alone(self, tiny_sd1_folder, tmp_path, capsys):
        other = changed_model(
            tiny_sd1_folder,
            tmp_path / "bias.safetensors",
            lambda kind, name, tensor: tensor + 1 if kind == UNET and name == "conv_out.bias" else tensor,
        )
        target = tmp_path / "lora.safetensors"
        done = self.refused(capsys, target, "--model_org", tiny_sd1_folder, "--model_tuned", other)
        assert_refused(done, "only where LoRA does not reach", "--store_rest")
        run(
            capsys, "--model_org", tiny_sd1_folder, "--model_tuned", other, "--save_to", target, "--store_rest"
        ).require_success()
        torch.testing.assert_close(load_file(target)["lora_unet_conv_out.diff_b"], torch.ones(4))

    def test_two_families(self, tiny_sd1_folder, tiny_sd2_folder, tmp_path, capsys):
        done = self.refused(
            capsys, tmp_path / "lora.safetensors", "--model_org", tiny_sd1_folder, "--model_tuned", tiny_sd2_folder
        )
        assert_refused(done, "is Stable Diffusion 2.x, while", "one kind")

    def test_what_the_user_says_is_checked(self, tiny_sd1_folder, tiny_sd2_folder, tuned, tmp_path, capsys):
        models = ("--model_org", tiny_sd1_folder, "--model_tuned", tuned["noise"])
        target = tmp_path / "lora.safetensors"
        assert_refused(self.refused(capsys, target, *models, "--v2"), "--v2 was given, but this is Stable Diffusion 1.x")
        assert_refused(self.refused(capsys, target, *models, "--v_parameterization"), "predicts the noise")
        assert_refused(self.refused(capsys, target, *models, "--sdxl"), "--sdxl was given, but this is Stable Diffusion 1.x")
        assert_refused(self.refused(capsys, target, *models, "--sdxl", "--v2"), "--v2 and --sdxl: exclude each other")

    def test_damaged_files(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        cut, target = tmp_path / "cut.safetensors", tmp_path / "lora.safetensors"
        cut.write_bytes(tuned["noise"].read_bytes()[:-1000])
        assert_refused(self.refused(capsys, target, "--model_org", tiny_sd1_folder, "--model_tuned", cut), "cut.safetensors")
        harmful, mark = tmp_path / "harmful.ckpt", tmp_path / "executed"

        class Harmful:
            def __reduce__(self):
                return (Path.touch, (mark,))

        torch.save({"state_dict": {"x": torch.zeros(1)}, "y": Harmful()}, harmful)
        assert_refused(self.refused(capsys, target, "--model_org", harmful, "--model_tuned", tuned["noise"]), "harmful.ckpt")
        assert not mark.exists()

    def test_values_that_are_not_finite(self, tiny_sd1_folder, tmp_path, capsys):
        tensors = {}
        other = changed_model(tiny_sd1_folder, tmp_path / "nan.safetensors", with_noise)
        tensors = load_file(other)
        key = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
        tensors[key][0, 0] = math.nan
        save_file(tensors, other)
        done = self.refused(capsys, tmp_path / "lora.safetensors", "--model_org", tiny_sd1_folder, "--model_tuned", other)
        assert_refused(done, "nan.safetensors", "not finite", "attn1.to_q.weight of the U-Net")

    def test_an_output_that_is_an_input(self, tiny_sd1_folder, tuned, capsys):
        before = tuned["noise"].read_bytes()
        done = run(capsys, "--model_org", tiny_sd1_folder, "--model_tuned", tuned["noise"], "--save_to", tuned["noise"])
        assert_refused(done, "is one of the inputs")
        assert tuned["noise"].read_bytes() == before

    def test_everything_wrong_with_a_command_line_at_once(self, capsys):
        done = run(
            capsys, "--dim", 0, "--clamp_quantile", 2, "--rank_error", 1.5, "--rank_share", 0.5, "--save_to", "lora.png"
        )
        assert_refused(
            done, "--model_org: not given", "--model_tuned: not given", "--dim 0", "--clamp_quantile 2", "--rank_error 1.5",
            "no suffix of a tensor file", "--rank_error with --rank_share",
        )  # fmt: skip

    def test_a_report_that_cannot_be_written(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        models = ("--model_org", tiny_sd1_folder, "--model_tuned", tuned["noise"])
        more = ("--report", tmp_path / "missing" / "report.json")
        assert_refused(self.refused(capsys, tmp_path / "a.safetensors", *models, *more), "report.json")

    def test_a_device_that_is_not_there(self, tiny_sd1_folder, tuned, tmp_path, capsys):
        models = ("--model_org", tiny_sd1_folder, "--model_tuned", tuned["noise"])
        assert_refused(self.refused(capsys, tmp_path / "a.safetensors", *models, "--device", "quantum"), "--device quantum")


def test_the_documented_command_as_a_process(tiny_sd1_folder, tuned, tmp_path):
    arguments = ["--model_org", tiny_sd1_folder, "--model_tuned", tuned["noise"], "--save_to", tmp_path / "lora.safetensors"]
    done = run_script("networks/extract_lora_from_models.py", *arguments, "--dim", 4).require_success()
    assert set(ranks_of(tmp_path / "lora.safetensors").values()) == {4}
    assert "read rightly by" in done.last_line


def test_no_model_library_is_imported(tiny_sd1_folder, tuned, tmp_path):
    arguments = ["--model_org", tiny_sd1_folder, "--model_tuned", tuned["noise"], "--save_to", tmp_path / "lora.safetensors"]
    program = (
        "import sys; from networks.extract_lora_from_models import work; work(sys.argv[1:]); "
        "assert not {'diffusers', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
