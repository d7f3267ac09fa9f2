"""What the UNets of Stable Diffusion share: where a LoRA goes, and a DDPM's table of noise with its times.

A scheduler is asked for its table, for what the network predicts, and for the rows that it visits. The steps between
them are those of `solvers`: along one list of rows DDIM and Euler are the same, and PNDM visits the second row twice.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from torch import Tensor

from trimtab.errors import UserError
from trimtab.prediction import Kind
from trimtab.process import NUM_TIMESTEPS, VariancePreserving
from trimtab.solvers import vp_few_step_grid, vp_time_grid

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v"}  # diffusers' word -> that of `Prediction`
Scheduler = DDIMScheduler | PNDMScheduler | EulerDiscreteScheduler | EulerAncestralDiscreteScheduler | LCMScheduler
SCHEDULERS = {
    "DDIMScheduler": DDIMScheduler,
    "PNDMScheduler": PNDMScheduler,
    "EulerDiscreteScheduler": EulerDiscreteScheduler,
    "EulerAncestralDiscreteScheduler": EulerAncestralDiscreteScheduler,
    "LCMScheduler": LCMScheduler,
}
UNDERSTOOD = {  # values of a scheduler's configuration; any other would move the times away from the table's rows
    "prediction_type": tuple(KINDS),
    "timestep_spacing": ("leading", "trailing"),
    "timestep_type": ("discrete",),
    "interpolation_type": ("linear",),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
}


def check_scheduler(name: str | None, config: Mapping[str, Any], model: str) -> None:
    """UserError unless class and configuration of a model's scheduler are such that its times are known.

    Only keys that the class reads are judged: a file also keeps those of the classes that it was converted from.
    """
    if name not in SCHEDULERS:
        raise UserError(f"model {model!r} has a {name}; give it one of {', '.join(SCHEDULERS)}.")
    for key, parameter in inspect.signature(SCHEDULERS[name]).parameters.items():
        value = config.get(key, parameter.default)
        if name == "LCMScheduler" and key == "original_inference_steps":
            known = (config.get("num_train_timesteps", NUM_TIMESTEPS),)  # or its rows would be others than a student's
        else:
            known = UNDERSTOOD.get(key, (value,))
        if value not in known:
            known = " or ".join(repr(each) for each in known if each is not None)
            raise UserError(
                f"the scheduler of model {model!r} has {key}={value!r} and trimtab needs {known}; "
                "take another model, or save it with another scheduler."
            )


def process(scheduler: Scheduler, device: torch.device) -> VariancePreserving:
    """The scheduler's table as a noise process."""
    return VariancePreserving(scheduler.alphas_cumprod.to(device))


def kind(scheduler: Scheduler) -> Kind:
    """What the network predicts."""
    return KINDS[scheduler.config.prediction_type]


def time_grid(scheduler: Scheduler, num_steps: int) -> Tensor:
    """Times (T + 1,) of the rows that the scheduler visits."""
    config = scheduler.config
    size = len(scheduler.alphas_cumprod)
    if isinstance(scheduler, LCMScheduler):
        return vp_few_step_grid(num_steps, size)
    return vp_time_grid(num_steps, size, config.timestep_spacing, config.steps_offset, _ends_clean(scheduler))


def start(scheduler: Scheduler, noise: Tensor) -> Tensor:
    """Where the scheduler starts, in the units of the table. Euler's with trailing rows, as the Turbo models have it,
    puts sigma times the noise in and no data, 0.9977 of unit size at row 999; all others unit size."""
    euler = isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler)
    if not euler or scheduler.config.timestep_spacing != "trailing":
        return noise
    return noise * (1 - scheduler.alphas_cumprod[-1]).sqrt().item()


def _ends_clean(scheduler: Scheduler) -> bool:
    """Whether the last step leads to clean data, or else to the first row. Euler may have DDIM's key and ignores it."""
    if isinstance(scheduler, DDIMScheduler | PNDMScheduler):
        return scheduler.config.set_alpha_to_one
    return isinstance(scheduler, EulerAncestralDiscreteScheduler) or scheduler.config.final_sigmas_type == "zero"
