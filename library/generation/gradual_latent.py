"""Gradual Latent: a picture is begun small and grows while it is drawn, as in sd-scripts.

A step of euler_a takes away noise and adds new noise. Growing comes between the two, so that the new noise has the new size
and makes up for what enlarging blurs. Taking away is linear in latents and prediction, and so is bicubic enlarging: to
enlarge both before the scheduler's step is the same, and needs no scheduler of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.errors import UserError, raise_all

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLE = 8  # of the sizes between the first and the last, in latents
SAMPLERS = ("euler_a", "k_euler_a")

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class GradualLatent:
    """How a picture grows.

    Attributes:
        below: it grows at timesteps below this, 1 to 1000.
        ratio: above 0 and to 1, the size it begins with.
        ratio_step: above 0, what is added to the ratio each time.
        every_n_steps: steps from one growth to the next, 1 or more.

    Raises:
        UserError: a value out of its range; all of them at once.
    """

    below: int
    ratio: float = 0.5
    ratio_step: float = 0.125
    every_n_steps: int = 3

    def __post_init__(self) -> None:
        ranges = (
            (f"timestep {self.below}", 1 <= self.below <= 1000, "1 to 1000"),
            (f"a ratio of {self.ratio}", 0 < self.ratio <= 1, "above 0 to 1"),
            (f"a growth of {self.ratio_step}", 0 < self.ratio_step <= 1, "above 0 to 1"),
            (f"every {self.every_n_steps} steps", self.every_n_steps >= 1, "1 or more"),
        )
        raise_all(
            [
                UserError(f"{what} of Gradual Latent is out of range", remedy=f"give {wanted}")
                for what, fits, wanted in ranges
                if not fits
            ]
        )


def gradual_sizes(settings: GradualLatent, timesteps: Sequence[float], size: Size) -> list[Size]:
    """(height, width) of the latents before every step, and behind the last.

    Args:
        timesteps: of the scheduler, falling.
        size: of the picture's latents.

    Raises:
        UserError: the steps end before the picture has its size.

    >>> gradual_sizes(GradualLatent(below=800, ratio_step=0.25, every_n_steps=1), [999, 799, 599, 399], (64, 96))
    [(32, 48), (32, 48), (48, 72), (64, 96), (64, 96)]
    """
    ratio, waited = settings.ratio, settings.every_n_steps
    sizes = [_share(size, ratio, 1)]
    for timestep in timesteps:
        grows = timestep < settings.below and ratio < 1 and waited >= settings.every_n_steps
        if grows:
            ratio, waited = min(ratio + settings.ratio_step, 1.0), 0
            sizes.append(_share(size, ratio, MULTIPLE))
        else:
            sizes.append(sizes[-1])
        waited += 1
    if sizes[-1] != size:
        remedy = "take more steps, a greater growth, or fewer steps from one to the next"
        raise UserError(f"Gradual Latent ends at {ratio:g} of the picture's size", remedy=remedy)
    return sizes


def _share(size: Size, ratio: float, multiple: int) -> Size:
    if ratio == 1:
        return size
    height, width = (max(multiple, int(side * ratio) // multiple * multiple) for side in size)
    return height, width


def grown(tensor: Tensor, size: Size) -> Tensor:
    """(B, C, h, w) at another size, bicubic; as it is where it has that size."""
    from torch.nn import functional

    if tensor.shape[-2:] == size:
        return tensor
    return functional.interpolate(tensor.float(), size=list(size), mode="bicubic").to(tensor.dtype)
