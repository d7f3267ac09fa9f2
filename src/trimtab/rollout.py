"""Rollouts: prompts -> groups of siblings -> pictures -> rewards -> advantages. No gradient passes through here.

This is the one place that orders groups. Every process takes whole prompts, its share of the step's, so that what is
compared with its siblings never crosses a rank; only the global standard deviation of the rewards needs all of them.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab import groups, noise
from trimtab.batch import Prompts, Rollout
from trimtab.config import Strict
from trimtab.distributed import ALONE, Processes
from trimtab.pipelines import Pipeline
from trimtab.prediction import Prediction
from trimtab.rewards.composite import Composite, RewardFailed, Scored
from trimtab.solvers import ode

logger = logging.getLogger(__name__)

ADVANTAGE_EPS = 1e-4  # added to the standard deviation, as in the code of Flow-GRPO and DiffusionNFT


class RolloutConfig(Strict):
    """What one step of online training samples."""

    num_prompts: int = Field(48, gt=0)  # groups a step, over all processes
    group_size: int = Field(24, gt=0)  # siblings of one prompt
    num_inference_steps: int = Field(10, gt=0)
    guidance_scale: float = Field(1.0, ge=0)  # 1 is off
    solver_order: Literal[1, 2] = 1
    sample_batch_size: int = Field(8, gt=0)  # pictures in one forward
    # s: siblings start from sqrt(1 - s^2) of noise that they share and s of their own, which is standard normal, too.
    # Near siblings differ in few things, so that ranks say which of these count. 1: their noise is independent.
    noise_spread: float = Field(1.0, gt=0, le=1)
    merge_lora: bool = False  # sample with the LoRA added to the weights: faster, and as exact as their type
    # Rewards are divided by the standard deviation among siblings, over all groups ("pooled") or of each ("group"), or
    # by that of all rewards ("global", as published), which a constant added to one prompt's rewards would change.
    advantage_std: Literal["pooled", "global", "group"] = "pooled"


@dataclass(frozen=True)
class Rollouts:
    """Makes the rollout of a step. The same (seed, step) gives the same pictures on any number of processes."""

    pipeline: Pipeline
    prompts: Prompts
    rewards: Composite | None  # None: nothing is scored
    config: RolloutConfig
    resolution: int
    seed: int
    processes: Processes = ALONE

    @torch.no_grad()
    def collect(
        self, step: int, role: str, combine: Callable[[Scored, Composite, Tensor], Tensor] | None = None
    ) -> tuple[Rollout, dict[str, float]]:
        """The rollout of a step, sampled by `role`, and what to log of it; unscored pictures are left out. `combine`
        says what several rewards are worth together (B,), given their scores and the groups; None: their sum."""
        started = time.perf_counter()
        drawn, images = self.draw(self.prompts_of(step), step, role)
        sampled = time.perf_counter()
        with self.processes.together():
            scored = self.scores(drawn, images)
            kept = comparable(scored.total, drawn.group)
        seconds = {"seconds/sampling": sampled - started, "seconds/rewards": time.perf_counter() - sampled}
        total = scored.total if combine is None else combine(scored, self.rewards, drawn.group)
        rollout = self.rewarded(drawn[kept], total[kept])
        log = self.log(scored, rollout) | {"reward": scored.total[kept].mean().item()}
        return rollout, log | seconds | {"images": float(len(images))}

    @torch.no_grad()
    def draw(
        self, prompts: Prompts, step: int, role: str, first: int = 0, decoded: bool = True
    ) -> tuple[Rollout, Tensor | None]:
        """Siblings `first`, `first` + 1, ... of each prompt, not yet rewarded, and their pictures on the CPU."""
        blank, latents, images = self.blank(prompts, step, first), [], []
        with self.pipeline.roles.merged(role) if self.config.merge_lora else nullcontext():
            for part in torch.arange(len(blank)).split(self.config.sample_batch_size):
                latents.append(self.again(blank[part], role))
                if decoded:
                    images.append(self.pipeline.decode(latents[-1]).cpu())
        return replace(blank, latents=torch.cat(latents)), torch.cat(images) if decoded else None

    def blank(self, prompts: Prompts, step: int, first: int = 0) -> Rollout:
        """The samples of a step that are to be drawn: their latents say nothing yet, and rewards are NaN."""
        size = self.config.group_size
        group = torch.arange(len(prompts)).repeat_interleave(size)  # (B,)
        shape = self.pipeline.latent_shape(self.resolution)
        unknown = torch.full((len(group),), math.nan)
        return Rollout(
            prompts=prompts,
            condition=self.pipeline.encode(prompts.text),
            latents=torch.empty(len(group), *shape, device=self.pipeline.device),
            group=group,
            sibling=first + torch.arange(size).repeat(len(prompts)),
            reward=unknown,
            scaled=unknown,
            advantage=unknown,
            seed=self.seed,
            step=step,
        )

    def again(self, rollout: Rollout, role: str) -> Tensor:
        """Clean latents (B, C, h, w) that a role makes of a rollout's noise, with gradient to its weights."""
        start, config = self.noises(rollout).to(self.pipeline.device), self.config
        own = rollout.condition[rollout.group.to(self.pipeline.device)]

        def predict(x_t: Tensor, t: Tensor) -> Prediction:
            return self.pipeline.predict(x_t, t, own, role, config.guidance_scale)

        return ode(predict, self.pipeline.start(start), self.time_grid().to(start.device), config.solver_order)

    def noises(self, rollout: Rollout) -> Tensor:
        """What samples start from (B, C, h, w), on the CPU: siblings `noise_spread` from what they share."""
        shape, spread = rollout.latents.shape[1:], self.config.noise_spread
        own = noise.normal([(*key, noise.ROLLOUT) for key in rollout.noise_keys()], shape)
        if spread == 1:
            return own
        present, place = rollout.group.unique(return_inverse=True)
        indices = [rollout.prompts.index[group] for group in present]
        shared = noise.normal([(rollout.seed, rollout.step, index, 0, noise.SHARED) for index in indices], shape)
        return (1 - spread**2) ** 0.5 * shared[place] + spread * own

    def scores(self, drawn: Rollout, images: Tensor) -> Scored:
        """What the pictures earn."""
        return self.rewards.score(images, *drawn.prompts.of(drawn.group), drawn.group)

    def rewarded(self, drawn: Rollout, reward: Tensor) -> Rollout:
        """Samples with their rewards (B,), all finite, and the advantages over their siblings."""
        reward = reward.float()
        scaled = reward / (self._spread(reward, drawn.group) + ADVANTAGE_EPS)
        return replace(drawn, reward=reward, scaled=scaled, advantage=groups.centred(scaled, drawn.group))

    @property
    def training_scale(self) -> float:
        """The guidance under which samples of a rollout are trained on."""
        return self.pipeline.training_scale(self.config.guidance_scale)

    def time_grid(self) -> Tensor:
        """Falling times (T + 1,) that the solver visits."""
        return self.pipeline.time_grid(self.config.num_inference_steps, self.resolution)

    def prompts_of(self, step: int) -> Prompts:
        """This process' share of the prompts of a step."""
        return share(self.prompts, self.config.num_prompts, step, self.seed, self.processes)

    def _spread(self, reward: Tensor, group: Tensor) -> Tensor:
        """Standard deviation of the rewards: of each sample's siblings (B,), or over all processes, a scalar."""
        if self.config.advantage_std == "group":
            return groups.deviations(reward, group)
        if self.config.advantage_std == "pooled":
            reward = groups.centred(reward, group)
        # Processes gather equal shapes only, and each may have lost pictures or have a prompt less.
        size = math.ceil(self.config.num_prompts / self.processes.number) * self.config.group_size
        padded = F.pad(reward, (0, size - len(reward)), value=math.nan)
        everybody = self.processes.everybody(padded)
        return everybody[everybody.isfinite()].std(correction=0)

    def mean_length(self, part: Rollout) -> float:
        """Samples in a part of a step's rollout: the mean over processes, by which each divides its sum, so that
        samples weigh the same wherever they are. All processes must ask."""
        return self.processes.everybody(torch.tensor([float(len(part))])).mean().item()

    def log(self, scored: Scored, rollout: Rollout) -> dict[str, float]:
        """What there is to say of a rollout."""
        log = {
            "reward_std": rollout.reward.std(correction=0).item(),
            "frac_reward_zero_std": groups.frac_zero_std(rollout.reward, rollout.group).item(),
            "diversity": diversity(rollout.latents, rollout.group),
        }
        return log | self.rewards.log(scored.raw, scored.failed)


def comparable(total: Tensor, group: Tensor) -> Tensor:
    """Indices of the pictures that have a score and at least one scored sibling; RewardFailed where there is none."""
    scored = total.isfinite()
    siblings = torch.bincount(group, weights=scored.double())[group]
    kept = (scored & (siblings > 1)).nonzero().squeeze(1)
    if not len(kept):
        raise RewardFailed(
            f"only {int(scored.sum())} of {len(total)} pictures were scored, no two of them of one prompt"
        )
    return kept


def share(prompts: Prompts, size: int, draw: int, seed: int, processes: Processes) -> Prompts:
    """This process' share of the `draw`-th `size` prompts: each pass over a file is a new order, none comes twice."""
    size = min(size, len(prompts))
    epoch, place = divmod(draw, len(prompts) // size)
    order = torch.randperm(len(prompts), generator=noise.generator(seed, epoch, noise.ORDER)).tolist()
    return prompts[order[place * size : (place + 1) * size][processes.mine]]


def diversity(latents: Tensor, group: Tensor) -> float:
    """Root mean square distance of siblings' latents: the mean over groups of sqrt(2 variance within the group)."""
    parts: Iterator[Tensor] = (latents[group == g].flatten(1) for g in group.unique())
    return torch.stack([(2 * part.var(0).mean()).sqrt() for part in parts]).mean().item()
