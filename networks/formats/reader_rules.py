"""What programs make of whole adapter files: the rules that no single layer shows.

Each takes the header, the layers, and what the program's table says of each of them; see `readers.py` for whose they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from library.families.family import ModelFamily, TextEncoderLayout
from networks.formats.layer_names import TEXT_ENCODERS, Part, layer_names
from networks.formats.reading import Effect, Findings, Layers
from networks.formats.traits import FileLayer, Header, Trait

Effects = Mapping[str, Effect]


def too_many_strangers(header: Header, layers: Layers, effects: Effects) -> Findings:
    """Forge takes a file with more than 12 tensors that it has no use for to be of another model."""
    strangers = sum(len(layer.shapes) for name, layer in layers.items() if effects[name] is Effect.DROPPED)
    if strangers > 12:
        return Findings(refused=f"{strangers} tensors it does not know, where it allows 12")
    return Findings()


ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Projections of a text encoder's attention."""


def text_attention(layers: Iterable[str]) -> dict[str, dict[str, str]]:
    """Attention of text encoders: name up to the projection -> projection -> layer."""
    found: dict[str, dict[str, str]] = {}
    for name in layers:
        for projection in ATTENTION:
            if name.endswith(projection) and "self_attn" in name:
                found.setdefault(name.removesuffix(projection), {})[projection] = name
    return found


def whole_attention(header: Header, layers: Layers, effects: Effects) -> Findings:
    """In OpenCLIP's attention, which is one module, A1111 changes nothing unless all four projections are there."""
    incomplete = [
        of.values()
        for beginning, of in text_attention(layers).items()
        if len(of) < len(ATTENTION) and _layout(f"{beginning}{next(iter(of))}", header.family) == "open_clip"
    ]
    why = "attention of the text encoder without all of q, k, v and out"
    return Findings(dropped={name: why for names in incomplete for name in names})


def _layout(name: str, family: ModelFamily) -> TextEncoderLayout | None:
    """How single files name the tensors of the text encoder that a layer is of; None for a layer of none."""
    found = layer_names(family).find(name)
    return None if found is None or found.part not in TEXT_ENCODERS else family.text_encoder(found.part).layout


def one_wording(header: Header, layers: Layers, effects: Effects) -> Findings:
    """diffusers deletes the original names of a file that has some of its own as well."""
    original = [name for name in layers if _ORIGINAL.match(name)]
    if not original or not any(layer.traits[0] in _OF_DIFFUSERS for layer in layers.values()):
        return Findings()
    return Findings(dropped=dict.fromkeys(original, "original names beside diffusers'"))


def all_one_wording(header: Header, layers: Layers, effects: Effects) -> Findings:
    """InvokeAI translates original names, if all of the U-Net are."""
    return Findings(refused="original names beside diffusers'" if one_wording(header, layers, effects).dropped else None)


_ORIGINAL = re.compile(r"lora_unet_(input_blocks|output_blocks|middle_block)_")
_OF_DIFFUSERS = {Trait.DIFFUSERS_NAME, Trait.DIFFUSERS_UPSAMPLER, Trait.DIFFUSERS_SIZES}


def kohya_or_peft(header: Header, layers: Layers, effects: Effects) -> Findings:
    """diffusers reads files whose keys are all kohya's, or all PEFT's or its own older ones."""
    names = {layer.traits[0] for layer in layers.values()}
    if names & _KOHYA and names - _KOHYA:
        mixed = "kohya's names beside others"
        return Findings(dropped={name: mixed for name, layer in layers.items() if layer.traits[0] in _KOHYA})
    if not names & _KOHYA and any("alpha" in layer.shapes for layer in layers.values()):
        return Findings(refused="alpha under names that are not kohya's")
    return Findings()


_KOHYA = {
    Trait.KOHYA_NAME,
    Trait.FIRST_OF_TWO_NAME,
    Trait.ONLY_ONE_NAME,
    Trait.ORIGINAL_NAME,
    *_OF_DIFFUSERS,
    Trait.FINAL_NORM,
    Trait.TEXT_NORM,
    Trait.TEXT_PROJECTION,
}


def one_alpha_for_each_part(header: Header, layers: Layers, effects: Effects) -> Findings:
    """diffusers gives the attention of the U-Net and each whole text encoder one alpha: the one that most layers have."""
    findings = Findings()
    taken = {name: layer for name, layer in layers.items() if effects[name] is not Effect.DROPPED}
    for kind, part in _by_part(header.family, taken).items():
        keys = {layer.name: layer.keys["alpha"] for layer in part if "alpha" in layer.keys}
        alphas = {name: header.scalars[key] for name, key in keys.items() if key in header.scalars}
        if not alphas:
            continue
        common = Counter(alphas.values()).most_common(1)[0][0]
        for layer in part:
            rank = layer.shapes.get("lora_down.weight", (0,))[0]
            shared = kind in TEXT_ENCODERS or layer.name not in alphas or _is_attention(layer.name)
            if shared and alphas.get(layer.name, float(rank)) != common:
                findings.wrong[layer.name] = f"it takes alpha {common:g}, the most common one, for all of them"
    return findings


def _by_part(family: ModelFamily, layers: Layers) -> dict[Part, list[FileLayer]]:
    """Part of the models -> its layers; without those that the models have not."""
    parts: dict[Part, list[FileLayer]] = {}
    for name, layer in layers.items():
        found = layer_names(family).find(name)
        if found is not None:
            parts.setdefault(found.part, []).append(layer)
    return parts


def is_text_encoder(name: str) -> bool:
    """Whether a layer, by its name in any layout, is one of a text encoder."""
    return name.startswith(("lora_te", "text_encoder", "clip_")) or "text_model" in name


def _is_attention(name: str) -> bool:
    return name.endswith(("to_q", "to_k", "to_v", "to_out_0", "to_out.0"))


def text_encoder_by_its_outputs(header: Header, layers: Layers, effects: Effects) -> Findings:
    """diffusers finds the rank of a text encoder's attention by the layers called out_proj, and needs one; it does without
    attention where there is an MLP."""
    findings = Findings()
    for kind, part in _by_part(header.family, layers).items():
        names = [layer.name for layer in part]
        if kind not in TEXT_ENCODERS or any(name.endswith("out_proj") for name in names):
            continue
        if not any("mlp" in name for name in names):
            return Findings(refused="a text encoder without any out_proj")
        attention = [name for name in names if "self_attn" in name]
        findings.dropped |= dict.fromkeys(attention, "attention of the text encoder without any out_proj")
    return findings


def text_magnitudes_by_name(header: Header, layers: Layers, effects: Effects) -> Findings:
    """diffusers hands a text encoder to transformers, which looks for the magnitudes' parameter and starts them anew."""
    findings = Findings()
    for name, layer in layers.items():
        key = layer.keys.get("lora_magnitude_vector", "")
        if is_text_encoder(name) and key and not key.endswith(".weight"):
            findings.wrong[name] = "magnitudes of the text encoder without .weight are left out"
    return findings


def nothing_left(header: Header, layers: Layers, effects: Effects) -> Findings:
    """diffusers raises where not one layer is taken."""
    if all(effect is Effect.DROPPED for effect in effects.values()):
        return Findings(refused=next(iter(layers.values())).traits[0].value)
    return Findings()


def base_by_one_width(header: Header, layers: Layers, effects: Effects) -> Findings:
    """InvokeAI tells a file's base model by how wide the condition of the first layer is that shows it."""
    if not any(name.startswith(("lora_unet_", "lora_te_", *_OF_TWO)) for name in layers):
        return Findings(refused="it is not recognised without kohya's names")
    encoders = header.family.text_encoders
    if len(encoders) > 1 and any(_DEEP.match(name) for name in layers):
        return Findings()
    width = _first_width(layers.values())
    if width is None:
        return Findings(refused="no layer by which it tells the base model")
    if width not in (header.family.context_width, encoders[-1].config["hidden_size"]):
        return Findings(refused=f"it tells the base model by the width {width}, which is not {header.family.title}'s")
    return Findings()


_DEEP = re.compile(r"lora_unet_.*_transformer_blocks_([2-9]|\d\d)_")  # which only models with two text encoders have
_OF_TWO = ("lora_te1_", "lora_te2_")


def _first_width(layers: Iterable[FileLayer]) -> int | None:
    """Of the first layer that shows one; those of two text encoders show it together, as a sum."""
    of_two: dict[str, int] = {}
    for layer in layers:
        width = _width_it_sees(layer)
        encoder = layer.name[: len(_OF_TWO[0])]
        if width is not None and encoder in _OF_TWO:
            of_two[encoder] = width
            width = sum(of_two.values()) if len(of_two) == len(_OF_TWO) else None
        if width is not None:
            return width
    return None


def _width_it_sees(layer: FileLayer) -> int | None:
    name, shapes = layer.name, layer.shapes
    of_unet = name.startswith("lora_unet_")
    of_text = name.startswith(("lora_te_", *_OF_TWO)) and "_self_attn_" in name
    if of_unet and name.endswith("time_emb_proj") and "lora_down.weight" in shapes:
        return shapes["lora_down.weight"][1]
    if not of_text and not (of_unet and name.endswith(("attn2_to_k", "attn2_to_v"))):
        return None
    if "lokr_w1" in shapes and "lokr_w2" in shapes:
        return shapes["lokr_w1"][1] * shapes["lokr_w2"][1]
    if "weight" in shapes:
        return shapes["weight"][0] if of_text else None
    return next((shapes[tensor][1] for tensor in ("lora_down.weight", "hada_w1_b", "diff") if tensor in shapes), None)


def only_in_clip(header: Header, layers: Layers, effects: Effects) -> Findings:
    """Names that A1111 finds in CLIP's text encoder and not in OpenCLIP's."""
    kinds = (Trait.FIRST_OF_TWO_NAME, Trait.TEXT_NORM)
    return Findings(
        dropped={
            name: str(layer.traits[0])
            for name, layer in layers.items()
            if layer.traits[0] in kinds and _layout(name, header.family) != "clip"
        }
    )
