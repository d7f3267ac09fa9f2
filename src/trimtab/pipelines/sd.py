"""Stable Diffusion 1.x and 2.x, and SD-Turbo: a UNet in the latents of an auto-encoder."""

from collections.abc import Sequence

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from torch import Tensor

from trimtab.batch import Condition
from trimtab.pipelines import few_step, unet
from trimtab.pipelines.face import Face
from trimtab.roles import Roles
from trimtab.solvers import vp_few_step_grid


class SD(Face):
    """A `StableDiffusionPipeline` with roles over its UNet."""

    NETWORK = "unet"
    PIPELINE = StableDiffusionPipeline
    TARGETS = unet.ATTENTION

    def __init__(self, pipe: StableDiffusionPipeline, roles: Roles, precision: torch.dtype):
        process = unet.process(pipe.scheduler, next(roles.network.parameters()).device)
        super().__init__(pipe, roles, precision, process, unet.kind(pipe.scheduler))

    def time_grid(self, num_steps: int, resolution: int | None = None) -> Tensor:
        """Times (T + 1,) of the rows that the pipeline's own scheduler visits."""
        return unet.time_grid(self.pipe.scheduler, num_steps)

    def start(self, noise: Tensor) -> Tensor:
        """What the stock pipeline's solver starts from (B, C, h, w), given standard normal noise."""
        return unet.start(self.pipe.scheduler, noise)

    def few_step_grid(self, num_steps: int, resolution: int | None = None) -> Tensor:
        """Times (T + 1,) at which a student is called."""
        return vp_few_step_grid(num_steps, len(self.process.alphas_cumprod))

    def student_scheduler(self, num_calls: int, resolution: int | None = None) -> LCMScheduler:
        """With which stock diffusers samples a student of this model."""
        return few_step.table_scheduler(num_calls, self.pipe.scheduler.config)

    def embed(self, texts: Sequence[str]) -> Condition:
        """The condition of P prompts, with gradient and without memory, for whoever trains the text encoder."""
        tokens, _ = self.pipe.encode_prompt(list(texts), self.device, 1, do_classifier_free_guidance=False)
        return Condition(tokens.float(), None)

    def _output(self, role: str, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.roles(
            role,
            sample=x_t,
            timestep=self.process.timestep(t).clamp_min(0),  # what lies before the table's first row
            encoder_hidden_states=condition.tokens,
            return_dict=False,
        )[0]
