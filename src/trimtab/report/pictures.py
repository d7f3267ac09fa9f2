"""Which pictures are shown, by a rule that can't flatter, and how they get into the page."""

import base64
import io
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from trimtab.report.folder import Case, Evaluation, Key, RunFolder
from trimtab.report.words import counted

NUM_CASES = 12  # of all kinds of prompt together, but each kind gets at least two
FAILURES = ("got worse", "still wrong", "wrong")  # in order of choice
SUCCESSES = ("got better", "still right", "right")
UNSCORED = "not scored"  # every image, where nothing was scored
SHOT_PX, GRID_PX = 128, 320  # about the width on the page; smaller pictures are enlarged there, with sharp pixels


@dataclass(frozen=True)
class Picture:
    source: str  # a data: address; '' when the file is missing or damaged
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True)
class Shot:
    """One image of one model, with what the judge said."""

    label: str
    picture: Picture
    score: float
    reason: str


@dataclass(frozen=True)
class Comparison:
    """One prompt and seed under every model."""

    prompt: str
    tag: str
    outcome: str
    shots: list[Shot]


def comparisons(run: RunFolder) -> list[Comparison]:
    """The chosen prompts and seeds, each under every model that was evaluated on it; empty without images."""
    if run.subject is None:
        return []
    chosen = choose(outcomes(run), {key: case.tag for key, case in run.subject.cases.items()})
    return [_comparison(run, key, outcome) for key, outcome in chosen.items()]


def outcomes(run: RunFolder) -> dict[Key, str]:
    """What became of each image of the subject, in words, by its headline score and the reference's, if there is one.

    Images that either could not score are left out, and so are those that the reference did not draw.
    """
    alone = run.reference is None or not run.reference.cases
    if not run.headline:
        return {key: UNSCORED for key in run.subject.cases if alone or key in run.reference.cases}
    after = _headline_scores(run, run.subject)
    before = after if alone else _headline_scores(run, run.reference)
    return {key: _outcome(before[key], after[key], alone) for key in after if key in before}


def _headline_scores(run: RunFolder, evaluation: Evaluation) -> dict[Key, float]:
    scores = {key: case.scores.get(run.headline, math.nan) for key, case in evaluation.cases.items()}
    return {key: score for key, score in scores.items() if math.isfinite(score)}


def _outcome(before: float, after: float, alone: bool) -> str:
    if before != after:
        return "got better" if after > before else "got worse"
    name = "right" if after >= 0.5 else "wrong"
    return name if alone else f"still {name}"


def choose(outcome: dict[Key, str], tag: dict[Key, str]) -> dict[Key, str]:
    """As many failures as successes of each tag, those that changed first, then by sibling and prompt number.

    A tag without one of the two shows more of the other.
    """
    tags = list(dict.fromkeys(tag[key] for key in sorted(outcome)))
    each = max(1, NUM_CASES // 2 // max(1, len(tags)))
    chosen: list[Key] = []
    for one in tags:
        keys = [key for key in outcome if tag[key] == one]
        failures, successes = (_ranked(keys, outcome, kinds) for kinds in (FAILURES, (*SUCCESSES, UNSCORED)))
        num_failures = max(each, 2 * each - len(successes))
        num_successes = max(each, 2 * each - len(failures))
        chosen += failures[:num_failures] + successes[:num_successes]
    return {key: outcome[key] for key in chosen}


def _ranked(keys: list[Key], outcome: dict[Key, str], kinds: tuple[str, ...]) -> list[Key]:
    fitting = [key for key in keys if outcome[key] in kinds]
    return sorted(fitting, key=lambda key: (kinds.index(outcome[key]), key[1], key[0]))


def count(outcome: dict[Key, str]) -> str:
    """'Of 24 images 9 got better, 2 got worse, ...': how common each outcome is, whatever the choice shows."""
    counts = Counter(outcome.values())
    parts = [f"{counts[name]:,} {name}" for name in (*SUCCESSES, *FAILURES, UNSCORED) if counts[name]]
    return f"Of {counted(len(outcome), 'image')} " + ", ".join(parts) + "."


def _comparison(run: RunFolder, key: Key, outcome: str) -> Comparison:
    case = run.subject.cases[key]
    shown = [each for each in run.evaluations.values() if key in each.cases]
    return Comparison(case.prompt, case.tag, outcome, [_shot(each, each.cases[key], run.headline) for each in shown])


def _shot(evaluation: Evaluation, case: Case, score: str) -> Shot:
    return Shot(evaluation.label, embed(case.file, SHOT_PX), case.scores.get(score, math.nan), case.reason)


def strip(run: RunFolder) -> list[tuple[str, Picture]]:
    """First, middle and last grid of the fixed prompts, each with its step: [('step 100', picture), ...]."""
    steps = list(run.samples)
    chosen = dict.fromkeys([steps[0], steps[(len(steps) - 1) // 2], steps[-1]]) if steps else {}
    return [(f"step {step:,}", embed(run.samples[step], GRID_PX)) for step in chosen]


def embed(file: Path, shown_px: int) -> Picture:
    """The picture as PNG inside its own address, scaled down to twice the size that it is shown at."""
    try:
        with Image.open(file) as opened:
            pixelated, image = max(opened.size) <= shown_px, opened.convert("RGB")
    except (OSError, SyntaxError):  # missing, no picture, or cut off; Pillow raises SyntaxError for a broken chunk
        return Picture("", 1, 1, pixelated=False)
    image.thumbnail((2 * shown_px, 2 * shown_px), Image.Resampling.LANCZOS)
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    return Picture("data:image/png;base64," + base64.b64encode(png.getvalue()).decode(), *image.size, pixelated)
