#!/usr/bin/env python3
"""Pictures with and without LoRA: our pipeline against diffusers' StableDiffusionPipeline and peft, on the same work.

    python benchmarks/generation.py                                                  a CPU, some minutes
    python benchmarks/generation.py --device cuda --dtype bf16 --size 512 --steps 20 --batch 8 --compile

Stable Diffusion 1.5 of full size with random weights, LoRA of rank 8 on the 192 layers of its U-Net. Both programs draw the
same pictures (prompt, seed, DDIM, guidance), and take turns, round after round, in one process; what counts are the ratios,
ours over theirs. On a CPU the clock is that of the process, which stands still while others run. The last column is the
largest difference between their pictures, in 8-bit values: it says that both did the same.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from library.generation.adapters import Acting, AdapterKey, AdapterRack
from library.generation.compiling import CompiledDenoiser
from library.generation.loading import load_rack
from library.generation.options import AdapterOptions
from library.generation.pipeline import Pipeline, PipelineModels, PipelineSettings
from library.generation.requests import ImageRequest
from library.generation.samplers import make_scheduler
from library.prompts.sub_prompts import read_prompt
from library.quiet import quiet_libraries

LORAS = ("first", "second", "third")
PROMPT, NEGATIVE = "a photo of a small house by the sea", "blurry"
CHANGES = 20
"""How often strengths are changed, as in a picture of so many steps."""


def make_models(device: str, dtype: torch.dtype) -> PipelineModels:
    """A full-size SD1.5 with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from library.checkpoints.tokenizers import shipped_tokenizer
    from library.families.sd1 import SD1

    torch.manual_seed(0)
    parts = (
        UNet2DConditionModel(**SD1.unet_config).to(device, dtype),
        AutoencoderKL(**SD1.vae_config).to(device, dtype),
        CLIPTextModel(CLIPTextConfig(**SD1.text_encoders[0].config)).to(device, dtype),
    )
    denoiser, vae, text_encoder = (part.eval().requires_grad_(False) for part in parts)
    return PipelineModels(
        family=SD1,
        denoiser=denoiser,
        vae=vae,
        text_encoders=[text_encoder],
        tokenizers=[shipped_tokenizer(SD1.text_encoders[0])],
    )


def make_loras(models: PipelineModels, folder: Path) -> None:
    """Files of random LoRA."""
    from networks import lora

    generator = torch.Generator().manual_seed(1)
    for name in LORAS:
        network = lora.create_network(1.0, 8, 4.0, None, [], models.denoiser)
        for parameter in network.parameters():
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
        network.save_weights(folder / f"{name}.safetensors", torch.float16, {})


def clone(model: nn.Module) -> nn.Module:
    """Modules of their own, with the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def requests(tags: Sequence[str], settings: argparse.Namespace) -> list[ImageRequest]:
    """Of a picture for each text of tags."""
    return [
        ImageRequest(
            prompt=f"{PROMPT} {text}",
            negative_prompt=NEGATIVE,
            width=settings.size,
            height=settings.size,
            steps=settings.steps,
            seed=seed,
        )
        for seed, text in enumerate(tags)
    ]


class Ours:
    """Our pipeline, with adapters by tags."""

    def __init__(self, models: PipelineModels, folder: Path, settings: argparse.Namespace) -> None:
        self._settings, self._models, self._folder = settings, models, folder
        self._hooks, self._merging = (Pipeline(models, rack=self.rack(merges=merges)) for merges in (False, True))
        self._compiling = self._merging
        if settings.compile:
            own = replace(models, denoiser=clone(models.denoiser))
            compiled = CompiledDenoiser(own.denoiser, note=print)
            self._compiling = Pipeline(own, rack=self.rack(merges=True, models=own), compiled=compiled)

    def rack(self, *, merges: bool, models: PipelineModels | None = None) -> AdapterRack:
        """One whose adapters are those that tags name."""
        options = AdapterOptions(merge_for_batches=merges)
        rack = load_rack(options, models or self._models, lambda tag: self._folder / f"{tag.name}.safetensors")
        for name in LORAS:
            rack.network(AdapterKey(self._folder / f"{name}.safetensors"))
        return rack

    def draw(self, tags: Sequence[str], *, batch: int, merged: bool = False, compiled: bool = False) -> list[np.ndarray]:
        """A picture for each text of tags."""
        pipeline = self._compiling if compiled else self._merging if merged else self._hooks
        return [np.asarray(picture) for picture in pipeline.generate(requests(tags, self._settings), batch_size=batch)]


class Theirs:
    """diffusers' pipeline with modules of its own, without adapters and with those that peft puts on."""

    def __init__(self, models: PipelineModels, folder: Path | None, settings: argparse.Namespace) -> None:
        self._settings = settings
        self.bare = self.adapted = diffusers_pipeline(models)
        if folder is None:
            return
        self.adapted = diffusers_pipeline(models)
        for name in LORAS:
            self.adapted.load_lora_weights(str(folder), weight_name=f"{name}.safetensors", adapter_name=name)

    def draw(self, names: Sequence[Sequence[str]], *, batch: int, fuses: bool = False) -> list[np.ndarray]:
        """A picture for each list of adapters, which are the same in a batch."""
        pictures = []
        for start in range(0, len(names), batch):
            pipeline, used = (self.adapted if names[start] else self.bare), list(names[start])
            if used:
                pipeline.set_adapters(used)
            if fuses:
                pipeline.fuse_lora(adapter_names=used)
            seeds = range(start, min(start + batch, len(names)))
            pictures += self._pictures(pipeline, seeds)
            if fuses:
                pipeline.unfuse_lora()
        return pictures

    def _pictures(self, pipeline: Any, seeds: Sequence[int]) -> list[np.ndarray]:
        settings = self._settings
        drawn = pipeline(
            [PROMPT] * len(seeds),
            negative_prompt=[NEGATIVE] * len(seeds),
            width=settings.size,
            height=settings.size,
            num_inference_steps=settings.steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        return [np.asarray(picture) for picture in drawn.images]


def diffusers_pipeline(models: PipelineModels) -> Any:
    """StableDiffusionPipeline of modules with the same weights."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=models.vae,
        text_encoder=clone(models.text_encoders[0]),
        tokenizer=models.tokenizers[0],
        unet=clone(models.denoiser),
        scheduler=make_scheduler("ddim", steps=1, prediction_type="epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Pictures


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Pictures that both draw."""

    title: str
    pictures: int
    ours: Callable[[], list[np.ndarray]]
    theirs: Callable[[], list[np.ndarray]]


def scenes(ours: Ours, theirs: Theirs, settings: argparse.Namespace) -> Iterator[Scene]:
    """Without adapters, with one and with three, as hooks and in the weights, and changing from picture to picture."""

    def scene(
        title: str, used: Sequence[Sequence[str]], size: int, *, merged: bool = False, compiled: bool = False
    ) -> Scene:
        tags = [" ".join(f"<lora:{name}:1>" for name in names) for names in used]
        return Scene(
            title=f"{title}, batch of {size}",
            pictures=len(used),
            ours=lambda: ours.draw(tags, batch=size, merged=merged, compiled=compiled),
            theirs=lambda: theirs.draw(used, batch=size, fuses=merged),
        )

    for size in dict.fromkeys((1, settings.batch)):
        yield scene("no adapter", [()] * size, size)
        if settings.compile:
            yield scene("no adapter, ours compiled", [()] * size, size, compiled=True)
        for count in (1, len(LORAS)):
            yield scene(f"{count} LoRA", [LORAS[:count]] * size, size)
            yield scene(f"{count} LoRA in the weights", [LORAS[:count]] * size, size, merged=True)
    yield scene("another LoRA for every picture", [LORAS[:1], LORAS[1:2]], 1)


def compare(scene: Scene, settings: argparse.Namespace) -> None:
    """Both in turn, and a line: medians, and the median of the rounds' ratios."""
    drawn = {"ours": scene.ours(), "theirs": scene.theirs()}  # both warm
    pairs = zip(drawn["ours"], drawn["theirs"], strict=True)
    difference = max(int(np.abs(ours.astype(int) - theirs).max()) for ours, theirs in pairs)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(settings.rounds):
        turns = [("ours", scene.ours), ("theirs", scene.theirs)]
        for which, draw in turns if number % 2 else reversed(turns):
            seconds[which].append(timed(draw, settings.device))
    each = {which: statistics.median(values) / scene.pictures for which, values in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
    cells = (f"{each['ours']:.2f}", f"{each['theirs']:.2f}", f"{60 / each['ours']:.1f}", f"{ratio:.3f}", str(difference))
    print(f"| {scene.title} | {' | '.join(cells)} |", flush=True)


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds, of the processor where it does the work."""
    on_gpu = device.startswith("cuda")
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


# Changes of strengths, texts and memory


def compare_changes(ours: Ours, theirs: Theirs, settings: argparse.Namespace) -> None:
    """The cost of another adapter, and of other strengths of the same, on the rows of a batch, in milliseconds."""
    rows = 2 * settings.batch
    with contextlib.redirect_stdout(io.StringIO()):
        hooks, merging = ours.rack(merges=False), ours.rack(merges=True)

    def acting(tags: str) -> Acting:
        return hooks.acting(read_prompt(tags, where="", style="sdnext", extended=True))[0]

    first, second, moving = (acting(f"<lora:{tag}>") for tag in ("first:1", "second:1", "first:0@0,1@1"))
    mixed, pipeline = [first] * settings.batch + [second] * settings.batch, theirs.adapted

    def fuse(number: int) -> None:
        pipeline.set_adapters([LORAS[number % 2]])
        pipeline.fuse_lora(adapter_names=[LORAS[number % 2]])
        pipeline.unfuse_lora()

    cases: dict[str, tuple[Callable[[int], object], Callable[[int], object] | None]] = {
        "another LoRA": (
            lambda number: hooks.set_denoiser([(first, second)[number % 2]] * rows, 0, CHANGES),
            lambda number: pipeline.set_adapters([LORAS[number % 2]]),
        ),
        "a step with another strength": (
            lambda number: hooks.set_denoiser([moving] * rows, number, CHANGES),
            lambda number: pipeline.set_adapters(LORAS[:1], adapter_weights=[number / CHANGES]),
        ),
        "a step with the same": (lambda number: hooks.set_denoiser([first] * rows, number, CHANGES), None),
        "a step with the same, a LoRA for each half": (lambda number: hooks.set_denoiser(mixed, number, CHANGES), None),
        "another LoRA in the weights": (lambda number: merging.merge([(first, second)[number % 2]]), fuse),
    }
    print(f"\n| {rows} rows | ours ms | theirs ms |\n|---|---|---|", flush=True)
    with hooks.borrowed(), merging.borrowed():
        for title, programs in cases.items():
            cells = ["-" if change is None else f"{milliseconds(change, settings.device):.2f}" for change in programs]
            print(f"| {title} | {' | '.join(cells)} |", flush=True)


def milliseconds(change: Callable[[int], object], device: str) -> float:
    """Of one change, the median of several after the first."""
    change(0)
    return 1000 * statistics.median(timed(lambda: change(number), device) for number in range(1, CHANGES))  # noqa: B023


def count_encodings(ours: Ours, theirs: Theirs, models: PipelineModels) -> None:
    """How many texts go through the text encoder for four pictures of one prompt."""
    counts = []
    programs = {
        models.text_encoders[0]: lambda: ours.draw([""] * 4, batch=1),
        theirs.bare.text_encoder: lambda: theirs.draw([()] * 4, batch=1),
    }
    for encoder, draw in programs.items():
        texts: list[int] = []
        hook = encoder.register_forward_hook(lambda *call, texts=texts: texts.append(len(call[-1].last_hidden_state)))
        draw()
        hook.remove()
        counts.append(sum(texts))
    print(f"\ntexts encoded for 4 pictures of one prompt: ours {counts[0]}, theirs {counts[1]}", flush=True)


MEMORY: dict[str, tuple[str, bool, bool]] = {
    f"{program}{', offload' * offload}{', VAE in pieces' * tiling}": (program, offload, tiling)
    for program in ("ours", "theirs")
    for offload in (False, True)
    for tiling in (False, True)
}
"""Title -> program, whether parts that do not compute leave the GPU, whether the VAE works in pieces."""


def peak_mebibytes(title: str, settings: argparse.Namespace) -> float:
    """Peak memory on the GPU while a batch is drawn, in a process that does nothing else."""
    program, offload, tiling = MEMORY[title]
    models = make_models("cpu", DTYPES[settings.dtype])
    if tiling:
        models.vae.enable_tiling()
    if program == "theirs":
        theirs = Theirs(models, None, settings)
        move = theirs.bare.enable_model_cpu_offload if offload else theirs.bare.to
        move(device=settings.device)
        theirs.draw([()] * settings.batch, batch=settings.batch)
    else:
        for part in (models.denoiser, *(() if offload else (models.vae, *models.text_encoders))):
            part.to(settings.device)
        pipeline = Pipeline(models, PipelineSettings(offload=offload, vae_batch_size=settings.batch))
        pipeline.generate(requests([""] * settings.batch, settings), batch_size=settings.batch)
    return torch.cuda.max_memory_allocated() / 2**20


def compare_memory(settings: argparse.Namespace) -> None:
    """A line for each way to draw a batch."""
    print(f"\n| batch of {settings.batch} | peak MiB |\n|---|---|", flush=True)
    for title in MEMORY:
        asked = {key: value for key, value in vars(settings).items() if key in ("size", "steps", "batch", "device", "dtype")}
        options = [f"--{key}={value}" for key, value in asked.items()]
        command = [sys.executable, __file__, "--worker", title, *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"{title} failed:\n{result.stdout}{result.stderr}")
        print(f"| {title} | {json.loads(result.stdout.splitlines()[-1]):.0f} |", flush=True)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="pictures of the larger batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; waiting threads count as work")
    parser.add_argument("--compile", action="store_true", help="our U-Net compiled, too")
    parser.add_argument("--only", default="", help="scenes whose title holds this")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    quiet_libraries()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    if settings.worker:
        print(json.dumps(peak_mebibytes(settings.worker, settings)))
        return
    if settings.device.startswith("cuda"):
        compare_memory(settings)
    models = make_models(settings.device, DTYPES[settings.dtype])
    with tempfile.TemporaryDirectory() as folder:
        compare_all(models, Path(folder), settings)


def compare_all(models: PipelineModels, folder: Path, settings: argparse.Namespace) -> None:
    """All tables but that of memory."""
    make_loras(models, folder)
    with contextlib.redirect_stdout(io.StringIO()):  # what the files are
        ours, theirs = Ours(models, folder, settings), Theirs(models, folder, settings)
    print("\n| pictures | ours s | theirs s | ours a minute | ratio | difference |\n|---|---|---|---|---|---|", flush=True)
    for scene in scenes(ours, theirs, settings):
        if settings.only in scene.title:
            compare(scene, settings)
    compare_changes(ours, theirs, settings)
    count_encodings(ours, theirs, models)


if __name__ == "__main__":
    main()
