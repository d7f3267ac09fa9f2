"""Training points of the forward process: clean samples, noised again, with what a network should say there.

CRD, DiffusionNFT and AWM never differentiate a sampler; they regress at x_t = alpha(t) x_0 + sigma(t) eps for fresh
(t, eps). All siblings of a prompt share each t, so that a group's statistics compare like with like.
"""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from trimtab import noise
from trimtab.batch import Condition, Rollout
from trimtab.method import MethodSettings
from trimtab.pipelines import Pipeline
from trimtab.process import shifted, stratified


class TimesConfig(MethodSettings):
    """Where on the path from data to noise a sample is trained."""

    num_train_times: int = Field(10, gt=0)  # T, for each sample of a rollout
    time_sampling: Literal["stratified", "grid"] = "stratified"  # grid: times that the rollout's solver visits
    time_shift: float = Field(1.0, gt=0)  # of stratified times; SD3 samples with 3
    min_time: float = Field(0.0, ge=0, lt=1)
    max_time: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_time >= self.max_time:
            raise ValueError(f"min_time {self.min_time} is not below max_time {self.max_time}")
        if self.time_sampling == "grid" and (self.time_shift, self.min_time, self.max_time) != (1, 0, 1):
            raise ValueError(
                "time_sampling=grid takes the solver's own times; leave time_shift, min_time and max_time at 1, 0 and 1"
            )
        return self


@dataclass(frozen=True)
class Points:
    """B samples at one time each, all siblings at the same."""

    x0: Tensor  # (B, C, h, w)
    x_t: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    target: Tensor  # (B, C, h, w) the flow eps - x_0
    prompts: Condition  # P, of which each has many samples: SD3's takes 5 MB
    group: Tensor  # (B,) which of these a sample was made for

    @property
    def condition(self) -> Condition:
        """One a sample (B)."""
        return self.prompts[self.group]


def draw_times(config: TimesConfig, grid: Tensor, keys: list[tuple[int, ...]]) -> Tensor:
    """Times (P, T), one row for each key; `grid` (S + 1,) is the solver's and ends in 0, which is left out."""
    u = noise.uniform(keys, (config.num_train_times,))  # (P, T)
    if config.time_sampling == "grid":
        place = stratified(u) * (len(grid) - 1)
        return grid[place.long().clamp(max=len(grid) - 2)]  # rounding may carry the last one to the end
    return shifted(stratified(u, config.min_time, config.max_time), config.time_shift)


def times_of(rollout: Rollout, config: TimesConfig, grid: Tensor) -> Tensor:
    """Times (B, T) of a rollout's samples: one draw a prompt."""
    keys = [(rollout.seed, rollout.step, index, noise.TIMES) for index in rollout.prompts.index]
    return draw_times(config, grid, keys)[rollout.group]


def unit_signal(advantage: Tensor, clip: float) -> Tensor:
    """CRD's eq. 5, and DiffusionNFT's r: what an advantage (B,) says, in [0, 1], and 1/2 where it is 0."""
    return advantage.clamp(-clip, clip) / (2 * clip) + 0.5


def points(pipeline: Pipeline, rollout: Rollout, t: Tensor, number: int) -> Points:
    """The samples at times t (B,), the `number`-th of each; their noise is keyed by sample and number."""
    keys = [(*key, noise.TRAINING, number) for key in rollout.noise_keys()]
    x0 = rollout.latents
    eps = noise.normal(keys, x0.shape[1:]).to(x0)
    t = t.to(x0.device)
    group = rollout.group.to(x0.device)
    return Points(x0, pipeline.process.noised(x0, eps, t), t, eps - x0, rollout.condition, group)
