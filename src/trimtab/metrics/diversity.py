"""How much the siblings of one prompt differ: the first thing to go when a model collapses onto what its reward likes.

Distances are Euclidean in feature space and divided by nothing, so they compare models under one feature map, not two
maps. Cosine would hide a collapse of contrast, and dividing by the spread of all images one that hits every prompt.
"""

import math

import torch
from torch import Tensor


def within_prompt_diversity(features: Tensor, group: Tensor) -> float:
    """Mean over prompts of the mean distance between two siblings; features (B, D), group (B,) int64.

    Every prompt weighs the same however many siblings it has; one with a single image is ignored. NaN when all are.
    """
    if features.ndim != 2 or group.shape != features.shape[:1]:
        shapes = f"{tuple(features.shape)} and {tuple(group.shape)}"
        raise ValueError(f"expected features (B, D) and group (B,); got {shapes}")
    _, sizes = group.unique(return_counts=True)  # (P,)
    by_prompt = features.double()[group.argsort()].split(sizes.tolist())
    means = [torch.pdist(siblings).mean() for siblings in by_prompt if len(siblings) > 1]
    return torch.stack(means).mean().item() if means else math.nan
