"""The demo model's parts: Stable Diffusion 1's structure at a hundredth of its size."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCALING_FACTOR = 0.18215
TEXT_WIDTH = 64
MAX_TOKENS = 77
MERGES_FILE = Path(__file__).with_name("clip_bpe_merges.txt.gz")
BETA_START, BETA_END, NUM_TIMESTEPS = 0.00085, 0.012, 1000
SCHEDULER_CONFIG: dict[str, object] = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": NUM_TIMESTEPS,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder: pictures (B, 3, 64, 64) to latents (B, 4, 8, 8).

    Channels are few where pixels are many. Four groups instead of 32: with 16 channels, 32 is impossible and 16 would
    normalise every channel alone, which hides how strong a flat colour is.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 80, 80),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
    )
    let_colours_through(vae)
    return vae


def build_unet() -> UNet2DConditionModel:
    """An untrained denoiser with Stable Diffusion 1's blocks, for latents (B, 4, 8, 8) and text (B, 77, 64).

    Widest where there are places to tell apart: the two inner levels see 2x2 and 1x1.
    """
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 72, 56, 56),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        # The innermost level is 1x1: 32 groups of four numbers would leave little of them.
        norm_num_groups=8,
    )
    start_silent = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            start_silent.append(module.conv2)
        elif isinstance(module, Transformer2DModel):
            start_silent.append(module.proj_out)
    for layer in start_silent:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return unet


def build_text_encoder(vocabulary: int) -> CLIPTextModel:
    """An untrained text encoder for a vocabulary of that many tokens."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        pad_token_id=1,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write CLIP's tokenizer as two files, vocabulary and merges, and load it from there."""
    merges = gzip.decompress(MERGES_FILE.read_bytes()).decode("utf-8").split("\n")
    merges = [line for line in merges if line and not line.startswith("#version")]
    symbols = list(bytes_to_unicode().values())
    words = symbols + [f"{symbol}</w>" for symbol in symbols] + ["".join(line.split()) for line in merges]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    compact = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(compact, encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def bytes_to_unicode() -> dict[int, str]:
    """The printable character that stands for each byte in byte-pair vocabularies, in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + place) for place, byte in enumerate(others)}


# Size of the constant channels that `let_colours_through` puts beside the colours.
_CONSTANT = 1.5


def _bias(conv: nn.Conv2d) -> Tensor:
    if conv.bias is None:
        raise ValueError("these convolutions are built with a bias")
    return conv.bias


def _pass_on(conv: nn.Conv2d, taps: Tensor) -> None:
    """Make the first 16 channels of a convolution hand on the same input channels, averaged over its taps."""
    conv.weight[:16] = 0.0
    _bias(conv)[:16] = 0.0
    for channel in range(16):
        conv.weight[channel, channel] = taps


def _spread(conv: nn.Conv2d, sources: int) -> None:
    """Put input channel j into channels 4j and, negated, 4j + 1; channels 4j + 2 and 4j + 3 become constants."""
    conv.weight[:16] = 0.0
    for group in range(4):
        if group < sources:
            conv.weight[4 * group, group, 1, 1] = 1.0
            conv.weight[4 * group + 1, group, 1, 1] = -1.0
        _bias(conv)[4 * group : 4 * group + 4] = torch.tensor([0.0, 0.0, _CONSTANT, -_CONSTANT])


def _gather(conv: nn.Conv2d, count: int) -> None:
    """Undo `_spread` after normalisation and SiLU: silu(x) - silu(-x) = x."""
    conv.weight[:count] = 0.0
    _bias(conv)[:count] = 0.0
    for group in range(count):
        conv.weight[group, 4 * group, 1, 1] = _CONSTANT / 2**0.5
        conv.weight[group, 4 * group + 1, 1, 1] = -_CONSTANT / 2**0.5


@torch.no_grad()
def let_colours_through(vae: AutoencoderKL) -> None:
    """Start an autoencoder as "average each 8x8 block, paint it flat", so that training is left with shapes.

    Group normalisation divides a flat colour by its own strength; from random weights a small network needs thousands of
    steps to get colours past it. Here colours travel in pairs (x, -x) beside constant channels that dominate the
    normalisation's statistics and so make it nearly linear, and all residual branches start at zero.
    """
    centre, corner = torch.zeros(3, 3), torch.zeros(3, 3)
    centre[1, 1], corner[:2, :2] = 1.0, 0.25
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                _pass_on(module.conv_shortcut, torch.ones(1, 1))
        elif isinstance(module, Downsample2D):
            _pass_on(module.conv, corner)
        elif isinstance(module, Upsample2D):
            _pass_on(module.conv, centre)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)
            nn.init.zeros_(module.to_out[0].bias)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.weight.shape[0])[:, :, None, None])
        nn.init.zeros_(conv.bias)
    _spread(vae.encoder.conv_in, 3)
    _gather(vae.encoder.conv_out, 3)
    vae.encoder.conv_out.bias[4:] = -4.0  # logarithm of the variance: little noise at first
    _spread(vae.decoder.conv_in, 4)
    _gather(vae.decoder.conv_out, 3)
