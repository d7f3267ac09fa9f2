"""Noise processes: x_t = alpha(t) x_0 + sigma(t) eps, with t = 0 the data and t = 1 the noise.

`RectifiedFlow`        alpha = 1 - t, sigma = t (SD3, FLUX).
`VariancePreserving`   alpha = sqrt(abar), sigma = sqrt(1 - abar), abar the table of a DDPM (SD 1.5, SD 2.1, SDXL).

A table has rows 0 .. N - 1, the timesteps of diffusers. Row i lies at t = (i + 1) / N, so the last row is t = 1, and
t = 0 is clean data, one row before the table begins. Between rows abar is interpolated linearly, which stays finite at
both ends, tables of zero terminal SNR included.

Draws of t are functions of uniform or normal numbers that the caller has drawn; nothing here is random.
A time t is a tensor of shape () or (B,) and reaches over x of shape (B, ...).
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000  # the scale of `timestep` that flow networks are trained with
_ROW_TOLERANCE = 1e-4  # in rows; float32 holds 1000 t to 3e-5


def over(t: Tensor, x: Tensor) -> Tensor:
    """t of shape () or (B,), given the rank of x (B, ...). Never rank 0, so its precision counts in type promotion."""
    if t.ndim == 0:
        return t.reshape((1,) * x.ndim)
    if t.shape != x.shape[:1]:
        raise ValueError(f"t of shape {tuple(t.shape)} does not fit x of shape {tuple(x.shape)}: give () or (B,)")
    return t.reshape(-1, *(1,) * (x.ndim - 1))  # (B, 1, ...)


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Process(Protocol):
    """What solvers and predictions need to know of a noise process."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...

    def timestep(self, t: Tensor) -> Tensor: ...

    def time(self, timestep: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight lines from data to noise (arXiv 2209.03003)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - widened(t)

    def sigma(self, t: Tensor) -> Tensor:
        return widened(t)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 - t) x_0 + t eps, in at least float32."""
        return over(self.alpha(t), x0) * x0 + over(self.sigma(t), x0) * eps  # (B, ...)

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is fed: 1000 t."""
        return widened(t) * NUM_TIMESTEPS

    def time(self, timestep: Tensor) -> Tensor:
        """Inverse of `timestep`."""
        return widened(timestep) / NUM_TIMESTEPS


def stable_diffusion_table() -> Tensor:
    """abar (1000,) of Stable Diffusion: betas linear in their square roots from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, dim=0)  # float32 like diffusers, so the two tables are equal to the bit


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """A DDPM table (arXiv 2006.11239) in continuous time; `alphas_cumprod` (N,) as diffusers' schedulers hold it."""

    alphas_cumprod: Tensor = field(default_factory=stable_diffusion_table)

    def __post_init__(self):
        table = self.alphas_cumprod
        if table.ndim != 1 or not (table[0] < 1 and table[-1] >= 0 and (table.diff() < 0).all()):
            raise ValueError(f"alphas_cumprod of shape {tuple(table.shape)} must be (N,), below 1 and falling")

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha_bar(t).sqrt().to(widened(t).dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._alpha_bar(t)).sqrt().to(widened(t).dtype)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma eps, in at least float32."""
        return over(self.alpha(t), x0) * x0 + over(self.sigma(t), x0) * eps  # (B, ...)

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is fed: the row N t - 1, fractional between rows; clean data, -1, is no row."""
        return (self._position(t) - 1).to(widened(t).dtype)

    def time(self, timestep: Tensor) -> Tensor:
        """Inverse of `timestep`: row i lies at (i + 1) / N."""
        return (widened(timestep) + 1) / len(self.alphas_cumprod)

    def _position(self, t: Tensor) -> Tensor:
        """Rows from clean data, in float64. What lies within rounding of a row is that row."""
        position = t.double() * len(self.alphas_cumprod)
        nearest = position.round()
        return torch.where((position - nearest).abs() < _ROW_TOLERANCE, nearest, position)

    def _alpha_bar(self, t: Tensor) -> Tensor:
        rows = self.alphas_cumprod.to(t.device, torch.float64)
        table = torch.cat([rows.new_ones(1), rows])  # (N + 1,)
        position = self._position(t)
        below = position.floor().long().clamp(0, len(rows) - 1)
        return torch.lerp(table[below], table[below + 1], position - below)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Move times towards noise, shift t / (1 + (shift - 1) t): SD3's resolution shift (arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def stratified(u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """From u (..., T), uniform in [0, 1): one time in each of T equal strata of [low, high], rising along T."""
    num_strata = u.shape[-1]
    strata = torch.arange(num_strata, device=u.device, dtype=u.dtype)  # (T,)
    return low + (high - low) * (strata + u) / num_strata


def logit_normal(z: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """From standard normal z: t = sigmoid(mean + std z) (arXiv 2403.03206, eq. 19)."""
    return torch.sigmoid(mean + std * z)
