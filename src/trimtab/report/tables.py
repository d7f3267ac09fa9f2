"""The tables of the page, as rows of ready-made cells."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.metrics import Interval
from trimtab.report.folder import Evaluation, RunFolder, to_float
from trimtab.report.verdict import UNKNOWN, Change, change
from trimtab.report.words import ABSENT, bounds, counted, duration, listed, number, percent, score, signed

FLAG_ABOVE = 0.25  # a statistic that moves by more than this share of its starting value is marked
SMALLEST = {  # change that is marked, whatever share of its start it is: these may start near zero
    "brightness": 0.01,  # of the range from black to white
    "dark_share": 0.01,  # of the pixels, 41 of 64 x 64: a quarter of the smallest circle
    "saturation": 0.01,  # of the range from grey to pure
    "edge_density": 0.01,  # of the pixels
    "color_entropy": 0.1,  # bits; a hundredth of the pixels in another colour adds 0.08 to a flat picture
}


@dataclass(frozen=True)
class Cell:
    value: str
    detail: str = ""  # in small print: of a score its interval, of a column how its pictures were made
    tone: str = ""  # 'better', 'worse', 'flag' or nothing


@dataclass(frozen=True)
class Row:
    name: str
    cells: list[Cell]
    strong: bool = False


def columns(run: RunFolder) -> list[Cell]:
    """The heads over scores and drift: each model, with how its pictures were made, then the change."""
    heads = [Cell(label, each.setting) for label, each in run.evaluations.items()]
    return [*heads, Cell("change")] if run.reference else heads


def score_rows(run: RunFolder) -> list[Row]:
    """Headline score per tag, then overall, then every other score overall; in `columns`. Empty without scores."""
    if not run.headline:
        return []
    tags = dict.fromkeys(tag for each in run.evaluations.values() for tag in each.tags(run.headline))
    rows = [Row(tag.replace("_", " "), _score_cells(run, run.headline, tag)) for tag in tags]
    rows.append(Row("overall", _score_cells(run, run.headline), strong=True))
    return rows + [Row(f"{name}, overall", _score_cells(run, name)) for name in run.scores[1:]]


def _score_cells(run: RunFolder, name: str, tag: str | None = None) -> list[Cell]:
    values = [each.tags(name).get(tag, UNKNOWN) if tag else each.overall(name) for each in run.evaluations.values()]
    cells = [_interval_cell(value) for value in values]
    if run.reference and run.subject:
        cells.append(_change_cell(change(run.reference, run.subject, name, tag)))
    return cells


def _interval_cell(value: Interval) -> Cell:
    return Cell(score(value.mean), bounds(value))


def _change_cell(moved: Change) -> Cell:
    tone = "" if moved.direction == "unclear" else moved.direction
    if moved.difference is None:
        return Cell(signed(moved.after.mean - moved.before.mean), tone=tone)
    return Cell(signed(moved.difference.mean), bounds(moved.difference), tone)


DRIFT = {  # key in results.json -> row title
    "brightness": "brightness",
    "dark_share": "dark pixels",
    "saturation": "saturation",
    "edge_density": "edge pixels",
    "color_entropy": "colour entropy (bits)",
    "diversity": "diversity among siblings, as features",
    "drift": "distance from the starting model",
    "frechet_distance": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
}
QUALITY = ("frechet_distance", "precision", "recall")  # these say what is good, so a large change is no alarm


def drift_rows(run: RunFolder) -> list[Row]:
    """What no reward measures, in `columns`; the change is from reference to subject."""
    drift = {label: _drift(each) for label, each in run.evaluations.items()}
    found = {name for values in drift.values() for name in values}
    rows = []
    for name in [*(name for name in DRIFT if name in found), *sorted(found - DRIFT.keys())]:
        cells = [Cell(number(values.get(name, math.nan))) for values in drift.values()]
        if run.reference and run.subject:
            before, after = (drift[each.label].get(name, math.nan) for each in (run.reference, run.subject))
            cells.append(_drift_cell(before, after, name))
        rows.append(Row(DRIFT.get(name, name.replace("_", " ")), cells))
    return rows


def _drift(evaluation: Evaluation) -> dict[str, float]:
    results = evaluation.results
    plain = {name: results.get(name) for name in ("diversity", "drift", "frechet_distance")}
    numbers = {**(results.get("image_statistics") or {}), **plain, **(results.get("precision_recall") or {})}
    return {name: value for name, raw in numbers.items() if math.isfinite(value := _mean(raw))}


def _mean(value: Any) -> float:
    """A number, or the mean of {"mean", "low", "high"}."""
    return to_float(value["mean"] if isinstance(value, dict) else value)


def _drift_cell(before: float, after: float, name: str) -> Cell:
    """In percent of the start, or as a difference where the start is too near to zero for that to mean anything."""
    moved, smallest = after - before, SMALLEST.get(name, 0.0)
    far = abs(moved) > FLAG_ABOVE * abs(before) and abs(moved) >= smallest
    text = signed(moved) if abs(before) <= smallest else percent(moved / abs(before))
    return Cell(text, tone="flag" if far and name not in QUALITY else "")


RUN_COLUMNS = [Cell(name) for name in ("score", "last reward", "images", "time")]


def run_rows(runs: Sequence[RunFolder]) -> list[Row]:
    """One row per compared run: its model's headline score, last reward, images and time."""
    return [Row(run.name, _run_cells(run), strong=run is runs[0]) for run in runs]


def _run_cells(run: RunFolder) -> list[Cell]:
    judged = _interval_cell(run.subject.overall(run.headline)) if run.subject else Cell(ABSENT)
    seconds, images = last(run, "elapsed_seconds"), last(run, "images")
    return [
        judged,
        Cell(score(last(run, "reward"))),
        Cell(f"{images:,.0f}" if math.isfinite(images) else ABSENT),
        Cell(duration(seconds) if math.isfinite(seconds) else ABSENT),
    ]


def last(run: RunFolder, key: str) -> float:
    """Last value that is a number; NaN without one."""
    values = [value for value in run.metrics.get(key, []) if math.isfinite(value)]
    return float(values[-1]) if values else math.nan


def facts(run: RunFolder) -> list[str]:
    """The line below the title: how large the run was."""
    steps, images, seconds = (last(run, key) for key in ("step", "images", "elapsed_seconds"))
    speed = images / seconds if seconds else math.nan  # of the whole run, pictures and checkpoints included
    parts = [
        (steps, counted(steps, "step")),
        (images, counted(images, "training image")),
        (seconds, duration(seconds)),
        (speed, f"{speed:.3g} images/s"),
    ]
    return [text for value, text in parts if math.isfinite(value)]


def warnings(run: RunFolder) -> list[str]:
    """Sentences on what went wrong quietly: rewards that failed, pictures whose look moved far."""
    failed = {key.removeprefix("failed/"): values for key, values in run.metrics.items() if key.startswith("failed/")}
    totals = {name: sum(value for value in values if math.isfinite(value)) for name, values in failed.items()}
    sentences = [f"Images that {name} could not score in training: {n:,.0f}." for name, n in totals.items() if n]
    moved = [f"{row.name} {row.cells[-1].value}" for row in drift_rows(run) if row.cells[-1].tone == "flag"]
    if moved:
        sentences.append(f"The look changed by more than {FLAG_ABOVE:.0%} of its start: {listed(moved)}.")
    return sentences


def versions(run: RunFolder) -> dict[str, str]:
    """Of the run, then of the evaluation where it names others: {'torch': '2.13.0', ...}."""
    of_run = run.config.get("versions") or {}
    of_evaluation = (run.subject.results.get("versions") or {}) if run.subject else {}
    rows = {str(name): str(value) for name, value in of_run.items()}
    for name, value in of_evaluation.items():
        if rows.setdefault(str(name), str(value)) != str(value):
            rows[f"{name} (evaluation)"] = str(value)
    return rows
