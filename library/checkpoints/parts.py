"""A part of a model: its configuration, where each of its tensors lies, and loading it without a second copy.

The module is built on the meta device, where it takes no memory; each tensor is then read, converted and put in its place,
so that at no time more than one tensor exists twice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.checkpoints.ldm_keys import TRANSPOSED
from library.checkpoints.tensor_places import TensorFile
from library.errors import UserError, some_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.checkpoints.packed_weights import PackedLayer, WeightFormat

UNET, VAE, TEXT_ENCODER, TEXT_ENCODER_2 = "unet", "vae", "text_encoder", "text_encoder_2"
CONTROL_NET = "control_net"
SHOWN = 3  # tensors that a sentence names
PART_TITLES: Mapping[str, str] = {
    UNET: "U-Net",
    VAE: "VAE",
    TEXT_ENCODER: "text encoder",
    TEXT_ENCODER_2: "second text encoder",
    CONTROL_NET: "ControlNet",
}
TEXT_CLASSES: Mapping[str, str] = {TEXT_ENCODER: "CLIPTextModel", TEXT_ENCODER_2: "CLIPTextModelWithProjection"}
"""Kind of a text encoder -> its class in transformers."""

_DIFFUSERS_CLASSES = {UNET: "UNet2DConditionModel", VAE: "AutoencoderKL", CONTROL_NET: "ControlNetModel"}


@dataclass(frozen=True)
class TensorSource:
    """A tensor of a module in a file.

    Attributes:
        view: how the module's tensor lies in the file's, one of `ldm_keys.VIEWS`; "" for all of it.
    """

    file: TensorFile
    key: str
    view: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.file.shape(self.key)
        if self.view == TRANSPOSED:
            return shape[::-1]
        return (shape[0] // 3, *shape[1:]) if self.view else shape

    def read(self) -> Tensor:
        tensor = self.file.read(self.key)
        if self.view == TRANSPOSED:
            return tensor.T.contiguous()
        return tensor.chunk(3)[int(self.view)].clone() if self.view else tensor


@dataclass(frozen=True)
class ModelPart:
    """What it takes to build one module.

    Attributes:
        kind: one of the keys of `PART_TITLES`.
        config: in the words of diffusers or transformers.
        sources: the module's tensor names -> where they are; exactly those the module has.
        where: the file or folder, for sentences.
    """

    kind: str
    config: Mapping[str, Any]
    sources: Mapping[str, TensorSource]
    where: str

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor names and shapes of the module that the configuration describes."""
        return {name: tuple(tensor.shape) for name, tensor in self.build_empty().state_dict().items()}

    def build_empty(self) -> Any:
        """The module on the meta device: structure without values."""
        import torch

        with torch.device("meta"):
            return _module_of(self.kind, self.config)

    def load(self, *, dtype: torch.dtype, device: torch.device | str, weight_format: WeightFormat | None = None) -> Any:
        """The module with its values, frozen, in evaluation mode.

        Args:
            weight_format: what the weights of its blocks are kept in (`packed_weights`); None for the dtype itself.

        Raises:
            UserError: where a tensor is missing, is not part of the module, or has another shape.
        """
        module = self.build_empty()
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        check_tensors(self, shapes)
        packable = {} if weight_format is None else _make_packable(module)
        for name, shape in shapes.items():
            tensor = self.sources[name].read().reshape(shape)
            if weight_format is not None and name in packable:
                packable[name].hold(tensor.to(device), weight_format, dtype)
                continue
            tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            _put(module, name, tensor)
        _fill_computed_buffers(module, self.kind, device)
        return module.eval()


def _module_of(kind: str, config: Mapping[str, Any]) -> nn.Module:
    from library.quiet import quiet_libraries

    quiet_libraries()
    if kind in TEXT_CLASSES:
        import transformers

        settings = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype", "architectures")}
        return getattr(transformers, TEXT_CLASSES[kind])(transformers.CLIPTextConfig(**settings))
    import diffusers

    return getattr(diffusers, _DIFFUSERS_CLASSES[kind]).from_config(dict(config))


def _make_packable(module: nn.Module) -> dict[str, PackedLayer]:
    from library.checkpoints.packed_weights import make_packable

    return make_packable(module)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    from torch import nn

    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _fill_computed_buffers(module: nn.Module, kind: str, device: torch.device | str) -> None:
    """Buffers that are computed and not saved: they were left on the meta device."""
    import torch

    if kind in TEXT_CLASSES:
        embeddings: Any = getattr(module, "text_model", module).get_submodule("embeddings")
        count = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(count, device=device).expand((1, -1))
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if left:
        raise RuntimeError(f"buffers without values: {left}")


def same_up_to_ones(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one shape is the other with (1, 1) behind it: a matrix and a 1x1 convolution are the same weights."""
    short, long = sorted((shape, other), key=len)
    return long[: len(short)] == short and math.prod(long[len(short) :]) == 1


def check_tensors(part: ModelPart, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor of the module has a source of its shape, and no source is left over.

    Raises:
        UserError: naming some of those at fault, as the file names them.
    """
    title = PART_TITLES[part.kind]
    missing = [name for name in shapes if name not in part.sources]
    if missing:
        raise UserError(
            f"lacks {some_names(missing, SHOWN)} of its {title}", where=part.where, remedy="fetch or convert it again"
        )
    extra = [source.key for name, source in part.sources.items() if name not in shapes]
    if extra:
        raise UserError(f"has tensors that its {title} has no place for: {some_names(extra, SHOWN)}", where=part.where)
    wrong = [
        f"{source.key} is {source.shape} instead of {shapes[name]}"
        for name, source in part.sources.items()
        if not same_up_to_ones(source.shape, shapes[name])
    ]
    if wrong:
        raise UserError(f"its {title} does not fit together: {some_names(wrong, SHOWN)}", where=part.where)


def content_fingerprint(part: ModelPart) -> str:
    """16 hex digits that stand for a part's values as saved: the same in a folder and in a single file."""
    import torch

    hasher = hashlib.sha256()
    for name in sorted(part.sources):
        tensor = part.sources[name].read()
        hasher.update(f"{name}:{tensor.dtype}:".encode())
        hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:16]
