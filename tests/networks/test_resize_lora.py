"""The resizer as a user runs it, held to dense computations in double precision."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.hashes import sshs_hashes
from library.errors import UserError, UserErrors
from library.families.sd1 import SD1
from networks.formats.file_adapters import stream_layers
from networks.formats.keys import to_peft
from networks.resize_lora import work
from networks.tools.conversion import SourceLayer
from networks.tools.resizing import rank_for
from tests.support.command_lines import assert_is_another_picture, assert_refused, run_script
from tests.support.tiny_models import build_tiny_parts

METADATA = {
    "ss_base_model_version": "sd_v1",
    "ss_network_dim": "8",
    "ss_network_alpha": "4.0",
    "ss_training_comment": "mine",
}
FILES = {
    "lora": {"conv_dim": "4", "conv_alpha": "2"},
    "lora dora": {"dora_wd": "True"},
    "loha": {"conv_dim": "4", "use_tucker": "True"},
    "lokr": {"factor": "4", "conv_dim": "2"},
    "dylora": {},
    "ia3": {},
    "full": {},
}
METHODS = [("sv_ratio", 2.0), ("sv_fro", 0.8), ("sv_cumulative", 0.6)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of every algorithm whose layers act, by a name in `FILES`; made when asked for."""
    folder, parts = tmp_path_factory.mktemp("files"), build_tiny_parts(SD1)

    def file(name):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            module = importlib.import_module(f"networks.{name.split()[0]}")
            network = module.create_network(1.0, 8, 4, None, parts["text_encoder"], parts["unet"], **FILES[name])
            stream = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
            network.save_weights(path, None, METADATA)
        return path

    return file


def resize(capsys, source, target, *arguments):
    capsys.readouterr()
    assert work(["--model", str(source), "--save_to", str(target), *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


@torch.no_grad()
def changes_of(path):
    """Layer -> its dense change before any decomposition, in double precision, and its spec."""
    from library.checkpoints.tensor_files import open_tensor_file

    found = {}
    for name, tensors in stream_layers(open_tensor_file(path), SD1):
        adapter = SourceLayer.read(name, tensors, SD1, None).adapter
        found[name] = adapter.own_delta().double().flatten(1), adapter.spec
    return found


def rank_by_definition(values, limit, method, param):
    """Straight from the words: tries every rank."""
    for rank in range(1, min(limit, len(values)) + 1):
        kept = values[:rank]
        if method == "sv_ratio" and (rank == len(values) or values[rank] <= values[0] / param):
            return rank
        if method == "sv_fro" and kept.norm() >= param * values.norm():
            return rank
        if method == "sv_cumulative" and kept.sum() >= param * values.sum():
            return rank
    return min(limit, len(values))


@pytest.mark.parametrize("method", [None, *METHODS], ids=str)
@pytest.mark.parametrize("name", ["lora", "lora dora", "loha", "lokr", "dylora"])
def test_every_layer_is_the_best_approximation_of_its_rank(files, capsys, tmp_path, name, method):
    target, report = tmp_path / "small.safetensors", tmp_path / "report.json"
    dynamic = [] if method is None else ["--dynamic_method", method[0], "--dynamic_param", method[1]]
    resize(capsys, files(name), target, "--new_rank", 5, "--new_conv_rank", 3, "--report", report, *dynamic)
    tensors, told = load_file(target), json.loads(report.read_text())
    after, lost, had = changes_of(target), 0.0, 0.0
    for layer, (delta, spec) in changes_of(files(name)).items():
        u, values, v = torch.linalg.svd(delta, full_matrices=False)
        limit = 3 if spec.is_wide else 5
        own = min(limit, int((values > 1e-5 * values[0]).sum()))
        wanted = own if method is None else min(own, rank_by_definition(values, limit, *method))
        assert len(tensors[f"{layer}.lora_down.weight"]) == told["layers"][layer]["rank"] == wanted, layer
        best = (u[:, :wanted] * values[:wanted]) @ v[:wanted]
        torch.testing.assert_close(after[layer][0], best, rtol=1e-5, atol=1e-5 * float(delta.norm()))
        lost, had = lost + float((after[layer][0] - delta).square().sum()), had + float(delta.square().sum())
    assert told["relative_error"] == pytest.approx((lost / had) ** 0.5, rel=1e-3, abs=2e-6)
    assert len({float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}) == 1


@pytest.mark.parametrize(
    ("values", "limit", "method", "param", "rank"),
    [
        ([8.0, 4.0, 2.0, 1.0], 9, None, 0, 4),
        ([8.0, 4.0, 2.0, 1.0], 9, "sv_ratio", 4, 2),
        ([8.0, 4.0, 2.0, 1.0], 9, "sv_ratio", 4.1, 3),
        ([8.0, 4.0, 2.0, 1.0], 2, "sv_ratio", 100, 2),
        ([8.0, 4.0, 2.0, 1.0], 9, "sv_cumulative", 0.8, 2),
        ([8.0, 4.0, 2.0, 1.0], 9, "sv_cumulative", 0.81, 3),
        ([4.0, 3.0, 0.0], 9, "sv_fro", 0.8, 1),
        ([4.0, 3.0, 0.0], 9, "sv_fro", 0.81, 2),
        ([4.0, 3.0, 0.0], 9, "sv_fro", 1.0, 2),
        ([0.0, 0.0], 9, "sv_fro", 0.9, 1),
        ([1.0], 9, "sv_ratio", 1.5, 1),
    ],
)
def test_ranks_keep_to_their_bounds(values, limit, method, param, rank):
    assert rank_for(torch.tensor(values), limit, method, param) == rank


def test_magnitudes_of_dora_and_precision_are_kept(files, capsys, tmp_path):
    target = tmp_path / "small.safetensors"
    lines = resize(capsys, files("lora dora"), target, "--new_rank", 2, "--save_precision", "bf16")
    before, after = load_file(files("lora dora")), load_file(target)
    magnitudes = [key for key in before if key.endswith("dora_scale")]
    assert magnitudes
    for key in magnitudes:
        assert torch.equal(after[key], before[key].bfloat16())
    assert any("magnitudes are kept" in line for line in lines)


def test_metadata_tell_the_new_ranks(files, capsys, tmp_path):
    fixed, dynamic = tmp_path / "fixed.safetensors", tmp_path / "dynamic.safetensors"
    lines = resize(capsys, files("dylora"), fixed, "--new_rank", 2)
    assert lines[-1].startswith("read rightly by")
    resize(capsys, files("lora"), dynamic, "--new_rank", 6, "--dynamic_method", "sv_fro", "--dynamic_param", "0.7")
    with safe_open(fixed, "pt") as file:
        told = file.metadata()
    assert (told["ss_network_dim"], float(told["ss_network_alpha"])) == ("2", 1.0)
    assert told["ss_training_comment"] == "resized from 8 to 2 (dylora.safetensors); mine"
    assert sshs_hashes(fixed).items() <= told.items()
    with safe_open(dynamic, "pt") as file:
        told = file.metadata()
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert "at most" in told["ss_training_comment"]
    assert "sv_fro 0.7" in told["ss_training_comment"]


def test_a_peft_file_gives_what_kohyas_names_give(files, capsys, tmp_path):
    tensors = load_file(files("dylora"))
    renamed, said = to_peft(tensors, SD1)
    save_file({key: tensor.contiguous() for key, tensor in renamed.items()}, tmp_path / "peft.safetensors", METADATA | said)
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    resize(capsys, files("dylora"), one, "--new_rank", 3)
    resize(capsys, tmp_path / "peft.safetensors", other, "--new_rank", 3)
    expected, found = changes_of(one), changes_of(other)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name][0], expected[name][0], rtol=1e-5, atol=1e-6)


def test_verbose_lines_and_plot(files, capsys, tmp_path):
    plot = tmp_path / "plot.png"
    lines = resize(capsys, files("lora"), tmp_path / "s.safetensors", "--verbose", "--plot", plot, "--device", "cpu")
    shown = [line for line in lines if "sum(S) retained" in line]
    assert len(shown) == len(changes_of(files("lora")))
    assert all("fro retained" in line and "max(S) ratio" in line and line.endswith("new dim: 4") for line in shown)
    resize(capsys, files("lora"), tmp_path / "s.safetensors", "--plot", tmp_path / "other.png", "--new_rank", 2)
    assert_is_another_picture(plot, tmp_path / "other.png")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--new_rank", "0"], ["--new_rank 0"]),
        (["--new_conv_rank", "-1"], ["--new_conv_rank -1"]),
        (["--dynamic_param", "2"], ["--dynamic_method"]),
        (["--dynamic_method", "sv_fro"], ["--dynamic_param"]),
        (["--dynamic_method", "sv_fro", "--dynamic_param", "1.5"], ["1.5", "share"]),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "1"], ["above 1"]),
        (["--device", "quantum"], ["quantum"]),
        (["--save_to", "x.png"], ["suffix"]),
    ],
)
def test_wrong_options_are_refused(files, tmp_path, arguments, parts):
    target = tmp_path / "out.safetensors"
    with pytest.raises((UserError, UserErrors)) as refused:
        work(["--model", str(files("dylora")), "--save_to", str(target), *arguments])
    assert all(part in str(refused.value) for part in parts), refused.value
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ia3", "full"])
def test_files_without_ranks_are_refused(files, tmp_path, name):
    finished = run_script("networks/resize_lora.py", "--model", files(name), "--save_to", tmp_path / "out.safetensors")
    assert_refused(finished, "convert_lora.py", str(files(name)))
    assert not list(tmp_path.iterdir())


def test_the_source_is_not_written_over(files):
    with pytest.raises(UserError, match="is one of the inputs"):
        work(["--model", str(files("dylora")), "--save_to", str(files("dylora"))])
