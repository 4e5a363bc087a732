"""Which layers get an adapter: what the family's target classes contain, with the names under which adapters are saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from library.errors import UserError
from library.families.detect import family_of_configs
from library.families.family import ModelFamily
from networks.core.adapter import LayerSpec
from networks.core.keys import saved_name

Part = Literal["text_encoder", "denoiser"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One layer that may get an adapter.

    Attributes:
        name: saved layer name ("lora_unet_mid_block_attentions_0_proj_in").
        part: which part of the model it belongs to.
        block: its place among the U-Net's block values; None in text encoders.
        layer: the base layer itself.
        spec: its shape.
    """

    name: str
    part: Part
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
        UserError: a U-Net of a family that is not supported (SDXL).
    """
    unet_config = dict(getattr(unet, "config", {}))
    encoders = text_encoder_list(text_encoder)
    if unet_config.get("addition_embed_type") or len(encoders) > 1:
        raise UserError("adapters for SDXL are not supported", remedy="give a Stable Diffusion 1.x or 2.x model")
    config = getattr(encoders[0], "config", None) if encoders else None
    return family_of_configs(unet_config, config.to_dict() if config is not None else {})


def find_targets(
    family: ModelFamily,
    text_encoder: nn.Module | Sequence[nn.Module] | None,
    unet: nn.Module | None,
    *,
    with_convolutions: bool,
) -> list[Target]:
    """Every layer that an adapter may be put on, text encoders first, in the order of the models' modules.

    Args:
        with_convolutions: also the residual and resampling blocks' layers (C3Lier).

    Raises:
        UserError: a model without a single target layer.
    """
    targets: list[Target] = []
    encoders = text_encoder_list(text_encoder)
    for prefix, encoder in zip(family.text_encoder_prefixes, encoders, strict=False):
        targets += _in_model(encoder, family.text_encoder_targets, prefix, "text_encoder", family)
    if unet is not None:
        # A new tuple each time: the family's own must not grow with the first C3Lier network.
        classes = family.denoiser_targets + (family.denoiser_conv_targets if with_convolutions else ())
        targets += _in_model(unet, classes, family.denoiser_prefix, "denoiser", family)
    return targets


def _in_model(model: nn.Module, classes: tuple[str, ...], prefix: str, part: Part, family: ModelFamily) -> list[Target]:
    targets = []
    for path, layer in _layers_inside(model, classes):
        name = saved_name(prefix, path)
        block = family.block_index(name) if part == "denoiser" else None
        targets.append(Target(name=name, part=part, block=block, layer=layer, spec=LayerSpec.of(layer)))
    if not targets:
        raise UserError(
            f"{type(model).__name__} has no layer to adapt: none of the classes {', '.join(classes)} occurs in it",
            remedy=f"give a {family.title} model",
        )
    return targets


def _layers_inside(model: nn.Module, classes: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of every Linear and Conv2d below a module of the given classes, each once."""
    seen: set[str] = set()
    for path, module in model.named_modules():
        if type(module).__name__ not in classes:
            continue
        for inner_path, layer in module.named_modules(prefix=path):
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and inner_path not in seen:
                seen.add(inner_path)
                yield inner_path, layer
