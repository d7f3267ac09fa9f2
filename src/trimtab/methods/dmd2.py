"""Improved Distribution Matching Distillation for Fast Image Synthesis (DMD2), arXiv 2405.14867, over DMD, 2311.18828.

A student that makes a picture in K calls learns the distribution of a teacher that takes many. Both distributions are
compared after noise: a fake network follows what the student makes, and where it and the teacher denoise the student's
sample differently, the sample is pushed towards the teacher's opinion.

    (1)  x = x0_theta(x_tau, tau, c), x_tau by backward simulation (student.py);  y = alpha_t x + sigma_t eps
    (2)  r = D_real(y, c) - D_fake(y, c),  D_real guided with scale w, D_fake not
    (3)  L = mean (x - stopgrad(x + r / n))^2 / 2,  n = mean |x - D_real|, one number for each sample
    (4)  L_fake = mean |f_phi(y', t', c) - target|^2 on the student's samples, t' over the whole range

    symbol   name                   symbol   name
    w        real_guidance_scale    n        normaliser="sample"
    K        rollout.num_inference_steps     t in [min_time, max_time]

Two-time-scale updates are counted as in student.py. Departures from the authors' code:

1. `times` may be stratified over the batch, which is the default here and costs nothing; "independent" is the code's.
2. The fake is trained on fresh samples after the student moved; the code reuses those of the student's own update.
3. Clean predictions are taken in float32, the code's in float64; n is at least 1e-6.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.matching import Normaliser, normalised_direction
from trimtab.method import Loss, Stateful
from trimtab.pipelines import Pipeline
from trimtab.rewards.composite import Composite
from trimtab.student import AVERAGE, FAKE, STUDENT, Call, Student, StudentConfig, TimeMode, fake_time


class DMD2Config(StudentConfig):
    """Defaults: the authors' for SDXL in four steps."""

    name: Literal["dmd2"] = "dmd2"
    real_guidance_scale: float = Field(8.0, ge=0)
    normaliser: Normaliser = "sample"
    times: TimeMode = "stratified"


@dataclass
class DMD2:
    """The glue: the fake follows, then the student is pushed."""

    config: DMD2Config
    pipeline: Pipeline
    student: Student
    rewards: None = None

    @staticmethod
    def check_rewards(config: DMD2Config, rewards: Composite, num_calls: int) -> None:
        """UserError: there is no place for rewards here."""
        raise UserError("dmd2 trains on no reward; leave `rewards` out, or take a recipe of gndm or dmdr.")

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {role: self.pipeline.roles.parameters(role) for role in self.config.trained_roles}

    def state(self) -> dict[str, Stateful]:
        return {"roles": self.pipeline.roles}

    def collect(self, step: int) -> Iterator[Call]:
        yield from self.student.updates(step, self.config)

    def losses(self, call: Call) -> Iterator[Loss]:
        if call.network == FAKE:
            yield from self.student.fake_losses(call, partial(fake_time, self.config))
        else:
            yield from self.student.push_losses(call, self._update)

    def after_step(self, step: int) -> dict[str, float]:
        if self.config.ema_decay is not None:
            self.pipeline.roles.blend(AVERAGE, STUDENT, self.config.ema_decay)
        return {}

    def export(self, folder: Path) -> None:
        self.pipeline.export(folder, self.config.result, self.student.num_steps)

    def _update(self, x: Tensor, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 2, 3."""
        r, n, _ = self.student.direction(x, call, self.config)
        group = call.draw.group.to(x.device)
        metrics = {"direction": r.abs().mean(), "misfit": n.mean()}
        return normalised_direction(r, n, group, self.config.normaliser), metrics
