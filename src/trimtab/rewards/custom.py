"""A user's own reward, named `package.module:function` or `path/to/file.py:function`.

The function, or an object with `__call__`, sync or async, has one of two signatures; its parameters' names decide:

    fn(images, prompts, metadata) -> scores, or (scores, info)      as in Flow-GRPO; told by the name `metadata`
        images (B, 3, H, W) float32 in [0, 1], prompts a list, metadata a list of dicts; a dict `info` is dropped
    fn(prompts, images, **columns) -> scores                        as in TRL; told by the name `images` without it
        images a list of PIL images; each key of the metadata is a column: a list of B, None where a line lacks it.
        A function without `**columns` gets just the columns that it names; one without a default must be in a prompt.

Scores are B numbers (list, array or tensor). None or NaN says: this reward does not apply to that image.
"""

import asyncio
import importlib
import importlib.util
import inspect
import itertools
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trimtab.batch import Prompts
from trimtab.errors import UserError
from trimtab.rewards.composite import is_smooth

if TYPE_CHECKING:
    from trimtab.rewards import Reward

logger = logging.getLogger(__name__)

_SIGNATURES = "fn(images, prompts, metadata) or fn(prompts, images, **columns)"


def load(reference: str) -> "Reward":
    """Imports the function and checks its signature; UserError if either fails.

    The path of a file is relative to the working directory, and its folder can be imported from.
    """
    source, _, name = reference.rpartition(":")
    is_file = source.endswith(".py")
    if not name.isidentifier() or not (is_file or all(part.isidentifier() for part in source.split("."))):
        raise UserError(f"reward {reference!r}: expected 'package.module:function' or 'path/to/file.py:function'.")
    function = getattr(_module(source, is_file, reference), name, None)
    if not callable(function) or inspect.isclass(function):
        found = "is missing" if function is None else f"is {function!r}"
        raise UserError(f"reward {reference!r}: {name!r} {found} in {source}; name a function, or an object to call.")
    return _adapter(function, reference)


@dataclass(frozen=True)
class BatchFunction:
    """Adapts `fn(images, prompts, metadata)`."""

    function: Callable[..., Any]
    reference: str

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        images = images.clone()  # which a function may change in place: others look at the same pictures
        result = _waited(self.function(images=images, prompts=prompts, metadata=metadata))
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
            result = result[0]
        return _scores(result, images, self.reference)


@dataclass(frozen=True)
class SmoothFunction(BatchFunction):
    """The same for an object whose `with_gradient`, of that signature, gives a tensor that pictures can learn from."""

    def with_gradient(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        scores = self.function.with_gradient(images=images.clone(), prompts=prompts, metadata=metadata)
        fits = isinstance(scores, Tensor) and scores.shape == images.shape[:1]
        if fits and scores.isnan().all():  # applies to none of the prompts: its gradient is 0, with or without a graph
            return scores.detach().to(images.device, torch.float32) + 0 * images.sum((1, 2, 3))
        if not fits or not scores.requires_grad:
            found = f"{tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(
                f"reward {self.reference!r} returned {found} from with_gradient; return a tensor ({len(images)},) that "
                "depends on the pictures."
            )
        return scores.to(images.device, torch.float32)


@dataclass(frozen=True)
class ColumnsFunction:
    """Adapts `fn(prompts, images, **columns)`; `accepted` None stands for any column."""

    function: Callable[..., Any]
    reference: str
    accepted: frozenset[str] | None
    required: frozenset[str]

    def check(self, prompts: Prompts) -> None:
        """UserError for a column that no prompt has; a warning for one that some lack, for which it is None."""
        for name in sorted(self.required - {"prompts", "images"}):
            lacking = [i for i, line in enumerate(prompts.metadata) if name not in line]
            if not lacking:
                continue
            first, text = prompts.metadata[lacking[0]], prompts.text[lacking[0]]
            where = f"{text!r} ({prompts.place(lacking[0])})"
            if len(lacking) == len(prompts):
                has = ", ".join(sorted(first)) or "nothing"
                raise UserError(
                    f"reward {self.reference!r} needs {name}, which no prompt has; {where} has {has}: give JSONL with "
                    "that key, or the parameter a default."
                )
            number = f"{len(lacking)} of {len(prompts)} prompts lack"
            logger.warning("reward %r needs %s, which %s; the first is %s", self.reference, name, number, where)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        names = dict.fromkeys(itertools.chain(*metadata, self.required))
        columns = {name: [line.get(name) for line in metadata] for name in names}
        columns |= {"prompts": prompts, "images": to_pil(images)}
        if self.accepted is not None:
            columns = {name: column for name, column in columns.items() if name in self.accepted}
        return _scores(_waited(self.function(**columns)), images, self.reference)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] as B RGB images of 8 bits, rounded to the nearest level."""
    levels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(pixels) for pixels in levels.permute(0, 2, 3, 1).cpu().numpy()]


def _module(source: str, is_file: bool, reference: str) -> ModuleType:
    path = Path(source).resolve()
    if is_file and not path.is_file():
        raise UserError(f"reward {reference!r}: there is no file {path}; give a path relative to {Path.cwd()}.")
    try:
        return _executed(path, _version(path)) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:  # the user's own code: anything may go wrong in it
        raise UserError(
            f"reward {reference!r}: importing {source} failed ({type(error).__name__}: {error})."
        ) from error


def _version(path: Path) -> tuple[int, int]:
    return path.stat().st_mtime_ns, path.stat().st_size


@cache
def _executed(path: Path, version: tuple[int, int]) -> ModuleType:
    """Runs the file as a module, once for all its functions: they share what it loads. Its neighbours can be imported,
    but never hide an installed package."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"trimtab_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up by name
    spec.loader.exec_module(module)
    return module


def _adapter(function: Callable[..., Any], reference: str) -> "Reward":
    try:
        signature = inspect.signature(function)
    except ValueError as error:  # some functions written in C have none
        raise UserError(f"reward {reference!r} has no readable signature; wrap it in {_SIGNATURES}.") from error
    kinds = inspect.Parameter
    parameters = signature.parameters.values()
    named = {p.name for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    anything = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    if named >= {"images", "prompts", "metadata"} >= required:
        smooth = is_smooth(function)
        return SmoothFunction(function, reference) if smooth else BatchFunction(function, reference)
    if "metadata" in named or required - named or not ("images" in named or anything):
        raise UserError(f"reward {reference!r} has the signature {signature}; expected {_SIGNATURES}, by these names.")
    return ColumnsFunction(function, reference, None if anything else frozenset(named), frozenset(required))


def _waited(result: Any) -> Any:
    """The result of an async function, in an event loop of its own for each call."""

    async def wait(pending: Awaitable) -> Any:
        return await pending

    return asyncio.run(wait(result)) if inspect.isawaitable(result) else result


def _scores(scores: Any, images: Tensor, reference: str) -> Tensor:
    """Any B numbers or Nones as float32 (B,) on the images' device."""
    if isinstance(scores, Tensor | np.ndarray):
        scores = scores.tolist()
    if not isinstance(scores, Sequence) or len(scores) != len(images):
        found = f"{len(scores)} scores" if isinstance(scores, Sequence) else f"a {type(scores).__name__}"
        raise UserError(f"reward {reference!r} returned {found} for {len(images)} images; return one score per image.")
    try:
        values = [float("nan") if score is None else float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"reward {reference!r} returned scores that are no numbers ({error}); return floats."
        ) from error
    return torch.tensor(values, dtype=torch.float32, device=images.device)
