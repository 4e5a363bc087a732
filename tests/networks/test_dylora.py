"""DyLoRA: each step one rank for the whole network, gradients in its last slab alone, all ranks in the file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from library.errors import UserError
from networks import dylora, lora
from networks.core.adapter import LayerSpec
from networks.dylora import DyLoRAModule
from networks.lora import LoRAModule, low_rank_delta
from tests.networks.cases import acting, attached, layer_and_input, stream
from tests.networks.test_training import Wrapped

LAYERS = pytest.mark.parametrize("layer_name", ["linear", "conv 1x1", "conv 3x3"])


def module(layer: nn.Module, *, rank: int = 8, unit: int = 2, **options) -> DyLoRAModule:
    adapter = DyLoRAModule(LayerSpec.of(layer), rank=rank, alpha=3.0, unit=unit, **options)
    adapter.initialise(stream(), layer.get_parameter("weight"))
    return acting(adapter)


def network_of(models, rank: int = 8, **network_args) -> dylora.creation.AdapterNetwork:
    return dylora.create_network(1.0, rank, 4, None, models.text_encoder, models.unet, **network_args)


def drawn_ranks(network) -> set[int]:
    return {adapter.drawn_rank for _, adapter in network.items()}


@LAYERS
@pytest.mark.parametrize(("draw", "rank"), [(0.0, 2), (0.24, 2), (0.25, 4), (0.6, 6), (0.999, 8)])
def test_a_step_uses_the_ranks_drawn_and_trains_the_last_slab(layer_name, draw, rank):
    layer, x = layer_and_input(layer_name)
    adapter = module(layer).train()
    adapter.begin_step(draw, largest_rank=8)
    out = attached(layer, adapter, x)
    saved = adapter.tensors()
    down, up = saved["lora_down.weight"][:rank], saved["lora_up.weight"][:, :rank]
    delta = low_rank_delta(down, up, 3.0 / 8 * math.sqrt(8 / rank))
    torch.testing.assert_close(out - layer(x), adapter.spec.apply(x, delta), rtol=1e-4, atol=1e-4)

    out.square().sum().backward()
    last = rank // 2 - 1
    for place, slabs in enumerate(zip(adapter.lora_down, adapter.lora_up, strict=True)):
        for slab in slabs:
            assert (slab.grad is not None) == (place == last)
    assert all(slab.grad.abs().max() > 0 for slab in (adapter.lora_down[last], adapter.lora_up[last]))


def test_what_a_step_does_not_train_stays_bit_for_bit():
    """Neither moments from earlier steps nor weight decay move it."""
    layer, x = layer_and_input("linear")
    adapter = module(layer).train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    for draw in (0.9, 0.3, 0.1):
        before = [slab.detach().clone() for slab in (*adapter.lora_down, *adapter.lora_up)]
        adapter.begin_step(draw, largest_rank=8)
        attached(layer, adapter, x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = [not torch.equal(a, b) for a, b in zip(before, (*adapter.lora_down, *adapter.lora_up), strict=True)]
        trained = [place == int(draw * 4) for place in range(4)]
        assert moved == trained * 2


@LAYERS
def test_outside_training_all_ranks_act_whatever_was_drawn(layer_name):
    layer, x = layer_and_input(layer_name)
    adapter = module(layer).eval()
    whole = attached(layer, adapter, x)
    delta = adapter.delta_weight(layer.weight)
    adapter.begin_step(0.0, largest_rank=8)
    assert torch.equal(attached(layer, adapter, x), whole)
    assert not torch.equal(attached(layer, adapter.train(), x), whole)
    assert torch.equal(adapter.delta_weight(layer.weight), delta), "norms, merging and files are those of the full rank"


def test_one_rank_for_the_whole_network_from_seed_and_step_alone(sd1):
    network = network_of(sd1, unit=2, conv_dim=4)
    seen = []
    for step in range(40):
        network.begin_step(1, step)
        (largest,) = {adapter.drawn_rank for _, adapter in network.items() if adapter.rank == 8}
        assert {adapter.drawn_rank for _, adapter in network.items() if adapter.rank == 4} == {min(largest, 4)}
        seen.append(largest)
    assert {seen.count(rank) > 3 for rank in (2, 4, 6, 8)} == {True}
    torch.manual_seed(99)
    network.begin_step(1, 7)
    assert drawn_ranks(network) == {seen[7], min(seen[7], 4)}
    others = []
    for step in range(40):
        network.begin_step(2, step)
        others.append(max(drawn_ranks(network)))
    assert others != seen


def test_gradient_checkpointing_computes_the_same_step_again(sd1, perturb):
    network = perturb(network_of(sd1, module_dropout=0.2, dropout=0.2))
    network.apply_to(sd1.text_encoder, sd1.unet)
    network.prepare_optimizer_params(None, None, 1e-3)
    network.on_epoch_start()
    sd1.unet.train()

    def loss_and_gradients():
        network.zero_grad()
        network.begin_step(3, 5)
        torch.manual_seed(11)
        loss = sd1.picture().square().mean() + sd1.text().square().mean()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    plain, expected = loss_and_gradients()
    sd1.unet.enable_gradient_checkpointing()
    try:
        again, found = loss_and_gradients()
    finally:
        sd1.unet.disable_gradient_checkpointing()
        sd1.unet.eval()
    assert again == plain
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["dropout", "module_dropout"])
def test_dropouts_act_in_training_alone(kind):
    layer, x = layer_and_input("linear")
    plain, dropping = module(layer), module(layer, **{kind: 0.5})
    dropping.load_tensors(plain.tensors())
    expected = attached(layer, plain, x)
    assert torch.equal(attached(layer, dropping.eval(), x), expected)
    dropping.train()
    torch.manual_seed(0)
    outputs = [attached(layer, dropping, x) for _ in range(12)]
    assert any(not torch.allclose(out, expected) for out in outputs)
    if kind == "module_dropout":
        assert {torch.equal(out, expected) or torch.equal(out, layer(x)) for out in outputs} == {True}


def test_a_rank_that_unit_does_not_divide_is_refused(sd1):
    with pytest.raises(UserError, match=r"^--network_args: lora_te_\S+: rank 10 is no multiple of unit 4$"):
        network_of(sd1, 10, unit="4")
    with pytest.raises(UserError, match="lora_unet_conv_in|lora_unet_down.*: rank 6 is no multiple of unit 4$"):
        network_of(sd1, 8, unit="4", conv_dim="6")
    with pytest.raises(UserError, match="--network_args unit: '0' is not a whole number of 1 or more"):
        network_of(sd1, 8, unit="0")


@pytest.mark.parametrize("layer_name", ["linear", "conv 3x3"])
def test_its_file_is_a_lora_file(layer_name):
    layer, x = layer_and_input(layer_name)
    adapter = module(layer).eval()
    read = LoRAModule.from_tensors(adapter.spec, adapter.tensors()).eval()
    torch.testing.assert_close(attached(layer, read, x), attached(layer, adapter, x))
    assert adapter.tensors().keys() == read.tensors().keys()
    back = module(layer, unit=4)
    back.load_tensors(read.tensors())
    assert all(torch.equal(tensor, adapter.tensors()[name]) for name, tensor in back.tensors().items())


def test_training_goes_on_from_a_file(sd1, perturb, tmp_path):
    """Of DyLoRA, or of LoRA, which it cannot be told from; with --dim_from_weights it stays DyLoRA."""
    path = tmp_path / "a.safetensors"
    first = perturb(lora.create_network(1.0, 8, 4, None, None, sd1.unet))
    first.save_weights(path, None, None)
    going_on = network_of(sd1, unit=4)
    going_on.keep_parts(["denoiser"])
    going_on.load_weights(path)
    with pytest.raises(UserError, match="has rank 8 in the file and 12 in the network"):
        dylora.create_network(1.0, 12, 4, None, None, sd1.unet).load_weights(path)
    from_file, _ = dylora.create_network_from_weights(1.0, path, None, None, sd1.unet, unit="4")
    for network in (going_on, from_file):
        assert {(type(adapter), adapter.unit) for _, adapter in network.items()} == {(DyLoRAModule, 4)}
        assert network.file_tensors().keys() == first.file_tensors().keys()
        assert all(torch.equal(tensor, first.file_tensors()[name]) for name, tensor in network.file_tensors().items())
    from_file.load_state_dict(first.file_tensors())
    again, _ = lora.create_network_from_weights(1.0, path, None, None, sd1.unet)
    assert {type(adapter) for _, adapter in again.items()} == {LoRAModule}


def test_lora_plus_raises_the_rate_of_the_up_slabs(sd1):
    network = network_of(sd1, loraplus_lr_ratio="4")
    groups, names = network.prepare_optimizer_params(1e-3, 1e-3, None)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert "unet plus" in names
    for _, adapter in network.items():
        assert {rates[id(slab)] for slab in adapter.lora_up} == {4e-3}
        assert {rates[id(slab)] for slab in adapter.lora_down} == {1e-3}


def test_slabs_that_rest_have_no_gradient_under_distributed_data_parallel(sd1, perturb, tmp_path):
    network = perturb(dylora.create_network(1.0, 8, 4, None, None, sd1.unet, unit=2))
    network.apply_to(None, sd1.unet)
    network.prepare_optimizer_params(None, 1e-3, None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Wrapped(network, sd1.unet), find_unused_parameters=True)
        for step in range(3):
            network.zero_grad()
            network.begin_step(1, step)
            (drawn,) = drawn_ranks(network)
            wrapped(sd1).square().mean().backward()
            for _, adapter in network.items():
                assert [slab.grad is not None for slab in adapter.lora_up] == [2 * (i + 1) == drawn for i in range(4)]
    finally:
        torch.distributed.destroy_process_group()
