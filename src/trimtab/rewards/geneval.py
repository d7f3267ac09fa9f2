"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): does a picture hold what its prompt asks for?

The rules read detections, never pixels, so photographs and drawn blocks are judged by the same lines; `reader` is
what turns images into detections. A line of metadata is a list of `include` clauses that must all hold
(`class`, `count`, maybe `color`, maybe `position: [relation, number of an earlier clause]`) and of `exclude` clauses.

Four modes:
    official        the published benchmark: *at least* what was asked; other objects are free
    strict          exactly what was asked and nothing else
    soft            a dense score in [0, 1]; it is 1 just when `strict` holds
    flow_grpo_soft  what Flow-GRPO's reward server returns, slips included, for comparison with runs trained on it
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.worlds.facts import MAX_OBJECTS, RELATIONS, number_of_each

Mode = Literal["official", "strict", "soft", "flow_grpo_soft"]
Box = tuple[float, float, float, float]

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9  # for every class of a picture whose tag is "counting"


@dataclass(frozen=True)
class Detection:
    """One object found in an image. What a reader sees but cannot name it calls 'blob'."""

    name: str
    score: float
    box: Box  # x0, y0, x1, y1 in px, y down
    colour: str | None


@dataclass(frozen=True)
class Verdict:
    """A mode's yes or no, its number, and in words what is wrong ('' if nothing is)."""

    correct: bool
    score: float
    reason: str


Objects = dict[str, list[Detection]]  # class -> its objects, most confident first
Credit = tuple[float, str]  # a partial credit in [0, 1] and what is missing to 1


def judge(detections: Sequence[Detection], metadata: dict, mode: Mode, clamp: bool = False) -> Verdict:
    """Judges one image by its detections. `metadata` must have passed `validate_metadata`.

    `clamp` keeps the score in [0, 1], where only 'flow_grpo_soft' can leave it (five found for one asked is -3).
    """
    verdict = _RULES[mode](_kept(detections, metadata["tag"]), metadata)
    return replace(verdict, score=min(max(verdict.score, 0.0), 1.0)) if clamp else verdict


def relations(a: Box, b: Box) -> tuple[str, ...]:
    """How box `a` lies to box `b`: none, one or two of `RELATIONS`.

    The offset of the centres is shortened along each axis by a tenth of both sizes, then divided by its own
    *unshortened* length. More than half of that length is a relation, so a diagonal can be two.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    slack = [0.1 * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    short = [math.copysign(max(abs(o) - s, 0.0), o) for o, s in zip(offset, slack, strict=True)]
    if max(abs(s) for s in short) < 1e-3:
        return ()
    dx, dy = (s / math.hypot(*offset) for s in short)
    return tuple(r for r, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds)


@dataclass(frozen=True)
class GenEval:
    """The reward. `reader` takes images (B, 3, H, W) in [0, 1] and returns B lists of detections."""

    reader: Callable[[Tensor], list[list[Detection]]]
    mode: Mode = "strict"
    clamp: bool = False

    def __post_init__(self):
        if self.mode not in _RULES:
            raise UserError(f"GenEval mode {self.mode!r} is unknown; choose one of {', '.join(get_args(Mode))}.")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """(B,) float32; NaN where the metadata has no `include`, that is, where GenEval asks for nothing."""
        if images.ndim != 4 or len(images) != len(metadata):
            raise ValueError(f"images {tuple(images.shape)} for {len(metadata)} metadata; expected (B, 3, H, W) for B")
        scores = torch.full((len(images),), torch.nan)  # (B,)
        asked = [i for i, line in enumerate(metadata) if line.get("include")]
        if asked:
            read = self.reader(images if len(asked) == len(images) else images[asked])
            for i, found in zip(asked, read, strict=True):
                scores[i] = judge(found, metadata[i], self.mode, self.clamp).score
        return scores.to(images.device)


def _kept(detections: Sequence[Detection], tag: str) -> Objects:
    # Compared in float32, the detector's own precision: float32(0.3) must not pass a threshold of 0.3.
    threshold = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    kept = defaultdict(list)
    for detection in sorted(detections, key=lambda d: -d.score):
        if np.float32(detection.score) > threshold and len(kept[detection.name]) < MAX_OBJECTS:
            kept[detection.name].append(detection)
    return {name: objects for name, objects in kept.items() if objects}


# ---- official


def _official(kept: Objects, metadata: dict) -> Verdict:
    """Each clause looks at the `count` most confident objects of its class, so clauses of one class share objects."""
    groups, faults = [], []
    for clause in metadata["include"]:
        group = kept.get(clause["class"], [])[: clause["count"]]
        fault = _fault(clause, group, groups)
        groups.append(None if fault else group)
        faults.append(fault)
    for clause in metadata.get("exclude") or []:
        found = len(kept.get(clause["class"], []))
        if found >= clause["count"]:
            faults.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    return _verdict(faults)


def _fault(clause: dict, group: list[Detection], groups: list) -> str:
    """The first thing wrong with a clause: its number, colour, position. `groups` are the earlier clauses' objects."""
    name, count = clause["class"], clause["count"]
    if len(group) < count:
        return f"expected {name}>={count}, found {len(group)}"
    return _colour_fault(clause, group) or _position_fault(clause, group, groups)


def _colour_fault(clause: dict, group: list[Detection]) -> str:
    name, count, colour = clause["class"], clause["count"], clause.get("color")
    found = Counter(d.colour for d in group)
    if not colour or found[colour] >= count:
        return ""
    seen = ", ".join(f"{number} {c or 'without colour'}" for c, number in found.items())
    return f"expected {colour} {name}>={count}, found {found[colour]} {colour}; and {seen}"


def _position_fault(clause: dict, group: list[Detection], groups: list) -> str:
    if not clause.get("position"):
        return ""
    name, (relation, target) = clause["class"], clause["position"]
    if groups[target] is None:
        return f"no target for {name} to be {relation}"
    for a, b in product(group, groups[target]):
        found = relations(a.box, b.box)
        if relation not in found:
            return f"expected {name} {relation} target, found {' and '.join(found) or 'no clear side of'} target"
    return ""


def _verdict(faults: list[str], score: float | None = None) -> Verdict:
    """`score` None: the score is the verdict itself, 1 or 0."""
    faults = list(dict.fromkeys(fault for fault in faults if fault))
    return Verdict(not faults, float(not faults) if score is None else score, "\n".join(faults))


# ---- strict and soft


def _strict(kept: Objects, metadata: dict) -> Verdict:
    return _verdict([fault for _, fault in _credits(kept, metadata["include"])])


def _soft(kept: Objects, metadata: dict) -> Verdict:
    """The mean of the partial credits; `correct` is the strict verdict."""
    credits = _credits(kept, metadata["include"])
    return _verdict([fault for _, fault in credits], sum(value for value, _ in credits) / len(credits))


def _credits(kept: Objects, include: list[dict]) -> list[Credit]:
    """One credit for each clause's count, colour and position, and one for 'nothing else'.

    Clauses of one class divide its objects between them, each object standing for one clause: 'a red circle and
    a blue circle' asks for two. So the count that is compared is the class's, with the sum over its clauses, and
    dealing by colour is the best way to divide; where a position cares who is who, `validate_metadata` wants colours.
    `exclude` adds nothing here: validated, it only forbids more than the exact number.
    """
    asked, credits = number_of_each(include), []
    for clause in include:
        name, found = clause["class"], len(kept.get(clause["class"], []))
        fault = f"expected {name}=={asked[name]}, found {found}"
        credits.append(_credit(1 - abs(found - asked[name]) / asked[name], fault))
    credits += _attribute_credits(include, _dealt(kept, include))
    extras = {name: len(objects) for name, objects in kept.items() if name not in asked}
    seen = ", ".join(f"{number} {name}" for name, number in extras.items())
    return [*credits, _credit(1 - sum(extras.values()) / asked.total(), f"expected nothing else, found {seen}")]


def _credit(value: float, fault: str) -> Credit:
    return max(value, 0.0), "" if value == 1 else fault


def _attribute_credits(include: list[dict], groups: list[list[Detection | None]]) -> list[Credit]:
    """Colours and positions; `groups` holds the objects that stand for each clause, None for a missing one."""
    credits = []
    for clause, group in zip(include, groups, strict=True):
        name, count, colour = clause["class"], clause["count"], clause.get("color")
        if colour:
            right = sum(d is not None and d.colour == colour for d in group)
            credits.append(_credit(right / count, f"expected {colour} {name}=={count}, found {right}"))
        if clause.get("position"):
            relation, target = clause["position"]
            pairs = list(product(group, groups[target]))
            right = sum(None not in (a, b) and relation in relations(a.box, b.box) for a, b in pairs)
            fault = f"expected {name} {relation} target, found {right} of {len(pairs)} pairs so"
            credits.append(_credit(right / len(pairs), fault))
    return credits


def _dealt(kept: Objects, include: list[dict]) -> list[list[Detection | None]]:
    """Each clause's objects: those of its own colour first, then what is left, most confident first, then None."""
    left = {clause["class"]: list(kept.get(clause["class"], [])) for clause in include}
    groups = []
    for clause in include:
        own = [d for d in left[clause["class"]] if clause.get("color") and d.colour == clause["color"]]
        groups.append(own[: clause["count"]])
        for detection in groups[-1]:
            left[clause["class"]].remove(detection)
    for clause, group in zip(include, groups, strict=True):
        while len(group) < clause["count"]:
            group.append(left[clause["class"]].pop(0) if left[clause["class"]] else None)
    return groups


# ---- Flow-GRPO's reward server


def _flow_grpo_soft(kept: Objects, metadata: dict) -> Verdict:
    """Mean of credits (can be negative); `correct` is its strict reward. Other classes and `exclude` do not count."""
    groups, faults, credits = [], [], []
    for clause in metadata["include"]:
        name, count, group = clause["class"], clause["count"], kept.get(clause["class"], [])
        exact = len(group) == count
        fault = _fault(clause, group, groups) if exact else f"expected {name}=={count}, found {len(group)}"
        credits += _flow_grpo_credits(clause, group, groups)
        groups.append(None if fault else group)
        faults.append(fault)
    return _verdict(faults, sum(credits) / len(credits))


def _flow_grpo_credits(clause: dict, group: list[Detection], groups: list) -> list[float]:
    count, colour, position = clause["count"], clause.get("color"), clause.get("position")
    credits = [1 - abs(count - len(group)) / count]
    if len(group) != count:
        return credits + [0.0] * bool(colour or position)  # one zero, though both were asked
    if colour:
        credits.append(sum(d.colour == colour for d in group) / count)
    if position and not _colour_fault(clause, group):
        if groups[position[1]] is not None and _position_fault(clause, group, groups):
            credits += [0.0, 1.0]  # the slip that all copies keep: a wrong position costs half of its credit
        else:
            credits.append(float(groups[position[1]] is not None))
    return credits


_RULES = {"official": _official, "strict": _strict, "soft": _soft, "flow_grpo_soft": _flow_grpo_soft}
