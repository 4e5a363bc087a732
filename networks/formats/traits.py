"""What an adapter file's header shows of each of its layers: how it is named, what it is made of, and what is unusual.

These traits are what programs differ in; `readers.py` says what each of them makes of which trait. Nothing here reads
weights: names and shapes, and the few values that decide (alpha, on_input).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from library.families.family import LayerWording, ModelFamily
from networks.formats.layer_names import layer_names
from networks.formats.peft_metadata import PeftScales

if TYPE_CHECKING:
    from library.checkpoints.tensor_places import TensorFile

Shape = tuple[int, ...]


class Trait(StrEnum):
    """A property of a layer in a file, by the words that sentences use for it."""

    # How the layer is named
    KOHYA_NAME = "kohya's names"
    ORIGINAL_NAME = "names of the original Stable Diffusion layout"
    DIFFUSERS_NAME = "diffusers' names where kohya writes the original ones"
    DIFFUSERS_UPSAMPLER = "diffusers' name of the first upsampler"
    DIFFUSERS_SIZES = "add_embedding"
    FIRST_OF_TWO_NAME = "lora_te1_ names for the only text encoder"
    ONLY_ONE_NAME = "lora_te_ names where there are two text encoders"
    PEFT_NAME = "PEFT's names"
    PEFT_ATTENTION_NAME = "PEFT's names of attention layers"
    OLD_DIFFUSERS_NAME = "names of old diffusers (processor.to_q_lora)"
    DOTTED_TEXT_NAME = "text_encoder. or text_encoder_2. names"
    BARE_NAME = "module names without a prefix"
    COMFY_NAME = "diffusion_model. names"
    COMFY_TEXT_NAME = "text_encoders. names"
    LYCORIS_NAME = "lycoris_ names"
    BASE_MODEL_NAME = "base_model.model. names"
    OFT_NAME = "oft_unet_ names"
    OFT_ORIGINAL_NAME = "oft_unet_ names of the original layout"
    OMI_NAME = "OMI's names"
    EMBEDDING = "an embedding in the file (bundle_emb)"
    UNKNOWN_NAME = "names of no known layout"
    STRANGE_LAYER = "layers that the models have not"
    FINAL_NORM = "conv_norm_out"
    TEXT_NORM = "a norm in the text encoder"
    TEXT_PROJECTION = "text_projection"
    # What it is made of
    MISFIT = "tensors that do not go together"
    LORA = "LoRA"
    TUCKER = "LoRA in Tucker form"
    AB_TENSORS = "lora_A and lora_B under kohya's names"
    AB_ALPHA = "alpha beside lora_A and lora_B"
    ONLY_UP = "lora_up without lora_down"
    ONLY_DOWN = "lora_down without lora_up"
    LOHA = "LoHa"
    LOKR = "LoKr"
    LOKR_TUCKER = "LoKr in Tucker form"
    GLORA = "GLoRA"
    GLORA_OLD = "GLoRA in its old naming"
    IA3 = "(IA)3"
    OFT = "OFT"
    OFT_MATRICES = "oft_diag of old LyCORIS"
    BOFT = "BOFT"
    FULL = "the full difference"
    NORM = "a norm's difference"
    BIAS_ALONE = "diff_b alone"
    NORM_WEIGHT_ALONE = "w_norm alone"
    NORM_BIAS_ALONE = "b_norm alone"
    ALPHA_ALONE = "alpha alone"
    FOREIGN = "tensors of no known algorithm"
    # What is unusual about it
    NO_ALPHA = "no alpha"
    METADATA_ALPHA = "alpha in the metadata"
    GLORA_OLD_NO_ALPHA = "GLoRA in its old naming without alpha"
    GLORA_OLD_KERNEL = "GLoRA in its old naming on a convolution"
    IA3_OUTPUT_KERNEL = "(IA)3 along the outputs of a convolution"
    OFT_NO_LIMIT = "OFT with alpha 0 or none"
    BOFT_NO_ALPHA = "BOFT without alpha"
    ROW_SCALE = "rescale"
    DORA_INPUT = "DoRA along the inputs"
    DORA_OUTPUT = "DoRA along the outputs"
    DORA_FLAT = "DoRA magnitudes without axes"
    DORA_NOT_LORA = "DoRA on something else than plain LoRA"
    MAGNITUDE_VECTOR = "lora_magnitude_vector"
    BIAS_BESIDE = "diff_b beside other factors"
    FULL_BESIDE = "diff beside other factors"
    SCALE = "scale"
    SPARSE_RESIDUE = "bias_indices (a sparse residue)"
    EXTRA = "tensors beside the algorithm's own"
    ON_NORM = "LoRA on a norm"
    FLAT_KERNEL = "a convolution's factors without kernel axes"
    OTHER_PROJECTION = "projections in the other family's shape"


@dataclass(frozen=True, kw_only=True)
class Header:
    """Of one adapter file.

    Attributes:
        shapes: key -> shape, in the file's order.
        scalars: key -> value, of the tensors with one value that decide (`SCALARS`).
        family: which models the file is for.
        metadata: of the file.
    """

    shapes: Mapping[str, Shape]
    scalars: Mapping[str, float]
    family: ModelFamily
    metadata: Mapping[str, str] = field(default_factory=dict)


SCALARS = ("alpha", "on_input")
"""Names of tensors within a layer whose values a header has."""


def read_header(file: TensorFile, family: ModelFamily) -> Header:
    """The header of an opened file; reads its scalars and no other tensor."""
    scalars = {key: float(file.read(key).flatten()[0]) for key in file.keys() if is_scalar(key, file.shape(key))}  # noqa: SIM118
    return Header(shapes=file.shapes(), scalars=scalars, family=family, metadata=file.metadata)


def is_scalar(key: str, shape: Shape) -> bool:
    """Whether the tensor is one of `SCALARS`."""
    return key.rpartition(".")[2] in SCALARS and all(size == 1 for size in shape)


@dataclass(frozen=True, kw_only=True)
class FileLayer:
    """One layer as the file names it.

    Attributes:
        name: the part of its keys before the tensors' names.
        shapes: tensor name within the layer, in kohya's words (`lora_down.weight`) -> shape.
        keys: tensor name likewise -> key in the file.
        traits: what is known of it; the name's trait first, then what it is made of, then what is unusual.
    """

    name: str
    shapes: Mapping[str, Shape]
    keys: Mapping[str, str]
    traits: tuple[Trait, ...]


_TENSOR_NAMES = re.compile(
    r"\.((?:lora_up|lora_down|lora_mid|a1|a2|b1|b2)\.weight|lora_[AB](?:\.default)?\.weight|lora_[AB]"
    r"|lora(?:_linear_layer)?\.(?:up|down)\.weight|lora_magnitude_vector(?:\.default)?(?:\.weight)?|magnitude|alpha"
    r"|dora_scale|hada_\w+|lokr_\w+|oft_\w+|rescale|diff|diff_b|w_norm|b_norm|on_input|weight|scale|bias_\w+)$"
)
_OLD_PROCESSOR = re.compile(r"(_lora)\.(up|down)\.weight$")
_KOHYA_LIKE = re.compile(r"(lora_(unet|te\d?|transformer)|lycoris|oft_unet)_")


def split_any_key(key: str) -> tuple[str, str]:
    """Layer and tensor name of a key of any layout; tensors in kohya's words.

    >>> split_any_key("unet.mid_block.attentions.0.proj_in.lora_A.weight")
    ('unet.mid_block.attentions.0.proj_in', 'lora_down.weight')
    """
    if _KOHYA_LIKE.match(key):
        layer, _, tensor = key.partition(".")
        return layer, tensor
    if found := _OLD_PROCESSOR.search(key):
        return key[: found.end(1)], f"lora_{found[2]}.weight"
    found = _TENSOR_NAMES.search(key)
    if found is None:
        layer, _, tensor = key.rpartition(".")
        return layer or key, tensor if layer else ""
    return key[: found.start()], _kohya_words(found[1])


def _kohya_words(tensor: str) -> str:
    if tensor.startswith("lora_A") or tensor.endswith(".down.weight"):
        return "lora_down.weight"
    if tensor.startswith("lora_B") or tensor.endswith(".up.weight"):
        return "lora_up.weight"
    return "lora_magnitude_vector" if tensor.startswith("lora_magnitude_vector") else tensor


def file_layers(header: Header) -> dict[str, FileLayer]:
    """Every layer of a file by its name there, in the file's order."""
    keys: dict[str, dict[str, str]] = {}
    for key in header.shapes:
        layer, tensor = split_any_key(key)
        keys.setdefault(layer, {})[tensor] = key
    scales = PeftScales.read(header.metadata)
    layers = {}
    for name, of_layer in keys.items():
        shapes = {tensor: tuple(header.shapes[key]) for tensor, key in of_layer.items()}
        scalars = {tensor: header.scalars[key] for tensor, key in of_layer.items() if key in header.scalars}
        of_name = name_trait(name, header.family)
        if of_name in (Trait.KOHYA_NAME, Trait.DIFFUSERS_NAME) and layer_names(header.family).find(name) is None:
            of_name = Trait.STRANGE_LAYER
        content = [] if of_name is Trait.EMBEDDING else list(_made_of(name, shapes, scalars, header.family))
        if scales and _is_scaled(name, shapes, scales, header.family):
            content.append(Trait.METADATA_ALPHA)
        layers[name] = FileLayer(name=name, shapes=shapes, keys=of_layer, traits=(of_name, *content))
    return layers


def _is_scaled(name: str, shapes: Mapping[str, Shape], scales: PeftScales, family: ModelFamily) -> bool:
    """Whether metadata give a layer without alpha another one than its rank."""
    found, down = layer_names(family).find(name), shapes.get("lora_down.weight")
    if found is None or down is None or "alpha" in shapes:
        return False
    return scales.alpha(found, rank=down[0]) not in (None, down[0])


def holds_adapter(keys: Iterable[str]) -> bool:
    """Whether a file with these keys has a layer of any known algorithm, whole or not."""
    layers: dict[str, set[str]] = {}
    for key in keys:
        layer, tensor = split_any_key(key)
        layers.setdefault(layer, set()).add(tensor)
    return any(_algorithm_of(tensors) is not Trait.FOREIGN for tensors in layers.values())


def _algorithm_of(tensors: Container[str]) -> Trait:
    return next((trait for needed, trait in _ALGORITHMS if all(each in tensors for each in needed)), Trait.FOREIGN)


_ORIGINAL = r"(input_blocks|output_blocks|middle_block|time_embed_\d|label_emb|out_\d)"
_DENOISER_NAMES: Mapping[LayerWording, tuple[tuple[str, Trait], ...]] = {
    "diffusers": (
        (rf"lora_unet_{_ORIGINAL}", Trait.ORIGINAL_NAME),
        (r"lora_unet_conv_norm_out$", Trait.FINAL_NORM),
        (r"lora_unet_", Trait.KOHYA_NAME),
    ),
    "original": (
        (rf"lora_unet_{_ORIGINAL}", Trait.KOHYA_NAME),
        (r"lora_unet_conv_norm_out$", Trait.FINAL_NORM),
        (r"lora_unet_up_blocks_0_upsamplers_0_conv$", Trait.DIFFUSERS_UPSAMPLER),
        (r"lora_unet_add_embedding", Trait.DIFFUSERS_SIZES),
        (r"lora_unet_", Trait.DIFFUSERS_NAME),
    ),
}
"""Whose names the family's adapters are saved under -> the first pattern that a layer's name matches."""
_NAMES: tuple[tuple[str, Trait], ...] = (  # likewise
    (r"lora_te\d?_.*layer_norm\d?$", Trait.TEXT_NORM),
    (r"lora_te2_text_projection$", Trait.TEXT_PROJECTION),
    (r"lycoris_", Trait.LYCORIS_NAME),
    (r"oft_unet_(input_blocks|output_blocks|middle_block)", Trait.OFT_ORIGINAL_NAME),
    (r"oft_unet_", Trait.OFT_NAME),
    (r"bundle_emb(\.|$)", Trait.EMBEDDING),
    (r"base_model\.model\.", Trait.BASE_MODEL_NAME),
    (r"diffusion_model\.", Trait.COMFY_NAME),
    (r"text_encoders\.", Trait.COMFY_TEXT_NAME),
    (r"text_encoder(_2)?\.", Trait.DOTTED_TEXT_NAME),
    (r"(unet\.)?.*\.processor\.to_\w+_lora$", Trait.OLD_DIFFUSERS_NAME),
    (r"unet\..*\.(to_[qkv]|to_out\.0)$", Trait.PEFT_ATTENTION_NAME),
    (r"unet\.", Trait.PEFT_NAME),
    (r"clip_[lg]\.", Trait.OMI_NAME),
    (r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\.", Trait.BARE_NAME),
)
_TEXT_NAMES = (("lora_te_", Trait.ONLY_ONE_NAME), ("lora_te1_", Trait.FIRST_OF_TWO_NAME), ("lora_te2_", Trait.UNKNOWN_NAME))
"""Beginnings of kohya's names, and what those are that the family has not."""


def name_trait(name: str, family: ModelFamily) -> Trait:
    """Which layout a layer's name is of."""
    patterns = (*_DENOISER_NAMES[family.denoiser_wording], *_NAMES)
    found = next((trait for pattern, trait in patterns if re.match(pattern, name)), None)
    if found is not None:
        return found
    of_text = next(((beginning, other) for beginning, other in _TEXT_NAMES if name.startswith(beginning)), None)
    if of_text is None:
        return Trait.UNKNOWN_NAME
    return Trait.KOHYA_NAME if of_text[0].removesuffix("_") in family.text_encoder_prefixes else of_text[1]


_ALGORITHMS: tuple[tuple[tuple[str, ...], Trait], ...] = (  # the first whose tensors a layer has all
    (("lora_up.weight", "lora_down.weight", "lora_mid.weight"), Trait.TUCKER),
    (("lora_up.weight", "lora_down.weight"), Trait.LORA),
    (("lora_B.weight", "lora_A.weight"), Trait.AB_TENSORS),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), Trait.LOHA),
    (("weight", "on_input"), Trait.IA3),
    (("lokr_t2",), Trait.LOKR_TUCKER),
    (("lokr_w1",), Trait.LOKR),
    (("lokr_w1_a", "lokr_w1_b"), Trait.LOKR),
    (("diff",), Trait.FULL),
    (("w_norm", "b_norm"), Trait.NORM),
    (("oft_diag",), Trait.OFT_MATRICES),
    (("oft_blocks",), Trait.OFT),
    (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), Trait.GLORA),
    (("lora_up.weight",), Trait.ONLY_UP),
    (("lora_down.weight",), Trait.ONLY_DOWN),
    (("diff_b",), Trait.BIAS_ALONE),
    (("w_norm",), Trait.NORM_WEIGHT_ALONE),
    (("b_norm",), Trait.NORM_BIAS_ALONE),
    (("alpha",), Trait.ALPHA_ALONE),
)
_OWN_TENSORS = re.compile(
    r"alpha|dora_scale|lora_(up|down|mid|A|B)\.weight|hada_\w+|lokr_\w+|weight|on_input|diff|diff_b|[wb]_norm"
    r"|oft_(diag|blocks)|rescale|[ab][12]\.weight|lora_magnitude_vector|scale|bias_(indices|values|size)"
)
_WITH_ALPHA = {Trait.LORA, Trait.TUCKER, Trait.LOHA, Trait.LOKR, Trait.LOKR_TUCKER, Trait.GLORA}
WIDE_LAYER = re.compile(r"(conv1|conv2|conv_in|conv_out|samplers\.\d+\.conv)$")
PROJECTION = re.compile(r"attentions\.\d+\.proj_(in|out)$")
"""Paths of layers with a kernel, and of those that are a matrix in one family and a convolution in another."""
_CONVOLUTION = re.compile(rf"{WIDE_LAYER.pattern}|conv_shortcut$")
_NORM_LAYER = re.compile(r"norm\d?$|conv_norm_out$")


def _made_of(name: str, shapes: Mapping[str, Shape], scalars: Mapping[str, float], family: ModelFamily) -> Iterator[Trait]:
    """The algorithm's trait and the unusual ones."""
    found = _algorithm_of(shapes)
    axes = {tensor: len(shape) for tensor, shape in shapes.items()}
    if found is Trait.GLORA and is_old_glora(shapes):
        found = Trait.GLORA_OLD
    if found is Trait.OFT and axes["oft_blocks"] == 4:
        found = Trait.BOFT
    yield found
    if _misfits(shapes):
        yield Trait.MISFIT
    yield from _dora_traits(found, shapes)
    has_alpha = "alpha" in shapes
    old = found is Trait.GLORA_OLD
    unusual = {
        Trait.NO_ALPHA: found in _WITH_ALPHA and not has_alpha,
        Trait.AB_ALPHA: found is Trait.AB_TENSORS and has_alpha and scalars.get("alpha") != shapes["lora_A.weight"][0],
        Trait.GLORA_OLD_NO_ALPHA: old and not has_alpha,
        Trait.GLORA_OLD_KERNEL: old and max(axes.values()) == 4,
        Trait.IA3_OUTPUT_KERNEL: found is Trait.IA3 and axes["weight"] > 2 and scalars.get("on_input") == 0,
        Trait.OFT_NO_LIMIT: found is Trait.OFT and not scalars.get("alpha"),
        Trait.BOFT_NO_ALPHA: found is Trait.BOFT and not has_alpha,
        Trait.ROW_SCALE: "rescale" in shapes,
        Trait.MAGNITUDE_VECTOR: "lora_magnitude_vector" in shapes,
        Trait.BIAS_BESIDE: "diff_b" in shapes and found not in (Trait.FULL, Trait.BIAS_ALONE),
        Trait.FULL_BESIDE: "diff" in shapes and found is not Trait.FULL,
        Trait.SCALE: "scale" in shapes,
        Trait.SPARSE_RESIDUE: "bias_indices" in shapes,
        Trait.EXTRA: found is not Trait.FOREIGN and not all(_OWN_TENSORS.fullmatch(tensor) for tensor in shapes),
        Trait.ON_NORM: found is Trait.LORA and bool(_NORM_LAYER.search(layer_names(family).path(name))),
    }
    yield from (trait for trait, holds in unusual.items() if holds)
    if found is Trait.LORA:
        yield from _shape_traits(name, axes["lora_down.weight"], family)


def _dora_traits(found: Trait, shapes: Mapping[str, Shape]) -> Iterator[Trait]:
    magnitude = shapes.get("dora_scale")
    if magnitude is None:
        return
    if len(magnitude) < 2:
        yield Trait.DORA_FLAT
    else:
        yield Trait.DORA_INPUT if magnitude[0] == 1 else Trait.DORA_OUTPUT
    if found is not Trait.LORA:
        yield Trait.DORA_NOT_LORA


def _shape_traits(name: str, axes: int, family: ModelFamily) -> Iterator[Trait]:
    """Factors whose axes are not those of the layer in diffusers."""
    path = layer_names(family).path(name)
    if _CONVOLUTION.search(path):
        if axes == 2:
            yield Trait.FLAT_KERNEL
    elif PROJECTION.search(path) and (axes == 2) is not family.linear_projections:
        yield Trait.OTHER_PROJECTION


def _misfits(shapes: Mapping[str, Shape]) -> bool:
    """Whether a layer's tensors cannot be meant together: an alpha of several numbers, factors of different or no ranks."""
    alpha, down, up = (shapes.get(tensor) for tensor in ("alpha", "lora_down.weight", "lora_up.weight"))
    if alpha is not None and any(size != 1 for size in alpha):
        return True
    if down is None or up is None:
        return (down is not None or up is not None) and "diff" in shapes
    ranks = shapes.get("lora_mid.weight", (down[0], down[0]))[:2]
    return len(down) < 2 or len(up) < 2 or ranks != (up[1], down[0]) or not all(ranks)


def is_old_glora(shapes: Mapping[str, Shape]) -> bool:
    """Whether a GLoRA layer is in the naming of LyCORIS 2, where `a1` and `b1` come first in the product's right half.

    There a1 and b1 are (rank, in), a2 is (in, rank) and b2 (out, rank); since LyCORIS 3, a1 is (in, rank), b1 (out, rank),
    a2 and b2 are (rank, in). On a layer with as many inputs as outputs either may be, with inputs and rank in each other's
    place; then the rank is taken for the smaller of both.
    """
    a1, a2, b1, b2 = (shapes.get(f"{name}.weight", (0, 0)) for name in ("a1", "a2", "b1", "b2"))
    newer = a1[1] == a2[0] == b1[1] == b2[0]
    older = a1[0] == a2[1] == b1[0] == b2[1]
    return older and (not newer or a1[0] < a1[1])


_RANK_AXES: tuple[tuple[str, int], ...] = (  # the first tensor of these that a layer has shows its rank along that axis
    ("lora_down.weight", 0),
    ("lora_A.weight", 0),
    ("hada_w1_b", 0),
    ("lokr_w2_b", 0),
    ("lokr_w1_b", 0),
)


def rank_by_shapes(shapes: Mapping[str, Shape]) -> int:
    """The rank of a layer, or the size of its blocks where it is rotated; 0 where it has neither.

    Args:
        shapes: of its tensors, in kohya's words.
    """
    for tensor, axis in (*_RANK_AXES, ("b1.weight", 0 if is_old_glora(shapes) else 1), ("oft_blocks", -1), ("oft_diag", -1)):
        if shapes.get(tensor):
            return shapes[tensor][axis]
    return 0
