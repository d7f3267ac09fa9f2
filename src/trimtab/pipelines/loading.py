"""From a name to a pipeline. Whatever can be refused is refused before a weight is read."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from trimtab.errors import UserError
from trimtab.pipelines import Pipeline, unet
from trimtab.pipelines.sd import SD
from trimtab.pipelines.sd3 import SD3
from trimtab.pipelines.sdxl import SDXL
from trimtab.roles import LoraSettings, Roles

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
BUILT_IN = {"micro": ASSETS / "micro"}
FACES = {
    "StableDiffusion3Pipeline": SD3,
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,  # the same parts, saved after another use
    "StableDiffusionXLPipeline": SDXL,
}
LORA_FILE = "pytorch_lora_weights.safetensors"


def resolve(model: str) -> str:
    """The folder or hub id that a model's name stands for; UserError unless it is a pipeline that can be trained."""
    path = str(BUILT_IN.get(model, model))
    index = _index(path, model)
    kind = index.get("_class_name")
    if kind not in FACES:
        raise UserError(f"model {model!r} is a {kind}; trimtab supports {', '.join(FACES)}.")
    if FACES[kind].NETWORK == "unet":
        scheduler = index.get("scheduler") or [None]
        unet.check_scheduler(scheduler[-1], _json(path, "scheduler/scheduler_config.json", model), model)
    return path


def check_resolution(model: str, resolution: int | None) -> None:
    """UserError unless the model can draw a square picture that many pixels a side. None is its own resolution."""
    if resolution is None:
        return
    path = resolve(model)
    network = _json(path, f"{FACES[_index(path, model)['_class_name']].NETWORK}/config.json", model)
    vae = _json(path, "vae/config.json", model)
    step, most = 2 ** (len(vae["block_out_channels"]) - 1), math.inf
    if "block_out_channels" in network:  # a UNet, which halves its input between any two of its blocks
        step *= 2 ** (len(network["block_out_channels"]) - 1)
    else:
        step *= network.get("patch_size", 1)
        most = network.get("pos_embed_max_size", 1024) * step
    if resolution % step or resolution > most:
        limit = "" if most == math.inf else f" up to {most}"
        raise UserError(
            f"resolution {resolution} does not suit model {model!r}; give a multiple of {step} pixels{limit}."
        )


def _index(path: str, model: str) -> dict:
    return _json(path, "model_index.json", model)


def _json(path: str, name: str, model: str) -> dict:
    """What one of a model's JSON files says."""
    file = Path(path) / name
    if not file.is_file():
        if Path(path).exists():
            raise UserError(f"model folder {model!r} has no {name}; give a folder saved by a diffusers pipeline.")
        try:
            file = Path(hf_hub_download(path, name))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            names = ", ".join(BUILT_IN)
            raise UserError(
                f"model {model!r} is no built-in model ({names}), no folder, and not to be had from the hub "
                f"({type(error).__name__}); check the name, or log in with `hf auth login`."
            ) from error
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON ({error}); the model folder is damaged, fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object; the model folder is damaged, fetch it again.")
    return content


def load(
    model: str,
    *,
    lora: LoraSettings | None,
    frozen: Sequence[str] = (),
    precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Pipeline:
    """A pipeline with the roles `default`, those of `frozen`, and `ref`. Under LoRA the backbone is in `precision`;
    weights that train are float32. A LoRA without target modules gets those of the pipeline's face."""
    face, pipe = _stock(model, precision, precision if lora else torch.float32)
    if lora is not None and lora.target_modules is None:
        lora = replace(lora, target_modules=face.TARGETS)
    pipe.to(device)
    network = getattr(pipe, face.NETWORK)
    return face(pipe, Roles(network, trained=("default",), frozen=frozen, lora=lora, seed=seed), precision)


def load_for_sampling(
    model: str, adapter: Path | None, *, precision: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Pipeline:
    """A pipeline with one role, `default`: the model itself, with a LoRA, if given, merged into it by diffusers."""
    face, pipe = _stock(model, precision, torch.float32 if adapter else precision)
    if adapter is not None:
        pipe.load_lora_weights(adapter.parent, weight_name=adapter.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.to(device)
    network = getattr(pipe, face.NETWORK).to(precision)
    return face(pipe, _Fixed(network), precision)


@dataclass(frozen=True)
class _Fixed:
    """Stands where `Roles` does in a pipeline that only samples: one role, and no copy of the network for `ref`."""

    network: torch.nn.Module

    def __call__(self, role: str, /, *args, **kwargs) -> Any:
        return self.network(*args, **kwargs)


def _stock(model: str, precision: torch.dtype, network_dtype: torch.dtype) -> tuple[type, DiffusionPipeline]:
    """The face for a model, and its diffusers pipeline, frozen."""
    path = resolve(model)
    face = FACES[_index(path, model)["_class_name"]]
    dtypes = {"default": precision, face.NETWORK: network_dtype, "vae": torch.float32}
    pipe = face.PIPELINE.from_pretrained(path, dtype=dtypes)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return face, pipe


def check_adapter(adapter: str, model: str) -> Path:
    """The LoRA file in the folder `adapter`; UserError unless it fits the model. Reads names and shapes, no weights."""
    folder = Path(adapter)
    file = folder if folder.is_file() else folder / LORA_FILE
    if not file.is_file():
        raise UserError(f"adapter {adapter!r} has no {LORA_FILE}; give the `export` folder of a run.")
    path = resolve(model)
    own = _shapes_of_network(path, FACES[_index(path, model)["_class_name"]].NETWORK)
    if own is None:  # on the hub: diffusers itself will say
        return file
    for name, shape in _shapes(file).items():
        module, _, part = name.split(".", 1)[1].rpartition(".lora_")
        weight = own.get(f"{module}.weight")
        side = 1 if part.startswith("A") else 0
        if weight is None or weight[side] != shape[side]:
            found = "is not in it" if weight is None else f"is {tuple(weight)} there"
            raise UserError(
                f"adapter {adapter!r} belongs to another model than {model!r}: it changes {module}, which {found}; "
                "give the model that it was trained on."
            )
    return file


def _shapes_of_network(path: str, network: str) -> dict[str, list[int]] | None:
    files = sorted((Path(path) / network).glob("*.safetensors"))
    return {name: shape for file in files for name, shape in _shapes(file).items()} if files else None


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file} is no safetensors file ({error}); it is damaged, fetch or export it again.") from error
