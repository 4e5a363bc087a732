"""From options to a checked and planned run; nothing but headers is read."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.checkpoints.base_model import BaseModelFiles, open_base_model
from library.checkpoints.parts import UNET
from library.dataset.dataset import Dataset, scan_dataset
from library.devices import dtype_of
from library.errors import UserError, attempt, raise_all
from library.families.family import PredictionType
from library.quiet import quiet_libraries
from library.training import preparation as prepare
from library.training.caption_lengths import cut_caption_notes
from library.training.options import TrainingOptions
from library.training.plan import PlanFacts, RunLength, run_length
from networks.building.third_party import ThirdPartyModule
from networks.registry import load_network_module

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from library.generation.prompt_options import PromptLine
    from library.generation.requests import ImageRequest


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run that is checked and planned, and has loaded nothing yet."""

    options: TrainingOptions
    accelerator: Accelerator
    base: BaseModelFiles
    prediction_type: PredictionType
    dataset: Dataset
    length: RunLength
    seed: int
    started_at: float
    preview_requests: Sequence[ImageRequest] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model's weights and arithmetic."""
        return dtype_of(self.options.compute.mixed_precision)

    @property
    def bytes_of_a_condition(self) -> int:
        """What the context of one caption takes."""
        width: int = self.base.parts[UNET].config["cross_attention_dim"]
        return (self.options.captions.max_token_length + 2) * width * self.dtype.itemsize

    def without(self, bad_images: Mapping[Path, str]) -> PlannedRun:
        """The run without images that cannot be read; its length follows."""
        dataset = self.dataset.without(bad_images.items())
        batches = dataset.batches_per_epoch(self.accelerator.num_processes)
        length = run_length(self.options.length, batches)
        self.say(f"{len(bad_images)} images are left out: {length.steps} steps, {length.steps_per_epoch} in an epoch")
        return replace(self, dataset=dataset, length=length)

    def say(self, text: str) -> None:
        """Print on the first process only."""
        if self.accelerator.is_main_process:
            print(text, flush=True)


def plan_run(options: TrainingOptions) -> PlannedRun:
    """Check everything that can be checked without loading a model.

    Raises:
        UserError: what is wrong with names, precision, base model, dataset and preview prompts, all at once.
    """
    quiet_libraries()
    problems: list[UserError] = []
    attempt(lambda: prepare.check_names(options), problems)
    base = attempt(lambda: _open_base_model(options), problems)
    if base:
        problems += _unsuited(options, base)
    find_unused = prepare.adapters_may_rest(options, base.family.text_encoders if base else ())
    accelerator = attempt(lambda: prepare.build_accelerator(options.compute, find_unused=find_unused), problems)
    dataset = attempt(lambda: _scan_dataset(options, base), problems)
    preview_lines = attempt(lambda: _preview_lines(options), problems) or []
    raise_all(problems)
    assert accelerator is not None  # for the type checker: what is None here was a problem
    assert base is not None
    assert dataset is not None
    seed = _common_seed(options, accelerator)
    return PlannedRun(
        options=options,
        accelerator=accelerator,
        base=base,
        prediction_type=base.resolved_prediction_type,
        dataset=dataset,
        length=run_length(options.length, dataset.batches_per_epoch(accelerator.num_processes)),
        seed=seed,
        started_at=time.time(),
        preview_requests=_preview_requests(options, preview_lines, base.own_side, seed),
    )


def _open_base_model(options: TrainingOptions) -> BaseModelFiles:
    given = options.base
    return open_base_model(
        given.path, vae_path=given.vae, v2=given.v2, v_parameterization=given.v_parameterization, family=given.family
    )


def _unsuited(options: TrainingOptions, base: BaseModelFiles) -> list[UserError]:
    """What options ask of a base model that it cannot do."""
    problems: list[UserError] = []
    attempt(lambda: options.loss.check_prediction_type(base.resolved_prediction_type), problems)
    attempt(lambda: base.check_clip_skip(options.captions.clip_skip), problems)
    attempt(lambda: prepare.check_rates(options, base.family.text_encoders), problems)
    return problems


def _scan_dataset(options: TrainingOptions, base: BaseModelFiles | None) -> Dataset:
    """The dataset; without a base model for one that takes all sizes, so that its own mistakes are found with the others."""
    if base is None:
        return scan_dataset(options.dataset, size_multiple=1)
    family = base.family
    return scan_dataset(options.dataset, latent_factor=family.latent_factor, size_multiple=family.size_multiple)


def _preview_lines(options: TrainingOptions) -> list[PromptLine]:
    if options.previews.prompts is None:
        return []
    from library.generation.prompt_options import read_preview_prompts

    return read_preview_prompts(options.previews.prompts)


def _preview_requests(options: TrainingOptions, lines: Sequence[PromptLine], side: int, seed: int) -> list[ImageRequest]:
    """The pictures of --sample_prompts; steps and scale as sd-scripts has them by default, the size the model's."""
    from library.generation.planning import preview_requests

    defaults = {
        **{"width": side, "height": side, "steps": 30, "scale": 7.5},
        **{"sampler": options.previews.sampler, "clip_skip": options.captions.clip_skip},
    }
    return preview_requests(lines, defaults, seed=seed)


def _common_seed(options: TrainingOptions, accelerator: Accelerator) -> int:
    """The seed of all processes; drawn by the first where the user gave none."""
    if options.length.seed is not None:
        return options.length.seed
    from accelerate.utils import broadcast_object_list

    drawn = [random.SystemRandom().getrandbits(32)]
    return broadcast_object_list(drawn)[0] if accelerator.num_processes > 1 else drawn[0]


def skeleton_network(run: PlannedRun) -> Any:
    """The network on a base without weights: arguments are checked and sizes known before anything is loaded."""
    encoders, (unet,) = for_adapters(run, run.base.empty_text_encoders()), for_adapters(run, [run.base.empty_denoiser()])
    network = attached_network(run, encoders, unet)
    prepare.rehearse(network, run.options, run.length.steps)
    return network


def for_adapters(run: PlannedRun, empty: Sequence[Any]) -> Sequence[Any]:
    """Models on the meta device; in memory for modules of other packages, which may look at weights."""
    if isinstance(load_network_module(run.options.network.module), ThirdPartyModule):
        for model in empty:
            model.to_empty(device="cpu")
    return empty


def attached_network(run: PlannedRun, encoders: Sequence[nn.Module], unet: nn.Module) -> Any:
    """The adapter network, on the layers it belongs to."""
    options = run.options.network
    network: Any = prepare.create_network(options, encoders, unet, seed=run.seed)
    encoder = encoders[0] if len(encoders) == 1 else list(encoders)
    network.apply_to(encoder, unet, options.train_text_encoder, options.train_unet)
    return network


def plan_facts(run: PlannedRun, network: Any) -> PlanFacts:
    """What the plan tells beside the options."""
    from library.dataset.report import report_lines

    own_rate = prepare.chooses_rate(run.options.optimizer)
    return PlanFacts(
        base_model=f"{run.base.name} ({run.base.family.title}), {run.base.path}",
        base_notes=[*run.base.notes(), *prepare.layer_notes(run.options.captions, run.base.family)],
        prediction={"epsilon": "the noise", "v_prediction": "the velocity"}[run.prediction_type],
        seed=run.seed,
        length=run.length,
        processes=run.accelerator.num_processes,
        batch_sizes=[settings.batch_size for settings in run.dataset.settings],
        dataset_lines=[
            *report_lines(
                run.dataset,
                processes=run.accelerator.num_processes,
                epochs=run.length.epochs,
                cut_short=run.length.epoch_ended_by(run.length.steps) is None,
            ),
            *cut_caption_notes(run.dataset, run.base.load_tokenizers(), run.options.captions),
        ],
        network_lines=prepare.network_lines(network, run.options.network, own_rate=own_rate),
        rates=prepare.part_rates(run.options.optimizer, run.options.network, run.base.family.text_encoders),
        own_rate=own_rate,
        optimizer=prepare.optimizer_title(run.options.optimizer, run.accelerator.device.type),
        device=str(run.accelerator.device),
    )
