"""DrPO: drifting preference optimization of one-step generators, arXiv 2606.02521.

Candidates of one prompt are ranked; features of each drift towards those of the best and away from those of the worst,
and, more weakly, back to what the generator made of the same noise before training. Only the ranking is used: the
reward may be anything. The field is that of drifting models (github.com/lambertae/drifting), on one set of n features:

    (1)  T = [X; Y-; Y+], weights w_j = 1 on X, w- on Y-, w+ on Y+;   d_ij = |x_i - t_j|
    (2)  s = mean_ij(w_j d_ij) / mean_j(w_j);   c = s / sqrt(D);   u = x / c,  v = t / c
    (3)  L_ij = -(d_ij / s) / tau  (laplacian),  -(d_ij / s)^2 / (2 tau^2)  (rbf),  cos(x_i, t_j) / tau  (cosine)
    (4)  A = w_j sqrt( softmax_j(L) softmax_i(L) );   A+ on Y+, A- on X and Y-;   a+- = sum_j A+-
    (5)  F_i = a-_i sum_+ A+_ij v_j - a+_i sum_- A-_ij v_j
    (6)  V = sum over tau of F / rms(F)                                 field="normalised": the released code
         V = mean over tau of F / (a+ + a-)^2                           field="raw": of no fixed size
    (7)  L = mean_ij ( u - stopgrad(u + eta V) )^2,  c held constant;   its gradient in x is -2 eta V / (n D c)

    preference   Y+ = features of the M best, Y- = features of the M worst
    reference    Y+ = features of the frozen generator on the same noises, Y- = X itself without its diagonal
    total        L_preference + lambda L_reference, each feature key by itself; the sum or mean over keys

    symbol   name                     symbol   name
    K        rollout.group_size       M        num_positive, num_negative
    lambda   reference_weight         tau      temperatures
    w+, w-   positive_, negative_weight   eta  step_size

Not in the code that was released, and ours: `field="raw"`, which fades where the sides come to agree, so that
preference and reference can balance; `mask_self_anchor` and `token_mode="per_location"`; no update where scores are
equal.

Departures:

1. s, rms and means are those of one prompt. The released function averages over its batch, which it calls with one.
2. Anchors are rows of the candidates' own features; the release extracts and decodes them again.
3. One pair of weights w+, w- serves both fields; SDXL-Turbo's scripts have others for the reference (3500, 5000), which
   changes the direction by less than a rounding (see tests).
4. variant="binary": a prompt with too few successes or failures is skipped; its process goes on with the others.
5. Loss (7) says little: under "normalised" it lies between 3 and 9 (times 1 + lambda) whatever the state of training.
   Watch `drift`, `distance` and a reward that is not trained on: under "normalised" nothing but time stops the drift.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from trimtab.batch import whole_groups
from trimtab.candidates import Offline, Ranked, Space, in_units_of_siblings, latents_of, ranked, successes_and_failures
from trimtab.method import Loss, MethodSettings, Stateful
from trimtab.pipelines import Pipeline
from trimtab.pipelines.features import FeaturesConfig, build
from trimtab.rewards import recognizer
from trimtab.roles import REFERENCE, TRAINED
from trimtab.rollout import Rollouts
from trimtab.worlds.pairs import Pairs

LATENTS = ""  # stands among the keys of features for the latents themselves
FLOOR_DISTANCE, FLOOR_SCALE, FLOOR_AFFINITY, FLOOR_RMS = 1e-8, 1e-3, 1e-6, 1e-8  # of d^2, s and c, A^2 and rms^2
Kernel = Literal["laplacian", "rbf", "cosine"]


class FieldConfig(MethodSettings):
    """Eq. 1 to 7. Defaults: the released code's."""

    kernel: Kernel = "laplacian"
    temperatures: tuple[float, ...] = Field((0.02, 0.05, 0.2), min_length=1)
    field: Literal["normalised", "raw"] = "normalised"
    step_size: float = Field(1.0, gt=0)
    positive_weight: float = Field(3000.0, gt=0)  # w+, which changes next to nothing: it is a factor of all of F
    negative_weight: float = Field(3000.0, gt=0)  # w-, beside 1 for the candidates themselves
    mask_self_anchor: bool = False  # a candidate that is an anchor, too, does not meet itself there

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if min(self.temperatures) <= 0:
            raise ValueError(f"temperatures {self.temperatures} must be above 0")
        return self


class DrPOConfig(FieldConfig):
    """Defaults: the settings published for SD-Turbo, but for its feature map, whose weights are for one VAE alone, and
    for the sum over that map's keys."""

    name: Literal["drpo"] = "drpo"
    variant: Literal["online", "offline", "binary"] = "online"  # offline: data.pairs in place of rewards
    num_positive: int = Field(8, gt=0)  # M of the best
    num_negative: int = Field(8, gt=0)  # M of the worst
    reference_weight: float = Field(0.2, ge=0)  # lambda
    latent_weight: float = Field(0.0, ge=0)  # of the mean squared distance to the frozen generator's latents
    features: FeaturesConfig = FeaturesConfig()
    token_mode: Literal["merge", "per_location"] = "merge"  # all tokens of a key in one set, or each place by itself
    aggregate: Literal["sum", "mean"] = "mean"  # over the keys of the feature map
    threshold: float = 0.5  # variant=binary: what is above it is a success
    num_rounds: int = Field(4, gt=0)  # variant=binary: rollouts until there are M of both

    @property
    def learns_from_pairs(self) -> bool:
        return self.variant == "offline"

    @model_validator(mode="after")
    def _equal_sides(self) -> Self:
        if self.variant == "binary" and self.num_positive != self.num_negative:
            raise ValueError(
                f"binary takes as many successes as failures, not {self.num_positive} and {self.num_negative}"
            )
        if self.variant == "binary" and self.num_positive == 1:
            raise ValueError("binary learns from its successes, whose distances are the unit; give 2 or more of each")
        return self


# ---- the field


def drift(
    x: Tensor,
    better: Tensor,
    worse: Tensor,
    config: FieldConfig,
    *,
    better_self: Tensor | None = None,
    worse_self: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 1 to 6 of S sets x (S, n, D), Y+ (S, p, D) and Y- (S, m, D), detached, in float32: V (S, n, D), c (S, 1, 1),
    and the size of the raw field, its root mean square, a scalar.

    `better_self` (n, p) and `worse_self` (n, m) are true where an anchor is the sample itself and must not be met.
    """
    with torch.no_grad():
        x, better, worse = (each.detach().float() for each in (x, better, worse))
        n, m, width = x.shape[1], worse.shape[1], x.shape[2]
        targets = torch.cat([x, worse, better], dim=1)  # (S, n + m + p, D)
        directions = nn.functional.normalize(x, dim=2) @ nn.functional.normalize(targets, dim=2).mT
        # The field knows no origin, but its sums do: far from it, their difference would be rounding, made unit size.
        x, targets = x - x[:, :1], targets - x[:, :1]
        counts = (1.0, n), (config.negative_weight, m), (config.positive_weight, better.shape[1])
        weight = torch.cat([x.new_full((number,), value) for value, number in counts])
        distance = _distances(x, targets)  # (S, n, n + m + p)
        scale = (distance * weight).mean((1, 2), keepdim=True) / weight.mean()
        scale = scale.clamp_min(FLOOR_SCALE)  # (S, 1, 1)
        unit = (scale / width**0.5).clamp_min(FLOOR_SCALE)
        own = x.new_zeros(distance.shape[1:])
        own[:, :n] = torch.eye(n)
        for start, marks in ((n, worse_self), (n + m, better_self)):
            if marks is not None:
                own[:, start : start + marks.shape[1]] = marks.to(own)
        normalised, raw = torch.zeros_like(x), torch.zeros_like(x)
        for temperature in config.temperatures:
            logits = _logits(directions, distance / scale, temperature, config.kernel) - 100 / temperature * own
            affinity = (logits.softmax(2) * logits.softmax(1)).clamp_min(FLOOR_AFFINITY).sqrt() * weight
            force, mass = _force(affinity, targets / unit, n + m)
            normalised += force / force.square().mean((1, 2), keepdim=True).clamp_min(FLOOR_RMS).sqrt()
            raw += force / mass.square() / len(config.temperatures)
        return (raw if config.field == "raw" else normalised), unit, raw.square().mean().sqrt()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """(S, n, k), float32, by way of float64: a sample's distance to itself, which counts in the field, would else be
    rounding, three times the floor or more, and the field another on another machine."""
    a, b = x.double(), y.double()
    squares = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None] - 2 * a @ b.mT
    return squares.clamp_min(FLOOR_DISTANCE).sqrt().float()


def _logits(cosines: Tensor, relative: Tensor, temperature: float, kernel: Kernel) -> Tensor:
    """Eq. 3, (S, n, k)."""
    if kernel == "laplacian":
        return -relative / temperature
    if kernel == "rbf":
        return -(relative / temperature).square() / 2
    return cosines / temperature


def _force(affinity: Tensor, targets: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """Eq. 5 for one temperature: F (S, n, D) from A (S, n, k) and v (S, k, D), and a+ + a- (S, n, 1); Y+ begins at
    `split`."""
    minus, plus = affinity[..., :split], affinity[..., split:]
    mass_minus, mass_plus = minus.sum(2, keepdim=True), plus.sum(2, keepdim=True)
    force = (plus * mass_minus) @ targets[:, split:] - (minus * mass_plus) @ targets[:, :split]
    return force, mass_minus + mass_plus


def moved(
    x: Tensor,
    better: Tensor,
    worse: Tensor,
    better_self: Tensor | None,
    worse_self: Tensor | None,
    config: DrPOConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """u + eta V (n, T, D), c (n, T, 1) and the raw field's size, of one prompt's features x (n, T, D) under one key.

    Tokens of all places form one set, as in the released code, or each place one of its own.
    """
    tokens = x.shape[1]
    if config.token_mode == "per_location":
        sets, masks = [each.transpose(0, 1) for each in (x, better, worse)], (better_self, worse_self)
    else:
        sets = [each.flatten(0, 1)[None] for each in (x, better, worse)]
        same = torch.eye(tokens, dtype=torch.bool)
        masks = [None if mask is None else torch.kron(mask, same) for mask in (better_self, worse_self)]
    move, unit, size = drift(*sets, config, better_self=masks[0], worse_self=masks[1])
    target = sets[0].float() / unit + config.step_size * move
    if config.token_mode == "per_location":
        return target.transpose(0, 1), unit.transpose(0, 1).expand(len(x), -1, -1), size
    return target[0].unflatten(0, (-1, tokens)), unit.expand(len(x), tokens, 1), size


@dataclass(frozen=True)
class Goal:
    """Eq. 7: where features (B, T, D) are to stand, in units of c, and how much each sample's distance counts."""

    target: Tensor  # (B, T, D)
    unit: Tensor  # (B, T, 1)
    weight: Tensor  # (B,)

    def __getitem__(self, items: Tensor) -> Self:
        items = items.to(self.unit.device)
        return Goal(self.target[items], self.unit[items], self.weight[items])


def regression(found: Mapping[str, Tensor], goals: Mapping[str, list[Goal]]) -> Tensor:
    """Eq. 7, a scalar: features (B, T, D) a key; the weighted sum of mean squares over keys, fields and samples."""
    terms = [
        (goal.weight * (x / goal.unit - goal.target).square().flatten(1).mean(1)).sum()
        for key, x in found.items()
        for goal in goals[key]
    ]
    return torch.stack(terms).sum()


# ---- the glue


@dataclass
class DrPO:
    """Features of all candidates of a prompt tell where each is to go; then they regress, as many as fit at a time."""

    config: DrPOConfig
    pipeline: Pipeline
    rollouts: Rollouts
    batch_size: int
    pairs: Pairs | None = None
    log: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        feature_map = build(self.config.features, self.pipeline, recognizer.on)
        self.space = Space(self.rollouts, feature_map, self.batch_size)
        self.offline = None if self.pairs is None else Offline(self.rollouts, self.pairs)

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {TRAINED: self.pipeline.roles.parameters(TRAINED)}

    def state(self) -> dict[str, Stateful]:
        return {"roles": self.pipeline.roles}

    def collect(self, step: int) -> list[Ranked]:
        config = self.config
        if self.offline is not None:
            batch, self.log = self.offline.collect(step, TRAINED)
        elif config.variant == "binary":
            settings = (config.threshold, config.num_positive, config.num_rounds)
            with self.rollouts.processes.together():
                batch, self.log = successes_and_failures(self.rollouts, step, TRAINED, *settings)
        else:
            rollout, self.log = self.rollouts.collect(step, TRAINED, in_units_of_siblings)
            batch = ranked(rollout, config.num_positive, config.num_negative)
        self.log["frac_skipped"] = batch.frac_skipped()
        return [batch]

    def losses(self, batch: Ranked) -> Iterator[Loss]:
        """A prompt's candidates take one pass where they fit, and two where they do not, for the same gradient."""
        for members in whole_groups(batch.rollout.group, self.batch_size):
            pack = batch[members]
            if len(pack) <= self.batch_size and pack.learns.all():
                x = self.rollouts.again(pack.rollout, TRAINED)
                found = self.space.of(pack.rollout, x)
                goals, metrics = self._goals(pack, {key: f.detach() for key, f in found.items()})
                yield Loss(TRAINED, regression(found | {LATENTS: _token(x)}, goals), metrics, len(pack))
                continue
            goals, metrics = self._goals(pack, self.space.in_parts(pack.rollout, pack.rollout.latents))
            for part in pack.learns.nonzero().squeeze(1).split(self.batch_size):
                x = self.rollouts.again(pack.rollout[part], TRAINED)
                found = self.space.of(pack.rollout[part], x) | {LATENTS: _token(x)}
                own = {key: [goal[part] for goal in each] for key, each in goals.items()}
                yield Loss(TRAINED, regression(found, own), metrics, len(part))

    def after_step(self, step: int) -> dict[str, float]:
        return self.log

    def export(self, folder: Path) -> None:
        self.pipeline.export(folder, TRAINED)

    @torch.no_grad()
    def _goals(self, pack: Ranked, found: dict[str, Tensor]) -> tuple[dict[str, list[Goal]], dict[str, Tensor]]:
        """Of every candidate under each key, and under LATENTS for these; `found` (B, T, D) a key. And what to log."""
        config, space, log = self.config, self.space, defaultdict(list)
        better, worse = (space.of_anchors(side, pack.rollout, found) for side in (pack.better, pack.worse))
        share = pack.share().to(pack.rollout.latents)  # (B,)
        goals: dict[str, list[Goal]] = {LATENTS: []}
        if config.reference_weight or config.latent_weight:
            origin = latents_of(self.rollouts, pack.rollout, REFERENCE, self.batch_size)
            before = space.in_parts(pack.rollout, origin) if config.reference_weight else {}
            pinned = Goal(_token(origin), torch.ones_like(share)[:, None, None], config.latent_weight * share)
            goals[LATENTS] = [pinned] if config.latent_weight else []
        for key, x in found.items():
            weights = [1.0, config.reference_weight] if config.reference_weight else [1.0]
            keys = 1 if config.aggregate == "sum" else len(found)
            goals[key] = [Goal(torch.zeros_like(x), torch.ones_like(x[..., :1]), w * share / keys) for w in weights]
            for group in pack.rollout.group.unique():
                rows = ((pack.rollout.group == group) & pack.learns).nonzero().squeeze(1)
                masks = pack.met_themselves(rows, group) if config.mask_self_anchor else (None, None)
                sets = [(better[key][pack.better.of(group)], worse[key][pack.worse.of(group)], *masks)]
                if config.reference_weight:
                    sets.append((before[key][rows], x[rows], None, torch.eye(len(rows), dtype=torch.bool)))
                    spread = x[rows].var(0, correction=0).mean().clamp_min(1e-12)
                    log["distance"].append(((x[rows] - before[key][rows]).square().mean() / spread).sqrt())
                for goal, name, each in zip(goals[key], ("preference", "reference"), sets, strict=False):
                    goal.target[rows], goal.unit[rows], size = moved(x[rows], *each, config)
                    log[f"drift/{name}"].append(size)
        return goals, {name: torch.stack(values).mean() for name, values in log.items()}


def _token(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as features of one token."""
    return latents.flatten(1)[:, None]
