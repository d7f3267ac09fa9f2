"""A finished model at work: `trimtab evaluate` and `trimtab sample`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import evaluate
from trimtab.batch import Prompts
from trimtab.errors import UserError
from trimtab.files import atomic_write, check_folder
from trimtab.pipelines import Pipeline, loading
from trimtab.rewards import build as build_rewards
from trimtab.wiring import TRAINED, Display
from trimtab.worlds.files import load_prompts

logger = logging.getLogger(__name__)


def evaluate_model(
    model: str,
    adapters: Sequence[str],
    suite: str,
    folder: Path,
    display: Display,
    *,
    rewards: Sequence[str] = (),
    num_inference_steps: int | None = None,
    precision: str = "no",
    resolution: int | None = None,
    **how: Any,
) -> dict[str, Any]:
    """`trimtab evaluate`: the results, also in `folder`."""
    check_folder(folder)
    prompts = load_prompts(suite, "test")
    extra = build_rewards(dict.fromkeys(rewards, 1.0), prompts).alone() if rewards else {}
    pipeline, role = _opened(model, adapters, precision, resolution)
    return evaluate.evaluate(
        pipeline,
        role,
        prompts,
        _setting(pipeline, num_inference_steps, suite=suite, precision=precision, resolution=resolution, **how),
        folder,
        rewards=extra,
        described={"model": model, "adapters": list(adapters)},
        progress=lambda done, total: display.progress("evaluating", done, total),
    )


def sample(
    model: str,
    adapters: Sequence[str],
    texts: Sequence[str],
    folder: Path,
    display: Display,
    *,
    num_inference_steps: int | None = None,
    precision: str = "no",
    resolution: int | None = None,
    **how: Any,
) -> list[Path]:
    """`trimtab sample`: the files written, one a picture, named by prompt and seed."""
    check_folder(folder)
    pipeline, role = _opened(model, adapters, precision, resolution)
    setting = _setting(pipeline, num_inference_steps, suite="", precision=precision, resolution=resolution, **how)
    number = setting.images_per_prompt
    prompts = Prompts(tuple(texts), tuple({} for _ in texts), tuple(range(len(texts))))
    group = torch.arange(len(texts)).repeat_interleave(number)
    seeds = [setting.seed + i for _ in texts for i in range(number)]
    images, _ = evaluate.generate(
        pipeline, role, prompts, group, seeds, setting, lambda done, total: display.progress("sampling", done, total)
    )
    files = [
        folder / f"{g:03d}-{_slug(texts[g])}-seed{seed}.png" for g, seed in zip(group.tolist(), seeds, strict=True)
    ]
    for file, image in zip(files, images, strict=True):
        atomic_write(file, evaluate.png(image))
    return files


def _opened(model: str, adapters: Sequence[str], precision: str, resolution: int | None) -> tuple[Pipeline, str]:
    """A pipeline to sample from, and the role to use. What is asked for is checked before weights load."""
    if precision not in ("no", "bf16"):
        raise UserError(f"mixed precision {precision!r} is unknown; give no or bf16.")
    files = loading.check_adapters(adapters, model)
    loading.check_resolution(model, resolution)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return loading.load_for_sampling(model, files, precision=dtype, device=device), TRAINED


def _setting(pipeline: Pipeline, num_inference_steps: int | None, **how: Any) -> evaluate.Setting:
    """A student is sampled as one, in the calls that it was made for, unless another number is asked for."""
    steps, made_for = num_inference_steps or pipeline.num_calls or evaluate.DEFAULT_STEPS, pipeline.num_calls
    if made_for and (steps != made_for or how.get("guidance_scale", 1) != 1):
        logger.warning("this student was made for %d call(s) without guidance, and is asked for another way", made_for)
    return evaluate.Setting(num_inference_steps=steps, few_step=pipeline.few_step, **how)


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())[:80] or "prompt"
