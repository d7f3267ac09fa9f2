"""Named weight sets (roles) over one network; the role is an argument of each forward: `roles("old", x_t, t, ...)`.

With LoRA a role is a PEFT adapter on one shared backbone, W_role = W + (lora_alpha / rank) B_role A_role, and `ref` is
W alone. In full fine-tuning a role is a copy of the network, and `ref` the copy that nothing changes. Nobody swaps
weights: each role has tensors of its own, so no pending backward and no cached cast ever meets another role's.

Two facts of PEFT 0.21 shape the code. `set_adapter` also sets `requires_grad`; but a layer keeps the very list of names
that it is given, so all layers are given one list, once, and to change the role is to change that list. And a
checkpointed segment recomputes with the role active in *backward*; so each remembers its own (`context_fn`).

Callers open one autocast region per forward: within a region the first cast of a trained weight is used to the end,
whatever an optimizer or `blend` has done to the weight since.
"""

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.errors import UserError

TRAINED = "default"  # the role that learns, where one does; PEFT's own name for an adapter
REFERENCE = "ref"  # the pre-trained weights: always there, never trained, never saved


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LoraSettings:
    """A LoRA's shape; the defaults are CRD's for SD3.5-M. A starts as N(0, 1/rank^2) and B as 0. A target module is the
    end of the names of Linear modules.

    No target modules means those of the pipeline, which `loading.load` fills in.
    """

    rank: int = Field(default=32, gt=0)
    lora_alpha: int = Field(default=64, gt=0)
    target_modules: tuple[str, ...] | None = Field(default=None, min_length=1)

    def peft_config(self) -> LoraConfig:
        """The same in PEFT's terms, as `adapter_config.json` wants it."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=0.0,  # else two roles with equal weights would predict differently
            target_modules=list(self.target_modules),
            init_lora_weights="gaussian",
        )


class Roles:
    """Weight sets of one network, told apart by name; all start equal to the first trained one, bit for bit.

    With `lora=None` the first trained role is `network` itself and every other role a copy. `network` called directly
    runs the first trained role. It must be on its device already. The names are the caller's; `ref` is taken.
    `seed` draws the LoRA's A; the global generators are left alone. UserError if a LoRA target does not exist.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        trained: Sequence[str] = ("default",),
        frozen: Sequence[str] = (),
        lora: LoraSettings | None,
        seed: int = 0,
    ):
        self.network = network
        self.trained, self.frozen = tuple(trained), tuple(frozen)
        self.names = (*self.trained, *self.frozen)  # the roles that have a state
        _check_names(self.trained, self.names)
        self.lora = lora
        self._merged: str | None = None  # the role whose LoRA is in the network's own weights just now
        self._layers: dict[str, LoraLayer] = {}  # module name -> PEFT layer; stays empty without LoRA
        self._active = [self.trained[0]]  # the one list from which every PEFT layer reads its adapter
        if lora is None:
            copies = _copies(network, self.trained, self.frozen)
            self._doors = {role: _Door(module, nullcontext()) for role, module in copies.items()}
        else:
            self._layers = _inject(network, self.names, lora)
            self._doors = {role: _Door(network, _Switch(self._active, [role])) for role in self.names}
            self._doors[REFERENCE] = _Door(network, _Switch(self._active, []))
            self._start_adapters(lora, seed)

    def __call__(self, role: str, /, *args, **kwargs) -> Any:
        """The network's forward with that role's weights. Opens no autocast and no no_grad: both are the caller's."""
        if role not in self._doors:
            raise ValueError(f"role {role!r} does not exist; the roles are {', '.join(self._doors)}")
        door = self._doors[role]
        self._check_untouched()
        if self._merged is not None:
            door = self._door_of_merged(role)
        if door.network.training != self.network.training:  # a copy; roles are compared, so they must agree on this
            door.network.train(self.network.training)
        return door(*args, **kwargs)

    def module(self, role: str) -> nn.Module:
        """The network that holds the role's weights. With LoRA all roles share one."""
        return self._doors[role].network

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's own parameters, by names that are the same for every role (LoRA: `<module>.lora_A.weight`)."""
        return {name: tensor for name, tensor in self._tensors(role).items() if isinstance(tensor, nn.Parameter)}

    @torch.no_grad()
    def blend(self, target: str, source: str, decay: float) -> None:
        """In place: target <- decay target + (1 - decay) source, in float32; A and B separately. Buffers are copied.

        Decay 0 copies and 1 changes nothing, both bit for bit, and equal weights stay equal. A bfloat16 target rounds
        away steps below 2^-9 of a weight, so a full network that needs slow copies should be float32.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; it must lie in [0, 1], where 0 copies and 1 keeps")
        old, new = self._tensors(target), self._tensors(source)
        if decay == 1:
            return
        for name, tensor in old.items():
            if decay == 0 or not isinstance(tensor, nn.Parameter):
                tensor.copy_(new[name])
            else:
                tensor.lerp_(new[name], 1 - decay)  # for half types too computed in float32 and rounded once

    @contextmanager
    def merged(self, role: str) -> Iterator[None]:
        """In here this role alone may be called, without gradient, at the cost of the bare network.

        Its LoRA is added to the weights, and rounded to their type: what is sampled so is that close to the role, and
        no closer. Afterwards the weights are back bit for bit. Without LoRA, and for `ref`, nothing happens.
        """
        if not self._layers or role == REFERENCE:
            yield
            return
        own = {name: layer.get_base_layer().weight for name, layer in self._layers.items()}
        saved = {name: weight.detach().clone() for name, weight in own.items()}
        self._merged = role
        try:
            with torch.no_grad():
                for name, layer in self._layers.items():
                    own[name].copy_(own[name].float() + layer.get_delta_weight(role).float())
            yield
        finally:
            self._merged = None
            with torch.no_grad():
                for name, weight in own.items():
                    weight.copy_(saved[name])

    @contextmanager
    def scaled(self, role: str, factor: float) -> Iterator[None]:
        """In here a role's LoRA counts `factor` times, for predictions without gradient; 0 is the bare network."""
        if not self._layers:
            raise ValueError(f"role {role!r} is a whole network, not a LoRA; only a LoRA can be scaled")
        before = {name: layer.scaling[role] for name, layer in self._layers.items()}
        try:
            with torch.no_grad():
                for name, layer in self._layers.items():
                    layer.scaling[role] = before[name] * factor
                yield
        finally:
            for name, layer in self._layers.items():
                layer.scaling[role] = before[name]

    def state_dict(self, roles: Sequence[str] | None = None) -> dict[str, dict[str, Tensor]]:
        """{role: {name: tensor}} of these roles, or of all but `ref`. The tensors are the living ones, as in torch."""
        roles = self.names if roles is None else roles
        return {role: {name: own.detach() for name, own in self._tensors(role).items()} for role in roles}

    @torch.no_grad()
    def load_state_dict(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set exactly what `state_dict()` gave; UserError, and nothing changed, if names or shapes differ."""
        own = self.state_dict()
        _check_same_names("the saved roles", states, own)
        for role, tensors in own.items():
            _check_fits(role, states[role], tensors)
        for role, tensors in own.items():
            for name, tensor in tensors.items():
                tensor.copy_(states[role][name])

    def lora_state(self, role: str) -> dict[str, Tensor]:
        """One role as PEFT names it, relative to the network: what `adapter_model.safetensors` holds, prefix apart."""
        if self.lora is None:
            raise ValueError(f"role {role!r} is a whole network, not a LoRA; save it with state_dict")
        return self.state_dict([role])[role]

    def enable_gradient_checkpointing(self) -> None:
        """Trade compute for memory wherever a gradient may pass, by way of diffusers; UserError for other networks."""
        if not hasattr(self.network, "enable_gradient_checkpointing"):
            raise UserError(f"{type(self.network).__name__} has no gradient checkpointing; turn it off in the recipe.")
        for network in {door.network for door in self._doors.values()}:  # `ref`, too: features are differentiated
            network.enable_gradient_checkpointing(gradient_checkpointing_func=self._checkpoint)

    def _door_of_merged(self, role: str) -> "_Door":
        if role != self._merged or torch.is_grad_enabled():
            raise RuntimeError(f"role {self._merged!r} is merged: only it can be called, and without gradient")
        return self._doors[REFERENCE]  # no adapter on top

    def _tensors(self, role: str) -> dict[str, Tensor]:
        """A role's parameters and saved buffers, asked anew because `.to(device)` replaces buffers."""
        if role not in self.names:
            raise ValueError(f"role {role!r} has no weights to read or change; those of {', '.join(self.names)} have")
        if self.lora is None:
            return _own_tensors(self._doors[role].network)
        return {
            f"{name}.{part}.weight": getattr(layer, part)[role].weight
            for name, layer in self._layers.items()
            for part in ("lora_A", "lora_B")
        }

    @torch.no_grad()
    def _start_adapters(self, lora: LoraSettings, seed: int) -> None:
        """Draw the first role (on the CPU in float32: the same everywhere), copy it to the others, share the list."""
        first, *others = self.names
        generator = torch.Generator().manual_seed(seed)
        for layer in self._layers.values():
            start = torch.empty(lora.rank, layer.in_features, device="cpu")
            nn.init.normal_(start, std=1 / lora.rank, generator=generator)
            layer.lora_A[first].weight.copy_(start)
            nn.init.zeros_(layer.lora_B[first].weight)
        for role in others:
            self.blend(role, first, 0)
        for layer in self._layers.values():
            layer.set_adapter(self._active)
            layer.set_requires_grad(self.trained, True)
            layer.set_requires_grad(self.frozen, False)

    def _check_untouched(self) -> None:
        """RuntimeError if somebody else chose the adapter. One layer tells, for such calls reach them all."""
        layer = next(iter(self._layers.values()), None)
        if layer is not None and (layer.active_adapter is not self._active or layer.disable_adapters):
            raise RuntimeError("set_adapter or disable_adapters was called on the network; leave the adapter to Roles")

    def _checkpoint(self, segment: Callable, *args) -> Any:
        """Gradient checkpointing whose recomputation runs with the role of the forward, whichever is active by then."""
        recompute = _Switch(self._active, self._active[:])
        return checkpoint(
            segment, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), recompute)
        )


class _Switch:
    """Inside it, the layers that read the list `active` find `adapters` there. Nests, and may be entered again."""

    def __init__(self, active: list[str], adapters: list[str]):
        self.active, self.adapters = active, adapters
        self.outer: list[list[str]] = []

    def __enter__(self) -> None:
        self.outer.append(self.active[:])
        self.active[:] = self.adapters

    def __exit__(self, *_) -> None:
        self.active[:] = self.outer.pop()


@dataclasses.dataclass(frozen=True)
class _Door:
    """One role's way into the network."""

    network: nn.Module
    switch: AbstractContextManager

    def __call__(self, *args, **kwargs) -> Any:
        with self.switch:
            return self.network(*args, **kwargs)


def _copies(network: nn.Module, trained: Sequence[str], frozen: Sequence[str]) -> dict[str, nn.Module]:
    """A network per role. Whole modules, because functional_call's weights are gone when checkpointing recomputes."""
    networks = {trained[0]: network} | {role: copy.deepcopy(network) for role in (*trained[1:], *frozen, REFERENCE)}
    for role, module in networks.items():
        module.requires_grad_(role in trained)
    return networks


def _inject(network: nn.Module, roles: Sequence[str], lora: LoraSettings) -> dict[str, LoraLayer]:
    """Put one adapter per role into the network, float32 at least; its own weights are frozen."""
    if lora.target_modules is None:
        raise ValueError("a LoRA without target modules was given; name some, or let loading.load take the pipeline's")
    check_targets(network, lora.target_modules)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # PEFT draws values, which are not used
        tuner = LoraModel(network, {roles[0]: lora.peft_config()}, roles[0])
        for role in roles[1:]:
            tuner.peft_config[role] = lora.peft_config()
            tuner.inject_adapter(network, role)
    for role in roles:
        cast_adapter_dtype(network, role)
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers; unlike in `state_dict`, a tied tensor comes once, so nothing is blended twice."""
    saved = module.state_dict()
    return {name: own for name, own in chain(module.named_parameters(), module.named_buffers()) if name in saved}


def _check_names(trained: Sequence[str], names: Sequence[str]) -> None:
    if not trained:
        raise ValueError("no trained role was given; name at least one")
    if len(set(names)) < len(names) or REFERENCE in names:
        raise ValueError(
            f"roles {', '.join(names)}: a name may come once, and {REFERENCE!r} is the pre-trained network"
        )


def check_targets(network: nn.Module, targets: Iterable[str]) -> None:
    """UserError unless each target ends the name of a Linear module, and of nothing else."""
    modules = dict(network.named_modules())
    if any(isinstance(module, BaseTunerLayer) for module in modules.values()):
        raise UserError(f"this {type(network).__name__} already carries adapters; fuse or unload them first.")
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    for target in targets:
        hits = {name for name in modules if name == target or name.endswith(f".{target}")}
        if not hits or hits - linear:
            found = f"names {min(hits - linear)}, which is not a Linear" if hits else "names no module"
            known = ", ".join(sorted({_suffix(name) for name in linear}))
            raise UserError(f"LoRA target {target!r} {found}; choose from {known}, or a longer end of a Linear's name.")


def _suffix(name: str) -> str:
    """The last part of a module's name that says something: `to_q`, and `to_out.0` rather than `0`."""
    parts = name.split(".")
    start = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[start:])


def _check_fits(role: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    _check_same_names(f"the saved weights of role {role!r}", given, own)
    for name, tensor in own.items():
        shape, dtype = given[name].shape, given[name].dtype
        if shape != tensor.shape or torch.promote_types(dtype, tensor.dtype) != tensor.dtype:
            raise UserError(
                f"the saved weights of role {role!r} hold {name} as {tuple(shape)} {dtype}, and this network has "
                f"{tuple(tensor.shape)} {tensor.dtype}; load them with the settings they were saved with."
            )


def _check_same_names(what: str, given: Collection[str], expected: Collection[str]) -> None:
    missing, unexpected = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or unexpected:
        raise UserError(
            f"{what} do not fit: missing {_few(missing)}, unexpected {_few(unexpected)}; "
            "load them with the settings they were saved with."
        )


def _few(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
