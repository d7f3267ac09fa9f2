"""Group Normalized Distribution Matching (GNDM), and with rewards GNDMR, arXiv 2603.28460.

Distribution matching as a reward, R_dm = log p_real - log p_fake, whose gradient is the direction of DMD (dmd2.py). So
what reinforcement learning does to rewards can be done to it: it is normalised by a statistic of the group, the
samples of one prompt, instead of each sample's own; it is mixed with other rewards, in units of its own size; and a
rollout may serve several updates, with importance weights.

    (1)  r_i, n_i as in dmd2.py;  n_g = mean of n over the siblings of i
    (2)  A_i = r_i / n_g
    (3)  U_i = omega_i A_i + sum_m w_m V_mi,   L = mean (x - stopgrad(x + U))^2 / 2
    (4)  R~_mi = (R_mi - mean_g R_m) / s_m,  s_m the deviation within groups, over all groups of the update
    (5)  V_mi = kappa_m grad_x R_m(decode(x))             a reward with a gradient, at whichever call is trained
         V_mi = a_0 clip(R~_mi, +-C) ratio_i z_i          any other, at calls after which noise is added: x' = alpha' x
                                                          + sigma' z; the score function of N(alpha' x, sigma'^2)
    (6)  a_0 = rms A,  kappa_m = a_0 / rms(grad R_m): averages over the end of the cold start, then frozen
    (7)  w_m = weight_m ramp gate,  gate <- clip(gate exp(-eta sign(q - q*))),  q = average of mean |r| / n_g
         q* = (1 + slack) q at the end of the cold start: a student that leaves the teacher closes the rewards' gate
    (8)  log rho_j = mean ( z_j^2 - z_j,theta^2 ) / 2,  z_theta = (x' - alpha' x_theta) / sigma'
         omega = clip(prod_{j<k} rho_j, 1 +- e), to mean one in each group; 1 on the first use of a rollout

    symbol   name                 symbol   name
    n_g      normaliser           C        max_advantage
    weight_m rewards              ramp     reward_start, reward_ramp
    eta      gate_rate            slack    gate_slack
    e        importance_clip      E        reuse

Only the paper's abstract and first figure were to be read when this was written, and no code. Confirmed are the reward
R_dm, a group-*mean* statistic for its estimate, adaptive weights for other rewards, and importance sampling. (2) is the
reading under which these hold and the fixed point stays DMD's; the other readings are switches (`normaliser`, `times`,
`weighting`) and matching.py says what each does. (4) to (8) are ours, after public code for reinforcement learning of
few-step students.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab import groups
from trimtab.distributed import ALONE, Processes
from trimtab.errors import UserError
from trimtab.matching import BinnedMean, Normaliser, normalised_direction
from trimtab.method import Loss, Stateful
from trimtab.pipelines import Pipeline
from trimtab.process import Process, over
from trimtab.rewards.composite import Composite
from trimtab.rollout import ADVANTAGE_EPS, comparable
from trimtab.student import AVERAGE, FAKE, STUDENT, Call, Draw, Student, StudentConfig, TimeMode, fake_time

MOVE = ""  # what A is called beside the gradients of rewards, which have names


class GNDMConfig(StudentConfig):
    """Defaults: the reference form, with SD3.5-M's guidance in the closest public recipe."""

    name: Literal["gndm"] = "gndm"
    fake_updates: int = Field(10, ge=1)
    real_guidance_scale: float = Field(4.5, ge=0)
    normaliser: Normaliser = "group_mean"
    times: TimeMode = "shared_stratified"
    num_bins: int = Field(10, gt=0)  # of normaliser=binned
    reuse: int = Field(1, gt=0)  # updates of the student on each rollout
    importance_clip: float | None = Field(0.2, gt=0, lt=1)  # None: no weights
    # grad_norm: sizes are matched in every forward, of what it holds, for ablation
    weighting: Literal["gated", "fixed", "grad_norm"] = "gated"
    reward_start: int = Field(0, ge=0)  # student updates without rewards: the cold start
    reward_ramp: int = Field(0, ge=0)  # updates over which rewards come in
    calibration: int = Field(20, gt=0)  # updates at the end of the cold start over which sizes are averaged
    gate_rate: float = Field(0.01, gt=0)
    gate_slack: float = Field(0.1, ge=0)
    max_advantage: float = Field(5.0, gt=0)
    ratio_clip: float = Field(1e-4, gt=0)  # of a reused rollout's score function, as in PPO; ratios are means


def log_ratio(x0: Tensor, x_next: Tensor, z: Tensor, t_next: Tensor, process: Process) -> tuple[Tensor, Tensor]:
    """Eq. 8: log rho (B,) of a transition to x_next (B, ...) that was made with noise z, and z under today's x0."""
    now = (x_next - over(process.alpha(t_next), x0) * x0) / over(process.sigma(t_next), x0)  # (B, ...)
    return (z.square() - now.square()).flatten(1).mean(1) / 2, now


def importance_weights(log_rho: Tensor, group: Tensor, clip: float) -> Tensor:
    """Eq. 8: omega (B,) from the summed log-ratios of the calls before the trained one; of mean one among siblings.

    One whose ratio is not finite is left out: it weighs nothing."""
    known = log_rho.isfinite()
    weights = log_rho.exp().clamp(1 - clip, 1 + clip).masked_fill(~known, 0)
    return weights / groups.means(weights, group, known.to(weights)).nan_to_num(1.0)


def score_direction(advantage: Tensor, ratio: Tensor, clip: float, z: Tensor) -> Tensor:
    """Eq. 5 without its scale: the way (B, ...) that raises the probability of what was better than its siblings.

    PPO's clip (arXiv 1707.06347): a sample whose ratio has already moved beyond 1 +- clip in its favour is left alone.
    advantage is NaN where a picture has no score; there the direction is 0.
    """
    done = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    weight = (advantage * ratio).masked_fill(done | advantage.isnan(), 0)
    return over(weight, z) * z


def standardised(raw: Tensor, group: Tensor, processes: Processes = ALONE) -> Tensor:
    """Eq. 4: R~ (B,) of one reward's scores (B,), NaN where there is none; s over the groups of all processes."""
    known = raw.isfinite()
    centred = torch.full_like(raw, torch.nan)
    centred[known] = groups.centred(raw[known], group[known])
    shared = processes.everybody(centred)
    return centred / (shared[shared.isfinite()].square().mean().sqrt() + ADVANTAGE_EPS)


@dataclass
class Balance:
    """Eq. 6, 7: how large a reward's push is beside that of distribution matching."""

    config: GNDMConfig
    update: int = 0  # updates of the student so far
    observed: int = 0  # of them those whose sizes are summed
    sizes: dict[str, float] = field(default_factory=dict)  # rms of A and of each reward's gradient, summed
    misfit: float | None = None  # q
    limit: float | None = None  # q*
    gate: float = 1.0

    @property
    def calibrates(self) -> bool:
        start = self.config.reward_start
        return start - self.config.calibration <= self.update < start

    @property
    def rewards_count(self) -> bool:
        return self.update >= self.config.reward_start

    def share(self) -> float:
        """Ramp times gate."""
        since = self.update - self.config.reward_start + 1
        return self.gate * min(1.0, since / max(1, self.config.reward_ramp))

    def size(self, name: str) -> float:
        """The averaged rms of A, or of a reward's gradient; 0 where no update was finite."""
        return self.sizes.get(name, 0.0) / max(1, self.observed)

    def observe(self, rms: dict[str, float], misfit: float) -> None:
        """Take in what an update showed: rms of A and of gradients, and mean |r| / n_g."""
        config = self.config
        whole = all(map(math.isfinite, (misfit, *rms.values())))
        if whole:  # else this update says nothing
            self.misfit = misfit if self.misfit is None else 0.95 * self.misfit + 0.05 * misfit
        if whole and self.calibrates:
            self.sizes = {name: self.sizes.get(name, 0.0) + value for name, value in rms.items()}
            self.observed += 1
        if self.limit is not None and config.weighting == "gated":
            factor = math.exp(-config.gate_rate * math.copysign(1, self.misfit - self.limit))
            self.gate = min(max(self.gate * factor, 1e-4), 10.0)
        self.update += 1
        if self.update == config.reward_start and self.misfit is not None:
            self.limit = self.misfit * (1 + config.gate_slack)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("update", "observed", "sizes", "misfit", "limit", "gate")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@dataclass(frozen=True)
class Seen:
    """What the balance and the bins learn from the samples that were pushed together."""

    misfit: float  # mean |r| / n_g
    squares: dict[str, float]  # means of A's and of each reward's gradient, by MOVE and by reward
    n: Tensor  # (B,)
    t: Tensor  # (B,)


@dataclass
class GNDM:
    """The glue: what a rollout serves, what its samples earn, and how the pushes add up."""

    config: GNDMConfig
    pipeline: Pipeline
    student: Student
    rewards: Composite | None = None

    @staticmethod
    def check_rewards(config: GNDMConfig, rewards: Composite, num_calls: int, group_size: int, num_steps: int) -> None:
        """UserError where rewards could not be weighed, or could not teach."""
        if config.reward_start >= num_steps * config.reuse:
            raise UserError(
                f"method.reward_start is {config.reward_start}, and the student is updated {num_steps * config.reuse} "
                "times, so that rewards would never count; make it smaller, or training.max_train_steps larger."
            )
        if not config.reward_start:
            raise UserError(
                "method.reward_start is 0; rewards are weighed by what a cold start shows, give it 20 or more."
            )
        black = [*rewards.black_box]
        if black and group_size == 1:
            raise UserError("rollout.group_size is 1; give 2 or more, for rewards are compared among siblings.")
        if black and num_calls == 1:
            raise UserError(
                f"reward {black[0]!r} has no gradient, and a student of one call adds no noise that it could judge; "
                "give rollout.num_inference_steps=2 or more, or a reward with a gradient, such as recognizer."
            )

    def __post_init__(self):
        self.balance = Balance(self.config)
        self.bins = BinnedMean(self.config.num_bins)
        self.smooth = {} if self.rewards is None else self.rewards.smooth
        self.black = {} if self.rewards is None else self.rewards.black_box
        self.log: dict[str, float] = {}

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {role: self.pipeline.roles.parameters(role) for role in self.config.trained_roles}

    def state(self) -> dict[str, Stateful]:
        return {"roles": self.pipeline.roles, "balance": self.balance, "bins": self.bins}

    def collect(self, step: int) -> Iterator[Call]:
        """Before each update of the student `fake_updates` of the fake, on samples of their own."""
        each, self.log = self.config.fake_updates, {}
        draws = 1 + self.config.reuse * each
        draw = self.student.draw(step, 0, draws)
        calls = [self.student.choice(draw, use) for use in range(self.config.reuse)]
        first = self._rollout(draw, calls)  # before anything moves, so that a reward that fails ends a step cleanly
        for use, k in enumerate(calls):
            yield from self.student.fake_calls(step, range(1 + use * each, 1 + (use + 1) * each), draws)
            if not (step or use):
                yield from self.student.fake_calls(step, range(draws, draws + self.config.fake_warmup), draws)
            yield replace(first, k=k, t=self.student.times()[k], use=use)
            if self.config.ema_decay is not None:
                self.pipeline.roles.blend(AVERAGE, STUDENT, self.config.ema_decay)

    def losses(self, call: Call) -> Iterator[Loss]:
        if call.network == FAKE:
            yield from self.student.fake_losses(call, partial(fake_time, self.config))
            return
        packs: list[Seen] = []
        with self.student.processes.together():  # a reward's gradient may fail, before all tell what they have seen
            yield from self.student.push_losses(call, partial(self._update, packs))
        sizes = torch.tensor([len(pack.n) for pack in packs])[:, None]
        rows = torch.tensor([[pack.misfit, *pack.squares.values()] for pack in packs])
        everybody = self.student.processes.everybody
        misfit, *means = everybody((rows * sizes).sum(0, keepdim=True) / sizes.sum()).mean(0).tolist()
        squares = dict(zip(packs[0].squares, means, strict=True))
        self.balance.observe({name: math.sqrt(square) for name, square in squares.items()}, misfit)
        n, t = (torch.cat(column) for column in zip(*((pack.n, pack.t) for pack in packs), strict=True))
        self.bins.update(everybody(n), everybody(t))

    def after_step(self, step: int) -> dict[str, float]:
        self.log |= self.student.log(step, self.config, self.config.reuse)
        gate = {"gate": self.balance.gate} if self.rewards else {}
        return self.log | gate | {"relative_misfit": math.nan if self.balance.misfit is None else self.balance.misfit}

    def export(self, folder: Path) -> None:
        self.pipeline.export(folder, self.config.result, self.student.scheduler())

    def _rollout(self, draw: Draw, calls: list[int]) -> Call:
        """The path that all uses share: to the last call among them, or to its end where pictures are scored."""
        scored = self.rewards is not None and len(self.smooth) < len(self.rewards.rewards)
        path = self.student.path(draw, self.student.num_steps if scored else max(calls))
        advantage = self._advantage(draw, path[-1]) if scored else None
        advantage = advantage if self.black and self.balance.rewards_count else None  # until then they are only watched
        return Call(STUDENT, draw, calls[0], self.student.times()[calls[0]], path, advantage)

    @torch.no_grad()
    def _advantage(self, draw: Draw, x0: Tensor) -> Tensor:
        """Eq. 4: sum_m weight_m clip(R~_m) (B,), NaN where a picture has no score."""
        parts = x0.split(self.student.config.sample_batch_size)
        images = torch.cat([self.pipeline.decode(part).cpu() for part in parts])
        with self.student.processes.together():
            scored = self.rewards.score(images, *draw.prompts.of(draw.group), draw.group)
            if self.black:
                comparable(scored.total, draw.group)
        total = torch.where(scored.total.isnan(), torch.nan, 0.0)
        self.log |= {"reward": scored.total.nanmean().item()}
        for name in [name for name in scored.raw if name not in self.smooth]:  # those are asked again, for a gradient
            self.log |= self.rewards.log({name: scored.raw[name]}, {name: scored.failed[name]})
        limit = self.config.max_advantage
        for name in self.black:
            score = standardised(scored.raw[name], draw.group, self.student.processes).clamp(-limit, limit)
            total += self.rewards.weights[name] * score.nan_to_num(0.0)  # 0 where it does not apply
        return total

    def _update(self, packs: list[Seen], x: Tensor, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 1 to 3 for whole groups x (B, ...); what there was to see joins `packs`."""
        config, group = self.config, call.draw.group.to(x.device)
        r, n, t = self.student.direction(x, call, config)
        typical = self.bins.at(t)
        typical = torch.where(typical.isnan(), n, typical)  # a bin that has seen nothing yet
        move = normalised_direction(r, n, group, config.normaliser, typical=typical)
        relative = (r.flatten(1).abs().mean(1) / groups.means(n, group)).mean()
        squares = {MOVE: move.square().mean().item()}
        push = over(self._importance(call, group), move) * move
        metrics = {"direction": r.abs().mean(), "misfit": n.mean()}
        asked = self.smooth if self.balance.calibrates or self.balance.rewards_count else {}
        for name, reward in asked.items():
            gradient, log = self.student.reward_gradient(name, reward, x, call)
            metrics |= log
            squares[name] = gradient.square().mean().item()
            if self.balance.rewards_count:
                weight = self.rewards.weights[name] * self.balance.share()
                push = push + weight * self._scaled(name, gradient, squares)
        if call.advantage is not None and call.k < self.student.num_steps - 1:
            push = push + self.balance.share() * self._size(MOVE, squares) * self._score(x, call)
        packs.append(Seen(relative.item(), squares, n, t))
        return push, metrics

    @torch.no_grad()
    def _importance(self, call: Call, group: Tensor) -> Tensor:
        """omega (B,): how much likelier today's student would come to the trained call's input."""
        if call.use == 0 or self.config.importance_clip is None or call.k == 0:
            return torch.ones(len(call), device=group.device)
        noises, times = self.student.noises(call.draw), self.student.times()
        total = torch.zeros(len(call), device=group.device)
        for j in range(call.k):
            earlier = replace(call, k=j, t=times[j])
            x0 = torch.cat(
                [self.student.x0(earlier[part]) for part in torch.arange(len(call)).split(self.student.batch_size)]
            )
            total += log_ratio(x0, call.path[j + 1], noises[j + 1], times[j + 1], self.pipeline.process)[0]
        return importance_weights(total, group, self.config.importance_clip)

    def _score(self, x: Tensor, call: Call) -> Tensor:
        """Eq. 5 for rewards without a gradient."""
        z, t_next = self.student.noises(call.draw)[call.k + 1], self.student.times()[call.k + 1]
        log_rho, now = log_ratio(x, call.path[call.k + 1], z, t_next, self.pipeline.process)
        ratio = log_rho.exp() if call.use else torch.ones_like(log_rho)  # exactly 1 at first
        return score_direction(call.advantage.to(x), ratio, self.config.ratio_clip, now)

    def _scaled(self, name: str, gradient: Tensor, squares: dict[str, float]) -> Tensor:
        """kappa grad: as large as A on average, and for no sample more than three times that."""
        size = self._size(name, squares)
        own = gradient.flatten(1).square().mean(1).sqrt()  # (B,)
        limit = (3 * size / own.clamp_min(1e-12)).clamp_max(1)
        return self._size(MOVE, squares) / max(size, 1e-12) * over(limit, gradient) * gradient

    def _size(self, name: str, squares: dict[str, float]) -> float:
        """The rms of A, or of a reward's gradient, by which pushes are scaled."""
        return math.sqrt(squares[name]) if self.config.weighting == "grad_norm" else self.balance.size(name)
