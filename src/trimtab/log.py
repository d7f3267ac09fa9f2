"""What a run writes down: a line of metrics.jsonl for every step and every evaluation, and steps for TensorBoard."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from trimtab.files import atomic_write
from trimtab.learner import Record


class MetricsLog:
    """The log from a step on: what an interrupted run wrote past its checkpoint is dropped."""

    def __init__(self, folder: Path, step: int):
        self.path, self.started = folder / "metrics.jsonl", time.perf_counter()
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _step(line) <= step]
        atomic_write(self.path, "".join(f"{line}\n" for line in kept))
        steps = [line for line in map(json.loads, kept) if "elapsed_seconds" in line]
        last = steps[-1] if steps else {}
        self.elapsed, self.images = last.get("elapsed_seconds", 0.0), last.get("images", 0.0)
        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, record: Record) -> None:
        self.images += record.metrics.get("images", 0.0)
        elapsed = self.elapsed + time.perf_counter() - self.started
        totals = {"elapsed_seconds": elapsed}
        if "images" in record.metrics:
            rate = record.metrics["images"] / record.metrics["seconds/step"]
            totals |= {"images": self.images, "images_per_second": rate}  # so far, no longer of the step
        metrics = record.metrics | totals
        append(self.path, record.step, metrics)
        for name, value in metrics.items():
            self.board.add_scalar(name, value, record.step)

    def close(self) -> None:
        self.board.close()


def _step(line: str) -> float:
    """The step that a line is of; one that was torn by a kill, or is no line of ours, is of none."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def append(path: Path, step: int, metrics: Mapping[str, float]) -> None:
    """One more line for a step. JSON has no NaN: what could not be told is null."""
    line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
