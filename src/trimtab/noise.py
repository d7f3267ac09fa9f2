"""Noise belongs to the sample, not to the process: every draw comes from a generator seeded by what it is for.

The key is a tuple of integers such as (seed, step, prompt index, sibling index). So a run is the same on one process
and on two and at any size of micro-batch, and a resume needs no generator's state.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

# What a draw is for: a number of its key, so that no two draws of a run have the same.
ROLLOUT, TIMES, TRAINING, ORDER, POSTERIOR, SPARES, CALL = range(7)
CHAIN, FAKE, MATCHING, GAN, FEATURES, ANCHORS, SHARED = range(7, 14)


def generator(*key: int) -> torch.Generator:
    """A generator on the CPU, wherever the sample goes, whose seed mixes the key. It takes 32 bits of a seed, so that
    about a hundred pairs among a million keys share a stream."""
    low, high = np.random.SeedSequence(key).generate_state(2)
    return torch.Generator().manual_seed((int(high) << 32 | int(low)) & (2**63 - 1))


def normal(keys: Iterable[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), one key for each of the B samples; on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(*key)) for key in keys])


def uniform(keys: Iterable[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), (B, *shape), one key for each of the B rows; on the CPU."""
    return torch.stack([torch.rand(tuple(shape), generator=generator(*key)) for key in keys])
