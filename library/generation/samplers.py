"""Samplers by the names of sd-scripts and web UIs, each a diffusers scheduler with the betas of Stable Diffusion.

Settings are those of Stable Diffusion's own scheduler files: clip_sample off (latents leave [-1, 1]; sd-scripts' previews
clip them, its generator does not), steps_offset 1, the alpha after the last step that of timestep 0, and PNDM without its
Runge-Kutta start. What stands for which sampler of web UIs is as the documentation of diffusers has it
(https://huggingface.co/docs/diffusers/api/schedulers/overview). diffusers is imported when a sampler is made, so that a door
can list the names at no cost.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from library.errors import UserError, near_names
from library.families.family import NOISE_SCHEDULE

if TYPE_CHECKING:
    from torch import Tensor

BETAS = {name: NOISE_SCHEDULE[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")}
# In place of 0 for the last step of zero terminal SNR: sigma is finite (4096) for samplers that count in sigmas.
LEAST_ALPHA_CUMPROD = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One row of the table.

    Attributes:
        scheduler: class name in diffusers.
        title: the name in web UIs, without its schedule.
        settings: of the scheduler's constructor, beside the betas and the prediction type.
        schedule: name of the schedule in web UIs; empty for the sampler's plain one.
        automatic: the schedule that A1111's web UI takes for the sampler where it is left to choose.
        other_names: further ones that programs have for it, without a schedule.
        schedules: which others it has beside the plain one: names of `SCHEDULES`.
        most_steps: its schedule has no more.
    """

    scheduler: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = ""
    automatic: str = ""
    other_names: tuple[str, ...] = ()
    schedules: tuple[str, ...] = ()
    most_steps: int | None = None


SCHEDULES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "karras": ("Karras", {"use_karras_sigmas": True}),
    "exponential": ("Exponential", {"use_exponential_sigmas": True}),
    "sgm_uniform": ("SGM Uniform", {"timestep_spacing": "trailing"}),
}
"""What follows a sampler's name -> the schedule's name in web UIs, and the setting."""
_ALL = tuple(SCHEDULES)
_OF_SIGMAS = ("karras", "exponential")
_TRAILING = ("sgm_uniform",)

OFFSET = {"steps_offset": 1}
_CONSISTENCY_STEPS = 50  # of the schedule that LCM and TCD models were distilled on
_PLAIN: Mapping[str, Sampler] = {
    "ddim": Sampler(
        scheduler="DDIMScheduler",
        title="DDIM",
        settings=OFFSET | {"clip_sample": False, "set_alpha_to_one": False},
        schedules=_TRAILING,
    ),
    "pndm": Sampler(
        scheduler="PNDMScheduler",
        title="PLMS",
        settings=OFFSET | {"skip_prk_steps": True, "set_alpha_to_one": False},
    ),
    "lms": Sampler(scheduler="LMSDiscreteScheduler", title="LMS", settings=OFFSET, schedules=_ALL),
    "euler": Sampler(scheduler="EulerDiscreteScheduler", title="Euler", settings=OFFSET, schedules=_ALL),
    "euler_a": Sampler(
        scheduler="EulerAncestralDiscreteScheduler",
        title="Euler a",
        settings=OFFSET,
        other_names=("euler_ancestral",),
        schedules=_TRAILING,
    ),
    "heun": Sampler(scheduler="HeunDiscreteScheduler", title="Heun", settings=OFFSET, schedules=_ALL),
    "dpm_2": Sampler(scheduler="KDPM2DiscreteScheduler", title="DPM2", settings=OFFSET, automatic="karras", schedules=_ALL),
    "dpm_2_a": Sampler(
        scheduler="KDPM2AncestralDiscreteScheduler",
        title="DPM2 a",
        settings=OFFSET,
        automatic="karras",
        other_names=("dpm_2_ancestral",),
        schedules=_ALL,
    ),
    "dpmsolver": Sampler(
        scheduler="DPMSolverMultistepScheduler",
        title="DPM-Solver 2M",
        # The last step of plain DPM-Solver cannot go to sigma 0, only to that of timestep 0.
        settings=OFFSET | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        schedules=_ALL,
    ),
    "dpmsolver++": Sampler(
        scheduler="DPMSolverMultistepScheduler",
        title="DPM++ 2M",
        settings=OFFSET | {"algorithm_type": "dpmsolver++"},
        automatic="karras",
        other_names=("dpmpp_2m",),
        schedules=_ALL,
    ),
    "dpmsolver++_sde": Sampler(
        scheduler="DPMSolverMultistepScheduler",
        title="DPM++ 2M SDE",
        settings=OFFSET | {"algorithm_type": "sde-dpmsolver++"},
        automatic="exponential",
        other_names=("dpmpp_2m_sde",),
        schedules=_ALL,
    ),
    "dpmsolver++_sde_heun": Sampler(
        scheduler="DPMSolverMultistepScheduler",
        title="DPM++ 2M SDE Heun",
        settings=OFFSET | {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        automatic="exponential",
        other_names=("dpmpp_2m_sde_heun",),
        schedules=_ALL,
    ),
    "dpmsolver++_3m_sde": Sampler(
        scheduler="DPMSolverMultistepScheduler",
        title="DPM++ 3M SDE",
        settings=OFFSET | {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        automatic="exponential",
        other_names=("dpmpp_3m_sde",),
        schedules=_ALL,
    ),
    "dpmsingle": Sampler(
        scheduler="DPMSolverSinglestepScheduler",
        title="DPM++ 2S",
        settings={"lower_order_final": True},
        schedules=_OF_SIGMAS,
    ),
    "dpmsingle_sde": Sampler(
        scheduler="DPMSolverSinglestepScheduler",
        title="DPM++ SDE",
        settings={"lower_order_final": True, "algorithm_type": "sde-dpmsolver++"},
        automatic="karras",
        other_names=("dpmpp_sde",),
        schedules=_OF_SIGMAS,
    ),
    "uni_pc": Sampler(scheduler="UniPCMultistepScheduler", title="UniPC", settings=OFFSET, schedules=_ALL),
    "deis": Sampler(scheduler="DEISMultistepScheduler", title="DEIS", settings=OFFSET, schedules=_ALL),
    "ddpm": Sampler(scheduler="DDPMScheduler", title="DDPM", settings=OFFSET | {"clip_sample": False}),
    "lcm": Sampler(
        scheduler="LCMScheduler",
        title="LCM",
        settings={"original_inference_steps": _CONSISTENCY_STEPS, "set_alpha_to_one": False},
        most_steps=_CONSISTENCY_STEPS,
    ),
    "tcd": Sampler(
        scheduler="TCDScheduler",
        title="TCD",
        settings={"original_inference_steps": _CONSISTENCY_STEPS, "set_alpha_to_one": False},
        most_steps=_CONSISTENCY_STEPS,
    ),
}
_FROM_SMALL_TIMESTEPS = ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler")
"""Schedulers whose own schedule begins below the last timestep."""


def _with_schedules() -> Iterator[tuple[str, Sampler]]:
    for name, plain in _PLAIN.items():
        yield name, plain
        for schedule in plain.schedules:
            title, setting = SCHEDULES[schedule]
            yield f"{name}_{schedule}", replace(plain, schedule=title, settings={**plain.settings, **setting})


SAMPLERS: dict[str, Sampler] = dict(_with_schedules())
"""Name -> sampler; those of sd-scripts before k-diffusion's were in diffusers are the same rows once more."""
SAMPLERS |= {f"k_{name}": SAMPLERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}

_MISSING = {
    "DPM++ 2S a": "diffusers has no ancestral form of DPM++ 2S",
    "DPM fast": "diffusers has no such sampler",
    "DPM adaptive": "diffusers has no such sampler",
    "Restart": "diffusers has no such sampler",
}
"""Samplers of web UIs that nothing stands for."""
_MISSING_SCHEDULES = {
    "Beta": "needs scipy",
    "Polyexponential": "is not in diffusers",
    "KL Optimal": "is not in diffusers",
    "Align Your Steps": "is not in diffusers",
    "Turbo": "is not in diffusers",
}


def _plain_spelling(name: str) -> str:
    """In small letters and with "_" for spaces: "DPM++ 2M Karras" is "dpm++_2m_karras"."""
    return "_".join(name.lower().replace("_", " ").split())


def _spellings() -> Iterator[tuple[str, str]]:
    """Every name that is understood, spelt plainly -> the name in the table."""
    for name, sampler in SAMPLERS.items():
        end = f"_{sampler.schedule}" if sampler.schedule else ""
        for spelling in (sampler.title, *sampler.other_names, *(f"k_{other}" for other in sampler.other_names)):
            yield _plain_spelling(spelling + end), name.removeprefix("k_")
        yield _plain_spelling(name), name.removeprefix("k_")


_NAMES = dict(_spellings())


def canonical(name: str, *, where: str | None = None) -> str:
    """The name in the table of any name that a sampler has here or in web UIs, in small letters or capitals.

    >>> canonical("DPM++ 2M Karras")
    'dpmsolver++_karras'

    Raises:
        UserError: no such name, answered with the near ones; or a sampler that diffusers has not, with the reason.
    """
    spelling = _plain_spelling(name)
    if spelling in _NAMES:
        return _NAMES[spelling]
    for schedule, why in _MISSING_SCHEDULES.items():
        begin = spelling.removesuffix(f"_{_plain_spelling(schedule)}")
        if begin != spelling and begin in _NAMES:
            remedy = f"use the sampler {_NAMES[begin]}, alone or with {', '.join(SCHEDULES)}"
            raise UserError(f"the schedule {schedule} of the sampler {name!r} {why}", where=where, remedy=remedy)
    for title, why in _MISSING.items():
        if f"{spelling}_".startswith(f"{_plain_spelling(title)}_"):
            raise UserError(f"the sampler {name!r} is not available: {why}", where=where, remedy="use another sampler")
    near = near_names(spelling, _NAMES)
    remedy = near if near.startswith("did you mean") else near_names(name, _PLAIN)
    raise UserError(f"no sampler is called {name!r}", where=where, remedy=remedy)


def find_sampler(name: str, *, where: str | None = None) -> Sampler:
    """The row of a name; see `canonical`."""
    return SAMPLERS[canonical(name, where=where)]


def make_scheduler(
    name: str, *, steps: int, prediction_type: str, zero_terminal_snr: bool = False, device: Any = None
) -> Any:
    """A diffusers scheduler, set to a number of steps.

    Args:
        steps: of the sampler; heun, dpm_2 and dpm_2_a call the model twice for each.
        prediction_type: "epsilon" or "v_prediction".
        zero_terminal_snr: sample as models trained with --zero_terminal_snr need: rescaled betas, starting at the last
            timestep (arXiv:2305.08891, sec. 3.1 and 3.3).
    """
    sampler = find_sampler(name)
    if sampler.most_steps is not None and steps > sampler.most_steps:
        remedy = f"give {sampler.most_steps} or fewer"
        raise UserError(f"{steps} steps are more than the sampler {name} has", remedy=remedy)
    scheduler = deepcopy(_unused_scheduler(canonical(name), prediction_type, zero_terminal_snr))
    scheduler.set_timesteps(steps, device=device)
    if zero_terminal_snr:  # logarithms of sigma may have rounded it down
        scheduler.timesteps[0] = BETAS["num_train_timesteps"] - 1
    if not scheduler.timesteps.isfinite().all():  # seen for dpm_2_a at 2 steps of zero terminal SNR
        raise UserError(f"the sampler {name} has no schedule of {steps} steps", remedy="take more steps")
    return scheduler


@cache
def _unused_scheduler(name: str, prediction_type: str, zero_terminal_snr: bool) -> Any:
    """One to copy: some take a good part of a second to make."""
    import diffusers

    sampler = SAMPLERS[name]
    settings: dict[str, Any] = BETAS | dict(sampler.settings)
    if zero_terminal_snr:
        settings["trained_betas"] = _zero_terminal_betas()
        if sampler.scheduler in _FROM_SMALL_TIMESTEPS:
            settings["timestep_spacing"] = "trailing"
    kind = _exact_lms() if sampler.scheduler == "LMSDiscreteScheduler" else getattr(diffusers, sampler.scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # plain DPM-Solver is to leave diffusers 1.0
        return kind(**settings, prediction_type=prediction_type)


def denoising_timesteps(scheduler: Any, strength: float, steps: int) -> Tensor:
    """The timesteps that are left to sample from a picture with noise on it, and the scheduler told to begin there.

    As diffusers' StableDiffusionImg2ImgPipeline.get_timesteps counts them.

    Args:
        scheduler: set to `steps` steps.
        strength: 0 to 1, the share of the steps, rounded down to whole ones; 1 is all of them.

    Returns:
        A part of `scheduler.timesteps`, empty where the share is less than a step.
    """
    start = (steps - min(int(steps * strength), steps)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return scheduler.timesteps[start:]


def takes_generator(scheduler: Any) -> bool:
    """Whether the scheduler draws noise on the way, and from whose generator."""
    import inspect

    return "generator" in inspect.signature(scheduler.step).parameters


def _zero_terminal_betas() -> list[float]:
    import torch

    from library.diffusion.schedule import NoiseSchedule

    alphas_cumprod = NoiseSchedule.scaled_linear(zero_terminal_snr=True).alphas_cumprod.double()
    alphas_cumprod = alphas_cumprod.clamp(min=LEAST_ALPHA_CUMPROD)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return (1 - alphas_cumprod / before).tolist()


def _exact_lms() -> type:
    """LMS with its coefficients integrated exactly; diffusers' own needs scipy for a numerical integral.

    The integrand is a polynomial of degree order - 1 <= 3, which two Gauss-Legendre points integrate without error. Where
    sampling begins in the middle of the schedule, the order rises from 1 as it does at its beginning; diffusers' takes the
    coefficients of derivatives that there are not yet into account, and misses.
    """
    # From its module: where scipy is missing, `diffusers` itself has a stand-in that cannot be made.
    from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

    class ExactLMS(LMSDiscreteScheduler):
        def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
            order = min(order, len(self.derivatives))
            if current_order >= order:
                return 0.0
            sigmas = [float(self.sigmas[t - k]) for k in range(order)]
            start, end = sigmas[0], float(self.sigmas[t + 1])
            middle, half = (start + end) / 2, (end - start) / 2
            return half * sum(_lagrange_basis(middle + side * half / 3**0.5, sigmas, current_order) for side in (-1.0, 1.0))

    return ExactLMS


def _lagrange_basis(x: float, nodes: list[float], index: int) -> float:
    """The polynomial through 1 at nodes[index] and 0 at the other nodes, at x."""
    value = 1.0
    for other, node in enumerate(nodes):
        if other != index:
            value *= (x - node) / (nodes[index] - node)
    return value
