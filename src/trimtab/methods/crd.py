"""Centered Reward Distillation (CRD), arXiv 2603.14128.

For one prompt c, E[r] - beta KL(p || p_old) is greatest for p = p_old exp(r / beta) / Z(c), so that there
beta log p / p_old = r - beta log Z(c). The log-ratio, the *implicit reward* q, is estimated by how much better the
trained field denoises a sample than the old one does. log Z(c) is unknown but the same for all siblings, so centring
both sides among them removes it; the loss is the mismatch that remains.

    (1)  x_t = (1 - t) x_0 + t eps,  u = eps - x_0
    (2)  v = v_theta(x_t, t, c) and v_old, both without guidance, at the same x_t;  v_ref pretrained, guided
    (3)  m = stopgrad max(mean_j |v_j - u_j|, 1e-5);  m_old likewise from v_old
    (4)  q = -[ mean_j (v_j - u_j)^2 / m  -  mean_j (v_old_j - u_j)^2 / m_old ]
    (5)  R = clip(A, -C, C) / (2 C) + 1/2
    (6)  q_bar = stopgrad sum_k p_k q_k,  R_bar = sum_k p_k R_k  over siblings k;  p uniform or softmax(+-R / tau)
    (7)  L = (C / beta) mean_i [ beta (q_i - q_bar) - (R_i - R_bar) ]^2
         or, as a classification, BCE( logit beta (q_i - q_bar), target sigmoid(R_i - R_bar) ) in place of the square
    (8)  L_kl = mean_i b_i mean_j (v_ij - v_ref_ij)^2,  b_i = b_0 + s_i (kappa - b_0),  s_i the reward in [0, 1]
    (9)  slow <- d(n) slow + (1 - d(n)) theta,  d(n) = d_0 for n < n_0, else min(d_0 + slope (n - n_0), end)

With l = mean_j (v_j - u_j)^2 / m, uniform p and no clipping, the gradient of (7) is mean_i [ w_i grad l_i ] with
w_i = (A_i - A_bar) - 2 C beta (q_i - q_bar): flow matching weighted by the advantage that is not yet realised. At
theta = old it does not depend on beta. The square is taken before averaging over (t, eps), so its minimiser is not the
exact tilt p_old exp(r / beta) / Z; to first order it is v - v_old = (D / 2 beta) Cov(u | x_t)^-1 Cov(u, R | x_t).

    symbol   name                     symbol   name
    A        advantage                C        clip
    q        q                        beta     beta
    R        signal                   tau      weight_temp
    u        target                   kappa    kl_beta
    b        strength                 b_0      floor
    d(n)     decay_at                 n        num_updates (optimizer steps)

The equations are those of the first author's public trainer (Flow-Factory). Departures from it:

1. Centring is within a prompt, as the derivation needs. The trainer centres over all that a micro-batch gathers from
   the devices, where log Z(c) of different prompts does not cancel; that is centring="batch", here over one forward's
   pack of prompts, each at times of its own.
2. s in (8) may be any number in [0, 1]. The trainer takes R, whose average never changes; the abstract speaks of the
   reward, which lets the anchor tighten as training succeeds.
3. tau = 0 pools by the sign of the advantage, R above or below 1/2. The trainer tests R > 0 and R < 0, so that its
   negative pool is always empty.
4. Centres can be computed first and given to the loss, so that a group may be spread over micro-batches.
5. Groups of equal rewards stay in the loss. There it pulls q to the same value for all siblings, towards the old field.
6. (8) compares what networks say, their noise if they predict noise: the flow that this means grows without bound as
   alpha falls. To networks that predict the flow, as the trainer's, it is the same.
7. Ten stratified times a rollout, shared by siblings (the trainer: twenty, shared by a micro-batch), and advantages in
   units of the deviation within groups (`rollout.advantage_std`; the trainer: of all rewards). The recipe for SD3.5 has
   the trainer's deviation, and ten of its times.
"""

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from trimtab.batch import Rollout, whole_groups
from trimtab.errors import UserError
from trimtab.forward import Points, TimesConfig, points, times_of, unit_signal
from trimtab.groups import means, softmax_weights
from trimtab.matching import adaptive_error, denoising_error
from trimtab.method import Loss, Stateful
from trimtab.pipelines import Pipeline
from trimtab.prediction import Prediction
from trimtab.roles import REFERENCE, TRAINED
from trimtab.rollout import Rollouts

logger = logging.getLogger(__name__)

OLD, SAMPLER = "old", "sampler"


class CRDConfig(TimesConfig):
    """Defaults: the first author's public settings for SD3.5-M and OCR, called the paper's Table 3 there."""

    name: Literal["crd"] = "crd"
    updates_per_step: int = Field(2, gt=0)  # optimizer steps on each rollout, an equal share of its groups each
    crd_beta: float = Field(1.0, gt=0)
    crd_loss_type: Literal["mse", "bce"] = "mse"
    adaptive_logp: bool = True  # self-normalised errors, eq. 3
    centring: Literal["prompt", "batch", "none"] = "prompt"
    weight_temp: float = -1.0  # tau of eq. 6; below 0 is uniform
    adv_clip_range: float = Field(5.0, gt=0)
    use_old_for_loss: bool = True  # False: the log-ratio is taken to the pre-trained model
    old_model_decay: str = "0-0.25-0.005-0.999"  # eq. 9
    sampling_model_decay: str | None = "75-0.0-0.0075-0.999"  # None: the moving reference samples too
    kl_beta: float = Field(0.1, ge=0)  # 0: no anchor
    kl_cfg: float = Field(4.5, ge=1)  # guidance of the anchor; 1 is off
    reward_adaptive_kl: Literal["reward", "advantage", "off"] = "reward"

    @property
    def frozen_roles(self) -> tuple[str, ...]:
        return (OLD,) if self.sampling_model_decay is None else (OLD, SAMPLER)

    @property
    def sampler(self) -> str:
        return OLD if self.sampling_model_decay is None else SAMPLER

    @field_validator("old_model_decay", "sampling_model_decay")
    @classmethod
    def _is_schedule(cls, text: str | None) -> str | None:
        try:
            if text is not None:
                parse_schedule(text)
        except UserError as error:
            raise ValueError(str(error)) from error
        return text


def implicit_reward(v: Tensor, v_old: Tensor, target: Tensor, adaptive: bool = True) -> Tensor:
    """Eq. 3, 4: q (B,), by how much v denoises better than v_old; all (B, ...) at the same x_t. Only v gets a gradient.

    adaptive=False leaves both errors undivided.
    """
    error = adaptive_error if adaptive else denoising_error
    return -(error(v, target.detach()) - error(v_old.detach(), target.detach()))


def centres(
    q: Tensor,
    signal: Tensor,
    group: Tensor,
    *,
    centring: Literal["prompt", "batch", "none"] = "prompt",
    weight_temp: float = -1.0,
) -> Tensor:
    """Eq. 6: what to subtract from each sample's q and signal (2, W, B), detached; W = 2 if weight_temp >= 0, else 1.

    Give all siblings at once. The loss may then see them in parts, each with its part of the centres, `[..., part]`.
    centring="none" takes log Z as 0 and compares q with R - 1/2.
    """
    if centring == "none":
        return torch.stack([torch.zeros_like(q), torch.full_like(q, 0.5)])[:, None].detach()
    if centring not in ("prompt", "batch"):
        raise ValueError(f"centring {centring!r} is none of 'prompt', 'batch', 'none'")
    group = group if centring == "prompt" else torch.zeros_like(group)
    weights = _sibling_weights(signal, group, weight_temp)
    return torch.stack([torch.stack([means(x, group, p) for p in weights]) for x in (q, signal)]).detach()


def _sibling_weights(signal: Tensor, group: Tensor, weight_temp: float) -> list[Tensor]:
    """p of eq. 6, (B,) for each direction: uniform for tau < 0, softmax(+-R / tau), or the two pools for tau = 0."""
    if weight_temp < 0:
        return [torch.ones_like(signal)]
    if weight_temp > 0:
        return [softmax_weights(signal, group, weight_temp), softmax_weights(signal, group, -weight_temp)]
    pools = [(signal > 0.5).to(signal), (signal < 0.5).to(signal)]
    return [torch.where(means(pool, group) > 0, pool, 1.0) for pool in pools]  # an empty pool stands for everybody


def distillation_loss(
    q: Tensor,
    signal: Tensor,
    centre: Tensor,
    *,
    beta: float = 1.0,
    clip: float = 5.0,
    loss_type: Literal["mse", "bce"] = "mse",
    num_terms: float | None = None,
) -> Tensor:
    """Eq. 7 for q, signal (B,) and their `centres` (2, W, B): a scalar, the sum over B divided by num_terms.

    num_terms (None: B) is the size of the whole batch where this is a part of it. Directions are averaged.
    """
    q_centred, signal_centred = q - centre[0], signal - centre[1]  # (W, B)
    if loss_type == "mse":
        mismatch = (beta * q_centred - signal_centred).square()
    elif loss_type == "bce":
        mismatch = functional.binary_cross_entropy_with_logits(
            beta * q_centred, signal_centred.sigmoid(), reduction="none"
        )
    else:
        raise ValueError(f"loss_type {loss_type!r} is neither 'mse' nor 'bce'")
    return clip / beta * mismatch.mean(0).sum() / (len(q) if num_terms is None else num_terms)


@torch.no_grad()
def progress_metrics(q: Tensor, signal: Tensor, centre: Tensor, beta: float) -> dict[str, float]:
    """What to log of all q, signal (B,) and `centres` (2, W, B) of a step. `saturation`, std(2 C beta q^c) / std(A), is
    the share of the advantage already realised: 0 at theta = old, 1 where the gradient vanishes, NaN of equal rewards.
    """
    realised, asked = (beta * (q - centre[0])).std(1, correction=0), (signal - centre[1]).std(1, correction=0)  # (W,)
    return {
        "implicit_reward": q.mean().item(),
        "implicit_reward_std": q.std(correction=0).item(),
        "saturation": torch.where(asked > 0, realised / asked, torch.nan).mean().item(),
    }


def anchor_strength(kl_beta: float, s: Tensor, floor: float = 1e-4) -> Tensor:
    """Eq. 8: b (B,), from floor at s = 0 to kl_beta at s = 1; s (B,) is a reward in [0, 1]."""
    floor = min(floor, kl_beta)  # so that kl_beta = 0 means no anchor
    return floor + s.detach() * (kl_beta - floor)


def anchor_loss(v: Tensor, v_ref: Tensor, strength: Tensor, num_terms: float | None = None) -> Tensor:
    """Eq. 8: strength-weighted distance of v to the reference field, a scalar; num_terms as in `distillation_loss`."""
    distance = denoising_error(v, v_ref.detach())  # (B,)
    return (strength.detach() * distance).sum() / (len(v) if num_terms is None else num_terms)


class DecaySchedule(NamedTuple):
    """Eq. 9: d(n) is first until start, then rises by slope a step up to end."""

    start: int
    first: float
    slope: float
    end: float


def parse_schedule(text: str) -> DecaySchedule:
    """Read "start-first-slope-end", such as "75-0-0.0075-0.999"; "0-0-0-0" copies each time and "0-1-0-1" never moves.

    Raises UserError for anything else.
    """
    parts = re.split(r"(?<![eE])-", text)  # the minus of 1e-3 does not separate
    try:
        start, first, slope, end = (float(part) for part in parts)
    except ValueError:
        raise UserError(
            f"schedule {text!r} is not start-first-slope-end; give four numbers such as 75-0-0.0075-0.999"
        ) from None
    if not (start.is_integer() and 0 <= first <= 1 and math.isfinite(slope) and 0 <= end <= 1):
        raise UserError(
            f"schedule {text!r} must have a whole start, decays in [0, 1] and a finite slope, as 75-0-0.0075-0.999 has"
        )
    return DecaySchedule(int(start), first, slope, end)


def decay_at(schedule: DecaySchedule, num_updates: int) -> float:
    """Eq. 9: the share d(n) that the slow copy keeps, after num_updates optimizer steps."""
    if num_updates < schedule.start:
        return schedule.first
    return min(schedule.first + schedule.slope * (num_updates - schedule.start), schedule.end)


@dataclass
class CRD:
    """The glue: what is sampled by whom, compared with what, and which copy moves when."""

    config: CRDConfig
    pipeline: Pipeline
    rollouts: Rollouts
    batch_size: int  # samples in one forward and backward
    updates: int = 0
    told: bool = False  # of rewards that do not suit the anchor
    log: dict[str, float] = field(default_factory=dict)
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # a step's q, signal and centres, in parts

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
        self._check_scale(rollout.reward)
        return rollout.split(self.config.updates_per_step)

    def losses(self, rollout: Rollout) -> Iterator[Loss]:
        """One term for each time and pack of whole groups; a group too large for a pack takes two passes."""
        config, grid = self.config, self.rollouts.time_grid()
        times = times_of(rollout, config, grid)  # (B, T)
        num_terms = self.rollouts.mean_length(rollout) * config.num_train_times
        for number, t in enumerate(times.unbind(1) if len(rollout) else ()):
            for pack in whole_groups(rollout.group, self.batch_size):
                yield from self._pack(rollout[pack], t[pack], number, num_terms)
        self.updates += num_terms > 0

    def after_step(self, step: int) -> dict[str, float]:
        moved = {OLD: self.config.old_model_decay, SAMPLER: self.config.sampling_model_decay}
        decays = {role: decay_at(parse_schedule(s), self.updates) for role, s in moved.items() if s is not None}
        for role, decay in decays.items():
            self.pipeline.roles.blend(role, TRAINED, decay)
        said = {f"decay/{role}": decay for role, decay in decays.items()}
        if self.seen:
            said |= progress_metrics(
                *(torch.cat(column, -1) for column in zip(*self.seen, strict=True)), self.config.crd_beta
            )
        self.seen = []
        return self.log | said

    def export(self, folder: Path) -> None:
        self.pipeline.export(folder, TRAINED)

    def _pack(self, siblings: Rollout, t: Tensor, number: int, num_terms: float) -> Iterator[Loss]:
        """The terms of whole groups at their `number`-th time t (B,). Old predictions are made once, whether in one
        pass or two."""
        parts = torch.arange(len(siblings)).split(self.batch_size)
        places = [points(self.pipeline, siblings[part], t[part], number) for part in parts]
        signal = self._signal(siblings).to(siblings.latents)
        v_old = [self._old(at) for at in places]
        centre = None
        if len(parts) > 1:  # centres first, gradients second
            with torch.no_grad():
                q = [self._q(self._now(at).flow, old, at) for at, old in zip(places, v_old, strict=True)]
            centre = self._centres(torch.cat(q), signal, siblings.group)
        for part, at, old in zip(parts, places, v_old, strict=True):
            anchor = self._anchor(at)
            now = self._now(at)
            q = self._q(now.flow, old, at)
            own = self._centres(q, signal, siblings.group) if centre is None else centre[..., part]
            yield self._loss(now, anchor, q, signal[part], own, siblings[part], num_terms)

    def _loss(
        self,
        now: Prediction,
        anchor: Prediction | None,
        q: Tensor,
        signal: Tensor,
        centre: Tensor,
        rollout: Rollout,
        num_terms: float,
    ) -> Loss:
        config = self.config
        self.seen.append((q.detach(), signal, centre))
        value = distillation_loss(
            q,
            signal,
            centre,
            beta=config.crd_beta,
            clip=config.adv_clip_range,
            loss_type=config.crd_loss_type,
            num_terms=num_terms,
        )
        metrics = {}
        if anchor is not None:
            value = value + anchor_loss(now.value, anchor.value, self._strength(rollout, signal), num_terms)
            metrics["kl"] = denoising_error(now.value.detach(), anchor.value).mean()
        return Loss(TRAINED, value, metrics, len(q))

    def _signal(self, rollout: Rollout) -> Tensor:
        """R of eq. 5; without centring, of the reward before its mean is taken off."""
        value = rollout.scaled if self.config.centring == "none" else rollout.advantage
        return unit_signal(value, self.config.adv_clip_range)

    def _centres(self, q: Tensor, signal: Tensor, group: Tensor) -> Tensor:
        return centres(
            q, signal, group.to(q.device), centring=self.config.centring, weight_temp=self.config.weight_temp
        )

    def _check_scale(self, reward: Tensor) -> None:
        """A warning, once, where the anchor would take rewards (B,) for less or more than they are."""
        by_reward = self.config.kl_beta and self.config.reward_adaptive_kl == "reward"
        if by_reward and not self.told and not ((reward >= 0) & (reward <= 1)).all():
            self.told = True
            logger.warning(
                "rewards of %.3g to %.3g: the anchor's strength grows with rewards from 0 to 1 and no further; scale "
                "them into [0, 1], or set method.reward_adaptive_kl=advantage or off",
                reward.min(),
                reward.max(),
            )

    def _strength(self, rollout: Rollout, signal: Tensor) -> Tensor:
        """b of eq. 8, (B,)."""
        if self.config.reward_adaptive_kl == "off":
            return torch.full_like(signal, self.config.kl_beta)
        raw = rollout.reward.to(signal).clamp(0, 1)
        return anchor_strength(self.config.kl_beta, raw if self.config.reward_adaptive_kl == "reward" else signal)

    def _q(self, v: Tensor, v_old: Tensor, at: Points) -> Tensor:
        return implicit_reward(v, v_old, at.target, self.config.adaptive_logp)

    def _now(self, at: Points) -> Prediction:
        return self.pipeline.predict(at.x_t, at.t, at.condition, TRAINED, self.rollouts.training_scale)

    @torch.no_grad()
    def _old(self, at: Points) -> Tensor:
        role = OLD if self.config.use_old_for_loss else REFERENCE
        return self.pipeline.predict(at.x_t, at.t, at.condition, role, self.rollouts.training_scale).flow

    @torch.no_grad()
    def _anchor(self, at: Points) -> Prediction | None:
        if not self.config.kl_beta:
            return None
        scale = self.rollouts.training_scale if self.config.kl_cfg == 1 else self.config.kl_cfg
        return self.pipeline.predict(at.x_t, at.t, at.condition, REFERENCE, scale)
