"""Improved Distribution Matching Distillation for Fast Image Synthesis (DMD2), arXiv 2405.14867, over DMD, 2311.18828.

A student that makes a picture in K calls learns the distribution of a teacher that takes many. Both distributions are
compared after noise: a fake network follows what the student makes, and where it and the teacher denoise the student's
sample differently, the sample is pushed towards the teacher's opinion.

    (1)  x = x0_theta(x_tau, tau, c), x_tau by backward simulation (student.py);  y = alpha_t x + sigma_t eps
    (2)  r = D_real(y, c) - D_fake(y, c),  D_real guided with scale w, D_fake not
    (3)  L = mean (x - stopgrad(x + r / n))^2 / 2,  n = mean |x - D_real|, one number for each sample
    (4)  L_fake = mean |f_phi(y', t', c) - target|^2 on the student's samples, t' over the whole range

    (5)  + g mean softplus(-J(y, t, c))  to (3), noised afresh at any t; J a head on the middle of the fake network
         + d mean [ softplus(J) on samples + softplus(-J) on real pictures ]  to (4), which trains the head, too

    symbol   name                   symbol   name
    w        real_guidance_scale    n        normaliser="sample"
    K        rollout.num_inference_steps     t in [min_time, max_time]
    g        gan_weight             d        gan_fake_weight

The GAN of (5) is optional and needs pictures with captions. Two-time-scale updates are counted as in student.py.
Departures from the authors' code:

1. `times` may be stratified over the batch, which is the default here and costs nothing; "independent" is the code's.
2. The fake is trained on fresh samples after the student moved; the code reuses those of the student's own update.
3. Clean predictions are taken in float32, the code's in float64, of networks that both compute in the run's precision;
   the code's fake is float32 throughout. n is at least 1e-6.
4. A LoRA goes on linear layers, and the fake has one, too. The code's also covers SDXL's convolutions, and its fake is
   trained whole, as finetune_type=full does here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from trimtab import noise
from trimtab.batch import Condition
from trimtab.captioned import Captioned
from trimtab.errors import UserError
from trimtab.matching import normalised_direction
from trimtab.method import Loss, Stateful
from trimtab.pipelines import Pipeline
from trimtab.pipelines.discriminator import Head
from trimtab.pipelines.hidden import heard, middle
from trimtab.rewards.composite import Composite
from trimtab.student import AVERAGE, FAKE, STUDENT, Call, Student, StudentConfig, TimeMode, fake_time


class DMD2Config(StudentConfig):
    """Defaults: the authors' for SDXL in four steps, without their GAN (0.005 and 0.01)."""

    name: Literal["dmd2"] = "dmd2"
    real_guidance_scale: float = Field(8.0, ge=0)
    normaliser: Literal["sample"] = "sample"
    times: TimeMode = "stratified"
    gan_weight: float = Field(0.0, ge=0)  # 0: no GAN, and no pictures are read
    gan_fake_weight: float = Field(0.01, ge=0)

    @property
    def wants_pictures(self) -> bool:
        return self.gan_weight > 0


def judge_loss(made: Tensor, real: Tensor) -> Tensor:
    """Eq. 5: from logits (B,) of samples and (N,) of real pictures, a scalar."""
    return softplus(made).mean() + softplus(-real).mean()


@dataclass
class DMD2:
    """The glue: the fake follows, then the student is pushed."""

    config: DMD2Config
    pipeline: Pipeline
    student: Student
    rewards: None = None
    pictures: Captioned | None = None  # for the GAN

    def __post_init__(self):
        self.head = None
        if self.pictures is not None:
            with torch.no_grad():
                call = self.student.call(STUDENT, self.student.draw(0, 0, 1)[torch.arange(1)])
                features = self._features(call.path[0], call.t, call.draw.conditions())
            self.head = Head(features.shape[1], features.shape[-1], self.student.seed).to(self.pipeline.device)

    @staticmethod
    def check_rewards(config: DMD2Config, rewards: Composite, *sizes: int) -> None:
        """UserError: there is no place for rewards here."""
        raise UserError("dmd2 trains on no reward; leave `rewards` out, or take a recipe of gndm or dmdr.")

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        trained = {role: self.pipeline.roles.parameters(role) for role in self.config.trained_roles}
        if self.head is not None:
            trained[FAKE] |= {f"head.{name}": own for name, own in self.head.named_parameters()}
        return trained

    def state(self) -> dict[str, Stateful]:
        return {"roles": self.pipeline.roles} | ({} if self.pictures is None else {"pictures": self.pictures})

    def collect(self, step: int) -> Iterator[Call]:
        yield from self.student.updates(step, self.config)

    def losses(self, call: Call) -> Iterator[Loss]:
        if call.network == FAKE:
            yield from self.student.fake_losses(call, partial(fake_time, self.config))
            if self.head is not None:
                yield from self._judge_losses(call)
        else:
            yield from self.student.push_losses(call, self._update)

    def after_step(self, step: int) -> dict[str, float]:
        if self.config.ema_decay is not None:
            self.pipeline.roles.blend(AVERAGE, STUDENT, self.config.ema_decay)
        return self.student.log(step, self.config)

    def export(self, folder: Path) -> None:
        self.pipeline.export(folder, self.config.result, self.student.scheduler())

    def _update(self, x: Tensor, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 2, 3, and the push of the GAN: `push_loss` is a mean over elements, its own one over samples."""
        r, n, _ = self.student.direction(x, call, self.config)
        group = call.draw.group.to(x.device)
        push = normalised_direction(r, n, group, self.config.normaliser)
        metrics = {"direction": r.abs().mean(), "misfit": n.mean()}
        if self.head is not None:
            gradient, metrics["fooled"] = self._gan_gradient(x, call)
            push = push - self.config.gan_weight * x[0].numel() * gradient
        return push, metrics

    def _gan_gradient(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The gradient of softplus(-J) with respect to x (B, ...), and the share of samples that pass for real."""
        found, passed = [], []
        for part in torch.arange(len(x)).split(self.student.batch_size):
            with torch.enable_grad():
                leaf = x[part.to(x.device)].detach().requires_grad_()
                logit = self._judged(leaf, call.draw[part].keys(noise.GAN), call.draw[part].conditions())
                found.append(torch.autograd.grad(softplus(-logit).sum(), leaf)[0])
            passed.append(logit.detach() > 0)
        return torch.cat(found), torch.cat(passed).float().mean()

    def _judge_losses(self, call: Call) -> Iterator[Loss]:
        """Eq. 5, for the fake's weights and the head's, on as many samples as real pictures."""
        real = self.pictures.collect(self._pictures_seen(call))
        made = call[torch.arange(len(call))[: len(real)]]
        with torch.no_grad():
            x0 = self.student.x0(made)
        keys = [(self.student.seed, call.draw.step, call.draw.number, i, noise.GAN, 1) for i in real.index]
        value = judge_loss(
            self._judged(x0, made.draw.keys(noise.GAN), made.draw.conditions()),
            self._judged(real.x0, keys, real.condition),
        )
        yield Loss(FAKE, self.config.gan_fake_weight * value, {"judge": value.detach()})

    def _judged(self, x0: Tensor, keys: list[tuple[int, ...]], condition: Condition) -> Tensor:
        """J (B,) at a noised x0 (B, ...), at any time."""
        t = noise.uniform([(*key, 1) for key in keys], ()).to(x0.device)
        eps = noise.normal(keys, x0.shape[1:]).to(x0)
        return self.head(self._features(self.pipeline.process.noised(x0, eps, t), t, condition))

    def _features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        network = self.pipeline.roles.module(FAKE)
        (features,) = heard(network, [middle(network)], lambda: self.pipeline.predict(x_t, t, condition, FAKE))
        return features

    def _pictures_seen(self, call: Call) -> int:
        """How many updates of the fake came before this one: each sees other pictures."""
        before = call.draw.step * self.config.fake_updates + (self.config.fake_warmup if call.draw.step else 0)
        return before + call.draw.number - 1
