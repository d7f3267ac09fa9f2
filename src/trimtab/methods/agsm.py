"""Alignment-Guided Score Matching for Text-to-Image Alignment in Diffusion Models (AGSM), arXiv 2605.30038.

Learns soft tokens from captioned pictures, without a reward. Each of B pictures meets all B captions at one time and
with one noise. Every pair is a regression: to the true target e, shifted along a direction that tells a caption from
the others, towards it where the caption fits the picture and away from it where it does not. No error is maximised.

    (1)  x_t = alpha x_0 + sigma eps;  e what the network should say: eps, or eps - x_0 for flow
    (2)  E_ij: what it says of picture i under caption j, with the averaged tokens, psi+ where i = j and else psi-
    (3)  w_ij = softmax_j( -|E_ij - e_i|^2 / tau )                 a Plackett-Luce model of "caption j fits picture i"
    (4)  D_ij = E_ij - sum_k w_ik E_ik                             its score, the network's Jacobian left out
    (5)  target_ij = e_i + gamma+ D_ii  where i = j,  e_i - gamma- D_ij  elsewhere; a constant
    (6)  L = mean_i |pred_ii - target_ii|^2 + mean_{i != j} |pred_ij - target_ij|^2
    (7)  averaged tokens <- d averaged + (1 - d) trained

    symbol      name                symbol      name
    tau         temperature         D           guidance
    gamma+      gamma_pos           w           weights
    gamma-      gamma_neg           d           ema_decay
    psi+ psi-   POSITIVE NEGATIVE   |.|^2       mean over a sample's dimensions; distance="sum" in (3) only

With averaged tokens at rest the fixed point of (6) is guidance: psi+ moves the prediction from that of the caption on,
by gamma+ (1 - w_ii), away from that of the other captions. The average follows, which amplifies it: for captions that
all predict alike, psi+ ends at scale 1 + gamma+ (1-a) / (1 - gamma+ (1-a) + gamma- a), a = w_ii. Where that denominator
is not positive, as for gamma+ = 1.5, gamma- = 0.1 and a = 1/4, it grows without end.

Paper and released code disagree; each of these is a switch, and the default is the code's unless said otherwise:

1. (3) uses the sum over dimensions and no temperature in the paper (distance="sum", temperature=1), where it is one-hot
   for real latents; the code uses the mean and tau = 0.1, where it stays near uniform.
2. gamma- for SDXL is 1 in the paper and 0.1 in its script.
3. Averaged tokens start as an independent random draw in the code (ema_start="random"); ours start as a copy.
4. The paper's 1.8 M parameters need a time table per sign (tokens.separate_times); the code shares one.

Departures:

1. The code draws a new noise for every chunk of rows and adds the chunks' means; here a step has one noise, and `rows`
   changes memory but not the gradient.
2. The learning rate falls along one half cosine to zero in each cycle; the code's falls in ten stairs to 1e-5.
3. Sampling with psi- on the unconditional branch, which the paper found to be worse on SD3, is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.batch import Captions
from trimtab.captioned import Captioned
from trimtab.grid import grid_noise, predict_pairs
from trimtab.matching import denoising_error
from trimtab.method import Loss, MethodSettings, Stateful
from trimtab.pipelines import Pipeline
from trimtab.pipelines.soft_tokens import NEGATIVE, POSITIVE, TokenSettings
from trimtab.roles import TRAINED

AVERAGE = "average"


class AGSMConfig(MethodSettings):
    """Defaults: the released code's for SD3, but for where the average starts."""

    name: Literal["agsm"] = "agsm"
    tokens: TokenSettings = TokenSettings()
    tokens_start: Literal["normal", "empty-prompt"] = "normal"  # SD1.5 starts at the first token of ""
    gamma_pos: float = Field(1.0, ge=0)
    gamma_neg: float = Field(0.1, ge=0)  # 0: mismatched pairs are not trained at all
    temperature: float = Field(0.1, gt=0)
    distance: Literal["mean", "sum"] = "mean"
    shared_bank: bool = False  # one bank for both signs: the paper's ablation
    ema_decay: float = Field(0.9999, ge=0, le=1)
    ema_start: Literal["copy", "random"] = "copy"
    rows: int = Field(4, gt=0)  # pictures of the B x B grid in one forward and backward

    @property
    def roles(self) -> tuple[str, ...]:
        return TRAINED, AVERAGE

    @property
    def num_signs(self) -> int:
        return 1 if self.shared_bank else 2


def alignment_weights(
    average: Tensor, target: Tensor, temperature: float = 0.1, distance: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Eq. 3: w (R, B), from averaged predictions (R, B, ...) and targets (R, ...); rows sum to 1, float32."""
    error = (average.float() - target.float()[:, None]).flatten(2).square()  # (R, B, D)
    error = error.mean(2) if distance == "mean" else error.sum(2)
    return torch.softmax(-error / temperature, dim=1)


def guidance(average: Tensor, weights: Tensor) -> Tensor:
    """Eq. 4: D (R, B, ...), how each caption's prediction differs from the weighted mixture of all."""
    mixture = torch.einsum("rb,rb...->r...", weights, average.float())
    return average.float() - mixture[:, None]


def guided_targets(
    average: Tensor, target: Tensor, matched: Tensor, weights: Tensor, gamma_pos: float, gamma_neg: float
) -> Tensor:
    """Eq. 5: (R, B, ...), detached; matched (R, B) is true where the caption is the picture's own."""
    step = torch.where(matched, gamma_pos, -gamma_neg)  # (R, B)
    step = step.reshape(*step.shape, *(1,) * (average.ndim - 2))
    return (target.float()[:, None] + step * guidance(average, weights)).detach()


def score_matching_loss(error: Tensor, matched: Tensor, num_pictures: int, num_captions: int) -> Tensor:
    """Eq. 6 from errors and marks of some of the batch's pairs, any one shape: parts of a batch add up to its loss.

    Left out pairs count as 0: with matched pairs only this is plain score matching.
    """
    own, others = error[matched].sum(), error[~matched].sum()
    return own / num_pictures + others / max(1, num_pictures * (num_captions - 1))


@dataclass
class AGSM:
    """The glue: which pairs meet which bank, and when the average moves."""

    config: AGSMConfig
    pipeline: Pipeline
    captioned: Captioned

    def __post_init__(self):
        tokens = self.pipeline.roles
        if self.config.tokens_start == "empty-prompt":
            tokens.start_at(self.pipeline.encode([""]).tokens[0, 0])
        if self.config.ema_start == "random":
            tokens.banks[AVERAGE].draw(self.captioned.seed + 1)

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {TRAINED: self.pipeline.roles.parameters(TRAINED)}

    def state(self) -> dict[str, Stateful]:
        return {"tokens": self.pipeline.roles, "pictures": self.captioned}

    def collect(self, step: int) -> list[Captions]:
        return [self.captioned.collect(step)]

    def losses(self, batch: Captions) -> Iterator[Loss]:
        """One term for every `rows` pictures, each with all captions."""
        t, eps = grid_noise(self.pipeline, batch)
        for rows in torch.arange(len(batch)).split(self.config.rows):
            yield self._rows(batch, rows, t, eps)

    def after_step(self, step: int) -> dict[str, float]:
        self.pipeline.roles.blend(AVERAGE, TRAINED, self.config.ema_decay)
        return self.pipeline.roles.norms(TRAINED) | self.captioned.log()

    def export(self, folder: Path) -> None:
        self.pipeline.roles.export(folder, TRAINED, {"method": self.config.name})

    def _rows(self, batch: Captions, rows: Tensor, t: Tensor, eps: Tensor) -> Loss:
        config, size = self.config, len(batch)
        matched = rows[:, None] == torch.arange(size)  # (R, B)
        with torch.no_grad():
            average, target = self._predict(AVERAGE, batch, rows, torch.ones_like(matched), t, eps)
            average = average.unflatten(0, matched.shape)  # (R, B, ...)
            target = target.unflatten(0, matched.shape)[:, 0]
            fits = matched.to(average.device)
            weights = alignment_weights(average, target, config.temperature, config.distance)
            wanted = guided_targets(average, target, fits, weights, config.gamma_pos, config.gamma_neg)
        pairs = torch.ones_like(matched) if config.gamma_neg else matched
        value, _ = self._predict(TRAINED, batch, rows, pairs, t, eps)
        error = denoising_error(value, wanted[pairs.to(wanted.device)])  # (number of pairs,)
        own = matched[pairs].to(error.device)
        return Loss(
            TRAINED,
            score_matching_loss(error, own, size, size),
            {
                "error_matched": error.detach()[own].mean(),
                "weight_matched": weights[fits].mean(),
                "win_rate": (weights.argmax(1) == rows.to(weights.device)).float().mean(),
                "guidance_norm": guidance(average, weights).flatten(2).norm(dim=2).mean(),
            }
            | ({"error_mismatched": error.detach()[~own].mean()} if config.gamma_neg and size > 1 else {}),
            len(rows),
        )

    def _predict(
        self, role: str, batch: Captions, rows: Tensor, pairs: Tensor, t: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predictions and targets (N, ...) of the chosen pairs (R, B) of pictures `rows` with all captions."""
        row, caption = pairs.nonzero().unbind(1)
        sign = torch.where(rows[row] == caption, POSITIVE, NEGATIVE) * (self.config.num_signs - 1)
        with self.pipeline.roles.signs(sign):
            return predict_pairs(self.pipeline, role, batch, rows[row], caption, t, eps)
