"""How adapter files name layers and tensors: from a module's path to its saved name, and from other layouts' names to ours.

Ours is kohya's: `<prefix>_<module path with underscores>.<tensor>`, where text-encoder paths begin with `text_model`,
whether or not the installed transformers has that level (5.6 and later do not).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from library.families.family import ModelFamily

T = TypeVar("T")


def saved_name(prefix: str, path: str) -> str:
    """The saved name of a layer.

    >>> saved_name("lora_te", "encoder.layers.0.mlp.fc1")
    'lora_te_text_model_encoder_layers_0_mlp_fc1'
    """
    if path.startswith("encoder."):
        path = f"text_model.{path}"
    return f"{prefix}_{path.replace('.', '_')}"


def split_key(key: str) -> tuple[str, str]:
    """A saved key's layer name and tensor name; the latter is empty for a key without a dot.

    >>> split_key("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight")
    ('lora_unet_mid_block_attentions_0_proj_in', 'lora_down.weight')
    """
    layer, _, tensor = key.partition(".")
    return layer, tensor


def by_layer(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Layer name -> tensor name -> value, in the order of first appearance."""
    layers: dict[str, dict[str, T]] = {}
    for key, value in tensors.items():
        layer, name = split_key(key)
        layers.setdefault(layer, {})[name] = value
    return layers


def to_kohya(tensors: Mapping[str, T], family: ModelFamily) -> dict[str, T]:
    """The same tensors under kohya's names; a name of no layout that is read stays as it is.

    Read beside kohya's own names: `lora_te1_` for a model's only text encoder, as diffusers' exporter and OneTrainer write
    it.
    """
    if len(family.text_encoder_prefixes) > 1:
        return dict(tensors)
    prefix = f"{family.text_encoder_prefixes[0]}_"
    return {prefix + key[len("lora_te1_") :] if key.startswith("lora_te1_") else key: tensors[key] for key in tensors}


_OTHER_LAYOUTS = {
    "unet.": "PEFT's layout (unet.down_blocks...)",
    "text_encoder.": "PEFT's layout (text_encoder...)",
    "base_model.model.": "PEFT's layout (base_model.model...)",
    "diffusion_model.": "ComfyUI's layout (diffusion_model...)",
    "lycoris_": "the layout of LyCORIS' stand-alone wrapper (lycoris_...)",
    "lora_unet_input_blocks_": "the original Stable Diffusion layout (lora_unet_input_blocks_...)",
    "lora_unet_output_blocks_": "the original Stable Diffusion layout (lora_unet_output_blocks_...)",
}


def other_layout(keys: Iterable[str]) -> str | None:
    """The name of a layout that is known but not read, for sentences; None where no key shows one."""
    for key in keys:
        for beginning, name in _OTHER_LAYOUTS.items():
            if key.startswith(beginning):
                return name
    return None
