"""The grid of every picture of a batch with every caption, at one time and with one noise: AGSM and SoftREPA.

One noise for all captions of a picture is what makes their errors comparable; it cancels in the differences.
"""

import torch
from torch import Tensor

from trimtab import noise
from trimtab.batch import Captions
from trimtab.pipelines import Pipeline


def grid_noise(pipeline: Pipeline, batch: Captions) -> tuple[Tensor, Tensor]:
    """The time () and noise (1, ...) that all pairs of a step share: t is one of the model's 1000 timesteps. Processes
    draw their own, which the number of their first picture keeps apart."""
    generator = noise.generator(batch.seed, batch.step, batch.index[0], noise.TRAINING)
    timestep = torch.randint(1000, (), generator=generator).to(batch.x0)
    eps = torch.randn(batch.x0.shape[1:], generator=generator).to(batch.x0)
    return pipeline.process.time(timestep), eps[None]


def predict_pairs(
    pipeline: Pipeline, role: str, batch: Captions, picture: Tensor, caption: Tensor, t: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """What the network says of each pair (picture, caption), (N,) each, and what it should have said: (N, ...) both."""
    x0 = batch.x0[picture.to(batch.x0.device)]
    eps = eps.expand_as(x0)
    condition = batch.condition[caption.to(batch.condition.tokens.device)]
    prediction = pipeline.predict(pipeline.process.noised(x0, eps, t), t, condition, role)
    return prediction.value.float(), prediction.target(x0, eps)
