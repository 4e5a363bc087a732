"""Options of train_network.py that say how is trained: network, optimizer, schedule, length, precision, noise, loss."""

from __future__ import annotations

import math

from library.cli.options import FLAG, Option, OptionGroup


def step_count(text: str) -> int | float:
    """A number of steps, a share below 1, or a percentage; "5%" becomes 0.05 and a whole number stays one.

    Raises:
        ValueError: with the end of a sentence.
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number of steps, share or percentage") from None
    if not math.isfinite(value) or value < 0 or (value >= 1 and (text.endswith("%") or value != int(value))):
        raise ValueError(f"{text!r} is neither a whole number of steps nor a share from 0 to 1")
    return int(value) if value >= 1 or value == 0 else value


METHOD_OPTIONS = (
    OptionGroup(
        "Network",
        (
            Option(
                name="network_module",
                help="the kind of adapter: networks.lora, or a third-party module with the interface of sd-scripts",
            ),
            Option(name="network_dim", type=int, help="rank; 4 where it is not given"),
            Option(
                name="network_alpha",
                type=float,
                default=1,
                help="the adapter is scaled by alpha / rank; 0 stands for alpha = rank",
            ),
            Option(name="network_dropout", type=float, help="drop-out inside the adapter while training, 0 to 1"),
            Option(
                name="network_args",
                many=True,
                help="more settings of the module as key=value (conv_dim=4 conv_alpha=1 ...; docs/train.md)",
            ),
            Option(name="network_weights", help="start from the weights of this adapter file"),
            Option(name="dim_from_weights", type=FLAG, help="take ranks and alphas from --network_weights"),
            Option(name="network_train_unet_only", type=FLAG, help="adapt the U-Net only"),
            Option(name="network_train_text_encoder_only", type=FLAG, help="adapt the text encoder only"),
            Option(
                name="base_weights",
                many=True,
                help="LoRA files merged into the base model before training (differential LoRA)",
                later="training on top of merged adapters comes with the merge tools",
            ),
            Option(
                name="base_weights_multiplier",
                type=float,
                many=True,
                help="one multiplier per base_weights file, missing ones = 1.0",
                later="training on top of merged adapters comes with the merge tools",
            ),
            Option(
                name="scale_weight_norms",
                type=float,
                help="after every step scale each module down to at most this norm",
            ),
            Option(name="training_comment", help="free text, stored as ss_training_comment"),
        ),
    ),
    OptionGroup(
        "Optimizer",
        (
            Option(
                name="optimizer_type",
                default="",
                help="a known name, a class of torch.optim, or a dotted path; AdamW where it is not given",
            ),
            Option(name="use_8bit_adam", type=FLAG, help="old spelling of --optimizer_type AdamW8bit"),
            Option(name="use_lion_optimizer", type=FLAG, help="old spelling of --optimizer_type Lion"),
            Option(
                name="optimizer_args",
                many=True,
                help="settings of the optimizer as key=value, in Python literals (weight_decay=0.01 betas=0.9,0.999)",
            ),
            Option(
                name="learning_rate",
                type=float,
                default=2e-06,
                help="learning rate of all parts that have none of their own; 1e-4 to 1e-3 suits a LoRA",
            ),
            Option(name="unet_lr", type=float, help="learning rate of the U-Net part; 0 leaves it as it is"),
            Option(
                name="text_encoder_lr",
                type=float,
                many=True,
                help="learning rate of the text encoders: one for all, or one for each; 0 leaves one as it is",
            ),
            Option(name="max_grad_norm", type=float, default=1.0, help="gradients are scaled down to this norm; 0: never"),
            Option(
                name="fused_backward_pass",
                type=FLAG,
                help="step each parameter as soon as its gradient is there; adapters gain nothing from it, it has no effect",
            ),
        ),
    ),
    OptionGroup(
        "Learning rate schedule",
        (
            Option(name="lr_scheduler", default="constant", help="how the learning rate changes over the run"),
            Option(
                name="lr_scheduler_type",
                default="",
                help="a class of torch.optim.lr_scheduler or a dotted path, instead of --lr_scheduler",
            ),
            Option(name="lr_scheduler_args", many=True, help="settings of that class as key=value"),
            Option(
                name="lr_warmup_steps",
                type=step_count,
                default=0,
                help='steps of warm-up: a number, a share below 1, or a percentage ("5%")',
            ),
            Option(
                name="lr_decay_steps",
                type=step_count,
                default=0,
                help="steps of decay of warmup_stable_decay, written likewise",
            ),
            Option(name="lr_scheduler_num_cycles", type=int, default=1, help="number of cosine cycles"),
            Option(name="lr_scheduler_power", type=float, default=1, help="exponent of the polynomial schedule"),
            Option(
                name="lr_scheduler_timescale",
                type=int,
                help="time scale of inverse_sqrt in steps; the warm-up where it is not given",
            ),
            Option(
                name="lr_scheduler_min_lr_ratio",
                type=float,
                help="lowest rate as a share of the highest, for cosine_with_min_lr and warmup_stable_decay",
            ),
        ),
    ),
    OptionGroup(
        "Length and batching",
        (
            Option(name="max_train_steps", type=int, default=1600, help="optimizer steps"),
            Option(name="max_train_epochs", type=int, help="epochs; wins over --max_train_steps"),
            Option(name="gradient_accumulation_steps", type=int, default=1, help="micro-batches of one optimizer step"),
            Option(name="seed", type=int, help="seed of every random draw; drawn and reported where it is not given"),
            Option(
                name="gradient_checkpointing",
                type=FLAG,
                help="compute activations again in the backward pass: less memory, about a third more time",
            ),
            Option(
                name="cpu_offload_checkpointing",
                type=FLAG,
                help="keep checkpointed activations in host memory",
                later="it belongs to newer model families",
            ),
        ),
    ),
    OptionGroup(
        "Precision and memory",
        (
            Option(
                name="mixed_precision",
                default="no",
                choices=("no", "fp16", "bf16"),
                help="number format of the base model and of its arithmetic; the adapter stays in fp32",
            ),
            Option(
                name="full_fp16",
                type=FLAG,
                help="LoRA weights and gradients in fp16 too (needs mixed_precision fp16; patches the grad scaler)",
                later="adapter weights are kept in fp32",
            ),
            Option(
                name="full_bf16",
                type=FLAG,
                help="same for bf16 (needs mixed_precision bf16)",
                later="adapter weights are kept in fp32",
            ),
            Option(
                name="fp8_base",
                type=FLAG,
                help="keep the frozen weights of U-Net and text encoder in 8 bits (float8_e4m3fn with scales)",
            ),
            Option(name="fp8_base_unet", type=FLAG, help="only those of the U-Net"),
            Option(
                name="nf4_base",
                type=FLAG,
                help="keep the frozen weights of U-Net and text encoder in 4 bits (NF4, as QLoRA does)",
                extension=True,
            ),
            Option(name="nf4_base_unet", type=FLAG, help="only those of the U-Net", extension=True),
            Option(name="no_half_vae", type=FLAG, help="run the VAE in fp32"),
            Option(
                name="lowram",
                type=FLAG,
                help="read weights straight to the device; that is always so, it has no effect",
            ),
            Option(name="highvram", type=FLAG, help="keep freed device memory; that is always so, it has no effect"),
            Option(
                name="mem_eff_attn",
                type=FLAG,
                help="old attention code of sd-scripts; torch's attention is used instead, it has no effect",
            ),
            Option(name="xformers", type=FLAG, help="use xformers' attention, where a working one is installed"),
            Option(name="sdpa", type=FLAG, help="use torch's scaled_dot_product_attention; it is the default"),
            Option(
                name="torch_compile",
                type=FLAG,
                help="pass a dynamo backend to accelerate",
                later="compilation comes later",
            ),
            Option(
                name="dynamo_backend",
                default="inductor",
                choices=(
                    "eager",
                    "aot_eager",
                    "inductor",
                    "aot_ts_nvfuser",
                    "nvprims_nvfuser",
                    "cudagraphs",
                    "ofi",
                    "fx2trt",
                    "onnxrt",
                    "tensort",
                    "ipex",
                    "tvm",
                ),
                help="which dynamo backend",
                later="compilation comes later",
            ),
        ),
    ),
    OptionGroup(
        "Noise and timesteps",
        (
            Option(name="noise_offset", type=float, help="add this times one normal draw per channel to the noise"),
            Option(
                name="noise_offset_random_strength",
                type=FLAG,
                help="draw its strength between 0 and --noise_offset for each sample",
            ),
            Option(
                name="adaptive_noise_scale",
                type=float,
                help="add this times the mean of each latent channel to the noise offset",
            ),
            Option(name="multires_noise_iterations", type=int, help="levels of pyramid noise"),
            Option(
                name="multires_noise_discount",
                type=float,
                default=0.3,
                help="weight of each level against the one before",
            ),
            Option(
                name="ip_noise_gamma",
                type=float,
                help="extra noise in the input of the U-Net that is not in its target",
            ),
            Option(
                name="ip_noise_gamma_random_strength",
                type=FLAG,
                help="draw its strength between 0 and --ip_noise_gamma for each sample",
            ),
            Option(
                name="zero_terminal_snr",
                type=FLAG,
                help="rescale the noise schedule so that the last step is pure noise; for v-prediction",
            ),
            Option(name="min_timestep", type=int, help="lowest timestep drawn, 0 to 999"),
            Option(name="max_timestep", type=int, help="end of the timesteps drawn, itself left out, 1 to 1000"),
        ),
    ),
    OptionGroup(
        "Loss",
        (
            Option(
                name="loss_type",
                default="l2",
                choices=("l1", "l2", "huber", "smooth_l1"),
                help="how the error is measured",
            ),
            Option(
                name="huber_schedule",
                default="snr",
                choices=("constant", "exponential", "snr"),
                help="how the Huber threshold follows the timestep",
            ),
            Option(name="huber_c", type=float, default=0.1, help="Huber threshold"),
            Option(name="huber_scale", type=float, default=1.0, help="factor of the threshold; not in the snr schedule"),
            Option(name="min_snr_gamma", type=float, help="Min-SNR weighting of the timesteps; 5 is usual"),
            Option(name="scale_v_pred_loss_like_noise_pred", type=FLAG, help="weight the velocity loss like a noise loss"),
            Option(name="v_pred_like_loss", type=float, help="add this share of a velocity-like weighting to a noise loss"),
            Option(name="debiased_estimation_loss", type=FLAG, help="weight timesteps by 1/sqrt(SNR) (velocity: 1/(SNR+1))"),
            Option(name="prior_loss_weight", type=float, default=1.0, help="weight of regularisation images in the loss"),
            Option(
                name="masked_loss",
                type=FLAG,
                help="enable ControlNet-style subsets so conditioning_data_dir images are used as loss mask (R channel)",
                later="masked and conditioned datasets come later",
            ),
        ),
    ),
)
