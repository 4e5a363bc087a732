"""A network under the trainer's machinery: autocast, checkpointing, torch.compile, DDP; gradients in the adapters alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import lora


def train_mode_network(models, perturb, **args):
    network = perturb(lora.create_network(1.0, 4, 2, None, models.text_encoder, models.unet, conv_dim=2, **args))
    network.apply_to(models.text_encoder, models.unet)
    network.prepare_optimizer_params(None, None, 1e-3)
    network.on_epoch_start(models.text_encoder, models.unet)
    return network


def gradients(models, network):
    network.zero_grad()
    torch.manual_seed(11)
    (models.picture().square().mean() + models.text().square().mean()).backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def test_every_adapter_and_nothing_else_takes_gradients(sd1, perturb):
    network = train_mode_network(sd1, perturb)
    found = gradients(sd1, network)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert all(p.grad is None for part in (sd1.unet, sd1.text_encoder) for p in part.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_same_dropouts(sd1, perturb, reentrant):
    network = train_mode_network(sd1, perturb, dropout="0.2", rank_dropout="0.3", module_dropout="0.2")
    sd1.unet.train()
    sd1.latents.requires_grad_(reentrant)  # what the re-entrant form asks of its caller
    try:
        expected = gradients(sd1, network)

        def checkpoint(function, *args):
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)

        sd1.unet.enable_gradient_checkpointing(checkpoint)
        network.enable_gradient_checkpointing()
        found = gradients(sd1, network)
    finally:
        sd1.unet.disable_gradient_checkpointing()
        sd1.unet.eval()
        sd1.latents.requires_grad_(False).grad = None
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_compiled_in_one_graph(sd1, perturb):
    """One block with attention, residual and resampling layers; the whole U-Net traces likewise, in a minute."""
    network = train_mode_network(sd1, perturb, rank_dropout="0.3", module_dropout="0.2").eval()
    block = sd1.unet.down_blocks[0]
    inputs = (torch.randn(2, 32, 8, 8), torch.randn(2, 128), sd1.context)
    expected = block(*inputs)[0]
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs)[0], expected)
    network.train()
    compiled(*inputs)[0].mean().backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_stay_fp32_and_close(sd1, perturb, dtype):
    network = train_mode_network(sd1, perturb)
    expected = gradients(sd1, network)
    with torch.autocast("cpu", dtype):
        found = gradients(sd1, network)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    found, expected = (torch.cat([gradient.flatten() for gradient in each.values()]) for each in (found, expected))
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99
    torch.testing.assert_close(found.norm(), expected.norm(), rtol=0.05, atol=0)


class Wrapped(nn.Module):
    """What the trainer prepares: network and U-Net in one module."""

    def __init__(self, network: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.network, self.unet = network, unet

    def forward(self, models) -> torch.Tensor:
        return self.unet(models.latents, torch.tensor([10, 500]), models.context).sample


def test_one_module_under_distributed_data_parallel(sd1, perturb, tmp_path):
    network = lora.create_network(1.0, 4, 2, None, None, sd1.unet)
    perturb(network).apply_to(None, sd1.unet)
    network.prepare_optimizer_params(None, 1e-3, None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(Wrapped(network, sd1.unet))
        wrapped(sd1).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


def test_training_learns_and_the_file_holds_what_was_learned(sd1, tmp_path):
    network = lora.create_network(1.0, 4, 4, None, sd1.text_encoder, sd1.unet)
    network.apply_to(sd1.text_encoder, sd1.unet)
    groups, _ = network.prepare_optimizer_params(1e-2, 1e-2, None)
    optimizer = torch.optim.AdamW(groups)
    target = torch.randn(sd1.latents.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(6):
        loss = (sd1.picture() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    trained = sd1.picture()
    network.save_weights(tmp_path / "a.safetensors", None, None)
    network.detach()
    again, _ = lora.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, sd1.text_encoder, sd1.unet)
    again.attach()
    assert torch.equal(sd1.picture(), trained)
