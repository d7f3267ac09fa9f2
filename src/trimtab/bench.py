"""How fast a recipe runs here, and where a training step's time and memory go."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from trimtab.distributed import launched
from trimtab.errors import UserError
from trimtab.inputs import PRETRAIN, check
from trimtab.learner import wait
from trimtab.pipelines import Pipeline
from trimtab.recipe import RunConfig
from trimtab.roles import TRAINED
from trimtab.wiring import Display, Run, build

REPEATS = 10


def bench(config: RunConfig, display: Display, num_steps: int) -> list[tuple[str, str]]:
    """Rows (what, value): the bare network, then `num_steps` real training steps after one that is not counted."""
    if config.method.name in PRETRAIN:
        raise UserError(f"{config.name} is a pre-training recipe; bench takes one that samples, such as crd-micro.")
    if "fake_warmup" in type(config.method).model_fields:  # it belongs to the first step, and may take hours
        config = config.model_copy(update={"method": config.method.model_copy(update={"fake_warmup": 0})})
    inputs = check(config)
    with TemporaryDirectory() as folder:
        run = build(config, Path(folder) / "run", launched(), inputs, display)
        forward, both = _network_rates(run.pipeline, config)
        for optimizer in run.learner.optimizers.values():
            optimizer.zero_grad()  # what was timed is no part of the first update
        if run.pipeline.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.pipeline.device)  # nor does it count as what a step takes
        spent = _time_calls(run.pipeline)
        totals = _totals(run, num_steps, spent)
    return [
        ("device", _device(run.pipeline.device)),
        ("network, forward", f"{forward:.0f} images/s"),
        ("network, forward and backward", f"{both:.0f} images/s"),
        *_step_rows(totals, spent, num_steps),
        ("peak memory", f"{_peak_bytes(run.pipeline.device) / 2**30:.2f} GiB"),
    ]


def _totals(run: Run, num_steps: int, spent: dict[str, float]) -> dict[str, float]:
    """Every metric summed over `num_steps` steps; a first one, which warms up, is left out, in `spent` as well."""
    totals: dict[str, float] = defaultdict(float)
    run.learner.num_steps = num_steps + 1
    for record in run.learner.run():
        run.display.progress("benchmark", record.step, num_steps + 1)
        if record.step == 1:
            spent.clear()
            continue
        for name, value in record.metrics.items():
            totals[name] += value
    return totals


def _step_rows(totals: dict[str, float], spent: dict[str, float], num_steps: int) -> list[tuple[str, str]]:
    seconds, network = totals["seconds/step"], sum(spent.values()) + totals["seconds/backward"]
    trained = totals["seconds/forward"] + totals["seconds/backward"]
    rows = [("step", f"{seconds / num_steps:.2f} s, {totals['images'] / num_steps:.0f} images")]
    if "seconds/sampling" in totals:
        rows += [
            ("rollout (sampling and decoding)", f"{totals['images'] / totals['seconds/sampling']:.0f} images/s"),
            ("rewards", f"{totals['images'] / totals['seconds/rewards']:.0f} images/s"),
        ]
    return [
        *rows,
        ("training", f"{totals['images'] / trained:.1f} images/s"),
        *((f"share of the step: {name}", f"{100 * value / seconds:.1f} %") for name, value in spent.items()),
        ("share of the step: backward", f"{100 * totals['seconds/backward'] / seconds:.1f} %"),
        ("share of the step in networks", f"{100 * network / seconds:.1f} %"),
    ]


def _network_rates(pipeline: Pipeline, config: RunConfig) -> tuple[float, float]:
    """Images per second of the trained role, without and with gradient, as large and as many as it is trained on."""
    size = config.training.train_batch_size
    shape = pipeline.latent_shape(config.model.resolution or pipeline.resolution)
    x, t = torch.randn(size, *shape, device=pipeline.device), torch.full((size,), 0.5, device=pipeline.device)
    condition = pipeline.encode([""]).expand(size)

    def forward() -> torch.Tensor:
        return pipeline.predict(x, t, condition, TRAINED).value

    with torch.no_grad():
        alone = _rate(forward, size, pipeline.device)
    both = _rate(lambda: forward().square().mean().backward(), size, pipeline.device)
    return alone, both


def _rate(call: Callable[[], Any], size: int, device: torch.device) -> float:
    call()
    wait(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        call()
    wait(device)
    return REPEATS * size / (time.perf_counter() - started)


def _time_calls(pipeline: Pipeline) -> dict[str, float]:
    """Make the pipeline count the seconds spent in its networks, by what they do."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, call: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            wait(pipeline.device)  # for what came before
            started = time.perf_counter()
            result = call(*args, **kwargs)
            wait(pipeline.device)
            spent[name] += time.perf_counter() - started
            return result

        return counted

    for name in ("predict", "decode", "encode"):
        setattr(pipeline, name, timed(name, getattr(pipeline, name)))
    return spent


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _peak_bytes(device: torch.device) -> int:
    """Of the accelerator where there is one, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
