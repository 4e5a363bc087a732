"""The configuration of a model part from the shapes of its tensors in the original layout.

Everything but three things shows in the shapes. Those three follow the family's published models: the number of attention
heads (`ModelFamily.attention_heads`, `heads_of_64` for text), the groups of the norms (32), and the activation function. For
a model that differs in them, our own converter writes the difference into the file's metadata (`CONFIG_KEY`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from library.errors import UserError
from library.families.family import ModelFamily, TextEncoder, heads_of_64

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

CONFIG_KEY = "lora_toolkit.model_config"
"""Metadata of a checkpoint: JSON, part -> what its shapes do not tell."""


def config_hints(metadata: Mapping[str, str], where: str) -> dict[str, Config]:
    """What a checkpoint's metadata say about its parts ("unet", "vae", "text_encoder", ...).

    Raises:
        UserError: where the entry is there but is not what our converter writes.
    """
    text = metadata.get(CONFIG_KEY)
    if text is None:
        return {}
    try:
        hints = json.loads(text)
    except ValueError:
        hints = None
    if not isinstance(hints, dict) or not all(isinstance(hint, dict) for hint in hints.values()):
        raise UserError(f"its metadata entry {CONFIG_KEY} is not JSON of our converter", where=where)
    return hints


# What differs between folders without changing what a model computes.
_WITHOUT_EFFECT = ("bos_token_id", "eos_token_id", "pad_token_id", "projection_dim", "use_linear_projection")


def config_differences(config: Mapping[str, Any], inferred: Mapping[str, Any]) -> Config:
    """What has to be written as hints so that `inferred` together with them computes what `config` does."""
    return {
        key: config[key]
        for key, value in inferred.items()
        if key in config and key not in _WITHOUT_EFFECT and _plain(config[key]) != _plain(value)
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _count(shapes: Iterable[str], pattern: str) -> int:
    """How many different numbers the pattern's group takes among the keys."""
    found = re.compile(pattern)
    return len({match[1] for match in map(found.match, shapes) if match})


def _needed(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise KeyError(key)
    return shapes[key]


def pooled_width(family: ModelFamily, configs: Mapping[str, Mapping[str, Any]]) -> int | None:
    """How wide the pooled text is that the text encoders with these configurations, by part, give; None where none does."""
    return next((configs[encoder.part]["projection_dim"] for encoder in family.text_encoders if encoder.gives_pooled), None)


def infer_config(part: str, shapes: Shapes, family: ModelFamily, where: str, *, pooled: int | None = None) -> Config:
    """The configuration of "unet", "vae", "control_net" or a text encoder of the family, from shapes by key.

    Args:
        shapes: keys are relative to the part.
        pooled: width of the pooled text that a U-Net takes; None takes the full-size model's features of a size.

    Raises:
        UserError: where a tensor is missing without which the size is unknown, or the parts do not fit together.
    """
    infer: Mapping[str, Callable[[Shapes, ModelFamily], Config]] = {
        "unet": _unet_config,
        "vae": _vae_config,
        "control_net": _control_net_config,
    }
    try:
        if part not in infer:
            return _text_encoder_config(shapes, family.text_encoder(part))
        config = infer[part](shapes, family)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"lacks tensors of its {part}, among them {error}", where=where, remedy="fetch it again") from None
    return config if pooled is None or part != "unet" else config | _features_of_sizes(config, family, pooled, where)


def _features_of_sizes(config: Config, family: ModelFamily, pooled: int, where: str) -> Config:
    """How many numbers each size becomes: what the U-Net takes beside the text, without the pooled text."""
    inputs, count = config["projection_class_embeddings_input_dim"], len(family.size_conditions)
    features, rest = divmod(inputs - pooled, count)
    if features <= 0 or rest:
        what = f"its U-Net takes {inputs} numbers beside the text, which are not a pooled text of {pooled} and {count} sizes"
        raise UserError(what, where=where, remedy="fetch it again")
    return {"addition_time_embed_dim": features}


def _unet_config(shapes: Shapes, family: ModelFamily) -> Config:
    encoder = _unet_encoder_config(shapes, family)
    up_types = [kind.replace("Down", "Up") for kind in reversed(encoder["down_block_types"])]
    return {
        **family.unet_config,
        **encoder,
        "out_channels": _needed(shapes, "out.2.weight")[0],
        "up_block_types": tuple(up_types),
    }


def _control_net_config(shapes: Shapes, family: ModelFamily) -> Config:
    hint_layers = _count(shapes, r"input_hint_block\.(\d+)\.weight$")
    widths = range(0, 2 * hint_layers - 2, 4)  # the first layer, and every second one behind it, widens the hint
    return {
        **{key: family.unet_config[key] for key in ("upcast_attention", "norm_num_groups")},
        **_unet_encoder_config(shapes, family),
        "conditioning_channels": _needed(shapes, "input_hint_block.0.weight")[1],
        "conditioning_embedding_out_channels": tuple(
            _needed(shapes, f"input_hint_block.{layer}.weight")[0] for layer in widths
        ),
    }


def _unet_encoder_config(shapes: Shapes, family: ModelFamily) -> Config:
    """What shows in the half that a U-Net and a ControlNet have in common."""
    resampled = sorted(
        int(match[1]) for key in shapes if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.weight$", key)) is not None
    )
    places = resampled[0]  # of a block: its layers and its downsampler
    levels = len(resampled) + 1
    channels = [_needed(shapes, f"input_blocks.{1 + places * level}.0.out_layers.3.weight")[0] for level in range(levels)]
    attention = [f"input_blocks.{1 + places * level}.1.proj_in.weight" in shapes for level in range(levels)]
    first = next(f"input_blocks.{1 + places * level}.1" for level in range(levels) if attention[level])
    return {
        **_depths(shapes, [f"input_blocks.{1 + places * level}.1" for level in range(levels)], family),
        **_added_condition(shapes, family),
        "in_channels": _needed(shapes, "input_blocks.0.0.weight")[1],
        "layers_per_block": places - 1,
        "block_out_channels": tuple(channels),
        "down_block_types": tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attention),
        "cross_attention_dim": _needed(shapes, f"{first}.transformer_blocks.0.attn2.to_k.weight")[1],
        "attention_head_dim": family.attention_heads(channels),
        "use_linear_projection": len(_needed(shapes, f"{first}.proj_in.weight")) == 2,
    }


def _depths(shapes: Shapes, attentions: Sequence[str], family: ModelFamily) -> Config:
    """Transformer blocks of each level's attentions; the middle takes as many as the last level."""
    if "transformer_layers_per_block" not in family.unet_config:
        return {}

    def depth(attention: str) -> int:
        return _count(shapes, rf"{re.escape(attention)}\.transformer_blocks\.(\d+)\.") or 1

    *depths, last = map(depth, attentions)
    return {"transformer_layers_per_block": [*depths, max(last, depth("middle_block.1"))]}


def _added_condition(shapes: Shapes, family: ModelFamily) -> Config:
    """How the pooled text and the sizes come in."""
    if not family.size_conditions:
        return {}
    inputs = _needed(shapes, "label_emb.0.0.weight")[1]
    keys = ("addition_embed_type", "addition_time_embed_dim")
    return {**{key: family.unet_config[key] for key in keys}, "projection_class_embeddings_input_dim": inputs}


def _vae_config(shapes: Shapes, family: ModelFamily) -> Config:
    levels = _count(shapes, r"encoder\.down\.(\d+)\.block\.0\.conv2\.weight$")
    if levels == 0:
        raise KeyError("encoder.down.0.block.0.conv2.weight")
    return {
        **family.vae_config,
        "in_channels": _needed(shapes, "encoder.conv_in.weight")[1],
        "out_channels": _needed(shapes, "decoder.conv_out.weight")[0],
        "latent_channels": _needed(shapes, "decoder.conv_in.weight")[1],
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\.conv2\.weight$"),
        "block_out_channels": tuple(
            _needed(shapes, f"encoder.down.{level}.block.0.conv2.weight")[0] for level in range(levels)
        ),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def _text_encoder_config(shapes: Shapes, encoder: TextEncoder) -> Config:
    if encoder.layout == "clip":
        tokens, positions = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
        layer, inner = r"encoder\.layers\.(\d+)\.mlp\.fc1\.weight$", "encoder.layers.0.mlp.fc1.weight"
    else:
        tokens, positions = "token_embedding.weight", "positional_embedding"
        layer, inner = r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.weight$", "transformer.resblocks.0.mlp.c_fc.weight"
    vocabulary, width = _needed(shapes, tokens)
    layers, full = _count(shapes, layer), encoder.config["num_hidden_layers"]
    kept = layers if layers == full else layers - encoder.layers_dropped  # some tools leave out the unused layer already
    projection = {"projection_dim": _needed(shapes, "text_projection")[1]} if encoder.gives_pooled else {}
    return {
        **encoder.config,
        **projection,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _needed(shapes, inner)[0],
        "num_hidden_layers": kept,
        "num_attention_heads": heads_of_64(width),
        "max_position_embeddings": _needed(shapes, positions)[0],
    }
