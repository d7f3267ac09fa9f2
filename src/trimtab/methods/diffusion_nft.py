"""DiffusionNFT: Online Diffusion Reinforcement with Forward Process, arXiv 2509.16117. A baseline for CRD.

The policy's field is pushed towards samples by their optimality R in [0, 1] and, mirrored at the old field, away from
them by 1 - R:

    (1)  v+ = b v + (1 - b) v_old,  v- = (1 + b) v_old - b v,   v_old without gradient
    (2)  x+ = x_t - t v+,  x- = x_t - t v-;   in other processes the x_0 that x_t and the flow v+ or v- mean
    (3)  l+- = mean_j (x+-_j - x_0_j)^2 / stopgrad max(mean_j |x+-_j - x_0_j|, 1e-5)
    (4)  L = C mean_i [ (R_i l+_i + (1 - R_i) l-_i) / b ] + kl_beta mean_i mean_j (v - v_ref)^2,  v_ref without guidance
    (5)  R = clip(A, -C, C) / (2 C) + 1/2;   old <- d(n) old + (1 - d(n)) theta,  d(n) = min(slope n, end)

    symbol   name                 symbol   name
    b        nft_beta             C        adv_clip_range
    R        signal               d        decay, schedule (slope, end)

Departures from the paper and its code (NVlabs/DiffusionNFT):

1. Siblings share their times, as everywhere in trimtab; the code draws an order of times for each sample.
2. The solver of the rollout is the recipe's; the code's is a second-order multistep one (`rollout.solver_order: 2`).
3. The anchor compares what networks say, their noise if they predict noise: the flow that this means grows without
   bound as alpha falls. To networks that predict the flow, as the code's, it is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.batch import Rollout
from trimtab.forward import Points, TimesConfig, points, times_of, unit_signal
from trimtab.matching import adaptive_error, denoising_error
from trimtab.method import Loss, Stateful
from trimtab.pipelines import Pipeline
from trimtab.prediction import Prediction
from trimtab.process import Process, RectifiedFlow
from trimtab.roles import REFERENCE, TRAINED
from trimtab.rollout import Rollouts

OLD = "old"


class DiffusionNFTConfig(TimesConfig):
    """Defaults: the settings published for GenEval on SD3.5-M, but for the times of a sample: there nine of the ten
    that an order-2 solver visits, here ten stratified ones."""

    name: Literal["diffusion-nft"] = "diffusion-nft"
    updates_per_step: int = Field(1, gt=0)
    nft_beta: float = Field(1.0, gt=0)
    adv_clip_range: float = Field(5.0, gt=0)
    kl_beta: float = Field(1e-4, ge=0)
    decay_slope: float = Field(0.001, ge=0)
    decay_end: float = Field(0.5, ge=0, le=1)

    @property
    def frozen_roles(self) -> tuple[str, ...]:
        return (OLD,)

    @property
    def sampler(self) -> str:
        return OLD


def nft_errors(
    v: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    nft_beta: float,
    process: Process = RectifiedFlow(),  # noqa: B008
) -> tuple[Tensor, Tensor]:
    """Eq. 1 to 3: the self-normalised errors (B,) of the positive and of the negative field; v (B, ...), t (B,)."""
    v_old = v_old.detach()
    plus = nft_beta * v + (1 - nft_beta) * v_old
    minus = (1 + nft_beta) * v_old - nft_beta * v
    found = (Prediction(flow, "flow", x_t, t, process).x0 for flow in (plus, minus))
    return tuple(adaptive_error(each, x0) for each in found)


def nft_loss(
    plus: Tensor, minus: Tensor, signal: Tensor, *, nft_beta: float, clip: float, num_terms: float | None = None
) -> Tensor:
    """Eq. 4 without its anchor: a scalar, summed over B and divided by num_terms (None: B)."""
    terms = (signal * plus + (1 - signal) * minus) / nft_beta  # (B,)
    return clip * terms.sum() / (len(terms) if num_terms is None else num_terms)


@dataclass
class DiffusionNFT:
    """The glue: one old policy is both the sampler and the mirror."""

    config: DiffusionNFTConfig
    pipeline: Pipeline
    rollouts: Rollouts
    batch_size: int
    updates: int = 0
    log: dict[str, float] = field(default_factory=dict)

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {TRAINED: self.pipeline.roles.parameters(TRAINED)}

    def state(self) -> dict[str, Stateful]:
        return {"roles": self.pipeline.roles, "updates": self}

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]

    def collect(self, step: int) -> list[Rollout]:
        rollout, self.log = self.rollouts.collect(step, self.config.sampler)
        return rollout.split(self.config.updates_per_step)

    def losses(self, rollout: Rollout) -> Iterator[Loss]:
        grid = self.rollouts.time_grid()
        num_terms = self.rollouts.mean_length(rollout) * self.config.num_train_times
        times = times_of(rollout, self.config, grid)  # (B, T)
        for number, t in enumerate(times.unbind(1) if len(rollout) else ()):
            for part in torch.arange(len(rollout)).split(self.batch_size):
                at = points(self.pipeline, rollout[part], t[part], number)
                yield self._loss(at, rollout.advantage[part], num_terms)
        self.updates += num_terms > 0

    def after_step(self, step: int) -> dict[str, float]:
        decay = min(self.config.decay_slope * self.updates, self.config.decay_end)
        self.pipeline.roles.blend(OLD, TRAINED, decay)
        return self.log | {"decay/old": decay}

    def export(self, folder: Path) -> None:
        self.pipeline.export(folder, TRAINED)

    def _loss(self, at: Points, advantage: Tensor, num_terms: float) -> Loss:
        config, process = self.config, self.pipeline.process
        with torch.no_grad():
            v_old = self._said(at, OLD).flow
            before = self._said(at, REFERENCE) if config.kl_beta else None
        now = self._said(at, TRAINED)
        signal = unit_signal(advantage, config.adv_clip_range).to(now.x_t)
        plus, minus = nft_errors(now.flow, v_old, at.x_t, at.x0, at.t, config.nft_beta, process)
        value = nft_loss(plus, minus, signal, nft_beta=config.nft_beta, clip=config.adv_clip_range, num_terms=num_terms)
        metrics = {"old_deviate": denoising_error(now.flow.detach(), v_old).mean()}
        if before is not None:
            drift = denoising_error(now.value, before.value)  # (B,)
            value = value + config.kl_beta * drift.sum() / num_terms
            metrics["kl"] = drift.mean().detach()
        return Loss(TRAINED, value, metrics, len(advantage))

    def _said(self, at: Points, role: str) -> Prediction:
        return self.pipeline.predict(at.x_t, at.t, at.condition, role, self.rollouts.training_scale)
