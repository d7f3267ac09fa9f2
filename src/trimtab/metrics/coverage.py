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
    """How much of what was made is like the real, and how much of the real was made; both in [0, 1]."""

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
    real_radii, fake_radii = _radii(real, k, chunk), _radii(fake, k, chunk)
    fake_inside, real_inside = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radii in zip(fake.split(chunk), fake_radii.split(chunk), strict=True):
        distances = _distances(rows, real)  # (chunk, N)
        fake_inside.append((distances <= real_radii).any(dim=1))
        real_inside |= (distances <= radii.unsqueeze(1)).any(dim=0)
    return PrecisionRecall(
        precision=torch.cat(fake_inside).double().mean().item(), recall=real_inside.double().mean().item()
    )


def _radii(points: Tensor, k: int, chunk: int) -> Tensor:
    """Distance of each point to its k-th neighbour, (N,): the (k + 1)-th smallest, as a row holds the point itself."""
    nearest = [_distances(rows, points).topk(k + 1, largest=False).values for rows in points.split(chunk)]
    return torch.cat(nearest)[:, -1]


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, m), without the |a|² - 2ab + |b|² shortcut: there a point is not at distance 0 from its own copy."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
