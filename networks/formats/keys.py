"""How adapter files name layers and tensors: other layouts' names to ours, and ours to theirs.

Ours is kohya's: `<prefix>_<layer's path with underscores>.<tensor>`, where the path is in the family's wording, and those of
text encoders begin with `text_model`, whether or not the installed transformers has that level (5.6 and later do not have
it in `CLIPTextModel`). Layers of every layout are known by
`layer_names`; here are the tensors within them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from library.errors import UserError
from library.families.family import ModelFamily
from networks.formats.layer_names import TEXT_ENCODERS, LayerName, LayerNames, layer_names
from networks.formats.peft_metadata import COMPONENTS, PeftLayer, PeftScales, peft_metadata

T = TypeVar("T")

# The words that the name of a tensor within a layer begins with; layers have no such names.
_WORDS = "lora|hada|lokr|oft|boft|ia3|diff|magnitude|dora_scale|alpha|w_norm|b_norm|on_input"
_KEY = re.compile(rf"(.*?)\.((?:{_WORDS})(?:[._][\w.]*)?)")


def saved_name(prefix: str, path: str, family: ModelFamily) -> str:
    """The saved name of a layer, from its module's path.

    >>> saved_name("lora_te", "encoder.layers.0.mlp.fc1", SD1)
    'lora_te_text_model_encoder_layers_0_mlp_fc1'
    >>> saved_name("lora_unet", "down_blocks.1.attentions.0.proj_in", SDXL)
    'lora_unet_input_blocks_4_1_proj_in'
    """
    name = f"{prefix}_{path.replace('.', '_')}"
    found = layer_names(family).find(name)
    return name if found is None else found.saved


def split_key(key: str) -> tuple[str, str]:
    """A saved key's layer name and tensor name; the latter is empty for a key without a dot.

    >>> split_key("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight")
    ('lora_unet_mid_block_attentions_0_proj_in', 'lora_down.weight')
    >>> split_key("transformer.blocks.0.attn.to_q.lora_A.weight")
    ('transformer.blocks.0.attn.to_q', 'lora_A.weight')
    """
    match = _KEY.fullmatch(key)
    if match:
        return match[1], match[2]
    layer, _, tensor = key.partition(".")
    return layer, tensor


def by_layer(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Layer name -> tensor name -> value, in the order of first appearance."""
    layers: dict[str, dict[str, T]] = {}
    for key, value in tensors.items():
        layer, name = split_key(key)
        layers.setdefault(layer, {})[name] = value
    return layers


# Reading

_MAGNITUDE = re.compile(r"(?:lora_magnitude_vector|magnitude)(?:\.\w+)*")

# Other names of tensors, and ours. PEFT puts the adapter's name ("default") before "weight" unless told otherwise.
_TENSOR_NAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"lora_A(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"), "lora_down.weight"),
    (re.compile(r"lora_B(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"), "lora_up.weight"),
    (re.compile(r"lora(?:_linear_layer)?\.(up|down)\.weight"), r"lora_\1.weight"),
    (re.compile(r"lora_(up|down)"), r"lora_\1.weight"),
    (re.compile(r"((?:hada|lokr)_\w+)\.\w+"), r"\1"),
    (_MAGNITUDE, "dora_scale"),
)

_RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Tensors with as many rows as their layer has ranks."""

# diffusers before 0.22: the factors of an attention layer's four matrices are modules of its processor.
_OLD_ATTENTION = re.compile(r"(\.self_attn)?(?:\.processor)?\.to_(q|k|v|out)_lora\.(up|down)\.weight")


def _modern(match: re.Match[str]) -> str:
    if match[1]:
        return f".self_attn.{match[2]}_proj.lora_{match[3]}.weight"
    return f".to_{'out.0' if match[2] == 'out' else match[2]}.lora_{match[3]}.weight"


def _known_layer(key: str, names: LayerNames) -> tuple[str, str] | None:
    """Our name of the key's layer, and the rest of the key; None where no layer of the models is in it."""
    layer, tensor = split_key(key)
    found = names.find(layer)
    if found is None:
        layer, tensor = key, ""
    while found is None and "." in layer:
        layer, _, end = layer.rpartition(".")
        tensor = f"{end}.{tensor}" if tensor else end
        found = names.find(layer)
    return (found.saved, tensor) if found and tensor else None


def kohya_key(key: str, family: ModelFamily) -> str:
    """Our name of a tensor in a file of any layout; a name of none stays as it is.

    >>> kohya_key("unet.mid_block.attentions.0.proj_in.lora_A.weight", SD1)
    'lora_unet_mid_block_attentions_0_proj_in.lora_down.weight'
    """
    modern = _OLD_ATTENTION.sub(_modern, key)
    layer, tensor = _known_layer(modern, layer_names(family)) or split_key(modern)
    for pattern, ours in _TENSOR_NAMES:
        match = pattern.fullmatch(tensor)
        if match:
            tensor = match.expand(ours)
            break
    else:
        return f"{layer}.{tensor}" if tensor else layer
    return f"{layer}.{tensor}"


def ignored_keys(keys: Iterable[str]) -> list[str]:
    """The keys that belong to no adapter: embeddings that some programs store in the same file."""
    return [key for key in keys if key.startswith("bundle_emb.")]


def to_kohya(
    tensors: Mapping[str, Tensor], family: ModelFamily, metadata: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """The tensors of an adapter file of any layout under our names, in the file's order; those of no adapter are left out.

    Names of no layer of the family's models stay as they are. DoRA's magnitudes become `dora_scale`, with the axis that
    their name in the file stands for; float8 becomes fp32. Where the file's metadata say how PEFT scales its layers, they
    get an alpha that says the same.

    Args:
        tensors: as in the file.
        family: of the models it is for.
        metadata: of the file.

    Raises:
        UserError: one tensor under two names, or damaged metadata.
    """
    ignored = set(ignored_keys(tensors))
    origins: dict[str, str] = {}
    for key in tensors:
        if key in ignored:
            continue
        ours = kohya_key(key, family)
        if ours in origins:
            raise UserError(f"holds {ours} twice: as {origins[ours]} and as {key}")
        origins[ours] = key
    result = {ours: _readable(tensors[key]) for ours, key in origins.items()}
    scales = PeftScales.read(metadata or {})
    for layer, own in by_layer(result).items():
        changed = _with_our_meaning(own, {name: origins[f"{layer}.{name}"] if name else layer for name in own})
        if scales:
            changed |= _with_alpha(own, layer_names(family).find(layer), scales)
        result |= {f"{layer}.{name}": value for name, value in changed.items()}
    return result


def _with_our_meaning(own: Mapping[str, Tensor], origins: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a layer that mean something else under their name in the file (`origins`), with our values."""
    changed = {}
    if "dora_scale" in own and _MAGNITUDE.fullmatch(split_key(origins["dora_scale"])[1]):
        axes = own["lora_down.weight"].dim() if "lora_down.weight" in own else 2
        changed["dora_scale"] = own["dora_scale"].reshape(-1, *[1] * (axes - 1))
    if "oft_blocks" in own and origins["oft_blocks"].startswith("oft_") and "alpha" in own and not own["alpha"].any():
        # sd-scripts' OFT limits its rotation to alpha, also to none; an alpha of 0 means no limit elsewhere.
        changed["oft_blocks"] = torch.zeros_like(own["oft_blocks"])
    return changed


def _with_alpha(own: Mapping[str, Tensor], layer: LayerName | None, scales: PeftScales) -> dict[str, Tensor]:
    """What says PEFT's scale of a layer in our tensors; nothing where the file has an alpha."""
    if layer is None or "alpha" in own:
        return {}
    if "lokr_w1" in own and "lokr_w2" in own:
        return {"lokr_w1": own["lokr_w1"] * scales.scale_of_full(layer)}
    ranked = next((own[name] for name in _RANKED if name in own), None)
    alpha = scales.alpha(layer, rank=len(ranked)) if ranked is not None else None
    return {} if alpha is None else {"alpha": torch.tensor(alpha)}


def _readable(tensor: Tensor) -> Tensor:
    """The tensor in a type that can be computed with."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


# Writing


def to_original(tensors: Mapping[str, T], family: ModelFamily) -> dict[str, T]:
    """Our tensors with the U-Net's layers called as in the original checkpoints (`lora_unet_input_blocks_1_1_...`).

    `to_kohya` is the way back. A layer that the models have not keeps its name.
    """
    result = {}
    for key, value in tensors.items():
        layer, tensor = split_key(key)
        found = layer_names(family).find(layer)
        result[f"{found.saved_original}.{tensor}" if found else key] = value
    return result


def to_peft(tensors: Mapping[str, Tensor], family: ModelFamily) -> tuple[dict[str, Tensor], dict[str, str]]:
    """LoRA tensors under our names in the layout of diffusers and PEFT: `unet.<path>.lora_A.weight`.

    Nothing is lost: alphas go into the metadata, from where `to_kohya` takes them. A layer without alpha has its rank for
    one.

    Returns:
        Tensors, and the metadata that have to be written with them.

    Raises:
        UserError: layers that the models have not, other algorithms than LoRA, DoRA along inputs, or on some layers only.
    """
    result: dict[str, Tensor] = {}
    layers = []
    for layer, own in by_layer(tensors).items():
        found = layer_names(family).find(layer)
        if found is None:
            raise UserError(f"{layer} is no layer of {family.title}, and has no name in diffusers' layout")
        up, down, magnitude = own.get("lora_up.weight"), own.get("lora_down.weight"), own.get("dora_scale")
        strange = sorted(own.keys() - {"lora_up.weight", "lora_down.weight", "dora_scale", "alpha"})
        if up is None or down is None or strange:
            names = ", ".join(strange or own)
            raise UserError(f"{layer} is no plain LoRA layer ({names}); PEFT's layout has no place for it")
        name = f"{COMPONENTS[found.part]}.{found.path}"
        result |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if magnitude is not None:
            if magnitude.shape[0] != len(up) or magnitude.numel() != len(up):
                raise UserError(f"{layer} has DoRA magnitudes along its inputs, which PEFT's layout has not")
            shape = (-1,) if down.dim() == 2 else (1, -1, *[1] * (down.dim() - 2))
            # transformers, which loads the text encoder's, looks for the parameter's name; PEFT leaves it out.
            ending = ".weight" if found.part in TEXT_ENCODERS else ""
            result[f"{name}.lora_magnitude_vector{ending}"] = magnitude.reshape(shape)
        alpha = float(own["alpha"]) if "alpha" in own else float(len(down))
        layers.append(PeftLayer(name=found, rank=len(down), alpha=alpha or len(down), decomposed=magnitude is not None))
    return result, peft_metadata(layers)
