"""Several rewards as one number per image, and what becomes of scores that are missing.

total_i = sum_k w_k r_k(i), over the rewards k that apply to the prompt of image i. Siblings are compared with each
other, so all members of a group must be sums of the same terms:

* A reward that returns NaN for a whole group does not apply to that prompt: the term is left out of the group.
* A reward that misses only some members (NaN, infinite, or an exception) leaves these images without a total, NaN.
  So does an exception for a whole group: a crash does not say that the reward does not apply.
* A reward with weight 0 is watched: computed and reported, but neither summed nor able to mask an image.
"""

import copy
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
Part = tuple[Tensor, list[BaseException | None]]  # scores, and what was raised for each image


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

    @property
    def weights(self) -> dict[str, float]:
        """Of the rewards that are trained on."""
        return {name: weight for name, (_, weight) in self.rewards.items() if weight}

    @property
    def smooth(self) -> dict[str, "Reward"]:
        """The rewards that are trained on and have a gradient."""
        return {name: self.rewards[name][0] for name in self.weights if is_smooth(self.rewards[name][0])}

    @property
    def black_box(self) -> dict[str, "Reward"]:
        """The rewards that are trained on and have none."""
        return {name: self.rewards[name][0] for name in self.weights if name not in self.smooth}

    @property
    def watched(self) -> dict[str, "Reward"]:
        """The rewards that are only measured."""
        return {name: reward for name, (reward, weight) in self.rewards.items() if not weight}

    def alone(self) -> dict[str, "Reward"]:
        """Each reward by itself, made to score NaN where it raises; where it raises for all, RewardFailed."""

        def tolerant(name: str, reward: "Reward") -> "Reward":
            def scores(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
                parts = [_scores(name, reward, each, "cpu") for each in _batches(images, prompts, metadata)]
                return _joined(name, parts)[0].detach()

            return scores

        return {name: tolerant(name, reward) for name, (reward, _) in self.rewards.items()}

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict], group: Tensor) -> Scored:
        """Images (B, 3, H, W) in [0, 1], B prompts and metadata, `group` (B,) int64 ids of any value and order.

        Raises RewardFailed where a reward raises for all images, and lets a reward's UserError through.
        """
        num_images, everything = len(images), {name: reward for name, (reward, _) in self.rewards.items()}
        if images.ndim != 4 or not len(prompts) == len(metadata) == num_images > 0 or group.shape != (num_images,):
            shapes = f"images {tuple(images.shape)}, {len(prompts)} prompts, {len(metadata)} metadata"
            raise ValueError(f"{shapes}, group {tuple(group.shape)}; expected (B, 3, H, W), B, B and (B,)")
        total, scored = torch.zeros(num_images), torch.zeros(num_images, dtype=torch.bool)  # (B,) the sum; any term?
        raw, failed = {}, {}
        for name, (scores, applies, failures) in _asked(everything, images, prompts, metadata, group).items():
            raw[name], failed[name] = scores.to(images.device), failures
            if name in self.weights:
                total += torch.where(applies, self.weights[name] * scores, 0.0)
                scored |= applies
        return Scored(torch.where(scored, total, torch.nan).to(images.device), raw, failed)

    @torch.no_grad()
    def watch(self, images: Tensor, prompts: list[str], metadata: list[dict], group: Tensor) -> dict[str, float]:
        """To log: what the watched rewards alone say of the same."""
        found = _asked(self.watched, images, prompts, metadata, group)
        raw, failed = ({name: each[column] for name, each in found.items()} for column in (0, 2))
        return self.log(raw, failed)

    def log(self, raw: Mapping[str, Tensor], failed: Mapping[str, int]) -> dict[str, float]:
        """Of these rewards' scores (B,): mean and deviation of those that are finite, and how many are missing."""
        log = {f"failed/{name}": float(count) for name, count in failed.items()}
        for name, scores in raw.items():
            family, known = "watched" if name in self.watched else "rewards", scores[scores.isfinite()]
            log[f"{family}/{name}/mean"] = known.mean().item() if len(known) else math.nan
            log[f"{family}/{name}/std"] = known.std(correction=0).item() if len(known) else math.nan
        return log


def is_smooth(reward: Any) -> bool:
    """Whether pictures can learn from a reward's own gradient."""
    return hasattr(reward, "with_gradient")


def with_gradient(
    name: str, reward: Any, images: Tensor, prompts: list[str], metadata: list[dict], group: Tensor
) -> tuple[Tensor, int]:
    """The scores (B,) of a reward that has a gradient, with it, NaN where there is none; and how many images have none
    that should, as in `Scored`.

    An image for which the reward raises, or through which a gradient comes that is not finite, gets a gradient of 0,
    and costs no other. Raises RewardFailed where the reward raises for all of several images.
    """
    part = _scores(name, reward.with_gradient, (_guarded(images), prompts, metadata), images.device)
    if len(images) == 1 and part[1][0] is not None:
        logger.warning("reward %r failed for an image: %s", name, _described(part[1][0]))
        return part[0] + 0 * images.flatten(1).sum(1), 1  # as scores with a gradient, which is 0
    siblings = torch.unique(group.cpu(), return_inverse=True)[1]
    scores, _, failed = _settled(name, [part], siblings)
    return scores, failed


def _guarded(images: Tensor) -> Tensor:
    """The same images; of a gradient that is not finite nothing comes back through them."""
    images = images.view_as(images)
    if images.requires_grad:
        images.register_hook(lambda g: torch.where(g.isfinite().flatten(1).all(1)[:, None, None, None], g, 0.0))
    return images


def _asked(
    rewards: Mapping[str, "Reward"], images: Tensor, prompts: list[str], metadata: list[dict], group: Tensor
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """What each reward says, on the CPU: `_settled`'s three."""
    siblings = torch.unique(group.cpu(), return_inverse=True)[1]  # (B,) 0 ... number of groups - 1
    parts = {name: [] for name in rewards}
    for batch in _batches(images, prompts, metadata):  # all rewards see one batch before the next
        for name, reward in rewards.items():
            scores, errors = _scores(name, reward, batch, "cpu")
            parts[name].append((scores.detach(), errors))
    return {name: _settled(name, parts[name], siblings) for name in rewards}


def _settled(name: str, parts: Sequence[Part], siblings: Tensor) -> tuple[Tensor, Tensor, int]:
    """The scores of all parts (B,), NaN where not finite; to which images the reward applies (B,), and how many of
    these have no score."""
    scores, crashed = _joined(name, parts)
    applies = _any_in_group(~scores.detach().isnan().cpu() | crashed, siblings)  # (B,)
    scores = torch.where(scores.isfinite(), scores, torch.nan)
    return scores, applies, int((applies & scores.isnan().cpu()).sum())


def _any_in_group(flags: Tensor, siblings: Tensor) -> Tensor:
    """(B,) bool: is the flag set for any member of the image's group?"""
    return torch.bincount(siblings, weights=flags.float())[siblings] > 0


def _batches(images: Tensor, prompts: list[str], metadata: list[dict]) -> list[Batch]:
    """The images in parts of AT_ONCE, with their prompts and metadata."""
    starts = range(0, len(images), AT_ONCE)
    return [tuple(x[start : start + AT_ONCE] for x in (images, prompts, metadata)) for start in starts]


def _scores(name: str, ask: "Reward", batch: Batch, device: str | torch.device) -> Part:
    """A reward's scores (B,), float32, and what it raised for each image, asked one by one if the batch as a whole
    fails."""
    results = [_attempt(name, ask, batch)]
    if isinstance(results[0], BaseException):
        del results[0]  # it keeps alive all that its call has made, which may be why it failed
        singles = [tuple(x[i : i + 1] for x in batch) for i in range(len(batch[0]))]
        results = [_attempt(name, ask, single) for single in singles]
    found, errors = [], []
    for result in results:
        failed = isinstance(result, BaseException)
        found.append((torch.full((1,), torch.nan) if failed else result).to(device, torch.float32))
        errors += [result if failed else None] * len(found[-1])
    return torch.cat(found), errors


def _joined(name: str, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
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


def _attempt(name: str, ask: "Reward", batch: Batch) -> Tensor | BaseException:
    """The scores of a batch (B,), or what went wrong. What is asked may change its lists: others have their own."""
    images, prompts, metadata = batch
    try:
        scores = ask(images, list(prompts), [copy.deepcopy(dict(line)) for line in metadata])
    except UserError:
        raise  # says what to correct; asking image by image would only hide it
    except (Exception, SystemExit) as error:  # a user's function may raise anything; one bad image must not end a run
        return error
    expected = (len(images),)
    if not isinstance(scores, Tensor) or scores.shape != expected:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"reward {name!r} returned {found}; expected a tensor of shape {expected}")
    return scores


def _described(error: BaseException) -> str:
    """The exception in one line, and the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"{text} ({place.filename}, line {place.lineno})"
