"""`trimtab pairs`: candidates of a run, ranked by its rewards, as a file of preferences that offline training reads.

A rollout is a function of the step and of the weights that draw it. So with a kept checkpoint the run's own pictures
of that step come again (without one, at step 0, those of its very first), and after them what its policy would have
drawn next. Several processes draw other batches, whose last bits differ; of a binary run these are the first rounds.
"""

import json
from pathlib import Path

from trimtab import checkpoint, evaluate
from trimtab.candidates import best_and_worst, in_units_of_siblings
from trimtab.config import load_yaml, validate
from trimtab.distributed import check_one_process, launched
from trimtab.errors import UserError
from trimtab.files import atomic_write, check_folder
from trimtab.inputs import ONE_STEP, ONLINE, check
from trimtab.recipe import RunConfig
from trimtab.rollout import Rollouts
from trimtab.run import ABOUT, changed_input
from trimtab.wiring import Display, Run, build


def write_pairs(
    folder: Path, display: Display, output: Path | None, step: int | None, num_rollouts: int, num_pairs: int
) -> Path:
    """Write `pairs.jsonl` and its pictures, the `num_pairs` best and worst of each prompt, and return the file.

    `step` names the checkpoint, 0 the untrained weights; None is the latest there is. UserError where there is none, or
    where the run has no rewards to rank by, before weights load.
    """
    check_one_process("trimtab pairs")  # else each would replace the file by its own share
    config, step, saved = _checked(folder, step)
    if config.rollout.group_size < 2:
        raise UserError(f"{folder} drew one candidate a prompt, and a preference is among two; there is none to write.")
    if 2 * num_pairs > config.rollout.group_size:
        raise UserError(
            f"{num_pairs} best and {num_pairs} worst of {config.rollout.group_size} candidates overlap; give "
            f"--num-pairs of at most {config.rollout.group_size // 2}."
        )
    output = output or folder / "pairs"
    check_folder(output)
    if (output / "pairs.jsonl").exists():
        raise UserError(f"{output} holds pairs.jsonl already, and nothing is replaced; give --output another folder.")
    inputs = check(config)
    if changed_input(config, inputs, load_yaml(folder / "config.yaml")) == "prompts":
        raise UserError(f"{config.data.prompts} no longer holds the prompts of the run in {folder}; put those back.")
    run = build(config, folder, launched(), inputs, display)
    if saved is not None:
        run.learner.load_state(checkpoint.load(saved))
    lines: list[dict] = []
    for number in range(num_rollouts):
        lines += _ranked(run, step + number, num_pairs, output)
        display.progress("ranking", number + 1, num_rollouts)
    if not lines:
        raise UserError(
            f"no prompt has candidates of different scores (--rollouts {num_rollouts}); give more --rollouts."
        )
    atomic_write(output / "pairs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return output / "pairs.jsonl"


def _checked(folder: Path, step: int | None) -> tuple[RunConfig, int, Path | None]:
    """The run's recipe, the step and the checkpoint to start from."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} has no config.yaml; give the folder of a run that `trimtab train` wrote.")
    config = validate(RunConfig, {k: v for k, v in load_yaml(file).items() if k not in ABOUT}, str(file))
    if config.method.name not in (*ONLINE, *ONE_STEP) or not config.rewards or config.method.learns_from_pairs:
        raise UserError(f"{folder} is a run of {config.method.name} without candidates that a reward ranked.")
    if step == 0:
        return config, 0, None
    saved = checkpoint.latest(folder) if step is None else folder / f"checkpoint-{step}"
    if saved is None:
        return config, 0, None
    if not saved.is_dir():
        raise UserError(f"{folder} keeps no {saved.name}; give --step 0, or that of one of its checkpoint folders.")
    return config, checkpoint.step_of(saved), saved


def _ranked(run: Run, step: int, num_pairs: int, output: Path) -> list[dict]:
    """One line for each prompt of a rollout some of whose candidates are better than others."""
    rollouts: Rollouts = run.method.rollouts
    prompts = rollouts.prompts_of(step)
    drawn, images = rollouts.draw(prompts, step, run.sampler)
    scored = rollouts.scores(drawn, images)
    by_rank = run.config.method.name in ONE_STEP  # which several rewards enter in units of siblings
    scores = in_units_of_siblings(scored, run.rewards, drawn.group) if by_rank else scored.total
    known = scores.isfinite().nonzero().squeeze(1)
    best, worst = best_and_worst(scores[known], drawn.group[known], num_pairs, num_pairs)
    lines = []
    for g, prompt in enumerate(prompts.text):
        sides = {
            "chosen": known[best & (drawn.group[known] == g)],
            "rejected": known[worst & (drawn.group[known] == g)],
        }
        if not len(sides["chosen"]):
            continue
        line: dict = {"prompt": prompt}
        for name, rows in sides.items():
            names = [f"pictures/step{step:06d}-{prompts.index[g]:06d}-{int(drawn.sibling[i]):03d}.png" for i in rows]
            for i, picture in zip(rows, names, strict=True):
                atomic_write(output / picture, evaluate.png(images[i]), durable=False)
            line |= {name: names, f"{name}_scores": scores[rows].tolist()}
        lines.append(line)
    return lines
