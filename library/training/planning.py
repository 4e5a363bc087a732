"""From options to a checked and planned run; nothing but headers is read."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.checkpoints.base_model import BaseModelFiles, open_base_model
from library.dataset.dataset import Dataset, scan_dataset
from library.training import preparation as prepare
from library.training.options import TrainingOptions
from library.training.plan import PlanFacts, RunLength, run_length

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

DENOISER_FACTOR = 8  # a U-Net of four levels halves a latent's sides three times

DTYPES = {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run that is checked and planned, and has loaded nothing yet."""

    options: TrainingOptions
    accelerator: Accelerator
    base: BaseModelFiles
    prediction_type: str
    dataset: Dataset
    length: RunLength
    seed: int
    started_at: float

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model's weights and arithmetic."""
        return DTYPES[self.options.compute.mixed_precision]

    def say(self, text: str) -> None:
        """Print on the first process only."""
        if self.accelerator.is_main_process:
            print(text, flush=True)


def plan_run(options: TrainingOptions) -> PlannedRun:
    """Check everything that can be checked without loading a model.

    Raises:
        UserError: what is wrong with names, base model or dataset.
    """
    prepare.check_names(options)
    accelerator = prepare.build_accelerator(options.compute, find_unused=prepare.adapters_may_rest(options))
    base = open_base_model(
        options.base.path,
        vae_path=options.base.vae,
        v2=options.base.v2,
        v_parameterization=options.base.v_parameterization,
    )
    family, prediction_type = base.family, base.prediction_type or "epsilon"
    options.loss.check_prediction_type(prediction_type)  # type: ignore[arg-type]
    prepare.check_rates(options, len(family.text_encoder_prefixes))
    factor = family.latent_factor
    dataset = scan_dataset(options.dataset, latent_factor=factor, size_multiple=factor * DENOISER_FACTOR)
    return PlannedRun(
        options=options,
        accelerator=accelerator,
        base=base,
        prediction_type=prediction_type,
        dataset=dataset,
        length=run_length(options.length, dataset.batches_per_epoch(accelerator.num_processes)),
        seed=_common_seed(options, accelerator),
        started_at=time.time(),
    )


def _common_seed(options: TrainingOptions, accelerator: Accelerator) -> int:
    """The seed of all processes; drawn by the first where the user gave none."""
    if options.length.seed is not None:
        return options.length.seed
    from accelerate.utils import broadcast_object_list

    drawn = [random.SystemRandom().getrandbits(32)]
    return broadcast_object_list(drawn)[0] if accelerator.num_processes > 1 else drawn[0]


def skeleton_network(run: PlannedRun) -> Any:
    """The network on modules without weights: its arguments are checked, and its size is known, before anything is loaded."""
    meta = torch.device("meta")
    encoders = run.base.load_text_encoders(dtype=torch.float32, device=meta)
    unet = run.base.load_denoiser(dtype=torch.float32, device=meta)
    network = attached_network(run, encoders, unet, device=meta)
    prepare.optimizer_groups(network, run.options)
    return network


def attached_network(run: PlannedRun, encoders: list[nn.Module], unet: nn.Module, *, device: torch.device) -> Any:
    """The adapter network, on the layers it belongs to."""
    options = run.options.network
    with device:
        network: Any = prepare.create_network(options, encoders, unet, seed=run.seed)
    encoder = encoders[0] if len(encoders) == 1 else encoders
    network.apply_to(encoder, unet, options.train_text_encoder, options.train_unet)
    return network


def plan_facts(run: PlannedRun, network: Any) -> PlanFacts:
    """What the plan tells beside the options."""
    from library.dataset.report import report_lines

    return PlanFacts(
        base_model=f"{run.base.name} ({run.base.family.title}), {run.base.path}",
        prediction={"epsilon": "the noise", "v_prediction": "the velocity"}[run.prediction_type],
        seed=run.seed,
        length=run.length,
        processes=run.accelerator.num_processes,
        batch_sizes=[settings.batch_size for settings in run.dataset.settings],
        dataset_lines=report_lines(run.dataset),
        network_lines=prepare.network_lines(network, run.options.network),
        rates=prepare.part_rates(run.options.optimizer, run.options.network),
        optimizer=run.options.optimizer.type,
        device=str(run.accelerator.device),
    )
