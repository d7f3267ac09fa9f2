"""Diffusers pipelines behind one face: `Pipeline` is all that the rest of trimtab knows of a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trimtab.batch import Condition
from trimtab.prediction import Prediction
from trimtab.process import Process
from trimtab.roles import Roles


class Pipeline(Protocol):
    """A text-to-image model with roles. Latents are its own business outside `encode_images` and `decode`."""

    roles: Roles
    process: Process
    device: torch.device

    @property
    def resolution(self) -> int:
        """The side in pixels that the model was made for."""

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """Shape of one sample's latents for a square picture, `resolution` pixels a side."""

    def time_grid(self, num_steps: int) -> Tensor:
        """Falling times (T + 1,) of the model's own scheduler."""

    def encode(self, texts: Sequence[str]) -> Condition:
        """The condition of P prompts."""

    def predict(
        self, x_t: Tensor, t: Tensor, condition: Condition, role: str, guidance_scale: float = 1.0
    ) -> Prediction:
        """What the weights of `role` say at x_t (B, ...) and t, () or (B,), for B conditions; w = 1 is no guidance."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [0, 1]."""

    def export(self, folder: Path, role: str) -> None:
        """Write a role's weights as stock diffusers loads them; a LoRA as PEFT loads it, too."""
