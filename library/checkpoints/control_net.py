"""ControlNets: a diffusers folder, or one file in diffusers' layout or the original one (`control_model.*`)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.base_model import BaseModelFiles
from library.checkpoints.folder import part_of_folder
from library.checkpoints.inferred_configs import infer_config
from library.checkpoints.ldm_keys import KeyTable, control_net_table
from library.checkpoints.part_names import check_names
from library.checkpoints.parts import CONTROL_NET, UNET, ModelPart, TensorSource
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_places import TensorFile
from library.errors import UserError, some_names
from library.families.detect import family_of_control_net
from library.families.family import ModelFamily

if TYPE_CHECKING:
    import torch
    from diffusers import ControlNetModel
    from torch import nn

_PREFIX = "control_model."
_DIFFERENCE = "difference"
_MODULE_OF_HINTS = "controlnet_cond_embedding.conv_in.weight"
_HAS_TO_FIT = ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels")
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class ControlNetFiles:
    """What a path holds, known from headers alone.

    Attributes:
        family: of the base models that it is for.
        part: its configuration and where its tensors are.
        is_difference: its weights are differences from the base model's, which are added when it is loaded.
    """

    family: ModelFamily
    part: ModelPart
    is_difference: bool = False

    def check_base_model(self, base_model: BaseModelFiles) -> None:
        """Refuse a base model that this ControlNet is not for.

        Raises:
            UserError: another family, or other sizes.
        """
        where = self.part.where
        if self.family.name != base_model.family.name:
            other = f"and the base model is {base_model.family.title}"
            raise UserError(f"is a ControlNet for {self.family.title}, {other}", where=where)
        unet = base_model.parts[UNET].config
        for key in _HAS_TO_FIT:
            own, others = (_plain(config.get(key)) for config in (self.part.config, unet))
            if own != others and None not in (own, others):
                raise UserError(f"does not fit the base model: its {key} is {own}, the U-Net's {others}", where=where)

    def load(self, denoiser: nn.Module, *, dtype: torch.dtype, device: torch.device | str) -> ControlNetModel:
        """The model, frozen, in evaluation mode.

        Args:
            denoiser: the base model's, to which differences are added.
        """
        net: Any = self.part.load(dtype=dtype, device=device)
        if self.is_difference:
            base = dict(denoiser.named_parameters())
            for name, parameter in net.named_parameters():
                if name in base:
                    parameter.data = (parameter.float() + base[name].to(device).float()).to(dtype)
        return net


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def open_control_net(path: Path | str) -> ControlNetFiles:
    """Find out what a path holds.

    Raises:
        UserError: not found, no ControlNet, one for other models, or not a whole one.
    """
    path = Path(os.path.expanduser(path))
    files = _open_folder(path) if path.is_dir() else _open_file(open_tensor_file(path))
    check_names(files.part, control_net_table(files.part.config))
    return files


def _open_folder(path: Path) -> ControlNetFiles:
    if not (path / "config.json").is_file():
        remedy = "give the ControlNet's own folder, or a file"
        raise UserError("is a folder without config.json", where=str(path), remedy=remedy)
    part = part_of_folder(path, CONTROL_NET)
    shapes = {name: source.shape for name, source in part.sources.items()}
    return ControlNetFiles(family=family_of_control_net(shapes, where=str(path)), part=part)


def _open_file(file: TensorFile) -> ControlNetFiles:
    where = str(file.path)
    family = family_of_control_net(file.shapes(), where=where)
    prefix = _PREFIX if any(key.startswith(_PREFIX) for key in file.places) else ""
    keys = {key: key.removeprefix(prefix) for key in file.places if key.startswith(prefix) and key != _DIFFERENCE}
    if _MODULE_OF_HINTS in file:
        names: Mapping[str, str | None] = keys
        table = _table_of_names(keys.values())
        originals = {table.to_original(name): file.shape(key) for key, name in keys.items()}
        config = infer_config(CONTROL_NET, {key: shape for key, shape in originals.items() if key}, family, where)
    else:
        config = infer_config(CONTROL_NET, {name: file.shape(key) for key, name in keys.items()}, family, where)
        table = control_net_table(config)
        names = {key: table.to_module(name) for key, name in keys.items()}
    strange = [key for key, name in names.items() if name is None]
    if strange:
        raise UserError(f"has tensors that a ControlNet has no place for: {some_names(strange, SHOWN)}", where=where)
    sources = {name: TensorSource(file, key) for key, name in names.items() if name is not None}
    part = ModelPart(kind=CONTROL_NET, config=config, sources=sources, where=where)
    return ControlNetFiles(family=family, part=part, is_difference=_DIFFERENCE in file)


def _table_of_names(names: Iterable[str]) -> KeyTable:
    """The table for a file in diffusers' layout: what it depends on shows in the names."""
    names = list(names)

    def numbers(pattern: str) -> set[int]:
        return {int(match[1]) for match in map(re.compile(rf"{pattern}\.weight$").match, names) if match}

    levels = numbers(r"down_blocks\.(\d+)\.resnets\.0\.conv1")
    attended = numbers(r"down_blocks\.(\d+)\.attentions\.0\.proj_in")
    hint_layers = numbers(r"controlnet_cond_embedding\.blocks\.(\d+)")
    return control_net_table(
        {
            "layers_per_block": len(numbers(r"down_blocks\.0\.resnets\.(\d+)\.conv1")),
            "down_block_types": ["CrossAttnDownBlock2D" if each in attended else "DownBlock2D" for each in sorted(levels)],
            "conditioning_embedding_out_channels": (0,) * (len(hint_layers) // 2 + 1),
        }
    )
