"""What flows between the rooms: prompts, what a text encoder made of them, captioned pictures, and grouped samples."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """P prompts; `index` numbers them within their whole file or world, and seeds their noise. `lines` says where in a
    file each stands, for messages about it."""

    text: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...]
    index: tuple[int, ...]
    lines: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, items: Sequence[int]) -> Self:
        columns = (self.text, self.metadata, self.index, self.lines)
        return Prompts(*(tuple(column[i] for i in items) if column else () for column in columns))

    def place(self, item: int) -> str:
        """Where a prompt stands, in words."""
        return self.lines[item] if self.lines else "a prompt"

    def of(self, group: Tensor) -> tuple[list[str], list[Mapping[str, Any]]]:
        """The prompt of each sample, by its number here (B,), and its metadata."""
        return [self.text[g] for g in group], [self.metadata[g] for g in group]

    def sha256(self) -> str:
        """Of what they say and ask for, on whatever lines of whatever file."""
        return hashlib.sha256(json.dumps([self.text, self.metadata], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Condition:
    """P encoded prompts. A token may stand for several equal ones: `weight` (L,) says how many; None is one each."""

    tokens: Tensor  # (P, L, D)
    pooled: Tensor | None  # (P, D'); None: the model has none
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, items: Tensor | slice) -> Self:
        return replace(self, tokens=self.tokens[items], pooled=None if self.pooled is None else self.pooled[items])

    def to(self, device: torch.device | str) -> Self:
        """The same prompts elsewhere."""
        pooled, weight = (None if x is None else x.to(device) for x in (self.pooled, self.weight))
        return Condition(self.tokens.to(device), pooled, weight)

    def expand(self, size: int) -> Self:
        """One prompt for `size` samples, without copying."""
        pooled = None if self.pooled is None else self.pooled.expand(size, -1)
        return replace(self, tokens=self.tokens.expand(size, -1, -1), pooled=pooled)


@dataclass(frozen=True)
class Captions:
    """B pictures with a caption each; no two pictures and no two captions are equal."""

    x0: Tensor  # (B, C, h, w) clean latents
    condition: Condition  # B
    text: tuple[str, ...]
    index: tuple[int, ...]  # of each picture within its source; it seeds the picture's noise
    seed: int
    step: int

    def __len__(self) -> int:
        return len(self.x0)


@dataclass(frozen=True)
class Rollout:
    """B samples of P prompts and what they earned. Siblings share `group`, their prompt's position in `prompts`."""

    prompts: Prompts  # P
    condition: Condition  # P
    latents: Tensor  # (B, ...) clean
    group: Tensor  # (B,) int64, 0 .. P - 1
    sibling: Tensor  # (B,) int64, 0 .. G - 1
    reward: Tensor  # (B,) float32, finite; NaN in all three until the samples are scored
    scaled: Tensor  # (B,) float32, the reward in units of its standard deviation
    advantage: Tensor  # (B,) float32, the same less the mean of the siblings
    seed: int
    step: int

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, items: Tensor) -> Self:
        """Some of the samples, of the same prompts."""
        columns = ("latents", "group", "sibling", "reward", "scaled", "advantage")
        return replace(self, **{name: getattr(self, name)[items] for name in columns})

    def noise_keys(self) -> list[tuple[int, int, int, int]]:
        """(seed, step, prompt index, sibling) of each sample, to seed its noise."""
        pairs = zip(self.group.tolist(), self.sibling.tolist(), strict=True)
        return [(self.seed, self.step, self.prompts.index[group], sibling) for group, sibling in pairs]

    def split(self, num_parts: int) -> list[Self]:
        """`num_parts` parts of whole groups, of nearly equal numbers of groups. Some are empty where there are too few:
        every process has as many parts as any other."""
        groups = self.group.unique()
        return [self[torch.isin(self.group, part)] for part in groups.tensor_split(num_parts)]


def whole_groups(group: Tensor, size: int) -> Iterator[Tensor]:
    """Indices of samples, by their `group` (B,), in packs of at most `size` that break no group; a larger group is its
    own pack."""
    pack: list[Tensor] = []
    for name in group.unique():
        members = (group == name).nonzero().squeeze(1)
        if pack and sum(map(len, pack)) + len(members) > size:
            yield torch.cat(pack)
            pack = []
        pack.append(members)
    if pack:
        yield torch.cat(pack)
