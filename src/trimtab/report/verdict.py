"""Is it better? Two models, the same prompts and seeds, and an answer no bolder than the numbers.

Where both evaluations hold the same images (prompt, sibling, seed), the change is the mean of the differences image by
image, with an interval over prompts: what is hard for both models cancels. It is called better or worse only when that
interval leaves out zero. Otherwise the two separate intervals must not overlap.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from trimtab.metrics import Interval, bootstrap_over_tags
from trimtab.report.folder import Evaluation, RunFolder
from trimtab.report.words import bounds, counted, listed, score, signed

UNKNOWN = Interval(math.nan, math.nan, math.nan)
GUIDED = "base-guided"
MIN_PROMPTS = 6  # five may all move one way by chance (2 / 2⁵ = 6%), and a resample of them would never show it


@dataclass(frozen=True)
class Change:
    before: Interval
    after: Interval
    difference: Interval | None  # None: the two did not see the same images

    @property
    def direction(self) -> str:
        """'better', 'worse' or 'unclear'; bounds that could not be computed are unclear."""
        if self.difference is not None:
            low, high = self.difference.low, self.difference.high
        else:
            low, high = self.after.low - self.before.high, self.after.high - self.before.low
        if low > 0:
            return "better"
        return "worse" if high < 0 else "unclear"


def change(before: Evaluation, after: Evaluation, name: str, tag: str | None = None) -> Change:
    """From one model to another, on the images of one tag; without a tag, in the unweighted mean of the tags' means."""
    intervals = [each.tags(name).get(tag, UNKNOWN) if tag else each.overall(name) for each in (before, after)]
    return Change(*intervals, difference=_difference(before, after, name, tag))


def _difference(before: Evaluation, after: Evaluation, name: str, tag: str | None) -> Interval | None:
    if not after.cases or before.cases.keys() != after.cases.keys():
        return None
    pairs = [(before.cases[key], case) for key, case in after.cases.items() if tag in (None, case.tag)]
    values = torch.tensor([b.scores.get(name, math.nan) - a.scores.get(name, math.nan) for a, b in pairs])
    prompts = torch.tensor([case.key[0] for _, case in pairs])
    tags = sorted({case.tag for _, case in pairs})
    tag_ids = torch.tensor([tags.index(case.tag) for _, case in pairs])
    found = bootstrap_over_tags(values, prompts, tag_ids, seed=0)
    return found if len(prompts.unique()) >= MIN_PROMPTS else Interval(found.mean, math.nan, math.nan)


def sentence(run: RunFolder) -> str:
    """The one sentence below the title."""
    if run.subject is None:
        return _of_training(run)
    if not run.headline:
        return (
            "Not judged: nothing was scored, neither by the suite nor by a reward;"
            " compare the pictures, or name a reward and evaluate again."
        )
    if run.reference is None:
        value = run.subject.overall(run.headline)
        return (
            f"Nothing to compare with: only '{run.subject.label}' was evaluated,"
            f" {run.headline} score {score(value.mean)} ({bounds(value) or 'no interval'})."
        )
    moved = change(run.reference, run.subject, run.headline)
    says = {"better": _better, "worse": _worse, "unclear": _unclear}[moved.direction]
    return says(run, moved) + _beside_guided(run) + "."


def _better(run: RunFolder, moved: Change) -> str:
    return f"Better: the {run.headline} score rose {_from_to(run, moved)}{_by(moved)}"


def _worse(run: RunFolder, moved: Change) -> str:
    text = f"Worse: the {run.headline} score fell {_from_to(run, moved)}{_by(moved)}"
    hacked = [
        name
        for name in run.names("rewards")
        if name != run.headline and change(run.reference, run.subject, name).direction == "better"
    ]
    return text + (f", while {listed(hacked)}, which it was trained on, rose: the reward was hacked" if hacked else "")


def _unclear(run: RunFolder, moved: Change) -> str:
    text = f"No clear difference: the {run.headline} score went {_from_to(run, moved)}"
    if moved.difference is None:
        return f"{text}, and the two intervals overlap or are unknown"
    interval = bounds(moved.difference)
    if not interval:
        return f"{text}, too few prompts or scores to judge the change"
    return f"{text}, and the change of {signed(moved.difference.mean)} (95% interval {interval}) may be chance"


def _from_to(run: RunFolder, moved: Change) -> str:
    before, after = score(moved.before.mean), score(moved.after.mean)
    return f"from {before} ({_named(run.reference, run.subject)}) to {after} ({_named(run.subject, run.reference)})"


def _named(evaluation: Evaluation, other: Evaluation) -> str:
    """Its label, and how its pictures were made where the other's were made otherwise."""
    setting = evaluation.setting if evaluation.setting != other.setting else ""
    return f"{evaluation.label}, {setting}" if setting else evaluation.label


def _by(moved: Change) -> str:
    if moved.difference is None:
        return "; the two 95% intervals do not overlap"
    return f", a change of {signed(moved.difference.mean)} (95% interval {bounds(moved.difference)})"


def _beside_guided(run: RunFolder) -> str:
    """What training has to beat to be worth it: the same weights with guidance, at twice the cost per step or more."""
    guided = run.evaluations.get(GUIDED)
    if guided is None or guided is run.subject or guided is run.reference:
        return ""
    moved = change(guided, run.subject, run.headline)
    where = {"better": "above", "worse": "below", "unclear": "not clearly different from"}[moved.direction]
    how = f": {guided.setting}, against {run.subject.setting}" if guided.setting and run.subject.setting else ""
    return f"; that is {where} the untrained model with guidance ({score(moved.before.mean)}{how})"


def _of_training(run: RunFolder) -> str:
    reward = run.metrics.get("reward", np.array([]))
    reward = reward[np.isfinite(reward)]
    if not len(reward):
        return "Not judged: this run holds neither scores nor rewards."
    tenth = max(1, len(reward) // 10)
    first, last = reward[:tenth].mean(), reward[-tenth:].mean()
    return (
        f"Not evaluated: the training reward went from {score(first)} to {score(last)}"
        f" over {counted(len(reward), 'step')}, which alone does not show that the pictures are better."
    )
