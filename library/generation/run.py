"""One run of gen_img_diffusers.py: everything is checked, then models are loaded, then pictures are drawn and saved."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError, attempt, raise_all
from library.generation.options import GenerationOptions, ModelOptions
from library.generation.output import DrawingProgress, sequential_names, timed_names
from library.generation.planning import SEEDS, ImageDefaults, image_requests, repetition_notes, rounding_notes
from library.generation.png_info import write_png
from library.generation.prompt_options import PromptLine, parse_prompt_line, read_prompt_file
from library.quiet import quiet_libraries

if TYPE_CHECKING:
    from library.checkpoints.base_model import BaseModelFiles
    from library.generation.pipeline import Pipeline
    from library.generation.requests import ImageRequest


def run_generation(options: GenerationOptions) -> int:
    """Draw what the options say; returns the exit status.

    Raises:
        UserError: everything that can be found out before models are loaded, at once.
    """
    quiet_libraries()
    started = time.perf_counter()
    base_model, lines = _checked(options)
    defaults = _defaults(options, base_model.family.default_resolution[base_model.resolved_prediction_type])
    pictures = options.pictures
    repeats = repetition_notes(lines, images_per_prompt=pictures.images_per_prompt, iterations=pictures.iterations)
    for note in base_model.notes() + rounding_notes(lines, defaults) + repeats:
        print(note)
    seed = random.SystemRandom().randrange(SEEDS) if pictures.seed is None else pictures.seed
    requests = image_requests(
        lines, defaults, seed=seed, images_per_prompt=pictures.images_per_prompt, iterations=pictures.iterations
    )
    from library.generation.loading import load_pipeline

    pipeline = load_pipeline(options, base_model)
    count = _draw(pipeline, requests, options, _made_with(options, base_model))
    seconds = time.perf_counter() - started
    print(f"{count} picture{'s' * (count != 1)} in {options.output_folder} ({seconds:.1f} s)")
    return 0


def _checked(options: GenerationOptions) -> tuple[BaseModelFiles, list[PromptLine]]:
    """The base model's headers and the prompts, or every problem of the run."""
    problems: list[UserError] = []
    lines = attempt(lambda: _prompt_lines(options), problems)
    attempt(lambda: _check_output_folder(options.output_folder), problems)
    for network in options.networks:
        if not network.file.is_file():
            problems.append(UserError("no such file", where=f"--network_weights {network.file}"))
    attempt(lambda: _check_precision(options.model), problems)
    base_model = attempt(lambda: _open_base_model(options.model), problems)
    if base_model is not None:
        attempt(lambda: base_model.check_clip_skip(options.pictures.clip_skip), problems)
        for network in options.networks:
            if network.file.is_file():
                attempt(lambda file=network.file: _check_family(file, base_model), problems)  # type: ignore[misc]
    raise_all(problems)
    assert base_model is not None  # for the type checker: without one there was a problem
    assert lines is not None
    return base_model, lines


def _prompt_lines(options: GenerationOptions) -> list[PromptLine]:
    pictures = options.pictures
    if pictures.prompt_file is not None:
        return read_prompt_file(pictures.prompt_file, where=f"--from_file {pictures.prompt_file}")
    return [parse_prompt_line(pictures.prompt or "", where="--prompt")]


def _check_output_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made ({error.strerror})", where=f"--outdir {folder}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError("cannot be written to", where=f"--outdir {folder}", remedy="name another folder")


def _check_precision(model: ModelOptions) -> None:
    from library.devices import best_device, compute_dtype

    compute_dtype(model.precision, best_device(), where=f"--{model.precision}")


def _defaults(options: GenerationOptions, resolution: int) -> ImageDefaults:
    pictures = options.pictures
    return ImageDefaults(
        width=pictures.width or resolution,
        height=pictures.height or resolution,
        steps=pictures.steps,
        scale=pictures.scale,
        sampler=pictures.sampler,
        clip_skip=pictures.clip_skip,
    )


def _open_base_model(model: ModelOptions) -> BaseModelFiles:
    from library.checkpoints.base_model import open_base_model

    return open_base_model(model.path, vae_path=model.vae, v2=model.v2, v_parameterization=model.v_parameterization)


def _check_family(file: Path, base_model: BaseModelFiles) -> None:
    """Refuse an adapter for another family by its widths, before anything is loaded."""
    from library.checkpoints.tensor_files import open_tensor_file
    from library.families.detect import family_of_adapter

    where = f"--network_weights {file}"
    adapter = open_tensor_file(file)
    # One that says nothing is taken to be for this model; its layers then decide when it is loaded.
    family = family_of_adapter(adapter.shapes(), metadata=adapter.metadata, where=where, default=base_model.family)
    if family.name != base_model.family.name:
        raise UserError(
            f"is an adapter for {family.title}, and the base model is {base_model.family.title}",
            where=where,
            remedy="give the base model it was trained on",
        )


def _made_with(options: GenerationOptions, base_model: BaseModelFiles) -> dict[str, Any]:
    """What a picture's recipe says beside its request."""
    return {
        "model": base_model.name,
        "vae": options.model.vae,
        "networks": [{"name": use.file.stem, "strength": use.strength} for use in options.networks],
        "precision": options.model.precision,
    }


def _draw(
    pipeline: Pipeline, requests: Sequence[ImageRequest], options: GenerationOptions, made_with: dict[str, Any]
) -> int:
    """Draw and save all pictures, each as soon as it is there; returns their number."""
    from library.generation.pipeline import Hooks

    name = sequential_names(options.output_folder) if options.sequential_names else timed_names(options.output_folder)
    progress = DrawingProgress(requests)
    try:
        drawn = pipeline.stream(
            requests, batch_size=options.pictures.batch_size, hooks=Hooks(before_step=progress.before_step)
        )
        for number, image in drawn:
            request = requests[number]
            path = name(number, request.seed)
            write_png(path, image, request, made_with)
            progress.drawn(path)
    finally:
        progress.close()
    return len(requests)
