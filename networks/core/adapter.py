"""What every adapter algorithm offers for one layer: the change of its weight, the effect on its output, the saved tensors.

An adapter does not replace or own its base layer. It is handed the layer's output by a forward hook
(`AdapterNetwork.attach`) and returns the output with its effect added, so any number of adapters stack on one layer and
leave in any order.

A new algorithm gives `initialise`, `delta_weight`, `from_tensors` and `scale_delta_`; `effect` here follows from
`delta_weight`, and is overridden where there is a faster way to the same numbers. Algorithms whose change is a function of
their own parameters alone build on `additive.AdditiveAdapter` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What an adapter needs to know of its base layer; made from the layer, or by the weight tools from a weight's shape
    alone.

    Attributes:
        weight_shape: (out, in) for Linear, (out, in / groups, kh, kw) for Conv2d, (channels,) for a norm.
        has_bias: whether the layer has one that an adapter may change.
        stride, padding, dilation, groups: of the convolution; without meaning elsewhere.
        norm_groups: of a GroupNorm; 0 for a LayerNorm.
        norm_eps: what a norm adds to the variance.
    """

    weight_shape: tuple[int, ...]
    has_bias: bool = False
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    norm_groups: int = 0
    norm_eps: float = 1e-5

    @classmethod
    def of(cls, layer: nn.Module) -> LayerSpec:
        """The spec of a Linear, Conv2d, LayerNorm or GroupNorm layer.

        Raises:
            TypeError: any other layer.
        """
        weight = getattr(layer, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        has_bias = getattr(layer, "bias", None) is not None
        if isinstance(layer, nn.Linear):
            return cls(weight_shape=shape, has_bias=has_bias)
        if isinstance(layer, nn.LayerNorm) and len(shape) == 1:
            return cls(weight_shape=shape, has_bias=has_bias, norm_eps=layer.eps)
        if isinstance(layer, nn.GroupNorm) and len(shape) == 1:
            return cls(weight_shape=shape, has_bias=has_bias, norm_groups=layer.num_groups, norm_eps=layer.eps)
        if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
            raise TypeError(f"no adapter for {layer}")
        return cls(
            weight_shape=shape,
            has_bias=has_bias,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
        )

    @property
    def is_linear(self) -> bool:
        """Whether the layer is a Linear one (its weight has two axes)."""
        return len(self.weight_shape) == 2

    @property
    def is_norm(self) -> bool:
        """Whether the layer is a norm (its weight has one axis)."""
        return len(self.weight_shape) == 1

    @property
    def is_wide(self) -> bool:
        """Whether the layer has a kernel larger than one pixel; such layers take `conv_dim` instead of `network_dim`."""
        return any(size > 1 for size in self.weight_shape[2:])

    @property
    def channel_axis(self) -> int:
        """The axis of the layer's output (and input) along which its channels lie: 1 for a convolution, else the last."""
        return 1 if len(self.weight_shape) == 4 else -1

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's operation with another weight and bias; linear in both of them."""
        if self.is_norm:
            if self.norm_groups:
                return F.group_norm(x, self.norm_groups, weight, bias, self.norm_eps)
            return F.layer_norm(x, self.weight_shape, weight, bias, self.norm_eps)
        if self.is_linear:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def along_channels(self, vector: Tensor) -> Tensor:
        """A (channels,) vector shaped to multiply the layer's input or output."""
        return vector.view(-1, 1, 1) if self.channel_axis == 1 else vector


def weight_of(layer: nn.Module) -> Tensor:
    """A base layer's weight; one that is kept in fewer bits is formed when it is asked for."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def apply_base(spec: LayerSpec, layer: nn.Module, x: Tensor) -> Tensor:
    """A base layer's output without its bias, in the wider dtype of input and weight where there is no autocast.

    A weight that is formed when it is asked for is not kept for the backward pass.
    """
    without_bias = getattr(layer, "without_bias", None)
    if without_bias is not None:
        return without_bias(x)
    return spec.apply(*matching_dtypes(x, weight_of(layer)))


def matching_dtypes(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Input and weights in one dtype: the wider one, so that fp32 adapters keep their precision on a half-precision model.

    Under autocast everything is left as it is, since its operations do their own casting.
    """
    if all(weight.dtype == x.dtype for weight in weights) or torch.is_autocast_enabled(x.device.type):
        return (x, *weights)
    dtype = x.dtype
    for weight in weights:
        dtype = torch.promote_types(dtype, weight.dtype)
    return (x.to(dtype), *(weight.to(dtype) for weight in weights))


def kept_by_dropout(shape: Sequence[int], share: float, device: torch.device) -> Tensor:
    """A mask that is False for a random share of its places.

    The draw is torch's own and stays on the device, so that gradient checkpointing repeats it when it recomputes a layer.
    """
    return torch.rand(list(shape), device=device) >= share


def misfit(name: str, given: Tensor, wanted: Tensor) -> str:
    """What to say of a file's tensor that has another shape than the layer's."""
    return f"{name} is {tuple(given.shape)}, the layer wants {tuple(wanted.shape)}"


class Weight(nn.Module):
    """A bare parameter, for algorithms whose saved tensors are called `<factor>.weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Adapter(nn.Module):
    """One adapted layer.

    Args:
        spec: the base layer's shape.
        module_dropout: share of forward passes in train mode that go without this adapter.

    Attributes:
        title: of the algorithm, for tables and sentences ("LoRA").
        rank: of the change, for tables and reports; 0 where an algorithm has none.
        multiplier: strength; set it through `AdapterNetwork.set_multipliers`. At 0 the base layer's output passes untouched.
        row_strengths: (rows,) further strengths, one for each row of a batch; None for 1 everywhere.
        scale: the algorithm's own factor (alpha / rank), part of `delta_weight`.
    """

    title: str
    rank: int = 0
    multiplier: float = 1.0
    row_strengths: Tensor | None = None
    scale: float = 1.0

    def __init__(self, spec: LayerSpec, *, module_dropout: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        self.module_dropout = module_dropout

    # The algorithm

    @property
    def variant(self) -> str:
        """The algorithm with what makes its formula another one, for the plan and the file's metadata."""
        return self.title

    @property
    def structure(self) -> dict[str, str]:
        """What beside algorithm and rank decides what its tensors are, as words for sentences ("DoRA per input") -> the
        `network_args` that ask for it, empty where no single one does."""
        return {}

    @property
    def has_alpha(self) -> bool:
        """Whether an alpha scales the change."""
        return "alpha" in self._buffers

    def initialise(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """Fill the parameters with their starting values, drawn on the CPU, with which the adapter changes nothing.

        Args:
            generator: of the draws.
            base_weight: of the layer; on the meta device while a run is only planned, when its values are not needed.
        """
        raise NotImplementedError

    def delta_weight(self, base_weight: Tensor) -> Tensor:
        """The change of the base weight: its shape, fp32 on its device, scale included and multiplier not.

        Only algorithms whose change depends on the base read `base_weight`'s values.
        """
        raise NotImplementedError

    def delta_bias(self) -> Tensor | None:
        """The change of the base layer's bias, (out,) fp32; None for the algorithms that have none."""
        return None

    def effect(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The change of the layer's output, at the present multiplier: `op(x, multiplier * delta_weight)`.

        Here the change of the weight is formed anew in the backward pass, so that nothing as large as the weight is kept
        between the two.

        Args:
            layer: the base layer.
            x: its input.
            output: its output, with the effects of the adapters before this one; see `base_output`.
        """
        if torch.is_grad_enabled() and self.training:
            return checkpoint(self._dense_effect, layer, x, use_reentrant=False, preserve_rng_state=self.draws)
        return self._dense_effect(layer, x)

    def _dense_effect(self, layer: nn.Module, x: Tensor) -> Tensor:
        delta, bias = self.delta_weight(weight_of(layer)) * self.multiplier, self.delta_bias()
        if bias is not None:
            bias = bias.to(x.device) * self.multiplier
        x, delta = matching_dtypes(x, delta)
        return self.spec.apply(x, delta, bias if bias is None else bias.to(delta.dtype))

    @property
    def reads_base(self) -> bool:
        """Whether the change depends on the base weight's values."""
        return True

    @property
    def draws(self) -> bool:
        """Whether `delta_weight` draws random numbers in train mode, which the backward pass then has to repeat."""
        return False

    # On the layer

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output with the adapter's effect added, in the output's dtype; `output` is not changed in place."""
        return output + self.per_row(self.drop_module(self.effect(layer, x, output))).to(output.dtype)

    def set_strength(self, strength: float | Tensor) -> None:
        """Set the strength for all rows of a batch, or (rows,) one for each; every effect is linear in it."""
        self.multiplier, self.row_strengths = (1.0, strength) if isinstance(strength, Tensor) else (strength, None)

    def per_row(self, values: Tensor) -> Tensor:
        """Values (rows, ...), each row at its strength."""
        if self.row_strengths is None:
            return values
        return values * self.row_strengths.to(values.dtype).view(-1, *(1 for _ in values.shape[1:]))

    def hook(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The forward hook that `AdapterNetwork.attach` registers on the base layer."""
        return self.forward(layer, inputs[0], output) if self.multiplier != 0 else None

    def base_output(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The base layer's own output without its bias, for algorithms that act on it.

        It is what came, unless other hooks stand on the layer, which may have changed it; then it is computed again.
        """
        if len(layer._forward_hooks) > 1:
            return apply_base(self.spec, layer, x)
        return output - self.spec.along_channels(layer.get_parameter("bias")) if self.spec.has_bias else output

    def drop_module(self, value: Tensor) -> Tensor:
        """The value, or zeros where this pass goes without the adapter."""
        if not (self.module_dropout and self.training):
            return value
        return value * kept_by_dropout((), self.module_dropout, value.device).to(value.dtype)

    def begin_step(self, draw: float, largest_rank: int) -> None:
        """Take up the optimizer step's draw; for algorithms that choose by step.

        Args:
            draw: from [0, 1), the same for all adapters.
            largest_rank: among the network's adapters of this class.
        """

    # Its size

    def delta_norm(self, base_weight: Tensor) -> Tensor:
        """Frobenius norm of `delta_weight`: a 0-d fp32 tensor on the adapter's device."""
        return torch.linalg.vector_norm(self.delta_weight(base_weight))

    def singular_values(self) -> Tensor | None:
        """Of the change before any decomposition, as a matrix (out, rest), scale included, largest first, fp32; None where
        the change depends on the base, or is as large as it."""
        return None

    def scale_delta_(self, factor: Tensor) -> None:
        """Multiply the change by a 0-d factor, in place, shared evenly by the trained tensors."""
        raise NotImplementedError

    def plus_parameters(self) -> list[nn.Parameter]:
        """The parameters that LoRA+ trains at a higher rate: those that start at zero."""
        return []

    # In files

    @property
    def rank_in_files(self) -> int:
        """The rank of what `tensors` gives, where a file holds another one than is trained."""
        return self.rank

    @classmethod
    def title_in_files(cls) -> str:
        """The title of the algorithm that a file's tensors are taken for; another one where it saves what that one saves."""
        return cls.title

    def tensors(self) -> dict[str, Tensor]:
        """Saved name within the layer ("lora_down.weight") -> tensor, in the file's order."""
        return dict(self.state_dict())

    def spellings(self) -> list[dict[str, Tensor]]:
        """The tensors in every way that some reader wants them, our own first; all mean the same."""
        return [self.tensors()]

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """An adapter with the tensors of a file: the reverse of `tensors`.

        Args:
            spec: the layer it is for; shapes of factors are adjusted between Linear and 1x1 convolution.
            tensors: saved name within the layer -> tensor, in the spelling of `keys.to_kohya`.
            options: what the algorithm's constructor takes beside (drop-outs).

        Raises:
            ValueError: tensors that are not this algorithm's, or do not fit the layer.
        """
        raise NotImplementedError

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a file's tensors of this layer into this adapter, which has their sizes.

        Raises:
            ValueError: unknown or missing tensors, or other sizes.
        """
        try:
            self.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise ValueError(f"does not fit: {', '.join(line.strip() for line in str(error).splitlines()[1:])}") from None

    def update_scale(self) -> None:
        """Recompute what depends on the `alpha` buffer, after it was loaded."""
        if "alpha" in self._buffers and self.rank:
            self.scale = float(self.get_buffer("alpha")) / self.rank

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Accept factors shaped for the layer's twin (SD2's projections are Linear layers in a folder and 1x1 convolutions
        in a file), and files without alpha or with alpha 0, which stand for alpha = rank. What does not fit is told in
        words of ours."""
        for name, own in self.state_dict().items():
            given = state_dict.get(prefix + name)
            if given is not None and given.numel() == own.numel() and given.shape[:1] in (own.shape[:1], (1,)):
                state_dict[prefix + name] = given.reshape(own.shape)
        if "alpha" in self._buffers and self.rank:
            alpha = state_dict.get(prefix + "alpha")
            if alpha is None or not alpha.any():
                state_dict[prefix + "alpha"] = torch.tensor(float(self.rank))
        if strict:
            error_msgs += self._misfits(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self.update_scale()

    def _misfits(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """What does not fit among the tensors to load, which afterwards do: what is told here keeps its own values."""
        own = self.state_dict()
        strange = [key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) not in own]
        found = [f"{key} does not belong to it" for key in strange]
        for key in strange:
            del state_dict[key]
        for name, tensor in own.items():
            given = state_dict.setdefault(prefix + name, None)
            if given is None:
                found.append(f"{prefix}{name} is missing")
            elif given.shape != tensor.shape:
                found.append(misfit(prefix + name, given, tensor))
            else:
                continue
            state_dict[prefix + name] = tensor
        return found

    def _keep_own(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Let the tensors to load be the own ones, where the given ones cannot be taken and why was told."""
        state_dict.update({prefix + name: tensor for name, tensor in self.state_dict().items()})
