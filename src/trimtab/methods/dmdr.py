"""DMDR, distribution matching distillation with reinforcement learning, arXiv 2511.13649, after its public code.

The fake and the teacher share one guidance network, the frozen base with one LoRA: fully on it is the fake, partly on
the teacher of the moment. Early on the two overlap and are compared where noise is high; then the teacher walks back
to the base. A reward is added to the loss once the student can draw.

    (1)  fake = base + 2 LoRA,  real = base + s(i) LoRA,  s(i) = s_0 (1 + cos(pi i / n)) / 2 until i = n, then 0
    (2)  t ~ Beta(a(i), b(i)): (4, 1.5) at first, mostly noise, to (1, 1), uniform, by the same cosine; fake and real
    (3)  L = mean (x - stopgrad(x + r / n))^2 / 2 + weight * ( - R(decode(x)) ),  the second from `reward_start` on

    symbol   name                   symbol   name
    s_0      dynamic_guidance       n        dynamic_steps
    weight   rewards

r, n and everything else are dmd2.py's. Departures from the code, which is for ImageNet and SiT:

1. The LoRA is on the modules that the recipe names, not on queries and values only, and the 2 is part of its alpha.
2. Inputs of the trained call are made by backward simulation, with one call for a batch (student.py).
3. Times are drawn evenly over the batch, through the quantiles of (2).
4. The reward is any that has a gradient; the code's is the cross-entropy of a classifier.
5. Times of (2) are mapped into [min_time, max_time], for the fake as well.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from scipy.stats import beta
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.matching import normalised_direction
from trimtab.method import Loss, Stateful
from trimtab.pipelines import Pipeline
from trimtab.rewards.composite import Composite
from trimtab.student import AVERAGE, FAKE, STUDENT, Call, Student, StudentConfig, TimeMode

SHARE = 2.0  # of the LoRA in the fake; the teacher's share s is that large a part of it


class DMDRConfig(StudentConfig):
    """Defaults: the code's for ImageNet; its guidance is for classes, so ours is SD3.5-M's."""

    name: Literal["dmdr"] = "dmdr"
    real_guidance_scale: float = Field(4.5, ge=0)
    normaliser: Literal["sample"] = "sample"
    fake_times: Literal["uniform"] = "uniform"  # of the levels; (2) bends them
    times: TimeMode = "stratified"
    dynamic_guidance: float = Field(0.75, ge=0, le=SHARE)
    dynamic_steps: int = Field(10_000, ge=0)  # 0: the teacher is the base, and times are uniform, from the start
    dynamic_alpha: float = Field(4.0, gt=0)
    dynamic_beta: float = Field(1.5, gt=0)
    reward_start: int = Field(20_000, ge=0)  # student updates before the reward counts


def progress(update: int, num_updates: int) -> float:
    """1 at first, 0 from num_updates on, along half a cosine."""
    return 0.0 if update >= num_updates else 0.5 * (1 + math.cos(math.pi * update / num_updates))


def dynamic_times(levels: Tensor, config: DMDRConfig, remaining: float) -> Tensor:
    """Eq. 2: times (B,) from even levels in (0, 1); `remaining` is `progress`."""
    a, b = 1 + (config.dynamic_alpha - 1) * remaining, 1 + (config.dynamic_beta - 1) * remaining
    t = torch.from_numpy(beta.ppf(levels.double().numpy(), a, b)).float()
    return config.min_time + (config.max_time - config.min_time) * t


@dataclass
class DMDR:
    """The glue: where on its way back the teacher is, and the reward beside it."""

    config: DMDRConfig
    pipeline: Pipeline
    student: Student
    rewards: Composite | None = None
    update: int = 0

    @staticmethod
    def check_rewards(config: DMDRConfig, rewards: Composite, num_calls: int, group_size: int, num_steps: int) -> None:
        """UserError for a reward without a gradient."""
        if config.reward_start >= num_steps:
            raise UserError(
                f"method.reward_start is {config.reward_start}, and training has {num_steps} steps, so that the reward "
                "would never count; make it smaller, or training.max_train_steps larger."
            )
        useless = [*rewards.black_box, *rewards.watched]
        if useless:
            raise UserError(
                f"dmdr follows the gradient of its rewards, and {useless[0]!r} has none, or no weight; leave it out, "
                "or take gndm."
            )

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {role: self.pipeline.roles.parameters(role) for role in self.config.trained_roles}

    def state(self) -> dict[str, Stateful]:
        return {"roles": self.pipeline.roles, "update": self}

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update = state["update"]

    def collect(self, step: int) -> Iterator[Call]:
        yield from self.student.updates(step, self.config)

    def losses(self, call: Call) -> Iterator[Loss]:
        if call.network == FAKE:
            yield from self.student.fake_losses(
                call, lambda levels: dynamic_times(levels, self.config, self._remaining())
            )
            return
        yield from self.student.push_losses(call, self._update)
        self.update += 1

    def after_step(self, step: int) -> dict[str, float]:
        if self.config.ema_decay is not None:
            self.pipeline.roles.blend(AVERAGE, STUDENT, self.config.ema_decay)
        log = self.student.log(step, self.config)
        return log | {"teachers_lora": self.config.dynamic_guidance * self._remaining()}

    def export(self, folder: Path) -> None:
        self.pipeline.export(folder, self.config.result, self.student.scheduler())

    def _remaining(self) -> float:
        return progress(self.update, self.config.dynamic_steps)

    def _update(self, x: Tensor, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 3 as a push of x: `push_loss` is a mean over elements, the reward is one over samples."""
        config, remaining = self.config, self._remaining()
        times = torch.stack([
            dynamic_times(self.student.levels(call.draw, config.times, m), config, remaining)
            for m in range(config.num_renoise)
        ])  # fmt: skip
        share = config.dynamic_guidance * remaining / SHARE
        r, n, _ = self.student.direction(x, call, config, times=times, real_share=share)
        metrics = {"direction": r.abs().mean(), "misfit": n.mean()}
        push = normalised_direction(r, n, call.draw.group.to(x.device), config.normaliser)
        if self.rewards is not None and self.update >= config.reward_start:
            for name, reward in self.rewards.smooth.items():
                gradient, log = self.student.reward_gradient(name, reward, x, call)
                metrics |= log
                push = push + self.rewards.weights[name] * x[0].numel() * gradient
        return push, metrics
