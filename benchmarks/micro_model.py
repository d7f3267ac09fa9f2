"""What the built-in model can do before any post-training, by guidance and by number of steps, and pictures of it.

    python benchmarks/micro_model.py

Writes benchmarks/results/micro_model.{json,md} and docs/images/micro.png.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from trimtab import inference
from trimtab.cli import Terminal
from trimtab.worlds.blocks import TAGS

ROOT = Path(__file__).parents[1]
SETTINGS = [(1.0, 12), (2.0, 12), (3.0, 12), (4.0, 12), (3.0, 40)]  # guidance scale, steps
SHOWN = (3.0, 12)


def picture(folder: Path, file: Path, columns: int = 12) -> None:
    """The first pictures of the first prompts of each tag, right or wrong."""
    lines = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(len(TAGS), columns, figsize=(1.15 * columns, 1.45 * len(TAGS)), layout="constrained")
    for row, tag in zip(axes, TAGS, strict=True):
        shown = [line for line in lines if line["tag"] == tag and line["sibling"] == 0][:columns]
        row[0].set_ylabel(tag, fontsize=9)
        for axis, line in zip(row, shown, strict=False):
            axis.imshow(plt.imread(folder / line["file"]), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_title(
                line["prompt"].split(" of ", 1)[1].replace(" and ", "\n").replace(" of a ", " of\n"), fontsize=6
            )
            axis.set_xlabel(
                "right" if line["strict"] else "wrong", fontsize=7, color="green" if line["strict"] else "firebrick"
            )
    figure.savefig(file, dpi=110)


def main() -> None:
    results = {}
    for scale, steps in SETTINGS:
        with TemporaryDirectory() as folder, Terminal() as display:
            found = inference.evaluate_model(
                "micro",
                [],
                "blocks",
                Path(folder),
                display,
                guidance_scale=scale,
                num_inference_steps=steps,
                precision="bf16",
            )
            results[f"w = {scale:g}, {steps} steps"] = found
            if (scale, steps) == SHOWN:
                (ROOT / "docs" / "images").mkdir(parents=True, exist_ok=True)
                picture(Path(folder), ROOT / "docs" / "images" / "micro.png")
    lines = [
        "| strict | " + " | ".join(TAGS) + " | overall | official overall | Frechet | diversity |",
        "| --- |" + " --- |" * 10,
    ]
    for name, found in results.items():
        strict, official = found["scores"]["strict"], found["scores"]["official"]
        cells = [strict["tags"][tag]["mean"] for tag in TAGS]
        cells += [strict["overall"]["mean"], official["overall"]["mean"], found["frechet_distance"], found["diversity"]]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / "micro_model.json").write_text(json.dumps(results, indent=1))
    (folder / "micro_model.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
