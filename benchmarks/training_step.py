#!/usr/bin/env python3
"""Step time and peak memory of our training loop against a bare loop of diffusers, peft and torch, on the same work.

    python benchmarks/training_step.py --rounds 3 --steps 4

Both train rank-4 LoRA on the same 264 layers of a full-size Stable Diffusion 1.5 with random weights, text encoder included,
with AdamW in fp32 (or --precision bf16). The two run in turn, each round in a process of its own, so that a machine whose
speed drifts slows both; what counts is the ratio. Ours includes reading data, captions, noise, clipping and bookkeeping.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CAPTION = "a photo of a small house by the sea"
WARM_UP = 1


def make_model(folder: Path) -> None:
    """A full-size SD1.5 in diffusers layout with random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from library.checkpoints.tokenizers import shipped_tokenizer
    from library.families.family import NOISE_SCHEDULE
    from library.families.sd1 import SD1

    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=AutoencoderKL(**SD1.vae_config),
        text_encoder=CLIPTextModel(CLIPTextConfig(**SD1.text_encoders[0].config)),
        tokenizer=shipped_tokenizer(SD1.text_encoders[0]),
        unet=UNet2DConditionModel(**SD1.unet_config),
        scheduler=DDIMScheduler(**NOISE_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_dataset(folder: Path, size: int, batch: int) -> Path:
    """Pictures of noise with a caption each, and the dataset file."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0)
    for number in range(batch * 4):
        Image.fromarray(pixels.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTION)
    config = folder.parent / "dataset.toml"
    config.write_text(
        f"[[datasets]]\nresolution = {size}\nbatch_size = {batch}\n"
        f'[[datasets.subsets]]\nimage_dir = "{folder}"\ncaption_extension = ".txt"\nnum_repeats = 100\n'
    )
    return config


def ours(settings: argparse.Namespace) -> list[float]:
    """Seconds of every step of our own loop."""
    from library.cli.training import parse_training, training_options
    from library.training.assembly import build_loop, with_latents
    from library.training.planning import plan_run
    from library.training.trainer import train_step

    argv = (
        f"--pretrained_model_name_or_path {settings.model} --dataset_config {settings.dataset} --output_dir {settings.work} "
        f"--network_module networks.lora --learning_rate 1e-4 --cache_latents --optimizer_type AdamW --seed 1 "
        f"--max_train_steps {settings.steps + WARM_UP} --mixed_precision {settings.precision}"
    ).split() + (["--gradient_checkpointing"] if settings.checkpointing else [])
    run = plan_run(training_options(parse_training(argv)))
    parts = build_loop(*with_latents(run))
    return timed(lambda step: train_step(parts, step), settings.steps)


def bare(settings: argparse.Namespace) -> list[float]:
    """Seconds of every step of the shortest loop that does the same arithmetic."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from torch.nn import functional as F
    from transformers import CLIPTextModel, CLIPTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    tokenizer = CLIPTokenizer.from_pretrained(settings.model, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(settings.model, subfolder="text_encoder", dtype=dtype).to(device)
    unet = UNet2DConditionModel.from_pretrained(settings.model, subfolder="unet", torch_dtype=dtype).to(device)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for model in (encoder, unet):
        model.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=1,
            target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
        )
    )
    encoder.add_adapter(
        LoraConfig(r=4, lora_alpha=1, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
    )
    if settings.checkpointing:
        unet.enable_gradient_checkpointing()
        encoder.train()
        encoder.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for model in (unet, encoder) for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    latents = torch.randn(settings.batch, 4, settings.size // 8, settings.size // 8, device=device)
    ids = tokenizer([CAPTION] * settings.batch, padding="max_length", return_tensors="pt").input_ids.to(device)

    def step(_: int) -> None:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (settings.batch,), device=device)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            condition = encoder(ids)[0]
            noisy = scheduler.add_noise(latents, noise, timesteps).to(dtype)
            prediction = unet(noisy, timesteps, condition).sample
        F.mse_loss(prediction.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, settings.steps)


def timed(step: object, count: int) -> list[float]:
    """Seconds of `count` steps after the warm-up."""
    import torch

    seconds = []
    for number in range(count + WARM_UP):
        start = time.perf_counter()
        step(number)  # type: ignore[operator]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def peak_mebibytes() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_worker(settings: argparse.Namespace, which: str) -> dict[str, float]:
    """One loop in a process of its own: median seconds a step and peak memory."""
    command = [
        sys.executable,
        __file__,
        "--worker",
        which,
        *(f"--{key}={value}" for key, value in vars(settings).items() if value),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{which} failed:\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="timed steps in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--checkpointing", type=int, default=0, help="1: gradient checkpointing in both")
    parser.add_argument("--model", help="folder for the random model, kept between calls")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--dataset", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.worker:
        seconds = {"ours": ours, "bare": bare}[settings.worker](settings)
        print(json.dumps({"seconds": statistics.median(seconds), "mebibytes": peak_mebibytes()}))
        return
    with tempfile.TemporaryDirectory() as work:
        settings.work = work
        settings.model = settings.model or f"{work}/model"
        if not Path(settings.model).exists():
            make_model(Path(settings.model))
        settings.dataset = str(make_dataset(Path(work) / "images", settings.size, settings.batch))
        del settings.worker
        compare(settings)


def compare(settings: argparse.Namespace) -> None:
    """Run both in turn and print the table."""
    ratios: dict[str, list[float]] = {"seconds": [], "mebibytes": []}
    print("| round | ours s/step | bare s/step | ratio | ours MiB | bare MiB | ratio |\n|---|---|---|---|---|---|---|")
    for number in range(settings.rounds):
        pair = [run_worker(settings, which) for which in ("ours", "bare")]
        for key, values in ratios.items():
            values.append(pair[0][key] / pair[1][key])
        cells = [f"{pair[0][key]:.2f} | {pair[1][key]:.2f} | {ratios[key][-1]:.3f}" for key in ratios]
        print(f"| {number + 1} | {' | '.join(cells)} |", flush=True)
    time_ratio, memory_ratio = (statistics.median(values) for values in ratios.values())
    print(f"median ratios: time {time_ratio:.3f}, memory {memory_ratio:.3f}")


if __name__ == "__main__":
    main()
