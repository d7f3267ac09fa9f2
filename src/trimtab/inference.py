"""A finished model at work: `trimtab evaluate` and `trimtab sample`."""

import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import evaluate
from trimtab.batch import Prompts
from trimtab.distributed import check_one_process
from trimtab.errors import RunStopped, UserError
from trimtab.files import atomic_write, check_folder
from trimtab.pipelines import Pipeline, loading
from trimtab.rewards import build as build_rewards
from trimtab.rewards import check_side
from trimtab.rewards.composite import RewardFailed
from trimtab.roles import TRAINED
from trimtab.wiring import Display
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
    precision: str | None = None,
    resolution: int | None = None,
    **how: Any,
) -> dict[str, Any]:
    """`trimtab evaluate`: the results, also in `folder`. UserError where that holds an evaluation of something else;
    RunStopped where a reward fails for all pictures, which are kept."""
    check_one_process("trimtab evaluate")
    check_folder(folder)
    prompts = load_prompts(suite, "test")
    about, hashes = {"model": model, "adapters": list(adapters)}, _hashes(suite, prompts, rewards)
    precision = precision or _usual_precision()
    asked = {"suite": suite, "precision": precision, "resolution": resolution, **how}
    calls = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    _check_same(
        folder, {name: x for name, x in (about | asked | calls).items() if name != "batch_size"}, rewards, hashes
    )
    extra = build_rewards(dict.fromkeys(rewards, 1.0), prompts).alone() if rewards else {}
    check_side(rewards, lambda: resolution or loading.resolution(model))
    pipeline, role = _opened(model, adapters, precision, resolution, num_inference_steps)
    setting = _setting(pipeline, num_inference_steps, **asked)
    _check_same(folder, about | setting.described(), rewards, hashes)  # how many calls a student takes is known now
    try:
        return evaluate.evaluate(
            pipeline,
            role,
            prompts,
            setting,
            folder,
            rewards=extra,
            described=about | {"sha256": hashes},
            progress=lambda done, total: display.progress("evaluating", done, total),
        )
    except RewardFailed as error:
        raise RunStopped(f"{str(error).rstrip('.')}; the pictures are in {folder / 'images'}.") from error


def _check_same(folder: Path, asked: Mapping[str, Any], rewards: Sequence[str], hashes: Mapping[str, str]) -> None:
    """UserError if the folder holds an evaluation of another thing than what is asked for, which would replace it."""
    file = folder / "results.json"
    if not file.is_file():
        return
    try:
        found = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); give --output another folder.") from error
    for name, value in asked.items():
        if found.get(name) != value:
            raise UserError(
                f"{folder} holds an evaluation with {name}={found.get(name)!r}, and this one has {value!r}; ask "
                "for the same, or give --output another folder."
            )
    known = found.get("sha256") or {}  # older evaluations have none
    changed = [name for name, value in hashes.items() if known.get(name, value) != value]
    if changed:
        raise UserError(f"{folder} holds an evaluation from before {changed[0]} changed; give --output another folder.")
    lost = set(found.get("scores") or ()) - {*rewards, *evaluate.OWN_SCORES}
    if lost:
        raise UserError(
            f"{folder} holds scores of {min(lost)!r}, which would be lost; give --reward {min(lost)} as well, or "
            "--output another folder."
        )


def _hashes(suite: str, prompts: Prompts, rewards: Sequence[str]) -> dict[str, str]:
    """What the prompts of a suite say, and the files of the user's own rewards, each as one number."""
    files = {name: Path(name.rpartition(":")[0]) for name in rewards}
    own = {name: file.read_bytes() for name, file in files.items() if file.suffix == ".py" and file.is_file()}
    return {suite: prompts.sha256()} | {name: hashlib.sha256(content).hexdigest() for name, content in own.items()}


def sample(
    model: str,
    adapters: Sequence[str],
    texts: Sequence[str],
    folder: Path,
    display: Display,
    *,
    num_inference_steps: int | None = None,
    precision: str | None = None,
    resolution: int | None = None,
    **how: Any,
) -> list[Path]:
    """`trimtab sample`: the files written, one a picture, named by prompt and seed. None replaces another picture."""
    check_one_process("trimtab sample")
    check_folder(folder)
    precision = precision or _usual_precision()
    pipeline, role = _opened(model, adapters, precision, resolution, num_inference_steps)
    setting = _setting(pipeline, num_inference_steps, suite="", precision=precision, resolution=resolution, **how)
    number = setting.images_per_prompt
    prompts = Prompts(tuple(texts), tuple({} for _ in texts), tuple(range(len(texts))))
    group = torch.arange(len(texts)).repeat_interleave(number)
    seeds = [setting.seed + i for _ in texts for i in range(number)]
    images, _ = evaluate.generate(
        pipeline, role, prompts, group, seeds, setting, lambda done, total: display.progress("sampling", done, total)
    )
    names = [(g, f"{_slug(texts[g])}-seed{seed}.png") for g, seed in zip(group.tolist(), seeds, strict=True)]
    files = _free(folder, names, [evaluate.png(image) for image in images])
    for file, data in files.items():
        atomic_write(file, data)
    return list(files)


def _free(folder: Path, names: Sequence[tuple[int, str]], contents: Sequence[bytes]) -> dict[Path, bytes]:
    """Files with their contents, counted from the first number at which no other picture has such a name."""

    def counted(first: int) -> dict[Path, bytes]:
        return {folder / f"{first + g:03d}-{name}": data for (g, name), data in zip(names, contents, strict=True)}

    def fits(files: Mapping[Path, bytes]) -> bool:
        return all(not file.exists() or file.read_bytes() == data for file, data in files.items())

    return next(filter(fits, map(counted, itertools.count())))


def _usual_precision() -> str:
    """bf16 where there is a GPU that computes in it, as training has it there; float32 on a CPU."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def _opened(
    model: str, adapters: Sequence[str], precision: str, resolution: int | None, num_inference_steps: int | None
) -> tuple[Pipeline, str]:
    """A pipeline to sample from, and the role to use. What is asked for is checked before weights load."""
    if precision not in ("no", "bf16"):
        raise UserError(f"mixed precision {precision!r} is unknown; give no or bf16.")
    files = loading.check_adapters(adapters, model)
    loading.check_resolution(model, resolution)
    loading.check_calls(model, num_inference_steps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return loading.load_for_sampling(model, files, precision=dtype, device=device), TRAINED


def _setting(pipeline: Pipeline, num_inference_steps: int | None, **how: Any) -> evaluate.Setting:
    """A student is sampled as one, in the calls that it was made for, unless another number is asked for."""
    steps, made_for = num_inference_steps or pipeline.num_calls or evaluate.DEFAULT_STEPS, pipeline.num_calls
    if made_for and (steps != made_for or how.get("guidance_scale", 1) != 1):
        logger.warning("this student was made for %d call(s) without guidance, and is asked for another way", made_for)
    return evaluate.Setting(num_inference_steps=steps, few_step=pipeline.is_student, **how)


def _slug(text: str) -> str:
    words = "-".join("".join(c if c.isalnum() else " " for c in text).split())
    return words.encode()[:80].decode(errors="ignore") or "prompt"  # a file's name is limited in bytes
