"""DPO of a one-step generator, as the authors of DrPO (arXiv 2606.02521) have it. A baseline without reward gradient.

A generator of one call has no likelihood to compare. So how near its samples are to the better ones stands for it,
after DPO (arXiv 2305.18290). x are latents of a prompt's K candidates, P and N its M best and worst, held constant:

    (1)  d(x_i, y) = mean_j (x_ij - y_j)^2
    (2)  gap(x) = mean_i [ mean_{y in N} d(x_i, y) - mean_{y in P} d(x_i, y) ]
    (3)  L = - log sigmoid( beta (gap(x) - gap(x_ref)) ),   x_ref what the frozen generator made of the same noise

    symbol   name                 symbol   name
    beta     beta                 M        num_positive, num_negative

Departures: prompts whose candidates all score the same are left out. Equation 3 is differentiated in two steps: its
slope in the gap comes from the candidates as they were drawn, then the gap's own gradient, a part of them at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trimtab.batch import whole_groups
from trimtab.candidates import Ranked, in_units_of_siblings, latents_of, ranked
from trimtab.method import Loss, MethodSettings, Stateful
from trimtab.pipelines import Pipeline
from trimtab.roles import REFERENCE, TRAINED
from trimtab.rollout import Rollouts


class DPOOneStepConfig(MethodSettings):
    """Defaults: the released code's."""

    name: Literal["dpo-one-step"] = "dpo-one-step"
    beta: float = Field(30.0, gt=0)
    num_positive: int = Field(8, gt=0)
    num_negative: int = Field(8, gt=0)


def gaps(x: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    """Eq. 1 and 2 for each sample (n,): x (n, ...), better (p, ...), worse (m, ...)."""
    x, better, worse = (each.float().flatten(1) for each in (x, better, worse))
    distance = [(x[:, None] - side[None]).square().mean(2).mean(1) for side in (worse, better)]
    return distance[0] - distance[1]


def slope(gap: Tensor, reference_gap: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Eq. 3, a scalar, and its derivative in the gap."""
    margin = beta * (gap - reference_gap)
    return -F.logsigmoid(margin), -beta * torch.sigmoid(-margin)


@dataclass
class DPOOneStep:
    """The glue: a prompt's gaps first, then their gradient."""

    config: DPOOneStepConfig
    pipeline: Pipeline
    rollouts: Rollouts
    batch_size: int
    log: dict[str, float] = field(default_factory=dict)

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {TRAINED: self.pipeline.roles.parameters(TRAINED)}

    def state(self) -> dict[str, Stateful]:
        return {"roles": self.pipeline.roles}

    def collect(self, step: int) -> list[Ranked]:
        rollout, self.log = self.rollouts.collect(step, TRAINED, in_units_of_siblings)
        batch = ranked(rollout, self.config.num_positive, self.config.num_negative)
        self.log["frac_skipped"] = batch.frac_skipped()
        return [batch]

    def losses(self, batch: Ranked) -> Iterator[Loss]:
        for members in whole_groups(batch.rollout.group, self.batch_size):
            pack = batch[members]
            losses, slopes = self._slopes(pack)
            for part in torch.arange(len(pack)).split(self.batch_size):
                x, rows = self.rollouts.again(pack.rollout[part], TRAINED), part.to(losses.device)
                linear = (slopes[rows] * self._gaps(pack, part, x)).sum()
                yield Loss(TRAINED, losses[rows].sum() + linear - linear.detach())

    def after_step(self, step: int) -> dict[str, float]:
        return self.log

    def export(self, folder: Path) -> None:
        self.pipeline.export(folder, TRAINED)

    @torch.no_grad()
    def _slopes(self, pack: Ranked) -> tuple[Tensor, Tensor]:
        """Each candidate's part of eq. 3, which is the mean over prompts, and the derivative in its own gap: (B,)."""
        everyone = torch.arange(len(pack))
        now = self._gaps(pack, everyone, pack.rollout.latents)
        before = self._gaps(pack, everyone, latents_of(self.rollouts, pack.rollout, REFERENCE, self.batch_size))
        losses, slopes = torch.zeros_like(now), torch.zeros_like(now)
        for group in pack.rollout.group.unique():
            rows = (pack.rollout.group == group).nonzero().squeeze(1)
            loss, factor = slope(now[rows].mean(), before[rows].mean(), self.config.beta)
            share = 1 / len(rows) / pack.num_prompts
            losses[rows], slopes[rows] = loss * share, factor * share
        return losses, slopes

    def _gaps(self, pack: Ranked, rows: Tensor, x: Tensor) -> Tensor:
        """Of candidates `rows` with latents x (N, ...), each against its own prompt's anchors: (N,)."""
        found = torch.zeros(len(rows), device=x.device)
        group = pack.rollout.group[rows]
        for name in group.unique():
            own = (group == name).nonzero().squeeze(1).to(x.device)
            sides = [side.latents[side.of(name).to(x.device)] for side in (pack.better, pack.worse)]
            found = found.index_add(0, own, gaps(x[own], *sides))
        return found
