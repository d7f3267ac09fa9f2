"""The life of a run: from a recipe to a finished folder, resumed where it was interrupted."""

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from trimtab import checkpoint, evaluate
from trimtab.config import RECIPES, dump, find_recipe, load_yaml, override, validate
from trimtab.distributed import Processes, launched
from trimtab.errors import RunStopped, StoppedTogether, UserError
from trimtab.files import as_umask, atomic_write, lock
from trimtab.inputs import DISTILLATION, ONE_STEP, Inputs, check
from trimtab.learner import Record
from trimtab.log import MetricsLog, append
from trimtab.recipe import RunConfig
from trimtab.report import write_report
from trimtab.report.card import write_card
from trimtab.rewards import BUILT_IN
from trimtab.roles import REFERENCE
from trimtab.wiring import Display, Run, build

HASHES = ("prompts_sha256", "pairs_sha256", "suite_sha256")
ABOUT = ("command", "revision", "versions", *HASHES)  # what config.yaml says beside the recipe
PLACE = ("name", "output_dir")  # a folder may have been moved
MAY_CHANGE = {  # at a resume: settings that shape no undisturbed result
    "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "num_validation_prompts",
    "on_error", "num_workers", "cache", "offload_text_encoders",
}  # fmt: skip


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a recipe (built-in, or a YAML file) and `a.b=c` overrides make; UserError if unsound."""
    path = find_recipe(recipe, RECIPES)
    data = override(load_yaml(path), overrides)
    return validate(RunConfig, {key: value for key, value in data.items() if key not in ABOUT}, path.name)


def train(config: RunConfig, display: Display, *, resume: bool = False, command: str = "") -> Path:
    """Run a recipe to its end and return the run folder. With `resume` an interrupted run goes on bit for bit, and one
    that does not exist starts. UserError before weights load for what can be known then; RunStopped for what can't."""
    folder = Path(config.output_dir) / config.name
    inputs = check(config)
    accelerator = launched()
    with ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(lock(folder))
            _check_folder(config, inputs, folder, resume)
        accelerator.wait_for_everyone()
        saved = _saved(folder, Processes.of(accelerator)) if resume else None
        run = build(config, folder, accelerator, inputs, display)
        _describe(run, inputs, command)
        if saved is not None:
            run.learner.load_state(checkpoint.load(saved))
            display.note(f"resumed from {saved}")
        _evaluate_base(run)
        _learn(run)
        _finish(run)
    return folder


def _saved(folder: Path, processes: Processes) -> Path | None:
    """The checkpoint to go on with; UserError in every process where they do not all see the same one."""
    saved = checkpoint.latest(folder)
    step = torch.tensor([0 if saved is None else checkpoint.step_of(saved)])
    steps = processes.everybody(step).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"the processes see {folder} at steps {', '.join(map(str, steps))}; give output_dir=... on a file system "
            "that all machines share."
        )
    return saved


def _check_folder(config: RunConfig, inputs: Inputs, folder: Path, resume: bool) -> None:
    """UserError unless the folder is new, or holds this very run, which is to be resumed."""
    file = folder / "config.yaml"
    if not file.is_file():
        return
    if not resume:
        raise UserError(f"{folder} already holds a run; add --resume to go on with it, or give another name=... .")
    _check_unchanged(config, inputs, file)


def _describe(run: Run, inputs: Inputs, command: str) -> None:
    """Leave config.yaml in the folder, once the run is built: one that could not start leaves no trace to resume."""
    file = run.folder / "config.yaml"
    if run.writes and not file.is_file():
        about = {"command": command, "revision": _revision(), "versions": evaluate.versions()}
        atomic_write(file, dump(run.config) + yaml.safe_dump(about | inputs.hashes(run.config), sort_keys=False))


def _check_unchanged(config: RunConfig, inputs: Inputs, file: Path) -> None:
    """UserError where the recipe differs from the one of the interrupted run in anything that shapes the result, or its
    prompts do. A setting that there was not yet has its default, which is what was done then."""
    written = load_yaml(file)
    given = {key: value for key, value in written.items() if key not in ABOUT}
    before, now = (_flat(yaml.safe_load(dump(each))) for each in (validate(RunConfig, given, str(file)), config))
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    changed = [key for key in changed if key not in PLACE and key.rpartition(".")[2] not in MAY_CHANGE]
    if changed:
        key = changed[0]
        raise UserError(
            f"{file} has {key}={before.get(key)} and the resumed run was given {now.get(key)}; "
            "resume with the same configuration, or give the changed run another name=... ."
        )
    name = changed_input(config, inputs, written)
    if name is not None:
        source = {"prompts": config.data.prompts, "pairs": config.data.pairs, "suite": config.evaluation.suite}[name]
        raise UserError(
            f"{source} no longer holds the {name} of the run in {file.parent}; put that back, or give the changed run "
            "another name=... ."
        )


def changed_input(config: RunConfig, inputs: Inputs, written: Mapping[str, Any]) -> str | None:
    """Which of prompts, pairs and suite is no longer what config.yaml, as it was `written`, says; None: none is. A run
    from before this was written down is believed."""
    now = inputs.hashes(config)
    return next((key.removesuffix("_sha256") for key in now if written.get(key, now[key]) != now[key]), None)


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
    except checkpoint.NotSaved:  # nor would it be now
        raise
    except (RunStopped, UserError) as error:
        cause = str(error).rstrip(".")
        if run.learner.moved:  # in the middle of a step, which a resume could not go on with
            kept = checkpoint.latest(run.folder)
            cause += "" if kept is None else f"; {kept.name} is the last whole one"
        else:
            _save(run)
            if run.writes or isinstance(error, StoppedTogether):
                cause += f"; the run is saved at step {run.learner.step}"
        if isinstance(error, StoppedTogether):
            run.accelerator.wait_for_everyone()  # one that left would have the launcher end the one that saves
        raise RunStopped(f"{cause}, mend this and --resume.") from error
    except Exception:
        if not run.learner.moved:
            _save(run)
        raise
    finally:
        if log is not None:
            log.close()


def _save(run: Run) -> None:
    if run.writes:
        checkpoint.save(run.folder / f"checkpoint-{run.learner.step}", run.learner.state())
        checkpoint.prune(run.folder, run.config.training.checkpoints_total_limit)


def _finish(run: Run) -> None:
    """The export, the evaluation of what was trained, and the page."""
    if run.writes:
        run.method.export(run.folder / "export")
        for file in (run.folder / "export").rglob("*.safetensors"):
            as_umask(file)
    if run.pipeline is None:
        return
    if run.config.evaluation.suite is not None:
        _evaluate(run, "trained", run.result, _setting(run))
    if run.writes:
        write_card(run.folder)
        write_report(run.folder)


def _evaluate_base(run: Run) -> None:
    """How the pre-trained model does: as the trained one will be sampled, and at its best."""
    config = run.config.evaluation
    if run.pipeline is None or config.suite is None:
        return
    setting = _setting(run)
    _evaluate(run, "base", REFERENCE, setting)
    if config.base_guidance_scale is not None and run.config.method.name not in ONE_STEP:  # one call is not guided
        steps = config.base_num_inference_steps or (
            evaluate.DEFAULT_STEPS if run.config.method.name in DISTILLATION else setting.num_inference_steps
        )
        best = {"guidance_scale": config.base_guidance_scale, "num_inference_steps": steps}
        _evaluate(run, "base-guided", REFERENCE, replace(setting, few_step=run.pipeline.is_student, **best))


def _evaluate(run: Run, label: str, role: str, setting: evaluate.Setting) -> None:
    folder, processes = run.folder / "evaluation" / label, Processes.of(run.accelerator)
    there = torch.tensor([float((folder / "results.json").is_file())])  # written last, so all of it is there
    if processes.everybody(there)[0]:
        if run.writes:
            _note(run, label, json.loads((folder / "results.json").read_text()))
        return
    alone = {} if run.rewards is None else run.rewards.alone()
    own = {name: reward for name, reward in alone.items() if name not in BUILT_IN}
    results = evaluate.evaluate(
        run.pipeline,
        role,
        run.unseen,
        setting,
        folder,
        rewards=own,  # the built-in ones are measured wherever they can be
        described={
            "model": run.config.model.pretrained_model_name_or_path,
            "adapters": [*run.config.model.adapters, *(["export"] if role == run.result else [])],
        },
        reference=REFERENCE if role == run.result else None,
        progress=lambda done, total: run.display.progress(f"evaluating {label}", done, total),
        processes=processes,
    )
    if run.writes:
        _note(run, label, results)


def _note(run: Run, label: str, results: dict[str, Any]) -> None:
    """The evaluation's numbers in the log, unless they are there: a run may have been killed before that."""
    file = run.folder / "metrics.jsonl"
    numbers = {f"eval/{label}/{name}": value for name, value in evaluate.headline(results).items()}
    said = file.read_text() if file.is_file() else ""
    if not any(f'"{name}"' in said for name in numbers):
        append(file, run.learner.step, numbers)


def _setting(run: Run) -> evaluate.Setting:
    config = run.config
    student = config.method.name in DISTILLATION
    trained_in_calls = student or config.method.name in ONE_STEP
    calls = config.rollout.num_inference_steps if trained_in_calls else run.pipeline.num_calls
    return evaluate.Setting(
        suite=str(config.evaluation.suite),
        images_per_prompt=config.evaluation.images_per_prompt,
        num_inference_steps=config.evaluation.num_inference_steps or calls or evaluate.DEFAULT_STEPS,
        guidance_scale=config.evaluation.guidance_scale,
        resolution=config.model.resolution,
        batch_size=config.rollout.sample_batch_size,
        precision=config.model.mixed_precision,
        few_step=student or run.pipeline.is_student,
    )


def _pictures(run: Run, step: int) -> None:
    """samples/step-000100.png: the same prompts from the same noise each time, in one grid."""
    number = run.config.training.num_validation_prompts
    if run.pipeline is None or not number:
        return
    prompts = run.unseen
    number = min(number, len(prompts))
    chosen = prompts[[i * len(prompts) // number for i in range(number)]]
    setting = replace(_setting(run), images_per_prompt=1)
    group, seeds, processes = torch.arange(number), list(range(number)), Processes.of(run.accelerator)
    images, _ = evaluate.generate(run.pipeline, run.result, chosen, group, seeds, setting, processes=processes)
    if not run.writes:
        return
    columns = math.ceil(math.sqrt(number))
    blank = images.new_ones(columns * math.ceil(number / columns) - number, *images.shape[1:])
    rows = torch.cat([images, blank]).split(columns)
    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)  # (3, H, W)
    atomic_write(run.folder / "samples" / f"step-{step:06d}.png", evaluate.png(grid))


def _headline(record: Record) -> str:
    shown = {"reward": "reward", "kl": "kl", "loss": "loss", "direction": "direction", "fake loss": "loss/fake"}
    return "  ".join(f"{name} {record.metrics[key]:.3f}" for name, key in shown.items() if key in record.metrics)
