"""Tables of several runs, and their curves."""

import json
import statistics
from pathlib import Path


def numbers(folder: Path, label: str = "trained") -> dict[str, float]:
    """What an evaluation of a run says, one number each."""
    results = json.loads((folder / "evaluation" / label / "results.json").read_text())
    strict = results["scores"]["strict"]
    scores = {"strict": strict["overall"]["mean"]} | {tag: value["mean"] for tag, value in strict["tags"].items()}
    scores["recognizer"] = results["scores"]["recognizer"]["overall"]["mean"]
    return scores | {"frechet": results["frechet_distance"], "diversity": results["diversity"]}


def curve(folders: list[Path], *keys: str, window: int = 5) -> list[float]:
    """What runs logged at each step under the first of the keys that they have: the mean over runs of one length, and
    over the last `window` steps."""
    found = []
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        key = next(key for key in keys if any(key in line for line in lines))
        found.append([line[key] for line in lines if key in line])
    mean = [statistics.mean(values) for values in zip(*found, strict=True)]
    return [statistics.mean(mean[max(0, i + 1 - window) : i + 1]) for i in range(len(mean))]


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: means over seeds, and for the overall score the range."""
    columns = list(next(iter(rows.values()))[0])
    lines = ["| | " + " | ".join(c.replace("_", " ") for c in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, runs in rows.items():
        cells = []
        for column in columns:
            values = [each[column] for each in runs]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if column == "strict" and len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
