"""Options of train_network.py that say what comes out: files, previews, logs, metadata."""

from __future__ import annotations

from library.cli.options import FLAG, Option, OptionGroup

OUTPUT_OPTIONS = (
    OptionGroup(
        "Saving",
        (
            Option(name="output_dir", help="folder for what is trained; created if missing"),
            Option(name="output_name", help='name of the files without suffix; "last" where it is not given'),
            Option(name="save_model_as", default="safetensors", choices=("ckpt", "pt", "safetensors"), help="file format"),
            Option(
                name="save_precision",
                choices=("float", "fp16", "bf16"),
                help="number format of the saved weights; fp32 where it is not given",
            ),
            Option(name="save_every_n_epochs", type=int, help="save every N epochs as well"),
            Option(name="save_every_n_steps", type=int, help="save every N steps as well"),
            Option(name="save_n_epoch_ratio", type=int, help="save about N times over the whole training"),
            Option(name="save_last_n_epochs", type=int, help="keep only the last N of the files saved at epochs"),
            Option(name="save_last_n_steps", type=int, help="keep only files saved at the last N steps"),
            Option(name="no_metadata", type=FLAG, help="store only the metadata a reader needs"),
        ),
    ),
    OptionGroup(
        "State and resuming",
        (
            Option(
                name="save_state",
                type=FLAG,
                help="also write an accelerate state dir at each save and at the end",
                later="saving and resuming the state of a run come later",
            ),
            Option(
                name="save_state_on_train_end",
                type=FLAG,
                help="state only at the end",
                later="saving and resuming the state of a run come later",
            ),
            Option(
                name="save_last_n_epochs_state",
                type=int,
                help="retention for epoch states",
                later="saving and resuming the state of a run come later",
            ),
            Option(
                name="save_last_n_steps_state",
                type=int,
                help="retention for step states",
                later="saving and resuming the state of a run come later",
            ),
            Option(
                name="resume",
                help="state directory (or Hub path with the flag below)",
                later="saving and resuming the state of a run come later",
            ),
            Option(
                name="initial_epoch",
                type=int,
                help="1-based start epoch; overrides the value stored in the state",
                later="saving and resuming the state of a run come later",
            ),
            Option(
                name="initial_step",
                type=int,
                help="start step over all epochs; overrides initial_epoch",
                later="saving and resuming the state of a run come later",
            ),
            Option(
                name="skip_until_initial_step",
                type=FLAG,
                help="go through the data up to that point",
                later="saving and resuming the state of a run come later",
            ),
        ),
    ),
    OptionGroup(
        "Preview pictures",
        (
            Option(name="sample_prompts", help="prompts of preview pictures: .txt, .toml or .json"),
            Option(name="sample_every_n_steps", type=int, help="draw previews every N steps"),
            Option(name="sample_every_n_epochs", type=int, help="draw previews every N epochs; wins over the steps"),
            Option(name="sample_at_first", type=FLAG, help="draw previews before the first step as well"),
            Option(name="sample_sampler", default="ddim", help="sampler of the previews; docs/generate.md lists them"),
        ),
    ),
    OptionGroup(
        "Validation",
        (
            Option(
                name="validation_split",
                type=float,
                default=0.0,
                help="0-1 fraction of each DreamBooth subset used for validation (reg subsets excluded)",
                later="validation comes later",
            ),
            Option(
                name="validation_seed",
                type=int,
                help="seed of the split and of validation noise",
                later="validation comes later",
            ),
            Option(name="validate_every_n_steps", type=int, help="step interval", later="validation comes later"),
            Option(
                name="validate_every_n_epochs",
                type=int,
                help="epoch interval; unset = every epoch",
                later="validation comes later",
            ),
            Option(name="max_validation_steps", type=int, help="cap on batches per run", later="validation comes later"),
        ),
    ),
    OptionGroup(
        "Logging",
        (
            Option(name="logging_dir", help="folder for TensorBoard logs, one folder a run inside it"),
            Option(name="log_with", choices=("tensorboard", "wandb", "all"), help="where the curves go"),
            Option(name="log_prefix", help="start of the name of a run in --logging_dir"),
            Option(name="log_tracker_name", help="name of the tracker project"),
            Option(
                name="log_tracker_config",
                help="TOML passed as init kwargs to trackers",
                later="trackers beside TensorBoard come later",
            ),
            Option(
                name="log_config",
                type=FLAG,
                help="log the argument dict (secrets and paths removed)",
                later="it comes with the other trackers",
            ),
            Option(name="wandb_run_name", help="run name", later="trackers beside TensorBoard come later"),
            Option(name="wandb_api_key", help="login key", later="trackers beside TensorBoard come later"),
            Option(
                name="console_log_level",
                choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
                help="console level, default INFO",
                later="log files come later",
            ),
            Option(name="console_log_file", help="log to a file instead of the console", later="log files come later"),
            Option(name="console_log_simple", type=FLAG, help="plain instead of rich output", later="log files come later"),
        ),
    ),
    OptionGroup(
        "Metadata (ModelSpec)",
        (
            Option(name="metadata_title", help="modelspec title; the output name where it is not given"),
            Option(name="metadata_author", help="modelspec author"),
            Option(name="metadata_description", help="modelspec description"),
            Option(name="metadata_license", help="modelspec license"),
            Option(name="metadata_tags", help="modelspec tags, separated by commas"),
            Option(name="metadata_usage_hint", help="modelspec usage_hint"),
            Option(name="metadata_thumbnail", help="modelspec thumbnail: an image file or a data URL"),
            Option(name="metadata_merged_from", help="modelspec merged_from"),
            Option(name="metadata_trigger_phrase", help="modelspec trigger_phrase"),
            Option(name="metadata_preprocessor", help="modelspec preprocessor"),
            Option(name="metadata_is_negative_embedding", help="modelspec is_negative_embedding"),
        ),
    ),
    OptionGroup(
        "Hugging Face upload",
        (
            Option(
                name="huggingface_repo_id",
                help="enable upload of every saved file to this repo (created if missing)",
                later="uploading to Hugging Face comes later",
            ),
            Option(name="huggingface_repo_type", help="repo type", later="uploading to Hugging Face comes later"),
            Option(
                name="huggingface_path_in_repo",
                help='prefix; file goes to prefix + "/" + name',
                later="uploading to Hugging Face comes later",
            ),
            Option(name="huggingface_token", help="token", later="uploading to Hugging Face comes later"),
            Option(
                name="huggingface_repo_visibility",
                help='"public" makes it public, anything else private',
                later="uploading to Hugging Face comes later",
            ),
            Option(
                name="save_state_to_huggingface",
                type=FLAG,
                help="upload state dirs too",
                later="uploading to Hugging Face comes later",
            ),
            Option(
                name="resume_from_huggingface",
                type=FLAG,
                help="interpret --resume as owner/repo/path[:revision[:type]]",
                later="uploading to Hugging Face comes later",
            ),
            Option(
                name="async_upload",
                type=FLAG,
                help="upload in a background thread (the final upload is synchronous)",
                later="uploading to Hugging Face comes later",
            ),
        ),
    ),
    OptionGroup(
        "Distributed training",
        (
            Option(name="ddp_timeout", type=int, help="minutes", later="settings of distributed training come later"),
            Option(
                name="ddp_gradient_as_bucket_view",
                type=FLAG,
                help="DDP flag",
                later="settings of distributed training come later",
            ),
            Option(name="ddp_static_graph", type=FLAG, help="DDP flag", later="settings of distributed training come later"),
            Option(
                name="deepspeed",
                type=FLAG,
                help="enable DeepSpeed plugin",
                later="DeepSpeed gains nothing for adapters of these model families",
            ),
            Option(
                name="zero_stage",
                type=int,
                default=2,
                choices=(0, 1, 2, 3),
                help="ZeRO stage",
                later="DeepSpeed gains nothing for adapters of these model families",
            ),
            Option(
                name="offload_optimizer_device",
                choices=("cpu", "nvme"),
                help="where that state is offloaded to",
                later="DeepSpeed gains nothing for adapters of these model families",
            ),
            Option(
                name="offload_optimizer_nvme_path",
                help="folder of the offloaded state",
                later="DeepSpeed gains nothing for adapters of these model families",
            ),
            Option(
                name="offload_param_device",
                choices=("cpu", "nvme"),
                help="where that state is offloaded to",
                later="DeepSpeed gains nothing for adapters of these model families",
            ),
            Option(
                name="offload_param_nvme_path",
                help="folder of the offloaded state",
                later="DeepSpeed gains nothing for adapters of these model families",
            ),
            Option(
                name="zero3_init_flag",
                type=FLAG,
                help="deepspeed.zero.Init",
                later="DeepSpeed gains nothing for adapters of these model families",
            ),
            Option(
                name="zero3_save_16bit_model",
                type=FLAG,
                help="16-bit save for ZeRO-3",
                later="DeepSpeed gains nothing for adapters of these model families",
            ),
            Option(
                name="fp16_master_weights_and_gradients",
                type=FLAG,
                help="fp16 masters (needs CPU offload + ZeRO-2)",
                later="DeepSpeed gains nothing for adapters of these model families",
            ),
        ),
    ),
    OptionGroup(
        "Configuration file",
        (
            Option(name="config_file", help="TOML file with any of these options; the command line wins"),
            Option(name="output_config", type=FLAG, help="write the options given to --config_file and stop"),
        ),
    ),
)
