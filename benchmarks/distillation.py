"""Few-step students of the built-in model: every method and normaliser at equal updates, and what each costs.

    python benchmarks/distillation.py [--calls 4 1] [--steps 120] [--seeds 0 1 2] [--only NAME ...]
    python benchmarks/distillation.py --reuse [--seeds 0]        # quality against rollouts and time for reuse 1, 2, 4
    python benchmarks/distillation.py --cost                     # seconds a picture, and memory of three roles

Students are sampled without guidance, the teacher with w = 3. Scores are of the test prompts of blocks, 4 pictures
each. "to teacher" is the Frechet distance to the teacher's own pictures at 30 steps. All methods see the same prompts
and the same stratified times. Writes benchmarks/results/distillation_*.{json,md}. What is finished is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from tables import table

from trimtab import evaluate, run
from trimtab.batch import Prompts
from trimtab.cli import Terminal
from trimtab.inference import evaluate_model
from trimtab.metrics.frechet import frechet_distance
from trimtab.pipelines import loading
from trimtab.pipelines.sd3 import SD3
from trimtab.rewards import recognizer
from trimtab.roles import LoraSettings, Roles
from trimtab.worlds.files import load_prompts

RESULTS = Path(__file__).parent / "results"
TEACHER_STEPS, GUIDANCE = (2, 4, 8, 30), 3.0
VARIANTS = {  # name -> recipe and changes
    "DMD2": ("dmd2-micro-4step", []),
    "GNDM": ("gndm-micro-4step", []),
    "GNDM, sample": ("gndm-micro-4step", ["method.normaliser=sample"]),
    "GNDM, binned": ("gndm-micro-4step", ["method.normaliser=binned"]),
    "DMDR": ("dmdr-micro-4step", []),
    "GNDMR": ("gndmr-micro-4step", []),
}
ONE_CALL = {  # one update of the fake is enough there; and one call adds no noise that a verdict could judge
    "GNDMR": ["rewards={recognizer: 2.0}", "optimizer.learning_rate=5e-4"],
    "DMDR": [],
}


def teacher(num_steps: int, output: Path, display: Terminal) -> Path:
    """The evaluation of the guided teacher."""
    folder = output / f"distillation-teacher-{num_steps}"
    if not (folder / "results.json").is_file():
        evaluate_model(
            "micro", [], "blocks", folder, display,
            num_inference_steps=num_steps, guidance_scale=GUIDANCE, precision="bf16",
        )  # fmt: skip
    return folder


def schedule(name: str, steps: int) -> list[str]:
    """What happens at a part of the way, as far on the way of another number of updates: the recipes have 300."""
    parts = {"GNDMR": {"reward_start": 0.25, "reward_ramp": 0.1}, "DMDR": {"reward_start": 0.4, "dynamic_steps": 0.3}}
    return [f"method.{key}={round(part * steps)}" for key, part in parts.get(name, {}).items()]


def trained(name: str, calls: int, seed: int, given: argparse.Namespace, changes: list[str] = ()) -> Path:
    """The run folder of one student, trained to its end and evaluated."""
    recipe, own = VARIANTS[name]
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    overrides = [
        *own,
        *(["method.fake_updates=1", *ONE_CALL.get(name, ["optimizer.learning_rate=5e-4"])] if calls == 1 else []),
        *schedule(name, given.steps),
        f"name=student-{slug}-{calls}-seed{seed}"
        + "".join(f"-{c.rpartition('.')[2].replace('=', '')}" for c in changes),
        f"seed={seed}",
        f"output_dir={given.output}",
        f"rollout.num_inference_steps={calls}",
        f"evaluation.num_inference_steps={calls}",
        "evaluation.base_guidance_scale=null",
        f"training.max_train_steps={given.steps}",
        f"training.checkpointing_steps={given.steps}",
        "training.num_validation_prompts=0",
        *changes,
    ]
    return run.train(run.load_config(recipe, overrides), given.display, resume=True, command="distillation.py")


@torch.no_grad()
def features(folder: Path) -> torch.Tensor:
    """Recognizer features (B, 128) of an evaluation's pictures."""
    files = [folder / json.loads(line)["file"] for line in (folder / "images.jsonl").read_text().splitlines()]
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2) / 255
    return torch.cat([recognizer.load().features(part) for part in pictures.split(256)])


def numbers(folder: Path, of_teacher: torch.Tensor) -> dict[str, float]:
    results = json.loads((folder / "results.json").read_text())
    strict = results["scores"]["strict"]
    scores = {"strict": strict["overall"]["mean"]} | {tag: value["mean"] for tag, value in strict["tags"].items()}
    scores["recognizer"] = results["scores"]["recognizer"]["overall"]["mean"]
    to_teacher = frechet_distance(of_teacher, features(folder))
    return scores | {
        "to real": results["frechet_distance"],
        "to teacher": to_teacher,
        "diversity": results["diversity"],
    }


def compare(given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    folders = {steps: teacher(steps, given.output, given.display) for steps in TEACHER_STEPS}
    of_teacher = features(folders[max(TEACHER_STEPS)])
    rows = {f"teacher, {steps} steps": [numbers(folder, of_teacher)] for steps, folder in folders.items()}
    for calls in given.calls:
        for name in given.only or VARIANTS:
            runs = [trained(name, calls, seed, given) for seed in given.seeds]
            rows[f"{name}, {calls}"] = [numbers(folder / "evaluation" / "trained", of_teacher) for folder in runs]
    return rows


def reuse(given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The same number of student updates from fewer rollouts."""
    of_teacher, rows = features(teacher(30, given.output, given.display)), {}
    for uses in (1, 2, 4):
        rollouts = given.steps // uses
        changes = [f"method.reuse={uses}", f"training.max_train_steps={rollouts}"] if uses > 1 else []
        runs = [trained("GNDMR", 4, seed, given, changes) for seed in given.seeds]
        found = []
        for folder in runs:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            seconds = sum(line.get("seconds/step", 0.0) for line in lines)
            pictures = max(line.get("images", 0.0) for line in lines)  # the fake's own batches count, too
            spent = {"pictures": pictures, "seconds": seconds}
            found.append({"rollouts": rollouts} | spent | numbers(folder / "evaluation" / "trained", of_teacher))
        rows[f"reuse {uses}"] = found
    return rows


# ---- what it costs


def seconds_a_picture(few_step: bool, num_steps: int, guidance_scale: float, num: int = 64) -> float:
    pipeline = loading.load_for_sampling("micro", precision=torch.bfloat16)
    prompts: Prompts = load_prompts("blocks", "test")[list(range(num))]
    setting = evaluate.Setting(
        suite="", num_inference_steps=num_steps, guidance_scale=guidance_scale, few_step=few_step, precision="bf16"
    )
    times = []
    for _ in range(4):
        started = time.perf_counter()
        evaluate.generate(pipeline, "default", prompts, torch.arange(num), list(range(num)), setting)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) / num


def peak_bytes(num_roles: int) -> int:
    words = [sys.executable, __file__, "--peak", str(num_roles)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def step_with(num_roles: int) -> int:
    """Peak memory of a process that takes one optimizer step with each trained role of an MMDiT of 0.3 billion."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # a copy in float32 at the start would be the peak
    network = SD3Transformer2DModel(
        sample_size=32, patch_size=2, num_layers=12, attention_head_dim=64, num_attention_heads=16,
        joint_attention_dim=1024, caption_projection_dim=1024, pooled_projection_dim=512, qk_norm="rms_norm",
    ).requires_grad_(False)  # fmt: skip
    torch.set_default_dtype(torch.float32)
    trained = ("default", "fake")[: max(1, num_roles - 1)]
    roles = Roles(network, trained=trained, lora=LoraSettings(rank=64, lora_alpha=64, target_modules=SD3.TARGETS))
    inputs = {
        "hidden_states": torch.randn(2, 16, 32, 32, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(2, 77, 1024, dtype=torch.bfloat16),
        "pooled_projections": torch.randn(2, 512, dtype=torch.bfloat16),
        "timestep": torch.tensor([300.0, 700.0]),
    }
    optimizers = {role: torch.optim.AdamW(roles.parameters(role).values()) for role in trained}
    for role, optimizer in optimizers.items():
        with torch.autocast("cpu", torch.bfloat16):
            if num_roles > 1:
                with torch.no_grad():
                    roles("ref", **inputs)
            loss = roles(role, **inputs, return_dict=False)[0].square().mean()
        loss.backward(inputs=list(roles.parameters(role).values()))
        optimizer.step()
    status = Path("/proc/self/status").read_text()  # not getrusage: a child starts with its parent's peak there
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def cost() -> str:
    slow = seconds_a_picture(False, 30, GUIDANCE)
    lines = [
        "| | seconds a picture | times faster |",
        "| --- | --- | --- |",
        f"| teacher, 30 steps, w = 3 | {slow:.5f} | 1 |",
    ]
    for calls in (4, 1):
        fast = seconds_a_picture(True, calls, 1.0)
        lines.append(f"| student, {calls} calls | {fast:.5f} | {slow / fast:.1f} |")
    one, three = peak_bytes(1), peak_bytes(3)
    lines += ["", "| roles on one backbone | peak, MiB | ratio |", "| --- | --- | --- |"]
    lines += [
        f"| one | {one / 2**20:.0f} | 1 |",
        f"| three: student, fake, teacher | {three / 2**20:.0f} | {three / one:.3f} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=VARIANTS)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(step_with(given.peak))
        return
    RESULTS.mkdir(exist_ok=True)
    name = "cost" if given.cost else "reuse" if given.reuse else "-".join(map(str, given.calls))
    with Terminal() as given.display:
        rows = {} if given.cost else reuse(given) if given.reuse else compare(given)
    text = cost() if given.cost else table(rows)
    (RESULTS / f"distillation_{name}.md").write_text(text)
    if rows:
        about = {"steps": given.steps, "seeds": given.seeds}
        (RESULTS / f"distillation_{name}.json").write_text(json.dumps(about | {"rows": rows}, indent=1))
    print(text)


if __name__ == "__main__":
    main()
