#!/usr/bin/env python3
"""What a U-Net takes in each format of `--fp8_base` and `--nf4_base`, and what a training step on it costs.

    python benchmarks/make_files.py FOLDER sdxl
    python benchmarks/base_formats.py FOLDER/model.safetensors --size 256

Each format is measured in a process of its own. "peak" is what the process took at most while loading, over what it took
before; "step" is forward and backward of a rank-4 LoRA on all linear layers, with gradient checkpointing, the second of two.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FORMATS = ("none", "fp8", "nf4")


def peak_megabytes() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(settings: argparse.Namespace) -> dict[str, float]:
    """Load the U-Net in one format, and train on it once to warm up and once for the clock."""
    import torch

    from library.checkpoints.base_model import open_base_model
    from library.checkpoints.packed_weights import summarise_packing
    from library.devices import best_device, dtype_of
    from networks import lora

    device, dtype = best_device(), dtype_of(settings.precision)
    base = open_base_model(settings.model)
    weight_format = None if settings.worker == "none" else settings.worker
    before, start = peak_megabytes(), time.perf_counter()
    unet: Any = base.load_denoiser(dtype=dtype, device=device, weight_format=weight_format)
    result = {"load": time.perf_counter() - start, "peak": peak_megabytes() - before}
    result["error"] = summarise_packing(unet).error if weight_format else 0.0
    unet.requires_grad_(False).train()
    unet.enable_gradient_checkpointing()
    network = lora.create_network(1.0, 4, 1.0, None, base.empty_text_encoders(), unet)
    network.apply_to(None, unet, False, True)
    network.to(device)
    rows = torch.randn(1, 4, settings.size // 8, settings.size // 8, device=device, dtype=dtype)
    condition: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(1, 77, unet.config["cross_attention_dim"], device=device, dtype=dtype)
    }
    if base.family.size_conditions:
        sizes = len(base.family.size_conditions) * unet.config["addition_time_embed_dim"]
        width = unet.config["projection_class_embeddings_input_dim"] - sizes
        pooled = torch.randn(1, width, device=device, dtype=dtype)
        condition["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.full((1, 6), 1024.0, device=device)}
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            predicted = unet(rows, torch.tensor([500], device=device), **condition).sample
        predicted.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        result["step"] = time.perf_counter() - start
    if device.type == "cuda":
        result["cuda"] = torch.cuda.max_memory_allocated() / 1e6
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--worker", choices=FORMATS, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.worker:
        print(json.dumps(measure(settings)))
        return
    print("| weights | load s | peak of loading MB | error | step s | CUDA peak MB |\n|---|---|---|---|---|---|")
    for each in FORMATS:
        command = [sys.executable, __file__, settings.model, "--worker", each]
        command += ["--size", str(settings.size), "--precision", settings.precision]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{each} failed:\n{done.stdout}{done.stderr}")
        row = json.loads(done.stdout.splitlines()[-1])
        cells = [f"{row['load']:.1f}", f"{row['peak']:,.0f}", f"{row['error']:.4f}", f"{row['step']:.2f}"]
        print(f"| {each} | {' | '.join(cells)} | {row.get('cuda', 0):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
