"""Confidence intervals of mean scores, by a percentile bootstrap over prompts.

Siblings of one prompt succeed and fail together, so images are not independent draws: intervals that resample images
come out too narrow. Here a resample draws P prompts with replacement, each with all of its images, and the interval
holds the middle 95 % of the resampled means. Where the score is an unweighted mean of tag means (GenEval's "overall"),
prompts are drawn within their tag. A difference between two models on the same prompts and seeds is the same
computation on the differences image by image, and far sharper than two separate intervals.

Known weakness: where every prompt scores alike (all 0, all 1) a resample can't differ, and the interval has no width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A mean and the two ends of its interval, in the units of what was averaged."""

    mean: float
    low: float
    high: float


def bootstrap(values: Tensor, group: Tensor, seed: int, num_resamples: int = 2000, level: float = 0.95) -> Interval:
    """Mean over images of values (B,), with the interval from resampling whole prompts; group (B,) int64.

    NaN values (images that could not be scored) are left out. Without a value the mean is NaN too; with fewer than two
    prompts only low and high are, for one prompt says nothing about others. The same arguments give the same numbers.
    """
    return bootstrap_over_tags(values, group, torch.zeros_like(group), seed, num_resamples, level)


def bootstrap_over_tags(
    values: Tensor, group: Tensor, tag: Tensor, seed: int, num_resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Unweighted mean of the tags' means, prompts resampled within their tag; tag (B,) int64, equal within a prompt.

    Otherwise as `bootstrap`. Every tag needs a value for the mean to exist, and two prompts for low and high.
    """
    if values.ndim != 1 or not values.shape == group.shape == tag.shape:
        shapes = f"{tuple(values.shape)}, {tuple(group.shape)}, {tuple(tag.shape)}"
        raise ValueError(f"expected values, group and tag of one shape (B,); got {shapes}")
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    values, group, tag = values.double().cpu(), group.cpu(), tag.cpu()
    scored = ~values.isnan()
    generator = torch.Generator().manual_seed(seed)
    of_tag = [(values[scored & (tag == one)], group[scored & (tag == one)]) for one in tag.unique()]
    mean = torch.stack([v.mean() for v, _ in of_tag]).mean().item()
    means = torch.stack([_resampled_means(v, g, num_resamples, generator) for v, g in of_tag]).mean(0)  # (R,)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)
    low, high = means.quantile(tails).tolist()  # NaN in, NaN out
    return Interval(mean, low, high)


def _resampled_means(values: Tensor, group: Tensor, num_resamples: int, generator: torch.Generator) -> Tensor:
    """Means of as many resamples of whole prompts, (R,); NaN for a single prompt."""
    _, prompt, sizes = group.unique(return_inverse=True, return_counts=True)  # (B,), (P,)
    num_prompts = len(sizes)
    if num_prompts < 2:
        return values.new_full((num_resamples,), math.nan)
    sums = values.new_zeros(num_prompts).index_add_(0, prompt, values)  # (P,)
    drawn = torch.randint(num_prompts, (num_resamples, num_prompts), generator=generator)  # (R, P)
    return sums[drawn].sum(1) / sizes[drawn].sum(1)
