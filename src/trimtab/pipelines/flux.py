"""FLUX.1: an MMDiT of rectified flow with rotary positions, over 2 x 2 latents packed into one token.

FLUX.1-dev has guidance distilled into it: the scale is an input of the network, and one pass does. Latents are unpacked
everywhere but inside the network. The shift of its times grows with the size of the picture.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from trimtab.batch import Condition
from trimtab.pipelines import few_step
from trimtab.pipelines.flow import Flow
from trimtab.prediction import Prediction
from trimtab.solvers import few_step_grid

MAX_TEXT_TOKENS = 512  # of T5; the default of FluxPipeline


class Flux(Flow):
    """A `FluxPipeline` with roles over its transformer."""

    PIPELINE = FluxPipeline
    PACKED = 2

    @classmethod
    def understood(cls, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Values of a scheduler's configuration; the shift may grow with the size of the picture."""
        return super().understood(config) | {"use_dynamic_shifting": (False, True)}

    @property
    def resolution(self) -> int:
        """The side in pixels that the model was made for."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a square picture, `resolution` pixels a side."""
        side = resolution // self.pipe.vae_scale_factor
        return self.roles.network.config.in_channels // self.PACKED**2, side, side

    def time_grid(self, num_steps: int, resolution: int | None = None) -> Tensor:
        """Times (T + 1,) as the pipeline would take them: an even grid from 1 to 1/T, shifted, and 0."""
        return few_step_grid(num_steps, self._shift(resolution))

    few_step_grid = time_grid  # a student is called at the same times

    def student_scheduler(self, num_calls: int, resolution: int | None = None) -> FlowMatchEulerDiscreteScheduler:
        """With which stock diffusers samples a student of this model, which was made for one size of picture."""
        return few_step.even_flow_scheduler(num_calls, self._shift(resolution))

    def between_calls(self, noise: Tensor) -> Tensor:
        """The pipeline draws it packed: token after token."""
        channels, height, width = noise.shape[2:]
        tokens = noise.flatten(2).unflatten(2, (-1, channels * self.PACKED**2))  # (T, B, N, 4 C)
        grid = tokens.mT.unflatten(3, (height // self.PACKED, width // self.PACKED))
        return F.pixel_shuffle(grid, self.PACKED)

    def _embed(self, texts: Sequence[str]) -> Condition:
        tokens, pooled, _ = self.pipe.encode_prompt(
            list(texts), None, device=self.device, max_sequence_length=MAX_TEXT_TOKENS
        )
        return Condition(tokens, pooled)

    def predict(
        self, x_t: Tensor, t: Tensor, condition: Condition, role: str, guidance_scale: float = 1.0
    ) -> Prediction:
        """What the network says at x_t (B, C, h, w) and t, () or (B,). A scale that is an input takes one pass."""
        if not self.roles.network.config.guidance_embeds:
            return super().predict(x_t, t, condition, role, guidance_scale)
        t = t.to(x_t.device)
        value = self._forward(role, x_t, t.expand(len(x_t)), condition, guidance_scale)
        return Prediction(value, self.kind, x_t, t, self.process)

    def training_scale(self, guidance_scale: float) -> float:
        """Where the scale is an input, samples are trained under the one that they were drawn with; 1 is not "off"."""
        return guidance_scale if self.roles.network.config.guidance_embeds else 1.0

    def _output(
        self, role: str, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: float | None = None
    ) -> Tensor:
        height, width = (side // self.PACKED for side in x_t.shape[2:])
        sides = (torch.arange(side, device=x_t.device) for side in (height, width))
        rows, columns = torch.meshgrid(*sides, indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)  # (N, 3)
        packed = self.roles(
            role,
            hidden_states=F.pixel_unshuffle(x_t, self.PACKED).flatten(2).mT,  # (B, N, 4 C)
            timestep=t,
            guidance=None if guidance_scale is None else torch.full_like(t, guidance_scale),
            pooled_projections=condition.pooled,
            encoder_hidden_states=condition.tokens,
            txt_ids=x_t.new_zeros(condition.tokens.shape[1], 3),
            img_ids=places.to(x_t),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(packed.mT.unflatten(2, (height, width)), self.PACKED)

    def _shift(self, resolution: int | None) -> float:
        """exp(mu), with mu linear in the number of a picture's tokens; a student's scheduler holds it."""
        config = self.pipe.scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        side = (resolution or self.resolution) // self.pipe.vae_scale_factor // self.PACKED
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return math.exp(config.base_shift + slope * (side**2 - config.base_image_seq_len))
