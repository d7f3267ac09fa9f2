"""Diffusers pipelines behind one face: `Pipeline` is all that the rest of trimtab knows of a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from trimtab.batch import Condition
from trimtab.prediction import Prediction
from trimtab.process import Process
from trimtab.roles import Roles
from trimtab.solvers import Predict


class Pipeline(Protocol):
    """A text-to-image model with roles. Latents come from `posterior`, go to `decode`, and have no meaning between."""

    pipe: DiffusionPipeline
    roles: Roles
    process: Process
    device: torch.device
    precision: torch.dtype  # of its computations

    @property
    def is_student(self) -> bool:
        """Whether the model is a student, which predicts x0 and noises it afresh."""

    @property
    def num_calls(self) -> int | None:
        """How many calls the model was distilled to, if that is known."""

    @property
    def resolution(self) -> int:
        """The side in pixels that the model was made for."""

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """Shape of one sample's latents for a square picture, `resolution` pixels a side."""

    def time_grid(self, num_steps: int, resolution: int | None = None) -> Tensor:
        """Falling times (T + 1,) of the model's own scheduler."""

    def few_step_grid(self, num_steps: int, resolution: int | None = None) -> Tensor:
        """Falling times (T + 1,) at which a student of the model is called."""

    def start(self, noise: Tensor) -> Tensor:
        """What the stock pipeline's solver starts from (B, C, h, w), given standard normal noise."""

    @property
    def adds_noise(self) -> bool:
        """Whether the model's scheduler adds noise between its calls."""

    def solve(self, predict: Predict, noise: Tensor, times: Tensor, between: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) as the stock pipeline's solver makes them of standard normal noise, with `between`
        (T, B, C, h, w) after each call if the scheduler adds any."""

    def between_calls(self, noise: Tensor) -> Tensor:
        """Noise (T, B, C, h, w) put in the order in which the stock pipeline draws what it adds between calls."""

    def enable_gradient_checkpointing(self) -> None:
        """Trade compute for memory wherever a gradient passes."""

    def offload_text_encoders(self) -> None:
        """Keep them away from the accelerator while nobody asks them."""

    def encode(self, texts: Sequence[str]) -> Condition:
        """The condition of P prompts; each distinct prompt is encoded once."""

    def embed(self, texts: Sequence[str]) -> Condition:
        """The same with gradient and without memory."""

    def predict(
        self, x_t: Tensor, t: Tensor, condition: Condition, role: str, guidance_scale: float = 1.0
    ) -> Prediction:
        """What the weights of `role` say at x_t (B, ...) and t, () or (B,), for B conditions; w = 1 is no guidance."""

    def training_scale(self, guidance_scale: float) -> float:
        """The guidance under which a role is trained whose samples are drawn with `guidance_scale`."""

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the latents of pictures (B, 3, H, W) in [0, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [0, 1]."""

    def student_scheduler(self, num_calls: int, resolution: int | None = None) -> SchedulerMixin:
        """With which stock diffusers samples a student of the model."""

    def export(self, folder: Path, role: str, student: SchedulerMixin | None = None) -> None:
        """Write a role's weights as stock diffusers loads them; a LoRA as PEFT loads it, too. Those of a
        student go with the scheduler that samples it."""
