"""The recognizer: a small network that has learned to read scenes of blocks. It plays three parts.

As a reward it is the learned, hackable proxy (what PickScore is for people), beside the exact verdict of `geneval.py`.
Its features are the space for Frechet distance and diversity. It is differentiable, for methods that need that.
For each of 8 x 8 cells it says which shape, if any, has its centre there, and in which colour. The expected number of
a shape is then the sum of its probabilities, and facts are scored on such sums with credits in [0, 1].
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from trimtab.worlds.blocks import COLORS, SHAPES, SIZE_PX

CELLS = 8  # a side of the grid; two blocks never have their centres in one cell
CHANNELS = 32  # of the layer that the heads and the features share
ASSET = Path(__file__).parents[1] / "assets" / "recognizer" / "recognizer.safetensors"


class Recognizer(nn.Module):
    """Reads pictures (B, 3, 64, 64) in [0, 1]; 0.4 million parameters."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 96)
        layers = [
            layer
            for before, after in pairwise(widths)
            for layer in (nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU())
        ]
        self.trunk = nn.Sequential(*layers, _Residual(96), _Residual(96), nn.Conv2d(96, CHANNELS, 1), nn.SiLU())
        self.shape = nn.Conv2d(CHANNELS, 1 + len(SHAPES), 1)  # class 0 is "no centre here"
        self.color = nn.Conv2d(CHANNELS, len(COLORS), 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the shape (B, 1 + shapes, 8, 8) and of the colour (B, colours, 8, 8) in each cell."""
        states = self.trunk(images * 2 - 1)
        return self.shape(states), self.color(states)

    def features(self, images: Tensor) -> Tensor:
        """(B, 128): the shared layer averaged over each quarter of the picture, so coarse layout counts."""
        return F.adaptive_avg_pool2d(self.trunk(images * 2 - 1), 2).flatten(1)

    def score(self, images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """How well each picture keeps the facts of its prompt, (B,) in [0, 1], with gradient to the picture."""
        shape, color = self(images)
        present = shape.softmax(1)[:, 1:]  # (B, shapes, 8, 8)
        colored = present.unsqueeze(2) * color.softmax(1).unsqueeze(1)  # (B, shapes, colours, 8, 8)
        return torch.stack([_credit(p, c, line) for p, c, line in zip(present, colored, metadata, strict=True)])


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
        )

    def forward(self, states: Tensor) -> Tensor:
        return F.silu(states + self.layers(states))


def _credit(present: Tensor, colored: Tensor, metadata: Mapping[str, Any]) -> Tensor:
    """The mean of the credits of one picture: present (shapes, 8, 8), colored (shapes, colours, 8, 8)."""
    include = metadata["include"]
    numbers = present.sum((1, 2))  # (shapes,)
    asked = torch.zeros_like(numbers)
    credits = []
    for clause in include:
        shape, count = SHAPES.index(clause["class"]), clause["count"]
        asked[shape] += count
        credits.append((-(numbers[shape] - count).abs()).exp())
        if clause.get("color"):
            credits.append((colored[shape, list(COLORS).index(clause["color"])].sum() / count).clamp(max=1))
        if clause.get("position"):
            relation, other = clause["position"]
            target = SHAPES.index(include[other]["class"])
            credits.append(_stands(relation, present[shape], present[target]))
    credits.append((-(numbers * (asked == 0)).sum()).exp())
    return torch.stack(credits).mean()


def _stands(relation: str, here: Tensor, there: Tensor) -> Tensor:
    """Soft truth of "here is `relation` there" from two maps (8, 8): one cell apart counts as one standard unit."""
    along = 1 if relation in ("left of", "right of") else 0
    offset = _centre(here)[along] - _centre(there)[along]
    return torch.sigmoid(2 * (-offset if relation in ("left of", "above") else offset))


def _centre(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean row and column, in cells, of a map (8, 8)."""
    cells = torch.arange(CELLS, device=weight.device, dtype=weight.dtype)
    total = weight.sum() + 1e-6
    return (weight.sum(1) @ cells) / total, (weight.sum(0) @ cells) / total


@cache
def load(path: Path = ASSET) -> Recognizer:
    """The trained recognizer, frozen, float32, on the CPU."""
    recognizer = Recognizer()
    recognizer.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, strict=True)
    return recognizer.eval().requires_grad_(False)


@cache
def on(device: torch.device) -> Recognizer:
    """The same on a device, one for each: it may judge on one while it is looked through on another."""
    return copy.deepcopy(load()).to(device)


class RecognizerScore:
    """The recognizer as a reward; NaN for a prompt without GenEval facts."""

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.with_gradient(images.cpu(), prompts, metadata)

    def with_gradient(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """The same (B,), on the pictures' device and differentiable with respect to them."""
        if images.shape[-2:] != (SIZE_PX, SIZE_PX):
            raise ValueError(f"the recognizer reads {SIZE_PX} x {SIZE_PX} pictures, got {tuple(images.shape)}")
        known = [i for i, line in enumerate(metadata) if "include" in line]
        scores = images.new_full((len(images),), torch.nan)
        if not known:
            return scores
        return scores.index_put(
            (torch.tensor(known),), on(images.device).score(images[known], [metadata[i] for i in known])
        )
