"""ControlNets: hint images that pictures follow (Zhang et al., arXiv:2302.05543).

What a hint is made of is settled before anything is loaded, so torch, diffusers and Pillow are imported where they are used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from library.errors import UserError, attempt, counted, raise_all
from library.generation.requests import LATENT_FACTOR, ImageRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.checkpoints.base_model import BaseModelFiles
    from library.checkpoints.control_net import ControlNetFiles

CANNY_THRESHOLDS = (63, 191)
HINTS_KEPT = 64  # prepared hints that are remembered
_PREPARATION = re.compile(r"none|canny(?:_(\d+)_(\d+))?")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """One ControlNet and how it is used.

    Attributes:
        path: a diffusers folder, or a file in diffusers' or the original layout.
        preparation: "none", "canny", or "canny_LOW_HIGH": how a hint is made of an image.
        multiplier: of everything it adds.
        ratio: 0 to 1, the share of the steps, from the first, in which it acts.
    """

    path: str
    preparation: str = "none"
    multiplier: float = 1.0
    ratio: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.ratio <= 1:
            problems.append(UserError(f"a share of the steps of {self.ratio} is out of range", remedy="give 0 to 1"))
        if not math.isfinite(self.multiplier):
            problems.append(UserError(f"a strength of {self.multiplier} is no number"))
        found = _PREPARATION.fullmatch(self.preparation)
        if found is None:
            what = f"a hint cannot be prepared by {self.preparation!r}"
            problems.append(UserError(what, remedy="give none, canny, or canny with thresholds (canny_63_191)"))
        elif found[1] and int(found[1]) > int(found[2]):
            problems.append(UserError(f"the low threshold of {self.preparation} is above the high one"))
        raise_all(problems)

    @property
    def canny_thresholds(self) -> tuple[int, int] | None:
        """(low, high) for edges; None where the image is the hint."""
        found = _PREPARATION.fullmatch(self.preparation)
        if found is None or self.preparation == "none":
            return None
        return (int(found[1]), int(found[2])) if found[1] else CANNY_THRESHOLDS


def control_uses(
    models: Sequence[str],
    *,
    preparations: Sequence[str] = (),
    multipliers: Sequence[float] = (),
    ratios: Sequence[float] = (),
) -> tuple[ControlUse, ...]:
    """One use per model, from lists that may be shorter: what is missing has its default.

    Raises:
        UserError: a list longer than that of the models, or a value out of range; all of them at once.
    """
    problems: list[UserError] = []
    lists = (("preparation", preparations), ("multiplier", multipliers), ("ratio", ratios))
    for field, values in lists:
        if len(values) > len(models):
            what = f"{counted(len(values), field)} for {counted(len(models), 'ControlNet')}"
            problems.append(UserError(what, where=f"--control_net_models {' '.join(models)}".rstrip()))
    uses = []
    for number, model in enumerate(models):
        given: dict[str, Any] = {field: values[number] for field, values in lists if number < len(values)}
        try:
            uses.append(ControlUse(path=model, **given))
        except UserError as error:
            problems += [UserError(one.what, where=f"ControlNet {model}", remedy=one.remedy) for one in error.problems]
    raise_all(problems)
    return tuple(uses)


def hints_for(paths: Sequence[str], models: int, picture_number: int) -> tuple[str, ...]:
    """The hint images of a picture, one for each ControlNet.

    Args:
        paths: of all pictures, in the order picture 1 for model 1, picture 1 for model 2, picture 2 for model 1, ...; when
            they are used up, they begin again.
        models: how many ControlNets there are, 1 or more.
        picture_number: from 0.

    Raises:
        UserError: no images, or a number of them that is no multiple of that of the models.

    >>> hints_for(["a1", "a2", "b1", "b2"], 2, 3)
    ('b1', 'b2')
    """
    if not paths or len(paths) % models:
        given, wanted = counted(len(paths), "hint image"), counted(models, "ControlNet")
        remedy = "give one image for each ControlNet, picture by picture: picture 1 for model 1, picture 1 for model 2, ..."
        raise UserError(f"{given} for {wanted}", where="--guide_image_path", remedy=remedy)
    first = picture_number % (len(paths) // models) * models
    return tuple(paths[first : first + models])


def check_hint(path: str) -> None:
    """Refuse a file that is no image, by its header.

    Raises:
        UserError
    """
    from library.dataset.images import read_header

    _read_image(path, read_header)


def _read_image(path: str, read: Callable[[Path], T]) -> T:
    from library.dataset.images import BadImageError

    try:
        return read(Path(path))
    except BadImageError as error:
        raise UserError(str(error), where=f"hint image {path}") from None


def open_control_nets(uses: Sequence[ControlUse], base_model: BaseModelFiles) -> list[ControlNetFiles]:
    """The files of the ControlNets, from headers alone.

    Raises:
        UserError: for every one that is missing, damaged, or not for this base model.
    """
    from library.checkpoints.control_net import open_control_net

    problems: list[UserError] = []
    files = []
    for use in uses:
        found = attempt(lambda path=use.path: open_control_net(path), problems)  # type: ignore[misc]
        if found is not None:
            attempt(lambda found=found: found.check_base_model(base_model), problems)  # type: ignore[misc]
            files.append(found)
    raise_all(problems)
    return files


class ControlNets:
    """What ControlNets add to a denoiser. Several act together: what they add is summed.

    Args:
        uses: how each is used.
        nets: diffusers' models, in the same order, on the denoiser's device.
    """

    def __init__(self, uses: Sequence[ControlUse], nets: Sequence[nn.Module]) -> None:
        if len(uses) != len(nets):
            raise ValueError(f"{len(nets)} ControlNets for {len(uses)} uses")
        self.nets = tuple(nets)
        self._uses = tuple(uses)
        self._hint = lru_cache(maxsize=HINTS_KEPT)(prepare_hint)

    @classmethod
    def load(
        cls,
        uses: Sequence[ControlUse],
        files: Sequence[ControlNetFiles],
        denoiser: nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> ControlNets:
        """From the files of `open_control_nets`; the denoiser has its own weights, without those of adapters."""
        return cls(uses, [file.load(denoiser, dtype=dtype, device=device) for file in files])

    def denoiser_arguments(
        self, *, share: float, latents: Tensor, timestep: Tensor, told: Mapping[str, Any], owners: Sequence[ImageRequest]
    ) -> dict[str, Any]:
        """Further arguments of diffusers' `UNet2DConditionModel.forward`; none where nothing is added.

        Args:
            share: of the steps that are done, from 0; below 1.
            latents: (R, C, h, w), as the denoiser gets them.
            timestep: as the denoiser gets it.
            told: the call's other keywords, which the ControlNets are given too.
            owners: the request that each of the R rows belongs to; one without `control_images` is not controlled.

        Raises:
            UserError: a hint cannot be read, or a request has not one for each ControlNet.
        """
        if not any(owner.control_images for owner in owners):
            return {}
        added: list[Tensor] = []
        for number, use in enumerate(self._uses):
            if share < use.ratio and use.multiplier:
                residuals = self._residuals(number, latents, timestep, told, owners)
                added = [one + more for one, more in zip(added, residuals, strict=True)] if added else residuals
        if not added:
            return {}
        return {"down_block_additional_residuals": tuple(added[:-1]), "mid_block_additional_residual": added[-1]}

    def _residuals(
        self, number: int, latents: Tensor, timestep: Tensor, told: Mapping[str, Any], owners: Sequence[ImageRequest]
    ) -> list[Tensor]:
        """What one of them adds to every skip connection, and to the middle as the last."""
        import torch

        use, net = self._uses[number], self.nets[number]
        like = next(net.parameters())  # of the denoiser's type
        height, width = (side * LATENT_FACTOR for side in latents.shape[-2:])
        hints = [self._hint_of(owner, number, width, height) for owner in owners]
        strengths = [use.multiplier if owner.control_images else 0.0 for owner in owners]
        skips, middle = net(
            latents,
            timestep,
            controlnet_cond=torch.cat(hints).to(like),
            conditioning_scale=torch.tensor(strengths).view(-1, 1, 1, 1).to(like),
            return_dict=False,
            **told,
        )
        return [*skips, middle]

    def _hint_of(self, owner: ImageRequest, number: int, width: int, height: int) -> Tensor:
        import torch

        if not owner.control_images:
            return torch.zeros(1, 3, height, width)
        if len(owner.control_images) != len(self.nets):
            given, wanted = counted(len(owner.control_images), "hint image"), counted(len(self.nets), "ControlNet")
            raise UserError(f"a picture has {given} for {wanted}", remedy="give one for each")
        return self._hint(owner.control_images[number], self._uses[number].canny_thresholds, width, height)


def prepare_hint(path: str, canny_thresholds: tuple[int, int] | None, width: int, height: int) -> Tensor:
    """(1, 3, height, width) in 0..1, RGB: an image at a picture's size, or its edges in white on black.

    Raises:
        UserError: it cannot be read.
    """
    import numpy as np
    import torch
    from PIL import Image

    from library.dataset.images import opencv, read_picture

    picture = _read_image(path, read_picture)
    pixels = np.asarray(Image.fromarray(picture.rgb).resize((width, height), Image.Resampling.LANCZOS))
    if canny_thresholds is not None:
        cv2 = opencv()
        edges = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), *canny_thresholds)
        pixels = np.repeat(edges[:, :, None], 3, axis=2)
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None].contiguous()
