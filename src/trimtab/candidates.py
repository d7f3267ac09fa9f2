"""Candidates of a one-step generator: samples of a rollout, and from which of them, or of the user's pictures, they
learn.

Ranking is all that is taken from a reward. Samples of equal score never stand on both sides, so a prompt whose
candidates all earn the same teaches nothing. A prompt that can't teach is left out by its own process alone; nobody
waits for it, for the learner asks all processes before it averages.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from trimtab import groups, noise
from trimtab.batch import Condition, Prompts, Rollout
from trimtab.errors import UserError
from trimtab.pipelines import Pipeline
from trimtab.pipelines.features import FeatureMap
from trimtab.rewards.composite import Composite, RewardFailed, Scored
from trimtab.rollout import Rollouts, comparable
from trimtab.worlds.pairs import Pairs
from trimtab.worlds.pictures import CURE, Unusable

logger = logging.getLogger(__name__)

MOST_KEPT = 4096  # latents of the user's pictures in memory: 256 MiB at 512 pixels


@dataclass(frozen=True)
class Anchors:
    """A samples to move towards, or away from."""

    latents: Tensor  # (A, C, h, w)
    group: Tensor  # (A,) int64
    place: Tensor | None  # (A,) where they stand among the candidates; None: they are pictures from elsewhere

    def __len__(self) -> int:
        return len(self.group)

    def of(self, group: int) -> Tensor:
        """Indices of those of one prompt."""
        return (self.group == group).nonzero().squeeze(1)


@dataclass(frozen=True)
class Ranked:
    """B candidates of the prompts that teach, and their anchors; `num_prompts` counts those that do not, too."""

    rollout: Rollout  # B
    learns: Tensor  # (B,) bool
    better: Anchors
    worse: Anchors
    num_prompts: int

    def __len__(self) -> int:
        return len(self.rollout)

    def share(self) -> Tensor:
        """What each candidate counts for (B,): those of one prompt that learn for one part in `num_prompts`."""
        group = self.rollout.group
        number = torch.bincount(group, weights=self.learns.float(), minlength=1)[group]
        return self.learns / number / self.num_prompts

    def frac_skipped(self) -> float:
        """How many of the prompts teach nothing."""
        return 1 - len(self.rollout.group.unique()) / self.num_prompts

    def met_themselves(self, rows: Tensor, group: int) -> tuple[Tensor | None, Tensor | None]:
        """Which of a prompt's better and worse (N, A) are the very candidates `rows` (N,); None: pictures never are."""
        sides = (self.better, self.worse)
        return tuple(None if s.place is None else rows[:, None] == s.place[s.of(group)] for s in sides)

    def __getitem__(self, items: Tensor) -> Self:
        """Some of the candidates, whole groups, with their anchors."""
        where = torch.full((len(self),), -1).scatter(0, items, torch.arange(len(items)))
        kept = self.rollout.group[items].unique()
        sides = (_of_groups(side, kept, where) for side in (self.better, self.worse))
        return Ranked(self.rollout[items], self.learns[items], *sides, self.num_prompts)


def _of_groups(side: Anchors, kept: Tensor, where: Tensor) -> Anchors:
    own = torch.isin(side.group, kept)
    place = None if side.place is None else where[side.place[own]]
    return Anchors(side.latents[own.to(side.latents.device)], side.group[own], place)


# ---- who is better


def best_and_worst(reward: Tensor, group: Tensor, num_best: int, num_worst: int) -> tuple[Tensor, Tensor]:
    """Marks (B,) of each group's best and worst by reward (B,), finite; of equal ones the earlier comes first.

    Where the last of the best and the first of the worst have one score, all of that score leave the sides that also
    hold others: both if both do. Groups of fewer than `num_best` + `num_worst`, or of one score, have no mark.
    """
    best, worst = torch.zeros_like(group, dtype=torch.bool), torch.zeros_like(group, dtype=torch.bool)
    for name in group.unique():
        members = (group == name).nonzero().squeeze(1)
        order = members[reward[members].argsort(descending=True, stable=True)]
        if len(order) < num_best + num_worst:
            continue
        top, bottom = order[:num_best], order[len(order) - num_worst :]
        shared = reward[top[-1]]
        if shared == reward[bottom[0]]:
            better, worse = top[reward[top] != shared], bottom[reward[bottom] != shared]
            if not len(better) and not len(worse):
                continue
            top, bottom = (better if len(better) else top), (worse if len(worse) else bottom)
        best[top], worst[bottom] = True, True
    return best, worst


def in_units_of_siblings(scored: Scored, rewards: Composite, group: Tensor) -> Tensor:
    """What candidates are worth together (B,): each reward less its siblings' mean, in units of their deviation, then
    weighted; NaN where a score is missing. One reward stays as it is, for only its order counts."""
    weights = rewards.weights
    if len(weights) == 1:
        return scored.total
    total = torch.where(scored.total.isnan(), torch.nan, 0.0)
    known = scored.total.isfinite()
    for name, weight in weights.items():
        raw = scored.raw[name].double()
        fits = known & raw.isfinite()  # a reward that does not apply to a prompt is NaN for all its siblings
        own = groups.centred(raw[fits], group[fits])
        spread = groups.deviations(raw[fits], group[fits]).clamp_min(1e-6)
        total[fits] += weight * own / spread
    return total / sum(abs(weight) for weight in weights.values())


def ranked(rollout: Rollout, num_best: int, num_worst: int) -> Ranked:
    """The candidates of the prompts of which some are better than others; all of these learn."""
    best, worst = best_and_worst(rollout.reward, rollout.group, num_best, num_worst)
    return _taught(rollout, torch.ones_like(best), best, worst)


def _taught(rollout: Rollout, learns: Tensor, best: Tensor, worst: Tensor) -> Ranked:
    """Of the groups that have both sides."""
    kept = torch.isin(rollout.group, rollout.group[best]) & torch.isin(rollout.group, rollout.group[worst])
    rows = kept.nonzero().squeeze(1)
    own = rollout[rows]
    return Ranked(own, learns[rows], _among(own, best[rows]), _among(own, worst[rows]), len(rollout.prompts))


def _among(rollout: Rollout, marked: Tensor) -> Anchors:
    place = marked.nonzero().squeeze(1)
    return Anchors(rollout.latents[place.to(rollout.latents.device)], rollout.group[place], place)


# ---- where they are compared


@torch.no_grad()
def latents_of(rollouts: Rollouts, rollout: Rollout, role: str, batch_size: int) -> Tensor:
    """What a role makes of the rollout's noise (B, C, h, w), in parts."""
    return torch.cat([rollouts.again(rollout[part], role) for part in torch.arange(len(rollout)).split(batch_size)])


@dataclass(frozen=True)
class Space:
    """Features (B, T, D) of samples by key, each under its own prompt and with its own noise."""

    rollouts: Rollouts
    feature_map: FeatureMap
    batch_size: int  # samples in one forward

    def of(self, rollout: Rollout, latents: Tensor) -> dict[str, Tensor]:
        """Of latents (B, C, h, w) that were made of a rollout's noise, with gradient to them."""
        keys = [(*key, noise.FEATURES) for key in rollout.noise_keys()]
        return self._mapped(latents, rollout.condition[rollout.group.to(latents.device)], keys)

    @torch.no_grad()
    def in_parts(self, rollout: Rollout, latents: Tensor) -> dict[str, Tensor]:
        """The same without gradient, however many."""
        parts = torch.arange(len(rollout)).split(self.batch_size)
        return _cat([self.of(rollout[part], latents[part.to(latents.device)]) for part in parts])

    @torch.no_grad()
    def of_anchors(self, side: Anchors, rollout: Rollout, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a side: rows of the candidates' own, `found`, or those of pictures."""
        if side.place is not None:
            return {key: x[side.place.to(x.device)] for key, x in found.items()}
        index = [rollout.prompts.index[g] for g in side.group]
        number = _numbered(side.group.tolist())
        keys = [(rollout.seed, rollout.step, i, n, noise.ANCHORS) for i, n in zip(index, number, strict=True)]
        parts = []
        for part in torch.arange(len(side)).split(self.batch_size):
            latents = side.latents[part.to(side.latents.device)]
            condition = rollout.condition[side.group[part].to(latents.device)]
            parts.append(self._mapped(latents, condition, [keys[n] for n in part]))
        return _cat(parts)

    def _mapped(self, latents: Tensor, condition: Condition, keys: list[tuple[int, ...]]) -> dict[str, Tensor]:
        return self.feature_map(latents, condition, noise.normal(keys, latents.shape[1:]).to(latents))


def _numbered(group: list[int]) -> list[int]:
    """Each one's number within its own group, from 0."""
    seen: Counter[int] = Counter()
    numbers = []
    for name in group:
        numbers.append(seen[name])
        seen[name] += 1
    return numbers


def _cat(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


# ---- rounds, until there are enough successes and failures


@torch.no_grad()
def successes_and_failures(
    rollouts: Rollouts, step: int, role: str, threshold: float, num_each: int, num_rounds: int
) -> tuple[Ranked, dict[str, float]]:
    """Candidates of a reward that says yes (above the threshold) or no, drawn in rounds of `group_size` until a prompt
    has `num_each` of both; a prompt that has not after `num_rounds` teaches nothing. The successes learn."""
    prompts = rollouts.prompts_of(step)
    waiting, rounds, said, num_images = list(range(len(prompts))), [], [], 0
    for number in range(num_rounds):
        if not waiting:
            break
        first = number * rollouts.config.group_size
        drawn, images = rollouts.draw(prompts[waiting], step, role, first)
        num_images += len(images)
        try:
            scored = rollouts.scores(drawn, images)
        except RewardFailed as error:
            if not rounds:
                raise
            logger.warning("round %d: %s; the rounds before it are what there is", number + 1, error)
            break
        said.append(scored)
        total = scored.total
        known = total.isfinite().nonzero().squeeze(1)
        drawn = replace(drawn[known], reward=total[known].float(), group=torch.tensor(waiting)[drawn.group[known]])
        rounds.append(drawn)
        reward, group = (torch.cat([getattr(each, name) for each in rounds]) for name in ("reward", "group"))
        seen = {g: reward[group == g] > threshold for g in waiting}
        waiting = [g for g in waiting if len(seen[g]) and _short(seen[g], num_each)]  # none scored: none will be
    comparable(reward, group)
    rollout = _joined(rounds, prompts, rollouts.pipeline)
    good = rollout.reward > threshold
    best, worst = torch.zeros_like(good), torch.zeros_like(good)
    for g in range(len(prompts)):
        if _short(good[rollout.group == g], num_each):
            continue
        for marks, side in ((best, good), (worst, ~good)):
            marks[((rollout.group == g) & side).nonzero().squeeze(1)[:num_each]] = True
    rows = (best | worst).nonzero().squeeze(1)
    raw = {name: torch.cat([each.raw[name] for each in said]) for name in said[0].raw}
    failed = {name: sum(each.failed[name] for each in said) for name in said[0].failed}
    log = {
        "images": float(num_images),
        "reward": rollout.reward.mean().item(),
        "success_rate": good.float().mean().item(),
        **rollouts.rewards.log(raw, failed),
    }
    return _taught(rollout[rows], best[rows], best[rows], worst[rows]), log


def _short(good: Tensor, num_each: int) -> bool:
    return min(int(good.sum()), int((~good).sum())) < num_each


def _joined(rounds: list[Rollout], prompts: Prompts, pipeline: Pipeline) -> Rollout:
    """All rounds as one rollout of all prompts."""
    columns = ("latents", "group", "sibling", "reward", "scaled", "advantage")
    joined = {name: torch.cat([getattr(each, name) for each in rounds]) for name in columns}
    return replace(rounds[0], prompts=prompts, condition=pipeline.encode(prompts.text), **joined)


# ---- pairs of the user's own


@dataclass(frozen=True)
class Offline:
    """Candidates that nobody scores, and pictures that somebody preferred to others, encoded when they are needed."""

    rollouts: Rollouts  # its prompts are those of the pairs
    pairs: Pairs
    known: dict[int, Tensor | None] = field(default_factory=dict)  # latents by number; None: the picture is broken

    @torch.no_grad()
    def collect(self, step: int, role: str) -> tuple[Ranked, dict[str, float]]:
        """The candidates of a step; UserError for a picture that proves broken, or its prompt may teach nothing."""
        drawn, _ = self.rollouts.draw(self.rollouts.prompts_of(step), step, role, decoded=False)
        columns = (self.pairs.chosen, self.pairs.rejected)
        with self.rollouts.processes.together():
            better, worse = (self._anchors(drawn.prompts, column) for column in columns)
        rows = (torch.isin(drawn.group, better.group) & torch.isin(drawn.group, worse.group)).nonzero().squeeze(1)
        learns = torch.ones_like(drawn.group, dtype=torch.bool)
        asked = {number for column in columns for index in drawn.prompts.index for number in column[index]}
        left_out = sum(self.known.get(number, 0) is None for number in asked)
        log = {"images": float(len(drawn)), "pictures_left_out": float(left_out)}
        return Ranked(drawn, learns, better, worse, len(drawn.prompts))[rows], log

    def _anchors(self, prompts: Prompts, column: tuple[tuple[int, ...], ...]) -> Anchors:
        wanted = [(g, number) for g, index in enumerate(prompts.index) for number in column[index]]
        found = [(g, x) for g, number in wanted if (x := self._latents(number)) is not None]
        latents = [x for _, x in found] or [
            torch.empty(0, *self.rollouts.pipeline.latent_shape(self.rollouts.resolution))
        ]
        return Anchors(
            torch.cat(latents).to(self.rollouts.pipeline.device),
            torch.tensor([g for g, _ in found], dtype=torch.int64),
            None,
        )

    def _latents(self, number: int) -> Tensor | None:
        """Of one picture (1, C, h, w), on the CPU."""
        if number in self.known:
            return self.known[number]
        try:
            pixels = self.pairs.read(number, self.rollouts.resolution)
            found = self.rollouts.pipeline.posterior(pixels[None].float() / 255)[0].cpu()
        except Unusable as error:
            if self.pairs.on_error == "stop":
                raise UserError(f"{error}; {CURE}") from error
            logger.warning("%s; it is left out", error)
            found = None
        if found is None or len(self.known) < MOST_KEPT:
            self.known[number] = found
        return found
