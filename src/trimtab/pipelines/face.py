"""What every diffusers pipeline is to the rest of trimtab, written once; a family adds what is its own.

A family says where its network is, how it embeds prompts, what its times are and how its network is called. Prompts
remembered, guidance, latents, pictures and weights on disk are the same for all.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.batch import Condition
from trimtab.errors import UserError
from trimtab.pipelines import few_step
from trimtab.prediction import Kind, Prediction
from trimtab.process import Process
from trimtab.roles import Roles
from trimtab.solvers import Predict, guided, ode

logger = logging.getLogger(__name__)

# Pixels decoded at once. On a CPU what stays in its caches: twice as fast as 128 pictures. With gradient checkpointing
# one part at a time is computed again: Stable Diffusion's auto-encoder wants some 17 GiB for a picture of 1024 pixels.
AT_ONCE_PX = {"cpu": 2**16}
WITH_GRADIENT_PX, WITHOUT_PX = 2**18, 2**22
REMEMBERED = 2**32  # bytes of embedded prompts that are kept


class Face:
    """A pipeline with roles over its network; everything else in it is frozen. Satisfies `Pipeline`."""

    NETWORK: ClassVar[str]  # the part that learns
    PIPELINE: ClassVar[type[DiffusionPipeline]]
    TARGETS: ClassVar[tuple[str, ...]]  # modules that a LoRA changes unless told otherwise
    SCHEDULERS: ClassVar[tuple[type[SchedulerMixin], ...]]  # whose times are known
    PACKED: ClassVar[int] = 1  # latents a side that the network takes as one, beside its own patches

    def __init__(self, pipe: DiffusionPipeline, roles: Roles, precision: torch.dtype, process: Process, kind: Kind):
        self.pipe, self.roles, self.precision = pipe, roles, precision
        self.process, self.kind = process, kind
        self.device = next(roles.network.parameters()).device
        for module in roles.network.modules():
            if isinstance(module, LoraLayer):  # autocast casts; PEFT would cast up first, for nothing
                module.cast_input_dtype_enabled = precision == torch.float32
        self._memory: dict[str, Condition] = {}
        self._offloaded: list[torch.nn.Module] = []  # text encoders that are away from the accelerator while not asked
        self.unconditional = self.encode([""])  # what guidance leads away from

    @staticmethod
    def prepare(network: torch.nn.Module) -> None:
        """Change in a network what its family has to, before roles make copies of it; here nothing."""

    @classmethod
    def check_scheduler(cls, name: str | None, config: Mapping[str, Any], model: str) -> None:
        """UserError unless class and configuration of a model's scheduler are such that its times are known.

        Only keys that the class reads are judged: a file also keeps those of the classes that it was converted from.
        """
        kinds = {kind.__name__: kind for kind in cls.SCHEDULERS}
        if name not in kinds:
            raise UserError(f"model {model!r} has a {name}; give it one of {', '.join(kinds)}.")
        understood = cls.understood(config)
        for key, parameter in inspect.signature(kinds[name]).parameters.items():
            value = config.get(key, parameter.default)
            known = understood.get(key, (value,))
            if value not in known:
                known = " or ".join(repr(each) for each in known if each is not None or len(known) == 1)
                raise UserError(
                    f"the scheduler of model {model!r} has {key}={value!r} and trimtab needs {known}; "
                    "take another model, or save it with another scheduler."
                )

    @classmethod
    def understood(cls, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Values of a scheduler's configuration at which its times are known; keys that are not named may have any."""
        raise NotImplementedError

    @property
    def resolution(self) -> int:
        """The side in pixels that the model was made for."""
        return self.roles.network.config.sample_size * self.pipe.vae_scale_factor

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a square picture, `resolution` pixels a side."""
        side = resolution // self.pipe.vae_scale_factor
        return self.roles.network.config.in_channels, side, side

    def time_grid(self, num_steps: int, resolution: int | None = None) -> Tensor:
        """Falling times (T + 1,) that the pipeline's own scheduler visits; some depend on the size."""
        raise NotImplementedError

    def few_step_grid(self, num_steps: int, resolution: int | None = None) -> Tensor:
        """Falling times (T + 1,) at which a student is called."""
        raise NotImplementedError

    def student_scheduler(self, num_calls: int, resolution: int | None = None) -> SchedulerMixin:
        """With which stock diffusers samples a student of this model."""
        raise NotImplementedError

    def start(self, noise: Tensor) -> Tensor:
        """What the stock pipeline's solver starts from (B, C, h, w), given standard normal noise."""
        return noise

    @property
    def adds_noise(self) -> bool:
        """Whether the model's scheduler adds noise between its calls."""
        return False

    def solve(self, predict: Predict, noise: Tensor, times: Tensor, between: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) as the stock pipeline's solver makes them of standard normal noise, with `between`
        (T, B, C, h, w) after each call if the scheduler adds any."""
        return ode(predict, self.start(noise), times)

    def between_calls(self, noise: Tensor) -> Tensor:
        """Noise (T, B, C, h, w) put in the order in which the stock pipeline draws what it adds between calls."""
        return noise

    @property
    def is_student(self) -> bool:
        """Whether the model itself is a student, which predicts x0 and noises it afresh."""
        return few_step.is_few_step(self.pipe.scheduler)

    @property
    def num_calls(self) -> int | None:
        """How many calls the model was distilled to, if that is known."""
        return few_step.num_calls(self.pipe.scheduler)

    def enable_gradient_checkpointing(self) -> None:
        """Trade compute for memory: in every trained role, and in the auto-encoder, where pictures want a gradient."""
        self.roles.enable_gradient_checkpointing()
        self.pipe.vae.enable_gradient_checkpointing()

    def offload_text_encoders(self) -> None:
        """Keep them in main memory but for the moments in which they are asked about prompts that are new."""
        found = [getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
        self._offloaded = [encoder.to("cpu") for encoder in found if encoder is not None]

    def training_scale(self, guidance_scale: float) -> float:
        """The guidance under which a role is trained whose samples are drawn with `guidance_scale`: none."""
        return 1.0

    def embed(self, texts: Sequence[str]) -> Condition:
        """The condition of P prompts as the text encoders say it: not remembered, and with gradient if that is on."""
        with self._encoders_at_hand():
            return self._embed(texts)

    def _embed(self, texts: Sequence[str]) -> Condition:
        raise NotImplementedError

    def _output(self, role: str, x_t: Tensor, t: Tensor, condition: Condition, *extra: Any) -> Tensor:
        """What the network itself says, at times (B,) and under B conditions; `extra` is a family's own."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Condition:
        """The condition of P prompts; each distinct prompt is encoded once, and alone: in a batch its last bits would
        depend on what happened to be new beside it, and a resumed run would not be the run that was not killed."""
        known = self._memory.keys() >= set(texts)
        with nullcontext() if known else self._encoders_at_hand():
            found = {text: self._embedded(text) for text in dict.fromkeys(texts)}
        return joined([found[text] for text in texts])

    def predict(
        self, x_t: Tensor, t: Tensor, condition: Condition, role: str, guidance_scale: float = 1.0
    ) -> Prediction:
        """What the network says at x_t (B, C, h, w) and t, () or (B,), given B conditions; w = 1 is one pass."""
        t = t.to(x_t.device)
        times = t.expand(len(x_t))
        if guidance_scale == 1:
            value = self._forward(role, x_t, times, condition)
        else:
            both = joined([self.unconditional.expand(len(x_t)), condition])
            uncond, cond = self._forward(role, x_t.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
            value = guided(cond, uncond, guidance_scale)
        return Prediction(value, self.kind, x_t, t, self.process)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the latents of pictures (B, 3, H, W) in [0, 1]."""
        vae = self.pipe.vae
        with self._autocast():
            found = vae.encode(images.to(self.device) * 2 - 1).latent_dist
        mean = (found.mean.float().contiguous() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        return mean, found.std.float().contiguous() * vae.config.scaling_factor

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in [0, 1]: the mean of the auto-encoder's posterior."""
        return self.posterior(images)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [0, 1]. To latents that want a gradient the limits are transparent."""
        vae, wanted = self.pipe.vae, latents.requires_grad
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        side = latents.shape[-1] * self.pipe.vae_scale_factor
        at_once = AT_ONCE_PX.get(latents.device.type, WITH_GRADIENT_PX if wanted else WITHOUT_PX)
        parts = latents.split(max(1, at_once // side**2))
        with torch.set_grad_enabled(wanted and torch.is_grad_enabled()), self._autocast():
            images = torch.cat([vae.decode(part, return_dict=False)[0].float() for part in parts])
            images = images.contiguous() / 2 + 0.5  # the auto-encoder's are channels-last, which `view` does not take
        limited = images.detach().clamp(0, 1)
        return images + (limited - images).detach() if images.requires_grad else limited

    def export(self, folder: Path, role: str, student: SchedulerMixin | None = None) -> None:
        """A LoRA as stock diffusers and as PEFT load it, rank and alpha included; full weights as a pipeline. The
        weights of a student go with the scheduler that samples it."""
        if self.roles.lora is None:
            saved = self._unrounded() | ({} if student is None else {"scheduler": student})
            own = {name: getattr(self.pipe, name) for name in saved}
            self.pipe.register_modules(**saved)
            self.pipe.save_pretrained(folder)
            self.pipe.register_modules(**own)
            if self.roles.module(role) is not getattr(self.pipe, self.NETWORK):
                self.roles.module(role).save_pretrained(folder / self.NETWORK)
            return
        if student is not None:
            student.save_pretrained(folder / "scheduler")
        state, config = self.roles.lora_state(role), self.roles.lora.peft_config()
        config.base_model_name_or_path = self.pipe.config["_name_or_path"]
        state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
        layers = {f"{self.NETWORK}_lora_layers": state, f"{self.NETWORK}_lora_adapter_metadata": config.to_dict()}
        self.pipe.save_lora_weights(folder, **layers)
        save_file({f"base_model.model.{name}": t for name, t in state.items()}, folder / "adapter_model.safetensors")
        config.save_pretrained(folder)

    def _unrounded(self) -> dict[str, PreTrainedModel]:
        """The parts of transformers, which nothing changes, as the model's files have them; here they are rounded where
        the precision is bf16, and diffusers loads them in the type that they were saved in."""
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, PreTrainedModel)}
        found = {name: part for name, part in parts.items() if part.dtype != torch.float32}
        try:
            return {name: type(part).from_pretrained(part.name_or_path, dtype="auto") for name, part in found.items()}
        except OSError as error:
            logger.warning("%s are exported in bf16, for the model's own files are gone: %s", ", ".join(found), error)
            return {}

    def _embedded(self, text: str) -> Condition:
        """One prompt's condition. As many as fit are remembered, away from the accelerator, which they would fill."""
        if text not in self._memory:
            found = self._embed([text])
            self._memory[text] = found.to("cpu")
            if len(self._memory) * found.tokens.nbytes > REMEMBERED:
                del self._memory[next(iter(self._memory))]
            return found
        return self._memory[text].to(self.device)

    @contextmanager
    def _encoders_at_hand(self) -> Iterator[None]:
        for encoder in self._offloaded:
            encoder.to(self.device)
        try:
            yield
        finally:
            for encoder in self._offloaded:
                encoder.to("cpu")

    def _forward(self, role: str, x_t: Tensor, t: Tensor, condition: Condition, *extra: Any) -> Tensor:
        with self._autocast():
            return self._output(role, x_t, t, condition, *extra).float()

    def _autocast(self) -> torch.autocast:
        """A new region for every forward: a longer one would keep casts of weights that have changed since."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)


def joined(conditions: Sequence[Condition]) -> Condition:
    """One condition after the other; what their tokens count for is taken from the last."""
    last = conditions[-1]
    pooled = None if last.pooled is None else torch.cat([each.pooled for each in conditions])
    return replace(last, tokens=torch.cat([each.tokens for each in conditions]), pooled=pooled)
