"""What a run left behind, read from its folder. Every part may be missing; a part that is there must be readable."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trimtab.errors import UserError
from trimtab.metrics import Interval
from trimtab.report.words import counted, number

FIRST_LABELS = ("base", "base-guided", "trained")  # others follow by name
HEADLINE = "strict"
SETTINGS = ("num_inference_steps", "guidance_scale", "resolution")  # numbers, None where the model's own

Key = tuple[int, int, int, str]  # prompt index, sibling, seed, prompt: equal keys started from the same noise


@dataclass(frozen=True)
class Case:
    """One evaluated image."""

    key: Key
    tag: str
    scores: dict[str, float]  # NaN = could not be scored
    reason: str
    file: Path

    @property
    def prompt(self) -> str:
        return self.key[3]


@dataclass(frozen=True)
class Evaluation:
    label: str
    results: dict[str, Any]  # results.json as it stands
    cases: dict[Key, Case]

    @property
    def setting(self) -> str:
        """How its pictures were made: '30 steps, w = 3', or '1 call, w = 1' of a student; '' where that is not told."""
        told = self.results
        calls, scale, side = (to_float(told.get(name)) for name in SETTINGS)
        parts = [
            (math.isfinite(calls), counted(calls, "call" if told.get("few_step") else "step")),
            (math.isfinite(scale), f"w = {number(scale)}"),
            (math.isfinite(side), f"{side:.0f} px"),
            (told.get("precision", "no") != "no", f"{told.get('precision')}"),
        ]
        return ", ".join(text for known, text in parts if known)

    def overall(self, score: str) -> Interval:
        return to_interval(self.results["scores"].get(score, {}).get("overall"))

    def tags(self, score: str) -> dict[str, Interval]:
        return {tag: to_interval(value) for tag, value in self.results["scores"].get(score, {}).get("tags", {}).items()}


@dataclass(frozen=True)
class RunFolder:
    name: str
    config: dict[str, Any]
    config_text: str
    metrics: dict[str, np.ndarray]  # each (steps,) float64, NaN where a step has no value; "step" rises
    evaluations: dict[str, Evaluation]  # in order of display
    samples: dict[int, Path]  # step -> grid of the fixed prompts

    @property
    def subject(self) -> Evaluation | None:
        """The model that the report is about: 'trained', else the last one."""
        return self.evaluations.get("trained") or next(reversed(self.evaluations.values()), None)

    @property
    def reference(self) -> Evaluation | None:
        """What it is compared with: 'base', else the first; None when nothing but the subject was evaluated."""
        reference = self.evaluations.get("base") or next(iter(self.evaluations.values()), None)
        return None if reference is self.subject else reference

    @property
    def scores(self) -> list[str]:
        """Names of the scores, the headline first."""
        names = dict.fromkeys(name for each in self.evaluations.values() for name in each.results["scores"])
        return sorted(names, key=lambda name: name != HEADLINE)

    @property
    def headline(self) -> str:
        """The score that the verdict is about; '' where nothing was scored."""
        return next(iter(self.scores), "")

    def names(self, family: str) -> list[str]:
        """The names in keys such as rewards/<name>/mean, for the family 'rewards'."""
        before, after = f"{family}/", "/mean"
        keys = [key for key in self.metrics if key.startswith(before) and key.endswith(after)]
        return [key.removeprefix(before).removesuffix(after) for key in keys]  # a name may itself be a path


def read_run(path: Path) -> RunFolder:
    """Raises UserError when the folder is missing, holds nothing to report, or holds a file that can't be read."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give the folder of a run, such as runs/my-run.")
    config_text = _text(path / "config.yaml")
    run = RunFolder(
        name=path.resolve().name,
        config=_config(path / "config.yaml", config_text),
        config_text=config_text,
        metrics=_metrics(path / "metrics.jsonl"),
        evaluations=_evaluations(path / "evaluation"),
        samples=_samples(path / "samples"),
    )
    if not (run.config_text or run.metrics or run.evaluations or run.samples):
        raise UserError(
            f"{path} holds nothing to report: expected config.yaml, metrics.jsonl, samples/ or evaluation/<label>/"
            " as `trimtab train` and `trimtab evaluate` write them; check the path."
        )
    return run


def to_interval(value: dict[str, float | None] | None) -> Interval:
    return Interval(*(to_float((value or {}).get(name)) for name in Interval._fields))


def to_float(value: Any) -> float:
    """JSON has no NaN, so that null stands for it; anything that is not a number is NaN too."""
    return float(value) if isinstance(value, int | float) else math.nan


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); restore it from the run or remove it.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions or remove it.") from error


def _config(path: Path, text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML ({error}); restore it from the run or remove it.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, expected keys and values; restore it or remove it.")
    return config


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, object) of a JSONL file. A last line without its line break is still being written: not yet."""
    for row, line in enumerate(_text(path).split("\n")[:-1], start=1):
        where = f"{path}, line {row},"
        yield where, _json(line, where)


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error}); repair or remove it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a {type(value).__name__}, expected a JSON object; repair or remove it.")
    return value


def _metrics(path: Path) -> dict[str, np.ndarray]:
    """One array per key. Where a step has several lines (a resume, an evaluation), what the later ones say counts."""
    by_step = defaultdict(dict)
    for where, row in _rows(path):
        if not isinstance(row.get("step"), int):
            raise UserError(f"{where} has no whole number as 'step'; repair or remove it.")
        by_step[row["step"]] |= row
    rows = [by_step[step] for step in sorted(by_step)]
    keys = dict.fromkeys(key for row in rows for key in row)
    table = {key: np.array([to_float(row.get(key)) for row in rows]) for key in keys}
    return {key: values for key, values in table.items() if np.isfinite(values).any()}


def _samples(folder: Path) -> dict[int, Path]:
    steps = {file.stem.removeprefix("step-"): file for file in folder.glob("step-*.png")}
    return {int(step): steps[step] for step in sorted(filter(str.isdecimal, steps), key=int)}


def _evaluations(folder: Path) -> dict[str, Evaluation]:
    rank = {label: i for i, label in enumerate(FIRST_LABELS)}
    labels = [file.parent.name for file in folder.glob("*/results.json")]
    labels.sort(key=lambda label: (rank.get(label, len(rank)), label))
    return {label: _evaluation(folder / label) for label in labels}


def _evaluation(folder: Path) -> Evaluation:
    results = _json(_text(folder / "results.json"), str(folder / "results.json"))
    if not isinstance(results.get("scores"), dict):  # an empty one is fine: nothing could be scored
        raise UserError(f"{folder / 'results.json'} has no 'scores'; run `trimtab evaluate` again to write it.")
    cases = [_case(row, folder, results["scores"], where) for where, row in _rows(folder / "images.jsonl")]
    return Evaluation(folder.name, results, {case.key: case for case in cases})


def _case(row: dict[str, Any], folder: Path, scores: dict[str, Any], where: str) -> Case:
    try:
        return Case(
            key=(int(row["prompt_index"]), int(row["sibling"]), int(row["seed"]), str(row["prompt"])),
            tag=str(row["tag"]),
            scores={name: to_float(row.get(name)) for name in scores},
            reason=str(row.get("reason") or ""),
            file=folder / row["file"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} does not describe an image ({error!r}); run `trimtab evaluate` again.") from error
