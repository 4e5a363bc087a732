"""LoKr: the weight change as a Kronecker product of a small and a large matrix, each of them full or of low rank.

    dW = alpha / rank * w1 (x) w2

Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", arXiv:2309.14859,
section 3.2, whose tensor names these are; Edalati et al., "KronA", arXiv:2212.10650. Row o1 * O2 + o2 and column
i1 * I2 + i2 of the change are w1[o1, i1] * w2[o2, i2]; a convolution's kernel belongs to w2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.building import creation
from networks.core import arguments
from networks.core.adapter import LayerSpec, matching_dtypes
from networks.core.additive import AdditiveAdapter, dora_options
from networks.core.algorithms import Algorithm
from networks.core.kronecker import KroneckerForm, planned_form
from networks.core.products import svd_of_kronecker, svd_of_product
from networks.core.recompute import apply_recomputed
from networks.loha import tucker_kernel
from networks.lora import DORA_ARGUMENTS

_LARGEST_HALF = 65504.0


def kronecker_delta(w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """The change of a weight.

    Args:
        w1: (O1, I1).
        w2: (O2, I2), for a convolution (O2, I2, kh, kw).
        scale: alpha / rank.

    Returns:
        (O1 * O2, I1 * I2), with w2's further axes, in the dtype of the factors.
    """
    return _kronecker(scale * w1, w2)


def _kronecker(first: Tensor, second: Tensor) -> Tensor:
    """The product of a matrix with a matrix or kernel, whatever their strides are (`torch.kron` refuses some: a Tucker
    form's kernel and some transposed matrices)."""
    spread = first.reshape(len(first), 1, -1, 1, *(1 for _ in second.shape[2:]))
    return (spread * second[None, :, None]).flatten(2, 3).flatten(0, 1)


def _trivial_product(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix and an identity on its shorter side."""
    matrix = matrix.flatten(1)
    rows, columns = matrix.shape
    identity = torch.eye(min(rows, columns), device=matrix.device)
    return (identity, matrix) if rows <= columns else (matrix, identity)


def mix_groups(x: Tensor, w1: Tensor, groups: int) -> Tensor:
    """Take sums over groups of channels: every row of `w1` gives one.

    Args:
        x: (batch, groups * channels, ...), the groups one after the other.
        w1: (sums, groups).

    Returns:
        (batch, sums, channels * ...).
    """
    return w1 @ x.reshape(len(x), groups, -1)


class LoKrModule(AdditiveAdapter):
    """LoKr on one layer.

    Args:
        spec: the base layer.
        rank: of factors that are products; more than half the factors' sizes makes them full.
        alpha: the change is scaled by alpha / rank, but with two full factors not at all.
        form: sizes and kinds of the factors; None for those of `planned_form`, which takes the arguments that follow.
        rank_dropout: share of output channels whose change is zeroed in train mode, for each sample anew; what is left is
            scaled up. (In full factors there are no ranks, so outputs are dropped, as in LyCORIS.)
        settings: see `AdditiveAdapter`.
    """

    title = "LoKr"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        rank: int,
        alpha: float,
        form: KroneckerForm | None = None,
        factor: int = -1,
        decompose_both: bool = False,
        full_matrix: bool = False,
        use_tucker: bool = False,
        unbalanced_factorization: bool = False,
        rank_dropout: float = 0.0,
        **settings: Any,
    ) -> None:
        self.form = form or planned_form(
            spec,
            rank,
            factor=factor,
            decompose_both=decompose_both,
            full_matrix=full_matrix,
            use_tucker=use_tucker,
            unbalanced_factorization=unbalanced_factorization,
        )
        # Two full factors have no rank that alpha could be divided by: readers take 1, whatever alpha says. As in LyCORIS
        # it says the rank that was asked for, as far as half precision can.
        super().__init__(spec, rank=rank, alpha=alpha if self.form.rank else min(rank, _LARGEST_HALF), **settings)
        self.rank = self.form.rank
        self.scale = 1.0
        self.update_scale()
        self.rank_dropout = rank_dropout
        for name, shape in self._shapes().items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    @property
    def structure(self) -> dict[str, str]:
        """See `Adapter.structure`; several settings decide the factors together."""
        return super().structure | {str(self.form): ""}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each factor -> its shape, in the file's order."""
        (out1, out2), (in1, in2), form = self.form.outputs, self.form.inputs, self.form
        kernel = self.spec.weight_shape[2:]
        shapes: dict[str, tuple[int, ...]]
        if form.w1_rank is None:
            shapes = {"lokr_w1": (out1, in1)}
        else:
            shapes = {"lokr_w1_a": (out1, form.w1_rank), "lokr_w1_b": (form.w1_rank, in1)}
        if form.w2_rank is None:
            return {**shapes, "lokr_w2": (out2, in2, *kernel)}
        if form.tucker:
            core = (form.w2_rank, form.w2_rank, *kernel)
            return {**shapes, "lokr_t2": core, "lokr_w2_a": (form.w2_rank, out2), "lokr_w2_b": (form.w2_rank, in2)}
        columns = in2 * torch.Size(kernel).numel()
        return {**shapes, "lokr_w2_a": (out2, form.w2_rank), "lokr_w2_b": (form.w2_rank, columns)}

    def initialise_factors(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """`lokr_w2` or `lokr_w2_b` zero, no change at all; the others as torch's own Linear layers start."""
        for name in self._shapes():
            parameter = self.get_parameter(name)
            if name in ("lokr_w2", "lokr_w2_b"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    def _factors(self) -> list[nn.Parameter]:
        return [self.get_parameter(name) for name in self._shapes()]

    def _w1_of(self, factors: Mapping[str, Tensor]) -> Tensor:
        return factors["lokr_w1"] if self.form.w1_rank is None else factors["lokr_w1_a"] @ factors["lokr_w1_b"]

    def _w2_of(self, factors: Mapping[str, Tensor]) -> Tensor:
        if self.form.w2_rank is None:
            return factors["lokr_w2"]
        if self.form.tucker:
            return tucker_kernel(factors["lokr_t2"], factors["lokr_w2_a"], factors["lokr_w2_b"])
        w2 = factors["lokr_w2_a"] @ factors["lokr_w2_b"]
        return w2.reshape(self.form.outputs[1], self.form.inputs[1], *self.spec.weight_shape[2:])

    def _full_factors(self) -> tuple[Tensor, Tensor]:
        """w1 (O1, I1) and w2 (O2, I2, ...), fp32."""
        factors = {name: self.get_parameter(name).float() for name in self._shapes()}
        return self._w1_of(factors), self._w2_of(factors)

    def own_delta(self) -> Tensor:
        """See `AdditiveAdapter.own_delta`."""
        return kronecker_delta(*self._full_factors(), self.scale)

    # The effect

    @property
    def keeps_ranks(self) -> bool:
        """Whether going through w2's ranks takes fewer multiplications for each position than forming w2."""
        form, rank = self.form, self.form.w2_rank
        if rank is None:
            return False
        (out1, out2), (in1, in2) = form.outputs, form.inputs
        kernel = torch.Size(self.spec.weight_shape[2:]).numel()
        to_ranks = in2 * rank + rank**2 * kernel if form.tucker else in2 * kernel * rank
        through_ranks = in1 * to_ranks + out1 * in1 * rank + out1 * rank * out2
        return through_ranks < out1 * in1 * in2 + out1 * in2 * kernel * out2

    def own_effect(self, x: Tensor, factor: float) -> Tensor:
        """See `AdditiveAdapter.own_effect`. The input's channels are taken as I1 groups of I2: w1 takes sums over the
        groups, w2 acts within each. The product is never formed, and what lies between the two is not kept until the
        backward pass.
        """
        names, scale = tuple(self._shapes()), factor * self.scale

        def operands(x: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
            x, *matching = matching_dtypes(x, *factors)
            named = dict(zip(names, matching, strict=True))
            w1 = scale * self._w1_of(named)
            if self.keeps_ranks:
                return self._mixed_ranks(x, w1, named), self._from_ranks(named)
            return self._mixed_inputs(x, w1), self._w2_of(named)

        operation = self._rank_spec(self.form.outputs[1]) if self.keeps_ranks else self.spec
        groups = apply_recomputed(operation, operands, x, *self._factors())
        if self.spec.is_linear:
            effect = groups.reshape(*x.shape[:-1], self.spec.weight_shape[0])
        else:
            effect = groups.reshape(len(x), self.spec.weight_shape[0], *groups.shape[2:])
        return self.drop_outputs(effect, self.rank_dropout)

    def _mixed_inputs(self, x: Tensor, w1: Tensor) -> Tensor:
        """Sums over the input's groups: (n, O1, I2) of a Linear layer, (batch * O1, I2, h, w) of a convolution."""
        (out1, _), (in1, in2) = self.form.outputs, self.form.inputs
        if self.spec.is_linear:
            return mix_groups(x.reshape(-1, x.shape[-1]), w1, in1)
        return mix_groups(x, w1, in1).reshape(len(x) * out1, in2, *x.shape[2:])

    def _mixed_ranks(self, x: Tensor, w1: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """Sums over the groups of w2's ranks: (n, O1, rank), or (batch * O1, rank, h, w)."""
        (out1, _), (in1, in2) = self.form.outputs, self.form.inputs
        down = factors["lokr_w2_b"]
        rank = len(down)
        if self.spec.is_linear:
            return mix_groups(F.linear(x.reshape(-1, in1, in2), down).flatten(1), w1, in1)
        x_groups = x.reshape(len(x) * in1, in2, *x.shape[2:])
        if self.form.tucker:
            hidden = self.spec.apply(F.conv2d(x_groups, down.reshape(rank, in2, 1, 1)), factors["lokr_t2"])
        else:
            hidden = self.spec.apply(x_groups, down.reshape(rank, in2, *self.spec.weight_shape[2:]))
        return mix_groups(hidden.reshape(len(x), -1), w1, in1).reshape(len(x) * out1, rank, *hidden.shape[2:])

    def _from_ranks(self, factors: Mapping[str, Tensor]) -> Tensor:
        """The matrix that brings w2's ranks to its outputs, shaped for `_rank_spec`."""
        up = factors["lokr_w2_a"].t() if self.form.tucker else factors["lokr_w2_a"]
        return up.reshape(self._rank_spec(len(up)).weight_shape)

    def _rank_spec(self, outputs: int) -> LayerSpec:
        return LayerSpec(weight_shape=(outputs, self.form.w2_rank or 0, *(1 for _ in self.spec.weight_shape[2:])))

    # Its size

    def delta_norm(self, base_weight: Tensor) -> Tensor:
        """Frobenius norm of the change: the product of the factors' norms."""
        w1, w2 = self._full_factors()
        return abs(self.scale) * torch.linalg.vector_norm(w1) * torch.linalg.vector_norm(w2)

    def singular_values(self) -> Tensor | None:
        """See `Adapter.singular_values`: the products of every pair of the factors' own."""
        first, second = (torch.linalg.svdvals(factor.flatten(1)) for factor in self._full_factors())
        return abs(self.scale) * torch.outer(first, second).flatten().sort(descending=True).values

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `AdditiveAdapter.svd`; the kernel belongs to w2, as its columns do."""
        w1, w2 = self._factor_products()
        left, values, right = svd_of_kronecker(svd_of_product(*w1), svd_of_product(*w2))
        return left * math.copysign(1, self.scale), values * abs(self.scale), right

    def product(self) -> tuple[Tensor, Tensor] | None:
        """See `AdditiveAdapter.product`: the Kronecker products of the factors' own factors,
        (A1 B1) (x) (A2 B2) = (A1 (x) A2) (B1 (x) B2)."""
        (a1, b1), (a2, b2) = self._factor_products()
        if len(b1) * len(b2) >= min(self.spec.weight_shape[0], b1.shape[1] * b2.shape[1]):
            return None
        return _kronecker(self.scale * a1, a2), _kronecker(b1, b2)

    def _factor_products(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """w1 and w2, this as a matrix (O2, I2 * kernel), as products; of a full one with the identity."""
        factors = {name: factor.float() for name, factor in zip(self._shapes(), self._factors(), strict=True)}
        if "lokr_t2" in factors:
            core = factors.pop("lokr_t2")
            factors["lokr_w2_a"] = factors["lokr_w2_a"].t()
            factors["lokr_w2_b"] = torch.einsum("ijhw,jq->iqhw", core, factors["lokr_w2_b"]).flatten(1)
        first, second = (
            (factors[f"{name}_a"], factors[f"{name}_b"]) if f"{name}_a" in factors else _trivial_product(factors[name])
            for name in ("lokr_w1", "lokr_w2")
        )
        return first, second

    def scale_delta_(self, factor: Tensor) -> None:
        """See `Adapter.scale_delta_`."""
        factors = self._factors()
        for each in factors:
            each.mul_(factor ** (1 / len(factors)))

    def plus_parameters(self) -> list[nn.Parameter]:
        """The factor that starts at zero."""
        return [self.get_parameter("lokr_w2" if self.form.w2_rank is None else "lokr_w2_b")]

    # In files

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """See `Adapter.from_tensors`; options are the drop-outs."""
        form = KroneckerForm.of_tensors(spec, tensors)
        rank = form.rank or 1
        adapter = cls(spec, rank=rank, alpha=rank, form=form, **dora_options(spec, tensors), **options)
        adapter.load_tensors(tensors)
        return adapter

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Beside what every adapter accepts: with two full factors any alpha, since none acts. Some writers store one that
        half precision turns into infinity; one that it can hold is kept."""
        alpha = state_dict.get(prefix + "alpha")
        if not self.form.rank and (alpha is None or not abs(float(alpha)) <= _LARGEST_HALF):
            state_dict[prefix + "alpha"] = self.get_buffer("alpha")
        super()._load_from_state_dict(state_dict, prefix, *rest)


ALGORITHM = Algorithm(
    name="lokr",
    adapter=LoKrModule,
    arguments={
        "factor": arguments.whole_number,
        "decompose_both": arguments.flag,
        "full_matrix": arguments.flag,
        "use_tucker": arguments.flag,
        "unbalanced_factorization": arguments.flag,
        **DORA_ARGUMENTS,
    },
    training_arguments={"rank_dropout": arguments.probability, "module_dropout": arguments.probability},
)

create_network = partial(creation.create_network, "lokr")
create_network_from_weights = partial(creation.create_network_from_weights, "lokr")
