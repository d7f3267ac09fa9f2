"""Few-step students while they learn: their samples, the fake network's training, and the push along a direction.

A student maps noise to a picture in K calls, at times tau_1 = 1 > ... > tau_K: predict x0, noise it afresh to the next
time, predict again. In training the input of call k is made in the same way, without gradient (backward simulation,
DMD2, arXiv 2405.14867), and gradient passes through call k alone. One k serves a whole batch, on all processes.

Three networks start as one: the student (`default`), the fake (`fake`), which follows what the student makes, and the
teacher (`ref`). Counting: a *step* is one update of the student after `fake_updates` updates of the fake; the
very first has `fake_warmup` more, since a fake that is the teacher says nothing yet. Where code bases say "ratio 5",
DMD2 and DMDR mean this with fake_updates=5; FastGen means 4.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from diffusers import SchedulerMixin
from pydantic import Field, model_validator
from torch import Tensor

from trimtab import noise
from trimtab.batch import Condition, Prompts, whole_groups
from trimtab.distributed import ALONE, Processes
from trimtab.matching import Normaliser, fake_score_loss, misfit, push_loss
from trimtab.method import Loss, MethodSettings
from trimtab.pipelines import Pipeline
from trimtab.prediction import Prediction
from trimtab.process import NUM_TIMESTEPS, logit_normal
from trimtab.rewards.composite import with_gradient
from trimtab.roles import REFERENCE, TRAINED
from trimtab.rollout import RolloutConfig, share
from trimtab.solvers import few_step

STUDENT, FAKE, AVERAGE = TRAINED, "fake", "average"
TimeMode = Literal["independent", "stratified", "shared", "shared_stratified"]


class StudentConfig(MethodSettings):
    """What all distribution matching has."""

    fake_updates: int = Field(5, ge=1)  # of the fake network, for each of the student
    fake_warmup: int = Field(0, ge=0)  # more of them before the student's first
    real_guidance_scale: float = Field(ge=0)  # the teacher's; the student and the fake have none
    normaliser: Normaliser
    times: TimeMode  # of the noise at which distributions are compared; "shared" among siblings
    min_time: float = Field(0.02, ge=0, lt=1)
    max_time: float = Field(0.98, gt=0, le=1)
    num_renoise: int = Field(1, gt=0)  # comparisons averaged for each sample
    fake_times: Literal["uniform", "logit_normal"] = "uniform"
    ema_decay: float | None = Field(None, ge=0, lt=1)  # an average of the student is what is exported; None: itself

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_time >= self.max_time:
            raise ValueError(f"min_time {self.min_time} is not below max_time {self.max_time}")
        return self

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return STUDENT, FAKE

    @property
    def frozen_roles(self) -> tuple[str, ...]:
        return () if self.ema_decay is None else (AVERAGE,)

    @property
    def result(self) -> str:
        return STUDENT if self.ema_decay is None else AVERAGE


@dataclass(frozen=True)
class Draw:
    """B student samples to be made, siblings of P prompts, one batch of one update."""

    prompts: Prompts  # P
    condition: Condition  # P
    group: Tensor  # (B,) int64, 0 .. P - 1
    sibling: Tensor  # (B,) int64
    seed: int
    step: int
    number: int  # of the batch within its step

    def __len__(self) -> int:
        return len(self.group)

    def keys(self, *purpose: int) -> list[tuple[int, ...]]:
        """The key of each sample's noise for a purpose."""
        pairs = zip(self.group.tolist(), self.sibling.tolist(), strict=True)
        return [(self.seed, self.step, self.number, self.prompts.index[g], s, *purpose) for g, s in pairs]

    def conditions(self) -> Condition:
        """One condition a sample (B)."""
        return self.condition[self.group.to(self.condition.tokens.device)]

    def __getitem__(self, items: Tensor) -> Self:
        return replace(self, group=self.group[items], sibling=self.sibling[items])


@dataclass(frozen=True)
class Call:
    """The call of a batch that is trained: call `k` (from 0) at time t, and the path that leads there."""

    network: str  # whom this batch trains: the student, or the fake with the student's samples
    draw: Draw
    k: int
    t: Tensor  # scalar
    path: Tensor  # (k + 1 or more, B, C, h, w) inputs of the calls, path[k] that of the trained one
    advantage: Tensor | None = None  # (B,) of the finished sample, if it was scored
    use: int = 0  # how many updates the path has served before

    def __len__(self) -> int:
        return len(self.draw)

    def __getitem__(self, items: Tensor) -> Self:
        advantage = None if self.advantage is None else self.advantage[items]
        return replace(self, draw=self.draw[items], path=self.path[:, items.to(self.path.device)], advantage=advantage)


@dataclass(frozen=True)
class Student:
    """Makes samples of a student and trains student and fake on them; which way to push is the method's affair."""

    pipeline: Pipeline
    prompts: Prompts
    config: RolloutConfig
    resolution: int
    batch_size: int  # samples in one forward and backward
    seed: int
    processes: Processes = ALONE

    @property
    def num_steps(self) -> int:
        return self.config.num_inference_steps

    def draw(self, step: int, number: int, draws_per_step: int) -> Draw:
        """The samples of the `number`-th batch of a step: this process' share of its prompts, `group_size` of each."""
        place = step * draws_per_step + number
        prompts = share(self.prompts, self.config.num_prompts, place, self.seed, self.processes)
        group = torch.arange(len(prompts)).repeat_interleave(self.config.group_size)
        sibling = torch.arange(self.config.group_size).repeat(len(prompts))
        condition = self.pipeline.encode(prompts.text)
        return Draw(prompts, condition, group, sibling, self.seed, step, number)

    def choice(self, draw: Draw, number: int = 0) -> int:
        """Which call is trained: the same on all processes."""
        u = noise.uniform([(self.seed, draw.step, draw.number, noise.CALL, number)], ()).item()
        return int(u * self.num_steps)

    @torch.no_grad()
    def path(self, draw: Draw, num_calls: int) -> Tensor:
        """Inputs of the first calls, from pure noise on: (num_calls + 1, B, C, h, w); the last entry is the input of
        the call after them, or the finished sample."""
        times = self.times()[: num_calls + 1]
        parts = []
        with self.pipeline.roles.merged(STUDENT) if self.config.merge_lora and num_calls else nullcontext():
            for part in torch.arange(len(draw)).split(self.config.sample_batch_size):
                noises = self.noises(draw[part])
                predict = self._predict(draw[part].conditions())
                later = torch.cat([noises[1:], torch.zeros_like(noises[:1])])  # nothing is added after the last call
                parts.append(few_step(predict, noises[0], times, later[:num_calls]))
        return torch.cat(parts, dim=1)

    def noises(self, draw: Draw) -> Tensor:
        """The noise of every call (K, B, C, h, w): what is put in first, then what is added after each prediction."""
        shape = (self.num_steps, *self.pipeline.latent_shape(self.resolution))
        return noise.normal(draw.keys(noise.CHAIN), shape).to(self.pipeline.device).transpose(0, 1)

    def call(self, network: str, draw: Draw) -> Call:
        """A batch, with the path to the call that is drawn for it."""
        k = self.choice(draw)
        return Call(network, draw, k, self.times()[k], self.path(draw, k))

    def x0(self, call: Call) -> Tensor:
        """What the student makes of a batch (B, C, h, w), with gradient to its weights."""
        return self.pipeline.predict(call.path[call.k], call.t, call.draw.conditions(), STUDENT).x0

    def updates(self, step: int, config: StudentConfig) -> Iterator[Call]:
        """The batches of a step: the fake's, then the student's one."""
        draws = config.fake_updates + 1
        extra = 0 if step else config.fake_warmup
        yield from self.fake_calls(step, range(1, draws + extra), draws)
        yield self.call(STUDENT, self.draw(step, 0, draws))

    def log(self, step: int, config: StudentConfig, num_updates: int = 1) -> dict[str, float]:
        """How many pictures a step made: one rollout for `num_updates` updates of the student, and the fake's own."""
        batches = 1 + num_updates * config.fake_updates + (0 if step else config.fake_warmup)
        size = len(range(min(self.config.num_prompts, len(self.prompts)))[self.processes.mine])
        return {"images": float(batches * size * self.config.group_size)}

    def fake_calls(self, step: int, numbers: Iterable[int], draws_per_step: int) -> Iterator[Call]:
        """Batches for the fake, of fresh samples each."""
        for number in numbers:
            yield self.call(FAKE, self.draw(step, number, draws_per_step))

    def fake_losses(self, call: Call, times: Callable[[Tensor], Tensor]) -> Iterator[Loss]:
        """The fake learns to denoise the student's samples, at `times` of levels (B,) that are even over (0, 1)."""
        t = times(self.levels(call.draw, "stratified", 0, noise.FAKE)).to(self.pipeline.device)
        for part in torch.arange(len(call)).split(self.batch_size):
            own = call[part]
            with torch.no_grad():
                x0 = self.x0(own)
            eps = noise.normal(own.draw.keys(noise.FAKE), x0.shape[1:]).to(x0)
            at = t[part.to(t.device)]
            said = self.pipeline.predict(self.pipeline.process.noised(x0, eps, at), at, own.draw.conditions(), FAKE)
            yield Loss(FAKE, fake_score_loss(said, x0, eps, len(call)))

    def push_losses(
        self, call: Call, update: Callable[[Tensor, Call], tuple[Tensor, dict[str, Tensor]]]
    ) -> Iterator[Loss]:
        """The student's samples learn to stand where `update(x, call)` moves them; x (B, ...) holds whole groups.

        A group that is too large for one pass takes two: all its samples first, gradients second.
        """
        for members in whole_groups(call.draw.group, self.batch_size):
            pack, parts = call[members], torch.arange(len(members)).split(self.batch_size)
            if len(parts) == 1:
                x = self.x0(pack)
                moved, metrics = update(x.detach(), pack)
                yield Loss(STUDENT, push_loss(x, moved, len(call)), metrics, len(pack))
                continue
            with torch.no_grad():
                moved, metrics = update(torch.cat([self.x0(pack[part]) for part in parts]), pack)
            for part in parts:
                x = self.x0(pack[part])
                value = push_loss(x, moved[part.to(moved.device)], len(call))
                yield Loss(STUDENT, value, metrics, len(pack))
                metrics = {}  # of the pack: told once

    @torch.no_grad()
    def direction(
        self,
        x: Tensor,
        call: Call,
        config: StudentConfig,
        times: Tensor | None = None,
        real_share: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """r (B, ...), the misfit n (B,) and the times (B,), of samples x; all averaged over the comparisons.

        `times` (M, B) in place of the configuration's own draws; with `real_share` the teacher is the base and that
        much of the fake's LoRA.
        """
        teacher, roles = (REFERENCE if real_share is None else FAKE), self.pipeline.roles
        total, sizes = torch.zeros_like(x), []
        times = self.matching_times(call, config) if times is None else times
        for number, t in enumerate(times.to(x.device)):
            eps = noise.normal(call.draw.keys(noise.MATCHING, number, call.use), x.shape[1:]).to(x)
            y, condition = self.pipeline.process.noised(x, eps, t), call.draw.conditions()
            real, fake = [], []
            for part in torch.arange(len(x), device=x.device).split(self.batch_size):
                at = (y[part], t[part], condition[part])
                with nullcontext() if real_share is None else roles.scaled(FAKE, real_share):
                    real.append(self.pipeline.predict(*at, teacher, config.real_guidance_scale).x0)
                fake.append(self.pipeline.predict(*at, FAKE).x0)
            real = torch.cat(real)
            total += real - torch.cat(fake)
            sizes.append(misfit(x, real))
        return total / len(times), torch.stack(sizes).mean(0), times.mean(0).to(x.device)

    def matching_times(self, call: Call, config: StudentConfig) -> Tensor:
        """Times (M, B) at which student and teacher are compared."""
        levels = torch.stack([self.levels(call.draw, config.times, m, use=call.use) for m in range(config.num_renoise)])
        return config.min_time + (config.max_time - config.min_time) * levels

    def reward_gradient(self, name: str, reward: Any, x: Tensor, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of R(decode(x)) (B, ...), 0 where the reward does not apply, and to log: the mean of R, and how
        many samples have none that should."""
        found, scores, failed = [], [], 0
        for part in torch.arange(len(x)).split(self.batch_size):
            about = call.draw.prompts.of(call.draw.group[part])
            with torch.enable_grad():
                leaf = x[part.to(x.device)].detach().requires_grad_()
                score, missing = with_gradient(name, reward, self.pipeline.decode(leaf), *about, call.draw.group[part])
                found.append(torch.autograd.grad(score.nansum(), leaf)[0])
            scores.append(score.detach())
            failed += missing
        log = {f"rewards/{name}/mean": torch.cat(scores).nanmean(), f"failed/{name}": torch.tensor(float(failed))}
        return torch.cat(found), log

    def levels(
        self, draw: Draw, mode: TimeMode, comparison: int, purpose: int = noise.MATCHING, use: int = 0
    ) -> Tensor:
        """Numbers (B,) in [0, 1): one a sample or one a group, evenly spread over all processes' if stratified."""
        num_prompts = min(self.config.num_prompts, len(self.prompts))
        size = num_prompts if mode.startswith("shared") else num_prompts * self.config.group_size
        key = (self.seed, draw.step, draw.number, noise.TIMES, purpose, comparison, use)
        level = noise.uniform([key], (size,))[0]
        if mode.endswith("stratified"):
            level = (torch.randperm(size, generator=noise.generator(*key, noise.ORDER)) + level) / size
        if mode.startswith("shared"):
            return level[self.processes.mine][draw.group]
        return level.unflatten(0, (num_prompts, -1))[self.processes.mine][draw.group, draw.sibling]

    def times(self) -> Tensor:
        """When the student is called (K + 1,); the last is 0."""
        return self.pipeline.few_step_grid(self.num_steps, self.resolution).to(self.pipeline.device)

    def scheduler(self) -> SchedulerMixin:
        """With which stock diffusers samples the student."""
        return self.pipeline.student_scheduler(self.num_steps, self.resolution)

    def _predict(self, condition: Condition) -> Callable[[Tensor, Tensor], Prediction]:
        return lambda x_t, t: self.pipeline.predict(x_t, t, condition, STUDENT)


def fake_time(config: StudentConfig, levels: Tensor) -> Tensor:
    """The times at which the fake learns, over the whole range, from even levels (B,)."""
    if config.fake_times == "logit_normal":
        levels = logit_normal(torch.special.ndtri(levels.clamp(1e-6, 1 - 1e-6)))
    return levels.clamp_min(1 / NUM_TIMESTEPS)  # a table's first row; below it lies clean data
