"""How well a prediction matches its target, and which way to move a sample so that a distribution matches another.

The adaptive error divides by the sample's own mean absolute error, held constant. What is left changes little with the
noise level, so that no time dominates a sum over times (DiffusionNFT, arXiv 2509.16117, and CRD; after DMD's weight).

Distribution matching (DMD, arXiv 2311.18828) moves samples x of a generator up log p_real - log p_fake, both noised to
a time t: the reward whose maximum is p_fake = p_real. With y = alpha x + sigma eps and D the clean prediction at y,

    (1)  r = D_real - D_fake = (sigma^2 / alpha) grad_y [ log p_real(y) - log p_fake(y) ]
    (2)  n = mean |x - D_real|                  the size of the denoising error, which depends on t most of all
    (3)  U = r / n                              DMD2; how else to normalise is `Normaliser`
    (4)  L = mean (x - stopgrad(x + U))^2 / 2   whose gradient is -U / (B D): descent moves x along U

Subtracting the siblings' mean of the vector r is a baseline only in score-function estimators. Here gradient flows
along the path, and it would take away all that a prompt's samples must learn together: see "group_elementwise".
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from trimtab.groups import means
from trimtab.prediction import Prediction
from trimtab.process import over, widened

Normaliser = Literal["sample", "group_mean", "binned", "group_whiten", "group_elementwise", "none"]


def denoising_error(value: Tensor, target: Tensor) -> Tensor:
    """Mean square of value - target over all but the batch (B,), in at least float32; value and target are (B, ...)."""
    return _difference(value, target).square().mean(1)


def adaptive_error(value: Tensor, target: Tensor, floor: float = 1e-5) -> Tensor:
    """`denoising_error` over stopgrad(max(mean |value - target|, floor)) (B,); that divisor is taken in float64."""
    difference = _difference(value, target)  # (B, D)
    scale = difference.detach().double().abs().mean(1).clamp_min(floor)
    return difference.square().mean(1) / scale.to(difference.dtype)


def misfit(x: Tensor, real: Tensor) -> Tensor:
    """Eq. 2: n (B,), the mean absolute difference of samples and the teacher's clean predictions, both (B, ...)."""
    return _difference(x.detach(), real).abs().mean(1)


def normalised_direction(
    direction: Tensor,
    size: Tensor,
    group: Tensor,
    normaliser: Normaliser = "group_mean",
    *,
    typical: Tensor | None = None,
    floor: float = 1e-6,
) -> Tensor:
    """Eq. 3: U (B, ...) from r (B, ...), its misfit n (B,) and `group` (B,), which must hold whole groups.

    sample              r / n, as in DMD2 and all public code; equal to group_mean where a group is one sample
    group_mean          r / mean of n over the siblings
    binned              r / `typical` (B,), a running mean of n at the sample's time (`BinnedMean`)
    none                r
    group_whiten        (r - mean) / std, both scalars over the siblings and all their elements: std vanishes at the
                        optimum, so that noise is amplified there, and the mean over all elements is never corrected
    group_elementwise   (r - mean) / std of the siblings, element by element: diverges (see above)

    Divisors are at least `floor`. What is not finite becomes 0, as in DMD2's code.
    """
    r = widened(direction.detach())
    if normaliser in ("sample", "group_mean", "binned"):
        if normaliser == "binned" and typical is None:
            raise ValueError("normaliser 'binned' needs the typical misfit of each sample's time")
        divisor = {"sample": lambda: size, "group_mean": lambda: means(size, group), "binned": lambda: typical}
        step = r / over(widened(divisor[normaliser]()).clamp_min(floor), r)
    elif normaliser == "group_whiten":
        centre = means(r.flatten(1).mean(1), group)  # (B,)
        r = r - over(centre, r)
        step = r / over(means(r.flatten(1).square().mean(1), group).sqrt().clamp_min(floor), r)
    elif normaliser == "group_elementwise":
        r = r - _elementwise_means(r, group)
        step = r / _elementwise_means(r.square(), group).sqrt().clamp_min(floor)
    elif normaliser == "none":
        step = r
    else:
        raise ValueError(f"normaliser {normaliser!r} is none of {', '.join(get_args(Normaliser))}")
    return step.nan_to_num(0.0, 0.0, 0.0)


def push_loss(x: Tensor, update: Tensor, num_terms: int | None = None) -> Tensor:
    """Eq. 4, a scalar: samples x (B, ...) learn to stand at x + update; summed over B and divided by num_terms."""
    target = (widened(x) + widened(update)).detach()
    return 0.5 * denoising_error(x, target).sum() / (len(x) if num_terms is None else num_terms)


def fake_score_loss(prediction: Prediction, x0: Tensor, eps: Tensor, num_terms: int | None = None) -> Tensor:
    """Denoising score matching on a generator's samples x0, in the network's own parameterisation; a scalar."""
    error = denoising_error(prediction.value, prediction.target(x0.detach(), eps))
    return error.sum() / (len(x0) if num_terms is None else num_terms)


class BinnedMean:
    """A running mean of a number in each of `num_bins` equal bins of t in [0, 1]; a bin that saw nothing has NaN."""

    def __init__(self, num_bins: int = 10, decay: float = 0.9):
        self.decay = decay
        self.sums, self.counts = torch.zeros(2, num_bins, dtype=torch.float64)

    def update(self, value: Tensor, t: Tensor) -> None:
        """Take in value (B,) at t (B,): what a bin knew counts `decay` times, if anything new falls into it."""
        place = self._place(t)
        decay = torch.where(torch.bincount(place, minlength=len(self.sums)) > 0, self.decay, 1.0)
        for total, new in ((self.sums, value.double().cpu()), (self.counts, torch.ones(len(place)).double())):
            total.mul_(decay).index_add_(0, place, new)

    def at(self, t: Tensor) -> Tensor:
        """The mean of each one's bin (B,), float32."""
        return (self.sums / self.counts)[self._place(t)].to(t.device, torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums.copy_(state["sums"])
        self.counts.copy_(state["counts"])

    def _place(self, t: Tensor) -> Tensor:
        return (t.double().cpu() * len(self.sums)).long().clamp(0, len(self.sums) - 1)


def _elementwise_means(x: Tensor, group: Tensor) -> Tensor:
    """The siblings' mean of every element (B, ...)."""
    names, ids = torch.unique(group, return_inverse=True)
    ids = ids.to(x.device)
    total = x.new_zeros(len(names), *x.shape[1:]).index_add(0, ids, x)
    count = torch.bincount(ids, minlength=len(names)).to(x)
    return (total / over(count, total))[ids]


def _difference(value: Tensor, target: Tensor) -> Tensor:
    if value.ndim < 2 or value.shape != target.shape:
        raise ValueError(f"value {tuple(value.shape)} and target {tuple(target.shape)} must be of one shape (B, ...)")
    return (widened(value) - widened(target)).flatten(1)  # (B, D)
