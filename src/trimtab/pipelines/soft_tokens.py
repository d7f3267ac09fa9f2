"""Soft tokens: a few learned vectors beside the text tokens of a frozen network (SoftREPA, AGSM).

At site k and timestep t in [0, 1000], a bank of sign z (0 for captions that fit, 1 for those that do not) gives

    s_z(k, t) = base[z, k] + time[z or 0, floor(min(t, 999) / 10), k]      m vectors; the time vector is one for all m

    network   sites                                          where                                width D
    MMDiT     the first K blocks, those next to the input    after the text, and cut off again    of the hidden states
    UNet      one, for every cross-attention of its stages   after the first text token           of the text tokens

Neither network gives its text a position, so only the number of tokens matters, not their place. They are put there by
hooks: no forward pass is copied, and a network without them computes what it always did, bit for bit.

`SoftTokens` stands where `Roles` stands: a role is a bank, and `ref` is the network without tokens. `load_soft_tokens`
gives an ordinary diffusers pipeline the tokens of a file, `unload_soft_tokens` takes them off.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.errors import UserError
from trimtab.files import atomic_write
from trimtab.roles import REFERENCE

FILE = "soft_tokens.safetensors"
FORMAT = "trimtab-soft-tokens-1"
NUM_BUCKETS = 100  # of 10 timesteps each
POSITIVE, NEGATIVE = 0, 1  # signs: for captions that fit the picture, and for those that do not
INIT_STD = 0.02

Stage = Literal["down", "mid", "up"]


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class TokenSettings:
    """How many tokens, and where; the defaults are those of AGSM."""

    num_tokens: int = Field(default=4, gt=0)
    num_layers: int = Field(default=5, gt=0)  # blocks of an MMDiT
    stages: tuple[Stage, ...] = Field(default=("down", "mid"), min_length=1)  # of a UNet
    separate_times: bool = False  # a time table for each sign, which is what 1.8 M parameters on SD3 would need


class TokenBank(nn.Module):
    """The learned numbers: base (Z, K, m, D) and time (1 or Z, 100, K, D), N(0, 0.02^2) at first."""

    def __init__(self, num_signs: int, num_sites: int, width: int, settings: TokenSettings, seed: int = 0):
        super().__init__()
        num_tables = num_signs if settings.separate_times else 1
        self.base = nn.Parameter(torch.empty(num_signs, num_sites, settings.num_tokens, width))
        self.time = nn.Parameter(torch.empty(num_tables, NUM_BUCKETS, num_sites, width))
        self.draw(seed)

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Fresh numbers, the same for a seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in (self.base, self.time):
            parameter.copy_(INIT_STD * torch.randn(parameter.shape, generator=generator))

    def forward(self, site: int, timestep: Tensor, sign: Tensor) -> Tensor:
        """Tokens (N, m, D) for timesteps (N,) in [0, 1000] and signs (N,)."""
        bucket = timestep.clamp(0, 999).long() // (1000 // NUM_BUCKETS)
        table = sign if len(self.time) > 1 else torch.zeros_like(sign)
        return self.base[sign, site] + self.time[table, bucket, site][:, None]


@dataclass(frozen=True)
class _Call:
    """One call of the network: whose tokens its sites get, for which rows."""

    bank: TokenBank
    timestep: Tensor  # (N,)
    sign: Tensor  # (N,)

    def tokens(self, site: int, like: Tensor) -> Tensor:
        return self.bank(site, self.timestep, self.sign).to(like.dtype)


class Injection:
    """The hooks on a network. Each of its calls inserts the tokens of `bank`, with the sign of each row; None: none.

    `sign` is () or (N,); where the network is called with a multiple of N rows, as classifier-free guidance does, the
    signs repeat.
    """

    def __init__(self, network: nn.Module, settings: TokenSettings):
        self.sites = sites(network, settings)
        self.signature = inspect.signature(network.forward)
        self.bank: TokenBank | None = None
        self.sign = torch.tensor(POSITIVE)
        self._call: _Call | None = None
        self._handles = [network.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for number, module in enumerate(self.sites.modules):
            before = _Inserted(self, number if self.sites.own else 0, self.sites.after)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            if self.sites.own:
                self._handles.append(module.register_forward_hook(self._cut))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def using(self, bank: TokenBank | None) -> Iterator[None]:
        """Calls of the network in here use this bank."""
        outer, self.bank = self.bank, bank
        try:
            yield
        finally:
            self.bank = outer

    def checkpoint(self, segment: Callable, *args) -> Any:
        """Gradient checkpointing whose recomputation inserts what the forward did, whatever was called since."""
        call = self._call
        return checkpoint(
            segment,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), self._recalling(call)),
        )

    @contextmanager
    def _recalling(self, call: _Call | None) -> Iterator[None]:
        outer, self._call = self._call, call
        try:
            yield
        finally:
            self._call = outer

    def _begin(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the timesteps and signs of this call's rows."""
        if self.bank is None:
            self._call = None
            return
        given = self.signature.bind(*args, **kwargs).arguments
        rows = given[next(iter(self.signature.parameters))]  # the noisy sample comes first in every diffusers network
        timestep = torch.as_tensor(given["timestep"], device=rows.device).expand(len(rows))
        if not self.bank.base.requires_grad:
            self.bank.to(rows.device)  # an ordinary pipeline may be moved, or offloaded, after its tokens were loaded
        sign = self.sign.to(rows.device).reshape(-1)
        if len(rows) % len(sign):
            raise ValueError(f"{len(sign)} signs do not fit {len(rows)} rows; give one, or one a row")
        self._call = _Call(self.bank, timestep, sign.repeat(len(rows) // len(sign)))

    def _cut(self, block: nn.Module, args: tuple, output: tuple) -> tuple:
        """The text stream without its soft tokens; the last block of an MMDiT has no text left."""
        text, pixels = output
        if self._call is None or text is None:
            return output
        return text[:, : -self._call.bank.base.shape[2]], pixels


@dataclass(frozen=True)
class _Inserted:
    """A forward pre-hook: the text with this site's tokens after its first `after` tokens (None: after the last)."""

    injection: Injection
    site: int
    after: int | None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.injection._call
        if call is None:
            return None
        if "encoder_hidden_states" in kwargs:
            return args, kwargs | {"encoder_hidden_states": self._joined(call, kwargs["encoder_hidden_states"])}
        return (args[0], self._joined(call, args[1]), *args[2:]), kwargs  # as gradient checkpointing calls a block

    def _joined(self, call: _Call, text: Tensor) -> Tensor:
        place = text.shape[1] if self.after is None else self.after
        return torch.cat([text[:, :place], call.tokens(self.site, text), text[:, place:]], dim=1)


@dataclass(frozen=True)
class Sites:
    """Where a network takes tokens."""

    modules: tuple[nn.Module, ...]
    names: tuple[str, ...]
    width: int
    after: int | None  # text tokens that stand before them; None: all
    own: bool  # each module has tokens of its own and a text stream that must be cut again

    @property
    def num_sites(self) -> int:
        return len(self.modules) if self.own else 1


def sites(network: nn.Module, settings: TokenSettings) -> Sites:
    """The sites of a network; UserError for an architecture that has none, or has too few blocks."""
    kind = type(network).__name__
    if kind not in ARCHITECTURES:
        raise UserError(f"soft tokens are made for {' and '.join(ARCHITECTURES)}, and this model is a {kind}.")
    return ARCHITECTURES[kind](network, settings)


def _mmdit(network: nn.Module, settings: TokenSettings) -> Sites:
    blocks = network.transformer_blocks
    if settings.num_layers > len(blocks):
        raise UserError(f"{settings.num_layers} layers of soft tokens do not fit a model of {len(blocks)} blocks.")
    names = tuple(f"transformer_blocks.{k}" for k in range(settings.num_layers))
    return Sites(tuple(blocks[: settings.num_layers]), names, network.inner_dim, after=None, own=True)


def _unet(network: nn.Module, settings: TokenSettings) -> Sites:
    stages = {"down": "down_blocks.", "mid": "mid_block", "up": "up_blocks."}
    chosen = tuple(stages[stage] for stage in settings.stages)
    found = {
        name: module
        for name, module in network.named_modules()
        if name.startswith(chosen) and getattr(module, "has_cross_attention", False)
    }
    if not found:
        raise UserError(f"this UNet has no cross-attention in its stages {', '.join(settings.stages)}.")
    return Sites(tuple(found.values()), tuple(found), network.config.cross_attention_dim, after=1, own=False)


ARCHITECTURES = {"SD3Transformer2DModel": _mmdit, "UNet2DConditionModel": _unet}


class SoftTokens:
    """Banks of tokens as roles of one frozen network. The first role learns; the others start as its copies."""

    def __init__(
        self,
        network: nn.Module,
        settings: TokenSettings,
        *,
        num_signs: int,
        roles: Sequence[str] = ("default",),
        seed: int = 0,
        about: Mapping[str, str] | None = None,
    ):
        self.network, self.settings, self.about = network, settings, dict(about or {})
        self.injection = Injection(network.requires_grad_(False), settings)
        where = self.injection.sites
        self.banks = {role: TokenBank(num_signs, where.num_sites, where.width, settings, seed) for role in roles}
        for role, bank in self.banks.items():
            bank.to(next(network.parameters()).device).requires_grad_(role == roles[0])

    def __call__(self, role: str, /, *args, **kwargs) -> Any:
        """The network's forward with that role's tokens."""
        if role not in self.banks and role != REFERENCE:
            raise ValueError(f"role {role!r} does not exist; the roles are {', '.join((*self.banks, REFERENCE))}")
        with self.injection.using(self.banks.get(role)):
            return self.network(*args, **kwargs)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """A role's learned numbers, by name."""
        return dict(self.banks[role].named_parameters())

    @torch.no_grad()
    def start_at(self, token: Tensor) -> None:
        """Make every base token of every role this one (D,)."""
        for bank in self.banks.values():
            bank.base[:] = token

    @contextmanager
    def signs(self, sign: Tensor) -> Iterator[None]:
        """In here, rows get the tokens of these signs (N,); outside all are POSITIVE."""
        outer, self.injection.sign = self.injection.sign, sign
        try:
            yield
        finally:
            self.injection.sign = outer

    @torch.no_grad()
    def blend(self, target: str, source: str, decay: float) -> None:
        """In place: target <- decay target + (1 - decay) source; only tokens move, never the network."""
        for old, new in zip(self.banks[target].parameters(), self.banks[source].parameters(), strict=True):
            old.lerp_(new, 1 - decay)

    @torch.no_grad()
    def norms(self, role: str) -> dict[str, float]:
        """Mean length of a role's base tokens, by sign, and of its time vectors: a climb without end is a bad sign."""
        bank = self.banks[role]
        lengths = dict(zip(("positive", "negative"), bank.base.norm(dim=-1).flatten(1).mean(1).tolist(), strict=False))
        lengths["time"] = bank.time.norm(dim=-1).mean().item()
        return {f"token_norm/{name}": value for name, value in lengths.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {role: dict(bank.state_dict()) for role, bank in self.banks.items()}

    def load_state_dict(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        for role, bank in self.banks.items():
            bank.load_state_dict(states[role])

    def enable_gradient_checkpointing(self) -> None:
        """Trade compute for memory in the frozen network, through which the tokens' gradient passes."""
        self.network.enable_gradient_checkpointing(gradient_checkpointing_func=self.injection.checkpoint)

    def export(self, folder: Path, role: str, about: Mapping[str, str]) -> None:
        """Write a role's bank as `soft_tokens.safetensors`; its metadata says what it fits, and `about` where from."""
        where = self.injection.sites
        metadata = (
            self.about
            | dict(about)
            | {
                "format": FORMAT,
                "architecture": type(self.network).__name__,
                "width": str(where.width),
                "sites": json.dumps(where.names),
                "num_layers": str(self.settings.num_layers),
                "stages": json.dumps(self.settings.stages),
            }
        )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.banks[role].state_dict().items()}
        metadata["shapes"] = json.dumps({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        atomic_write(folder / FILE, save(tensors, metadata))
