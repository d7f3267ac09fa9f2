"""Rewards: what an image is worth to its prompt.

A reward is any callable of the shape below. It never sees groups, weights or gradients; `composite` combines
several of them and decides what a missing score means.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from torch import Tensor

from trimtab.batch import Prompts
from trimtab.errors import UserError
from trimtab.rewards import custom
from trimtab.rewards.composite import Composite
from trimtab.rewards.detectors import read_blocks
from trimtab.rewards.geneval import Detection, GenEval
from trimtab.rewards.recognizer import RecognizerScore
from trimtab.worlds import blocks


class Reward(Protocol):
    """Scores a batch of images, each by itself; a higher score is better.

    A smooth one (`composite.is_smooth`) has a method `with_gradient` as well: the same arguments, the same scores, on
    the images' device and differentiable with respect to them.
    """

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """`images`: (B, 3, H, W) float32 in [0, 1]; `prompts` and `metadata`: B of each. Returns (B,) float32.

        NaN says "this reward does not apply here or could not be told". An image that cannot be scored because
        something broke is an exception, not a NaN: the caller finds the guilty image and counts it.
        """


GENEVAL = {
    "geneval": "soft",
    "geneval-strict": "strict",
    "geneval-official": "official",
    "geneval-flow-grpo": "flow_grpo_soft",
}
BUILT_IN = (*GENEVAL, "recognizer")


def build(rewards: Mapping[str, float], prompts: Prompts) -> Composite:
    """The weighted rewards of a recipe. UserError for an unknown name, or for prompts that a reward can't judge."""
    reader = _Reader()
    built = Composite({name: (_one(name, reader), weight) for name, weight in rewards.items()})
    check(built, prompts)
    return built


def check(rewards: Composite, prompts: Prompts) -> None:
    """UserError for prompts that one of the rewards can't judge."""
    for name, (reward, _) in rewards.rewards.items():
        if name in BUILT_IN:
            _check_facts(name, prompts)
        if isinstance(reward, custom.ColumnsFunction):
            reward.check(prompts)


def check_side(rewards: Iterable[str], side_px: Callable[[], int]) -> None:
    """UserError for one that reads blocks and would be shown pictures of another size; that is asked where one does."""
    name = next((each for each in rewards if each in BUILT_IN), None)
    if name and (side := side_px()) != blocks.SIZE_PX:
        raise UserError(
            f"reward {name!r} reads pictures of {blocks.SIZE_PX} pixels and this model draws {side}; give "
            "another resolution, or your own reward as path/to/file.py:function."
        )


class _Reader:
    """The exact reader, which remembers the last pictures: several rules judge one reading."""

    def __init__(self):
        self.images: Tensor | None = None
        self.found: list[list[Detection]] = []

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        if images is not self.images:
            self.images, self.found = images, read_blocks(images)
        return self.found


def _one(name: str, reader: _Reader) -> Reward:
    if name in GENEVAL:
        return GenEval(reader, GENEVAL[name])
    if name == "recognizer":
        return RecognizerScore()
    if ":" in name:
        return custom.load(name)
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"did you mean {near[0]!r}? Built in are" if near else "built in are"
    raise UserError(
        f"reward {name!r} is unknown; {hint} {', '.join(BUILT_IN)}; your own is 'path/to/file.py:function'."
    )


def _check_facts(name: str, prompts: Prompts) -> None:
    """Every prompt must say what is to be seen, in words of the world whose reader judges it."""
    for i, (text, line) in enumerate(zip(prompts.text, prompts.metadata, strict=True)):
        where = prompts.place(i)
        if "include" not in line:
            raise UserError(
                f"reward {name!r} needs facts, and {text!r} ({where}) has none; give JSONL with `include` in GenEval's "
                "schema, or sentences such as 'a photo of a red circle', or another reward."
            )
        strange = [c["class"] for c in line["include"] if c["class"] not in blocks.SHAPES]
        strange += [c["color"] for c in line["include"] if (c.get("color") or "red") not in blocks.COLORS]
        if strange:
            raise UserError(
                f"reward {name!r} reads blocks and knows no {strange[0]!r} ({where}); "
                f"use {', '.join(blocks.SHAPES)} in {', '.join(blocks.COLORS)}."
            )
