"""LoHa: the weight change as the element-wise product of two low-rank matrices, which has up to the square of their rank.

    dW = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)

Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", arXiv:2108.06098,
equation 2; for a convolution with `use_tucker` (ibid., proposition 3) each of the two is a kernel over ranks, with a matrix
on either side. Tensors are named as LyCORIS names them (arXiv:2309.14859).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from networks.building import creation
from networks.core import arguments
from networks.core.adapter import LayerSpec, matching_dtypes
from networks.core.additive import AdditiveAdapter, dora_options
from networks.core.algorithms import Algorithm
from networks.core.recompute import apply_recomputed
from networks.lora import DORA_ARGUMENTS


def tucker_kernel(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A kernel over ranks with a matrix on either side: sum over i, j of core[i, j] a[i, out] b[j, in].

    Args:
        core: (rank, rank, kh, kw).
        a: (rank, out).
        b: (rank, in).

    Returns:
        (out, in, kh, kw).
    """
    return torch.einsum("ijhw,ip,jq->pqhw", core, a, b)


def hadamard_delta(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, cores: tuple[Tensor, Tensor] | None, scale: float
) -> Tensor:
    """The change of a weight.

    Args:
        w1_a, w2_a: (out, rank); with cores (rank, out).
        w1_b, w2_b: (rank, in), for a convolution (rank, in * kh * kw); with cores (rank, in).
        cores: the two kernels over ranks, (rank, rank, kh, kw) each.
        scale: alpha / rank.

    Returns:
        (out, in), for a convolution (out, in * kh * kw), with cores (out, in, kh, kw), in the dtype of the factors.
    """
    if cores is None:
        return ((scale * w1_a) @ w1_b) * (w2_a @ w2_b)
    return tucker_kernel(scale * cores[0], w1_a, w1_b) * tucker_kernel(cores[1], w2_a, w2_b)


def as_one_product(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor]:
    """The same change as one product of rank^2: (A1 B1) * (A2 B2) = (A1 x A2) (B1 x B2), with the products of every pair of
    columns, and of rows (Khatri-Rao).

    Args:
        w1_a, w2_a: (out, rank).
        w1_b, w2_b: (rank, in).

    Returns:
        up (out, rank^2) and down (rank^2, in).
    """
    up = (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1)
    down = (w1_b.unsqueeze(1) * w2_b.unsqueeze(0)).flatten(0, 1)
    return up, down


class LoHaModule(AdditiveAdapter):
    """LoHa on one layer.

    Args:
        spec: the base layer.
        rank: of each of the two products.
        alpha: the change is scaled by alpha / rank.
        use_tucker: on kernels larger than one pixel, kernels over ranks instead of rows as long as in * kh * kw.
        rank_dropout: share of output channels whose change is zeroed in train mode, for each sample anew; what is left is
            scaled up. (The two factors' ranks belong to no activation, so outputs are dropped, as in LyCORIS.)
        settings: see `AdditiveAdapter`.
    """

    title = "LoHa"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        rank: int,
        alpha: float,
        use_tucker: bool = False,
        rank_dropout: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(spec, rank=rank, alpha=alpha, **settings)
        self.rank_dropout = rank_dropout
        outputs, inputs, *kernel = spec.weight_shape
        self.hada_t1: nn.Parameter | None = None
        self.hada_t2: nn.Parameter | None = None
        if use_tucker and spec.is_wide:
            self.hada_t1 = nn.Parameter(torch.zeros(rank, rank, *kernel))
            self.hada_t2 = nn.Parameter(torch.zeros(rank, rank, *kernel))
            a_shape, b_shape = (rank, outputs), (rank, inputs)
        else:
            a_shape, b_shape = (outputs, rank), (rank, torch.Size([inputs, *kernel]).numel())
        self.hada_w1_a, self.hada_w1_b = nn.Parameter(torch.zeros(a_shape)), nn.Parameter(torch.zeros(b_shape))
        self.hada_w2_a, self.hada_w2_b = nn.Parameter(torch.zeros(a_shape)), nn.Parameter(torch.zeros(b_shape))

    def initialise_factors(self, generator: torch.Generator, base_weight: Tensor) -> None:
        """Normal values as LyCORIS draws them, and `w2_a` zero: no change at all."""
        for factor, spread in [
            (self.hada_t1, 0.1),
            (self.hada_t2, 0.1),
            (self.hada_w1_b, 1.0),
            (self.hada_w1_a, 0.1),
            (self.hada_w2_b, 1.0),
        ]:
            if factor is not None:
                nn.init.normal_(factor, std=spread, generator=generator)
        nn.init.zeros_(self.hada_w2_a)

    @property
    def structure(self) -> dict[str, str]:
        """See `Adapter.structure`."""
        return super().structure | ({} if self.hada_t1 is None else {"Tucker form": "use_tucker=True"})

    def _factors(self) -> list[Tensor]:
        """The trained factors: w1_a, w1_b, w2_a, w2_b and, in Tucker form, the two cores."""
        factors: list[Tensor] = [self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b]
        if self.hada_t1 is not None and self.hada_t2 is not None:
            factors += [self.hada_t1, self.hada_t2]
        return factors

    def _delta_of(self, factors: list[Tensor], scale: float) -> Tensor:
        w1_a, w1_b, w2_a, w2_b, *cores = (factor.float() for factor in factors)
        delta = hadamard_delta(w1_a, w1_b, w2_a, w2_b, (cores[0], cores[1]) if cores else None, scale)
        return delta.reshape(self.spec.weight_shape)

    def own_delta(self) -> Tensor:
        """See `AdditiveAdapter.own_delta`."""
        return self._delta_of(self._factors(), self.scale)

    @property
    def acts_as_one_product(self) -> bool:
        """Whether the product of rank^2 takes fewer multiplications for each position than the dense change.

        A training step applies a matrix once forward and twice backward (gradients of input and matrix), and applies
        `down` once more to form its activation anew: rank^2 * (4 in + 3 out) against 3 in * out, with the kernel's size
        counted to `in`. Forming the dense change costs little beside, spread over all positions. In Tucker form it is
        always formed.
        """
        outputs, inputs = self.spec.weight_shape[0], self.hada_w1_b.shape[1]
        return self.hada_t1 is None and self.rank**2 * (4 * inputs + 3 * outputs) < 3 * inputs * outputs

    def own_effect(self, x: Tensor, factor: float) -> Tensor:
        """See `AdditiveAdapter.own_effect`: through the product of rank^2 or the dense change, whichever is smaller.

        Neither the dense change nor the activation of rank^2 is kept until the backward pass.
        """
        scale = factor * self.scale
        if not self.acts_as_one_product:

            def dense(x: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
                x, delta = matching_dtypes(x, self._delta_of(list(factors), scale).to(factors[0].dtype))
                return x, delta

            effect = apply_recomputed(self.spec, dense, x, *self._factors())
        else:
            outputs, *in_shape = self.spec.weight_shape
            ones = [1 for _ in in_shape[1:]]

            def hidden(x: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
                up, down = as_one_product(*(each.float() for each in factors))
                x, up, down = matching_dtypes(x, *(each.to(factors[0].dtype) for each in (up * scale, down)))
                return self.spec.apply(x, down.reshape(-1, *in_shape)), up.reshape(*up.shape, *ones)

            pointwise = LayerSpec(weight_shape=(outputs, self.rank**2, *ones))
            effect = apply_recomputed(pointwise, hidden, x, *self._factors())
        return self.drop_outputs(effect, self.rank_dropout)

    def product(self) -> tuple[Tensor, Tensor] | None:
        """See `AdditiveAdapter.product`: of rank^2, as long as that is less than the layer's size."""
        outputs, columns = self.spec.weight_shape[0], self.hada_w1_b.shape[1]
        if self.hada_t1 is not None or self.rank**2 >= min(outputs, columns):
            return None
        up, down = as_one_product(*(factor.float() for factor in self._factors()))
        return self.scale * up, down

    def scale_delta_(self, factor: Tensor) -> None:
        """See `Adapter.scale_delta_`."""
        factors = self._factors()
        for each in factors:
            each.mul_(factor ** (1 / len(factors)))

    def plus_parameters(self) -> list[nn.Parameter]:
        """The factor that starts at zero."""
        return [self.hada_w2_a]

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor], **options: Any) -> Self:
        """See `Adapter.from_tensors`; options are the drop-outs."""
        if "hada_w1_b" not in tensors:
            raise ValueError(f"is no LoHa layer, its tensors are {', '.join(tensors)}")
        rank = len(tensors["hada_w1_b"])
        form = {"use_tucker": "hada_t1" in tensors, **dora_options(spec, tensors)}
        adapter = cls(spec, rank=rank, alpha=rank, **form, **options)
        adapter.load_tensors(tensors)
        return adapter


ALGORITHM = Algorithm(
    name="loha",
    adapter=LoHaModule,
    arguments={"use_tucker": arguments.flag, **DORA_ARGUMENTS},
    training_arguments={"rank_dropout": arguments.probability, "module_dropout": arguments.probability},
)

create_network = partial(creation.create_network, "loha")
create_network_from_weights = partial(creation.create_network_from_weights, "loha")
