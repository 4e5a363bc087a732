"""Every name that a layer of a family's models has in adapter files: one table, all ways.

Files write a layer's path with dots or with underscores, in diffusers' words or in those of the original checkpoints, and
put one of several prefixes before it. Underscores alone do not tell where a module's name ends ("to_q", "time_emb_proj"), so
names are looked up among those of the full-size models; smaller models have a subset of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from library.checkpoints.ldm_keys import unet_table
from library.families.family import ModelFamily

Part = Literal["text_encoder", "denoiser"]

_BOTH: tuple[Part, ...] = ("denoiser", "text_encoder")
_DENOISER: tuple[Part, ...] = ("denoiser",)
_TEXT_ENCODER: tuple[Part, ...] = ("text_encoder",)

# What stands before a layer's path once dots are underscores, and which models' layers may follow. More than one may fit a
# name; its rest then is a layer's name after one of them only.
_PREFIXES: tuple[tuple[str, tuple[Part, ...]], ...] = (
    ("lora_unet_", _DENOISER),
    ("lora_te_", _TEXT_ENCODER),
    ("lora_te1_", _TEXT_ENCODER),  # diffusers' kohya export, OneTrainer, LyCORIS with a list of one text encoder
    ("oft_unet_", _DENOISER),  # sd-scripts' OFT
    ("oft_te_", _TEXT_ENCODER),
    ("unet_", _DENOISER),  # PEFT, diffusers and OMI
    ("text_encoder_", _TEXT_ENCODER),
    ("unet_base_model_model_", _DENOISER),
    ("text_encoder_base_model_model_", _TEXT_ENCODER),
    ("base_model_model_", _BOTH),
    ("diffusion_model_", _DENOISER),  # ComfyUI
    ("model_diffusion_model_", _DENOISER),
    ("text_encoders_clip_l_transformer_", _TEXT_ENCODER),
    ("text_encoders_clip_h_transformer_", _TEXT_ENCODER),
    ("clip_l_", _TEXT_ENCODER),  # OMI
    ("clip_h_", _TEXT_ENCODER),
    ("lycoris_", _BOTH),  # LyCORIS' stand-alone wrapper
    ("", _BOTH),
)

_TRANSFORMER_LAYERS = (
    *(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
    "norm1",
    "norm2",
    "norm3",
)
_ATTENTION_BLOCK = ("norm", "proj_in", "proj_out", *(f"transformer_blocks.0.{name}" for name in _TRANSFORMER_LAYERS))
_TEXT_LAYER = (
    *(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")),
    "mlp.fc1",
    "mlp.fc2",
    "layer_norm1",
    "layer_norm2",
)


@dataclass(frozen=True, kw_only=True)
class LayerName:
    """One layer, as each layout calls it.

    Attributes:
        part: of the model.
        path: of the module in diffusers' U-Net, or in transformers' text encoder with its `text_model` level.
        original: path in the original (LDM) U-Net; None in text encoders.
        saved: our name ("lora_unet_down_blocks_0_attentions_0_proj_in").
        saved_original: likewise with the original path ("lora_unet_input_blocks_1_1_proj_in").
    """

    part: Part
    path: str
    original: str | None
    saved: str
    saved_original: str


class LayerNames:
    """The table of one family; get it from `layer_names`."""

    def __init__(self, family: ModelFamily) -> None:
        self._by_path: dict[tuple[Part, str], LayerName] = {}
        for layer in _layers(family):
            for alias in _aliases(layer):
                if self._by_path.setdefault((layer.part, alias), layer) != layer:
                    raise ValueError(f"{alias} is the name of two layers")

    def find(self, name: str) -> LayerName | None:
        """The layer of a name in any layout, with dots or underscores; None where the models have no such layer."""
        flat = name.replace(".", "_")
        for prefix, parts in _PREFIXES:
            if flat.startswith(prefix):
                for part in parts:
                    found = self._by_path.get((part, flat[len(prefix) :]))
                    if found is not None:
                        return found
        return None


_TABLES: dict[str, LayerNames] = {}


def layer_names(family: ModelFamily) -> LayerNames:
    """The table of a family, made once."""
    if family.name not in _TABLES:
        _TABLES[family.name] = LayerNames(family)
    return _TABLES[family.name]


def _layers(family: ModelFamily) -> Iterator[LayerName]:
    for original, module in unet_table(family.unet_config).pairs():
        for leaf in _ATTENTION_BLOCK if ".attentions." in module else ("",):
            ending = f".{leaf}" if leaf else ""
            yield _layer(family.denoiser_prefix, "denoiser", module + ending, original + ending)
    # Adapters of a text encoder may have been trained with the layers that the family drops.
    (encoder,) = family.text_encoders
    for number in range(encoder.config["num_hidden_layers"] + encoder.layers_dropped):
        for leaf in _TEXT_LAYER:
            path = f"text_model.encoder.layers.{number}.{leaf}"
            yield _layer(encoder.adapter_prefix, "text_encoder", path, None)
    yield _layer(encoder.adapter_prefix, "text_encoder", "text_model.final_layer_norm", None)


def _layer(prefix: str, part: Part, path: str, original: str | None) -> LayerName:
    return LayerName(
        part=part,
        path=path,
        original=original,
        saved=f"{prefix}_{path.replace('.', '_')}",
        saved_original=f"{prefix}_{(original or path).replace('.', '_')}",
    )


def _aliases(layer: LayerName) -> Iterator[str]:
    """The layer's path with underscores, in every wording."""
    yield layer.path.replace(".", "_")
    if layer.original is None:
        yield layer.path.removeprefix("text_model.").replace(".", "_")  # transformers 5.6 and later
        return
    original = layer.original.replace(".", "_")
    yield original
    if original.startswith("output_blocks_") and original.endswith("_1_conv"):
        yield original.removesuffix("_1_conv") + "_2_conv"  # OneTrainer's OMI files number it as in SDXL
