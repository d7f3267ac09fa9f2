"""Gaussian mixtures, a world in which every answer of diffusion is known in closed form.

Data sum_k pi_k N(mu_k, s^2 I), seen through x_t = alpha x_0 + sigma eps, is the mixture of N(alpha mu_k, S I) with
S = alpha^2 s^2 + sigma^2. With residuals e_k = x_t - alpha mu_k and responsibilities h_k ~ pi_k N(e_k; 0, S I),

    g = sum_k h_k e_k / S      score = -g      E[eps | x_t] = sigma g      E[x_0 | x_t] = sum_k h_k mu_k + alpha s^2 g

Tilting by a linear reward r = a . x, p exp(lam r) / Z, gives a mixture of the same s: the optimum of the KL-regularised
objective at temperature 1 / lam.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.process import over


@dataclass(frozen=True, eq=False)
class Mixture:
    """weights (K,) that sum to 1, means (K, D), one std > 0. x is (B, D); t, alpha and sigma are () or (B,)."""

    weights: Tensor
    means: Tensor
    std: float

    def __post_init__(self):
        if self.means.ndim != 2 or self.weights.shape != self.means.shape[:1]:
            raise ValueError(f"weights {tuple(self.weights.shape)}, means {tuple(self.means.shape)}: give (K,), (K, D)")
        if self.std <= 0 or (self.weights < 0).any() or abs(float(self.weights.sum()) - 1) > 1e-5:
            raise ValueError(f"weights must sum to 1, got {self.weights.tolist()}, and std be above 0, got {self.std}")

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,), in nats, summed over dimensions."""
        dim = self.means.shape[1]
        return self._log_joint(x, x.new_ones(()), x.new_zeros(())).logsumexp(1) - 0.5 * dim * math.log(2 * math.pi)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of the log-density of x_t (B, D) under rectified flow."""
        return -self._posterior(x, 1 - t, t)[1]

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[eps - x_0 | x_t] (B, D), the exact field of rectified flow."""
        mean, pull = self._posterior(x, 1 - t, t)
        return over(t, x) * pull - mean - over(1 - t, x) * self.std**2 * pull

    def denoised(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t] (B, D) for any noise process."""
        mean, pull = self._posterior(x, alpha, sigma)
        return mean + over(alpha, x) * self.std**2 * pull

    def marginal(self, t: float) -> "Mixture":
        """The mixture that x_t follows under rectified flow."""
        return Mixture(self.weights, (1 - t) * self.means, math.hypot((1 - t) * self.std, t))

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draws (num, D)."""
        which = torch.multinomial(self.weights, num, replacement=True, generator=generator)  # (num,)
        centres = self.means[which]  # (num, D)
        noise = torch.randn(centres.shape, generator=generator, dtype=centres.dtype, device=centres.device)
        return centres + self.std * noise

    def tilted(self, direction: Tensor, strength: float) -> tuple["Mixture", Tensor]:
        """p exp(strength direction . x) / Z, direction (D,), and log Z in nats."""
        gain = strength * self.means @ direction + (strength * self.std) ** 2 * direction.square().sum() / 2  # (K,)
        log_weights = self.weights.log() + gain
        moved = self.means + strength * self.std**2 * direction  # (K, D)
        return Mixture(log_weights.softmax(0), moved, self.std), log_weights.logsumexp(0)

    def _log_joint(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log pi_k N(e_k; 0, S I) (B, K) without its factor of 2 pi."""
        variance = (alpha * self.std) ** 2 + sigma**2
        residual = x[:, None] - over(alpha, x)[..., None] * self.means  # (B, K, D)
        squares = residual.square().sum(2)  # (B, K)
        variance = over(variance, squares)
        return self.weights.log() - squares / (2 * variance) - 0.5 * self.means.shape[1] * variance.log()

    def _posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """sum_k h_k mu_k and g = sum_k h_k e_k / S, both (B, D)."""
        mean = self._log_joint(x, alpha, sigma).softmax(1) @ self.means  # (B, D)
        variance = over((alpha * self.std) ** 2 + sigma**2, x)
        return mean, (x - over(alpha, x) * mean) / variance
