"""Aligning the built-in one-call student: DrPO beside its baselines, and what an update costs.

    python benchmarks/drpo.py [--steps 24] [--num-pictures 192] [--seeds 0 1 2] [--only NAME ...]
    python benchmarks/drpo.py --cost        # seconds and memory of an update as the reward model grows
    python benchmarks/drpo.py --memory      # 64 candidates in parts of 8 against 8 at once
    python benchmarks/drpo.py --spreads     # what candidates differ in as their noise comes near
    python benchmarks/drpo.py --splits [--steps 24] [--seeds 0 1 2] [--only NAME ...]  # trained prompts beside new ones
    python benchmarks/drpo.py --along RUN   # the same at each checkpoint of a run

All methods see the same number of generated pictures of the same prompts. Those that need no gradient rank by the exact
verdict ("gold"), and a second time by the recognizer ("proxy"); those that do climb the recognizer. Scores are of the
test prompts of blocks, 4 pictures each. Writes benchmarks/results/drpo*.{json,md} and docs/images/drpo-curves-*.png.
What is finished is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import torch
from accelerate import Accelerator
from tables import curve, numbers, table
from torch import Tensor, nn

from trimtab import checkpoint, groups, inputs, run, wiring
from trimtab.batch import Prompts
from trimtab.cli import Terminal
from trimtab.files import atomic_write
from trimtab.methods.draft import DRaFT, DRaFTConfig
from trimtab.methods.drpo import DrPO, DrPOConfig
from trimtab.pipelines import loading
from trimtab.pipelines.features import FeaturesConfig
from trimtab.recipe import RunConfig
from trimtab.rewards import build
from trimtab.rewards.composite import Composite
from trimtab.roles import LoraSettings
from trimtab.rollout import RolloutConfig, Rollouts
from trimtab.worlds.files import load_prompts

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
GOLD, PROXY = "rewards={geneval: 1.0, recognizer: 0.0}", "rewards={recognizer: 1.0, geneval: 0.0}"
APART = ["rollout.group_size=24", "rollout.noise_spread=1"]  # candidates as published: from independent noise
DRPO = "method={name: drpo, features: {kind: recognizer, keys: [evidence]}}"
VARIANTS = {  # name -> recipe and changes
    "DrPO, gold": ("drpo-micro-turbo", [GOLD, *APART, DRPO]),
    "DrPO masked, gold": ("drpo-micro-turbo", [GOLD, *APART, DRPO, "method.mask_self_anchor=true"]),
    "DrPO raw, gold": ("drpo-micro-turbo", [GOLD, *APART, DRPO, "method.field=raw"]),
    "DPO one-step, gold": ("drpo-micro-turbo", [GOLD, *APART, "method={name: dpo-one-step}"]),
    "DrPO, proxy": ("drpo-micro-turbo", [PROXY, *APART, DRPO]),
    "DRaFT, proxy": ("draft-micro-turbo", []),
    "DrPO near, gold": ("drpo-micro-turbo", [GOLD]),  # candidates near each other, masked, in the latents: the recipe
    "DrPO near unmasked, gold": ("drpo-micro-turbo", [GOLD, "method.mask_self_anchor=false"]),
    "DrPO near raw, gold": ("drpo-micro-turbo", [GOLD, "method.field=raw"]),
    "DrPO near, proxy": ("drpo-micro-turbo", [PROXY]),
    "DPO one-step near, gold": (
        "drpo-micro-turbo",
        [GOLD, "method={name: dpo-one-step, num_positive: 2, num_negative: 2}"],
    ),
    "DRaFT near, proxy": ("draft-micro-turbo", ["rollout.group_size=8", "rollout.noise_spread=0.15"]),
}


def configured(name: str, seed: int, given: argparse.Namespace, variant: str | None = None) -> RunConfig:
    """The run `name` as a variant; None: the one of that name."""
    recipe, changes = VARIANTS[variant or name]
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    size = run.load_config(recipe, changes).rollout.group_size
    overrides = [
        *changes,
        f"name=turbo-{slug}-seed{seed}",
        f"seed={seed}",
        f"output_dir={given.output}",
        f"rollout.num_prompts={given.num_pictures // size}",
        f"optimizer.learning_rate={given.learning_rate}",
        f"training.max_train_steps={given.steps}",
        f"training.checkpointing_steps={given.steps}",
        "training.num_validation_prompts=0",
    ]
    return run.load_config(recipe, overrides)


def trained(name: str, seed: int, given: argparse.Namespace) -> Path:
    """The run folder of one variant, trained to its end and evaluated."""
    return run.train(configured(name, seed, given), given.display, resume=True, command="drpo.py")


def untouched(name: str, seed: int, given: argparse.Namespace) -> Path:
    """A folder with what *micro-turbo* itself earns for the prompts and noises of every update of a variant."""
    kind, variant = ("near", "DrPO near, gold") if "near" in name else ("apart", "DrPO, gold")
    config = configured(f"untouched-{kind}-{given.steps}x{given.num_pictures}", seed, given, variant=variant)
    folder = Path(config.output_dir) / config.name
    if not (folder / "metrics.jsonl").is_file():
        built = wiring.build(config, folder, Accelerator(cpu=True), inputs.check(config), given.display)
        logs = [built.method.rollouts.collect(step, built.sampler)[1] for step in range(given.steps)]
        atomic_write(folder / "metrics.jsonl", "".join(json.dumps(log) + "\n" for log in logs))
    return folder


def picture(folders: dict[str, list[Path]], given: argparse.Namespace) -> None:
    """What training changes for the candidates of each update, in proxy and gold, and one against the other: who hacks
    goes right and down. Means over the last third of the updates."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    window = max(1, given.steps // 3)
    for name, runs in folders.items():
        base, gains = [untouched(name, seed, given) for seed in given.seeds], []
        for reward in ("recognizer", "geneval"):
            keys = f"rewards/{reward}/mean", f"watched/{reward}/mean"
            pairs = zip(curve(runs, *keys, window=window), curve(base, *keys, window=window), strict=True)
            gains.append([own - before for own, before in pairs][window - 1 :])
        updates = range(window, window + len(gains[0]))
        for axis, x, y in zip(axes, (updates, updates, gains[0]), (*gains, gains[1]), strict=True):
            axis.plot(x, y, label=name, linewidth=1.2)
        axes[2].plot(gains[0][-1:], gains[1][-1:], "o", color=axes[2].lines[-1].get_color(), markersize=5)
    axes[0].set(title="gain in proxy (recognizer)", xlabel="update")
    axes[1].set(title="gain in gold (exact verdict)", xlabel="update")
    axes[2].set(title="gold against proxy; dots are the ends", xlabel="gain in proxy", ylabel="gain in gold")
    for axis in axes:
        axis.axhline(0, color="gray", linewidth=0.6)
    axes[0].legend(fontsize=8)
    figure.savefig(RESULTS.parents[1] / "docs" / "images" / f"drpo-curves-{given.steps}.png", dpi=110)


def compare(given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    folders = {name: [trained(name, seed, given) for seed in given.seeds] for name in given.only or VARIANTS}
    picture(folders, given)
    rows = {"micro-turbo": [numbers(next(iter(folders.values()))[0], "base")]}
    return rows | {name: [numbers(folder) for folder in runs] for name, runs in folders.items()}


# ---- what near candidates differ in


def spreads() -> str:
    """By how much of their noise is their own: how far apart siblings' latents are, how the reward varies among them
    beside how it does from independent noise, and how many prompts have candidates of different scores."""
    pipeline, prompts = loading.load("micro-turbo", lora=None, precision=torch.bfloat16), load_prompts("blocks")
    rewards = build({"geneval": 1.0}, prompts)
    lines = [
        "| noise_spread | distance of siblings | variance among them | prompts with different scores |",
        "| --- | --- | --- | --- |",
    ]
    whole = None
    for spread in (1.0, 0.7, 0.5, 0.3, 0.2, 0.15, 0.1, 0.05):
        config = RolloutConfig(
            num_prompts=48, group_size=8, num_inference_steps=1, sample_batch_size=64, noise_spread=spread
        )
        rollouts = Rollouts(pipeline, prompts, rewards, config, pipeline.resolution, seed=0)
        logs, within = [], []
        for step in range(4):
            rollout, log = rollouts.collect(step, "default")
            logs.append(log)
            within.append(groups.centred(rollout.reward, rollout.group).square().mean().item())
        distance, equal = (statistics.mean(log[key] for log in logs) for key in ("diversity", "frac_reward_zero_std"))
        whole = whole or statistics.mean(within)
        share = statistics.mean(within) / whole
        lines.append(f"| {spread:g} | {distance:.2f} | {share:.2f} | {1 - equal:.2f} |")
    return "\n".join(lines) + "\n"


# ---- prompts that were trained on, and others


def splits(given: argparse.Namespace, file: Path) -> str:
    """The strict verdict on 136 prompts of each split, 16 pictures each, from noise that no run has seen; rows that
    `file` has of other variants are kept."""
    folders = {name: [trained(name, seed, given) for seed in given.seeds] for name in given.only or VARIANTS}
    models = {"micro-turbo": [[]]} | {name: [[str(run / "export")] for run in runs] for name, runs in folders.items()}
    head = ["| trained on | trained prompts | new prompts |", "| --- | --- | --- |"]
    lines = {line.split(" | ")[0]: line for line in (file.read_text().splitlines() if file.is_file() else [])[2:]}
    for name, adapters in models.items():
        cells = []
        for split in ("train", "test"):
            found = [verdict(each, split) for each in adapters]
            span = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{span}")
        lines[f"| {name}"] = f"| {name} | {' | '.join(cells)} |"
        print(lines[f"| {name}"], flush=True)
    return "\n".join([*head, *lines.values()]) + "\n"


def along(folder: Path, display: Terminal) -> str:
    """The same at each checkpoint that a run has kept."""
    config = run.load_config(str(folder / "config.yaml"))
    built = wiring.build(config, folder, Accelerator(cpu=True), inputs.check(config), display)
    lines = ["| updates | trained prompts | new prompts |", "| --- | --- | --- |"]
    for saved in sorted(folder.glob("checkpoint-*"), key=checkpoint.step_of):
        built.learner.load_state(checkpoint.load(saved))
        with TemporaryDirectory() as export:
            built.method.export(Path(export))
            cells = [f"{verdict([export], split):.3f}" for split in ("train", "test")]
        lines.append(f"| {built.learner.step} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def verdict(adapters: list[str], split: str) -> float:
    """The share of pictures that are right."""
    found = loading.check_adapters(adapters, "micro-turbo")
    pipeline, prompts = loading.load("micro-turbo", lora=None, adapters=found), load_prompts("blocks", split)
    config = RolloutConfig(num_prompts=136, group_size=16, num_inference_steps=1, sample_batch_size=64)
    rewards = build({"geneval-strict": 1.0}, prompts)
    _, log = Rollouts(pipeline, prompts, rewards, config, pipeline.resolution, seed=10_007).collect(0, "default")
    return log["reward"]


# ---- what an update costs


class Judge(nn.Module):
    """A convolutional reward of any size, with random weights: what it says is nothing, what it costs is real."""

    def __init__(self, width: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 8, stride=8), nn.SiLU()]
        for _ in range(4):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))
        self.requires_grad_(False)

    def with_gradient(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(images)[:, 0].float()

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        return torch.cat([self.with_gradient(part, prompts, metadata) for part in images.split(32)])


WIDTHS = {"0.3 M": 91, "10 M": 526, "100 M": 1666, "300 M": 2886}  # parameters: four layers of 9 width^2


def method(name: str, judge: nn.Module, group_size: int, batch_size: int, num_prompts: int = 1):
    """DrPO or DRaFT on micro-turbo, whole."""
    lora = LoraSettings(rank=32, lora_alpha=64)
    pipeline = loading.load("micro-turbo", lora=lora, precision=torch.bfloat16)
    prompts: Prompts = load_prompts("blocks")
    config = RolloutConfig(
        num_prompts=num_prompts, group_size=group_size, num_inference_steps=1, sample_batch_size=batch_size
    )
    rollouts = Rollouts(pipeline, prompts, Composite({"judge": (judge, 1.0)}), config, pipeline.resolution, seed=0)
    if name == "DRaFT":
        return DRaFT(DRaFTConfig(), pipeline, rollouts, batch_size)
    side = min(8, group_size // 3)
    settings = DrPOConfig(num_positive=side, num_negative=side, features=FeaturesConfig(kind="latents"))
    return DrPO(settings, pipeline, rollouts, batch_size)


def update(method, step: int) -> None:
    """All of an update but the optimizer's own step: draw, judge, forward, backward."""
    weights = list(method.trained()["default"].values())
    for batch in method.collect(step):
        for loss in method.losses(batch):
            loss.value.backward(inputs=weights)
    for weight in weights:
        weight.grad = None


def measured(name: str, width: int, group_size: int, batch_size: int, repeats: int) -> tuple[float, int]:
    """Median seconds of an update, and the peak bytes of a process of its own."""
    words = [sys.executable, __file__, "--one", name, *map(str, (width, group_size, batch_size, repeats))]
    seconds, peak = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(seconds), int(peak)


def one(name: str, width: int, group_size: int, batch_size: int, repeats: int) -> None:
    torch.manual_seed(0)
    built = method(name, Judge(width), group_size, batch_size)
    times = []
    for step in range(repeats + 1):
        started = time.perf_counter()
        update(built, step)
        times.append(time.perf_counter() - started)
    status = Path("/proc/self/status").read_text()  # not getrusage: a child starts with its parent's peak there
    print(statistics.median(times[1:] or [0.0]), 1024 * int(status.split("VmHWM:")[1].split()[0]))


def cost() -> str:
    lines = [
        "| parameters of the reward | DrPO, s | DRaFT, s | ratio | DrPO, MiB | DRaFT, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for label, width in WIDTHS.items():
        repeats = 5 if width < 1000 else 3
        (a, m), (b, n) = (measured(name, width, 24, 24, repeats) for name in ("DrPO", "DRaFT"))
        lines.append(f"| {label} | {a:.2f} | {b:.2f} | {b / a:.2f} | {m / 2**20:.0f} | {n / 2**20:.0f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def memory() -> str:
    """Beside the peak of the process, most of which is torch and weights, what an update adds to it."""
    lines = [
        "| candidates | in one pass | peak, MiB | of that, the update | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    first = None
    for size, batch_size in ((8, 8), (64, 8), (64, 64)):
        peak, before = (measured("DrPO", 91, size, batch_size, repeats)[1] for repeats in (3, -1))
        first = first or (peak, peak - before)
        lines.append(
            f"| {size} | {batch_size} | {peak / 2**20:.0f} | {(peak - before) / 2**20:.0f} | "
            f"{peak / first[0]:.2f}, update alone {(peak - before) / first[1]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--num-pictures", type=int, default=192, help="of an update: 24 or 8 candidates a prompt")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=VARIANTS)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--spreads", action="store_true")
    parser.add_argument("--splits", action="store_true")
    parser.add_argument("--along", type=Path, metavar="RUN")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one[0], *map(int, given.one[1:]))
        return
    RESULTS.mkdir(exist_ok=True)
    name = f"drpo_{given.steps}"
    parts = {"cost": cost, "memory": memory, "spreads": spreads}
    part = next((each for each in parts if getattr(given, each)), None)
    if part:
        name, text = f"drpo_{part}", parts[part]()
    elif given.along:
        with Terminal() as display:
            name, text = f"drpo_along_{given.along.name}", along(given.along, display)
    elif given.splits:
        with Terminal() as given.display:
            name = f"drpo_{given.steps}_splits"
            text = splits(given, RESULTS / f"{name}.md")
    else:
        with Terminal() as given.display:
            rows = compare(given)
        file, about = RESULTS / f"{name}.json", {"steps": given.steps, "num_pictures": given.num_pictures}
        before = json.loads(file.read_text()) if file.is_file() else about | {"rows": {}}
        kept = before["rows"] if about.items() <= before.items() else {}  # other variants of the same size
        text = table(kept | rows)
        file.write_text(json.dumps(about | {"rows": kept | rows}, indent=1))
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
