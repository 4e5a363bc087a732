"""Loading what pictures are made with: the base model's parts, the adapters on them, the attention they compute with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from library.checkpoints.base_model import BaseModelFiles
from library.devices import best_device, compute_dtype, use_xformers
from library.errors import UserError
from library.generation.options import GenerationOptions
from library.generation.pipeline import Pipeline, PipelineModels
from networks.building.network import AdapterNetwork, merge_for_good
from networks.building.third_party import ThirdPartyModule, require_all_loaded
from networks.registry import load_network_module


def load_pipeline(options: GenerationOptions, base_model: BaseModelFiles) -> Pipeline:
    """Load the models, put the adapters on them, and make the pipeline.

    The VAE is loaded in fp32: in fp16 it overflows for some pictures, and it runs once per picture only.
    """
    device = best_device()
    dtype = compute_dtype(options.model.precision, device, where=f"--{options.model.precision}")
    denoiser: Any = base_model.load_denoiser(dtype=dtype, device=device)
    vae: Any = base_model.load_vae(dtype=torch.float32, device=device)
    models = PipelineModels(
        denoiser=denoiser,
        vae=vae,
        text_encoders=base_model.load_text_encoders(dtype=dtype, device=device),
        tokenizers=base_model.load_tokenizers(),
        latent_scale=base_model.family.latent_scale,
        latent_channels=base_model.family.latent_channels,
        prediction_type=base_model.resolved_prediction_type,
        zero_terminal_snr=options.model.zero_terminal_snr,
    )
    networks = attach_networks(options, models)
    if options.model.xformers:
        note = use_xformers(models.denoiser, device)
        if note:
            print(note)
    return Pipeline(replace(models, others=networks), max_chunks=options.model.max_chunks, note=print)


def attach_networks(options: GenerationOptions, models: PipelineModels) -> list[Any]:
    """Every adapter on the models or, with --network_merge, in their weights; returns those that are attached."""
    networks = []
    to_merge: list[AdapterNetwork] = []
    merges_of_others: list[Callable[[], object]] = []
    for use in options.networks:
        module: Any = load_network_module(use.module)
        if options.merge_networks and isinstance(module, ThirdPartyModule):
            module.check_merging(f"--network_weights {use.file}")
        network, weights = module.create_network_from_weights(
            use.strength, str(use.file), models.vae, models.text_encoders, models.denoiser, for_inference=True, **use.args
        )
        report = getattr(network, "load_report", None)
        if report is not None:
            print(f"{use.file.name}: {report}")
        parameter = next(models.denoiser.parameters())
        if options.merge_networks:
            if not getattr(network, "is_mergeable", lambda: False)():
                raise UserError("cannot be merged into the model", where=str(use.file), remedy="leave out --network_merge")
            if isinstance(network, AdapterNetwork):
                to_merge.append(network)
                continue
            merge = partial(network.merge_to, models.text_encoders, models.denoiser, weights)
            merges_of_others.append(partial(merge, parameter.dtype, parameter.device))
            continue
        network.apply_to(models.text_encoders, models.denoiser, True, True)
        require_all_loaded(network.load_state_dict(weights, strict=False), f"--network_weights {use.file}")
        networks.append(network.to(parameter.device, parameter.dtype).eval().requires_grad_(False))
    merge_for_good(to_merge)  # first, since changes of these may depend on the base weights
    for merge_other in merges_of_others:
        merge_other()
    return networks
