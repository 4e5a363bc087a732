"""LoRA tensors in the spellings of other programs, brought into the one that `networks.lora` holds.

That is `lora_down.weight` (rank, in, ...), `lora_up.weight` (out, rank, ...) and `alpha`, and beside them DoRA's
magnitudes, a change of the bias (`diff_b`), and what an extraction left over (`bias_indices`, `bias_values`, `bias_size`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from networks.core.adapter import LayerSpec

DOWN, UP, MIDDLE = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
RESIDUE = ("bias_indices", "bias_values", "bias_size")
"""A sparse matrix (out, in * kernel): row and column of every value, the values, the size. It belongs to the weight, in
spite of its name."""

_KNOWN = {DOWN, UP, MIDDLE, "alpha", "scale", "dora_scale", "diff_b", *RESIDUE}


def check_lora(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not a LoRA layer's.

    Raises:
        ValueError: with their names.
    """
    if DOWN not in tensors or UP not in tensors:
        raise ValueError(f"is no LoRA layer, its tensors are {', '.join(tensors)}")
    strange = [name for name in tensors if name not in _KNOWN]
    if strange:
        raise ValueError(f"has tensors that do not belong to a LoRA layer: {', '.join(strange)}")
    found = [name for name in RESIDUE if name in tensors]
    if found and len(found) < len(RESIDUE):
        raise ValueError(f"has {', '.join(found)} without {', '.join(name for name in RESIDUE if name not in found)}")


def plain_lora(spec: LayerSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same change without a middle factor, and with its scale as alpha; all else as it is.

    A `scale`, which one reader of the field lets replace alpha / rank, does so here. A change of 0 is left out for a bias
    that is not there.

    Raises:
        ValueError: another change of that bias; an alpha or scale that is infinite, not a number, or more than one number;
            factors that do not go together; a residue that does not fit the layer.
    """
    plain = dict(tensors)
    for name in ("alpha", "scale"):
        if name in plain:
            plain[name] = _one_number(plain[name], name)
    scale = plain.pop("scale", None)
    if scale is not None and DOWN in plain:
        plain["alpha"] = scale * len(plain[DOWN])
    if MIDDLE in plain and DOWN in plain:
        middle, down = plain.pop(MIDDLE), plain[DOWN]
        plain[DOWN] = without_middle(down, middle)
        if "alpha" in plain:
            plain["alpha"] = plain["alpha"] * len(middle) / len(down)
    if not spec.has_bias and plain.pop("diff_b", torch.zeros(1)).any():
        raise ValueError("has a change of the bias (diff_b), but the base layer has no bias")
    if all(name in plain for name in RESIDUE):
        _check_residue(spec, *(plain[name] for name in RESIDUE))
    return plain


def without_middle(down: Tensor, middle: Tensor) -> Tensor:
    """The down factor of a convolution's Tucker form with the kernel of its middle one: exactly the same change.

        dW[o, i, ...] = sum_pq up[o, p] middle[p, q, ...] down[q, i]

    (the Tucker, or CP, decomposition of LyCORIS, arXiv:2309.14859)

    Args:
        down: (q, in), or (q, in, 1, 1).
        middle: (p, q, kh, kw).

    Returns:
        (p, in, kh, kw), fp32.

    Raises:
        ValueError: sizes that do not go together.
    """
    if middle.dim() < 2 or middle.shape[1] != len(down) or down[0].numel() != down.shape[1]:
        raise ValueError(f"has {MIDDLE} {list(middle.shape)}, which does not go with {DOWN} {list(down.shape)}")
    return torch.einsum("pq...,qi->pi...", middle.float(), down.flatten(1).float())


def dense_residue(spec: LayerSpec, indices: Tensor, values: Tensor) -> Tensor:
    """The residue of an extraction as a change of the weight.

    Args:
        indices: (2, n), row and column in the weight as a matrix (out, in * kernel).
        values: (n,).

    Returns:
        (out, in, ...) fp32.
    """
    rows, columns = indices.long()
    matrix = torch.zeros(spec.weight_shape, device=values.device).flatten(1)
    return matrix.index_put((rows, columns), values.float(), accumulate=True).view(spec.weight_shape)


def _one_number(tensor: Tensor, name: str) -> Tensor:
    """A tensor of one value as a 0-d one in fp32."""
    if tensor.numel() != 1:
        raise ValueError(f"its {name} is not one number but {list(tensor.shape)}")
    value = tensor.float().reshape(())
    if not value.isfinite():
        raise ValueError(f"its {name} is {'not a number' if value.isnan() else 'infinite'}")
    return value


def _check_residue(spec: LayerSpec, indices: Tensor, values: Tensor, size: Tensor) -> None:
    outputs, *inputs = spec.weight_shape
    wanted = [outputs, torch.Size(inputs).numel()]
    if [int(number) for number in size.flatten().tolist()] != wanted:
        raise ValueError(f"has a bias_size of {size.flatten().tolist()}, but the base weight's is {wanted}")
    if indices.shape != (2, values.numel()) or values.dim() != 1:
        raise ValueError(f"has bias_indices {list(indices.shape)}, which do not go with bias_values {list(values.shape)}")
    limits = torch.tensor(wanted, device=indices.device)[:, None]
    if bool(((indices < 0) | (indices >= limits) | (indices != indices.long())).any()):
        raise ValueError("has bias_indices outside the base weight")
