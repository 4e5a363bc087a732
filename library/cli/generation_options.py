"""The options of gen_img_diffusers.py: a table, and the way from it to `GenerationOptions`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from library.cli.options import FLAG, Option, OptionGroup, ParsedOptions, parse
from library.errors import UserError, raise_all
from library.generation.options import GenerationOptions, ModelOptions, NetworkUse, PictureOptions, Precision
from library.generation.requests import MAX_SEED, MAX_STEPS, MIN_SIZE
from library.generation.samplers import SAMPLERS
from networks.registry import resolve_network_module

DESCRIPTION = "Draw pictures with Stable Diffusion 1.x and 2.x and adapters."

_MODEL = OptionGroup(
    "Model",
    (
        Option(name="ckpt", help="the base model: a checkpoint file or a diffusers folder"),
        Option(name="vae", help="a VAE to use instead of the model's own"),
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
    "Precision and speed",
    (
        Option(name="fp16", type=FLAG, help="U-Net and text encoder in fp16; fp32 without this and --bf16"),
        Option(name="bf16", type=FLAG, help="U-Net and text encoder in bfloat16"),
        Option(name="no_half_vae", type=FLAG, help="the VAE in fp32, which it always is here", extension=True),
        Option(name="xformers", type=FLAG, help="attention of xformers, where it is installed; else torch's"),
        Option(name="sdpa", type=FLAG, help="torch's own attention, which is used without this too"),
    ),
)
_PICTURES = OptionGroup(
    "Pictures",
    (
        Option(name="prompt", help="the prompt; it may hold options: a cat --n blurry --w 768 --h 512 --s 30 --d 1 --l 7"),
        Option(name="from_file", help="a UTF-8 file of prompts, one per line; lines that begin with # are skipped"),
        Option(name="W", type=int, help="width in pixels, rounded down to a multiple of 8; the model's own without it"),
        Option(name="H", type=int, help="height in pixels, likewise"),
        Option(name="steps", type=int, default=50, help="steps of the sampler"),
        Option(name="scale", type=float, default=7.5, help="guidance towards the prompt; 1 and less is without guidance"),
        Option(name="sampler", default="ddim", choices=tuple(SAMPLERS), help="the sampler"),
        Option(
            name="seed",
            type=int,
            help="the seed of the first picture, from which the others' follow; chance without it. Every file name ends "
            "with the seed that draws its picture again",
        ),
        Option(name="images_per_prompt", type=int, default=1, help="pictures of every prompt"),
        Option(name="n_iter", type=int, default=1, help="how often all prompts are drawn, each time with other seeds"),
        Option(name="batch_size", type=int, default=1, help="pictures made at the same time"),
    ),
)
_OUTPUT = OptionGroup(
    "Output",
    (
        Option(name="outdir", default="outputs", help="folder for the pictures; it is created"),
        Option(name="sequential_file_name", type=FLAG, help="im_000001.png and so on, after the last one that is there"),
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


_TEXTS, _NUMBERS = (str, "many"), (float, "many")
_LATER = OptionGroup(
    "Not available yet",
    (
        *_later(
            "image to image and inpainting come later",
            ("image_path", str, "picture or folder to begin from"),
            ("mask_path", str, "mask for inpainting or for regions"),
            ("strength", float, "how much is repainted"),
            ("use_original_file_name", FLAG, "name results as their sources"),
        ),
        *_later(
            "a second stage in a larger size comes later",
            ("highres_fix_scale", float, "size of the first stage, as a share"),
            ("highres_fix_steps", int, "steps of the first stage"),
            ("highres_fix_strength", float, "strength of the first stage"),
            ("highres_fix_save_1st", FLAG, "save the first stage too"),
            ("highres_fix_latents_upscaling", FLAG, "enlarge the latents"),
            ("highres_fix_upscaler", str, "module of an upscaler"),
            ("highres_fix_upscaler_args", str, "its settings"),
            ("highres_fix_disable_control_net", FLAG, "no ControlNet in the second stage"),
        ),
        *_later(
            "ControlNet comes later",
            ("guide_image_path", _TEXTS, "hint images"),
            ("control_net_models", _TEXTS, "ControlNet files"),
            ("control_net_preps", _TEXTS, "their preprocessors"),
            ("control_net_weights", _NUMBERS, "their strengths"),
            ("control_net_ratios", _NUMBERS, "share of steps with them"),
        ),
        *_later(
            "guidance by other models comes later",
            ("clip_guidance_scale", float, "guidance by CLIP and a text"),
            ("clip_image_guidance_scale", float, "guidance by CLIP and a picture"),
            ("vgg16_guidance_scale", float, "guidance by VGG16 and a picture"),
            ("vgg16_guidance_layer", int, "its layer"),
            ("negative_scale", float, "a scale of its own for the negative prompt"),
        ),
        *_later(
            "textual inversion comes later",
            ("textual_inversion_embeddings", _TEXTS, "embedding files"),
            ("XTI_embeddings", _TEXTS, "extended embedding files"),
        ),
        *_later(
            "Deep Shrink comes later",
            ("ds_depth_1", int, "depth of the first shrinking"),
            ("ds_timesteps_1", int, "until which timestep"),
            ("ds_depth_2", int, "depth of the second"),
            ("ds_timesteps_2", int, "until which timestep"),
            ("ds_ratio", float, "its factor"),
        ),
        *_later(
            "Gradual Latent comes later",
            ("gradual_latent_timesteps", int, "below which timestep"),
            ("gradual_latent_ratio", float, "first size"),
            ("gradual_latent_ratio_step", float, "growth"),
            ("gradual_latent_every_n_steps", int, "steps between"),
            ("gradual_latent_s_noise", float, "noise of a change"),
            ("gradual_latent_unsharp_params", str, "sharpening"),
        ),
        *_later(
            "other ways to use adapters come later",
            ("network_show_meta", FLAG, "print the adapters' metadata"),
            ("network_merge_n_models", int, "merge the first so many adapters"),
            ("network_pre_calc", FLAG, "rewrite the weights before each batch"),
            ("network_regional_mask_max_color_codes", int, "regions by colour"),
        ),
        *_later(
            "other ways to give prompts come later",
            ("interactive", FLAG, "read prompts from the keyboard"),
            ("no_preview", FLAG, "no window meanwhile"),
            ("iter_same_seed", FLAG, "one seed for all prompts of an iteration"),
            ("shuffle_prompts", FLAG, "prompts in another order in each iteration"),
        ),
        *_later(
            "it comes with the other options for speed and memory",
            ("vae_batch_size", float, "pictures the VAE decodes at the same time; one at a time until then"),
            ("vae_slices", int, "slices inside the VAE"),
            ("opt_channels_last", FLAG, "channels-last memory format"),
            ("diffusers_xformers", FLAG, "xformers the way diffusers switches it on"),
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

GENERATION_OPTIONS = (_MODEL, _PICTURES, _NETWORKS, _OUTPUT, _PRECISION, _LATER)


def parse_generation(argv: Sequence[str]) -> GenerationOptions:
    """The run that a command line of gen_img_diffusers.py describes.

    Raises:
        UserError: every problem that the command line alone shows, at once.
    """
    parsed = parse(argv, GENERATION_OPTIONS, description=DESCRIPTION)
    problems = _missing(parsed) + _out_of_range(parsed) + _contradictions(parsed)
    networks = _networks(parsed, problems)
    raise_all(problems)
    return GenerationOptions(
        model=ModelOptions(
            path=parsed["ckpt"],
            vae=parsed["vae"],
            v2=parsed["v2"] or None,
            v_parameterization=parsed["v_parameterization"] or None,
            zero_terminal_snr=parsed["zero_terminal_snr"],
            precision=_precision(parsed),
            xformers=parsed["xformers"],
            max_chunks=parsed["max_embeddings_multiples"] or 3,
        ),
        pictures=PictureOptions(
            prompt=parsed["prompt"],
            prompt_file=None if parsed["from_file"] is None else Path(parsed["from_file"]),
            width=parsed["W"],
            height=parsed["H"],
            steps=parsed["steps"],
            scale=parsed["scale"],
            sampler=parsed["sampler"],
            seed=parsed["seed"],
            clip_skip=parsed["clip_skip"],
            images_per_prompt=parsed["images_per_prompt"],
            iterations=parsed["n_iter"],
            batch_size=parsed["batch_size"],
        ),
        output_folder=Path(parsed["outdir"]),
        networks=networks,
        merge_networks=parsed["network_merge"],
        sequential_names=parsed["sequential_file_name"],
    )


def _precision(parsed: ParsedOptions) -> Precision:
    return "fp16" if parsed["fp16"] else "bf16" if parsed["bf16"] else "fp32"


def _missing(parsed: ParsedOptions) -> list[UserError]:
    problems = []
    if not parsed["ckpt"]:
        problems.append(UserError("is missing", where="--ckpt", remedy="give a checkpoint file or a diffusers folder"))
    if parsed["prompt"] is None and parsed["from_file"] is None:
        problems.append(UserError("no prompt is given", remedy="give --prompt TEXT or --from_file FILE"))
    return problems


# Option -> least and greatest value.
_RANGES: dict[str, tuple[float, float]] = {
    "W": (MIN_SIZE, math.inf),
    "H": (MIN_SIZE, math.inf),
    "steps": (1, MAX_STEPS),
    "seed": (0, MAX_SEED),
    "clip_skip": (1, math.inf),
    "images_per_prompt": (1, math.inf),
    "n_iter": (1, math.inf),
    "batch_size": (1, math.inf),
    "max_embeddings_multiples": (1, math.inf),
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
    rules: tuple[tuple[Callable[[], Any], str, str, str], ...] = (
        (lambda: parsed["fp16"] and parsed["bf16"], "--fp16 --bf16", "are two precisions", "give one of them"),
        (
            lambda: parsed["prompt"] is not None and parsed["from_file"] is not None,
            "--prompt and --from_file",
            "both give prompts",
            "give one of them",
        ),
        (
            lambda: not parsed["network_weights"] and any(parsed[name] for name in _NETWORK_SETTINGS),
            " ".join(f"--{name}" for name in _NETWORK_SETTINGS if parsed[name]),
            "there is no adapter that this could act on",
            "name the files with --network_weights",
        ),
    )
    return [UserError(what, where=where, remedy=remedy) for broken, where, what, remedy in rules if broken()]


_NETWORK_SETTINGS = ("network_module", "network_mul", "network_args", "network_merge")


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
