"""Samplers by the names of sd-scripts, each a diffusers scheduler with the betas Stable Diffusion was trained with.

Settings are those of Stable Diffusion's own scheduler files: clip_sample off (latents leave [-1, 1]; sd-scripts' previews
clip them, its generator does not), steps_offset 1, the alpha after the last step that of timestep 0, and PNDM without its
Runge-Kutta start. diffusers is imported when a sampler is made, so that a door can list the names at no cost.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.errors import UserError, near_names
from library.families.family import NOISE_SCHEDULE

BETAS = {name: NOISE_SCHEDULE[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")}
# In place of 0 for the last step of zero terminal SNR: sigma is finite (4096) for samplers that count in sigmas.
LEAST_ALPHA_CUMPROD = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One row of the table.

    Attributes:
        scheduler: class name in diffusers.
        title: the name in web interfaces, for the `parameters` text of a PNG.
        settings: of the scheduler's constructor, beside the betas and the prediction type.
    """

    scheduler: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)


OFFSET = {"steps_offset": 1}
SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(
        scheduler="DDIMScheduler",
        title="DDIM",
        settings=OFFSET | {"clip_sample": False, "set_alpha_to_one": False},
    ),
    "pndm": Sampler(
        scheduler="PNDMScheduler",
        title="PLMS",
        settings=OFFSET | {"skip_prk_steps": True, "set_alpha_to_one": False},
    ),
    "lms": Sampler(scheduler="LMSDiscreteScheduler", title="LMS", settings=OFFSET),
    "euler": Sampler(scheduler="EulerDiscreteScheduler", title="Euler", settings=OFFSET),
    "euler_a": Sampler(scheduler="EulerAncestralDiscreteScheduler", title="Euler a", settings=OFFSET),
    "heun": Sampler(scheduler="HeunDiscreteScheduler", title="Heun", settings=OFFSET),
    "dpm_2": Sampler(scheduler="KDPM2DiscreteScheduler", title="DPM2", settings=OFFSET),
    "dpm_2_a": Sampler(scheduler="KDPM2AncestralDiscreteScheduler", title="DPM2 a", settings=OFFSET),
    "dpmsolver": Sampler(
        scheduler="DPMSolverMultistepScheduler",
        title="DPM-Solver 2M",
        # The last step of plain DPM-Solver cannot go to sigma 0, only to that of timestep 0.
        settings=OFFSET | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": Sampler(
        scheduler="DPMSolverMultistepScheduler",
        title="DPM++ 2M",
        settings=OFFSET | {"algorithm_type": "dpmsolver++"},
    ),
    "dpmsingle": Sampler(
        scheduler="DPMSolverSinglestepScheduler",
        title="DPM++ 2S",
        settings={"lower_order_final": True},
    ),
}
SAMPLERS |= {f"k_{name}": SAMPLERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}


def find_sampler(name: str, *, where: str | None = None) -> Sampler:
    """The row of a name.

    Raises:
        UserError: no such name; answered with the near ones.
    """
    if name not in SAMPLERS:
        raise UserError(f"no sampler is called {name!r}", where=where, remedy=near_names(name, SAMPLERS))
    return SAMPLERS[name]


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
    import diffusers

    sampler = find_sampler(name)
    betas: dict[str, Any] = dict(BETAS)
    if zero_terminal_snr:
        betas["trained_betas"] = _zero_terminal_betas()
        if name in ("ddim", "pndm"):  # the others begin at the last timestep as they are
            betas["timestep_spacing"] = "trailing"
    kind = _exact_lms() if sampler.scheduler == "LMSDiscreteScheduler" else getattr(diffusers, sampler.scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # plain DPM-Solver is to leave diffusers 1.0
        scheduler = kind(**betas, **sampler.settings, prediction_type=prediction_type)
    scheduler.set_timesteps(steps, device=device)
    if not scheduler.timesteps.isfinite().all():  # seen for dpm_2_a at 2 steps of zero terminal SNR
        raise UserError(f"the sampler {name} has no schedule of {steps} steps", remedy="take more steps")
    return scheduler


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

    The integrand is a polynomial of degree order - 1 <= 3, which two Gauss-Legendre points integrate without error.
    """
    # From its module: where scipy is missing, `diffusers` itself has a stand-in that cannot be made.
    from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

    class ExactLMS(LMSDiscreteScheduler):
        def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
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
