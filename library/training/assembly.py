"""Loading, one phase at a time, and putting the parts of the loop together.

What only the caches need (the VAE) is loaded, used and freed before the denoiser is loaded.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from library.checkpoints.parts import UNET
from library.conditioning.condition import Condition
from library.conditioning.text_encoders import TextEncoders
from library.dataset.batches import Batch, BatchAddress, TrainingBatches, epoch_addresses, load_batches
from library.dataset.caches import LatentCache, build_latent_cache, encode_posterior
from library.dataset.report import dataset_metadata, sample_counts
from library.devices import dtype_of, use_xformers
from library.diffusion.noise import NoiseOptions, SampleDraws, draw_sample
from library.diffusion.schedule import NoiseSchedule
from library.errors import UserError
from library.training import preparation as prepare
from library.training import text_cache
from library.training.conditions import ConditionsOf, RememberedConditions, encoded
from library.training.lr_schedules import build_schedule
from library.training.metadata import RunFacts, base_model_metadata, model_spec, training_metadata
from library.training.module import FrozenParts, TrainableModule
from library.training.optimizers import is_schedule_free
from library.training.planning import PlannedRun, attached_network, for_adapters
from library.training.previews import draw_previews, previews_due
from library.training.progress import CountBar, Progress
from library.training.saving import RunFiles
from library.training.tracking import Tracker
from library.training.trainer import LoopParts

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Draw:
    """The random numbers of a sample; a class, so that workers can be sent it."""

    options: NoiseOptions
    seed: int

    def __call__(self, epoch: int, sample: int, latent_shape: tuple[int, int, int]) -> SampleDraws:
        return draw_sample(self.options, seed=self.seed, epoch=epoch, sample=sample, latent_shape=latent_shape)


def build_loop(run: PlannedRun, latents: LatentCache | None, conditions: ConditionsOf | None) -> LoopParts:
    """Load the base model, build the network on it, and gather what the loop moves.

    Args:
        latents, conditions: what is known before; None where a step makes them.
    """
    options, accelerator = run.options, run.accelerator
    device = accelerator.device
    texts = _texts_for_the_loop(run, known=conditions is not None)
    encoders = texts.modules
    unet: Any = run.base.load_denoiser(dtype=run.dtype, device=device, weight_format=options.compute.unet_format)
    if options.compute.unet_format is not None:
        run.say(prepare.packing_line(unet, options.compute.unet_format, UNET))
    prepare.freeze(unet, *encoders, checkpointing=options.compute.gradient_checkpointing)
    if options.compute.gradient_checkpointing:
        prepare.enable_checkpointing(unet, encoders)
    note = use_xformers(unet, device) if options.compute.xformers else None
    if note:
        run.say(note)
    network = attached_network(run, encoders, unet)
    prepare.load_start_weights(network, options.network)
    network.to(device=device, dtype=torch.float32)
    built = prepare.build_network_optimizer(network, options)
    module = _trainable_module(run, network, unet, conditions or _conditions_made_by_steps(run, texts))
    prepared, optimizer = accelerator.prepare(module, built.optimizer)
    vae = _vae_for_the_loop(run, latents)
    free = is_schedule_free(options.optimizer.type)
    return LoopParts(
        accelerator=accelerator,
        module=prepared,
        network=network,
        optimizer=optimizer,
        scheduler=None if free else build_schedule(options.schedule, built.optimizer, run.length.steps),
        group_names=list(built.group_names),
        length=run.length,
        batches=_batches(run, latents),
        divisor_of=_divisor(run),
        latents_of=partial(latents_of, vae=vae, chunk=options.dataset.vae_batch_size),
        files=_files(run, network, built.description),
        progress=Progress(
            total_steps=run.length.steps,
            steps_per_epoch=run.length.steps_per_epoch,
            total_epochs=run.length.epochs,
            shown=accelerator.is_main_process,
        ),
        tracker=Tracker(options.logging, active=accelerator.is_main_process),
        seed=run.seed,
        max_grad_norm=options.optimizer.max_grad_norm,
        schedule_free=free,
        scale_weight_norms=options.network.scale_weight_norms,
        previews=_previews(run, module, texts, vae),
    )


def with_latents(run: PlannedRun) -> tuple[PlannedRun, LatentCache | None]:
    """Encode every image once, if that was asked for, with a VAE that is freed afterwards.

    Returns:
        The run, without images that turned out to be unreadable (where the user chose to skip them), and the cache.
    """
    if not run.options.dataset.caches_latents:
        return run, None
    accelerator = run.accelerator
    cache = build_latent_cache(
        run.dataset,
        _load_vae(run),
        run.base.vae_fingerprint(),
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        say=run.say,
        progress=CountBar("caching latents", shown=accelerator.is_main_process),
    )
    bad = list(cache.bad_images.items())
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        bad = gather_object(bad)
    return (run.without(dict(bad)) if bad else run), cache


def with_texts(run: PlannedRun) -> ConditionsOf | None:
    """Encode every caption of the run once, if that was asked for, with text encoders that are freed afterwards.

    Returns:
        The conditions; None where they are not to be known before, or the captions are too many for that.
    """
    options, accelerator = run.options.captions, run.accelerator
    if not options.caches:
        return None
    most = text_cache.MOST_BYTES // run.bytes_of_a_condition
    folders = text_cache.folders_of_captions(_training_batches(run, None).captions(_addresses_of_captions(run)), most=most)
    if folders is None:
        run.say(f"text cache: the run has more than {most} different captions, so the text encoders stay in memory")
        return None
    cache: text_cache.MemoryTexts | text_cache.DiskTexts = text_cache.MemoryTexts()
    captions = list(folders)
    if options.cache_to_disk:
        cache = text_cache.DiskTexts(
            folders=folders,
            texts=_texts(run, []),
            options=options,
            fingerprint=f"{run.base.text_encoders_fingerprint()} {run.dtype}",
            trust=run.options.dataset.skip_cache_check,
        )
        cache.prepare()
        captions = captions[accelerator.process_index :: accelerator.num_processes]
    progress = CountBar("encoding captions", shown=accelerator.is_main_process)
    text_cache.fill(cache, captions, partial(_encoder_for_the_cache, run), progress=progress)
    accelerator.wait_for_everyone()
    return RememberedConditions(text_cache.reader(cache, accelerator.device))


def latents_of(batch: Batch, *, vae: Any, chunk: int) -> tuple[Tensor, Tensor]:
    """Mean and spread of a batch's latents: cached, or encoded now.

    Returns:
        Two tensors (B, C, h, w) fp32 in the VAE's units.
    """
    if batch.latent_mean is not None and batch.latent_std is not None:
        return batch.latent_mean, batch.latent_std
    if batch.pixels is None:
        raise ValueError("a batch has neither latents nor pixels")
    means, spreads = zip(*(encode_posterior(vae, pixels) for pixels in batch.pixels.split(chunk)), strict=True)
    return torch.cat(means), torch.cat(spreads)


def _load_vae(run: PlannedRun) -> Any:
    """The VAE in fp32, in which none of these families overflows."""
    return run.base.load_vae(dtype=torch.float32, device=run.accelerator.device)


def _vae_for_the_loop(run: PlannedRun, latents: LatentCache | None) -> Any:
    """The VAE where a step or a preview needs it."""
    return _load_vae(run) if latents is None or run.options.previews.prompts else None


def _texts(run: PlannedRun, modules: Sequence[nn.Module]) -> TextEncoders:
    return TextEncoders(specs=run.base.family.text_encoders, tokenizers=run.base.load_tokenizers(), modules=modules)


def _texts_for_the_loop(run: PlannedRun, *, known: bool) -> TextEncoders:
    """The text encoders: on the device where steps need them, on the CPU where previews alone do, else their structure."""
    if known and not run.options.previews.prompts:
        return _texts(run, for_adapters(run, run.base.empty_text_encoders()))
    device = "cpu" if known else run.accelerator.device
    # Those on the CPU are no burden to the device, and those that filled the cache were not packed either.
    weight_format = None if known else run.options.compute.text_encoder_format
    modules = run.base.load_text_encoders(dtype=run.dtype, device=device, weight_format=weight_format)
    if weight_format is not None:
        for module, encoder in zip(modules, run.base.family.text_encoders, strict=True):
            run.say(prepare.packing_line(module, weight_format, encoder.part))
    return _texts(run, modules)


def _conditions_made_by_steps(run: PlannedRun, texts: TextEncoders) -> ConditionsOf:
    make = partial(encoded, texts=texts, options=run.options.captions)
    return make if run.options.network.train_text_encoder else RememberedConditions(make)


def _encoder_for_the_cache(run: PlannedRun) -> ConditionsOf:
    """What encodes captions as a step would."""
    texts = _texts(run, run.base.load_text_encoders(dtype=run.dtype, device=run.accelerator.device))

    def encode(captions: Sequence[str]) -> Condition:
        with run.accelerator.autocast():
            return encoded(captions, texts, run.options.captions).to(dtype=run.dtype)

    return encode


def _trainable_module(run: PlannedRun, network: Any, unet: nn.Module, conditions_of: ConditionsOf) -> TrainableModule:
    options = run.options
    schedule = NoiseSchedule.scaled_linear(zero_terminal_snr=options.zero_terminal_snr)
    return TrainableModule(
        network,
        FrozenParts(
            family=run.base.family,
            denoiser=unet,
            conditions_of=conditions_of,
            schedule=schedule.to(run.accelerator.device),
            prediction_type=run.prediction_type,
            dtype=run.dtype,
        ),
        noise=options.noise,
        loss=options.loss,
    )


def _training_batches(run: PlannedRun, latents: LatentCache | None) -> TrainingBatches:
    accelerator = run.accelerator
    return TrainingBatches(
        run.dataset,
        seed=run.seed,
        draw=Draw(run.options.noise, run.seed),
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        latents=latents,
        latent_channels=run.base.family.latent_channels,
        size_conditions=run.base.family.size_conditions,
        max_train_steps=run.length.steps,
    )


def _addresses(run: PlannedRun, epochs: int) -> Iterator[BatchAddress]:
    """Where the micro-batches of the run's first epochs are, in the order of the plan."""
    processes, length = run.accelerator.num_processes, run.length
    for epoch in range(1, epochs + 1):
        for address in epoch_addresses(run.dataset, epoch, processes=processes, accumulation=length.accumulation):
            if address.step < length.steps:
                yield address


def _addresses_of_captions(run: PlannedRun) -> Iterator[BatchAddress]:
    """Those at which every caption of the run is read; one epoch's where no caption changes."""
    varies = any(subset.captions.varies for settings in run.dataset.settings for subset in settings.subsets)
    return _addresses(run, run.length.epochs if varies else 1)


def _batches(run: PlannedRun, latents: LatentCache | None) -> Iterator[Batch]:
    """This process's micro-batches of the whole run."""
    workers = prepare.data_workers(run.options.compute.data_workers)
    addresses = list(_addresses(run, run.length.epochs))
    pinned = run.accelerator.device.type == "cuda"
    return load_batches(_training_batches(run, latents), addresses, workers=workers, pin_memory=pinned)


def _divisor(run: PlannedRun) -> Callable[[int], float]:
    """Samples of an optimizer step over the number of processes; DDP averages what the processes add up."""
    orders: dict[int, list[Any]] = {}

    def divisor(step: int) -> float:
        epoch = run.length.epoch_of(step) + 1
        if epoch not in orders:
            orders.clear()
            orders[epoch] = run.dataset.epoch(epoch, seed=run.seed, processes=run.accelerator.num_processes)
        samples = sum(len(orders[epoch][place].samples) for place in run.length.batches_of(step))
        return samples / run.accelerator.num_processes

    return divisor


def _files(run: PlannedRun, network: Any, optimizer: str) -> RunFiles:
    options = run.options
    accelerator, accumulation = run.accelerator, run.length.accumulation
    train_samples, regularisation_samples = sample_counts(run.dataset)
    rank, alpha = prepare.rank_and_alpha_of_files(network, options.network)
    facts = RunFacts(
        session_id=random.SystemRandom().getrandbits(32),
        started_at=run.started_at,
        seed=run.seed,
        base_model_version=run.base.family.base_model_versions[run.prediction_type],
        is_v2=run.base.family.is_v2,
        base_model=base_model_metadata(run.base.path, run.options.base.vae),
        dataset=dataset_metadata(run.dataset, processes=accelerator.num_processes, accumulation=accumulation),
        optimizer=optimizer,
        network_dim=rank,
        network_alpha=alpha,
        total_steps=run.length.steps,
        total_epochs=run.length.epochs,
        batches_per_epoch=run.length.batches_per_epoch,
        train_samples=train_samples,
        regularisation_samples=regularisation_samples,
    )
    spec = model_spec(options, run.base.family, run.prediction_type, _largest_resolution(run))

    def metadata_at(step: int, epochs: int) -> dict[str, str]:
        return training_metadata(options, facts, step=step, epochs=epochs, finished_at=time.time()) | spec

    precision = options.saving.precision
    return RunFiles(
        options=options.saving,
        network=network,
        metadata_at=metadata_at,
        dtype=dtype_of(precision) if precision else None,
        total_epochs=run.length.epochs,
        family=run.base.family,
    )


def _largest_resolution(run: PlannedRun) -> tuple[int, int]:
    """(width, height) of the dataset trained at the largest size; the one that the file is said to be for."""
    sizes = [settings.buckets.resolution for settings in run.dataset.settings]
    return max(sizes, key=lambda size: size[0] * size[1])


def _previews(
    run: PlannedRun, module: TrainableModule, texts: TextEncoders, vae: Any
) -> Callable[[int, int | None], None] | None:
    """What draws previews after (step, epoch ended), on the first process; None where no prompts are given."""
    options, requests = run.options.previews, run.preview_requests
    if not requests:
        return None
    from library.generation.pipeline import Pipeline, PipelineModels, PipelineSettings

    parts = module.parts
    pipeline = Pipeline(
        PipelineModels(
            family=parts.family,
            denoiser=parts.denoiser,
            vae=vae,
            text_encoders=texts.modules,
            tokenizers=texts.tokenizers,
            prediction_type=parts.prediction_type,
            zero_terminal_snr=run.options.zero_terminal_snr,
            others=[module.network],
        ),
        PipelineSettings(autocast=None if run.dtype == torch.float32 else run.dtype),
        note=run.say,
    )

    def previews(step: int, epoch_ended: int | None) -> None:
        if run.accelerator.is_main_process and previews_due(options, step=step, epoch_ended=epoch_ended):
            _draw_without_ending_the_run(run, pipeline, requests, step, epoch_ended)
        run.accelerator.wait_for_everyone()

    return previews


def _draw_without_ending_the_run(run: PlannedRun, pipeline: Any, requests: Any, step: int, epoch_ended: int | None) -> None:
    """Draw previews; a picture that cannot be drawn costs a sentence and not the run."""
    folder = run.options.saving.output_dir / "sample"
    try:
        paths = draw_previews(
            pipeline,
            requests,
            folder,
            output_name=run.options.saving.output_name,
            step=step,
            epoch_ended=epoch_ended if run.options.previews.every_n_epochs else None,
        )
    except (UserError, RuntimeError, OSError) as error:
        run.say(f"step {step}: previews could not be drawn ({error}); training goes on")
    else:
        run.say(f"step {step}: drew {len(paths)} previews in {folder}")
