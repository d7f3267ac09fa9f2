"""Small files that change a model: LoRAs, which are merged into it, and soft tokens, which are put beside its text."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from safetensors import SafetensorError, safe_open
from torch import nn

from trimtab.errors import UserError
from trimtab.pipelines import token_files

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings in a file's header


@dataclass(frozen=True)
class Adapters:
    """Files that fit a model."""

    loras: tuple[Path, ...] = ()
    tokens: Path | None = None


def find(names: Sequence[str], network: nn.Module, model: str) -> Adapters:
    """The files in the folders (or the files) `names`; UserError unless all fit `network`, which may have no weights.

    Reads headers only. There may be any number of LoRAs, and one bank of soft tokens. Of one that says that it was
    trained on another model than `model` but fits, a warning: the same model may go by a name and by a folder.
    """
    loras, tokens = [], []
    for name in names:
        for file in files_of(name):
            if token_files.is_ours(file):
                token_files.check_file(network, file)
                tokens.append(file)
            else:
                _check_lora(file, network, model, name)
                loras.append(file)
            _check_scheduler(file.parent / "scheduler")
            base = _base(file)
            if base not in (None, model):
                logger.warning("adapter %r was trained on %r and is put on %r", name, base, model)
    if len(tokens) > 1:
        raise UserError(f"{tokens[0]} and {tokens[1]} are both soft tokens, and a model takes one bank; give one.")
    places = [file.resolve() for file in loras]  # one file may be called in several ways
    twice = {file for file, place in zip(loras, places, strict=True) if places.count(place) > 1}
    if twice:
        raise UserError(f"{min(twice)} was given twice, and would count twice; give it once.")
    return Adapters(tuple(loras), tokens[0] if tokens else None)


def merge(pipe: DiffusionPipeline, loras: Sequence[Path]) -> None:
    """Add LoRAs to the pipeline's weights, for good. That of a student brings its scheduler."""
    for file in loras:
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        if (file.parent / "scheduler").is_dir():
            kind = LCMScheduler if hasattr(pipe, "unet") else FlowMatchEulerDiscreteScheduler
            pipe.scheduler = kind.from_pretrained(file.parent / "scheduler")


def files_of(name: str) -> list[Path]:
    """The file `name`, or those in the folder `name`; UserError where there is none."""
    path = Path(name)
    if path.is_file():
        return [path]
    if not name or not path.exists():
        raise UserError(
            f"adapter folder {name!r} does not exist; give the `export` folder of a run, by its path from {Path.cwd()}."
        )
    found = files_in(path)
    if not found:
        hint = f"did you mean {path / 'export'}?" if files_in(path / "export") else "give the `export` folder of a run."
        raise UserError(f"adapter {name!r} has no {LORA_FILE} and no {token_files.FILE}; {hint}")
    return found


def files_in(folder: Path) -> list[Path]:
    """What a folder holds of a LoRA and soft tokens."""
    return [file for file in (folder / LORA_FILE, folder / token_files.FILE) if file.is_file()]


def _check_lora(file: Path, network: nn.Module, model: str, name: str) -> None:
    """UserError unless there are A and B of each layer that a LoRA changes, as wide as that layer."""
    own = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    layers: dict[str, list[str]] = {"A": [], "B": []}
    for key, shape in _shapes(file).items():
        module, _, part = key.partition(".")[2].rpartition(".lora_")
        weight = own.get(f"{module}.weight")
        side = 1 if part.startswith("A") else 0
        layers["A" if side else "B"].append(module)
        if weight is None or not len(weight) > side < len(shape) or weight[side] != shape[side]:
            found = "is not in it" if weight is None else f"is {weight} there"
            raise UserError(
                f"adapter {name!r} belongs to another model than {model!r}: it changes {module}, which {found}; "
                "give the model that it was trained on."
            )
    if not layers["A"] or sorted(layers["A"]) != sorted(layers["B"]):
        raise UserError(f"{file} lacks matrices of its LoRA; it is damaged, fetch or export it again.")


def _check_scheduler(folder: Path) -> None:
    """UserError where a student's own scheduler is there and cannot be read."""
    file = folder / "scheduler_config.json"
    if folder.is_dir():
        try:
            json.loads(file.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{file} cannot be read ({error}); it is damaged, export it again.") from error


def _base(file: Path) -> str | None:
    """The model that an adapter says it was trained on."""
    with safe_open(file, framework="pt") as tensors:
        header = tensors.metadata() or {}
    try:
        settings = dict(json.loads(header.get(LORA_METADATA, "{}")))
    except (ValueError, TypeError) as error:
        raise UserError(f"the header of {file} is damaged ({error}); fetch or export it again.") from error
    named = (value for key, value in settings.items() if key.endswith(".base_model_name_or_path"))
    return header.get("base_model") or next(named, None)


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file} is no safetensors file ({error}); it is damaged, fetch or export it again.") from error
