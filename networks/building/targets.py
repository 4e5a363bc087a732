"""The layers of a model that an adapter can be put on, with the names under which adapters are saved.

Which of them get one is another question: `selection.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.errors import UserError
from library.families.detect import family_of_configs
from library.families.family import ModelFamily
from networks.core.adapter import LayerSpec
from networks.formats.keys import saved_name
from networks.formats.layer_names import DENOISER as DENOISER
from networks.formats.layer_names import TEXT_ENCODERS as TEXT_ENCODERS
from networks.formats.layer_names import Part as Part

_ADAPTABLE = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One layer that may get an adapter.

    Attributes:
        name: saved layer name ("lora_unet_mid_block_attentions_0_proj_in"), in the family's wording.
        path: of the module in its model ("mid_block.attentions.0.proj_in"), which patterns are matched with.
        part: which part of the model it belongs to.
        inside: class names of the modules around it, outermost first, and of the layer itself.
        block: its place among the U-Net's block values; None in text encoders, and outside the blocks.
        layer: the base layer itself.
        spec: its shape.
    """

    name: str
    path: str
    part: Part
    inside: tuple[str, ...]
    block: int | None
    layer: nn.Module
    spec: LayerSpec


def text_encoder_list(text_encoder: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    """sd-scripts hands over one text encoder, a list of them, or None: always a list here."""
    if text_encoder is None:
        return []
    return [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder)


def family_of_models(text_encoder: nn.Module | Sequence[nn.Module] | None, unet: nn.Module | None) -> ModelFamily:
    """The family of models in hand, by their configurations.

    Raises:
        UserError: more text encoders than the U-Net's family has.
    """
    encoders = text_encoder_list(text_encoder)
    configs: list[Any] = [getattr(encoder, "config", None) for encoder in encoders]
    family = family_of_configs(
        dict(getattr(unet, "config", {})), [config.to_dict() for config in configs if config is not None]
    )
    if len(encoders) > len(family.text_encoders):
        what = f"{len(encoders)} text encoders given with a U-Net of {family.title}"
        raise UserError(what, remedy="give the models of one base model")
    return family


def model_layers(
    family: ModelFamily, text_encoder: nn.Module | Sequence[nn.Module] | None, unet: nn.Module | None
) -> list[Target]:
    """Every layer that an adapter can be put on, text encoders first, in the order of the models' modules."""
    targets: list[Target] = []
    encoders = text_encoder_list(text_encoder)
    for part, prefix, encoder in zip(TEXT_ENCODERS, family.text_encoder_prefixes, encoders, strict=False):
        targets += _in_model(encoder, prefix, part, family)
    if unet is not None:
        targets += _in_model(unet, family.denoiser_prefix, DENOISER, family)
    return targets


def _in_model(model: nn.Module, prefix: str, part: Part, family: ModelFamily) -> Iterator[Target]:
    for path, inside, layer in _layers_of(model, "", ()):
        try:
            spec = LayerSpec.of(layer)
        except TypeError:
            continue
        name = saved_name(prefix, path, family)
        block = family.block_index(name) if part == DENOISER else None
        yield Target(name=name, path=path, part=part, inside=inside, block=block, layer=layer, spec=spec)


def _layers_of(module: nn.Module, path: str, around: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...], nn.Module]]:
    inside = (*around, type(module).__name__)
    if isinstance(module, _ADAPTABLE):
        yield path, inside, module
    for name, child in module.named_children():
        yield from _layers_of(child, f"{path}.{name}" if path else name, inside)
