"""Deep Shrink: at first the inner blocks of a U-Net see a smaller picture, so that large pictures keep one composition.

As in sd-scripts (library/original_unet.py, `InferUNet2DConditionModel`; library/sdxl_original_unet.py,
`InferSdxlUNet2DConditionModel`): what enters a block on the way down is made smaller, and on the way up what meets a skip
connection of another size is brought to that size. A depth counts the U-Net's levels, or the original's input blocks, three
to a level.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.errors import UserError, raise_all

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.families.family import DepthCount

TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True)
class DeepShrink:
    """Where and how long; timesteps go from 999 down to 0.

    Attributes:
        depth_1: the block, as the family counts them, whose input is made smaller while the timestep is `until_1` or more.
        depth_2: likewise behind that, down to `until_2`; None for none.
        ratio: above 0 and to 1, of the size.

    Raises:
        UserError: a value out of its range; all of them at once.
    """

    depth_1: int
    until_1: int = 650
    depth_2: int | None = None
    until_2: int = 650
    ratio: float = 0.5

    def __post_init__(self) -> None:
        problems = [
            UserError(f"{depth} is no depth of Deep Shrink", remedy="give 0 or more, the block whose input is made smaller")
            for depth in (self.depth_1, self.depth_2)
            if depth is not None and depth < 0
        ]
        problems += [
            UserError(f"timestep {until} of Deep Shrink is out of range", remedy=f"give 0 to {TIMESTEPS}")
            for until in (self.until_1, self.until_2)
            if not 0 <= until <= TIMESTEPS
        ]
        if not 0 < self.ratio <= 1:
            problems.append(UserError(f"a ratio of {self.ratio} of Deep Shrink is out of range", remedy="give above 0 to 1"))
        raise_all(problems)

    def check_depths(self, known: Iterable[int]) -> None:
        """Refuse depths that a U-Net has not.

        Args:
            known: those that it has.

        Raises:
            UserError
        """
        least, *_, most = sorted(known)
        for depth in (self.depth_1, self.depth_2):
            if depth is not None and not least <= depth <= most:
                raise UserError(f"Deep Shrink cannot act at depth {depth} of this U-Net", remedy=f"give {least} to {most}")

    def depth_at(self, timestep: float) -> int | None:
        """The block whose input is made smaller at a timestep; None for none."""
        if timestep >= self.until_1:
            return self.depth_1
        return self.depth_2 if timestep >= self.until_2 else None


@contextlib.contextmanager
def deep_shrink(denoiser: nn.Module, settings: DeepShrink | None, count: DepthCount = "levels") -> Iterator[None]:
    """Let a U-Net of diffusers compute so; afterwards it is as it was. None leaves it as it is.

    Args:
        count: what a depth counts.

    What ControlNets add has the sizes of a U-Net that does not shrink, so that the two exclude each other.

    Raises:
        UserError: a depth that the U-Net has not, or (when it computes) a picture too small to be made smaller.
    """
    if settings is None:
        yield
        return
    unet: Any = denoiser
    places = _places(unet, count)
    settings.check_depths(places)
    shrinking = _Shrinking(settings)
    handles = [unet.register_forward_pre_hook(shrinking.note_timestep, with_kwargs=True)]
    for depth in {depth for depth in (settings.depth_1, settings.depth_2) if depth is not None}:
        handles.append(places[depth].register_forward_pre_hook(shrinking.shrink(depth), with_kwargs=True))
    for block in unet.up_blocks:
        joined = _Joined()
        handles.append(block.register_forward_pre_hook(joined.enter, with_kwargs=True))
        # A block joins its skip connections one by one, each behind the last module of the layer before.
        layers = block.attentions if hasattr(block, "attentions") else block.resnets
        handles += [layer.register_forward_hook(joined.leave(number)) for number, layer in enumerate(layers[:-1], start=1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _places(unet: Any, count: DepthCount) -> dict[int, nn.Module]:
    """Depth -> the module whose input is made smaller.

    Input block 0 is the first convolution: a smaller input there would be a smaller picture.
    """
    if count == "levels":
        return dict(enumerate(unet.down_blocks))
    blocks = [part for level in unet.down_blocks for part in (*level.resnets, *(level.downsamplers or ()))]
    return dict(enumerate(blocks, start=1))


class _Shrinking:
    """The hooks on the way down."""

    def __init__(self, settings: DeepShrink) -> None:
        self._settings = settings
        self._depth: int | None = None

    def note_timestep(self, _unet: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        timestep = inputs[1] if len(inputs) > 1 else keywords["timestep"]
        first = timestep.flatten()[0] if hasattr(timestep, "flatten") else timestep
        self._depth = self._settings.depth_at(float(first))

    def shrink(self, depth: int) -> Any:
        def hook(_block: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            if self._depth != depth:
                return None
            hidden = keywords["hidden_states"] if "hidden_states" in keywords else inputs[0]
            if min(hidden.shape[-2:]) * self._settings.ratio < 1:
                raise UserError(f"the picture is too small for Deep Shrink at depth {depth}", remedy="take a smaller depth")
            smaller = _resized(hidden, ratio=self._settings.ratio)
            if "hidden_states" in keywords:
                return inputs, keywords | {"hidden_states": smaller}
            return (smaller, *inputs[1:]), keywords

        return hook


class _Joined:
    """The hooks of one block on the way up: what meets a skip connection has its size."""

    def __init__(self) -> None:
        self._sizes: list[Sequence[int]] = []

    def enter(self, _block: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._sizes = [skip.shape[-2:] for skip in reversed(keywords["res_hidden_states_tuple"])]
        return inputs, keywords | {"hidden_states": _fitted(keywords["hidden_states"], self._sizes[0])}

    def leave(self, number: int) -> Any:
        def hook(_layer: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return (_fitted(output[0], self._sizes[number]), *output[1:])
            return _fitted(output, self._sizes[number])

        return hook


def _fitted(hidden: Tensor, size: Sequence[int]) -> Tensor:
    return hidden if hidden.shape[-2:] == size else _resized(hidden, size=size)


def _resized(hidden: Tensor, *, size: Sequence[int] | None = None, ratio: float | None = None) -> Tensor:
    from torch.nn import functional

    sizes = None if size is None else list(size)
    return functional.interpolate(hidden.float(), size=sizes, scale_factor=ratio, mode="bicubic").to(hidden.dtype)
