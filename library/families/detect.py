"""Which family a file or folder belongs to, from names and shapes alone.

What is no base model of a known family is refused by its own name: a sentence that says "this is FLUX" or "this is a LoRA"
saves the search that "keys missing" begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.families.family import ModelFamily
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from library.families.sdxl import SDXL
from library.families.sdxl_refiner import SDXL_REFINER
from library.text_files import read_json_object

FAMILIES: tuple[ModelFamily, ...] = (SD1, SD2, SDXL)
"""Those that draw, and have adapters."""

_BASE_FAMILIES = (*FAMILIES, SDXL_REFINER)
DEFAULT_FAMILY = SD1
"""Of an adapter that does not tell and is not said to be for SD2, as in sd-scripts."""

FAMILY_FLAGS: Mapping[str, ModelFamily] = {family.flag: family for family in FAMILIES if family.flag}
"""Switch of command lines -> the family that it says a model is of."""

_TITLES = " or ".join([", ".join(family.title for family in FAMILIES[:-1]), FAMILIES[-1].title])


def check_only_family(found: ModelFamily, wanted: str | None, *, where: str) -> None:
    """Refuse a file of another family than that of a script which is for one only.

    Args:
        wanted: the family's name; None for any.

    Raises:
        UserError
    """
    if wanted not in (None, found.name):
        title = next(family.title for family in FAMILIES if family.name == wanted)
        what = f"belongs to {found.title}, and this script is for {title} only"
        raise UserError(what, where=where, remedy="use the one without sdxl_ in its name, which takes every family")


Shapes = Mapping[str, tuple[int, ...]]

_UNET = "model.diffusion_model."

# What else a file may be, by a pattern that one of its keys matches; the first that matches names it.
_OTHER_CHECKPOINTS: tuple[tuple[str, str], ...] = (
    (r"(^|\.)joint_blocks\.\d+\.", "an SD3 checkpoint"),
    (r"(^|\.)double_blocks\.\d+\.", "a FLUX checkpoint"),
    (r"(^|\.)transformer_blocks\.\d+\.norm1_context\.", "an SD3 or FLUX transformer in diffusers' layout"),
    (r"^(first_stage_model\.)?(effnet|generator)\.|^down_blocks\.0\.0\.channelwise", "a Stable Cascade checkpoint"),
    (
        r"^(lora|lycoris|oft)_\w+\.|\.lora_(down|up|A|B)\.|[._]lora(_linear_layer)?\.(down|up)\.|\.hada_w1_|\.lokr_w1",
        "an adapter (LoRA) file, not a base model",
    ),
    (r"^(emb_params$|string_to_param(\.|$)|clip_[lg]$)", "a textual inversion embedding, not a base model"),
    (r"^(control_model\.|controlnet_)", "a ControlNet, not a base model"),
    (r"^layers\.\d+\.linear\.weight$|^\d+\.linear1\.0\.weight$", "a hypernetwork, not a base model"),
    (r"^down_blocks\.\d+\.(resnets|attentions)\.", "a U-Net in diffusers' layout without the other parts"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up)", "a VAE without the other parts"),
    (r"^(text_model\.)?encoder\.layers\.\d+\.self_attn\.", "a text encoder without the other parts"),
)

# Input channels of the U-Net that are not an image model's.
_OTHER_INPUTS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth model", 7: "an upscaler"}


def _first_match(keys: Iterable[str], patterns: tuple[tuple[str, str], ...]) -> str | None:
    keys = list(keys)
    for pattern, name in patterns:
        found = re.compile(pattern)
        if any(found.search(key) for key in keys):
            return name
    return None


def family_of_checkpoint(shapes: Shapes, *, where: str | None = None) -> ModelFamily:
    """The family of a whole model in one file, in the original (LDM) layout.

    Args:
        shapes: key -> shape of every tensor.
        where: how sentences name the file.

    Raises:
        UserError: naming what the file is instead, or which part it lacks.
    """
    remedy = f"give a {_TITLES} model"
    other = _first_match(shapes, _OTHER_CHECKPOINTS[:4])
    if other is None and not any(key.startswith(_UNET) for key in shapes):
        other = (
            _first_match(shapes, _OTHER_CHECKPOINTS)
            or "not a Stable Diffusion model: it has no model.diffusion_model tensors"
        )
        other = "empty: it has no tensors" if not shapes else other
    if other:
        raise UserError(f"is {other}", where=where, remedy=remedy)
    _check_inputs(shapes.get(f"{_UNET}input_blocks.0.0.weight", (0, 4))[1], where, remedy)
    for family in _BASE_FAMILIES:
        if all(any(key.startswith(encoder.file_prefixes) for key in shapes) for encoder in family.text_encoders):
            return family
    width = next((shape[1] for key, shape in shapes.items() if key.startswith(_UNET) and _CONTEXT.search(key)), None)
    found = next((family for family in _BASE_FAMILIES if family.context_width == width), None)
    title = "Stable Diffusion" if found is None else found.title
    prefixes = [encoder.file_prefixes[0] for encoder in (found or SD1).text_encoders]
    missing = [prefix for prefix in prefixes if not any(key.startswith(prefix) for key in shapes)]
    raise UserError(
        f"has the U-Net of a {title} model, but no text encoder ({', '.join(missing)}*)",
        where=where,
        remedy="give the whole checkpoint",
    )


_CONTEXT = re.compile(r"\.attn2\.to_k\.weight$")


def _check_inputs(channels: int, where: str | None, remedy: str) -> None:
    """Refuse a U-Net that takes more than a latent."""
    if channels != SD1.latent_channels:
        kind = _OTHER_INPUTS.get(channels, f"a model with {channels} input channels")
        raise UserError(f"is {kind}, whose U-Net takes {channels} channels instead of 4", where=where, remedy=remedy)


# What else a file given as a ControlNet may be, likewise.
_OTHER_CONTROLS: tuple[tuple[str, str], ...] = (
    (r"^lllite_unet_", "a ControlNet-LLLite, which is for SDXL"),
    (r"^lora_controlnet$", "a Control-LoRA, which is for SDXL"),
    (r"(^|\.)(transformer_blocks\.\d+\.norm1_context|(double|joint)_blocks\.\d+)\.", "a ControlNet for SD3 or FLUX"),
    (r"^(adapter\.)?body\.\d+\.(block\d\.|in_conv\.|resnets\.)", "a T2I-Adapter, not a ControlNet"),
)
_CONTROL_NET = re.compile(r"^(control_model\.)?input_hint_block\.0\.weight$|^controlnet_cond_embedding\.conv_in\.weight$")


def family_of_control_net(shapes: Shapes, *, where: str | None = None) -> ModelFamily:
    """The family that a ControlNet is for, in the original layout or diffusers'.

    By the context's width, and for other (tiny) widths by whether it takes sizes and whether the projections are matrices.

    Raises:
        UserError: naming what the file is instead.
    """
    other = _first_match(shapes, _OTHER_CONTROLS)
    if other is None and not any(map(_CONTROL_NET.match, shapes)):
        known = (*_OTHER_CHECKPOINTS[:4], (rf"^{re.escape(_UNET)}", "a base model"), *_OTHER_CHECKPOINTS[4:])
        kind = (_first_match(shapes, known) or "").partition(",")[0]
        other = f"{kind}, not a ControlNet" if kind else "no ControlNet: it has no layers that read a hint image"
    if other:
        raise UserError(f"is {other}", where=where, remedy=f"give a ControlNet for {_TITLES}")
    width = next((shape[1] for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")), None)
    linear = any(len(shape) == 2 for key, shape in shapes.items() if key.endswith(".proj_in.weight"))
    sized = any(re.match(r"(control_model\.)?(label_emb|add_embedding)\.", key) for key in shapes)
    alike = [family for family in FAMILIES if bool(family.size_conditions) is sized]
    by_width = [family for family in alike if family.context_width == width]
    return (by_width or [family for family in alike if family.linear_projections is linear] or alike)[0]


# A part's folder that only other pipelines have, and their name.
_OTHER_FOLDERS = (
    ("transformer", "an SD3 or FLUX model"),
    ("text_encoder_3", "an SD3 model"),
    ("prior", "a Stable Cascade model"),
)


def family_of_folder(path: Path) -> ModelFamily:
    """The family of a diffusers folder, from its configuration files.

    Raises:
        UserError: naming what the folder is instead, or the part it lacks.
    """
    remedy = f"give a {_TITLES} model"
    for part, name in _OTHER_FOLDERS:
        if (path / part).is_dir():
            raise UserError(f"is {name}", where=str(path), remedy=remedy)
    unet = _read_config(path / "unet" / "config.json", path)
    _check_inputs(unet.get("in_channels", 4), str(path), remedy)
    parts = {encoder.part for family in FAMILIES for encoder in family.text_encoders}
    found = sorted(part for part in parts if (path / part).is_dir()) or ["text_encoder"]
    among = [each for each in _BASE_FAMILIES if {encoder.part for encoder in each.text_encoders} >= set(found)]
    family = family_of_configs(unet, [_read_config(path / part / "config.json", path) for part in found], among=among)
    missing = [encoder.part for encoder in family.text_encoders if encoder.part not in found]
    if missing:
        raise UserError(f"is a {family.title} model without its {missing[0]}", where=str(path), remedy="fetch it again")
    return family


def family_of_configs(
    unet: Mapping[str, Any], text_encoders: Sequence[Mapping[str, Any]], *, among: Sequence[ModelFamily] = ()
) -> ModelFamily:
    """The family of diffusers configurations.

    Whether the U-Net takes sizes and how many text encoders there are, then the context's width, and for other (tiny) widths
    the first text encoder's activation function: `gelu` in OpenCLIP, `quick_gelu` in OpenAI's CLIP.

    Args:
        unet: empty where there is none.
        text_encoders: as many as there are.
        among: those that it may be, where any of them takes sizes or takes none as the U-Net does; empty for any.
    """
    if unet:
        sized = bool(unet.get("addition_embed_type"))
        alike = [family for family in among if bool(family.size_conditions) is sized]
        alike = alike or [family for family in _BASE_FAMILIES if bool(family.size_conditions) is sized]
    else:
        alike = [family for family in FAMILIES if len(family.text_encoders) >= len(text_encoders)]
    width = unet.get("cross_attention_dim")
    activation = text_encoders[0].get("hidden_act", "quick_gelu") if text_encoders else None
    by_width = [family for family in alike if family.context_width == width]
    by_count = [family for family in alike if len(family.text_encoders) == len(text_encoders)] or alike
    by_activation = [family for family in by_count if family.text_encoders[0].config["hidden_act"] == activation]
    return (by_width or by_activation or by_count)[0]


def _read_config(path: Path, folder: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"is no diffusers model folder: it has no {path.relative_to(folder)}",
            where=str(folder),
            remedy="give a folder with unet, vae and text_encoder in it, or a checkpoint file",
        )
    return read_json_object(path, where=str(path))


# What else an adapter may be for, by a pattern that one of its keys matches, in any layout; the first that matches names it.
_OTHER_ADAPTERS: tuple[tuple[str, str], ...] = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "FLUX"),
    (r"joint_blocks|transformer_blocks[._]\d+[._]attn[._]add_[qkv]_proj", "SD3"),
    (r"^(lora_)?transformer[._]", "a diffusion transformer (SD3, FLUX or newer)"),
    (r"^(lora_unet_|diffusion_model\.)(blocks|layers)[._]\d", "a diffusion transformer (Lumina, Wan or newer)"),
    (r"^(lora_te3_|text_encoder_3\.|t5\.|text_encoders\.t5)", "SD3 or FLUX"),
)

# How other families begin in `ss_base_model_version` and `modelspec.architecture`.
_OTHER_VERSIONS = (
    ("sd3", "SD3"),
    ("stable-diffusion-3", "SD3"),
    ("flux", "FLUX"),
    ("stable_cascade", "Stable Cascade"),
    ("stable-cascade", "Stable Cascade"),
    ("lumina", "Lumina"),
)

_TEXT_CONTEXT = re.compile(r"attn2[._](?:processor[._])?to_[kv](?:_lora)?\.")
_TEXT_ENCODER = re.compile(r"(text_model|encoder)[._].*self_attn[._](?:q_proj|k_proj|v_proj|out_proj|to_[qkv]_lora)\.")


def adapter_origin(shapes: Shapes, metadata: Mapping[str, str]) -> ModelFamily | str | None:
    """What an adapter was trained for: one of our families, the name of another one, or None where nothing tells.

    The names and widths of its layers decide; where none tells (tiny models, unusual algorithms), what its metadata say.
    """
    other = _first_match(shapes, _OTHER_ADAPTERS)
    if other:
        return other
    for family in FAMILIES:
        if _first_match(shapes, tuple((mark, family.name) for mark in family.adapter_marks)):
            return family
    width = _adapter_width(shapes)
    for widths in (_context_widths, _text_widths):
        for family in FAMILIES:
            if width in widths(family):
                return family
    return _family_said(metadata)


def _context_widths(family: ModelFamily) -> set[int]:
    return {family.context_width}


def _text_widths(family: ModelFamily) -> set[int]:
    return {encoder.config["hidden_size"] for encoder in family.text_encoders}


def family_of_adapter(
    shapes: Shapes,
    *,
    metadata: Mapping[str, str] | None = None,
    where: str | None = None,
    default: ModelFamily | None = None,
) -> ModelFamily:
    """The family that an adapter was trained for; see `adapter_origin`.

    Args:
        default: of an adapter that says nothing; None to refuse it.

    Raises:
        UserError: for an adapter of another family, or one that says nothing where there is no default.
    """
    origin = adapter_origin(shapes, metadata or {}) or default
    if isinstance(origin, str):
        raise UserError(f"is an adapter for {origin}", where=where, remedy=f"give one for {_TITLES}")
    if origin is None:
        raise UserError(
            "says nowhere which models it is for: no layer has a known text condition's width, and metadata are missing",
            where=where,
        )
    return origin


def _family_said(metadata: Mapping[str, str]) -> ModelFamily | str | None:
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    for family in FAMILIES:
        if version.startswith(family.known_as) or architecture.startswith(family.known_as):
            return family
    for beginning, name in _OTHER_VERSIONS:
        if version.startswith(beginning) or architecture.startswith(beginning):
            return name
    said = metadata.get("ss_v2")
    return next((family for family in FAMILIES if str(family.is_v2) == said), None)


def _adapter_width(shapes: Shapes) -> int | None:
    """How wide the text condition is that the adapted layers take."""
    for key in shapes:
        if _TEXT_CONTEXT.search(key):
            width = _input_width(key, shapes)
            if width:
                return width
    for key in shapes:
        # These layers of a text encoder are square, so that either side tells.
        if _TEXT_ENCODER.search(key):
            width = _input_width(key, shapes) or _output_width(key, shapes)
            if width:
                return width
    return None


_DOWN_FACTORS = ("lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight", "hada_w1_b", "hada_w2_b", "diff")
_DOWN_PEFT = re.compile(r"\.lora_A(\.\w+)*$|_lora\.down\.weight$")


def _input_width(key: str, shapes: Shapes) -> int | None:
    """Inputs of the base layer, where this tensor shows them; None where it does not."""
    shape = shapes[key]
    layer, _, tensor = key.rpartition(".")
    if len(shape) == 1 and key.endswith(".weight") and f"{layer}.on_input" in shapes:
        # (IA)3 has one number for each input or each output; no output of a U-Net's layer is as wide as a text condition.
        known = {family.context_width for family in FAMILIES}
        return shape[0] if shape[0] in known else None
    if len(shape) < 2:
        return None
    if key.endswith(tuple(f".{name}" for name in _DOWN_FACTORS)) or _DOWN_PEFT.search(key):
        return shape[1]
    if tensor == "dora_scale" and shape[0] == 1:
        return shape[1]
    if key.endswith((".a1.weight", ".a2.weight")):
        return max(shape)  # GLoRA: (in, rank), or (rank, in) in its old naming
    if tensor in ("lokr_w2", "lokr_w2_b"):
        first = shapes.get(f"{layer}.lokr_w1") or shapes.get(f"{layer}.lokr_w1_b")
        return shape[1] * first[1] if first else None
    return None


def _output_width(key: str, shapes: Shapes) -> int | None:
    """Outputs of the base layer, where this tensor shows them; None where it does not."""
    shape = shapes[key]
    if key.endswith(".oft_blocks"):
        return shape[-3] * shape[-1] if len(shape) in (3, 4) else None
    if key.endswith((".lora_up.weight", ".hada_w1_a", ".hada_w2_a", ".dora_scale", ".diff_b")):
        return shape[0] if shape and shape[0] > 1 else None
    return None
