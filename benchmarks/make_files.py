#!/usr/bin/env python3
"""The files that weight_tools.py measures with: models and adapters of full size, fp16, random.

    python benchmarks/make_files.py FOLDER
    python benchmarks/make_files.py FOLDER sdxl

FOLDER gets model.safetensors, tuned.safetensors (the other with noise of full rank and a change of rank 8 on every matrix),
lora.safetensors (rank 8 on the layers of LierLa), other.safetensors (rank 16, with convolutions) and wide.safetensors (rank
16 on LierLa's): 4.5 GB together for Stable Diffusion 1.5, which they are without a name, and 14.5 GB for SDXL.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.base_model import BaseModelFiles, open_base_model
from library.checkpoints.ldm_keys import TRANSPOSED, split_view
from library.checkpoints.model_writing import plan_single_file
from library.checkpoints.parts import ModelPart
from library.checkpoints.single_file import original_prefixes, original_table
from library.checkpoints.tensor_writing import PlannedTensor, write_tensors
from library.families.family import ModelFamily
from library.families.sd1 import SD1
from library.families.sdxl import SDXL
from networks.tools.model_differences import tensor_pairs

SPREAD = 0.02  # of weights; a change is a tenth of it
FAMILIES = {"sd15": SD1, "sdxl": SDXL}


def model_tensors(family: ModelFamily) -> dict[str, PlannedTensor]:
    """Every tensor of a checkpoint in the original layout; those of norms are about 1."""
    planned = {}
    for kind in family.parts:
        part = ModelPart(kind=kind, config=family.config(kind), sources={}, where="")
        table, prefix = original_table(kind, part.config, family), original_prefixes(kind, family)[0]
        for name, shape in part.module_shapes().items():
            key = table.to_original(name)
            assert key is not None
            original, view = split_view(key)
            if view:
                shape = shape[::-1] if view == TRANSPOSED else (3 * shape[0], *shape[1:])
            middle = 1.0 if "norm" in name and name.endswith(".weight") else 0.0

            def make(shape: tuple[int, ...] = shape, middle: float = middle) -> Tensor:
                return torch.randn(shape).mul_(SPREAD).add_(middle).half()

            planned[prefix + original] = PlannedTensor(shape, "float16", make)
    return planned


def tuned(kind: str, name: str, tensor: Tensor) -> Tensor:
    """A weight with noise and, if it is a matrix, a change of rank 8 of the same size."""
    changed = tensor.float().add_(torch.randn(tensor.shape), alpha=SPREAD / 10)
    if tensor.dim() > 1:
        rows, columns = tensor.flatten(1).shape
        product = torch.randn(rows, 8) @ torch.randn(8, columns)
        changed += product.reshape(tensor.shape) * (SPREAD / 10 / 8**0.5)
    return changed.half()


def lora(model: BaseModelFiles, rank: int, *, with_convolutions: bool) -> dict[str, Tensor]:
    """An adapter on the layers that sd-scripts trains."""
    tensors = {}
    for pair in tensor_pairs(model, model, with_convolutions=with_convolutions):
        if pair.rank_name:
            shape = pair.shape
            tensors[f"{pair.layer}.lora_down.weight"] = (torch.randn(rank, *shape[1:]) / rank).half()
            tensors[f"{pair.layer}.lora_up.weight"] = (torch.randn(shape[0], rank, *(1 for _ in shape[2:])) * SPREAD).half()
            tensors[f"{pair.layer}.alpha"] = torch.tensor(rank / 2).half()
    return tensors


def main(folder: Path, family: ModelFamily) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    write_tensors(folder / "model.safetensors", model_tensors(family))
    model = open_base_model(folder / "model.safetensors")
    write_tensors(folder / "tuned.safetensors", plan_single_file(model, change=tuned, from_headers=True))
    adapters = {"lora": (8, False), "other": (16, True), "wide": (16, False)}
    for name, (rank, with_convolutions) in adapters.items():
        write_tensors(folder / f"{name}.safetensors", lora(model, rank, with_convolutions=with_convolutions))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or (len(sys.argv) == 3 and sys.argv[2] not in FAMILIES):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), FAMILIES[(sys.argv[2:] or ["sd15"])[0]])
