"""From a name to a pipeline. Whatever can be refused is refused before a weight is read."""

import difflib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from trimtab.errors import UserError
from trimtab.pipelines import Pipeline
from trimtab.pipelines.adapters import Adapters, files_in, files_of, find, merge
from trimtab.pipelines.face import Face
from trimtab.pipelines.few_step import NUM_CALLS
from trimtab.pipelines.flux import Flux
from trimtab.pipelines.sd import SD
from trimtab.pipelines.sd3 import SD3
from trimtab.pipelines.sdxl import SDXL
from trimtab.pipelines.soft_tokens import SoftTokens, TokenSettings, sites
from trimtab.pipelines.token_files import load_soft_tokens
from trimtab.process import NUM_TIMESTEPS
from trimtab.roles import LoraSettings, Roles
from trimtab.solvers import vp_time_grid

logger = logging.getLogger(__name__)

SCHEDULER = "scheduler/scheduler_config.json"
ASSETS = Path(__file__).parents[1] / "assets"
BUILT_IN = {"micro": ASSETS / "micro", "micro-turbo": ASSETS / "micro"}
STUDENTS = {"micro-turbo": ASSETS / "micro-turbo"}  # the network and the scheduler that make students of them
FEW_STEP_NAMES = ("turbo", "schnell")  # of published transformers, whose schedulers are those of their teachers
FACES = {
    "StableDiffusion3Pipeline": SD3,
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,  # the same parts, saved after another use
    "StableDiffusionXLPipeline": SDXL,
    "FluxPipeline": Flux,
}


def resolve(model: str) -> str:
    """The folder or hub id that a model's name stands for; UserError unless it is a pipeline that can be trained."""
    path = str(BUILT_IN.get(model, model))
    index = _index(path, model)
    kind = index.get("_class_name")
    if kind not in FACES:
        raise UserError(f"model {model!r} is a {kind}; trimtab supports {', '.join(FACES)}.")
    scheduler = index.get("scheduler") or [None]
    FACES[kind].check_scheduler(scheduler[-1], _json(path, SCHEDULER, model), model)
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
        step *= network.get("patch_size", 1) * FACES[_index(path, model)["_class_name"]].PACKED
        most = network.get("pos_embed_max_size", 1024) * step
    if resolution % step or resolution > most:
        limit = "" if most == math.inf else f" up to {most}"
        raise UserError(
            f"resolution {resolution} does not suit model {model!r}; give a multiple of {step} pixels{limit}."
        )


def resolution(model: str) -> int:
    """The side in pixels that a model was made for. Loads no weights."""
    path = resolve(model)
    face = FACES[_index(path, model)["_class_name"]]
    size = _json(path, f"{face.NETWORK}/config.json", model).get("sample_size", 128)  # FLUX's has none
    return size * 2 ** (len(_json(path, "vae/config.json", model)["block_out_channels"]) - 1)


def _index(path: str, model: str) -> dict:
    return _json(path, "model_index.json", model)


def _json(path: str, name: str, model: str) -> dict:
    """What one of a model's JSON files says."""
    file = Path(path) / name
    if not file.is_file():
        file = _from_hub(path, name, model)
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON ({error}); the model folder is damaged, fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object; the model folder is damaged, fetch it again.")
    return content


def _from_hub(path: str, name: str, model: str) -> Path:
    """One of a model's files from the hub, which is asked for what it could have only."""
    if Path(path).exists():
        raise UserError(f"model folder {model!r} has no {name}; {_instead_of(Path(path))}.")
    if "/" not in path:  # every pipeline on the hub has an owner
        near = difflib.get_close_matches(model, BUILT_IN, n=1)
        hint = f"did you mean {near[0]}?" if near else "a model on the hub is named owner/name."
        raise UserError(f"model {model!r} is no built-in model ({', '.join(BUILT_IN)}) and no folder here; {hint}")
    if path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1:
        raise UserError(
            f"model folder {model!r} does not exist; give its path from {Path.cwd()}, or owner/name on the hub."
        )
    try:
        return Path(hf_hub_download(path, name))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"model {model!r} is no folder here, and the hub could not be reached; check the network, or give a folder."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"model {model!r} is no folder here, and not to be had from the hub ({type(error).__name__}); check the "
            "name, or log in with `hf auth login`."
        ) from error


def _instead_of(folder: Path) -> str:
    """What to give in place of a folder that is no pipeline."""
    export = folder / "export"
    if (export / "model_index.json").is_file():
        return f"give {export}"
    held = next(filter(files_in, (folder, export)), None)
    if held is None:
        return "give a folder saved by a diffusers pipeline"
    return f"{held} is an adapter, given beside its model, as in `trimtab evaluate micro --adapter {held}`"


def load(
    model: str,
    *,
    lora: LoraSettings | None,
    adapters: Adapters = Adapters(),  # noqa: B008
    trained: Sequence[str] = ("default",),
    frozen: Sequence[str] = (),
    precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Pipeline:
    """A pipeline with the roles of `trained` and `frozen`, and `ref`. Under LoRA the backbone is in `precision`;
    weights that train are float32. A LoRA without target modules gets those of the pipeline's face. LoRAs among the
    `adapters` become part of the weights first; soft tokens stand beside the text of every role."""
    face, pipe = _stock(model, precision, precision if lora else torch.float32, adapters.loras, device)
    if adapters.tokens is not None:
        load_soft_tokens(pipe, adapters.tokens)
    if lora is not None and lora.target_modules is None:
        lora = replace(lora, target_modules=face.TARGETS)
    network = getattr(pipe, face.NETWORK)
    return face(pipe, Roles(network, trained=trained, frozen=frozen, lora=lora, seed=seed), precision)


def load_with_tokens(
    model: str,
    settings: TokenSettings,
    *,
    num_signs: int,
    roles: Sequence[str],
    merged: Sequence[Path] = (),
    precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Pipeline:
    """A pipeline whose roles are banks of soft tokens on a frozen network, and `ref`, the network without any."""
    face, pipe = _stock(model, precision, precision, merged, device)
    about = {"base_model": model, "merged": json.dumps([str(file) for file in merged])}
    tokens = SoftTokens(getattr(pipe, face.NETWORK), settings, num_signs=num_signs, roles=roles, seed=seed, about=about)
    return face(pipe, tokens, precision)


def load_for_sampling(
    model: str,
    adapters: Adapters = Adapters(),  # noqa: B008
    *,
    precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Pipeline:
    """A pipeline with one role, `default`: the model itself, with LoRAs merged into it by diffusers, and its tokens."""
    face, pipe = _stock(model, precision, precision, adapters.loras, device)
    if adapters.tokens is not None:
        load_soft_tokens(pipe, adapters.tokens)
    return face(pipe, _Fixed(getattr(pipe, face.NETWORK)), precision)


@dataclass(frozen=True)
class _Fixed:
    """Stands where `Roles` does in a pipeline that only samples: one role, and no copy of the network for `ref`."""

    network: torch.nn.Module

    def __call__(self, role: str, /, *args, **kwargs) -> Any:
        return self.network(*args, **kwargs)


def _stock(
    model: str,
    precision: torch.dtype,
    network_dtype: torch.dtype,
    merged: Sequence[Path],
    device: torch.device | str,
) -> tuple[type[Face], DiffusionPipeline]:
    """The face for a model, and its diffusers pipeline, frozen, with LoRAs merged in float32."""
    path = resolve(model)
    face = FACES[_index(path, model)["_class_name"]]
    dtypes = {"default": precision, face.NETWORK: torch.float32 if merged else network_dtype, "vae": torch.float32}
    try:
        pipe = face.PIPELINE.from_pretrained(path, dtype=dtypes, **_students_own(model, dtypes[face.NETWORK]))
    except (OSError, ValueError, KeyError, SafetensorError) as error:  # what diffusers and transformers raise by turns
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {model!r} cannot be loaded ({type(error).__name__}: {cause}); it is damaged or not whole, fetch or "
            "export it again."
        ) from error
    pipe.register_to_config(_name_or_path=model)  # what exports call their base, not where it lies on this machine
    pipe.vae.to(memory_format=torch.channels_last)  # its convolutions are faster so
    merge(pipe, merged)
    if merged and network_dtype != torch.float32:
        getattr(pipe, face.NETWORK).to(network_dtype)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    face.prepare(getattr(pipe, face.NETWORK))
    return face, pipe.to(device)


def _students_own(model: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a built-in student has in place of its teacher's: the network, and a scheduler that knows its calls."""
    if model not in STUDENTS:
        return {}
    return {
        "transformer": SD3Transformer2DModel.from_pretrained(STUDENTS[model] / "transformer", dtype=dtype),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(STUDENTS[model] / "scheduler"),
    }


def check_adapters(adapters: Sequence[str], model: str) -> Adapters:
    """The files of the adapters' folders; UserError unless they fit the model. Loads no weights."""
    for name in adapters:
        files_of(name)  # what is not there is told before the hub is asked
    return find(adapters, skeleton(model), model) if adapters else Adapters()


def check_calls(model: str, *numbers: int | None) -> None:
    """UserError for more calls than the model's table of noise has rows; a rectified flow takes any number."""
    path = resolve(model)
    if FACES[_index(path, model)["_class_name"]].NETWORK != "unet":
        return
    config = _json(path, SCHEDULER, model)
    size, spacing = config.get("num_train_timesteps", NUM_TIMESTEPS), config.get("timestep_spacing", "leading")
    leading = spacing == "leading" and config.get("_class_name") != "LCMScheduler"
    for number in filter(None, numbers):
        try:
            vp_time_grid(number, size, "leading" if leading else "trailing", config.get("steps_offset", 0))
        except ValueError as error:
            raise UserError(f"{number} calls of model {model!r} are asked for; {error}: give fewer.") from error


def check_many_steps(model: str, adapters: Adapters, method: str) -> None:
    """UserError for a model that is a few-step student, by itself or by a LoRA: it can't teach one, and what trains a
    model at all its times would undo it."""
    found = _few_step(model, adapters)
    if found is not None:
        student, calls = found
        other = ", or a method for generators of one call, such as drpo" if calls in (None, 1) else ""
        raise UserError(
            f"{student} is a few-step student, and {method} begins from a model of many steps; give the one that it "
            f"was made from{other}."
        )


def check_one_call(model: str, adapters: Adapters, method: str) -> None:
    """UserError for a student of several calls, and for a UNet whose scheduler makes the first of its calls away from
    noise, for one call would be made there. A warning for a transformer, which is called at noise, where nothing says
    that few calls are enough."""
    found = _few_step(model, adapters)
    if found is not None:
        student, calls = found
        if calls not in (None, 1):
            raise UserError(
                f"{student} is a student of {calls} calls, and {method} trains a generator of one; give a student of "
                "one call, as gndm makes it with rollout.num_inference_steps=1."
            )
        return
    path = resolve(model)
    if FACES[_index(path, model)["_class_name"]].NETWORK != "unet":
        if not any(word in model.lower() for word in FEW_STEP_NAMES):
            logger.warning(
                "nothing says that model %r draws well in few calls, and %s trains it in one: begin with a student, "
                "such as micro-turbo or one that gndm makes, unless this is one",
                model,
                method,
            )
    elif _json(path, SCHEDULER, model).get("timestep_spacing") != "trailing":
        raise UserError(
            f"{method} calls its generator once, and the scheduler of model {model!r} makes that call where there is "
            "hardly any noise; save the model with an LCMScheduler or with timestep_spacing='trailing', if it is made "
            "for one call, or give one that is, such as stabilityai/sd-turbo."
        )


def _few_step(model: str, adapters: Adapters) -> tuple[str, int | None] | None:
    """What makes a model a few-step student, itself or a LoRA, the last that does, and of how many calls, if that is
    known. None: nothing that is known."""
    students = [file.parent for file in adapters.loras if (file.parent / "scheduler").is_dir()]
    if students:
        config = json.loads((students[-1] / SCHEDULER).read_text())
        return f"adapter {str(students[-1])!r}", config.get(NUM_CALLS)
    config = _json(str(STUDENTS.get(model, resolve(model))), SCHEDULER, model)
    few = config.get("_class_name") == "LCMScheduler" or config.get("stochastic_sampling")
    return (f"model {model!r}", config.get(NUM_CALLS)) if few else None


def check_tokens(settings: TokenSettings, model: str, *, from_text: bool = False) -> None:
    """UserError unless the model has a place for such soft tokens, and they can start as text where they are to. Loads
    no weights."""
    network = skeleton(model)
    found = sites(network, settings)
    text = network.config.get("joint_attention_dim") or network.config.cross_attention_dim
    if from_text and text != found.width:
        raise UserError(
            f"soft tokens of width {found.width} can't start as text of model {model!r}, whose width is {text}; set "
            "method.tokens_start=normal, as in the recipes of its family."
        )


def skeleton(model: str) -> torch.nn.Module:
    """The network that a model trains, without weights."""
    path = resolve(model)
    name = FACES[_index(path, model)["_class_name"]].NETWORK
    config = _json(path, f"{name}/config.json", model)
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)
