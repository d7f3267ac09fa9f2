"""Evaluation: a model, a suite of prompts and fixed seeds -> pictures, `images.jsonl` and `results.json`.

Picture s of prompt p starts from `torch.Generator().manual_seed(seed + p * images_per_prompt + s)`, so any one of them
can be made again by `trimtab sample` or by stock diffusers. Nothing that differs between two equal calls is written.
"""

import io
import json
import logging
import math
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trimtab import noise
from trimtab.batch import Condition, Prompts
from trimtab.distributed import ALONE, Processes
from trimtab.files import atomic_write
from trimtab.matching import denoising_error
from trimtab.metrics.coverage import precision_recall
from trimtab.metrics.diversity import within_prompt_diversity
from trimtab.metrics.frechet import frechet_distance
from trimtab.metrics.image_stats import image_statistics
from trimtab.metrics.intervals import Interval, bootstrap, bootstrap_over_tags
from trimtab.pipelines import Pipeline
from trimtab.prediction import Prediction
from trimtab.rewards import Reward
from trimtab.rewards.detectors import read_blocks
from trimtab.rewards.geneval import judge
from trimtab.rewards.recognizer import RecognizerScore
from trimtab.rewards.recognizer import load as load_recognizer
from trimtab.solvers import few_step
from trimtab.worlds import blocks

logger = logging.getLogger(__name__)

DEFAULT_STEPS = 40  # of a model that is no few-step student
MIN_IMAGES = 3  # precision and recall look at the third neighbour
DRIFT_TIMES = 4  # evenly over (0, 1)
AT_ONCE_PX = 2**22  # in one forward: 4 pictures of 1024 pixels a side
REAL_PER_PROMPT = 16  # drawn scenes of each prompt, the other side of the Frechet distance
PACKAGES = ("trimtab", "torch", "diffusers", "transformers", "peft", "numpy")
OWN_SCORES = ("strict", "official", "recognizer")  # which need no reward, where the suite is one of blocks
LAYOUT = ("images/[0-9]*/samples/[0-9]*.png", "images/[0-9]*/metadata.jsonl")  # GenEval's


@dataclass(frozen=True)
class Setting:
    """How the pictures of an evaluation are made."""

    suite: str
    images_per_prompt: int = 4
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = 1.0
    seed: int = 0
    resolution: int | None = None
    precision: str = "no"
    few_step: bool = False  # sampled as a student is, by predicting x0 and noising it afresh
    batch_size: int | None = None  # pictures in one forward; None: as many as AT_ONCE_PX allows

    def described(self) -> dict[str, Any]:
        """What results.json says of it: all that shapes a picture."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}

    def parts(self, number: int, side: int) -> tuple[Tensor, ...]:
        """Indices of `number` pictures of `side` pixels, those of one forward together."""
        return torch.arange(number).split(self.batch_size or max(1, min(64, AT_ONCE_PX // side**2)))


def evaluate(
    pipeline: Pipeline,
    role: str,
    prompts: Prompts,
    setting: Setting,
    folder: Path,
    *,
    rewards: Mapping[str, Reward] | None = None,
    described: Mapping[str, Any] | None = None,
    reference: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """The results, also written to `folder`, the pictures before they are scored. `rewards` are scored beside what the
    suite itself knows to measure; `described` (model, adapter, ...) is copied into the results; with a `reference` role
    they also tell the drift. All processes draw; the first one scores and writes, and the others get nothing."""
    group = torch.arange(len(prompts)).repeat_interleave(setting.images_per_prompt)  # (B,)
    seeds = [setting.seed + i for i in range(len(group))]
    images, latents = generate(pipeline, role, prompts, group, seeds, setting, progress, processes)
    moved = {}
    if reference is not None:
        moved = {"drift": drift(pipeline, role, reference, latents, prompts, group, setting, processes)}
    if processes.rank:
        return {}
    places = [(int(g), i % setting.images_per_prompt) for i, g in enumerate(group)]
    files = [f"images/{g:05d}/samples/{sibling:04d}.png" for g, sibling in places]
    with ThreadPoolExecutor() as pool:  # half a second for a picture of 1024 pixels, of which Python sees little
        pngs = list(pool.map(png, images))
    _place(folder, dict(zip(files, pngs, strict=True)) | _facts(prompts))
    text, metadata = prompts.of(group)
    columns, reasons = _scores(images, text, metadata, rewards or {})
    tags = [line.get("tag", "all") for line in metadata]
    results = {
        **(described or {}),
        **setting.described(),
        "num_images": len(images),
        "scores": {name: _summary(values, group, tags) for name, values in columns.items()},
        **_look(images, group, prompts),
        **moved,
        "versions": versions(),
    }
    rows = [
        {
            "prompt": text[i],
            "tag": tags[i],
            "prompt_index": places[i][0],
            "sibling": places[i][1],
            "seed": seeds[i],
            **{name: _number(values[i]) for name, values in columns.items()},
            "reason": reasons[i],
            "file": files[i],
        }
        for i in range(len(images))
    ]
    atomic_write(folder / "images.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    atomic_write(folder / "results.json", json.dumps(results, indent=1) + "\n")  # last: it says that all is there
    return results


@torch.no_grad()
def generate(
    pipeline: Pipeline,
    role: str,
    prompts: Prompts,
    group: Tensor,
    seeds: list[int],
    setting: Setting,
    progress: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = ALONE,
) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) on the CPU and their latents, one for each entry of `group` (B,), its prompt, and seed. Of
    several processes each draws some, and the first alone is given pictures."""
    side = setting.resolution or pipeline.resolution
    shape = pipeline.latent_shape(side)
    num_calls = setting.num_inference_steps
    grid = pipeline.few_step_grid if setting.few_step else pipeline.time_grid
    times = grid(num_calls, setting.resolution)
    images = torch.empty(0 if processes.rank else len(group), 3, side, side)
    latents = torch.empty(len(group), *shape, device=pipeline.device)
    parts = setting.parts(len(group), side)
    last = len(parts) - 1  # which is drawn again by those who have none left
    for first in range(0, len(parts), processes.number):
        shares = [parts[min(first + rank, last)] for rank in range(processes.number)]
        part = shares[processes.rank]
        number = num_calls if setting.few_step or pipeline.adds_noise else 1
        noises = _noises([seeds[i] for i in part], shape, number).to(pipeline.device)
        own = pipeline.encode([prompts.text[g] for g in group[part]])
        made = sample(pipeline, noises, times, own, role, setting.guidance_scale, setting.few_step)
        _place_shares(latents, made, shares, len(parts[0]), processes)
        _place_shares(images, pipeline.decode(made), shares, len(parts[0]), processes)
        progress(int(shares[-1][-1]) + 1, len(group))
    return images, latents


def _place_shares(whole: Tensor, own: Tensor, shares: list[Tensor], size: int, processes: Processes) -> None:
    """What each process has made, `size` or fewer samples, where it belongs; nothing where the whole has no place."""
    padded = torch.cat([own, own.new_zeros(size - len(own), *own.shape[1:])])  # processes gather equal shapes
    for share, found in zip(shares, processes.everybody(padded).split(size), strict=True):
        if len(whole):
            whole[share.to(whole.device)] = found[: len(share)].to(whole.device)


def sample(
    pipeline: Pipeline,
    noises: Tensor,
    times: Tensor,
    condition: Condition,
    role: str,
    guidance_scale: float = 1.0,
    as_student: bool = False,
) -> Tensor:
    """Clean latents (B, C, h, w) as stock diffusers makes them, one condition a sample.

    `noises` (T, B, C, h, w) are one for each call at times (T + 1,) of a student, and of a model whose scheduler adds
    noise; else there is one, where the solver starts.
    """

    def predict(x_t: Tensor, t: Tensor) -> Prediction:
        return pipeline.predict(x_t, t, condition, role, guidance_scale)

    times = times.to(noises.device)
    between = torch.cat([pipeline.between_calls(noises[1:]), torch.zeros_like(noises[:1])])  # after the last call: none
    if as_student:
        return few_step(predict, noises[0], times, between)[-1]
    return pipeline.solve(predict, noises[0], times, between)


def _noises(seeds: list[int], shape: tuple[int, ...], number: int) -> Tensor:
    """(number, B, C, h, w), drawn one after the other from each picture's own generator, as diffusers draws them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.stack([torch.randn(shape, generator=g) for g in generators]) for _ in range(number)])


@torch.no_grad()
def drift(
    pipeline: Pipeline,
    role: str,
    reference: str,
    latents: Tensor,
    prompts: Prompts,
    group: Tensor,
    setting: Setting,
    processes: Processes = ALONE,
) -> float:
    """Mean square difference of two roles' fields, unguided where they can be, on the first one's own samples, over
    times and dimensions.

    With the weight (1 - t) / t in place of 1, and a sum over dimensions, it would be KL (docs/notation.md).
    """
    total, scale = 0.0, pipeline.training_scale(setting.guidance_scale)
    for part in setting.parts(len(group), setting.resolution or pipeline.resolution)[processes.mine]:
        x0, own = latents[part.to(latents.device)], pipeline.encode([prompts.text[g] for g in group[part]])
        for number in range(DRIFT_TIMES):
            t = torch.tensor((number + 0.5) / DRIFT_TIMES)
            eps = noise.normal([(setting.seed, int(i), number, noise.TRAINING) for i in part], x0.shape[1:])
            x_t = pipeline.process.noised(x0, eps.to(x0), t.to(x0))
            fields = [pipeline.predict(x_t, t, own, name, scale).flow for name in (role, reference)]
            total += denoising_error(*fields).sum().item() / DRIFT_TIMES
    return processes.everybody(torch.tensor([total], dtype=torch.float64)).sum().item() / len(group)


def table(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of text, the first a header: one column an evaluation, the strict and the overall scores, then the look."""
    rows = [["", *results]]
    first = next(iter(results.values()))
    for score in first["scores"]:
        tags = first["scores"][score]["tags"] if score == "strict" else {}
        for tag in (*tags, "overall"):
            shown = tag.replace("_", " ") if tag in blocks.TAGS else tag
            rows.append([f"{score}, {shown}", *(_cell(r["scores"].get(score), tag) for r in results.values())])
    for name in ("frechet_distance", "diversity", "drift"):
        if any(r.get(name) is not None for r in results.values()):
            cells = ["" if r.get(name) is None else f"{r[name]:.3f}" for r in results.values()]
            rows.append([name.replace("_", " "), *cells])
    return rows


def headline(results: Mapping[str, Any]) -> dict[str, float]:
    """The overall score of every reward, and the look: one number each."""
    scores = {name: score["overall"]["mean"] for name, score in results["scores"].items()}
    look = {name: results.get(name) for name in ("frechet_distance", "diversity", "drift")}
    return {name: value for name, value in (scores | look).items() if value is not None}


def versions() -> dict[str, str]:
    """Of Python and of the packages on which pictures and numbers depend."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def _cell(score: Mapping[str, Any] | None, tag: str) -> str:
    interval = None if score is None else score["overall"] if tag == "overall" else score["tags"].get(tag)
    if interval is None or interval["mean"] is None:
        return ""
    bounds = "" if interval["low"] is None else f" [{interval['low']:.2f}, {interval['high']:.2f}]"
    return f"{interval['mean']:.3f}{bounds}"


def _scores(
    images: Tensor, text: list[str], metadata: list[dict], rewards: Mapping[str, Reward]
) -> tuple[dict[str, Tensor], list[str]]:
    """Each score of each picture (B,), and why the strict rules refuse it ("" where they do not, or do not apply)."""
    columns, reasons = {}, [""] * len(images)
    if _is_blocks(images, metadata):
        found = read_blocks(images)
        verdicts = {
            mode: [judge(f, line, mode) for f, line in zip(found, metadata, strict=True)]
            for mode in ("strict", "official")
        }
        columns = {mode: torch.tensor([float(v.correct) for v in each]) for mode, each in verdicts.items()}
        columns["recognizer"] = RecognizerScore()(images, text, metadata)
        reasons = ["" if v.correct else v.reason for v in verdicts["strict"]]
    columns |= {name: reward(images, text, metadata) for name, reward in rewards.items()}
    return columns, reasons


def _is_blocks(images: Tensor, metadata: list[dict]) -> bool:
    """Whether the exact reader can judge: pictures of its size, and facts about its shapes only."""
    asked = [clause for line in metadata for clause in line.get("include") or [{}]]
    known = all(c.get("class") in blocks.SHAPES and (c.get("color") or "red") in blocks.COLORS for c in asked)
    return known and images.shape[-1] == blocks.SIZE_PX and all("tag" in line for line in metadata)


def _summary(values: Tensor, group: Tensor, tags: list[str]) -> dict[str, Any]:
    """Mean and interval for each tag, and overall: GenEval's unweighted mean of the tags."""
    known = values.isfinite()
    values, group, tags = values[known], group[known], [tag for tag, k in zip(tags, known.tolist(), strict=True) if k]
    names = list(dict.fromkeys(tags))
    number = torch.tensor([names.index(tag) for tag in tags], dtype=torch.int64)  # (B,)
    by_tag = {}
    for i, tag in enumerate(names):
        own = number == i
        by_tag[tag] = _interval(bootstrap(values[own], group[own], seed=0)) | {"num_images": int(own.sum())}
    overall = _interval(bootstrap_over_tags(values, group, number, seed=0))
    return {"overall": overall, "tags": by_tag, "num_missing": int((~known).sum())}


def _interval(interval: Interval) -> dict[str, float | None]:
    return {name: _number(value) for name, value in interval._asdict().items()}


def _look(images: Tensor, group: Tensor, prompts: Prompts) -> dict[str, Any]:
    """How the pictures look, apart from what they show: image statistics, and on blocks the distance to real scenes."""
    parts = [image_statistics(part) for part in images.split(64)]  # which take several times their pictures' memory
    statistics = {name: torch.cat([each[name] for each in parts]).mean().item() for name in parts[0]}
    look: dict[str, Any] = {"image_statistics": statistics}
    if not _is_blocks(images, [dict(line) for line in prompts.metadata]):
        return look
    features = _features(images)
    look["diversity"] = _number(within_prompt_diversity(features, group))
    if len(images) > MIN_IMAGES and all(blocks.can_draw(line) for line in prompts.metadata):
        real = _real_features(tuple(json.dumps(line["include"]) for line in prompts.metadata))
        look["frechet_distance"] = frechet_distance(real, features)
        look["precision_recall"] = precision_recall(real, features)._asdict()
    return look


@torch.no_grad()
def _features(images: Tensor) -> Tensor:
    """Recognizer features (B, 128)."""
    return torch.cat([load_recognizer().features(part) for part in images.split(256)])


@cache
def _real_features(includes: tuple[str, ...]) -> Tensor:
    """Features of drawn scenes, REAL_PER_PROMPT for each prompt's facts; the same at every call."""
    rng = np.random.default_rng(2028)
    lines = [{"include": json.loads(text)} for text in includes]
    scenes = [blocks.scene(line, rng) for line in lines for _ in range(REAL_PER_PROMPT)]
    return torch.cat([_features(blocks.draw(scenes[i : i + 256])) for i in range(0, len(scenes), 256)])


def _number(value: Tensor | float) -> float | None:
    """JSON has no NaN: what could not be told is null."""
    return float(value) if math.isfinite(value) else None


def _facts(prompts: Prompts) -> dict[str, bytes]:
    """A file of each prompt's metadata, as GenEval has it."""
    lines = [json.dumps(dict(line)) + "\n" for line in prompts.metadata]
    return {f"images/{index:05d}/metadata.jsonl": line.encode() for index, line in enumerate(lines)}


def _place(folder: Path, files: Mapping[str, bytes]) -> None:
    """Pictures and facts, and none but these. Where others stood, what was said of those goes first."""
    there = {path.relative_to(folder).as_posix() for pattern in LAYOUT for path in folder.glob(pattern)}
    if there == set(files) and all((folder / name).read_bytes() == data for name, data in files.items()):
        return
    for name in ("results.json", "images.jsonl", *sorted(there - set(files))):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.glob("images/[0-9]*/**/"), reverse=True):  # GenEval's own scripts enter every one
        if not any(path.iterdir()):
            path.rmdir()
    for name, data in files.items():
        atomic_write(folder / name, data, durable=False)


def png(image: Tensor) -> bytes:
    """A picture (3, H, W) in [0, 1] as a PNG file, rounded as diffusers rounds."""
    data = io.BytesIO()
    Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype("uint8")).save(data, "PNG")
    return data.getvalue()
