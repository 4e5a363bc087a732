"""Every name that a layer of a family's models has in adapter files: one table, all ways.

Files write a layer's path with dots or with underscores, in diffusers' words or in those of the original checkpoints, and
put one of several prefixes before it. Underscores alone do not tell where a module's name ends ("to_q", "time_emb_proj"), so
names are looked up among those of the full-size models; smaller models have a subset of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from library.checkpoints.ldm_keys import transformer_depth, unet_table
from library.families.family import LayerWording, ModelFamily, TextEncoder

Part = Literal["text_encoder", "text_encoder_2", "denoiser"]
"""Text encoders are called as the base model's parts are."""

DENOISER: Part = "denoiser"
TEXT_ENCODERS: tuple[Part, ...] = ("text_encoder", "text_encoder_2")
TEXT_LEVEL = "text_model."
"""What paths in text encoders begin with; modules of transformers have that level, or have it not."""

# A file of one model alone does not say which text encoder it is; the first is meant.
_ANY: tuple[Part, ...] = (DENOISER, TEXT_ENCODERS[0])
_DENOISER: tuple[Part, ...] = (DENOISER,)
_FIRST: tuple[Part, ...] = TEXT_ENCODERS[:1]
_SECOND: tuple[Part, ...] = TEXT_ENCODERS[1:]

# What stands before a layer's path once dots are underscores, and which models' layers may follow. More than one may fit a
# name; its rest then is a layer's name after one of them only.
_PREFIXES: tuple[tuple[str, tuple[Part, ...]], ...] = (
    ("lora_unet_", _DENOISER),
    ("lora_te_", _FIRST),
    ("lora_te1_", _FIRST),  # of two; of the only one in diffusers' kohya export, OneTrainer, LyCORIS with a list of one
    ("lora_te2_", _SECOND),
    ("oft_unet_", _DENOISER),  # sd-scripts' OFT
    ("oft_te_", _FIRST),
    ("oft_te1_", _FIRST),
    ("oft_te2_", _SECOND),
    ("unet_", _DENOISER),  # PEFT, diffusers and OMI
    ("text_encoder_", _FIRST),
    ("text_encoder_2_", _SECOND),
    ("unet_base_model_model_", _DENOISER),
    ("text_encoder_base_model_model_", _FIRST),
    ("text_encoder_2_base_model_model_", _SECOND),
    ("base_model_model_", _ANY),
    ("diffusion_model_", _DENOISER),  # ComfyUI
    ("model_diffusion_model_", _DENOISER),
    ("text_encoders_clip_l_transformer_", _FIRST),
    ("text_encoders_clip_h_transformer_", _FIRST),
    ("text_encoders_clip_g_transformer_", _SECOND),
    ("clip_l_", _FIRST),  # OMI
    ("clip_h_", _FIRST),
    ("clip_g_", _SECOND),
    ("lycoris_", _ANY),  # LyCORIS' stand-alone wrapper
    ("", _ANY),
)

_TRANSFORMER_LAYERS = (
    *(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
    "norm1",
    "norm2",
    "norm3",
)
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
        saved: our name, in the family's wording ("lora_unet_down_blocks_0_attentions_0_proj_in").
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
        self._layers = tuple(_layers(family))
        self._by_path: dict[tuple[Part, str], LayerName] = {}
        for layer in self._layers:
            for alias in _aliases(layer):
                if self._by_path.setdefault((layer.part, alias), layer) != layer:
                    raise ValueError(f"{alias} is the name of two layers")

    def __iter__(self) -> Iterator[LayerName]:
        """All layers: the denoiser's as the original's way down, middle and way up have them, then the text encoders'."""
        return iter(self._layers)

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

    def path(self, name: str) -> str:
        """The path of a layer of any name; of one that the models have not, what its name says."""
        found = self.find(name)
        return name if found is None else found.path


_TABLES: dict[str, LayerNames] = {}


def layer_names(family: ModelFamily) -> LayerNames:
    """The table of a family, made once."""
    if family.name not in _TABLES:
        _TABLES[family.name] = LayerNames(family)
    return _TABLES[family.name]


def _layers(family: ModelFamily) -> Iterator[LayerName]:
    prefix, wording = family.denoiser_prefix, family.denoiser_wording
    for original, module in unet_table(family.unet_config).pairs():
        for leaf in _attention_block(module, family.unet_config) if ".attentions." in module else ("",):
            ending = f".{leaf}" if leaf else ""
            yield _layer(prefix, DENOISER, module + ending, original + ending, wording)
    for part, encoder in zip(TEXT_ENCODERS, family.text_encoders, strict=False):
        for path in _text_paths(encoder):
            yield _layer(encoder.adapter_prefix, part, path, None)


def _attention_block(module: str, config: Mapping[str, Any]) -> Iterator[str]:
    """The layers of an attention block, which has as many transformers as its level of the U-Net says."""
    yield from ("norm", "proj_in", "proj_out")
    for number in range(transformer_depth(config, module)):
        yield from (f"transformer_blocks.{number}.{name}" for name in _TRANSFORMER_LAYERS)


def _text_paths(encoder: TextEncoder) -> Iterator[str]:
    # Adapters of a text encoder may have been trained with the layers that the family drops.
    for number in range(encoder.config["num_hidden_layers"] + encoder.layers_dropped):
        yield from (f"{TEXT_LEVEL}encoder.layers.{number}.{leaf}" for leaf in _TEXT_LAYER)
    yield f"{TEXT_LEVEL}final_layer_norm"
    if encoder.gives_pooled:
        yield "text_projection"


def _layer(prefix: str, part: Part, path: str, original: str | None, wording: LayerWording = "diffusers") -> LayerName:
    by_wording = {"diffusers": f"{prefix}_{path.replace('.', '_')}"}
    by_wording["original"] = by_wording["diffusers"] if original is None else f"{prefix}_{original.replace('.', '_')}"
    return LayerName(
        part=part, path=path, original=original, saved=by_wording[wording], saved_original=by_wording["original"]
    )


def _aliases(layer: LayerName) -> Iterator[str]:
    """The layer's path with underscores, in every wording."""
    yield layer.path.replace(".", "_")
    if layer.original is None:
        yield layer.path.removeprefix(TEXT_LEVEL).replace(".", "_")  # transformers 5.6 and later
        return
    original = layer.original.replace(".", "_")
    yield original
    if original.startswith("output_blocks_") and original.endswith("_1_conv"):
        yield original.removesuffix("_1_conv") + "_2_conv"  # OneTrainer's OMI files number it as in larger models
