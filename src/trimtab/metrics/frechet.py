"""Fréchet distance between two sets of features, each summarised by a Gaussian (Heusel et al. 2017, arXiv 1706.08500).

    d² = |μ_a - μ_b|² + tr C_a + tr C_b - 2 tr (C_a C_b)^½        tr (C_a C_b)^½ = Σ singular values of C_a^½ C_b^½

Both roots are of symmetric matrices, so an eigen-decomposition gives them, and singular values lose nothing more. The
usual root of C_a C_b, which is not symmetric, turns a rounding error of 1e-16 into 1e-8 (scipy's sqrtm even into
complex numbers) as soon as a covariance is singular, which it is whenever there are fewer images than features.
"""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """d² above, in squared units of the features; a (N, D), b (M, D), computed in float64 with unbiased covariances.

    The estimate is biased upwards for small N and M: compare only numbers made from equally many images.
    Raises ValueError for fewer than two samples on a side, for unequal widths and for features that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected features (N, D) and (M, D) of one width; got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 samples on each side; got {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features hold NaN or infinity; drop the images that could not be read first")
    cov_a, cov_b = a.T.cov().reshape(a.shape[1], -1), b.T.cov().reshape(a.shape[1], -1)  # (D, D); cov of D=1 is 0-d
    cross = torch.linalg.matrix_norm(_root(cov_a) @ _root(cov_b), ord="nuc")
    squared = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(squared.item(), 0.0)


def _root(matrix: Tensor) -> Tensor:
    """Symmetric root of a symmetric positive semi-definite (D, D); eigenvalues lost in rounding count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.max() * len(values) * torch.finfo(values.dtype).eps
    return vectors * torch.where(values > floor, values, 0).sqrt() @ vectors.T
