"""Loading what pictures are made with: the base model's parts, the adapters on them, the attention they compute with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.base_model import BaseModelFiles
from library.conditioning.embeddings import add_embeddings, read_bundled_embeddings, read_embedding
from library.devices import best_device, compute_dtype, use_xformers
from library.errors import UserError
from library.generation.adapters import AdapterKey, AdapterRack
from library.generation.checking import open_refiner
from library.generation.compiling import CompiledDenoiser
from library.generation.controls import ControlNets, open_control_nets
from library.generation.options import AdapterOptions, ControlOptions, GenerationOptions, ModelOptions, NetworkUse
from library.generation.pipeline import Pipeline, PipelineModels, PipelineSettings
from library.prompts.lora_tags import LoraTag
from networks import lora
from networks.building.network import AdapterNetwork, merge_for_good
from networks.building.targets import family_of_models
from networks.building.third_party import ThirdPartyModule, require_all_loaded
from networks.formats.files import AdapterFile, read_adapter
from networks.formats.keys import by_layer
from networks.registry import load_network_module
from networks.tools.rank_cutting import cut_layer


def load_pipeline(options: GenerationOptions, base_model: BaseModelFiles, find: Callable[[LoraTag], Path]) -> Pipeline:
    """Load the models, put the adapters on them, and make the pipeline.

    Args:
        find: the file that a tag names.
    """
    models = load_models(options.model, base_model)
    control = _load_control(options.control, base_model, models)  # before adapters change what it may be a difference to
    rack = load_rack(options.adapters, models, find)
    batch_size = options.pictures.batch_size
    decoded = options.model.vae_batch_size
    settings = PipelineSettings(
        max_chunks=options.model.max_chunks,
        vae_batch_size=max(1, int(decoded if decoded >= 1 else batch_size * decoded)),
        offload=options.model.offload,
    )
    compiled = CompiledDenoiser(models.denoiser, note=print) if options.model.compile else None
    refiner = _load_refiner(options.model, base_model, models)
    return Pipeline(models, settings, rack=rack, control=control, compiled=compiled, refiner=refiner, note=print)


def load_models(options: ModelOptions, base_model: BaseModelFiles) -> PipelineModels:
    """The base model's parts.

    The VAE is loaded in fp32: in fp16 it overflows for some pictures, and it runs once per picture only.
    """
    device = best_device()
    dtype = compute_dtype(options.precision, device, where=f"--{options.precision}")
    denoiser: Any = base_model.load_denoiser(dtype=dtype, device=device)
    if options.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    aside = "cpu" if options.offload else device
    vae: Any = base_model.load_vae(dtype=torch.float32, device=aside)
    if options.vae_tiling:
        vae.enable_tiling()
    if options.xformers and (note := use_xformers(denoiser, device)):
        print(note)
    text_encoders: list[Any] = [*base_model.load_text_encoders(dtype=dtype, device=aside)]
    tokenizers = base_model.load_tokenizers()
    embeddings = [read_embedding(file) for file in options.embeddings]
    models = PipelineModels(
        family=base_model.family,
        denoiser=denoiser,
        vae=vae,
        text_encoders=text_encoders,
        tokenizers=tokenizers,
        prediction_type=base_model.resolved_prediction_type,
        zero_terminal_snr=options.zero_terminal_snr,
    )
    for note in add_embeddings(models.texts, embeddings):
        print(note)
    return models


def _load_refiner(options: ModelOptions, base_model: BaseModelFiles, models: PipelineModels) -> PipelineModels | None:
    """The refiner's U-Net and text encoder, beside the base model's VAE."""
    refiner = open_refiner(options, base_model)
    if refiner is None:
        return None
    parameter = next(models.denoiser.parameters())
    aside = next(models.text_encoders[0].parameters()).device
    denoiser: Any = refiner.load_denoiser(dtype=parameter.dtype, device=parameter.device)
    return replace(
        models,
        family=refiner.family,
        denoiser=denoiser,
        text_encoders=refiner.load_text_encoders(dtype=parameter.dtype, device=aside),
        tokenizers=refiner.load_tokenizers(),
    )


def _load_control(options: ControlOptions, base_model: BaseModelFiles, models: PipelineModels) -> ControlNets | None:
    if not options.uses:
        return None
    parameter = next(models.denoiser.parameters())
    files = open_control_nets(options.uses, base_model)
    return ControlNets.load(options.uses, files, models.denoiser, dtype=parameter.dtype, device=parameter.device)


def learn_bundled(models: PipelineModels, files: Sequence[Path]) -> list[str]:
    """Teach the text encoders the words of textual inversion in adapter files; returns notes for the user.

    Raises:
        UserError: see `add_embeddings`.
    """
    embeddings = [embedding for file in files for embedding in read_bundled_embeddings(file)]
    return add_embeddings(models.texts, embeddings) if embeddings else []


def load_rack(options: AdapterOptions, models: PipelineModels, find: Callable[[LoraTag], Path] | None = None) -> AdapterRack:
    """The adapters of the command line, loaded, and the way to those that tags name.

    The first `merged` of them go into the models' weights for good.
    """
    parameter = next(models.denoiser.parameters())
    given = [(AdapterKey(use.file, given=number), use) for number, use in enumerate(options.networks)]
    rack = AdapterRack(
        given=[(key, use.strength) for key, use in given[options.merged :]],
        find=find,
        load=partial(_of_tag, models=models),
        device=parameter.device,
        merges=options.merge_for_batches,
    )
    _merge([use for _, use in given[: options.merged]], models)
    for key, use in given[options.merged :]:
        network, weights = _of_command(use, models)
        if not isinstance(network, AdapterNetwork):
            network.apply_to(models.text_encoders, models.denoiser, True, True)
            require_all_loaded(network.load_state_dict(weights, strict=False), f"--network_weights {use.file}")
        rack.add(key, _placed(network, parameter))
    return rack


def _placed(network: Any, parameter: Tensor) -> Any:
    return network.to(parameter.device, parameter.dtype).eval().requires_grad_(False)


def _of_command(use: NetworkUse, models: PipelineModels) -> tuple[Any, Any]:
    """A network and its tensors, not attached."""
    module: Any = load_network_module(use.module)
    network, weights = module.create_network_from_weights(
        use.strength, str(use.file), models.vae, models.text_encoders, models.denoiser, for_inference=True, **use.args
    )
    _tell(use.file, network)
    return network, weights


def _tell(file: Path, network: Any) -> None:
    report = getattr(network, "load_report", None)
    if report is not None:
        print(f"{file.name}: {report}")


def _merge(uses: Sequence[NetworkUse], models: PipelineModels) -> None:
    """Add adapters to the weights for good.

    Raises:
        UserError: one that cannot be merged.
    """
    parameter = next(models.denoiser.parameters())
    ours: list[AdapterNetwork] = []
    merges_of_others: list[Callable[[], object]] = []
    for use in uses:
        module: Any = load_network_module(use.module)
        if isinstance(module, ThirdPartyModule):
            module.check_merging(f"--network_weights {use.file}")
        network, weights = _of_command(use, models)
        if not getattr(network, "is_mergeable", lambda: False)():
            raise UserError("cannot be merged into the model", where=str(use.file), remedy="leave out --network_merge")
        if isinstance(network, AdapterNetwork):
            ours.append(network)
            continue
        merge = partial(network.merge_to, models.text_encoders, models.denoiser, weights)
        merges_of_others.append(partial(merge, parameter.dtype, parameter.device))
    merge_for_good(ours)  # first, since changes of these may depend on the base weights
    for merge_other in merges_of_others:
        merge_other()


def _of_tag(key: AdapterKey, *, models: PipelineModels) -> AdapterNetwork:
    """The network of a file that a tag names."""
    family = family_of_models(models.text_encoders, models.denoiser)
    cut = None if key.rank is None else at_rank(read_adapter(key.file, family), key.rank)
    network, _ = lora.create_network_from_weights(
        1.0, key.file, None, models.text_encoders, models.denoiser, weights_sd=cut, for_inference=True
    )
    _tell(key.file, network)
    placed: AdapterNetwork = _placed(network, next(models.denoiser.parameters()))
    return placed


def at_rank(file: AdapterFile, rank: int) -> dict[str, Tensor]:
    """The tensors of a LoRA file at a lower rank.

    A DyLoRA file gives that rank as it was trained. Of others, the first directions are kept as they are, as web UIs do.

    Raises:
        UserError: it has layers of another algorithm.
    """
    trained = file.metadata.get("ss_network_module") == "networks.dylora"
    tensors: dict[str, Tensor] = {}
    for name, layer in by_layer(file.tensors).items():
        if "lora_down.weight" not in layer or "lora_mid.weight" in layer:
            what = f"{name} cannot be cut to a rank: it is no plain LoRA"
            raise UserError(what, where=file.where, remedy="take the rank out")
        own, cut = len(layer["lora_down.weight"]), cut_layer(layer, rank)
        if rank < own and not trained:
            alpha = float(layer.get("alpha", torch.zeros(()))) or float(own)
            cut["alpha"] = torch.tensor(alpha * rank / own)
        tensors |= {f"{name}.{key}": value for key, value in cut.items()}
    return tensors
