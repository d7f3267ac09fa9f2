"""What a run writes down at every step: a line of metrics.jsonl, and the same for TensorBoard."""

import json
import math
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from trimtab.files import atomic_write
from trimtab.learner import Record


class MetricsLog:
    """The log from a step on: what an interrupted run wrote past its checkpoint is dropped."""

    def __init__(self, folder: Path, step: int):
        self.path, self.started = folder / "metrics.jsonl", time.perf_counter()
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        atomic_write(self.path, "".join(f"{line}\n" for line in kept))
        last = json.loads(kept[-1]) if kept else {}
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
        line = {"step": record.step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, record.step)

    def close(self) -> None:
        self.board.close()
