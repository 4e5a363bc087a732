"""The merged change of one layer: what is wanted, the tensors that hold it, and how far those are from it.

Products of thin factors stay so: (up1 up2) (down1; down2) is up1 down1 + up2 down2. They are cut by QR of the factors; the
dense change is formed only where an algorithm has no such product, or a method looks at single values.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.streams import torch_stream
from networks.core.adapter import LayerSpec
from networks.core.additive import AdditiveAdapter
from networks.core.products import (
    balanced_factors,
    leading_singular_vectors,
    norm_of_difference,
    norm_of_product,
    rank_within,
    svd,
    svd_of_product,
)
from networks.tools.conversion import DOWN, UP, LayerError, LayerTensors, SourceLayer
from networks.tools.dense_merging import Method
from networks.tools.rank_choice import squared_norm


@dataclass(frozen=True, kw_only=True)
class RankLimit:
    """How many directions of a layer's change are kept; the fewest of what is given.

    Attributes:
        rank: at most, of linear layers and 1x1 convolutions; None for no limit.
        conv_rank: at most, of larger kernels.
        share: of the squared norm that is enough; None for no such limit.
    """

    rank: int | None = None
    conv_rank: int | None = None
    share: float | None = None

    def highest(self, spec: LayerSpec) -> int | None:
        """The rank that a layer may have; None for no limit."""
        return self.conv_rank if spec.is_wide else self.rank

    def of(self, spec: LayerSpec, values: Tensor) -> int:
        """The rank for a layer with these singular values."""
        highest = self.highest(spec)
        needed = len(values) if self.share is None else rank_within(values, (1 - self.share) ** 0.5)
        return max(1, min(needed, len(values) if highest is None else highest))


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How changes are added.

    Attributes:
        method: what is done instead of the sum; None for the sum.
        dtype: in which factors and differences are multiplied by ratios and added.
        device: where.
    """

    method: Method | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is wanted of one layer.

    Attributes:
        spec: of the base layer.
        product: (out, rank) and (rank, rest) whose product is the change; None where `dense` is it.
        dense: (out, in, ...); None where `product` is it.
        bias: the change of the bias; None for none.
    """

    spec: LayerSpec
    product: tuple[Tensor, Tensor] | None
    dense: Tensor | None
    bias: Tensor | None

    def cpu(self) -> Change:
        """The same in the machine's memory."""
        product = None if self.product is None else (self.product[0].cpu(), self.product[1].cpu())
        dense, bias = (None if each is None else each.cpu() for each in (self.dense, self.bias))
        return Change(spec=self.spec, product=product, dense=dense, bias=bias)

    def norm(self) -> float:
        """Frobenius norm of the change of the weight."""
        if self.product is not None:
            return norm_of_product(*self.product)
        assert self.dense is not None
        return squared_norm(self.dense) ** 0.5

    def distance(self, other: Change) -> float:
        """Frobenius norm of the difference of two changes of the weight."""
        if self.product is not None and other.product is not None:
            return norm_of_difference(self.product, other.product)
        return squared_norm(self.matrix() - other.matrix()) ** 0.5

    def matrix(self) -> Tensor:
        """The change as a matrix (out, rest), fp32; of a norm as a vector."""
        if self.product is not None:
            return self.product[0] @ self.product[1]
        assert self.dense is not None
        return self.dense if self.spec.is_norm else self.dense.flatten(1)


Term = tuple[float, SourceLayer]


def wanted_change(terms: Sequence[Term], how: Arithmetic) -> Change:
    """The merged change of one layer.

    Args:
        terms: factor and layer of each adapter that has it.

    Raises:
        LayerError: layers of different shapes, or a change that depends on a base model that was not given.
    """
    adapters = [(factor, layer, layer.known_adapter()) for factor, layer in terms]
    spec = adapters[0][2].spec
    for _, layer, adapter in adapters:
        if torch.Size(adapter.spec.weight_shape).numel() != torch.Size(spec.weight_shape).numel():
            shapes = f"{spec.weight_shape} and {adapter.spec.weight_shape}"
            raise LayerError(f"has the shapes {shapes} in two of the files", where=layer.name)
    dtype = how.dtype
    biases = [(factor, bias) for factor, _, adapter in adapters if (bias := adapter.delta_bias()) is not None]
    bias = _sum([factor * bias.to(how.device, dtype) for factor, bias in biases]).float() if biases else None
    products = [
        adapter.product() if isinstance(adapter, AdditiveAdapter) and not adapter.reads_base else None
        for _, _, adapter in adapters
    ]
    found = [product for product in products if product is not None]
    if how.method is None and len(found) == len(adapters):
        factors = [factor for factor, _, _ in adapters]
        return Change(spec=spec, product=_stacked(factors, found, how), dense=None, bias=bias)
    deltas = [layer.delta().to(how.device).reshape(spec.weight_shape) for _, layer, _ in adapters]
    factors = [factor for factor, _, _ in adapters]
    if how.method is None or spec.is_norm:
        dense = _sum([factor * delta.to(dtype) for factor, delta in zip(factors, deltas, strict=True)]).float()
    else:
        dense = how.method.combine(terms[0][1].name, [delta.to(dtype) for delta in deltas], factors).float()
    return Change(spec=spec, product=None, dense=dense, bias=bias)


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0) if len(values) > 1 else values[0]


def _stacked(factors: Sequence[float], products: Sequence[tuple[Tensor, Tensor]], how: Arithmetic) -> tuple[Tensor, Tensor]:
    """The products side by side, each with its factor and of equal norms, so that no half of them leaves half precision."""
    dtype, ups, downs = how.dtype, [], []
    for factor, (up, down) in zip(factors, products, strict=True):
        up, down = up.to(how.device, dtype) * factor, down.to(how.device, dtype)
        sizes = [float(torch.linalg.vector_norm(each.float())) for each in (up, down)]
        balance = (sizes[0] / sizes[1]) ** 0.5 if all(sizes) else 1.0
        ups.append((up / balance).float())
        downs.append((down * balance).float())
    return torch.cat(ups, 1), torch.cat(downs)


def tensors_of(change: Change, limit: RankLimit | None) -> tuple[LayerTensors, Tensor | None]:
    """A change as the tensors of a layer: LoRA where it is a product or its rank is limited, else the difference; fp32.

    Returns:
        The tensors, and the singular values of the change, largest first, as far as they were looked for on the way.
    """
    if change.spec.is_norm:
        assert change.dense is not None
        bias = torch.zeros_like(change.dense) if change.bias is None else change.bias
        return {"w_norm": change.dense, "b_norm": bias}, None
    bias_of = {} if change.bias is None or not bool(change.bias.any()) else {"diff_b": change.bias}
    product, values = change.product, None
    if product is None and limit is None:
        assert change.dense is not None
        return {"diff": change.dense, **bias_of}, None
    if limit is not None:
        left, values, right = _decomposed(change, limit)
        up, down = balanced_factors(left, values, right, limit.of(change.spec, values))
    else:
        assert product is not None
        up, down = product
        if len(down) > min(len(up), down.shape[1]):
            left, values, right = svd_of_product(up, down)
            up, down = balanced_factors(left, values, right, min(len(up), down.shape[1]))
    shape = change.spec.weight_shape
    tensors = {
        DOWN: down.reshape(-1, *shape[1:]).contiguous(),
        UP: up.reshape(*up.shape, *(1 for _ in shape[2:])).contiguous(),
        "alpha": torch.tensor(float(len(down))),
        **bias_of,
    }
    return tensors, values


def _decomposed(change: Change, limit: RankLimit) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values, as many as may be kept."""
    if change.product is not None:
        return svd_of_product(*change.product)
    highest = limit.highest(change.spec)
    if highest is None or limit.share is not None:
        return svd(change.matrix())
    return leading_singular_vectors(change.matrix(), highest, torch_stream(0, "merged change"))


def shuffled(name: str, tensors: LayerTensors) -> LayerTensors:
    """LoRA with its ranks in another order, the same for every layer of that name; the change is the same."""
    if DOWN not in tensors:
        return tensors
    order = torch.randperm(len(tensors[DOWN]), generator=torch_stream(0, "shuffle", zlib.crc32(name.encode())))
    return {**tensors, DOWN: tensors[DOWN][order], UP: tensors[UP][:, order].contiguous()}


def written_change(tensors: LayerTensors, spec: LayerSpec) -> Change:
    """What the tensors of `tensors_of`, rounded, mean."""
    bias = tensors.get("b_norm", tensors.get("diff_b"))
    if DOWN in tensors:
        scale = float(tensors["alpha"]) / len(tensors[DOWN])
        up, down = tensors[UP].float().flatten(1) * scale, tensors[DOWN].float().flatten(1)
        return Change(spec=spec, product=(up, down), dense=None, bias=bias)
    dense = tensors["w_norm"] if spec.is_norm else tensors["diff"]
    return Change(spec=spec, product=None, dense=dense.float(), bias=bias)
