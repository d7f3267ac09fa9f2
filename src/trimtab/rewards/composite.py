"""Several rewards as one number per image, and what becomes of scores that are missing.

total_i = sum_k w_k r_k(i), over the rewards k that apply to the prompt of image i. Siblings are compared with each
other, so all members of a group must be sums of the same terms:

* A reward that returns NaN for a whole group does not apply to that prompt: the term is left out of the group.
* A reward that misses only some members (NaN, infinite, or an exception) leaves these images without a total, NaN.
  So does an exception for a whole group: a crash does not say that the reward does not apply.
* A reward with weight 0 is watched: computed and reported, but neither summed nor able to mask an image.
"""

import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import RunStopped, UserError

if TYPE_CHECKING:
    from trimtab.rewards import Reward

logger = logging.getLogger(__name__)

AT_ONCE = 64  # images that a reward is asked about in one call
Batch = tuple[Tensor, list[str], list[dict]]


class RewardFailed(RunStopped):
    """A reward raised for every image of a batch: nothing is left to learn from, so save and stop."""


@dataclass(frozen=True)
class Scored:
    """`total` (B,), NaN = no score. `raw`: each reward's unweighted scores (B,). `failed`: its images without a score,
    among those that it applies to."""

    total: Tensor
    raw: dict[str, Tensor]
    failed: dict[str, int]


@dataclass(frozen=True)
class Composite:
    """Named rewards with their weights: {"geneval": (reward, 1.0), "aesthetic": (other, 0.2)}."""

    rewards: Mapping[str, tuple["Reward", float]]

    def __post_init__(self):
        for name, (_, weight) in self.rewards.items():
            if not math.isfinite(weight):
                raise UserError(f"reward {name!r} has weight {weight}; expected a finite number.")
        if not any(weight for _, weight in self.rewards.values()):
            names = ", ".join(self.rewards) or "none"
            raise UserError(f"no reward has a weight other than 0 (rewards: {names}); give at least one.")

    def alone(self) -> dict[str, "Reward"]:
        """Each reward by itself, made to score NaN where it raises; where it raises for all, RewardFailed."""

        def tolerant(name: str, reward: "Reward") -> "Reward":
            def scores(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
                return _joined(name, [_scores(name, reward, each) for each in _batches(images, prompts, metadata)])[0]

            return scores

        return {name: tolerant(name, reward) for name, (reward, _) in self.rewards.items()}

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict], group: Tensor) -> Scored:
        """Images (B, 3, H, W) in [0, 1], B prompts and metadata, `group` (B,) int64 ids of any value and order.

        Raises RewardFailed where a reward raises for all images, and lets a reward's UserError through.
        """
        num_images = len(images)
        if images.ndim != 4 or not len(prompts) == len(metadata) == num_images > 0 or group.shape != (num_images,):
            shapes = f"images {tuple(images.shape)}, {len(prompts)} prompts, {len(metadata)} metadata"
            raise ValueError(f"{shapes}, group {tuple(group.shape)}; expected (B, 3, H, W), B, B and (B,)")
        siblings = torch.unique(group.cpu(), return_inverse=True)[1]  # (B,) 0 ... number of groups - 1
        total, scored = torch.zeros(num_images), torch.zeros(num_images, dtype=torch.bool)  # (B,) the sum; any term?
        parts = {name: [] for name in self.rewards}
        for batch in _batches(images, prompts, metadata):  # all rewards see one batch before the next
            for name, (reward, _) in self.rewards.items():
                parts[name].append(_scores(name, reward, batch))
        raw, failed = {}, {}
        for name, (_, weight) in self.rewards.items():
            scores, crashed = _joined(name, parts[name])
            applies = _any_in_group(~scores.isnan() | crashed, siblings)  # (B,)
            scores = torch.where(scores.isfinite(), scores, torch.nan)
            raw[name], failed[name] = scores.to(images.device), int((applies & scores.isnan()).sum())
            if weight:
                total += torch.where(applies, weight * scores, 0.0)
                scored |= applies
        return Scored(torch.where(scored, total, torch.nan).to(images.device), raw, failed)


def is_smooth(reward: Any) -> bool:
    """Whether pictures can learn from a reward's own gradient."""
    return hasattr(reward, "with_gradient")


def with_gradient(reward: Any, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """The scores (B,) of a reward that has a gradient, with it; RewardFailed where it raises."""
    try:
        return reward.with_gradient(images, prompts, metadata)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise RewardFailed(f"a reward failed where its gradient was asked for: {_described(error)}") from error


def _any_in_group(flags: Tensor, siblings: Tensor) -> Tensor:
    """(B,) bool: is the flag set for any member of the image's group?"""
    return torch.bincount(siblings, weights=flags.float())[siblings] > 0


def _batches(images: Tensor, prompts: list[str], metadata: list[dict]) -> list[Batch]:
    """The images in parts of AT_ONCE, with their prompts and metadata."""
    starts = range(0, len(images), AT_ONCE)
    return [tuple(x[start : start + AT_ONCE] for x in (images, prompts, metadata)) for start in starts]


def _scores(name: str, reward: "Reward", batch: Batch) -> tuple[Tensor, list[BaseException | None]]:
    """A reward's scores (B,) and what it raised for each image, asked one by one if the batch as a whole fails."""
    results = [_attempt(name, reward, batch)]
    if isinstance(results[0], BaseException):
        del results[0]  # it keeps alive all that its call has made, which may be why it failed
        singles = [tuple(x[i : i + 1] for x in batch) for i in range(len(batch[0]))]
        results = [_attempt(name, reward, single) for single in singles]
    found, errors = [], []
    for result in results:
        failed = isinstance(result, BaseException)
        found.append(torch.full((1,), torch.nan) if failed else result)
        errors += [result if failed else None] * len(found[-1])
    return torch.cat(found), errors


def _joined(name: str, parts: Sequence[tuple[Tensor, list[BaseException | None]]]) -> tuple[Tensor, Tensor]:
    """The scores of all batches (B,) and for which images the reward raised (B,); RewardFailed if for all."""
    errors = [error for _, part in parts for error in part]
    crashed = torch.tensor([error is not None for error in errors])
    if crashed.any():
        first = next(error for error in errors if error is not None)
        if crashed.all():
            raise RewardFailed(f"reward {name!r} failed for all {len(errors)} images: {_described(first)}") from first
        number = int(crashed.sum())
        logger.warning("reward %r failed for %d of %d images: %s", name, number, len(errors), _described(first))
    return torch.cat([scores for scores, _ in parts]), crashed


def _attempt(name: str, reward: "Reward", batch: Batch) -> Tensor | BaseException:
    """The scores of a batch (B,), float32 on the CPU, or what went wrong."""
    try:
        scores = reward(*batch)
    except UserError:
        raise  # says what to correct; asking image by image would only hide it
    except (Exception, SystemExit) as error:  # a user's function may raise anything; one bad image must not end a run
        return error
    expected = (len(batch[0]),)
    if not isinstance(scores, Tensor) or scores.shape != expected:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"reward {name!r} returned {found}; expected a tensor of shape {expected}")
    return scores.detach().to("cpu", torch.float32)


def _described(error: BaseException) -> str:
    """The exception in one line, and the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"{text} ({place.filename}, line {place.lineno})"
