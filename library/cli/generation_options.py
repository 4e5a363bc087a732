"""The options of gen_img_diffusers.py."""

from __future__ import annotations

from typing import Any

from library.cli.options import FLAG, Option, OptionGroup
from library.generation.grid_axes import KINDS
from library.prompts.lora_tags import STYLES

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
