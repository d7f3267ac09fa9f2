"""Soft tokens in a file: which model they fit, and an ordinary pipeline that uses them."""

import json
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from trimtab.errors import UserError
from trimtab.pipelines.soft_tokens import FILE, FORMAT, Injection, TokenBank, TokenSettings, sites


def load_soft_tokens(pipe: DiffusionPipeline, path: str | Path) -> None:
    """Let an ordinary diffusers pipeline use the tokens of a file (or of the folder that holds it), both branches of
    its guidance alike. A LoRA may be loaded beside them. UserError if they were made for another architecture."""
    network = _network(pipe)
    bank, settings = read_bank(network, Path(path))
    unload_soft_tokens(pipe)
    injection = Injection(network, settings)
    injection.bank = bank.to(network.device)
    network._trimtab_injection = injection


def unload_soft_tokens(pipe: DiffusionPipeline) -> None:
    """Take the tokens off again; nothing happens where there are none."""
    injection = _network(pipe).__dict__.pop("_trimtab_injection", None)
    if injection is not None:
        injection.remove()


def read_bank(network: nn.Module, path: Path) -> tuple[TokenBank, TokenSettings]:
    """The bank in a file, frozen, and its settings; UserError unless it was made for a network like this one."""
    path = path / FILE if path.is_dir() else path
    settings = check_file(network, path)
    state = load_file(path)
    num_signs, num_sites, num_tokens, width = state["base"].shape
    settings = replace(settings, num_tokens=num_tokens, separate_times=len(state["time"]) > 1)
    bank = TokenBank(num_signs, num_sites, width, settings).requires_grad_(False)
    bank.load_state_dict(state)
    return bank, settings


def check_file(network: nn.Module, path: Path) -> TokenSettings:
    """Where a file's tokens go; UserError unless they were made for a network like this one. Reads its header only."""
    about, own = metadata(path), type(network).__name__
    try:
        architecture, width, names = about["architecture"], int(about["width"]), json.loads(about["sites"])
        settings = TokenSettings(num_layers=int(about["num_layers"]), stages=tuple(json.loads(about["stages"])))
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        if shapes != json.loads(about["shapes"]):
            raise ValueError("tensors of other shapes than the header's")
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); fetch or export it again.") from error
    where = sites(network, settings) if own == architecture else None
    if where is None or where.width != width or list(where.names) != names:
        found = own if where is None else f"{own} of width {where.width} with other blocks"
        raise UserError(
            f"{path} holds soft tokens for a {architecture} of width {width}, and this model is a {found}; give theirs."
        )
    return settings


def is_ours(path: Path) -> bool:
    """Whether a file holds soft tokens, whatever its name."""
    try:
        return path.name == FILE or metadata(path) is not None
    except UserError:
        return False


def metadata(path: Path) -> dict[str, str]:
    """What a file says of its tokens; UserError if it holds none of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} can't be read as soft tokens ({error}); give a run's `export` folder.") from error
    if about.get("format") != FORMAT:
        raise UserError(f"{path} holds no soft tokens of trimtab's; give the `export` folder of a run that made some.")
    return about


def _network(pipe: DiffusionPipeline) -> nn.Module:
    network = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if network is None:
        raise UserError(f"a {type(pipe).__name__} has neither a transformer nor a unet to give soft tokens to.")
    return network
