#!/usr/bin/env python3
"""The files that weight_tools.py measures with: models and adapters of Stable Diffusion 1.5's size, fp16, random.

    python benchmarks/make_files.py FOLDER

FOLDER gets sd15.safetensors, tuned.safetensors (the other with noise of full rank and a change of rank 8 on every matrix),
lora.safetensors (rank 8 on 264 layers), other.safetensors (rank 16, 350 layers with convolutions) and wide.safetensors
(rank 16 on the same 264): 4.5 GB together.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.base_model import BaseModelFiles, open_base_model
from library.checkpoints.ldm_keys import UNET_PREFIX, VAE_PREFIX
from library.checkpoints.model_writing import plan_single_file
from library.checkpoints.parts import TEXT_ENCODER, UNET, VAE, ModelPart
from library.checkpoints.single_file import original_table
from library.checkpoints.tensor_writing import PlannedTensor, write_tensors
from library.families.sd1 import SD1
from networks.tools.model_differences import tensor_pairs

SPREAD = 0.02  # of weights; a change is a tenth of it
PARTS = {
    UNET: (SD1.unet_config, UNET_PREFIX),
    VAE: (SD1.vae_config, VAE_PREFIX),
    TEXT_ENCODER: (SD1.text_encoders[0].config, SD1.text_encoders[0].file_prefixes[0]),
}


def model_tensors() -> dict[str, PlannedTensor]:
    """Every tensor of a checkpoint in the original layout; those of norms are about 1."""
    planned = {}
    for kind, (config, prefix) in PARTS.items():
        part = ModelPart(kind=kind, config=config, sources={}, where="")
        table = original_table(kind, config, SD1)
        for name, shape in part.module_shapes().items():
            original = table.to_original(name)
            assert original is not None
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


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    write_tensors(folder / "sd15.safetensors", model_tensors())
    model = open_base_model(folder / "sd15.safetensors")
    write_tensors(folder / "tuned.safetensors", plan_single_file(model, change=tuned, from_headers=True))
    adapters = {"lora": (8, False), "other": (16, True), "wide": (16, False)}
    for name, (rank, with_convolutions) in adapters.items():
        write_tensors(folder / f"{name}.safetensors", lora(model, rank, with_convolutions=with_convolutions))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
