"""Improved precision and recall of a set of generated images (Kynkäänniemi et al. 2019, arXiv 1904.06991).

A set of features stands for the region within reach of its points: the union of balls around each point, with the
distance to its k-th nearest neighbour in the same set (itself not counted) as radius. Precision is the share of
generated images inside the region of the real ones (fidelity); recall the share of real images inside the region of the
generated ones (coverage). A model that collapses to one good picture has precision 1 and recall near 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, chunk: int = 1024) -> PrecisionRecall:
    """Both shares in [0, 1]; real (N, D), fake (M, D); memory grows with chunk · max(N, M), never with N · M.

    Raises ValueError for unequal widths and for sets of at most k points, which have no k-th neighbour.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        shapes = f"{tuple(real.shape)} and {tuple(fake.shape)}"
        raise ValueError(f"expected features (N, D) and (M, D) of one width; got {shapes}")
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"the {k}-th neighbour needs more than {k} samples on each side; got {len(real)}, {len(fake)}")
    real, fake = real.double(), fake.double()
    return PrecisionRecall(
        precision=_share_inside(fake, real, _radii(real, k, chunk), chunk),
        recall=_share_inside(real, fake, _radii(fake, k, chunk), chunk),
    )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, m), without the |a|² - 2ab + |b|² shortcut: there a point is not at distance 0 from its own copy."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, k: int, chunk: int) -> Tensor:
    """Distance of each point to its k-th neighbour, (N,). The k + 1 smallest, since each row holds the point itself."""
    return torch.cat([_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(chunk)])


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    inside = [(_distances(rows, centres) <= radii).any(dim=1) for rows in points.split(chunk)]
    return torch.cat(inside).double().mean().item()
