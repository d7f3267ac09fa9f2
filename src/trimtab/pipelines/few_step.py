"""Schedulers with which stock diffusers samples a few-step student, and how such a student is recognised by them.

A student predicts x0 and noises it afresh (`solvers.few_step`). For a DDPM's table that is diffusers' LCMScheduler. For
rectified flow it is FlowMatchEulerDiscreteScheduler with stochastic_sampling, whose K default times run down to almost
0, while a student's end at 1/K, before the shift. Stretched so that they end there, with a smaller shift, they are the
student's, exactly: both lists are Moebius maps of an even grid, and the shift is where such a map has its pole.
"""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from trimtab.process import NUM_TIMESTEPS

NUM_CALLS = "_num_inference_steps"  # our key in a scheduler's configuration; diffusers keeps it and does not read it


def flow_scheduler(num_calls: int, shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Its `num_calls` default times are those of `solvers.few_step_grid(num_calls, shift)`."""
    last = shift / num_calls / (1 + (shift - 1) / num_calls)
    stretched: dict[str, Any] = {"shift": shift}
    if num_calls > 1:
        stretched = {"shift": _shift_before_stretching(num_calls, shift), "shift_terminal": last}
    return _marked(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, **stretched), num_calls)


def even_flow_scheduler(num_calls: int, shift: float) -> FlowMatchEulerDiscreteScheduler:
    """The same for a pipeline that gives its scheduler the even grid itself, as FLUX's does."""
    return _marked(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=shift), num_calls)


def table_scheduler(num_calls: int, config: dict[str, Any]) -> LCMScheduler:
    """The same for the table and the kind of prediction of another scheduler's configuration."""
    size = config.get("num_train_timesteps", NUM_TIMESTEPS)
    return _marked(LCMScheduler.from_config(config, original_inference_steps=size, clip_sample=False), num_calls)


def is_few_step(scheduler: Any) -> bool:
    """Whether a pipeline with this scheduler is sampled by predicting x0 and noising it afresh."""
    return isinstance(scheduler, LCMScheduler) or bool(scheduler.config.get("stochastic_sampling"))


def num_calls(scheduler: Any) -> int | None:
    """How many calls a student was made for; None for a model that is none of ours."""
    return scheduler.config.get(NUM_CALLS)


def times_of(scheduler: FlowMatchEulerDiscreteScheduler, num_calls: int) -> Tensor:
    """Falling times (T + 1,) at which a student of rectified flow is called."""
    if num_calls == 1:
        return torch.tensor([1.0, 0.0])  # to which nothing can be stretched
    scheduler.set_timesteps(num_calls)
    return scheduler.sigmas.clone()


def _marked(scheduler: Any, num_calls: int) -> Any:
    scheduler.register_to_config(**{NUM_CALLS: num_calls})
    return scheduler


def _shift_before_stretching(num_calls: int, shift: float) -> float:
    """k for which the scheduler's grid from 1 to m(1/1000), m(s) = k s / (1 + (k - 1) s), shifted by m and stretched to
    end where it must, is the even grid from 1 to 1/K shifted by `shift`."""
    if shift == 1:
        return 1.0
    k = shift
    for _ in range(100):  # the end of the grid depends on k, by less than k / 1000
        lowest = k / NUM_TIMESTEPS / (1 + (k - 1) / NUM_TIMESTEPS)
        pole = 1 - shift / (shift - 1) * num_calls / (num_calls - 1) * (1 - lowest)
        k = 1 - 1 / pole
    return k
