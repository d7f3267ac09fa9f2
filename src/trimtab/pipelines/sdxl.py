"""Stable Diffusion XL and SDXL-Turbo: a UNet that is told pooled text and the size of the picture beside the prompt.

Half precision overflows in SDXL's auto-encoder, which therefore always computes in float32.
"""

from collections.abc import Sequence

import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from trimtab.batch import Condition
from trimtab.pipelines import few_step, unet
from trimtab.pipelines.face import Face
from trimtab.roles import Roles
from trimtab.solvers import vp_few_step_grid


class SDXL(Face):
    """A `StableDiffusionXLPipeline` with roles over its UNet."""

    NETWORK = "unet"
    PIPELINE = StableDiffusionXLPipeline
    TARGETS = unet.ATTENTION
    HALF_VAE = False

    def __init__(self, pipe: StableDiffusionXLPipeline, roles: Roles, precision: torch.dtype):
        process = unet.process(pipe.scheduler, next(roles.network.parameters()).device)
        super().__init__(pipe, roles, precision, process, unet.kind(pipe.scheduler))
        if pipe.config.force_zeros_for_empty_prompt:
            empty = self.unconditional
            self.unconditional = Condition(torch.zeros_like(empty.tokens), torch.zeros_like(empty.pooled))

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
        """The condition of P prompts, with gradient and without memory, for whoever trains the text encoders."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            list(texts), device=self.device, do_classifier_free_guidance=False
        )
        return Condition(tokens.float(), pooled.float())

    def _output(self, role: str, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.roles(
            role,
            sample=x_t,
            timestep=self.process.timestep(t).clamp_min(0),  # what lies before the table's first row
            encoder_hidden_states=condition.tokens,
            added_cond_kwargs={"text_embeds": condition.pooled, "time_ids": self._sizes(x_t)},
            return_dict=False,
        )[0]

    def _sizes(self, x_t: Tensor) -> Tensor:
        """Original size, crop and target size (B, 6) in pixels: a whole picture of the size that it has."""
        height, width = (side * self.pipe.vae_scale_factor for side in x_t.shape[2:])
        return x_t.new_tensor([height, width, 0, 0, height, width]).expand(len(x_t), -1)
