"""What the UNets of Stable Diffusion share: where a LoRA goes, and a DDPM's table of noise with its times.

A scheduler is asked for its table, for what the network predicts, and for the rows that it visits. The steps between
them are those of `solvers`: along one list of rows DDIM and Euler are the same, PNDM is `plms`, and ancestral Euler a
DDPM. (Rollouts follow all of them by DDIM, whose one call is the same.)
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from torch import Tensor

from trimtab.pipelines import few_step
from trimtab.pipelines.face import Face
from trimtab.prediction import Kind
from trimtab.process import NUM_TIMESTEPS, VariancePreserving
from trimtab.roles import Roles
from trimtab.solvers import Predict, ancestral, ode, plms, vp_few_step_grid, vp_time_grid

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v"}  # diffusers' word -> that of `Prediction`
Scheduler = DDIMScheduler | PNDMScheduler | EulerDiscreteScheduler | EulerAncestralDiscreteScheduler | LCMScheduler
UNDERSTOOD = {  # values of a scheduler's configuration; any other would move the times away from the table's rows
    "prediction_type": tuple(KINDS),
    "timestep_spacing": ("leading", "trailing"),
    "timestep_type": ("discrete",),
    "interpolation_type": ("linear",),
    "skip_prk_steps": (True,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
}


class UNet(Face):
    """A pipeline with roles over its UNet. A family adds how it embeds prompts and what else its UNet is told."""

    NETWORK = "unet"
    TARGETS = ATTENTION
    SCHEDULERS = (
        DDIMScheduler,
        PNDMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        LCMScheduler,
    )

    def __init__(self, pipe: DiffusionPipeline, roles: Roles, precision: torch.dtype):
        noise = process(pipe.scheduler, next(roles.network.parameters()).device)
        super().__init__(pipe, roles, precision, noise, KINDS[pipe.scheduler.config.prediction_type])

    @classmethod
    def understood(cls, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Values of a scheduler's configuration at which its times are known: LCM's, if they are of the whole table."""
        return UNDERSTOOD | {"original_inference_steps": (config.get("num_train_timesteps", NUM_TIMESTEPS),)}

    def time_grid(self, num_steps: int, resolution: int | None = None) -> Tensor:
        """Falling times of the rows that the pipeline's own scheduler visits."""
        return time_grid(self.pipe.scheduler, num_steps)

    def few_step_grid(self, num_steps: int, resolution: int | None = None) -> Tensor:
        """Times (T + 1,) at which a student is called."""
        return vp_few_step_grid(num_steps, len(self.process.alphas_cumprod))

    def student_scheduler(self, num_calls: int, resolution: int | None = None) -> LCMScheduler:
        """With which stock diffusers samples a student of this model."""
        return few_step.table_scheduler(num_calls, self.pipe.scheduler.config)

    def start(self, noise: Tensor) -> Tensor:
        """Where the scheduler starts, in the units of the table. Euler's with trailing rows, as the Turbo models have
        it, puts sigma times the noise in and no data, 0.9977 of unit size at row 999; all others unit size."""
        scheduler = self.pipe.scheduler
        euler = isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler)
        if not euler or scheduler.config.timestep_spacing != "trailing":
            return noise
        return noise * (1 - scheduler.alphas_cumprod[-1]).sqrt().item()

    @property
    def adds_noise(self) -> bool:
        """Whether the model's scheduler adds noise between its calls, as those of the Turbo models do."""
        return isinstance(self.pipe.scheduler, EulerAncestralDiscreteScheduler)

    def solve(self, predict: Predict, noise: Tensor, times: Tensor, between: Tensor) -> Tensor:
        """PNDM's multistep or a DDPM's noise where the model has it, else one step after the other.

        Where PNDM ends in its last call's own row (steps_offset=0, set_alpha_to_one=False), two steps become one.
        """
        if self.adds_noise:
            return ancestral(predict, self.start(noise), times, between)
        follow = plms if isinstance(self.pipe.scheduler, PNDMScheduler) else ode
        return follow(predict, self.start(noise), times)


def process(scheduler: Scheduler, device: torch.device) -> VariancePreserving:
    """The scheduler's table as a noise process."""
    return VariancePreserving(scheduler.alphas_cumprod.to(device))


def time_grid(scheduler: Scheduler, num_steps: int) -> Tensor:
    """Falling times of the rows that the scheduler visits, and where it ends."""
    config = scheduler.config
    size = len(scheduler.alphas_cumprod)
    if isinstance(scheduler, LCMScheduler):
        return vp_few_step_grid(num_steps, size)
    return vp_time_grid(num_steps, size, config.timestep_spacing, config.steps_offset, _ends_clean(scheduler))


def _ends_clean(scheduler: Scheduler) -> bool:
    """Whether the last step leads to clean data, or else to the first row. Euler may have DDIM's key and ignores it."""
    if isinstance(scheduler, DDIMScheduler | PNDMScheduler):
        return scheduler.config.set_alpha_to_one
    return isinstance(scheduler, EulerAncestralDiscreteScheduler) or scheduler.config.final_sigmas_type == "zero"
