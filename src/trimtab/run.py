"""The wiring: from a recipe to a finished run folder. The one file that knows everybody."""

import logging
import math
import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from accelerate import Accelerator

from trimtab import checkpoint, evaluate
from trimtab.batch import Prompts
from trimtab.config import dump, find_recipe, load_yaml, override, validate
from trimtab.errors import RunStopped, UserError
from trimtab.files import atomic_write, lock
from trimtab.learner import Learner, Record
from trimtab.log import MetricsLog
from trimtab.method import Method
from trimtab.methods import crd, diffusion_nft, pretrain
from trimtab.pipelines import Pipeline, loading
from trimtab.recipe import RunConfig
from trimtab.report import write_report
from trimtab.rewards import BUILT_IN
from trimtab.rewards import build as build_rewards
from trimtab.rewards.composite import Composite, RewardFailed
from trimtab.roles import REFERENCE
from trimtab.rollout import Rollouts
from trimtab.worlds.files import load_prompts

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"
ONLINE = {"crd": crd.CRD, "diffusion-nft": diffusion_nft.DiffusionNFT}
PRETRAIN = {
    "pretrain-vae": pretrain.PretrainVAE,
    "pretrain-micro": pretrain.PretrainMicro,
    "pretrain-recognizer": pretrain.PretrainRecognizer,
}
TRAINED = "default"
ABOUT = ("command", "revision", "versions")  # what config.yaml says beside the recipe
MAY_CHANGE = ("checkpointing_steps", "checkpoints_total_limit", "validation_steps", "num_validation_prompts")


class Display(Protocol):
    """Where a run tells how it is going."""

    def note(self, text: str) -> None: ...

    def progress(self, what: str, done: int, total: int, numbers: str = "") -> None: ...


@dataclass
class Run:
    """A run that is ready to go: everything is checked and built."""

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    learner: Learner
    method: Method
    pipeline: Pipeline | None  # None: pre-training
    rewards: Composite | None  # None: pre-training
    display: Display

    @property
    def writes(self) -> bool:
        return self.accelerator.is_main_process


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a recipe (built-in, or a YAML file) and `a.b=c` overrides make; UserError if unsound."""
    path = find_recipe(recipe, RECIPES)
    data = override(load_yaml(path), overrides)
    return validate(RunConfig, {key: value for key, value in data.items() if key not in ABOUT}, path.name)


def train(config: RunConfig, display: Display, *, resume: bool = False, command: str = "") -> Path:
    """Run a recipe to its end and return the run folder. With `resume` an interrupted run goes on bit for bit, and one
    that does not exist starts. UserError before weights load for what can be known then; RunStopped for what can't."""
    folder = Path(config.output_dir) / config.name
    prompts, rewards = check(config)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(lock(folder))
            _check_folder(config, folder, resume)
        accelerator.wait_for_everyone()
        saved = checkpoint.latest(folder) if resume else None
        run = build(config, folder, accelerator, prompts, rewards, display)
        _describe(run, command)
        if saved is not None:
            run.learner.load_state(checkpoint.load(saved))
            display.note(f"resumed from {saved}")
        _evaluate_base(run)
        _learn(run)
        _finish(run)
    return folder


def check(config: RunConfig) -> tuple[Prompts, Composite | None]:
    """Prompts and rewards, and the certainty that the model is one we know: all that can fail before weights load."""
    if config.method.name in PRETRAIN:
        return Prompts((), (), ()), None
    loading.resolve(config.model.pretrained_model_name_or_path)
    prompts = load_prompts(config.data.prompts)
    if not config.rewards:
        raise UserError("the recipe names no reward; add one, for example rewards='{path/to/file.py:function: 1.0}'.")
    built_in = {name: 1.0 for name in config.rewards if name in BUILT_IN}
    if config.evaluation.suite is not None and built_in:
        build_rewards(built_in, _unseen(config))
    elif config.evaluation.suite is not None or config.training.num_validation_prompts:
        _unseen(config)
    size = min(len(prompts), config.rollout.num_prompts)
    if size < config.rollout.num_prompts:
        logger.warning("only %d prompts for rollouts of %d", size, config.rollout.num_prompts)
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate launch say it
    if size % processes:
        raise UserError(
            f"a rollout of {size} prompts can't be shared by {processes} processes, each of which takes whole prompts; "
            f"make rollout.num_prompts a multiple of {processes} that the prompts suffice for."
        )
    return prompts, build_rewards(config.rewards, prompts)


def _unseen(config: RunConfig) -> Prompts:
    """The prompts for pictures and evaluation: the test split of the suite, or else of the training prompts."""
    return load_prompts(config.evaluation.suite or config.data.prompts, "test")


def _check_folder(config: RunConfig, folder: Path, resume: bool) -> None:
    """UserError unless the folder is new, or holds this very run, which is to be resumed."""
    file = folder / "config.yaml"
    if not file.is_file():
        return
    if not resume:
        raise UserError(f"{folder} already holds a run; add --resume to go on with it, or give another name=... .")
    _check_unchanged(config, file)


def _describe(run: Run, command: str) -> None:
    """Leave config.yaml in the folder, once the run is built: one that could not start leaves no trace to resume."""
    file = run.folder / "config.yaml"
    if run.writes and not file.is_file():
        about = {"command": command, "revision": _revision(), "versions": evaluate.versions()}
        atomic_write(file, dump(run.config) + yaml.safe_dump(about, sort_keys=False))


def _check_unchanged(config: RunConfig, file: Path) -> None:
    """UserError where the recipe differs from the one of the interrupted run in anything that shapes the result."""
    before = {key: value for key, value in load_yaml(file).items() if key not in ABOUT}
    now = yaml.safe_load(dump(config))
    changed = [key for key in {**_flat(before), **_flat(now)} if _flat(before).get(key) != _flat(now).get(key)]
    changed = [key for key in changed if key.rpartition(".")[2] not in MAY_CHANGE]
    if changed:
        key = changed[0]
        raise UserError(
            f"{file} has {key}={_flat(before).get(key)} and the resumed run was given {_flat(now).get(key)}; "
            "resume with the same configuration, or give the changed run another name=... ."
        )


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    return {k: v for key, value in data.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}


def _revision() -> str | None:
    """The git revision of trimtab's own checkout; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def build(
    config: RunConfig,
    folder: Path,
    accelerator: Accelerator,
    prompts: Prompts,
    rewards: Composite | None,
    display: Display,
) -> Run:
    """Load the model and put everything together, untrained; `prompts` and `rewards` as `check` returned them."""
    pipeline = None
    if rewards is None:
        method = PRETRAIN[config.method.name](config.method, config.seed, accelerator.device, config.model.precision)
    else:
        pipeline = loading.load(
            config.model.pretrained_model_name_or_path,
            lora=config.model.lora,
            frozen=config.method.frozen_roles,
            precision=config.model.precision,
            device=accelerator.device,
            seed=config.seed,
        )
        if config.model.gradient_checkpointing:
            pipeline.roles.enable_gradient_checkpointing()
        if accelerator.num_processes > 1:
            pipeline.roles.wrap(accelerator.prepare_model)
        rollouts = Rollouts(
            pipeline,
            prompts,
            rewards,
            config.rollout,
            config.model.resolution or pipeline.resolution,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.gather if accelerator.num_processes > 1 else None,
        )
        method = ONLINE[config.method.name](config.method, pipeline, rollouts, config.training.train_batch_size)
    learner = Learner(method, accelerator, config.optimizer, config.training.max_train_steps)
    return Run(config, folder, accelerator, learner, method, pipeline, rewards, display)


def _learn(run: Run) -> None:
    """Drive the learner: a line in the log for every step, pictures and checkpoints at their cadence."""
    training, total = run.config.training, run.learner.num_steps
    log = MetricsLog(run.folder, run.learner.step) if run.writes else None
    if run.learner.step == 0:
        _pictures(run, 0)
    try:
        for record in run.learner.run():
            run.display.progress("training", record.step, total, _headline(record))
            if log is not None:
                log.write(record)
            if record.step % training.validation_steps == 0 or record.step == total:
                _pictures(run, record.step)
            if record.step % training.checkpointing_steps == 0 or record.step == total:
                _save(run)
    except (RewardFailed, UserError) as error:  # raised between updates, so that the state is that after a step
        _save(run)
        cause = str(error).rstrip(".")
        raise RunStopped(f"{cause}; the run is saved at step {run.learner.step}, mend this and --resume.") from error
    finally:
        if log is not None:
            log.close()


def _save(run: Run) -> None:
    if run.writes:
        checkpoint.save(run.folder / f"checkpoint-{run.learner.step}", run.learner.state())
        checkpoint.prune(run.folder, run.config.training.checkpoints_total_limit)


def _finish(run: Run) -> None:
    """The export, the evaluation of what was trained, and the page."""
    if not run.writes:
        return
    run.method.export(run.folder / "export")
    if run.pipeline is None:
        return
    if run.config.evaluation.suite is not None:
        _evaluate(run, "trained", TRAINED, run.config.evaluation.guidance_scale)
    write_report(run.folder)


def _evaluate_base(run: Run) -> None:
    """How the pre-trained model does: as the trained one will be sampled, and at its best."""
    config = run.config.evaluation
    if run.pipeline is None or config.suite is None or not run.writes:
        return
    _evaluate(run, "base", REFERENCE, config.guidance_scale)
    if config.base_guidance_scale is not None:
        _evaluate(run, "base-guided", REFERENCE, config.base_guidance_scale)


def _evaluate(run: Run, label: str, role: str, guidance_scale: float) -> None:
    folder = run.folder / "evaluation" / label
    if (folder / "results.json").is_file():
        return  # written last, so all of it is there
    own = {name: reward for name, reward in run.rewards.alone().items() if name not in BUILT_IN}
    evaluate.evaluate(
        run.pipeline,
        role,
        _unseen(run.config),
        replace(_setting(run.config), guidance_scale=guidance_scale),
        folder,
        rewards=own,  # the built-in ones are measured wherever they can be
        described={
            "model": run.config.model.pretrained_model_name_or_path,
            "adapter": "export" if role == TRAINED else None,
        },
        reference=REFERENCE if role == TRAINED else None,
        progress=lambda done, total: run.display.progress(f"evaluating {label}", done, total),
    )


def _setting(config: RunConfig) -> evaluate.Setting:
    return evaluate.Setting(
        suite=str(config.evaluation.suite),
        images_per_prompt=config.evaluation.images_per_prompt,
        num_inference_steps=config.evaluation.num_inference_steps,
        guidance_scale=config.evaluation.guidance_scale,
        resolution=config.model.resolution,
        batch_size=config.rollout.sample_batch_size,
        precision=config.model.mixed_precision,
    )


def _pictures(run: Run, step: int) -> None:
    """samples/step-000100.png: the same prompts from the same noise each time, in one grid."""
    number = run.config.training.num_validation_prompts
    if run.pipeline is None or not number or not run.writes:
        return
    prompts = _unseen(run.config)
    number = min(number, len(prompts))
    chosen = prompts[[i * len(prompts) // number for i in range(number)]]
    setting = replace(_setting(run.config), images_per_prompt=1)
    images, _ = evaluate.generate(run.pipeline, TRAINED, chosen, torch.arange(number), list(range(number)), setting)
    columns = math.ceil(math.sqrt(number))
    blank = images.new_ones(columns * math.ceil(number / columns) - number, *images.shape[1:])
    grid = torch.cat([images, blank]).unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    atomic_write(run.folder / "samples" / f"step-{step:06d}.png", evaluate.png(grid))


def _headline(record: Record) -> str:
    shown = {"reward": "reward", "kl": "kl", "loss": "loss"}
    return "  ".join(f"{name} {record.metrics[key]:.3f}" for name, key in shown.items() if key in record.metrics)


def evaluate_model(
    model: str,
    adapter: str | None,
    suite: str,
    folder: Path,
    display: Display,
    *,
    rewards: Sequence[str] = (),
    precision: str = "no",
    **how: Any,
) -> dict[str, Any]:
    """`trimtab evaluate`: the results, also in `folder`."""
    prompts = load_prompts(suite, "test")
    extra = build_rewards(dict.fromkeys(rewards, 1.0), prompts).alone() if rewards else {}
    pipeline, role = _opened(model, adapter, precision)
    return evaluate.evaluate(
        pipeline,
        role,
        prompts,
        evaluate.Setting(suite=suite, precision=precision, **how),
        folder,
        rewards=extra,
        described={"model": model, "adapter": adapter},
        progress=lambda done, total: display.progress("evaluating", done, total),
    )


def sample(
    model: str,
    adapter: str | None,
    texts: Sequence[str],
    folder: Path,
    display: Display,
    *,
    precision: str = "no",
    **how: Any,
) -> list[Path]:
    """`trimtab sample`: the files written, one a picture, named by prompt and seed."""
    setting = evaluate.Setting(suite="", precision=precision, **how)
    pipeline, role = _opened(model, adapter, precision)
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


def _opened(model: str, adapter: str | None, precision: str) -> tuple[Pipeline, str]:
    """A pipeline to sample from, and the role to use. The adapter is checked before weights load."""
    if precision not in ("no", "bf16"):
        raise UserError(f"mixed precision {precision!r} is unknown; give no or bf16.")
    file = None if adapter is None else loading.check_adapter(adapter, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return loading.load_for_sampling(model, file, precision=dtype, device=device), TRAINED


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())[:80] or "prompt"
