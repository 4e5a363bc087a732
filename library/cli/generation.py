"""From the options of gen_img_diffusers.py to `GenerationOptions`: the Namespace dies here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from library.cli.generation_options import GENERATION_OPTIONS
from library.cli.generation_rules import problems_of, varies_networks
from library.cli.options import ParsedOptions, parse
from library.errors import UserError, attempt, counted, raise_all
from library.generation.controls import ControlUse, control_uses
from library.generation.grid_axes import Axis, read_axes
from library.generation.options import (
    AdapterOptions,
    ControlOptions,
    GenerationOptions,
    ModelOptions,
    NetworkUse,
    OutputOptions,
    PictureOptions,
    Precision,
)
from library.generation.requests import SECOND_TEXTS, SIZES
from networks.registry import resolve_network_module

DESCRIPTION = "Draw pictures with Stable Diffusion 1.x, 2.x and XL and adapters."


def parse_generation(
    argv: Sequence[str], program: str = "gen_img_diffusers", family: str | None = None
) -> GenerationOptions | Path:
    """The run that a command line of gen_img_diffusers.py describes, or the folder whose adapters it wants listed.

    Args:
        program: the script's name, for sentences.
        family: name of the only family that will do; None for any.

    Raises:
        UserError: every problem that the command line alone shows, at once.
    """
    parsed = parse(argv, GENERATION_OPTIONS, description=DESCRIPTION)
    if parsed["list_loras"]:
        if not parsed["lora_dir"]:
            raise UserError("lists a folder", where="--list_loras", remedy="name it with --lora_dir")
        return Path(parsed["lora_dir"])
    problems = problems_of(parsed)
    adapters = _adapters(parsed, problems)
    uses = attempt(lambda: _control_uses(parsed), problems)
    axes = attempt(lambda: read_axes(parsed["grid"]), problems) if parsed.given("grid") else ()
    raise_all(problems)
    return GenerationOptions(
        program=program,
        model=replace(_model(parsed), family=family),
        pictures=_pictures(parsed, axes or ()),
        output=OutputOptions(
            folder=Path(parsed["outdir"]),
            sequential_names=parsed["sequential_file_name"],
            original_names=parsed["use_original_file_name"],
            save_first_stage=parsed["highres_fix_save_1st"],
        ),
        adapters=adapters,
        control=ControlOptions(uses=uses or (), hints=tuple(map(Path, parsed["guide_image_path"] or ()))),
    )


def _control_uses(parsed: ParsedOptions) -> tuple[ControlUse, ...]:
    models, others = parsed["control_net_models"] or (), ("guide_image_path", "control_net_preps", "control_net_weights")
    given = [f"--{name}" for name in (*others, "control_net_ratios") if parsed[name]]
    if given and not models:
        remedy = "name it with --control_net_models"
        raise UserError("there is no ControlNet that this could act on", where=" ".join(given), remedy=remedy)
    if models and not parsed["guide_image_path"]:
        raise UserError("there is no hint image", where="--control_net_models", remedy="give it with --guide_image_path")
    return control_uses(
        models,
        preparations=parsed["control_net_preps"] or (),
        multipliers=parsed["control_net_weights"] or (),
        ratios=parsed["control_net_ratios"] or (),
    )


def _model(parsed: ParsedOptions) -> ModelOptions:
    return ModelOptions(
        path=parsed["ckpt"] or "",
        vae=parsed["vae"],
        refiner=parsed["refiner"],
        v2=parsed["v2"] or None,
        v_parameterization=parsed["v_parameterization"] or None,
        zero_terminal_snr=parsed["zero_terminal_snr"],
        precision=_precision(parsed),
        xformers=parsed["xformers"] or parsed["diffusers_xformers"],
        channels_last=parsed["opt_channels_last"],
        compile=parsed["torch_compile"],
        max_chunks=parsed["max_embeddings_multiples"] or 3,
        embeddings=tuple(map(Path, parsed["textual_inversion_embeddings"] or ())),
        vae_batch_size=parsed["vae_batch_size"] or 1,
        vae_tiling=parsed["vae_slices"] is not None,
        offload=parsed["offload"],
    )


# Option -> field of every request that it sets.
_SETTINGS: dict[str, str] = {
    "W": "width",
    "H": "height",
    "steps": "steps",
    "scale": "scale",
    "negative_scale": "negative_scale",
    "guidance_rescale": "guidance_rescale",
    "sampler": "sampler",
    "clip_skip": "clip_skip",
    "refiner_start": "refiner_start",
    **{name: name for name in (*SECOND_TEXTS, *SIZES)},
    "strength": "strength",
    "highres_fix_scale": "highres_scale",
    "highres_fix_steps": "highres_steps",
    "highres_fix_strength": "highres_strength",
    "highres_fix_latents_upscaling": "highres_latents",
    "highres_fix_disable_control_net": "highres_uncontrolled",
    "network_regional_mask_max_color_codes": "region_colors",
    "ds_depth_1": "shrink_depth_1",
    "ds_timesteps_1": "shrink_until_1",
    "ds_depth_2": "shrink_depth_2",
    "ds_timesteps_2": "shrink_until_2",
    "ds_ratio": "shrink_ratio",
    "gradual_latent_timesteps": "growth_below",
    "gradual_latent_ratio": "growth_ratio",
    "gradual_latent_ratio_step": "growth_step",
    "gradual_latent_every_n_steps": "growth_every",
}


def _pictures(parsed: ParsedOptions, axes: tuple[Axis, ...]) -> PictureOptions:
    def path(name: str) -> Path | None:
        return None if parsed[name] is None else Path(parsed[name])

    settings = {field: parsed[name] for name, field in _SETTINGS.items() if parsed[name] is not None}
    given = frozenset(field for name, field in _SETTINGS.items() if parsed.given(name))
    if parsed["network_mul"] and varies_networks(parsed):
        settings, given = {**settings, "network_strengths": parsed["network_mul"]}, given | {"network_strengths"}
    return PictureOptions(
        prompt=parsed["prompt"],
        prompt_file=path("from_file"),
        recipes=tuple(map(Path, parsed["from_png"] or ())),
        interactive=parsed["interactive"],
        settings=settings,
        given=given,
        seed=parsed["seed"],
        images=path("image_path"),
        masks=path("mask_path"),
        images_per_prompt=parsed["images_per_prompt"],
        iterations=parsed["n_iter"],
        batch_size=parsed["batch_size"],
        same_seed=parsed["iter_same_seed"],
        shuffled=parsed["shuffle_prompts"],
        wildcards=path("wildcards_dir"),
        compare_base=parsed["compare_base"],
        axes=axes,
    )


def _precision(parsed: ParsedOptions) -> Precision:
    return "fp16" if parsed["fp16"] else "bf16" if parsed["bf16"] else "fp32"


def _adapters(parsed: ParsedOptions, problems: list[UserError]) -> AdapterOptions:
    networks = _networks(parsed, problems)
    merged = len(networks) if parsed["network_merge"] else parsed["network_merge_n_models"] or 0
    if merged > len(parsed["network_weights"] or ()) > 0:
        given = counted(len(networks), "adapter")
        where = parsed.where("network_merge_n_models")
        problems.append(UserError(f"only {given} to merge", where=where, remedy="give a lower number"))
    return AdapterOptions(
        networks=networks,
        merged=merged,
        merge_for_batches=parsed["network_pre_calc"] or parsed["torch_compile"],
        folder=None if parsed["lora_dir"] is None else Path(parsed["lora_dir"]),
        tag_style=parsed["lora_tag_style"],
        trigger_words=parsed["apply_trigger_words"],
        show_metadata=parsed["network_show_meta"],
    )


def _networks(parsed: ParsedOptions, problems: list[UserError]) -> tuple[NetworkUse, ...]:
    """The adapters; what is wrong with them is added to `problems`."""
    files = parsed["network_weights"] or ()
    modules = parsed["network_module"] or ("networks.lora",)
    strengths, settings = parsed["network_mul"] or (), parsed["network_args"] or ()
    modules = modules * len(files) if len(modules) == 1 else modules
    for name, given in (("network_module", modules), ("network_mul", strengths), ("network_args", settings)):
        if len(given) > len(files) and files:
            problems.append(
                UserError(
                    f"{len(given)} for {len(files)} adapters", where=parsed.where(name), remedy="give one for each adapter"
                )
            )
    if len(modules) < len(files):
        problems.append(
            UserError(
                f"{len(modules)} for {len(files)} adapters",
                where=parsed.where("network_module"),
                remedy="give one for each adapter, or one for all",
            )
        )
    uses = []
    for number, (file, module) in enumerate(zip(files, modules, strict=False)):
        args = _network_args(settings[number], problems) if number < len(settings) else {}
        try:
            resolved = resolve_network_module(module)
        except UserError as error:
            problems.append(error)
            continue
        strength = strengths[number] if number < len(strengths) else 1.0
        uses.append(NetworkUse(file=Path(file), strength=strength, module=resolved, args=args))
    return tuple(uses)


def _network_args(text: str, problems: list[UserError]) -> dict[str, str]:
    pairs = [item.strip().partition("=") for item in text.split(";") if item.strip()]
    problems += [
        UserError(f"{key!r} has no value", where=f"--network_args {text}", remedy="write key=value")
        for key, equals, _ in pairs
        if not equals
    ]
    return {key.strip(): value.strip() for key, _, value in pairs}
