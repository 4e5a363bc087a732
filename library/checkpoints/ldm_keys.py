"""The names of a tensor in the original (LDM) layout and in diffusers' and transformers' modules: one table, both ways.

A table is a list of pairs of name beginnings; what follows them is the same on both sides. Names are relative to their part
(see `UNET_PREFIX`, `VAE_PREFIX`, `TextEncoder.file_prefixes`). The relation is that of the published models; the U-Net's can
be checked in diffusers/scripts/convert_diffusers_to_original_stable_diffusion.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.families.family import TextEncoder

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
Pairs = Iterator[tuple[str, str]]


class KeyTable:
    """Pairs (original, module) of name beginnings, each ending where a dot or the name's end follows."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        listed = list(pairs)
        self._to_module = dict(listed)
        self._to_original = {module: original for original, module in listed}
        if not len(listed) == len(self._to_module) == len(self._to_original):
            raise ValueError("a key table must be one to one")

    def pairs(self) -> Iterable[tuple[str, str]]:
        """All pairs."""
        return self._to_module.items()

    def to_module(self, key: str) -> str | None:
        """The module's name for an original key; None for a key that is not in the table."""
        return _replaced(key, self._to_module)

    def to_original(self, name: str) -> str | None:
        """The original key for a module's tensor; None for a name that is not in the table."""
        return _replaced(name, self._to_original)


def _replaced(name: str, beginnings: Mapping[str, str]) -> str | None:
    """Replace the longest known beginning."""
    cut = len(name)
    while cut > 0:
        known = beginnings.get(name[:cut])
        if known is not None:
            return known + name[cut:]
        cut = name.rfind(".", 0, cut)
    return None


_UNET_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_VAE_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
_VAE_ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)


def _below(original: str, module: str, leaves: Iterable[tuple[str, str]]) -> Pairs:
    for original_leaf, module_leaf in leaves:
        yield f"{original}.{original_leaf}", f"{module}.{module_leaf}"


def unet_table(config: Mapping[str, Any]) -> KeyTable:
    """For a U-Net of diffusers' configuration `config`."""
    return KeyTable(_unet_pairs(config))


def _unet_pairs(config: Mapping[str, Any]) -> Pairs:
    yield from _unet_encoder_pairs(config)
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"
    layers, up_types = config["layers_per_block"], config["up_block_types"]
    places = layers + 1  # of a block among output_blocks: its layers, the last of them with the upsampler
    for block, kind in enumerate(up_types):
        with_attention = kind.startswith("CrossAttn")
        for layer in range(places):
            original, module = f"output_blocks.{places * block + layer}", f"up_blocks.{block}"
            yield from _below(f"{original}.0", f"{module}.resnets.{layer}", _UNET_RESNET)
            if with_attention:
                yield f"{original}.1", f"{module}.attentions.{layer}"
        if block < len(up_types) - 1:
            # The upsampler follows the resnet and, where there is one, the attention of the block's last layer.
            place = 2 if with_attention else 1
            yield f"output_blocks.{places * block + layers}.{place}.conv", f"up_blocks.{block}.upsamplers.0.conv"


def _unet_encoder_pairs(config: Mapping[str, Any]) -> Pairs:
    """What a U-Net and a ControlNet have in common: everything to the middle."""
    yield "time_embed.0", "time_embedding.linear_1"
    yield "time_embed.2", "time_embedding.linear_2"
    if config.get("addition_embed_type"):
        yield "label_emb.0.0", "add_embedding.linear_1"
        yield "label_emb.0.2", "add_embedding.linear_2"
    yield "input_blocks.0.0", "conv_in"
    yield from _below("middle_block.0", "mid_block.resnets.0", _UNET_RESNET)
    yield "middle_block.1", "mid_block.attentions.0"
    yield from _below("middle_block.2", "mid_block.resnets.1", _UNET_RESNET)

    layers, down_types = config["layers_per_block"], config["down_block_types"]
    places = layers + 1  # of a block among input_blocks: its layers and its downsampler
    for block, kind in enumerate(down_types):
        for layer in range(layers):
            original, module = f"input_blocks.{1 + places * block + layer}", f"down_blocks.{block}"
            yield from _below(f"{original}.0", f"{module}.resnets.{layer}", _UNET_RESNET)
            if kind.startswith("CrossAttn"):
                yield f"{original}.1", f"{module}.attentions.{layer}"
        if block < len(down_types) - 1:
            yield f"input_blocks.{places * (block + 1)}.0.op", f"down_blocks.{block}.downsamplers.0.conv"


def transformer_depth(config: Mapping[str, Any], attention: str) -> int:
    """How many transformer blocks an attention block of a U-Net has, by its name there ("up_blocks.0.attentions.1")."""
    depths = config.get("transformer_layers_per_block", 1)
    if isinstance(depths, int):
        return depths
    side, level, *_ = attention.split(".")
    of_side = {"down_blocks": depths, "up_blocks": depths[::-1]}
    return int(of_side[side][int(level)] if side in of_side else depths[-1])


def control_net_table(config: Mapping[str, Any]) -> KeyTable:
    """For a ControlNet of diffusers' configuration `config`."""
    return KeyTable(_control_net_pairs(config))


def _control_net_pairs(config: Mapping[str, Any]) -> Pairs:
    yield from _unet_encoder_pairs(config)
    hint = "controlnet_cond_embedding"
    widened = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)
    yield "input_hint_block.0", f"{hint}.conv_in"
    for number in range(widened):  # activations stand between the convolutions
        yield f"input_hint_block.{2 + 2 * number}", f"{hint}.blocks.{number}"
    yield f"input_hint_block.{2 + 2 * widened}", f"{hint}.conv_out"
    for skip in range((config["layers_per_block"] + 1) * len(config["down_block_types"])):
        yield f"zero_convs.{skip}.0", f"controlnet_down_blocks.{skip}"
    yield "middle_block_out.0", "controlnet_mid_block"


def vae_table(config: Mapping[str, Any]) -> KeyTable:
    """For an autoencoder of diffusers' configuration `config`."""
    return KeyTable(_vae_pairs(len(config["block_out_channels"]), config["layers_per_block"]))


def _vae_pairs(levels: int, layers: int) -> Pairs:
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_in", f"{half}.conv_in"
        yield f"{half}.norm_out", f"{half}.conv_norm_out"
        yield f"{half}.conv_out", f"{half}.conv_out"
        yield from _below(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _VAE_RESNET)
        yield from _below(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION)
        yield from _below(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _VAE_RESNET)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        mirrored = levels - 1 - level  # the original counts the decoder's levels by resolution, diffusers by order of use
        for layer in range(layers):
            yield from _below(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", _VAE_RESNET)
        for layer in range(layers + 1):
            yield from _below(f"decoder.up.{mirrored}.block.{layer}", f"{up}.resnets.{layer}", _VAE_RESNET)
        if level < levels - 1:
            yield f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"
            yield f"decoder.up.{mirrored}.upsample.conv", f"{up}.upsamplers.0.conv"


_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_vae_name(name: str) -> str:
    """Today's name of a tensor in a diffusers VAE; folders from before 2023 (SD 1.5's) name the attention differently."""
    if ".attentions." not in name:
        return name
    return ".".join(_OLD_VAE_ATTENTION.get(part, part) for part in name.split("."))


_OPEN_CLIP_LAYER = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)
_THIRDS = ("q_proj", "k_proj", "v_proj")


def text_table(encoder: TextEncoder, layers: int) -> KeyTable:
    """For a text encoder with `layers` layers (those that the module has).

    OpenCLIP keeps queries, keys and values in one tensor, and its projection the other way round than transformers:
    `in_proj_weight[1]` stands for the second third of its rows, `text_projection[T]` for the transpose (`split_view`).
    """
    level = "text_model." if encoder.gives_pooled else ""  # transformers keeps what projects around what does not
    pairs = _clip_pairs() if encoder.layout == "clip" else _open_clip_pairs(layers)
    table = [(original, level + module) for original, module in pairs]
    if encoder.gives_pooled:
        table.append(("text_projection[T]", "text_projection.weight"))
    return KeyTable(table)


def _clip_pairs() -> Pairs:
    for name in ("embeddings", "encoder", "final_layer_norm"):
        yield name, name


def _open_clip_pairs(layers: int) -> Pairs:
    yield "token_embedding", "embeddings.token_embedding"
    yield "positional_embedding", "embeddings.position_embedding.weight"
    yield "ln_final", "final_layer_norm"
    for layer in range(layers):
        original, module = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        yield from _below(original, module, _OPEN_CLIP_LAYER)
        for third, name in enumerate(_THIRDS):
            for kind in ("weight", "bias"):
                yield f"{original}.attn.in_proj_{kind}[{third}]", f"{module}.self_attn.{name}.{kind}"


TRANSPOSED = "T"
VIEWS = ("0", "1", "2", TRANSPOSED)
"""How a module's tensor lies in a file's: as a third of its rows, or transposed."""


def split_view(key: str) -> tuple[str, str]:
    """Split "in_proj_weight[1]" into ("in_proj_weight", "1"); a key of a whole tensor into (key, "")."""
    if key.endswith("]"):
        name, _, view = key[:-1].rpartition("[")
        return name, view
    return key, ""
