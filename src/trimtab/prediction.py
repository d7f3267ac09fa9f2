"""What a network says about a noisy sample, and what that means in every other parameterisation.

A network's output is a linear mix, value = a x_0 + b eps, of the two unknowns:

    kind     x0      eps      flow      v
    (a, b)   (1, 0)  (0, 1)   (-1, 1)   (-sigma, alpha)

Together with x_t = alpha x_0 + sigma eps this is a 2 x 2 system. With det = alpha b - sigma a its solution is

    x_0 = (b x_t - sigma value) / det        eps = (alpha value - a x_t) / det

for every process, and flow = eps - x_0 always. These conversions are written nowhere else.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from trimtab.process import Process, over, widened

Kind = Literal["flow", "eps", "x0", "v"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """A network's native output at (x_t, t); everything derived is in at least float32.

    value and x_t are (B, ...), t is () or (B,). Raises ValueError for an unknown kind and for shapes that do not fit.
    What the noise hides is not finite: x0 of an eps network where alpha = 0, eps of an x0 network where sigma = 0.
    """

    value: Tensor
    kind: Kind
    x_t: Tensor
    t: Tensor
    process: Process

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"prediction kind {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if self.value.shape != self.x_t.shape:
            raise ValueError(f"prediction of shape {tuple(self.value.shape)} for x_t of shape {tuple(self.x_t.shape)}")

    @property
    def x0(self) -> Tensor:
        """The clean sample (B, ...) that the network expects."""
        if self.kind == "x0":
            return widened(self.value)
        alpha, sigma, a, b = self._coefficients()
        return (b * self.x_t - sigma * self.value) / (alpha * b - sigma * a)

    @property
    def eps(self) -> Tensor:
        """The noise (B, ...) that the network expects in x_t."""
        if self.kind == "eps":
            return widened(self.value)
        alpha, sigma, a, b = self._coefficients()
        return (alpha * self.value - a * self.x_t) / (alpha * b - sigma * a)

    @property
    def flow(self) -> Tensor:
        """eps - x0 (B, ...): the velocity dx/dt of rectified flow."""
        if self.kind == "flow":
            return widened(self.value)
        return self.eps - self.x0

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What the network should have said (B, ...), given the truth: a x_0 + b eps."""
        _, _, a, b = self._coefficients()
        return a * x0 + b * eps

    def _coefficients(self) -> tuple:
        """alpha, sigma, a, b; the first two in at least float32, to which they raise whatever they multiply."""
        alpha = over(self.process.alpha(self.t), self.x_t)  # (B, 1, ...)
        sigma = over(self.process.sigma(self.t), self.x_t)  # (B, 1, ...)
        a, b = {"x0": (1, 0), "eps": (0, 1), "flow": (-1, 1), "v": (-sigma, alpha)}[self.kind]
        return alpha, sigma, a, b
