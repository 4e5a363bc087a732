"""Adapters whose change of the weight is a function of their own parameters alone, and its weight-decomposed form, DoRA.

Such a change dW is `alpha / rank` times a product of factors. With DoRA (Liu et al., arXiv:2402.09353, eq. 5) it changes
the direction of the weight, whose size is trained beside it:

    W' = magnitude * V / |V|,   V = W + dW

along rows (one magnitude for each output) or columns (one for each input). The norm |V| is taken as a constant by the
backward pass, as in section 4.3 of the paper, and is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.core.adapter import Adapter, LayerSpec, apply_base, kept_by_dropout, matching_dtypes, weight_of
from networks.core.products import singular_values_of_product, svd, svd_of_product

MagnitudeAxis = Literal["input", "output"]


def norms_along(weight: Tensor, axis: MagnitudeAxis) -> Tensor:
    """The norm of every row or column of a weight.

    Args:
        weight: (out, in, ...).
        axis: "output" gives (out, 1, ...), "input" gives (1, in, 1, ...).

    Returns:
        fp32.
    """
    kept = 0 if axis == "output" else 1
    over = [place for place in range(weight.dim()) if place != kept]
    return torch.linalg.vector_norm(weight.float(), dim=over, keepdim=True)


def dora_options(spec: LayerSpec, tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    """What the magnitudes of a file say: the constructor's `dora_wd` and `wd_on_output`; nothing where there are none.

    A vector without axes is along the outputs, as long as its length allows it: the writers of that form mean that.
    """
    magnitude = tensors.get("dora_scale")
    if magnitude is None:
        return {}
    outputs = spec.weight_shape[0]
    on_output = magnitude.numel() == outputs and (magnitude.dim() == 1 or magnitude.shape[0] == outputs)
    return {"dora_wd": True, "wd_on_output": on_output}


class AdditiveAdapter(Adapter):
    """An adapter with rank and alpha, whose subclasses give `own_delta`, and `own_effect` where there is a faster way.

    Args:
        spec: the base layer.
        rank: of the factors.
        alpha: the change is scaled by alpha / rank.
        dora_wd: decompose the weight (DoRA).
        wd_on_output: one magnitude for each output instead of one for each input, which most programs apply rightly.
        module_dropout: share of forward passes in train mode that go without this adapter.
    """

    def __init__(
        self,
        spec: LayerSpec,
        *,
        rank: int,
        alpha: float,
        dora_wd: bool = False,
        wd_on_output: bool = False,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__(spec, module_dropout=module_dropout)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        if spec.groups != 1:
            raise ValueError("adapters on grouped convolutions are not supported")
        self.rank = rank
        self.magnitude_axis: MagnitudeAxis = "output" if wd_on_output else "input"
        self.dora_scale: nn.Parameter | None = None
        if dora_wd:
            self.dora_scale = nn.Parameter(norms_along(torch.ones(spec.weight_shape), self.magnitude_axis))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.update_scale()

    @property
    def variant(self) -> str:
        """See `Adapter.variant`: tells along what DoRA's magnitudes lie."""
        return self.title if self.dora_scale is None else f"{self.title} with DoRA per {self.magnitude_axis}"

    @property
    def structure(self) -> dict[str, str]:
        """See `Adapter.structure`."""
        if self.dora_scale is None:
            return {}
        settings = "dora_wd=True wd_on_output=True" if self.magnitude_axis == "output" else "dora_wd=True"
        return {f"DoRA per {self.magnitude_axis}": settings}

    # What an algorithm gives

    def initialise_factors(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """Fill the factors with their starting values; see `Adapter.initialise`."""
        raise NotImplementedError

    def own_delta(self) -> Tensor:
        """dW without decomposition: (out, in, ...) fp32, scale included and multiplier not."""
        raise NotImplementedError

    def own_effect(self, x: Tensor, factor: float) -> Tensor:
        """`op(x, factor * own_delta)`; the dense change is formed anew in the backward pass instead of being kept."""
        if torch.is_grad_enabled() and self.training:
            return checkpoint(self._dense_own_effect, x, factor, use_reentrant=False, preserve_rng_state=self.draws)
        return self._dense_own_effect(x, factor)

    def _dense_own_effect(self, x: Tensor, factor: float) -> Tensor:
        x, delta = matching_dtypes(x, factor * self.own_delta())
        return self.spec.apply(x, delta)

    # What follows

    def drop_outputs(self, effect: Tensor, share: float) -> Tensor:
        """In train mode, an effect without a random share of its channels, for each sample anew; the rest is scaled up."""
        if not (share and self.training):
            return effect
        shape = [len(effect)] + [1] * (effect.dim() - 1)
        shape[self.spec.channel_axis] = effect.shape[self.spec.channel_axis]
        return effect * (kept_by_dropout(shape, share, effect.device).to(effect.dtype) / (1 - share))

    def initialise(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """See `Adapter.initialise`; DoRA's magnitudes start as the norms of the base weight."""
        self.initialise_factors(generator, base_weight)
        if self.dora_scale is not None and not base_weight.is_meta:
            with torch.no_grad():
                self.dora_scale.copy_(norms_along(base_weight, self.magnitude_axis))

    def delta_weight(self, base_weight: Tensor) -> Tensor:
        """See `Adapter.delta_weight`."""
        delta = self.own_delta().to(base_weight.device)
        if self.dora_scale is None:
            return delta
        base = base_weight.float()
        return self._magnitude_ratio(base, delta) * (base + delta) - base

    def _magnitude_ratio(self, base_weight: Tensor, delta: Tensor) -> Tensor:
        """magnitude / |W + dW|, fp32, shaped to multiply the weight."""
        assert self.dora_scale is not None
        with torch.no_grad():
            norms = norms_along(base_weight.float() + delta, self.magnitude_axis)
            norms = norms.clamp(min=torch.finfo(torch.float32).tiny)
        return self.dora_scale.to(norms.device, torch.float32) / norms

    def effect(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """See `Adapter.effect`. With DoRA the ratio of magnitudes acts on the input or output instead of the weight."""
        if self.dora_scale is None:
            return self.own_effect(x, self.multiplier)
        weight = weight_of(layer)
        with torch.no_grad():
            delta = self.own_delta().to(weight.device)
        ratio = self._magnitude_ratio(weight, delta)
        if self.magnitude_axis == "output":
            ratio = self.spec.along_channels(ratio.flatten())
            own = self.own_effect(x, self.multiplier)
            return (ratio - 1) * self.multiplier * self.base_output(layer, x, output) + ratio * own
        ratio = self.spec.along_channels(ratio.flatten())
        own = self.own_effect(x * ratio, self.multiplier)
        return apply_base(self.spec, layer, x * (ratio - 1) * self.multiplier) + own

    @property
    def reads_base(self) -> bool:
        """See `Adapter.reads_base`: with DoRA it does."""
        return self.dora_scale is not None

    def singular_values(self) -> Tensor | None:
        """See `Adapter.singular_values`."""
        product = self.product()
        if product is None:
            return torch.linalg.svdvals(self.own_delta().flatten(1))
        return singular_values_of_product(*product)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Reduced singular value decomposition of `own_delta` as a matrix (out, rest), values largest first, fp32; values
        that are zero may be left out."""
        product = self.product()
        return svd(self.own_delta().flatten(1)) if product is None else svd_of_product(*product)

    def product(self) -> tuple[Tensor, Tensor] | None:
        """Two matrices (out, rank) and (rank, rest), fp32, whose product is `own_delta`; None where there are none that are
        smaller than it."""
        return None

    def delta_norm(self, base_weight: Tensor) -> Tensor:
        """Frobenius norm of `own_delta`: what `scale_weight_norms` holds down, with DoRA too."""
        return torch.linalg.vector_norm(self.own_delta())

    # In files

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
        """Refuse magnitudes along the other axis, which on a square layer have the same number."""
        magnitude = state_dict.get(prefix + "dora_scale")
        if magnitude is not None and self.dora_scale is not None:
            found = "output" if dora_options(self.spec, {"dora_scale": magnitude})["wd_on_output"] else "input"
            if found != self.magnitude_axis:
                error_msgs.append(
                    f"{prefix}dora_scale: its magnitudes are along the {found}s, here the {self.magnitude_axis}s"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
