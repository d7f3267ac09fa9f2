"""The only training loop. It owns the backward passes, clipping, the optimizers and their learning rate.

Over several processes it averages gradients itself, once an update. A process may have fewer terms than another, or
none, as where a reward failed for its pictures: nobody waits for a backward pass that does not come.

It knows `method.py` and no method. It yields a `Record` after each step; whoever drives it logs, evaluates and saves.
A gradient lands only where a `Loss` says (`inputs=`). All noise is seeded by step, so what `state()` holds is enough
to go on bit for bit.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from trimtab.distributed import Processes
from trimtab.method import Method
from trimtab.optimizer import OptimizerConfig, adamw, lr_factor, rate_of

logger = logging.getLogger(__name__)

BUCKET = 2**24  # elements: 64 MiB of float32


@dataclass(frozen=True)
class Record:
    """What one finished step has to say; `step` counts from 1."""

    step: int
    metrics: dict[str, float]


class Learner:
    """Runs a method for `num_steps` steps. Every process must start from the same weights."""

    def __init__(self, method: Method, accelerator: Accelerator, config: OptimizerConfig, num_steps: int):
        self.method, self.accelerator, self.config, self.num_steps = method, accelerator, config, num_steps
        self.step = self.updates = 0
        self.moved = False  # whether anything has been updated since the last whole step
        self.idle = False  # whether there has been a step that had nothing to learn from
        self.parameters = {name: _learning(name, weights) for name, weights in method.trained().items()}
        self.optimizers = {name: adamw(config, parameters.values()) for name, parameters in self.parameters.items()}

    def run(self) -> Iterator[Record]:
        """Train from the current step to the last, yielding after each; the state may be saved at every yield."""
        while self.step < self.num_steps:
            started = time.perf_counter()
            log = defaultdict(list)
            for batch in self._timed(partial(self.method.collect, self.step), "collect", log):
                self._update(batch, log)
            log |= {name: [value] for name, value in self.method.after_step(self.step).items()}
            self.step += 1
            if not self.moved and not self.idle:
                logger.warning("step %d: nothing to learn from, so no weight moved; later ones are not told", self.step)
            self.idle |= not self.moved
            self.moved = False
            yield Record(self.step, self._summary(log, time.perf_counter() - started))

    def state(self) -> dict[str, Any]:
        """Everything that a resume needs, as a nested dict of tensors and JSON scalars."""
        return {
            "step": self.step,
            "updates": self.updates,
            "networks": {
                name: {key: p.detach() for key, p in group.items()} for name, group in self.parameters.items()
            },
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "method": {name: part.state_dict() for name, part in self.method.state().items()},
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.step, self.updates = state["step"], state["updates"]
        for name, group in self.parameters.items():
            for key, parameter in group.items():
                parameter.copy_(state["networks"][name][key])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        for name, part in self.method.state().items():
            part.load_state_dict(state["method"][name])

    def _update(self, batch: Any, log: dict[str, list]) -> None:
        """One optimizer update of every network that the batch's losses name."""
        totals: dict[str, Tensor] = {}
        with Processes.of(self.accelerator).together():
            for loss in self._timed(partial(self.method.losses, batch), "forward", log):
                started = time.perf_counter()
                loss.value.backward(inputs=list(self.parameters[loss.network].values()))
                wait(self.accelerator.device)
                log["seconds/backward"].append(time.perf_counter() - started)
                totals[loss.network] = totals.get(loss.network, 0) + loss.value.detach()
                for name, value in loss.metrics.items():
                    log[name].append((value, loss.num_samples))
        agreed = {name: self._agreed(name, totals.get(name)) for name in self.parameters}
        for name, total in agreed.items():
            if total is not None:
                self._move(name, total, log)
        moved = any(total is not None for total in agreed.values())
        self.updates += moved
        self.moved |= moved

    def _agreed(self, network: str, total: Tensor | None) -> Tensor | None:
        """The mean of the processes' losses, their gradients averaged, too; None if no process has a term."""
        if self.accelerator.num_processes == 1:
            return total
        has, value = float(total is not None), 0.0 if total is None else float(total)
        terms, value = self._reduced(torch.tensor([has, value], device=self.accelerator.device))
        if not terms:
            return None
        for bucket in _buckets(self.parameters[network].values()):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            averaged = self._reduced(torch.cat([gradient.flatten() for gradient in gradients]))
            parts = averaged.split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        return value

    def _reduced(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, "mean")

    def _move(self, network: str, total: Tensor, log: dict[str, list]) -> None:
        """Clip and step one network's optimizer; a gradient that is not finite is dropped, and counted."""
        optimizer, parameters = self.optimizers[network], list(self.parameters[network].values())
        rate = rate_of(self.config, network) * lr_factor(self.config, self.step, self.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            optimizer.step()
        else:
            logger.warning("step %d: the gradient of %s is not finite; this update is skipped", self.step + 1, network)
        optimizer.zero_grad(set_to_none=True)
        suffix = "" if len(self.optimizers) == 1 else f"/{network}"
        log[f"loss{suffix}"].append(total)
        log[f"grad_norm{suffix}"].append(norm)
        log[f"skipped_updates{suffix}"].append(float(not finite))
        log[f"lr{suffix}"].append(rate)

    def _timed(self, make: Callable[[], Iterable[Any]], phase: str, log: dict[str, list]) -> Iterator[Any]:
        """The items, with the seconds that making each took, all of them at once or one by one."""
        started = time.perf_counter()
        iterator = iter(make())
        while (item := next(iterator, None)) is not None:
            wait(self.accelerator.device)
            log[f"seconds/{phase}"].append(time.perf_counter() - started)
            yield item
            started = time.perf_counter()
        wait(self.accelerator.device)
        log[f"seconds/{phase}"].append(time.perf_counter() - started)

    def _summary(self, log: dict[str, list], seconds: float) -> dict[str, float]:
        """Times and counts are summed over the step, everything else is averaged over its samples."""
        summed = ("seconds/", "skipped_updates", "failed/")
        metrics = {}
        for name, values in log.items():
            pairs = [value if isinstance(value, tuple) else (value, 1) for value in values]
            pairs = [(float(value), number) for value, number in pairs]
            metrics[name] = sum(v for v, _ in pairs) if name.startswith(summed) else _mean(name, pairs)
        metrics |= {"seconds/step": seconds}
        if self.accelerator.num_processes > 1:
            metrics = _of_all(gather_object([metrics]))
        return metrics | {"updates": self.updates}


def wait(device: torch.device) -> None:
    """Until an accelerator has done what it was told: else a clock would show when it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mean(name: str, pairs: list[tuple[float, int]]) -> float:
    """Of values with their numbers of samples; of a reward, over those parts of the step that it applies to."""
    if name == "reward" or name.startswith(("rewards/", "watched/")):
        pairs = [(value, number) for value, number in pairs if not math.isnan(value)] or [(math.nan, 1)]
    return sum(value * number for value, number in pairs) / sum(number for _, number in pairs)


def _of_all(metrics: list[dict[str, float]]) -> dict[str, float]:
    """What processes say of one step as one: what each counts of its own is added, of times the longest counts, and all
    else is averaged."""
    joined = {}
    for name in dict.fromkeys(chain(*metrics)):
        values = [each[name] for each in metrics if name in each]
        if name in ("images", "pictures_left_out") or name.startswith("failed/"):
            joined[name] = sum(values)
        elif name.startswith("seconds/"):
            joined[name] = max(values)
        else:
            known = [value for value in values if not math.isnan(value)]
            joined[name] = sum(known) / len(known) if known else math.nan
    return joined


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type in lists of BUCKET elements or a little more, which go over the wire together."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and (sum(p.numel() for p in bucket) >= BUCKET or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    yield bucket


def _learning(network: str, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    parameters = {name: p for name, p in weights.items() if p.requires_grad}
    if not parameters:
        raise ValueError(f"nothing to train: no parameter of {network!r} requires grad")
    return parameters
