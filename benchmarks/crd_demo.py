"""The demo's result over several seeds: CRD on micro, sampled without guidance, against its base without and with it.

    python benchmarks/crd_demo.py [--seeds 0 1 2] [--steps N]
    python benchmarks/crd_demo.py --runs runs/crd-micro     # what `make demo` left

Trains the recipe crd-micro as it stands, or for N steps, and writes benchmarks/results/crd_demo.{json,md}, or
crd_demo_N.{json,md}; of the recipe as it stands also docs/images/before-after.png.
"""

import argparse
import json
import statistics
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from trimtab import run
from trimtab.cli import Terminal

RESULTS = Path(__file__).parent / "results"
LABELS = ("base", "base-guided", "trained")


def trained(seed: int, steps: int | None, output: Path) -> Path:
    overrides = [
        f"seed={seed}",
        f"name=crd-micro-seed{seed}" + (f"-steps{steps}" if steps else ""),
        f"output_dir={output}",
    ]
    overrides += [f"training.max_train_steps={steps}"] if steps else []
    with Terminal() as display:
        return run.train(run.load_config("crd-micro", overrides), display, resume=True, command="crd_demo.py")


def row(folder: Path, label: str) -> dict[str, float]:
    results = json.loads((folder / "evaluation" / label / "results.json").read_text())
    strict = results["scores"]["strict"]
    tags = {f"strict {tag}": value["mean"] for tag, value in strict["tags"].items()}
    return {
        "strict overall": strict["overall"]["mean"],
        **tags,
        "official overall": results["scores"]["official"]["overall"]["mean"],
        "recognizer overall": results["scores"]["recognizer"]["overall"]["mean"],
        "diversity": results["diversity"],
        "frechet distance": results["frechet_distance"],
    }


def picture(folder: Path, file: Path, number: int = 12) -> None:
    """The first picture of every n-th prompt, under each label; a mark says what the strict rules make of it."""
    rows = {
        label: [json.loads(line) for line in (folder / "evaluation" / label / "images.jsonl").read_text().splitlines()]
        for label in LABELS
    }
    firsts = [i for i, line in enumerate(rows["base"]) if line["sibling"] == 0]
    chosen = [firsts[(2 * k + 1) * len(firsts) // (2 * number)] for k in range(number)]
    figure, axes = plt.subplots(len(LABELS), number, figsize=(1.15 * number, 4.2), layout="constrained")
    for line, label in zip(axes, LABELS, strict=True):
        line[0].set_ylabel(label, fontsize=9)
        for axis, i in zip(line, chosen, strict=True):
            shown = rows[label][i]
            axis.imshow(plt.imread(folder / "evaluation" / label / shown["file"]), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(
                "right" if shown["strict"] else "wrong", fontsize=7, color="green" if shown["strict"] else "firebrick"
            )
            if label == LABELS[0]:
                axis.set_title(fill(shown["prompt"].split(" of ", 1)[1], 14), fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def seconds(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(line["elapsed_seconds"] for line in reversed(lines) if "elapsed_seconds" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--runs", type=Path, nargs="+", help="finished runs to tabulate, instead of training any")
    given = parser.parse_args()
    folders = given.runs or [trained(seed, given.steps, given.output) for seed in given.seeds]
    rows = {label: [row(folder, label) for folder in folders] for label in LABELS}
    times = [seconds(folder) for folder in folders]
    lines = ["| | base | base, guided | trained, mean | trained, each seed |", "| --- | --- | --- | --- | --- |"]
    for name in rows["base"][0]:
        base, guided, after = ([r[name] for r in rows[label]] for label in LABELS)
        each = ", ".join(f"{value:.3f}" for value in after)
        lines.append(f"| {name} | {base[0]:.3f} | {guided[0]:.3f} | {statistics.mean(after):.3f} | {each} |")
    lines.append(f"| training, seconds | | | {statistics.mean(times):.0f} | {', '.join(f'{t:.0f}' for t in times)} |")
    name = f"crd_demo_{given.steps}" if given.steps else "crd_demo"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"runs": [str(folder) for folder in folders], "rows": rows, "seconds": times}, indent=1)
    )
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if not given.steps:
        picture(folders[0], Path(__file__).parents[1] / "docs" / "images" / "before-after.png")


if __name__ == "__main__":
    main()
