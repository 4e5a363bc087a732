"""The sizes and kinds of LoKr's two factors: as planned from a layer and settings, and as found in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.core.adapter import LayerSpec
from networks.core.factorization import factorization


@dataclass(frozen=True, kw_only=True)
class KroneckerForm:
    """The sizes and kinds of the two factors.

    Attributes:
        outputs, inputs: sizes of w1 and of w2 along each, whose products are the layer's.
        w1_rank, w2_rank: of a factor that is a product itself; None for a full one.
        tucker: whether w2 has a kernel over ranks with a matrix on either side.
    """

    outputs: tuple[int, int]
    inputs: tuple[int, int]
    w1_rank: int | None = None
    w2_rank: int | None = None
    tucker: bool = False

    @property
    def rank(self) -> int:
        """The rank by which alpha is divided; 0 with two full factors, where alpha means nothing."""
        return self.w2_rank or self.w1_rank or 0

    def __str__(self) -> str:
        kinds = ("a full", "a decomposed", "a Tucker-decomposed")
        first = f"{kinds[self.w1_rank is not None]} {self.outputs[0]} x {self.inputs[0]}"
        kind = kinds[2 if self.tucker else self.w2_rank is not None]
        return f"{first} and {kind} {self.outputs[1]} x {self.inputs[1]} factor"

    @classmethod
    def of_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> KroneckerForm:
        """The form that a file's tensors have, whoever chose the sizes.

        Raises:
            ValueError: tensors that are not LoKr's, or whose product is not the layer's change.
        """
        shapes = {name: (len(tensor), tensor.shape[1:].numel()) for name, tensor in tensors.items() if tensor.dim() > 1}
        try:
            out1, in1, w1_rank = _read_sizes(shapes, "lokr_w1")
            out2, in2, w2_rank = _read_sizes(shapes, "lokr_w2", tucker="lokr_t2" in shapes)
        except KeyError:
            raise ValueError(f"is no LoKr layer, its tensors are {', '.join(tensors)}") from None
        tucker = w2_rank is not None and "lokr_t2" in shapes
        kernel = 1 if tucker else torch.Size(spec.weight_shape[2:]).numel()
        if (out1 * out2, in1 * in2) != (spec.weight_shape[0], spec.weight_shape[1] * kernel):
            wanted = " x ".join(map(str, spec.weight_shape))
            raise ValueError(f"is a Kronecker product of {out1} x {in1} and {out2} x {in2}, the layer has {wanted}")
        return cls(
            outputs=(out1, out2),
            inputs=(in1, in2 // kernel),
            w1_rank=w1_rank,
            w2_rank=w2_rank,
            tucker=tucker,
        )


def _read_sizes(shapes: Mapping[str, tuple[int, int]], factor: str, *, tucker: bool = False) -> tuple[int, int, int | None]:
    """Rows, columns and rank (None for a full one) of a factor in a file; KeyError where it is not there."""
    if factor in shapes:
        return *shapes[factor], None
    (rows, rank), (_, columns) = shapes[f"{factor}_a"], shapes[f"{factor}_b"]
    return (rank, columns, rows) if tucker else (rows, columns, rank)


def planned_form(
    spec: LayerSpec,
    rank: int,
    *,
    factor: int = -1,
    decompose_both: bool = False,
    full_matrix: bool = False,
    use_tucker: bool = False,
    unbalanced_factorization: bool = False,
) -> KroneckerForm:
    """The form that LyCORIS chooses for these settings: a factor is a product where the rank makes that smaller.

    Args:
        spec: the base layer.
        rank: of factors that are products.
        factor: size of the small factor, see `factorization`.
        decompose_both: w1 may be a product too.
        full_matrix: neither is a product.
        use_tucker: on kernels larger than one pixel, a w2 that is a product has a kernel over ranks.
        unbalanced_factorization: w1 takes the larger number of the outputs.

    Raises:
        ValueError: a factor that is neither -1 nor 1 or more.
    """
    if factor < 1 and factor != -1:
        raise ValueError(f"factor is {factor}; give -1, or a whole number of 1 or more")
    outputs, inputs = (factorization(size, factor) for size in spec.weight_shape[:2])
    if unbalanced_factorization:
        outputs = outputs[1], outputs[0]
    w1_is_product = decompose_both and not full_matrix and rank < max(outputs[0], inputs[0]) / 2
    w2_is_product = not full_matrix and rank < max(outputs[1], inputs[1]) / 2
    return KroneckerForm(
        outputs=outputs,
        inputs=inputs,
        w1_rank=rank if w1_is_product else None,
        w2_rank=rank if w2_is_product else None,
        tucker=use_tucker and w2_is_product and spec.is_wide,
    )
