"""Aligning Text to Image in Diffusion Models is Easier Than You Think (SoftREPA), arXiv 2503.08250.

Learns one bank of soft tokens by contrast: among the captions of a batch, a picture's own should denoise it best.

    (1)  e_ij = mean_d (pred(x_t^i, c_j) - target_i)^2        picture i, caption j, one t and one noise for all pairs
    (2)  logit_ij = scale exp(-e_ij / tau)
    (3)  L = mean_i [ -log softmax_j(logit_i)_i ] + lambda mean_i e_ii

dL/de_ij = (1[i = j] - p_ij) (scale / tau) exp(-e_ij / tau) for lambda = 0: the error of every other caption is always
pushed up, whatever it is already, which AGSM was made to mend. Far from the data, where errors are large, the factor
exp(-e / tau) switches the gradient off.

    symbol    name             symbol    name
    tau       temperature      lambda    denoising_weight
    scale     logit_scale      p         softmax over captions of (2)

Departures: the paper writes tau(t); its released code, which this follows, has a constant. lambda is 10 for SD1.5 and
SDXL and 0 for SD3 there (its distributed script takes the flag and ignores it). The code's learning rate falls in ten
stairs to 1e-5, ours along a half cosine to zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from trimtab.batch import Captions
from trimtab.captioned import Captioned
from trimtab.grid import grid_noise, predict_pairs
from trimtab.matching import denoising_error
from trimtab.method import Loss, MethodSettings, Stateful
from trimtab.pipelines import Pipeline
from trimtab.pipelines.soft_tokens import TokenSettings
from trimtab.roles import TRAINED


class SoftREPAConfig(MethodSettings):
    """Defaults: the released code's for SD3."""

    name: Literal["softrepa"] = "softrepa"
    tokens: TokenSettings = TokenSettings()
    tokens_start: Literal["normal", "empty-prompt"] = "normal"
    temperature: float = Field(0.07, gt=0)
    logit_scale: float = Field(4.0, gt=0)
    denoising_weight: float = Field(0.0, ge=0)
    rows: int = Field(4, gt=0)  # pictures of the B x B grid in one forward and backward

    @property
    def roles(self) -> tuple[str, ...]:
        return (TRAINED,)

    @property
    def num_signs(self) -> int:
        return 1


def contrastive_loss(
    error: Tensor, own: Tensor, temperature: float = 0.07, logit_scale: float = 4.0, denoising_weight: float = 0.0
) -> Tensor:
    """Eq. 2, 3 for each row: (R,), from errors (R, B) and the number of each picture's own caption (R,)."""
    logits = logit_scale * torch.exp(-error / temperature)
    matched = error.gather(1, own[:, None]).squeeze(1)
    return functional.cross_entropy(logits, own, reduction="none") + denoising_weight * matched


@dataclass
class SoftREPA:
    """The glue: the grid of errors, in parts of `rows` pictures."""

    config: SoftREPAConfig
    pipeline: Pipeline
    captioned: Captioned

    def __post_init__(self):
        if self.config.tokens_start == "empty-prompt":
            self.pipeline.roles.start_at(self.pipeline.encode([""]).tokens[0, 0])

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {TRAINED: self.pipeline.roles.parameters(TRAINED)}

    def state(self) -> dict[str, Stateful]:
        return {"tokens": self.pipeline.roles, "pictures": self.captioned}

    def collect(self, step: int) -> list[Captions]:
        return [self.captioned.collect(step)]

    def losses(self, batch: Captions) -> Iterator[Loss]:
        t, eps = grid_noise(self.pipeline, batch)
        for rows in torch.arange(len(batch)).split(self.config.rows):
            yield self._rows(batch, rows, t, eps)

    def after_step(self, step: int) -> dict[str, float]:
        return self.pipeline.roles.norms(TRAINED) | self.captioned.log()

    def export(self, folder: Path) -> None:
        self.pipeline.roles.export(folder, TRAINED, {"method": self.config.name})

    def _rows(self, batch: Captions, rows: Tensor, t: Tensor, eps: Tensor) -> Loss:
        config, size = self.config, len(batch)
        picture, caption = torch.cartesian_prod(rows, torch.arange(size)).unbind(1)
        error = denoising_error(*predict_pairs(self.pipeline, TRAINED, batch, picture, caption, t, eps))
        error = error.unflatten(0, (len(rows), size))  # (R, B)
        own = rows.to(error.device)
        loss = contrastive_loss(error, own, config.temperature, config.logit_scale, config.denoising_weight)
        return Loss(
            TRAINED,
            loss.sum() / size,
            {
                "error_matched": error.detach().gather(1, own[:, None]).mean(),
                "win_rate": (error.argmin(1) == own).float().mean(),
            },
            len(rows),
        )
