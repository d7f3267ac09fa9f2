"""A GAN's judge of noised latents: the middle of a denoising network, and a small head on it (DMD2, arXiv 2405.14867).

    network   the middle                                  features (B, C, h, w)
    UNet      what its mid block puts out                 at the lowest resolution
    MMDiT     the pixels after half of its blocks         one for each patch

The head halves the side until it is 4 or less and then sees all of it: for Stable Diffusion 1.5 and XL these are the
authors' own heads.
"""

import math

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """From features (B, C, side, side) to a logit (B,), above 0 for what looks real."""

    def __init__(self, channels: int, side: int, seed: int):
        super().__init__()
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            while side > 4:
                layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), *_normed(channels)]
                side //= 2
            layers += [nn.Conv2d(channels, channels, side), *_normed(channels), nn.Conv2d(channels, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.float()).flatten()


def _normed(channels: int) -> tuple[nn.Module, nn.Module]:
    """32 groups, or as many as have eight channels each: a group of one number would always be 0."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 8), channels), channels), nn.SiLU()
