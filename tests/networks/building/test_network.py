"""A network on a model: its effect comes and goes without a trace, adds to others', and is the same in the weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from networks import glora, lora
from networks.building.network import merge_for_good


def make(models, perturb, seed=0, **args):
    network = lora.create_network(1.0, 4, 2, None, models.text_encoder, models.unet, **args)
    return perturb(network, seed)


def weights(models):
    return [value.clone() for part in (models.unet, models.text_encoder) for value in part.state_dict().values()]


def same(before, after):
    return all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@torch.no_grad()
def test_detaching_leaves_the_model_as_it_was(sd1, perturb):
    base, state = sd1.both(), sd1.unet.state_dict().keys()
    network = make(sd1, perturb, conv_dim=2)
    assert torch.equal(sd1.both(), base), "a network that is not attached has no effect"
    network.attach()
    assert (sd1.both() - base).abs().max() > 0.05
    assert sd1.unet.state_dict().keys() == state
    network.detach()
    assert torch.equal(sd1.both(), base)
    assert not any(module._forward_hooks for module in sd1.unet.modules())


@torch.no_grad()
def test_a_new_network_changes_nothing(sd1):
    base = sd1.both()
    network = lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet, conv_dim="4")
    network.apply_to(sd1.text_encoder, sd1.unet)
    assert torch.equal(sd1.both(), base)


@torch.no_grad()
def test_attaching_twice_counts_once(sd1, perturb):
    network = make(sd1, perturb)
    network.attach()
    once = sd1.both()
    network.attach()
    assert torch.equal(sd1.both(), once)


@torch.no_grad()
@pytest.mark.parametrize("conv", [{}, {"conv_dim": 3}], ids=["lierla", "c3lier"])
def test_merged_equals_attached_and_unmerging_restores_every_bit(sd1, perturb, conv):
    network = make(sd1, perturb, **conv)
    before, base = weights(sd1), sd1.both()
    network.attach()
    attached = sd1.both()
    network.merge()
    assert not network.is_attached, "the effect would count twice"
    torch.testing.assert_close(sd1.both(), attached, rtol=1e-4, atol=2e-4)
    assert (sd1.both() - base).abs().max() > 0.05
    network.unmerge()
    assert same(before, weights(sd1))
    assert torch.equal(sd1.both(), base)


@torch.no_grad()
def test_unmerging_restores_half_precision_weights_too(sd1, perturb):
    network = make(sd1, perturb)
    try:
        sd1.unet.to(torch.bfloat16)
        rounded = weights(sd1)
        network.merge()
        assert not same(rounded, weights(sd1))
        network.unmerge()
        assert same(rounded, weights(sd1))
    finally:
        sd1.unet.to(torch.float32)
        from tests.support.tiny_models import fill_with_signal

        fill_with_signal(sd1.unet)


@torch.no_grad()
def test_two_networks_add_up_and_leave_in_any_order(sd1, perturb):
    first, second = make(sd1, perturb, 1), make(sd1, perturb, 2, conv_dim=2)
    layer = sd1.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(2, 5, layer.in_features)
    base = layer(x)
    first.attach()
    only_first, picture_first = layer(x), sd1.both()
    second.attach()
    both = layer(x)
    first.detach()
    only_second = layer(x)
    torch.testing.assert_close(both - base, (only_first - base) + (only_second - base), rtol=1e-4, atol=1e-5)
    assert (only_second - base).abs().max() > 0.01
    first.attach()
    second.detach()
    assert torch.equal(sd1.both(), picture_first)
    first.detach()
    assert torch.equal(layer(x), base)


@torch.no_grad()
def test_merged_networks_leave_in_reverse_order_only(sd1, perturb):
    first, second = make(sd1, perturb, 1), make(sd1, perturb, 2)
    before = weights(sd1)
    first.merge()
    second.merge()
    with pytest.raises(RuntimeError, match="another network was merged later"):
        first.unmerge()
    second.unmerge()
    first.unmerge()
    assert same(before, weights(sd1))


def test_a_merged_network_cannot_be_attached_or_merged_again(sd1, perturb):
    network = make(sd1, perturb)
    network.merge()
    for action in (network.attach, network.merge):
        with pytest.raises(RuntimeError, match="merged"):
            action()
    network.unmerge()


@torch.no_grad()
def test_strengths_by_part(sd1, perturb):
    network = make(sd1, perturb)
    picture, text = sd1.picture(), sd1.text()
    network.attach()
    network.set_multipliers(text_encoder=0, denoiser=1)
    assert torch.equal(sd1.text(), text)
    assert not torch.equal(sd1.picture(), picture)
    network.set_multipliers(text_encoder=1, denoiser=0)
    assert not torch.equal(sd1.text(), text)
    assert torch.equal(sd1.picture(), picture)
    network.set_multiplier(0)
    assert torch.equal(sd1.both(), torch.cat([picture.flatten(), text.flatten()]))


@torch.no_grad()
def test_strengths_by_block_leave_the_weights_alone(sd1, perturb):
    network = make(sd1, perturb)
    tensors = {key: value.clone() for key, value in network.state_dict().items()}
    network.attach()
    full = sd1.picture()
    network.set_multipliers(text_encoder=1, denoiser=1, blocks=[1.0] * 25)
    torch.testing.assert_close(sd1.picture(), full)
    only_middle = [0.0] * 25
    only_middle[12] = 0.5
    network.set_multipliers(text_encoder=1, denoiser=1, blocks=only_middle)
    used = {target.block for target, adapter in network.items() if target.part == "denoiser" and adapter.multiplier}
    assert used == {12}
    assert all(torch.equal(value, tensors[key]) for key, value in network.state_dict().items())


def test_a_wrong_number_of_block_strengths_is_named(sd1, perturb):
    with pytest.raises(ValueError, match="24 block strengths given, 25 wanted"):
        make(sd1, perturb).set_multipliers(text_encoder=1, denoiser=1, blocks=[1.0] * 24)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [((True, False), {"text_encoder"}), ((False, True), {"denoiser"}), ((True, True), {"text_encoder", "denoiser"})],
)
def test_only_the_chosen_parts_are_kept(sd1, flags, parts):
    network = lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet)
    network.apply_to(sd1.text_encoder, sd1.unet, *flags)
    assert {target.part for target in network.targets.values()} == parts
    prefixes = {"text_encoder": "lora_te_", "denoiser": "lora_unet_"}
    assert {key.startswith(tuple(prefixes[part] for part in parts)) for key in network.state_dict()} == {True}


def test_a_network_for_another_model_is_refused(sd1, sd2):
    network = lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet)
    with pytest.raises(ValueError, match="made for another model"):
        network.apply_to(sd2.text_encoder, sd2.unet)


def test_the_base_is_no_part_of_the_network(sd1):
    network = lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet)
    base = {id(parameter) for part in (sd1.unet, sd1.text_encoder) for parameter in part.parameters()}
    assert not base & {id(parameter) for parameter in network.parameters()}
    assert len(network.state_dict()) == 3 * len(network.targets)


@torch.no_grad()
def test_merging_for_good_adds_the_given_weights(sd1, perturb):
    network = make(sd1, perturb, 1)
    network.attach()
    attached = sd1.both()
    network.detach()
    before = [part.state_dict() for part in (sd1.unet, sd1.text_encoder)]
    before = [{key: value.clone() for key, value in state.items()} for state in before]
    other = lora.create_network(1.0, 4, 2, None, sd1.text_encoder, sd1.unet)
    other.merge_to(sd1.text_encoder, sd1.unet, network.state_dict())
    merged = sd1.both()
    sd1.unet.load_state_dict(before[0])
    sd1.text_encoder.load_state_dict(before[1])
    torch.testing.assert_close(merged, attached, rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_max_norm_scales_what_is_too_large_and_nothing_else(sd1, perturb):
    network = make(sd1, perturb, conv_dim=2)

    def norms():
        return torch.stack([adapter.delta_weight(target.layer.weight).norm() for target, adapter in network.items()])

    before = norms()
    limit = 1.0001 * before.median().item()  # away from every norm, so that rounding decides nothing
    small = [name for name, norm in zip(network.targets, before, strict=True) if norm < limit]
    kept = {name: network.adapter(name).lora_up.weight.clone() for name in small}
    scaled, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    assert scaled == (before > limit).sum()
    torch.testing.assert_close(norms(), before.clamp(max=limit), rtol=1e-4, atol=1e-5)
    assert mean == pytest.approx(norms().mean().item(), rel=1e-4)
    assert largest == pytest.approx(limit, rel=1e-4)
    assert all(torch.equal(network.adapter(name).lora_up.weight, value) for name, value in kept.items())


def test_max_norm_of_a_new_network_is_zero(sd1):
    network = lora.create_network(1.0, 4, 1, None, sd1.text_encoder, sd1.unet)
    assert network.apply_max_norm_regularization(1.0, "cpu") == (0, 0.0, 0.0)


def test_a_file_says_of_which_forms_its_layers_are(sd1, tmp_path):
    network = lora.create_network(1.0, 4, 2, None, sd1.text_encoder, sd1.unet, dora_wd=True)
    network.save_weights(tmp_path / "a.safetensors", None, {"ss_network_module": "networks.lora"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        variants = json.loads(file.metadata()["ss_network_variants"])
    assert variants == {"LoRA with DoRA per input": len(network.targets)}


def readers_of_the_base(models, perturb):
    """Two networks whose change depends on the base weight, and one whose does not."""
    dora = make(models, perturb, 1, dora_wd=True)
    other = perturb(glora.create_network(1.0, 4, 2, None, models.text_encoder, models.unet), 2)
    return dora, other, make(models, perturb, 3)


@torch.no_grad()
@pytest.mark.parametrize("for_good", [False, True], ids=["undone", "for good"])
def test_several_merged_networks_give_what_they_give_attached(sd1, perturb, for_good):
    base, before = sd1.both(), weights(sd1)
    networks = readers_of_the_base(sd1, perturb)
    for network, strength in zip(networks, (1.0, -0.5, 0.7), strict=True):
        network.set_multiplier(strength)
        network.attach()
    attached = sd1.both()
    for network in networks:
        network.detach()
    if for_good:
        merge_for_good(networks)
    else:
        for network in networks:
            network.merge()
    torch.testing.assert_close(
        sd1.both() - base, attached - base, rtol=1e-3, atol=1e-4 * (attached - base).abs().max().item()
    )
    if for_good:
        for part in (sd1.unet, sd1.text_encoder):
            for value in part.state_dict().values():
                value.copy_(before.pop(0))
    else:
        for network in reversed(networks):
            network.unmerge()
    assert torch.equal(sd1.both(), base)


def test_a_change_that_depends_on_merged_weights_is_refused(sd1, perturb):
    dora, _, plain = readers_of_the_base(sd1, perturb)
    before = weights(sd1)
    plain.merge()
    with pytest.raises(RuntimeError, match="depends on weights that another network is merged into"):
        dora.attach()
    plain.unmerge()
    dora.attach()
    with pytest.raises(RuntimeError, match="an attached network's change depends on these weights"):
        plain.merge()
    dora.detach()
    assert same(before, weights(sd1))


def test_a_merge_that_fails_leaves_the_weights_as_they_were(sd1, perturb, monkeypatch):
    network = make(sd1, perturb)
    last = list(network.targets)[-1]
    monkeypatch.setattr(network.adapter(last), "delta_weight", lambda base_weight: 1 / 0)
    before = weights(sd1)
    with pytest.raises(ZeroDivisionError):
        network.merge()
    assert same(before, weights(sd1))
    network.attach()
    network.detach()
