"""How well a prediction matches its target, one number per sample.

The adaptive error divides by the sample's own mean absolute error, held constant. What is left changes little with the
noise level, so that no time dominates a sum over times (DiffusionNFT, arXiv 2509.16117, and CRD; after DMD's weight).
"""

from torch import Tensor

from trimtab.process import widened


def denoising_error(value: Tensor, target: Tensor) -> Tensor:
    """Mean square of value - target over all but the batch (B,), in at least float32; value and target are (B, ...)."""
    return _difference(value, target).square().mean(1)


def adaptive_error(value: Tensor, target: Tensor, floor: float = 1e-5) -> Tensor:
    """`denoising_error` over stopgrad(max(mean |value - target|, floor)) (B,); that divisor is taken in float64."""
    difference = _difference(value, target)  # (B, D)
    scale = difference.detach().double().abs().mean(1).clamp_min(floor)
    return difference.square().mean(1) / scale.to(difference.dtype)


def _difference(value: Tensor, target: Tensor) -> Tensor:
    if value.ndim < 2 or value.shape != target.shape:
        raise ValueError(f"value {tuple(value.shape)} and target {tuple(target.shape)} must be of one shape (B, ...)")
    return (widened(value) - widened(target)).flatten(1)  # (B, D)
