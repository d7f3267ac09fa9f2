"""Stable Diffusion 1.x and 2.x, and SD-Turbo: a UNet in the latents of an auto-encoder."""

from collections.abc import Sequence

from diffusers import StableDiffusionPipeline
from torch import Tensor

from trimtab.batch import Condition
from trimtab.pipelines.unet import UNet


class SD(UNet):
    """A `StableDiffusionPipeline` with roles over its UNet."""

    PIPELINE = StableDiffusionPipeline

    def _embed(self, texts: Sequence[str]) -> Condition:
        tokens, _ = self.pipe.encode_prompt(list(texts), self.device, 1, do_classifier_free_guidance=False)
        return Condition(tokens, None)

    def _output(self, role: str, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.roles(
            role,
            sample=x_t,
            timestep=self.process.timestep(t).clamp_min(0),  # what lies before the table's first row
            encoder_hidden_states=condition.tokens,
            return_dict=False,
        )[0]
