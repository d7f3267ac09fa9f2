"""Stable Diffusion XL and SDXL-Turbo: a UNet that is told pooled text and the size of the picture beside the prompt.

Half precision overflows in SDXL's auto-encoder, which therefore always computes in float32.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from trimtab.batch import Condition
from trimtab.pipelines import parts, unet
from trimtab.prediction import Prediction
from trimtab.roles import Roles


class SDXL:
    """A `StableDiffusionXLPipeline` with roles over its UNet. Everything else in it is frozen."""

    NETWORK = "unet"
    PIPELINE = StableDiffusionXLPipeline
    TARGETS = unet.ATTENTION

    def __init__(self, pipe: StableDiffusionXLPipeline, roles: Roles, precision: torch.dtype):
        self.pipe, self.roles, self.precision = pipe, roles, precision
        self.device = next(roles.network.parameters()).device
        self.process = unet.process(pipe.scheduler, self.device)
        self.kind = unet.KINDS[pipe.scheduler.config.prediction_type]
        parts.leave_casts_to_autocast(roles.network, precision)
        self._memory: dict[str, Condition] = {}
        self.unconditional = self._unconditional()

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a square picture, `resolution` pixels a side."""
        return parts.latent_shape(self.pipe, self.roles.network, resolution)

    @property
    def resolution(self) -> int:
        """The side in pixels that the model was made for."""
        return self.roles.network.config.sample_size * self.pipe.vae_scale_factor

    def time_grid(self, num_steps: int) -> Tensor:
        """Times (T + 1,) of the rows that the pipeline's own scheduler visits."""
        return unet.time_grid(self.pipe.scheduler, num_steps)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Condition:
        """The condition of P prompts; each distinct prompt is encoded once."""
        return parts.remembered(self._memory, texts, self.embed)

    def embed(self, texts: Sequence[str]) -> Condition:
        """The same with gradient and without memory, for whoever trains the text encoders."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            list(texts), device=self.device, do_classifier_free_guidance=False
        )
        return Condition(tokens.float(), pooled.float())

    def predict(
        self, x_t: Tensor, t: Tensor, condition: Condition, role: str, guidance_scale: float = 1.0
    ) -> Prediction:
        """What the UNet says at x_t (B, C, h, w) and t, () or (B,), given one encoded prompt a sample."""
        t = t.to(x_t.device)
        time, output = t.expand(len(x_t)), partial(self._output, role)
        value = parts.guided_output(output, x_t, time, condition, self.unconditional, guidance_scale)
        return Prediction(value, self.kind, x_t, t, self.process)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [0, 1]."""
        return parts.decode(self.pipe.vae, latents)

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in [0, 1]: the mean of the auto-encoder's posterior."""
        return self.posterior(images)[0]

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the latents of pictures (B, 3, H, W) in [0, 1]."""
        return parts.posterior(self.pipe.vae, images)

    def export(self, folder: Path, role: str) -> None:
        """A LoRA as stock diffusers and as PEFT load it, rank and alpha included; full weights as a pipeline."""
        parts.export(self.pipe, self.NETWORK, self.roles, folder, role)

    def _unconditional(self) -> Condition:
        """What guidance leads away from: the empty prompt, or zeros where the pipeline says so."""
        empty = self.encode([""])
        if not self.pipe.config.force_zeros_for_empty_prompt:
            return empty
        return Condition(torch.zeros_like(empty.tokens), torch.zeros_like(empty.pooled))

    def _output(self, role: str, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with parts.autocast(self.device, self.precision):
            return self.roles(
                role,
                sample=x_t,
                timestep=self.process.timestep(t),
                encoder_hidden_states=condition.tokens,
                added_cond_kwargs={"text_embeds": condition.pooled, "time_ids": self._sizes(x_t)},
                return_dict=False,
            )[0].float()

    def _sizes(self, x_t: Tensor) -> Tensor:
        """Original size, crop and target size (B, 6) in pixels: a whole picture of the size that it has."""
        height, width = (side * self.pipe.vae_scale_factor for side in x_t.shape[2:])
        return x_t.new_tensor([height, width, 0, 0, height, width]).expand(len(x_t), -1)
