"""The options of gen_img_diffusers.py: a table, and the way from it to `GenerationOptions`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.cli.options import FLAG, Option, OptionGroup, ParsedOptions, parse
from library.errors import UserError, attempt, counted, raise_all
from library.generation.controls import ControlUse, control_uses
from library.generation.grid_axes import KINDS, Axis, read_axes
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
from library.generation.requests import MAX_SEED, MAX_STEPS, MIN_SIZE, SECOND_TEXTS, SIZES
from library.generation.samplers import find_sampler
from library.prompts.lora_tags import STYLES
from networks.registry import resolve_network_module

DESCRIPTION = "Draw pictures with Stable Diffusion 1.x, 2.x and XL and adapters."

_MODEL = OptionGroup(
    "Model",
    (
        Option(name="ckpt", help="the base model: a checkpoint file or a diffusers folder"),
        Option(name="vae", help="a VAE to use instead of the model's own"),
        Option(name="refiner", help="SDXL's refiner, which makes the last steps of every picture", extension=True),
        Option(
            name="refiner_start",
            type=float,
            default=0.8,
            help="share of the noise, from the beginning, that the base model takes away before the refiner goes on",
            extension=True,
        ),
        Option(name="v2", type=FLAG, help="the model is a Stable Diffusion 2.x; found out without it, and checked with it"),
        Option(
            name="v_parameterization", type=FLAG, help="the model predicts v; found out where the file says it, and checked"
        ),
        Option(
            name="zero_terminal_snr",
            type=FLAG,
            help="sample as models trained with --zero_terminal_snr need it",
            extension=True,
        ),
        Option(name="clip_skip", type=int, help="which layer of the text encoder, from its end; 1 is the last"),
        Option(
            name="max_embeddings_multiples",
            type=int,
            help="most pieces of 75 tokens of a prompt; as many as it needs, 3 at most, where it is not given",
        ),
    ),
)
_PRECISION = OptionGroup(
    "Precision, speed and memory",
    (
        Option(name="fp16", type=FLAG, help="U-Net and text encoder in fp16; fp32 without this and --bf16"),
        Option(name="bf16", type=FLAG, help="U-Net and text encoder in bfloat16"),
        Option(name="no_half_vae", type=FLAG, help="the VAE in fp32, which it always is here", extension=True),
        Option(name="xformers", type=FLAG, help="attention of xformers, where it is installed; else torch's"),
        Option(name="diffusers_xformers", type=FLAG, help="the same"),
        Option(name="sdpa", type=FLAG, help="torch's own attention, which is used without this too"),
        Option(name="opt_channels_last", type=FLAG, help="keep the U-Net's weights with their channels last"),
        Option(
            name="torch_compile",
            type=FLAG,
            help="compile the U-Net's blocks, which takes a minute at first; adapters go into the weights as with "
            "--network_pre_calc, and where they cannot, pictures are drawn without it",
            extension=True,
        ),
        Option(
            name="vae_batch_size",
            type=float,
            help="pictures that the VAE decodes at the same time, or below 1 a share of the batch; 1 without it",
        ),
        Option(name="vae_slices", type=int, help="let the VAE work on large pictures in pieces, which saves memory"),
        Option(
            name="offload",
            type=FLAG,
            help="keep text encoder and VAE in the machine's memory, and on the GPU only while they compute",
            extension=True,
        ),
    ),
)
_PICTURES = OptionGroup(
    "Pictures",
    (
        Option(name="prompt", help="the prompt; it may hold options: a cat --n blurry --w 768 --h 512 --s 30 --d 1 --l 7"),
        Option(name="from_file", help="a UTF-8 file of prompts, one per line; lines that begin with # are skipped"),
        Option(name="interactive", type=FLAG, help="type prompts, one after the other"),
        Option(name="no_preview", type=FLAG, help="no window with --interactive; there is none here"),
        Option(
            name="wildcards_dir", help="folder of word lists: __name__ in a prompt is a line of name.txt", extension=True
        ),
        Option(name="W", type=int, help="width in pixels, rounded down to a multiple of 8; the model's own without it"),
        Option(name="H", type=int, help="height in pixels, likewise"),
        Option(name="prompt_2", help="what a second text encoder is told instead of the prompt", extension=True),
        Option(name="negative_prompt_2", help="likewise, instead of the negative prompt", extension=True),
        *(
            Option(name=name, type=int, help=f"what SDXL is told of the picture: {what}", extension=True)
            for name, what in (
                ("original_width", "the width that it comes from; its own without this"),
                ("original_height", "the height that it comes from; its own without this"),
                ("original_width_negative", "the same for the negative prompt"),
                ("original_height_negative", "the same for the negative prompt"),
                ("crop_top", "where it was cut out, from the top; 0 without this"),
                ("crop_left", "where it was cut out, from the left; 0 without this"),
            )
        ),
        Option(name="steps", type=int, default=50, help="steps of the sampler"),
        Option(name="scale", type=float, default=7.5, help="guidance towards the prompt; 1 and less is without guidance"),
        Option(
            name="negative_scale", type=float, help="guidance away from the negative prompt, where it differs from --scale"
        ),
        Option(
            name="guidance_rescale",
            type=float,
            default=0.0,
            help="0 to 1: how much strong guidance is kept from making pictures too bright; 0.7 for v-prediction models "
            "trained with zero terminal SNR",
            extension=True,
        ),
        Option(name="sampler", default="ddim", help="the sampler; docs/generate.md lists them"),
        Option(
            name="seed",
            type=int,
            help="the seed of the first picture, from which the others' follow; chance without it, 1 for a grid. Every file "
            "name ends with the seed that draws its picture again",
        ),
        Option(name="iter_same_seed", type=FLAG, help="one seed for all prompts of an iteration"),
        Option(name="shuffle_prompts", type=FLAG, help="prompts in another order in each iteration"),
        Option(name="images_per_prompt", type=int, default=1, help="pictures of every prompt"),
        Option(name="n_iter", type=int, default=1, help="how often all prompts are drawn, each time with other seeds"),
        Option(name="batch_size", type=int, default=1, help="pictures made at the same time"),
    ),
)
_BEGINNINGS = OptionGroup(
    "Pictures from pictures",
    (
        Option(name="image_path", help="picture to begin from, or a folder of them"),
        Option(
            name="mask_path",
            help="picture, or folder of them, white where a picture is drawn anew; for a prompt with AND the regions of "
            "its sub-prompts in red, green and blue",
        ),
        Option(name="strength", type=float, help="0 to 1: how much of a picture is drawn anew; 0.8 without it"),
        Option(name="highres_fix_scale", type=float, help="draw in two stages, the first at this share of the size"),
        Option(name="highres_fix_steps", type=int, default=28, help="steps of the first stage"),
        Option(name="highres_fix_strength", type=float, help="--strength of the first stage, if it begins from a picture"),
        Option(name="highres_fix_save_1st", type=FLAG, help="save the pictures of the first stage too"),
        Option(
            name="highres_fix_latents_upscaling", type=FLAG, help="enlarge the first stage's latents, and not its picture"
        ),
    ),
)
_CONTROL = OptionGroup(
    "What else pictures follow",
    (
        Option(name="control_net_models", many=True, help="ControlNets: files or diffusers folders"),
        Option(name="guide_image_path", many=True, help="their hint images, picture by picture, or folders of them"),
        Option(name="control_net_preps", many=True, help="how each hint is made: none, canny or canny_LOW_HIGH"),
        Option(name="control_net_weights", type=float, many=True, help="their strengths; 1 where they are missing"),
        Option(name="control_net_ratios", type=float, many=True, help="share of the steps with each; 1 where it is missing"),
        Option(name="highres_fix_disable_control_net", type=FLAG, help="no ControlNet in the second of two stages"),
        Option(name="textual_inversion_embeddings", many=True, help="files whose names stand for words of their own"),
        Option(
            name="ds_depth_1",
            type=int,
            help="Deep Shrink: 0 to 3, the downward block that sees a smaller picture; for SDXL 1 to 8",
        ),
        Option(name="ds_timesteps_1", type=int, default=650, help="down to which timestep it does"),
        Option(name="ds_depth_2", type=int, help="another block, behind that"),
        Option(name="ds_timesteps_2", type=int, default=650, help="down to which timestep that one does"),
        Option(name="ds_ratio", type=float, default=0.5, help="what is left of each side"),
        Option(name="gradual_latent_timesteps", type=int, help="Gradual Latent: pictures grow at timesteps below this"),
        Option(name="gradual_latent_ratio", type=float, default=0.5, help="share of the size that they begin with"),
        Option(name="gradual_latent_ratio_step", type=float, default=0.125, help="what is added to it each time"),
        Option(name="gradual_latent_every_n_steps", type=int, default=3, help="steps from one growth to the next"),
    ),
)
_COMPARING = OptionGroup(
    "Grids, comparisons and pictures again",
    (
        Option(
            name="grid",
            many=True,
            help="one sheet of pictures: x=WHAT:VALUES y=WHAT:VALUES, as in x=strength:0-1:0.25 "
            f"y=lora:out/mine-*.safetensors; WHAT is {', '.join(KINDS)}",
            extension=True,
        ),
        Option(
            name="compare_base",
            type=FLAG,
            help="write each picture beside the same without adapters, as NAME_compared.png",
            extension=True,
        ),
        Option(
            name="from_png",
            many=True,
            help="make pictures again from what these PNGs say of themselves; options that are given come before that",
            extension=True,
        ),
    ),
)
_OUTPUT = OptionGroup(
    "Output",
    (
        Option(name="outdir", default="outputs", help="folder for the pictures; it is created"),
        Option(name="sequential_file_name", type=FLAG, help="im_000001.png and so on, after the last one that is there"),
        Option(name="use_original_file_name", type=FLAG, help="name pictures after those that they begin from"),
    ),
)
_NETWORKS = OptionGroup(
    "Adapters",
    (
        Option(name="network_weights", many=True, help="adapter files"),
        Option(name="network_mul", type=float, many=True, help="their strengths; 1 where they are missing"),
        Option(
            name="network_module",
            many=True,
            help="the module of each file, or one for all of them; networks.lora where it is not given",
        ),
        Option(name="network_args", many=True, help='settings of each module, "key=value;key=value"'),
        Option(
            name="network_merge",
            type=FLAG,
            help="add the adapters to the model's weights first: faster, the same pictures up to rounding",
        ),
        Option(name="network_merge_n_models", type=int, help="the same with the first so many of them"),
        Option(
            name="network_pre_calc",
            type=FLAG,
            help="add adapters to the weights while pictures want them, where their strengths stay the same",
        ),
        Option(name="network_show_meta", type=FLAG, help="print what the files say of themselves"),
        Option(
            name="network_regional_mask_max_color_codes",
            type=int,
            help="read --mask_path as regions of so many colours, up to 7, instead of red, green and blue",
        ),
        Option(name="lora_dir", help="folder, with those in it, where <lora:name:1> in prompts finds files", extension=True),
        Option(
            name="lora_tag_style",
            default="sdnext",
            choices=STYLES,
            help="what a second number in a tag is: an error (sdnext), or the U-Net's strength (a1111)",
            extension=True,
        ),
        Option(
            name="apply_trigger_words",
            type=int,
            default=0,
            help="add so many of each adapter's trigger words to prompts without them; -1 for those that its author named",
            extension=True,
        ),
        Option(name="list_loras", type=FLAG, help="list the adapters in --lora_dir, and do nothing else", extension=True),
    ),
)


def _later(reason: str, *options: tuple[str, Any, str]) -> tuple[Option, ...]:
    """Options of sd-scripts that are known and refused: (name, type or (type, "many"), help)."""
    return tuple(
        Option(
            name=name,
            type=kind[0] if isinstance(kind, tuple) else kind,
            many=isinstance(kind, tuple),
            help=text,
            later=reason,
        )
        for name, kind, text in options
    )


_TEXTS = (str, "many")
_LATER = OptionGroup(
    "Not available",
    (
        *_later(
            "modules that enlarge pictures are no part of this toolkit",
            ("highres_fix_upscaler", str, "module of an upscaler"),
            ("highres_fix_upscaler_args", str, "its settings"),
        ),
        *_later(
            "no library that is kept up guides pictures by other models",
            ("clip_guidance_scale", float, "guidance by CLIP and a text"),
            ("clip_image_guidance_scale", float, "guidance by CLIP and a picture"),
            ("vgg16_guidance_scale", float, "guidance by VGG16 and a picture"),
            ("vgg16_guidance_layer", int, "its layer"),
        ),
        *_later(
            "each layer of the U-Net would need a condition of its own, and diffusers' U-Net takes one for all",
            ("XTI_embeddings", _TEXTS, "extended embedding files"),
        ),
        *_later(
            "new noise always has the strength that euler_a gives it",
            ("gradual_latent_s_noise", float, "strength of the noise of a change"),
        ),
        *_later(
            "pictures that grow are not sharpened on the way",
            ("gradual_latent_unsharp_params", str, "sharpening"),
        ),
        *_later("tokenizers come with the toolkit", ("tokenizer_cache_dir", str, "folder of tokenizers")),
        *_later(
            "logging options come later",
            ("console_log_level", str, "DEBUG, INFO, WARNING, ERROR or CRITICAL"),
            ("console_log_file", str, "log file"),
            ("console_log_simple", FLAG, "plain log"),
        ),
    ),
)

GENERATION_OPTIONS = (_MODEL, _PICTURES, _BEGINNINGS, _NETWORKS, _CONTROL, _COMPARING, _OUTPUT, _PRECISION, _LATER)


def parse_generation(argv: Sequence[str], family: str | None = None) -> GenerationOptions | Path:
    """The run that a command line of gen_img_diffusers.py describes, or the folder whose adapters it wants listed.

    Args:
        family: name of the only family that will do; None for any.

    Raises:
        UserError: every problem that the command line alone shows, at once.
    """
    parsed = parse(argv, GENERATION_OPTIONS, description=DESCRIPTION)
    if parsed["list_loras"]:
        if not parsed["lora_dir"]:
            raise UserError("lists a folder", where="--list_loras", remedy="name it with --lora_dir")
        return Path(parsed["lora_dir"])
    problems = _missing(parsed) + _out_of_range(parsed) + _contradictions(parsed)
    adapters = _adapters(parsed, problems)
    uses = attempt(lambda: _control_uses(parsed), problems)
    axes = attempt(lambda: read_axes(parsed["grid"]), problems) if parsed.given("grid") else ()
    raise_all(problems)
    return GenerationOptions(
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
    if parsed["network_mul"] and _varies_networks(parsed):
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


def _varies_networks(parsed: ParsedOptions) -> bool:
    """Whether --network_mul is for the adapters that recipes name."""
    return bool(parsed["from_png"]) and not parsed["network_weights"]


def _precision(parsed: ParsedOptions) -> Precision:
    return "fp16" if parsed["fp16"] else "bf16" if parsed["bf16"] else "fp32"


_SOURCES = ("prompt", "from_file", "interactive", "from_png")
"""Where prompts come from: one of them, or none where --image_path brings them."""


def _missing(parsed: ParsedOptions) -> list[UserError]:
    problems = []
    if not parsed["ckpt"] and not parsed["from_png"]:
        problems.append(UserError("is missing", where="--ckpt", remedy="give a checkpoint file or a diffusers folder"))
    if not any(parsed.given(name) for name in (*_SOURCES, "image_path")):
        problems.append(UserError("no prompt is given", remedy="give --prompt TEXT or --from_file FILE"))
    return problems


# Option -> least and greatest value.
_RANGES: dict[str, tuple[float, float]] = {
    "W": (MIN_SIZE, math.inf),
    "H": (MIN_SIZE, math.inf),
    **dict.fromkeys(
        ("original_width", "original_height", "original_width_negative", "original_height_negative"), (1, math.inf)
    ),
    **dict.fromkeys(("crop_top", "crop_left"), (0, math.inf)),
    "steps": (1, MAX_STEPS),
    "seed": (0, MAX_SEED),
    "clip_skip": (1, math.inf),
    "images_per_prompt": (1, math.inf),
    "n_iter": (1, math.inf),
    "batch_size": (1, math.inf),
    "max_embeddings_multiples": (1, math.inf),
    "guidance_rescale": (0, 1),
    "refiner_start": (0, 1),
    "strength": (0, 1),
    "highres_fix_scale": (0.05, 1),
    "highres_fix_steps": (1, MAX_STEPS),
    "highres_fix_strength": (0, 1),
    "network_merge_n_models": (1, math.inf),
    "network_regional_mask_max_color_codes": (1, 7),
    "apply_trigger_words": (-1, math.inf),
    "vae_batch_size": (0.01, math.inf),
    "vae_slices": (1, math.inf),
}


def _out_of_range(parsed: ParsedOptions) -> list[UserError]:
    problems = []
    for name, (least, most) in _RANGES.items():
        value = parsed[name]
        if value is not None and not least <= value <= most:
            allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
            problems.append(UserError("is out of range", where=parsed.where(name), remedy=f"give {allowed}"))
    return problems


def _contradictions(parsed: ParsedOptions) -> list[UserError]:
    sources = [f"--{name}" for name in _SOURCES if parsed.given(name)]
    of_networks = [name for name in _NETWORK_SETTINGS if name != "network_mul" or not _varies_networks(parsed)]
    without_networks = [name for name in of_networks if parsed[name] and not parsed["network_weights"]]
    rules: tuple[tuple[object, str, str, str], ...] = (
        (parsed["fp16"] and parsed["bf16"], "--fp16 --bf16", "are two precisions", "give one of them"),
        (len(sources) > 1, " and ".join(sources), "both give prompts", "give one of them"),
        (
            without_networks,
            " ".join(f"--{name}" for name in without_networks),
            "there is no adapter that this could act on",
            "name the files with --network_weights",
        ),
        (
            parsed["network_merge"] and parsed["network_merge_n_models"] is not None,
            "--network_merge --network_merge_n_models",
            "merge all adapters and some of them",
            "give one of them",
        ),
        (
            parsed["strength"] is not None
            and not parsed["image_path"]
            and not parsed["from_png"]
            and parsed["highres_fix_scale"] is None,
            "--strength",
            "there is no picture to begin from",
            "give one with --image_path, or --highres_fix_scale",
        ),
        (
            parsed["use_original_file_name"] and not parsed["image_path"],
            "--use_original_file_name",
            "there is no picture to begin from",
            "give one with --image_path",
        ),
        (
            parsed["highres_fix_scale"] is None and not parsed["from_png"] and any(parsed[name] for name in _HIGHRES),
            " ".join(f"--{name}" for name in _HIGHRES if parsed[name]),
            "there is no first stage",
            "give --highres_fix_scale",
        ),
        (
            parsed["interactive"] and parsed["n_iter"] != 1,
            "--n_iter",
            "typed prompts are drawn once",
            "use --images_per_prompt",
        ),
        (
            parsed["grid"] and parsed["compare_base"],
            "--grid --compare_base",
            "a grid can show the base itself",
            "give the axis strength:0,1, or begin lora: with none, and leave out --compare_base",
        ),
        (
            parsed["grid"] and any(parsed[name] for name in _NAMING),
            " ".join(f"--{name}" for name in _NAMING if parsed[name]),
            "the pictures of a grid are named after its axes",
            "leave it out",
        ),
        (
            parsed["compare_base"] and parsed["highres_fix_save_1st"],
            "--compare_base --highres_fix_save_1st",
            "first stages of the base would be saved too",
            "leave one of them out",
        ),
        (parsed["grid"] and parsed["interactive"], "--grid", "goes with no typed prompt", "leave it out"),
        (parsed["from_png"] == (), "--from_png", "names no picture", "give a PNG"),
        (parsed["mask_path"] and parsed["interactive"], "--mask_path", "goes with no typed prompt", "leave it out"),
        (parsed["image_path"] and parsed["interactive"], "--image_path", "goes with no typed prompt", "leave it out"),
    )
    problems = [UserError(what, where=where, remedy=remedy) for broken, where, what, remedy in rules if broken]
    attempt(lambda: find_sampler(parsed["sampler"], where="--sampler"), problems)
    for first, others in _PARTS_OF.items():
        given = [f"--{name}" for name in others if parsed.given(name)]
        if given and parsed[first] is None:
            problems.append(UserError("has no effect", where=" ".join(given), remedy=f"give --{first} too"))
    return problems


# Option -> those that do nothing without it.
_PARTS_OF: dict[str, tuple[str, ...]] = {
    "ds_depth_1": ("ds_timesteps_1", "ds_depth_2", "ds_timesteps_2", "ds_ratio"),
    "gradual_latent_timesteps": (*("gradual_latent_ratio", "gradual_latent_ratio_step", "gradual_latent_every_n_steps"),),
    "highres_fix_scale": ("highres_fix_steps", "highres_fix_disable_control_net"),
    "mask_path": ("network_regional_mask_max_color_codes",),
    "refiner": ("refiner_start",),
}


_NETWORK_SETTINGS = ("network_module", "network_mul", "network_args", "network_merge", "network_merge_n_models")
_NAMING = ("sequential_file_name", "use_original_file_name")
_HIGHRES = ("highres_fix_strength", "highres_fix_save_1st", "highres_fix_latents_upscaling")


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
