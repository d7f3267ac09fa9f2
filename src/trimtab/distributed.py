"""The processes that share a run: how they start, which of them this one is, and what all have together."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from trimtab.errors import RunStopped, StoppedTogether, UserError

SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")  # as accelerate launch says it


@dataclass(frozen=True)
class Processes:
    """`number` processes, of which this one is the `rank`-th, from 0; alone unless told otherwise."""

    rank: int = 0
    number: int = 1
    gather: Callable[[Tensor], Tensor] | None = None  # tensors of one shape; needed where there are several

    @classmethod
    def of(cls, accelerator: Accelerator) -> Self:
        """Those of a launch; tensors may lie anywhere and travel by way of the accelerator's device."""
        if accelerator.num_processes == 1:
            return cls()

        def gather(x: Tensor) -> Tensor:
            return accelerator.gather(x.to(accelerator.device)).to(x.device)

        return cls(accelerator.process_index, accelerator.num_processes, gather)

    @property
    def mine(self) -> slice:
        """Which items of a list are this process' own: every `number`-th."""
        return slice(self.rank, None, self.number)

    def everybody(self, x: Tensor) -> Tensor:
        """x (N, ...) of all processes, one after the other; each must ask, with the same shape."""
        return x if self.gather is None else self.gather(x)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where one process can't go on (UserError, RunStopped) in here, all stop: StoppedTogether at the end of the
        block, which every process must reach. What is asked of `everybody` in here must come before what may fail."""
        failure = None
        try:
            yield
        except (UserError, RunStopped) as error:
            failure = error
        if self.number == 1 and failure is not None:
            raise failure
        if self.everybody(torch.tensor([float(failure is not None)])).any():
            raise StoppedTogether(str(failure or "another process had to stop, and says why")) from failure


ALONE = Processes()


def launched() -> Accelerator:
    """The processes that `accelerate launch` started: precision is the recipe's, and accumulation nobody's. UserError
    where the user's `accelerate config` shares a model out. One process may score for hours while others wait."""
    for name in SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(
                f"accelerate launch was asked for {name}, and here every process holds the whole model; give it "
                "--multi_gpu, or choose neither DeepSpeed nor FSDP nor Megatron-LM in `accelerate config`."
            )
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )


def num_processes() -> int:
    """How many torchrun or accelerate launch started, as they say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_one_process(what: str) -> None:
    """UserError where several processes were started for what each of them would do whole."""
    if num_processes() > 1:
        raise UserError(
            f"{what} is the work of one process, and {num_processes()} were started; run it without a launcher."
        )
