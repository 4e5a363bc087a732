#!/usr/bin/env python3
"""Time and kept memory of every adapter algorithm, against lycoris-lora's and peft's of the same name, on the same layers.

    python benchmarks/adapters.py                     single layers of Stable Diffusion 1.5, forward and backward
    python benchmarks/adapters.py --unet              the whole U-Net, random weights, small latents
    python benchmarks/adapters.py --device cuda --dtype bf16

All contenders run in turn, round after round, in one process, so that a machine whose speed drifts slows all of them; what
counts are the ratios. On a CPU the clock is that of the process, which stands still while others run. "kept" is what stays
in memory between forward and backward, weights and adapters not counted, as torch's saved-tensor hooks see it.
lycoris-lora's modules are made as its kohya wrapper makes them.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """One form of one algorithm, and what other programs call it.

    Attributes:
        name: in our table of algorithms.
        options: for our adapter, beside alpha.
        lycoris: name of its module class, and what that takes beside alpha.
        peft: name of its configuration class, and what that takes beside alpha.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lycoris: tuple[str, Mapping[str, Any]] | None = None
    peft: tuple[str, Mapping[str, Any]] | None = None

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


def _ranked(name: str, lycoris: str, peft: str | None, rank: int, **options: Any) -> Row:
    for_peft = {"decompose_factor": options["factor"]} if "factor" in options else {}
    return Row(
        name=name,
        options={"rank": rank, **options},
        lycoris=(lycoris, {"lora_dim": rank, **options}),
        peft=(peft, {"r": rank, **for_peft}) if peft else None,
    )


_DORA = {"dora_wd": True, "wd_on_output": True}
ROWS: tuple[Row, ...] = (
    _ranked("lora", "LoConModule", "LoraConfig", 4),
    _ranked("lora", "LoConModule", "LoraConfig", 32),
    Row(
        name="lora",
        options={"rank": 4, **_DORA},
        lycoris=("LoConModule", {"lora_dim": 4, "weight_decompose": True}),
        peft=("LoraConfig", {"r": 4, "use_dora": True}),
    ),
    Row(name="dylora", options={"rank": 16, "unit": 4}, lycoris=("DyLoraModule", {"lora_dim": 16, "block_size": 4})),
    _ranked("loha", "LohaModule", "LoHaConfig", 4),
    _ranked("loha", "LohaModule", "LoHaConfig", 16),
    _ranked("lokr", "LokrModule", "LoKrConfig", 4),
    _ranked("lokr", "LokrModule", "LoKrConfig", 4, factor=8),
    _ranked("lokr", "LokrModule", None, 4, full_matrix=True),
    Row(name="ia3", lycoris=("IA3Module", {})),
    Row(name="full", lycoris=("FullModule", {})),
    _ranked("glora", "GLoRAModule", None, 4),
    Row(name="oft", options={"rank": 16}, lycoris=("DiagOFTModule", {"lora_dim": 16})),
    Row(name="boft", options={"rank": 10}, lycoris=("ButterflyOFTModule", {"lora_dim": 10})),
)

LAYERS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "to_q 320, 4096 tokens": (lambda: nn.Linear(320, 320, bias=False), (1, 4096, 320)),
    "ff.net.2 5120 to 1280, 256 tokens": (lambda: nn.Linear(5120, 1280), (1, 256, 5120)),
    "3x3 convolution 320, 32 x 32": (lambda: nn.Conv2d(320, 320, 3, padding=1), (1, 320, 32, 32)),
}
U_NET_ROWS = (0, 4, 6)


@dataclass
class Contender:
    """A model with adapters on it, that is called with `inputs`."""

    model: Callable[..., Tensor]
    trained: list[nn.Parameter]
    frozen: list[Tensor]
    inputs: tuple[Tensor, ...]
    autocast: torch.dtype | None

    def forward(self) -> Tensor:
        device = self.inputs[0].device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            return self.model(*self.inputs)

    def seconds(self) -> float:
        """Of one forward and backward pass."""
        for tensor in (*self.trained, self.inputs[0]):
            tensor.grad = None
        clock = time.perf_counter if self.inputs[0].is_cuda else time.process_time
        _wait(self.inputs[0])
        start = clock()
        out = self.forward()
        out.backward(torch.ones_like(out))
        _wait(self.inputs[0])
        return clock() - start

    def kept_mebibytes(self) -> float:
        """What the backward pass will read, apart from weights, in MiB."""
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.trained, *self.frozen)}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = self.forward()
        del out
        return sum(kept.values()) / 2**20


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _shake(parameters: list[nn.Parameter]) -> None:
    """Let every trained value act, so that nobody gains by zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter))


# Single layers


def our_layer(layer: nn.Module, row: Row) -> list[nn.Parameter]:
    """Put our adapter on a layer; returns what is trained."""
    from networks.core.adapter import LayerSpec
    from networks.core.algorithms import algorithm

    found = algorithm(row.name)
    alpha = {"alpha": 1.0} if found.has_alpha else {}
    weight = layer.get_parameter("weight")
    adapter = found.adapter(LayerSpec.of(layer), **alpha, **row.options)
    adapter.initialise(torch.Generator().manual_seed(0), weight.detach().cpu())
    adapter.to(weight.device).train()
    layer.register_forward_hook(adapter.hook)
    return list(adapter.parameters())


def lycoris_layer(layer: nn.Module, row: Row) -> list[nn.Parameter]:
    """Put lycoris-lora's module on a layer."""
    kind, settings = row.lycoris or ("", {})
    modules = importlib.import_module("lycoris.modules")
    module = getattr(modules, kind)("name", layer, multiplier=1.0, alpha=1, bypass_mode=False, **settings)
    module.to(layer.get_parameter("weight").device).train()
    module.apply_to()
    return list(module.parameters())


def peft_layer(layer: nn.Module, row: Row) -> tuple[nn.Module, list[nn.Parameter]]:
    """The layer wrapped by peft, and what is trained."""
    peft = importlib.import_module("peft")
    kind, settings = row.peft or ("", {})
    alpha = {"lora_alpha": 1} if kind == "LoraConfig" else {"alpha": 1}
    config = getattr(peft, kind)(target_modules=["0"], **alpha, **settings)
    wrapped = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0].train()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return wrapped, trained


def layer_contenders(row: Row | None, layer: nn.Module, x: Tensor) -> Iterator[tuple[str, Contender]]:
    """Who can do this row on this layer, ours first; without a row the bare layer."""
    dtype = None if x.dtype == torch.float32 else x.dtype
    for program in ("bare",) if row is None else ("ours", "lycoris", "peft"):
        if row is not None and program != "ours" and getattr(row, program) is None:
            continue
        own = copy.deepcopy(layer)
        frozen, model, trained = [*own.parameters()], own, []
        if row is not None and program == "peft":
            model, trained = peft_layer(own, row)
        elif row is not None:
            trained = (our_layer if program == "ours" else lycoris_layer)(own, row)
        _shake(trained)
        yield program, Contender(model, trained, frozen, (x.detach().requires_grad_(),), dtype)


# The whole U-Net


def clone(model: nn.Module) -> nn.Module:
    """Modules of their own, with the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def u_net_contenders(row: Row | None, unet: nn.Module, size: int) -> Iterator[tuple[str, Contender]]:
    """Who can put this row on the U-Net's transformers; without a row the bare U-Net."""
    weight = next(unet.parameters())
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, size, size, generator=generator).to(weight).requires_grad_()
    context = torch.randn(1, 77, 768, generator=generator).to(weight)
    timestep = torch.tensor([500], device=weight.device)
    dtype = None if weight.dtype == torch.float32 else weight.dtype
    for program in ("bare",) if row is None else ("ours", "lycoris", "peft"):
        if row is not None and program != "ours" and getattr(row, program) is None:
            continue
        own = clone(unet).train()
        trained = [] if row is None else _on_unet(program, own, row)
        _shake(trained)

        def call(latents: Tensor, timestep: Tensor, context: Tensor, own: nn.Module = own) -> Tensor:
            return own(latents, timestep, context).sample

        frozen = list(unet.parameters())
        yield program, Contender(call, trained, frozen, (latents, timestep, context), dtype)


_PEFT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]


def _on_unet(program: str, unet: nn.Module, row: Row) -> list[nn.Parameter]:
    options = {key: str(value) for key, value in row.options.items() if key != "rank"}
    if program == "peft":
        kind, settings = row.peft or ("", {})
        alpha = {"lora_alpha": 1} if kind == "LoraConfig" else {"alpha": 1}
        config = getattr(importlib.import_module("peft"), kind)(target_modules=_PEFT_TARGETS, **alpha, **settings)
        importlib.import_module("peft").inject_adapter_in_model(config, unet)
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        return trained
    if program == "ours":
        module = importlib.import_module(f"networks.{row.name}")
        network = module.create_network(1.0, row.options.get("rank"), 1, None, None, unet, **options)
        network.apply_to(None, unet, False, True)
    else:
        module = importlib.import_module("lycoris.kohya")
        chosen = {"algo": "lora" if row.name == "lora" else row.name, "preset": "unet-transformer-only", **options}
        network = module.create_network(1.0, row.options.get("rank"), 1, None, [], unet, **chosen)
        network.apply_to([], unet, False, True)
    network.to(next(unet.parameters()).device).train()
    return list(network.parameters())


# Measuring


def compare(title: str, found: list[tuple[str, Contender]], rounds: int) -> None:
    """Run the contenders in turn and print a line: medians, and the medians of the ratios to ours."""
    seconds: dict[str, list[float]] = {program: [] for program, _ in found}
    for number in range(rounds + WARM_UP):
        for program, contender in found:
            taken = contender.seconds()
            if number >= WARM_UP:
                seconds[program].append(taken)
    kept = {program: contender.kept_mebibytes() for program, contender in found}
    first = found[0][0]
    cells = [f"{statistics.median(seconds[first]) * 1000:.2f}", f"{kept[first]:.2f}"]
    for program in ("lycoris", "peft"):
        if program not in seconds:
            cells += ["", ""]
            continue
        ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds[first], seconds[program], strict=True))
        cells += [f"{ratio:.2f}", f"{kept[first] / kept[program]:.2f}"]
    print(f"| {title} | {' | '.join(cells)} |", flush=True)


def header(what: str) -> None:
    columns = [what, "ours ms", "ours kept MiB"]
    columns += [f"{kind} ours / {program}" for program in ("lycoris", "peft") for kind in ("time", "kept")]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def rows_here(only: str | None) -> list[Row]:
    """The rows to run. Every algorithm of the table is among them, but for norms, which are none of these layers."""
    from networks.core.algorithms import ALGORITHMS

    missing = set(ALGORITHMS) - {"norm"} - {row.name for row in ROWS}
    if missing:
        raise SystemExit(f"no row for {', '.join(missing)}")
    return [row for row in ROWS if only is None or row.name in only.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", action="store_true", help="the whole U-Net instead of single layers")
    parser.add_argument("--latent_size", type=int, default=16, help="of the U-Net's input")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the base; adapters are fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; waiting threads count as work")
    parser.add_argument("--only", help="algorithms, between commas")
    settings = parser.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.dtype]
    logging.disable(logging.WARNING)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    if settings.unet:
        from diffusers import UNet2DConditionModel

        from library.families.sd1 import SD1

        unet = UNet2DConditionModel(**SD1.unet_config).to(settings.device, dtype).requires_grad_(False)
        header(f"U-Net, latents {settings.latent_size} x {settings.latent_size}")
        compare("bare", list(u_net_contenders(None, unet, settings.latent_size)), settings.rounds)
        for row in rows_here(settings.only):
            if settings.only or ROWS.index(row) in U_NET_ROWS:
                compare(str(row), list(u_net_contenders(row, unet, settings.latent_size)), settings.rounds)
        return
    for name, (make_layer, shape) in LAYERS.items():
        layer = make_layer().to(settings.device, dtype).requires_grad_(False)
        x = torch.randn(shape).to(settings.device, dtype)
        header(name)
        compare("bare", list(layer_contenders(None, layer, x)), settings.rounds)
        for row in rows_here(settings.only):
            compare(str(row), list(layer_contenders(row, layer, x)), settings.rounds)


if __name__ == "__main__":
    main()
