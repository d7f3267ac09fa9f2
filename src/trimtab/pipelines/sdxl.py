"""Stable Diffusion XL and SDXL-Turbo: a UNet that is told pooled text and the size of the picture beside the prompt."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from trimtab.batch import Condition
from trimtab.pipelines.unet import UNet
from trimtab.roles import Roles


class SDXL(UNet):
    """A `StableDiffusionXLPipeline` with roles over its UNet."""

    PIPELINE = StableDiffusionXLPipeline

    def __init__(self, pipe: StableDiffusionXLPipeline, roles: Roles, precision: torch.dtype):
        super().__init__(pipe, roles, precision)
        if pipe.config.force_zeros_for_empty_prompt:
            empty = self.unconditional
            self.unconditional = Condition(torch.zeros_like(empty.tokens), torch.zeros_like(empty.pooled))

    def _embed(self, texts: Sequence[str]) -> Condition:
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            list(texts), device=self.device, do_classifier_free_guidance=False
        )
        return Condition(tokens, pooled)

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
        sizes = x_t.new_zeros(len(x_t), 6)  # filled where it lies; a list would come from the CPU at every call
        sizes[:, 0::4], sizes[:, 1::4] = height, width
        return sizes
