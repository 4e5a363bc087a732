"""What the command line of gen_img_diffusers.py alone shows to be wrong: missing, out of range, or at odds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from library.cli.options import ParsedOptions
from library.errors import UserError, attempt
from library.generation.requests import MAX_SEED, MAX_STEPS, MIN_SIZE
from library.generation.samplers import find_sampler


def problems_of(parsed: ParsedOptions) -> list[UserError]:
    """Every mistake that the options show without a look into files."""
    problems = _missing(parsed) + _out_of_range(parsed)
    problems += [rule.problem(parsed) for rule in RULES if rule.broken(parsed)]
    attempt(lambda: find_sampler(parsed["sampler"], where="--sampler"), problems)
    return problems


def varies_networks(parsed: ParsedOptions) -> bool:
    """Whether --network_mul is for the adapters that recipes name."""
    return bool(parsed["from_png"]) and not parsed["network_weights"]


SOURCES = ("prompt", "from_file", "interactive", "from_png")
"""Where prompts come from: one of them, or none where --image_path brings them."""


def _missing(parsed: ParsedOptions) -> list[UserError]:
    problems = []
    if not parsed["ckpt"] and not parsed["from_png"]:
        problems.append(UserError("is missing", where="--ckpt", remedy="give a checkpoint file or a diffusers folder"))
    if not any(parsed.given(name) for name in (*SOURCES, "image_path")):
        problems.append(UserError("no prompt is given", remedy="give --prompt TEXT or --from_file FILE"))
    return problems


RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("W", "H"), (MIN_SIZE, math.inf)),
    **dict.fromkeys(
        ("original_width", "original_height", "original_width_negative", "original_height_negative"), (1, math.inf)
    ),
    **dict.fromkeys(("crop_top", "crop_left"), (0, math.inf)),
    **dict.fromkeys(("steps", "highres_fix_steps"), (1, MAX_STEPS)),
    "seed": (0, MAX_SEED),
    **dict.fromkeys(("clip_skip", "images_per_prompt", "n_iter", "batch_size"), (1, math.inf)),
    **dict.fromkeys(("max_embeddings_multiples", "network_merge_n_models", "vae_slices"), (1, math.inf)),
    **dict.fromkeys(("guidance_rescale", "refiner_start", "strength", "highres_fix_strength"), (0, 1)),
    "highres_fix_scale": (0.05, 1),
    "network_regional_mask_max_color_codes": (1, 7),
    "apply_trigger_words": (-1, math.inf),
    "vae_batch_size": (0.01, math.inf),
}
"""Option -> least and greatest value."""


def _out_of_range(parsed: ParsedOptions) -> list[UserError]:
    problems = []
    for name, (least, most) in RANGES.items():
        value = parsed[name]
        if value is not None and not least <= value <= most:
            allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
            problems.append(UserError("is out of range", where=parsed.where(name), remedy=f"give {allowed}"))
    return problems


@dataclass(frozen=True)
class Rule:
    """Options that do not go together, or with what is missing.

    Attributes:
        names: of the options at fault; those that were given are named.
        broken: whether the command line breaks the rule.
        what, remedy: for the sentence.
    """

    names: tuple[str, ...]
    broken: Callable[[ParsedOptions], object]
    what: str
    remedy: str

    def problem(self, parsed: ParsedOptions) -> UserError:
        """The sentence."""
        given = [f"--{name}" for name in self.names if parsed.given(name)]
        return UserError(self.what, where=" ".join(given), remedy=self.remedy)


def _any(parsed: ParsedOptions, names: tuple[str, ...]) -> bool:
    return any(parsed[name] for name in names)


def _together(first: str, second: str, what: str, remedy: str) -> Rule:
    """Two options of which one may be given."""
    return Rule((first, second), lambda parsed: parsed[first] and parsed[second], what, remedy)


def _typed(name: str) -> Rule:
    """An option that does not go with prompts that are typed in."""
    return Rule((name,), lambda parsed: parsed[name] and parsed["interactive"], "goes with no typed prompt", "leave it out")


def _part(first: str, *others: str) -> Rule:
    """Options that do nothing without a first one."""
    return Rule(
        others,
        lambda parsed: parsed[first] is None and any(parsed.given(name) for name in others),
        "has no effect",
        f"give --{first} too",
    )


_OF_NETWORKS = ("network_module", "network_args", "network_merge", "network_merge_n_models")
_NO_NETWORK = ("there is no adapter that this could act on", "name the files with --network_weights")
_NAMES_OF_PICTURES = ("sequential_file_name", "use_original_file_name")
_SECOND_STAGE = ("highres_fix_strength", "highres_fix_save_1st", "highres_fix_latents_upscaling")


def _nothing_to_begin_from(parsed: ParsedOptions) -> bool:
    return not _any(parsed, ("image_path", "from_png")) and parsed["highres_fix_scale"] is None


def _two_sources(parsed: ParsedOptions) -> bool:
    return sum(parsed.given(name) for name in SOURCES) > 1


RULES: tuple[Rule, ...] = (
    _together("fp16", "bf16", "are two precisions", "give one of them"),
    Rule(SOURCES, _two_sources, "both give prompts", "give one of them"),
    Rule(_OF_NETWORKS, lambda parsed: _any(parsed, _OF_NETWORKS) and not parsed["network_weights"], *_NO_NETWORK),
    Rule(
        ("network_mul",),
        lambda parsed: parsed["network_mul"] and not parsed["network_weights"] and not varies_networks(parsed),
        *_NO_NETWORK,
    ),
    Rule(
        ("network_merge", "network_merge_n_models"),
        lambda parsed: parsed["network_merge"] and parsed["network_merge_n_models"] is not None,
        "merge all adapters and some of them",
        "give one of them",
    ),
    Rule(
        ("strength",),
        lambda parsed: parsed["strength"] is not None and _nothing_to_begin_from(parsed),
        "there is no picture to begin from",
        "give one with --image_path, or --highres_fix_scale",
    ),
    Rule(
        ("use_original_file_name",),
        lambda parsed: parsed["use_original_file_name"] and not parsed["image_path"],
        "there is no picture to begin from",
        "give one with --image_path",
    ),
    Rule(
        _SECOND_STAGE,
        lambda parsed: parsed["highres_fix_scale"] is None and not parsed["from_png"] and _any(parsed, _SECOND_STAGE),
        "there is no first stage",
        "give --highres_fix_scale",
    ),
    Rule(
        ("n_iter",),
        lambda parsed: parsed["interactive"] and parsed["n_iter"] != 1,
        "typed prompts are drawn once",
        "use --images_per_prompt",
    ),
    _together(
        *("grid", "compare_base"),
        "a grid can show the base itself",
        "give the axis strength:0,1, or begin lora: with none, and leave out --compare_base",
    ),
    Rule(
        _NAMES_OF_PICTURES,
        lambda parsed: parsed["grid"] and _any(parsed, _NAMES_OF_PICTURES),
        "the pictures of a grid are named after its axes",
        "leave it out",
    ),
    _together(
        *("compare_base", "highres_fix_save_1st"),
        "first stages of the base would be saved too",
        "leave one of them out",
    ),
    *(_typed(name) for name in ("grid", "mask_path", "image_path")),
    Rule(("from_png",), lambda parsed: parsed["from_png"] == (), "names no picture", "give a PNG"),
    _part("ds_depth_1", "ds_timesteps_1", "ds_depth_2", "ds_timesteps_2", "ds_ratio"),
    _part("gradual_latent_timesteps", *(f"gradual_latent_{part}" for part in ("ratio", "ratio_step", "every_n_steps"))),
    _part("highres_fix_scale", "highres_fix_steps", "highres_fix_disable_control_net"),
    _part("mask_path", "network_regional_mask_max_color_codes"),
    _part("refiner", "refiner_start"),
)
