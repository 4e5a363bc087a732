"""A U-Net that shrinks computes what a hand-written pass does, and without the hooks what it did before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from library.errors import UserError
from library.families.family import DepthCount
from library.generation.deep_shrink import DeepShrink, deep_shrink
from tests.library.generation.conftest import tiny_models


def by_hand(unet, sample: Tensor, timestep: Tensor, context: Tensor, depth: int | None, ratio: float) -> Tensor:
    """The U-Net's forward pass written out, for latents whose sides are multiples of 8."""
    emb = unet.time_embedding(unet.time_proj(timestep.expand(len(sample))))

    def layers(block, hidden, join=lambda hidden: hidden):
        for number, resnet in enumerate(block.resnets):
            hidden = resnet(join(hidden), emb)
            if hasattr(block, "attentions"):
                hidden = block.attentions[number](hidden, encoder_hidden_states=context, return_dict=False)[0]
            yield hidden

    def joined(hidden):
        skip = skips.pop()
        if hidden.shape[-2:] != skip.shape[-2:]:
            hidden = functional.interpolate(hidden, size=skip.shape[-2:], mode="bicubic", align_corners=False)
        return torch.cat([hidden, skip], dim=1)

    hidden = unet.conv_in(sample)
    skips = [hidden]
    for number, block in enumerate(unet.down_blocks):
        if number == depth:
            hidden = functional.interpolate(hidden, scale_factor=ratio, mode="bicubic", align_corners=False)
        skips += list(layers(block, hidden))
        for downsampler in block.downsamplers or []:
            skips.append(downsampler(skips[-1]))
        hidden = skips[-1]
    hidden = unet.mid_block(hidden, emb, encoder_hidden_states=context)
    for block in unet.up_blocks:
        *_, hidden = layers(block, hidden, joined)
        for upsampler in block.upsamplers or []:
            hidden = upsampler(hidden)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 24, 16, generator=stream), torch.randn(2, 77, 32, generator=stream)


def predicted(models, inputs, timestep: int, settings: DeepShrink | None) -> Tensor:
    with torch.no_grad(), deep_shrink(models.denoiser, settings):
        return models.denoiser(inputs[0], torch.tensor(timestep), encoder_hidden_states=inputs[1]).sample


def expected(models, inputs, timestep: int, depth: int | None, ratio: float = 0.5) -> Tensor:
    with torch.no_grad():
        return by_hand(models.denoiser, inputs[0], torch.tensor(timestep), inputs[1], depth, ratio)


@pytest.mark.parametrize(("depth", "ratio"), [(0, 0.5), (1, 0.5), (2, 0.5), (3, 0.5), (0, 0.6), (1, 0.7)])
def test_any_depth_and_ratio_is_what_a_pass_by_hand_gives(sd1_models, inputs, depth, ratio):
    plain = predicted(sd1_models, inputs, 700, None)
    torch.testing.assert_close(expected(sd1_models, inputs, 700, None), plain)
    shrunk = predicted(sd1_models, inputs, 700, DeepShrink(depth_1=depth, ratio=ratio))
    assert (shrunk - plain).abs().max() > 0.01
    torch.testing.assert_close(shrunk, expected(sd1_models, inputs, 700, depth, ratio))


def test_depths_follow_the_timestep_and_the_last_steps_are_untouched(sd1_models, inputs):
    settings = DeepShrink(depth_1=2, until_1=800, depth_2=1, until_2=600)
    for timestep, depth in ((999, 2), (800, 2), (799, 1), (600, 1)):
        found = predicted(sd1_models, inputs, timestep, settings)
        torch.testing.assert_close(found, expected(sd1_models, inputs, timestep, depth))
    assert torch.equal(predicted(sd1_models, inputs, 599, settings), predicted(sd1_models, inputs, 599, None))
    assert [DeepShrink(depth_1=1).depth_at(timestep) for timestep in (650, 649)] == [1, None]


def test_the_model_is_as_before_when_the_context_ends_even_by_an_error(sd1_models, inputs):
    before = predicted(sd1_models, inputs, 999, None)
    with pytest.raises(UserError, match="the picture is too small for Deep Shrink at depth 3; take a smaller depth"):
        predicted(sd1_models, (inputs[0][..., :8, :8], inputs[1]), 999, DeepShrink(depth_1=3))
    assert torch.equal(predicted(sd1_models, inputs, 999, None), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sd1_models.denoiser.modules())


def test_half_precision_stays_half(sd1_models, inputs):
    import copy

    unet = copy.deepcopy(sd1_models.denoiser).bfloat16()
    with torch.no_grad(), deep_shrink(unet, DeepShrink(depth_1=1)):
        found = unet(inputs[0].bfloat16(), 999, encoder_hidden_states=inputs[1].bfloat16()).sample
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def test_values_out_of_range_are_told_at_once(sd1_models, inputs):
    with pytest.raises(UserError) as told:
        DeepShrink(depth_1=-1, until_1=2000, until_2=-1, ratio=0)
    assert [problem.what for problem in told.value.problems] == [
        "-1 is no depth of Deep Shrink",
        "timestep 2000 of Deep Shrink is out of range",
        "timestep -1 of Deep Shrink is out of range",
        "a ratio of 0 of Deep Shrink is out of range",
    ]
    with pytest.raises(UserError, match="Deep Shrink cannot act at depth 8 of this U-Net; give 0 to 3"):
        predicted(sd1_models, inputs, 999, DeepShrink(depth_1=8))


def test_depths_may_count_input_blocks_three_to_a_level():
    """The first of a level is the level itself; the others are its second layer and its downsampler."""
    models = tiny_models("sdxl")
    stream = torch.Generator().manual_seed(0)
    latents, context = torch.randn(1, 4, 24, 16, generator=stream), torch.randn(1, 77, 80, generator=stream)
    more = {"text_embeds": torch.randn(1, 40, generator=stream), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}

    def predicted(settings: DeepShrink | None, count: DepthCount) -> Tensor:
        with torch.no_grad(), deep_shrink(models.denoiser, settings, count):
            told = {"encoder_hidden_states": context, "added_cond_kwargs": more}
            return models.denoiser(latents, torch.tensor(700), **told).sample

    plain = predicted(None, "levels")
    of_depths = {depth: predicted(DeepShrink(depth_1=depth), "input blocks") for depth in range(1, 9)}
    for level in range(3):
        assert torch.equal(of_depths[1 + 3 * level], predicted(DeepShrink(depth_1=level), "levels"))
    found = [plain, *of_depths.values()]
    assert all((one - other).abs().max() > 1e-3 for place, one in enumerate(found) for other in found[:place])
    with pytest.raises(UserError, match="Deep Shrink cannot act at depth 0 of this U-Net; give 1 to 8"):
        predicted(DeepShrink(depth_1=0), "input blocks")
