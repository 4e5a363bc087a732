"""LoRA's initial values: parts of the base weight that do not count, random ones that cancel, and how they are saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.errors import UserError
from networks import lora
from networks.core.adapter import LayerSpec
from networks.core.products import leading_singular_vectors
from networks.lora import LoRAModule
from tests.networks.cases import acting, attached, layer_and_input, stream

PRINCIPAL = ["pissa", "olora"]


def started(init: str, layer: nn.Module, *, rank: int = 4, alpha: float = 2.0, **options) -> LoRAModule:
    adapter = LoRAModule(LayerSpec.of(layer), rank=rank, alpha=alpha, init=init, **options)
    adapter.initialise(stream(), layer.get_parameter("weight"))
    return adapter


@pytest.mark.parametrize("layer_name", ["linear", "conv 1x1", "conv 3x3"])
class TestValues:
    def test_pissa_starts_as_the_best_approximation_of_its_rank(self, layer_name):
        layer, _ = layer_and_input(layer_name)
        adapter = started("pissa", layer)
        down, up = adapter.lora_down.weight.detach().flatten(1), adapter.lora_up.weight.detach().flatten(1)
        left, values, right = torch.linalg.svd(layer.weight.double().flatten(1), full_matrices=False)
        torch.testing.assert_close(0.5 * up @ down, (left[:, :4] * values[:4] @ right[:4]).float(), rtol=1e-4, atol=1e-5)
        for gram in (up.T @ up, down @ down.T):
            torch.testing.assert_close(0.5 * gram, torch.diag(values[:4]).float(), rtol=1e-4, atol=1e-4)

    def test_olora_starts_with_orthonormal_outputs_that_hold_all_of_their_part(self, layer_name):
        layer, _ = layer_and_input(layer_name)
        adapter = started("olora", layer)
        down, up = adapter.lora_down.weight.detach().flatten(1), adapter.lora_up.weight.detach().flatten(1)
        weight = layer.weight.flatten(1)
        torch.testing.assert_close(up.T @ up, torch.eye(4), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(up @ down, up @ up.T @ weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((up @ down)[:, :4], weight[:, :4], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("init", PRINCIPAL)
    def test_the_base_stays_as_it_is_and_nothing_changes_to_the_last_bit(self, layer_name, init):
        layer, x = layer_and_input(layer_name)
        weight, before = layer.weight.clone(), layer(x)
        adapter = started(init, layer)
        assert attached(layer, adapter, x).equal(before)
        assert layer.weight.equal(weight)
        assert adapter.delta_weight(weight).abs().max() == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert attached(layer, adapter, x).equal(layer(x))

    def test_orthogonal_factors_cancel_and_neither_is_zero(self, layer_name):
        layer, _ = layer_and_input(layer_name)
        adapter = started("orthogonal", layer)
        down, up = adapter.lora_down.weight.detach().flatten(1), adapter.lora_up.weight.detach().flatten(1)
        assert down.std() > 0.03
        assert up.std() > 0.03
        assert (up @ down).abs().max() < 1e-6
        assert torch.linalg.matrix_rank(down) == torch.linalg.matrix_rank(up) == 2


@pytest.mark.parametrize("init", PRINCIPAL)
def test_the_change_is_that_of_the_product_since_the_start(init):
    layer, _ = layer_and_input("linear")
    adapter = started(init, layer)
    at_start = 0.5 * adapter.lora_up.weight.double() @ adapter.lora_down.weight.double()
    acting(adapter)
    now = 0.5 * adapter.lora_up.weight.double() @ adapter.lora_down.weight.double()
    torch.testing.assert_close(adapter.delta_weight(layer.weight).double(), now - at_start, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [{}, {"dora_wd": True}, {"dora_wd": True, "wd_on_output": True}], ids=str)
@pytest.mark.parametrize("init", PRINCIPAL)
@pytest.mark.parametrize("layer_name", ["linear", "conv 3x3"])
def test_a_file_is_a_plain_lora_of_twice_the_rank_for_the_original_base(layer_name, init, dora):
    layer, x = layer_and_input(layer_name)
    adapter = acting(started(init, layer, **dora), spread=0.1)
    tensors = adapter.tensors()
    assert set(tensors) == {"lora_down.weight", "lora_up.weight", "alpha"} | ({"dora_scale"} if dora else set())
    assert len(tensors["lora_down.weight"]) == tensors["lora_up.weight"].shape[1] == adapter.rank_in_files == 8
    assert tensors["alpha"] / 8 == adapter.scale == 0.5
    plain = LoRAModule.from_tensors(LayerSpec.of(layer), tensors)
    torch.testing.assert_close(attached(layer, plain, x), attached(layer, adapter, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", PRINCIPAL)
def test_training_goes_on_from_its_own_file_and_from_its_state(init):
    layer, x = layer_and_input("linear")
    adapter = acting(started(init, layer))
    from_file, from_state = started(init, layer), started(init, layer)
    from_file.load_tensors(adapter.tensors())
    from_state.load_state_dict(adapter.state_dict())
    for again in (from_file, from_state):
        assert (again.rank, again.scale) == (4, 0.5)
        for one, other in zip(adapter.state_dict().values(), again.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(attached(layer, again, x), attached(layer, adapter, x))


def test_training_goes_on_from_another_programs_file_of_the_same_rank():
    layer, x = layer_and_input("linear")
    plain = acting(started("default", layer))
    adapter = started("pissa", layer)
    adapter.load_tensors(plain.tensors())
    torch.testing.assert_close(attached(layer, adapter, x), attached(layer, plain, x))


def test_half_precision_rounds_the_change_and_not_the_base():
    """The factors are a hundred times the change here; saved as they are, the change would drown in their rounding."""
    layer = nn.Linear(64, 48).requires_grad_(False)
    nn.init.orthogonal_(layer.weight, generator=stream(3))
    adapter = acting(started("pissa", layer, rank=8, alpha=8.0), spread=1e-3)
    delta = adapter.delta_weight(layer.weight)
    halves = {name: tensor.bfloat16() for name, tensor in adapter.tensors().items()}
    read = LoRAModule.from_tensors(LayerSpec.of(layer), halves).delta_weight(layer.weight)
    assert (read - delta).norm() < 0.01 * delta.norm()
    start = 0.5 * adapter.start_up @ adapter.start_down
    assert (start.bfloat16() - start).norm() > 0.01 * delta.norm(), "the case must be one in which this matters"


@pytest.mark.parametrize(("layer_name", "axis"), [("linear", -1), ("conv 3x3", 1)])
def test_rank_dropout_leaves_a_rank_out_with_its_start(layer_name, axis):
    layer, x = layer_and_input(layer_name)
    adapter = acting(started("pissa", layer, rank_dropout=0.5)).train()
    torch.manual_seed(0)
    kept, kept_of_start = (half != 0 for half in adapter._hidden(x)[0].chunk(2, dim=axis))
    assert 0 < kept.float().mean() < 1
    assert kept.equal(kept_of_start)


def test_an_odd_rank_has_no_halves(sd1):
    with pytest.raises(UserError, match="init=orthogonal needs an even rank, not 3"):
        lora.create_network(1.0, 3, 1, None, sd1.text_encoder, sd1.unet, init="orthogonal")


def test_an_unknown_start_is_told_the_near_ones(sd1):
    with pytest.raises(UserError, match="'pisa' is no way to start") as problem:
        lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet, init="pisa")
    assert "pissa" in str(problem.value)


@pytest.mark.parametrize("init", ["default", "orthogonal", *PRINCIPAL])
def test_planning_needs_no_values(init):
    adapter = LoRAModule(LayerSpec(weight_shape=(12, 8)), rank=4, alpha=4, init=init)
    base = torch.empty(12, 8, device="meta")
    adapter.initialise(stream(), base)
    assert adapter.own_delta().abs().max() < 1e-6


@pytest.mark.parametrize("init", PRINCIPAL)
def test_more_ranks_than_the_layer_has(init):
    layer = nn.Conv2d(8, 3, 3).requires_grad_(False)
    adapter = started(init, layer, rank=6)
    assert adapter.delta_weight(layer.weight).abs().max() == 0
    assert adapter.lora_up.weight[:, 3:].abs().max() == 0 < adapter.lora_up.weight[:, :3].abs().min()
    assert (adapter.lora_down.weight.flatten(1).norm(dim=1) > 0).all(), "ranks beyond the layer's train as usual"


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_the_start_follows_from_the_seed(init, sd1):
    def factors(seed):
        torch.rand(5)
        network = lora.create_network(1.0, 4, 1, None, None, sd1.unet, init=init, seed=seed)
        return torch.cat([tensor.flatten() for tensor in network.state_dict().values()])

    assert factors(1).equal(factors(1))
    assert factors(1).equal(factors(2)) == (init == "olora"), "which draws nothing"


def test_a_network_of_principal_starts_saves_and_loads(sd1, perturb, tmp_path):
    def network():
        return lora.create_network(
            1.0, 4, 2, None, sd1.text_encoder, sd1.unet, init="pissa", conv_dim=2, rs_lora=True, dora_wd=True
        )

    trained, base = network(), sd1.both()
    for parameter in trained.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=stream(parameter.numel())))
    trained.attach()
    expected = sd1.both()
    trained.detach()
    trained.save_weights(tmp_path / "pissa.safetensors", None, {})
    again = network()
    assert again.load_weights(tmp_path / "pissa.safetensors").missing == ()
    plain, _ = lora.create_network_from_weights(1.0, tmp_path / "pissa.safetensors", None, sd1.text_encoder, sd1.unet)
    for other in (again, plain):
        other.attach()
        torch.testing.assert_close(sd1.both(), expected, rtol=1e-3, atol=1e-4 * base.abs().max().item())
        other.detach()
    assert (expected - base).abs().max() > 0.05


class TestDecomposition:
    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        """A random weight whose singular values fall as slowly as a trained one's."""
        left = torch.linalg.qr(torch.randn(rows, columns, generator=stream(1))).Q
        right = torch.linalg.qr(torch.randn(columns, columns, generator=stream(2))).Q
        return left * (1 + torch.arange(columns)).pow(-0.5) @ right

    def test_small_ones_are_exact(self):
        matrix = self.matrix(50, 40)
        left, values, right = leading_singular_vectors(matrix, 8, stream())
        torch.testing.assert_close(values, torch.linalg.svdvals(matrix)[:8])
        torch.testing.assert_close(left.T @ matrix @ right.T, torch.diag(values), rtol=1e-4, atol=1e-5)

    def test_large_ones_hold_nearly_as_much_as_the_best(self):
        matrix = self.matrix(400, 300)
        left, values, right = leading_singular_vectors(matrix, 8, stream())
        for vectors in (left.T, right):
            torch.testing.assert_close(vectors @ vectors.T, torch.eye(8), rtol=1e-5, atol=1e-5)
        best = torch.linalg.svdvals(matrix)[:8].square().sum()
        assert 0.99 * best < (left * values @ right).square().sum() <= best * 1.00001
        assert values.diff().max() <= 0
