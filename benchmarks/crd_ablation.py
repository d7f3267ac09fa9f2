"""Which parts of CRD matter on the built-in model, when the reward is the learned, hackable proxy.

    python benchmarks/crd_ablation.py [--steps 30] [--seeds 0] [--variants full no-anchor ...]

Trains CRD whole, CRD without each of its parts, and DiffusionNFT, from the same model with the same seeds, prompts,
samples and updates. The recognizer (proxy) is the training reward; the strict exact verdict (gold) is only watched.
Writes benchmarks/results/crd_ablation.{json,md} and docs/images/crd-ablation.png. A run that is finished already is not
run again.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tables import curve

from trimtab import run
from trimtab.cli import Terminal

RESULTS = Path(__file__).parent / "results"
COMMON = ["rewards={recognizer: 1.0, geneval-strict: 0}", "evaluation.base_guidance_scale=null"]
VARIANTS = {
    "full": [],
    "no-centring": ["method.centring=none"],
    "no-decoupled-sampler": ["method.sampling_model_decay=null"],
    "no-anchor": ["method.kl_beta=0"],
    "no-cfg-in-anchor": ["method.kl_cfg=1"],
    "no-adaptive-strength": ["method.reward_adaptive_kl=off"],
    "diffusion-nft": [
        "method={name: diffusion-nft, num_train_times: 2, updates_per_step: 2, time_sampling: stratified}",
    ],
}
COLUMNS = ("proxy", "gold", "official", "drift", "diversity", "frechet_distance")


def trained(variant: str, seed: int, steps: int, output: Path) -> Path:
    """The run folder of one variant, trained to its end."""
    overrides = [
        *COMMON,
        *VARIANTS[variant],
        f"name=ablation-{variant}-seed{seed}",
        f"seed={seed}",
        f"output_dir={output}",
        f"training.max_train_steps={steps}",
        f"training.checkpointing_steps={steps}",
        f"training.validation_steps={steps}",
    ]
    with Terminal() as display:
        return run.train(run.load_config("crd-micro", overrides), display, resume=True, command="crd_ablation.py")


def numbers(folder: Path, label: str = "trained") -> dict[str, float]:
    results = json.loads((folder / "evaluation" / label / "results.json").read_text())
    names = {"proxy": "recognizer", "gold": "strict", "official": "official"}
    scores = {column: results["scores"][score]["overall"]["mean"] for column, score in names.items()}
    return scores | {key: results.get(key, 0.0) for key in ("drift", "diversity", "frechet_distance")}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: the mean over seeds, and the range where there are several."""
    lines = ["| run | " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for name, runs in rows.items():
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in runs]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(folders: dict[str, list[Path]], file: Path) -> None:
    keys = {"rewards/recognizer/mean": "proxy (trained on)", "watched/geneval-strict/mean": "gold (strict)"}
    keys |= {"diversity": "diversity of siblings' latents"}
    figure, axes = plt.subplots(1, len(keys), figsize=(5 * len(keys), 4), layout="constrained")
    for axis, (key, title) in zip(axes, keys.items(), strict=True):
        for name, runs in folders.items():
            values = curve(runs, key)
            axis.plot(range(1, len(values) + 1), values, label=name, linewidth=2 if name == "full" else 1.2)
        axis.set(title=title, xlabel="step (256 images each)")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("runs"))
    given = parser.parse_args()
    folders = {v: [trained(v, seed, given.steps, given.output) for seed in given.seeds] for v in given.variants}
    rows = {"base": [numbers(folders[given.variants[0]][0], "base")]}
    rows |= {variant: [numbers(folder) for folder in runs] for variant, runs in folders.items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "crd_ablation.json").write_text(
        json.dumps({"steps": given.steps, "seeds": given.seeds, "rows": rows}, indent=1)
    )
    (RESULTS / "crd_ablation.md").write_text(table(rows))
    picture(folders, RESULTS.parents[1] / "docs" / "images" / "crd-ablation.png")
    print(table(rows))


if __name__ == "__main__":
    main()
