"""The contract between the one training loop and every paper: a method yields, the learner does the rest.

A *step* is one call of `collect`; it may hold several *updates*, one for each batch that it yields. Each `Loss` of a
batch is one backward pass, and only the weights of the network that it names receive its gradient.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from trimtab.config import Strict
from trimtab.roles import TRAINED


class MethodSettings(Strict):
    """What a recipe may say of a method; a paper's own settings are those of its subclass. The properties are what the
    rest of the house asks of any method."""

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return (TRAINED,)

    @property
    def frozen_roles(self) -> tuple[str, ...]:
        """Copies of the weights that no gradient trains, beside the reference."""
        return ()

    @property
    def result(self) -> str:
        """The role that is shown, evaluated and exported."""
        return TRAINED

    @property
    def sampler(self) -> str:
        """The role that draws rollouts."""
        return TRAINED

    @property
    def wants_pictures(self) -> bool:
        """Whether it learns from captioned pictures beside its samples."""
        return False

    @property
    def learns_from_pairs(self) -> bool:
        """Whether it learns from pictures that somebody preferred, in place of rewards."""
        return False


@dataclass(frozen=True)
class Loss:
    """One term of an update, already divided by the number of terms of its batch, so that the terms simply add up."""

    network: str  # whose weights this term may change
    value: Tensor  # scalar
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # detached scalars, means over samples; so is their log
    num_samples: int = 1  # that they are means of


class Stateful(Protocol):
    """Anything a resume needs: a nested dict of tensors and JSON scalars, out and in."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Method(Protocol):
    """One paper. The learner asks for `trained` once and for `state` at checkpoints; then, each step, it collects, asks
    for the losses of each batch and calls `after_step`. The run exports what has become of it."""

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        """The weights of each network that learns, by name: one optimizer for those of them that require grad."""

    def state(self) -> dict[str, Stateful]:
        """All else that a resume needs."""

    def collect(self, step: int) -> Iterable[Any]:
        """The batches of a step; each is one optimizer update."""

    def losses(self, batch: Any) -> Iterator[Loss]:
        """The terms of a batch; each is one backward pass, so only one graph is alive at a time."""

    def after_step(self, step: int) -> dict[str, float]:
        """Move the slow copies; returns what is worth a line in the log, under names that no loss has."""

    def export(self, folder: Path) -> None:
        """Write what was trained into a folder, as stock diffusers and PEFT load it."""
