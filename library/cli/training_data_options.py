"""Options of train_network.py that say what is trained on: base model, dataset, captions, images, caches."""

from __future__ import annotations

from pathlib import Path

from library.cli.options import FLAG, Option, OptionGroup
from library.dataset.options import DEFAULT_CAPTION_EXTENSION, INTERPOLATIONS

DATA_OPTIONS = (
    OptionGroup(
        "Base model",
        (
            Option(
                name="pretrained_model_name_or_path",
                help="base model: a checkpoint file (.safetensors, .ckpt), a diffusers folder, or a Hugging Face id",
            ),
            Option(
                name="v2",
                type=FLAG,
                help="the base model is Stable Diffusion 2.x; it is detected anyway, and a wrong flag is refused",
            ),
            Option(
                name="v_parameterization",
                type=FLAG,
                help="train against the velocity instead of the noise; needed only where the model does not say so itself",
            ),
            Option(name="vae", help="replace the VAE: a diffusers folder, a full checkpoint or a VAE file"),
            Option(
                name="disable_mmap_load_safetensors",
                type=FLAG,
                help="read a file whole instead of tensor by tensor; that takes more memory, so it has no effect",
            ),
            Option(
                name="tokenizer_cache_dir",
                help="where sd-scripts keeps downloaded tokenizers; ours ship with the package, so it has no effect",
            ),
        ),
    ),
    OptionGroup(
        "Dataset",
        (
            Option(name="dataset_config", type=Path, help="dataset definition, .toml or .json (docs/dataset.md)"),
            Option(
                name="train_data_dir",
                help="folder of folders named `<repeats>_<words>`; with --in_json the folder of the images",
            ),
            Option(name="reg_data_dir", help="the same for regularisation images"),
            Option(name="in_json", help="metadata .json or .jsonl of a fine-tuning dataset"),
            Option(
                name="dataset_repeats",
                type=int,
                default=1,
                help="times each image is used in an epoch, where the dataset does not say",
            ),
            Option(
                name="dataset_class",
                help="dotted path of a custom dataset class",
                later="custom dataset classes of sd-scripts have no place in this dataset",
            ),
            Option(
                name="conditioning_data_dir",
                help="folder of condition images",
                later="masked and conditioned datasets come later",
            ),
            Option(name="train_batch_size", type=int, default=1, help="images per device and micro-batch"),
            Option(
                name="resolution",
                help='training size in pixels, "size" or "width,height"; its area is the area of every bucket',
            ),
            Option(
                name="debug_dataset",
                type=FLAG,
                help="print what every image of the first epoch becomes, then stop without training",
            ),
            Option(
                name="max_data_loader_n_workers",
                type=int,
                default=8,
                help="processes that prepare batches, at most the number of processors; 0: none beside the trainer itself",
            ),
            Option(
                name="persistent_data_loader_workers",
                type=FLAG,
                help="keep those processes between epochs; they are always kept, so it has no effect",
            ),
        ),
    ),
    OptionGroup(
        "Captions",
        (
            Option(name="caption_extension", default=DEFAULT_CAPTION_EXTENSION, help="suffix of caption files"),
            Option(name="caption_extention", help="old spelling of --caption_extension"),
            Option(
                name="caption_separator",
                default=",",
                help='splits a caption into tags; tags are joined again with ", "',
            ),
            Option(name="shuffle_caption", type=FLAG, help="shuffle the tags that are not fixed, anew at every use"),
            Option(name="keep_tokens", type=int, default=0, help="the first N tags stay in place and are never dropped"),
            Option(
                name="keep_tokens_separator",
                default="",
                help="text between fixed and other tags (a second one starts a fixed tail); wins over --keep_tokens",
            ),
            Option(name="secondary_separator", help="glues several tags into one unit while shuffling and dropping"),
            Option(
                name="enable_wildcard",
                type=FLAG,
                help="pick one line of a caption at random and expand {a|b}; {{ and }} stand for braces",
            ),
            Option(name="caption_prefix", help="text before every caption"),
            Option(name="caption_suffix", help="text after every caption"),
            Option(
                name="caption_dropout_rate",
                type=float,
                default=0.0,
                help="share of uses in which the caption is empty, 0 to 1",
            ),
            Option(
                name="caption_dropout_every_n_epochs",
                type=int,
                default=0,
                help="in every Nth epoch all captions are empty",
            ),
            Option(
                name="caption_tag_dropout_rate",
                type=float,
                default=0.0,
                help="probability with which each tag that is not fixed is left out, 0 to 1",
            ),
            Option(name="token_warmup_min", type=int, default=1, help="tags used at the first step of the tag warm-up"),
            Option(
                name="token_warmup_step",
                type=float,
                default=0,
                help="step from which all tags are used; below 1 a share of all steps",
            ),
            Option(
                name="weighted_captions",
                type=FLAG,
                help="read (x:1.3), (x) and [x] in captions as weights of what the text encoder gives",
            ),
            Option(
                name="max_token_length",
                type=int,
                choices=(75, 150, 225),
                help="longest caption in tokens; longer ones are read in pieces of 75",
            ),
            Option(
                name="clip_skip",
                type=int,
                help="use the Nth-last layer of every text encoder; without it the one that the model was trained with",
            ),
        ),
    ),
    OptionGroup(
        "Images and buckets",
        (
            Option(name="enable_bucket", type=FLAG, help="group images by shape instead of cropping all to one size"),
            Option(name="min_bucket_reso", type=int, default=256, help="smallest side of a bucket in pixels"),
            Option(name="max_bucket_reso", type=int, default=1024, help="largest side of a bucket in pixels"),
            Option(name="bucket_reso_steps", type=int, default=64, help="sides of buckets are multiples of this"),
            Option(
                name="bucket_no_upscale",
                type=FLAG,
                help="never enlarge an image; buckets then follow the images, and the two limits have no effect",
            ),
            Option(
                name="resize_interpolation",
                choices=INTERPOLATIONS,
                help="resampling filter; without it area when shrinking and Lanczos when enlarging",
            ),
            Option(
                name="color_aug",
                type=FLAG,
                help="in a third of the uses shift the hue or the gamma slightly; not with cached latents",
            ),
            Option(name="flip_aug", type=FLAG, help="mirror the image in half of the uses"),
            Option(name="random_crop", type=FLAG, help="crop at random instead of in the centre; not with cached latents"),
            Option(name="face_crop_aug_range", help='"min,max": crop around the face named in the file name (_cx_cy_w_h)'),
            Option(name="alpha_mask", type=FLAG, help="use the alpha channel as a mask of the loss"),
            Option(
                name="cache_info",
                type=FLAG,
                help="sd-scripts remembers captions and sizes in a file; scanning is fast here, so it has no effect",
            ),
        ),
    ),
    OptionGroup(
        "Caching",
        (
            Option(name="cache_latents", type=FLAG, help="encode every image once and keep the result in memory"),
            Option(name="cache_latents_to_disk", type=FLAG, help="the same, kept on disk for later runs"),
            Option(
                name="cache_text_encoder_outputs",
                type=FLAG,
                help="encode all captions before training and free the text encoders; with --network_train_unet_only",
            ),
            Option(name="cache_text_encoder_outputs_to_disk", type=FLAG, help="the same, kept on disk for later runs"),
            Option(name="vae_batch_size", type=int, default=1, help="images the VAE encodes at once"),
            Option(name="skip_cache_check", type=FLAG, help="trust cache files without opening them"),
        ),
    ),
)
