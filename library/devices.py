"""What the machine really offers: devices, number formats, attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    import torch


def best_device() -> torch.device:
    """CUDA (or ROCm), XPU, MPS, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def compute_dtype(precision: str, device: torch.device, *, where: str) -> torch.dtype:
    """The number format for a name, if the device computes in it.

    Args:
        precision: "no", "float" or "fp32"; "fp16"; "bf16".
        where: the option as it was given ("--mixed_precision fp16"); the remedy spells the other precision likewise.

    Raises:
        UserError: fp16 on a CPU, bf16 on a GPU without it.
    """
    import torch

    if precision == "fp16" and device.type == "cpu":
        remedy = f"give {where.replace('fp16', 'bf16')}, or compute in fp32"
        raise UserError("fp16 arithmetic needs a GPU, and none is used", where=where, remedy=remedy)
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("this GPU has no bf16 arithmetic", where=where, remedy=f"give {where.replace('bf16', 'fp16')}")
    return dtype_of(precision)


def dtype_of(precision: str) -> torch.dtype:
    """The torch dtype for a name of the options."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def use_xformers(denoiser: Any, device: torch.device) -> str | None:
    """Switch a diffusers model to xformers' attention; a sentence where it cannot be had and torch's own stays."""
    reason = why_no_xformers(device)
    if reason:
        return f"--xformers: {reason}, so torch's own attention (--sdpa) is used"
    denoiser.enable_xformers_memory_efficient_attention()
    return None


def why_no_xformers(device: torch.device) -> str | None:
    """Why xformers' attention cannot be used here, as the middle of a sentence; None where it can."""
    import importlib.util

    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if device.type != "cuda":
        return "xformers has no kernels for this device"
    import torch

    try:
        import xformers.ops

        query = torch.zeros(1, 8, 1, 64, device=device, dtype=torch.float16)
        xformers.ops.memory_efficient_attention(query, query, query)
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        return f"the installed xformers does not work here ({str(error).splitlines()[0]})"
    return None
