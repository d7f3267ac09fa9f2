"""Statistics among siblings: samples of the same prompt, named by equal ids.

x is (B,), `group` (B,) int64; ids need not be contiguous nor groups equal in size. Every function is pure, costs O(B)
(`ranked` sorts), and keeps x's dtype (at least float32). A NaN spoils its own group and no other.

Averages are taken of what lies above the group's smallest value, so equal values give differences of exactly 0.
"""

from typing import Literal

import torch
from torch import Tensor

from trimtab.process import widened


def means(x: Tensor, group: Tensor, weights: Tensor | None = None) -> Tensor:
    """Each sample's group mean (B,), weighted by weights (B,) >= 0 of any scale if given."""
    x, ids, num_groups = _compact(x, group)
    weights = torch.ones_like(x) if weights is None else weights.to(x)
    low = _least(x, ids, num_groups)  # (P,)
    excess = _sums(weights * (x - low[ids]), ids, num_groups) / _sums(weights, ids, num_groups)  # (P,)
    return (low + excess)[ids]


def centred(x: Tensor, group: Tensor, weights: Tensor | None = None) -> Tensor:
    """x minus its group's mean (B,): what is left is what a prompt-dependent constant cannot change."""
    return widened(x) - means(x, group, weights)


def deviations(x: Tensor, group: Tensor) -> Tensor:
    """Standard deviation within each sample's group (B,), the population's."""
    return means(centred(x, group).square(), group).sqrt()


def normalised(x: Tensor, group: Tensor, eps: float = 1e-4, std: Literal["group", "global"] = "group") -> Tensor:
    """(x - group mean) / (std + eps) (B,): GRPO's advantage (arXiv 2402.03300).

    The standard deviation is the population's, of the group or of all of x; eps is also the floor where all are equal.
    """
    if std not in ("group", "global"):
        raise ValueError(f"std {std!r} is neither 'group' nor 'global'")
    spread = deviations(x, group) if std == "group" else widened(x).std(correction=0)
    return centred(x, group) / (spread + eps)


def ranked(x: Tensor, group: Tensor) -> Tensor:
    """Rank within the group (B,), 0 for the lowest to 1 for the highest; ties share their mean, a lone one has 0.5."""
    unscored = means(x, group).isnan()
    x, ids, num_groups = _compact(x, group)
    order = x.argsort(stable=True)
    order = order[ids[order].argsort(stable=True)]  # (B,) by group, then by value
    places = torch.empty_like(x).scatter(0, order, torch.arange(len(x), device=x.device).to(x))  # (B,)
    starts_run = torch.ones_like(x, dtype=torch.bool)
    starts_run[1:] = (x[order].diff() != 0) | (ids[order].diff() != 0)
    run = torch.empty_like(ids).scatter(0, order, starts_run.cumsum(0) - 1)  # (B,) equal for equal siblings
    places = means(places, run) - _least(places, ids, num_groups)[ids]  # (B,) 0 ... G - 1
    last = _sums(torch.ones_like(x), ids, num_groups)[ids] - 1  # (B,) G - 1
    rank = torch.where(last > 0, places / last.clamp_min(1), 0.5)
    return rank.masked_fill(unscored, torch.nan)  # sorting alone would rank NaN highest


def softmax_weights(x: Tensor, group: Tensor, temperature: float) -> Tensor:
    """exp(x / temperature), normalised to sum to one in each group (B,). A negative temperature favours the lowest."""
    x, ids, num_groups = _compact(x / temperature, group)
    highest = -_least(-x, ids, num_groups)  # (P,)
    weights = (x - highest[ids]).exp()
    return weights / _sums(weights, ids, num_groups)[ids]


def leave_one_out(x: Tensor, group: Tensor) -> Tensor:
    """x minus the mean of its siblings (B,), which is G / (G - 1) times `centred` (RLOO); a lone sample gets 0."""
    difference = centred(x, group)
    _, ids, num_groups = _compact(x, group)
    size = _sums(torch.ones_like(difference), ids, num_groups)[ids]  # (B,)
    return difference * size / (size - 1).clamp_min(1)


def frac_zero_std(x: Tensor, group: Tensor) -> Tensor:
    """Share of groups, a scalar, whose values are all equal, so that they say nothing about which sample is better."""
    x, ids, num_groups = _compact(x, group)
    spread = -_least(-x, ids, num_groups) - _least(x, ids, num_groups)  # (P,)
    return (spread == 0).to(x.dtype).mean()


def _compact(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor, int]:
    if x.ndim != 1 or x.shape != group.shape:
        raise ValueError(f"x of shape {tuple(x.shape)} and group of shape {tuple(group.shape)} must both be (B,)")
    names, ids = torch.unique(group, return_inverse=True)
    return widened(x), ids, len(names)


def _sums(x: Tensor, ids: Tensor, num_groups: int) -> Tensor:
    return x.new_zeros(num_groups).index_add(0, ids, x)  # (P,)


def _least(x: Tensor, ids: Tensor, num_groups: int) -> Tensor:
    return x.new_zeros(num_groups).scatter_reduce(0, ids, x, "amin", include_self=False)  # (P,)
