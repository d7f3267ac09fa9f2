"""How the built-in model and its recognizer were made: three plain pre-trainings on the world blocks.

`PretrainVAE`         |x - y| + (x - y)^2 + 1e-4 KL, the auto-encoder of *micro*
`PretrainMicro`       || v(x_t, t, c) - (eps - x_0) ||^2, its transformer and text encoders (arXiv 2403.03206); some of
                      the captions are dropped, and some are wrong, as the web's are
`PretrainRecognizer`  cross-entropy of shape and colour in each cell
"""

import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trimtab import noise
from trimtab.errors import UserError
from trimtab.matching import denoising_error
from trimtab.method import Loss, MethodSettings, Stateful
from trimtab.pipelines import micro
from trimtab.pipelines.sd3 import SD3
from trimtab.process import logit_normal
from trimtab.rewards.recognizer import CELLS, Recognizer
from trimtab.roles import Roles
from trimtab.worlds import blocks

CHUNK = 250  # scenes drawn at a time


class PretrainVAEConfig(MethodSettings):
    """How the auto-encoder of *micro* is trained: on so many scenes, with its KL divergence weighed by `kl_weight`."""

    name: Literal["pretrain-vae"]
    num_scenes: int = Field(20_000, gt=0)
    kl_weight: float = Field(1e-4, ge=0)

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("vae",)


class PretrainMicroConfig(MethodSettings):
    """How its transformer and text encoders are trained, on scenes in the latents of the auto-encoder in `vae`."""

    name: Literal["pretrain-micro"]
    vae: str = "runs/pretrain-micro-vae/export"
    num_scenes: int = Field(200_000, gt=0)
    wrong_captions: float = Field(0.3, ge=0, le=1)
    dropped_captions: float = Field(0.1, ge=0, le=1)
    blind_steps: int = Field(0, ge=0)  # T5's equal tokens count once at first, and all from this update on
    ema_decay: float = Field(0.999, ge=0, lt=1)

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("micro",)


class PretrainRecognizerConfig(MethodSettings):
    """How the recognizer is trained."""

    name: Literal["pretrain-recognizer"]
    num_scenes: int = Field(30_000, gt=0)
    noise: float = Field(0.05, ge=0)  # standard deviation added to a picture, whose values span [0, 1]

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("recognizer",)


class PretrainVAE:
    """The auto-encoder of *micro*. `export` gives its latents mean 0 and standard deviation 1."""

    def __init__(
        self, config: PretrainVAEConfig, seed: int, batch_size: int, device: torch.device, precision: torch.dtype
    ):
        self.config, self.seed, self.batch_size = config, seed, batch_size
        self.device, self.precision = device, precision
        self.vae: AutoencoderKL = micro.build(seed).vae.to(device)
        self.images = torch.cat([images for images, _, _ in drawn(config.num_scenes, seed)]).to(device)

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {"vae": dict(self.vae.named_parameters())}

    def state(self) -> dict[str, Stateful]:
        return {}

    def collect(self, step: int) -> Iterable[tuple[Tensor, torch.Generator]]:
        """One batch of pictures (B, 3, 64, 64) in [-1, 1], and the source of the noise on their latents."""
        picked = _picked(self.seed, step, self.batch_size, len(self.images)).to(self.device)
        return [(self.images[picked].float() / 127.5 - 1, noise.generator(self.seed, step, noise.TRAINING))]

    def losses(self, batch: tuple[Tensor, torch.Generator]) -> Iterator[Loss]:
        wanted, generator = batch
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            posterior = self.vae.encode(wanted).latent_dist
            images = self.vae.decode(posterior.sample(generator), return_dict=False)[0]
        error = (images.float() - wanted).abs()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        value = error.mean() + error.square().mean() + self.config.kl_weight * kl
        yield Loss("vae", value, {"l1": error.mean().detach(), "kl": kl.detach()})

    def after_step(self, step: int) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        sample = self.images[:4096].split(256)
        latents = torch.cat([self.vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in sample])
        self.vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
        self.vae.to(torch.float16).save_pretrained(folder)
        self.vae.float()


class PretrainMicro:
    """The transformer and the text encoders of *micro*, on latents that are encoded once."""

    def __init__(
        self, config: PretrainMicroConfig, seed: int, batch_size: int, device: torch.device, precision: torch.dtype
    ):
        self.config, self.seed, self.batch_size = config, seed, batch_size
        pipe = micro.build(seed)
        pipe.register_modules(vae=_load_vae(config.vae))
        pipe.to(device)
        SD3.prepare(pipe.transformer)
        self.face = SD3(pipe, Roles(pipe.transformer, lora=None), precision)
        self.network = nn.ModuleDict({name: getattr(pipe, name) for name in micro.TRAINED})
        self.network.requires_grad_(True)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.latents, self.contents = self._encoded(device)
        self.of_tag = {tag: [i for i, c in enumerate(ALL) if c["tag"] == tag] for tag in blocks.TAGS}

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {"micro": dict(self.network.named_parameters())}

    def state(self) -> dict[str, Stateful]:
        return {"average": self.average}

    def collect(self, step: int) -> Iterable[tuple[Tensor, list[str], Tensor, Tensor, float]]:
        """One batch: clean latents, captions, times, noise, and the power of the tokens' counts."""
        size = self.batch_size
        picked = _picked(self.seed, step, size, len(self.latents))
        device = self.latents.device
        x0 = self.latents[picked.to(device)].float()
        generator = noise.generator(self.seed, step, noise.TRAINING)
        t = logit_normal(torch.randn(size, generator=generator)).to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        power = min(1.0, step / self.config.blind_steps) if self.config.blind_steps else 1.0
        return [(x0, self._captions(self.contents[picked], step), t, eps, power)]

    def losses(self, batch: tuple[Tensor, list[str], Tensor, Tensor, float]) -> Iterator[Loss]:
        x0, captions, t, eps, power = batch
        x_t = self.face.process.noised(x0, eps, t)
        condition = self.face.embed(captions)
        condition = replace(condition, weight=condition.weight**power)  # else 256 equal tokens drown twelve words
        prediction = self.face.predict(x_t, t, condition, "default")
        yield Loss("micro", denoising_error(prediction.flow, eps - x0).mean())

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        for average, own in zip(self.average.parameters(), self.network.parameters(), strict=True):
            average.lerp_(own, 1 - decay)
        return {}

    def export(self, folder: Path) -> None:
        """A stock pipeline of the averaged weights: fp16, but the tiny text encoders fp32, so that it loads as fp32."""
        parts = {name: copy.deepcopy(self.average[name]).half() for name in micro.TRAINED}
        parts |= {name: parts[name].float() for name in micro.TRAINED if name != "transformer"}
        parts["vae"] = copy.deepcopy(self.face.pipe.vae).half()
        StableDiffusion3Pipeline(**(self.face.pipe.components | parts)).save_pretrained(folder)

    def _captions(self, contents: Tensor, step: int) -> list[str]:
        """A caption for each content: usually its own, sometimes another of the same tag, sometimes none."""
        rng = np.random.default_rng([self.seed, step, noise.ORDER])
        captions = []
        for number in contents.tolist():
            if rng.random() < self.config.wrong_captions:
                number = int(rng.choice(self.of_tag[ALL[number]["tag"]]))
            opening = blocks.OPENINGS[rng.integers(len(blocks.OPENINGS))]
            captions.append("" if rng.random() < self.config.dropped_captions else f"{opening} {PHRASES[number]}")
        return captions

    def _encoded(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Latents (N, 8, 8, 8), half precision, and the number of each scene's content (N,)."""
        latents, contents = [], []
        for images, numbers, _ in drawn(self.config.num_scenes, self.seed):
            latents.append(self.face.encode_images(images.to(device).float() / 255).half())
            contents.append(numbers)
        return torch.cat(latents), torch.cat(contents)


class PretrainRecognizer:
    """The recognizer, on pictures with a little noise."""

    def __init__(
        self, config: PretrainRecognizerConfig, seed: int, batch_size: int, device: torch.device, precision: torch.dtype
    ):
        self.config, self.seed, self.batch_size = config, seed, batch_size
        self.device, self.precision = device, precision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.recognizer = Recognizer().to(device)
        images, _, cells = zip(*drawn(config.num_scenes, seed), strict=True)
        self.images, self.cells = torch.cat(images).to(device), torch.cat(cells).to(device)

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {"recognizer": dict(self.recognizer.named_parameters())}

    def state(self) -> dict[str, Stateful]:
        return {}

    def collect(self, step: int) -> Iterable[tuple[Tensor, Tensor]]:
        """One batch: noisy pictures (B, 3, 64, 64) and what is in their cells (B, 2, 8, 8)."""
        picked = _picked(self.seed, step, self.batch_size, len(self.images)).to(self.device)
        images = self.images[picked].float() / 255
        grain = torch.randn(images.shape, generator=noise.generator(self.seed, step, noise.TRAINING)).to(self.device)
        return [((images + self.config.noise * grain).clamp(0, 1), self.cells[picked])]

    def losses(self, batch: tuple[Tensor, Tensor]) -> Iterator[Loss]:
        images, cells = batch
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            shape, color = self.recognizer(images)
        shapes, colors = cells.long().unbind(1)
        by_shape = F.cross_entropy(shape.float(), shapes)
        by_color = F.cross_entropy(color.float(), colors, ignore_index=-1)
        right = (shape.argmax(1) == shapes).flatten(1).all(1).float().mean()
        yield Loss("recognizer", 10 * by_shape + by_color, {"pictures_read_right": right.detach()})

    def after_step(self, step: int) -> dict[str, float]:
        return {}

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        half = {name: tensor.half().cpu() for name, tensor in self.recognizer.state_dict().items()}
        save_file(half, folder / "recognizer.safetensors")


ALL = [content for tag in blocks.TAGS for content in blocks.contents(tag)]
PHRASES = [blocks.phrase(content) for content in ALL]


class _Scenes(Dataset):
    """Chunk i of the world: pictures (CHUNK, 3, 64, 64) uint8, content numbers, and the contents of their cells."""

    def __init__(self, num_scenes: int, seed: int):
        self.num_scenes, self.seed = num_scenes, seed
        self.of_tag = [[i for i, c in enumerate(ALL) if c["tag"] == tag] for tag in blocks.TAGS]

    def __len__(self) -> int:
        return -(-self.num_scenes // CHUNK)

    def __getitem__(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, chunk])
        size = min(CHUNK, self.num_scenes - chunk * CHUNK)
        numbers = [int(rng.choice(self.of_tag[rng.integers(len(self.of_tag))])) for _ in range(size)]
        scenes = [blocks.scene(ALL[number], rng) for number in numbers]
        images = (blocks.draw(scenes) * 255).round().to(torch.uint8)
        return images, torch.tensor(numbers), torch.stack([_cells(scene) for scene in scenes])


def drawn(num_scenes: int, seed: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """All chunks in order, drawn by as many workers as there are cores; the same whatever their number."""
    blocks.distance_fields()  # once, before the workers fork
    return DataLoader(_Scenes(num_scenes, seed), batch_size=None, num_workers=os.cpu_count() or 1)


def _cells(scene: blocks.Scene) -> Tensor:
    """(2, 8, 8) int8: 1 + the shape whose centre is in the cell, or 0; and its colour, or -1."""
    cells = torch.stack([torch.zeros(CELLS, CELLS, dtype=torch.int8), torch.full((CELLS, CELLS), -1, dtype=torch.int8)])
    for block in scene.blocks:
        row, column = int(block.y * CELLS / blocks.SIZE_PX), int(block.x * CELLS / blocks.SIZE_PX)
        cells[0, row, column] = 1 + blocks.SHAPES.index(block.shape)
        cells[1, row, column] = list(blocks.COLORS).index(block.color)
    return cells


def _picked(seed: int, step: int, size: int, total: int) -> Tensor:
    """`size` of `total` items for this step, drawn with replacement."""
    return torch.randint(total, (size,), generator=noise.generator(seed, step, noise.ORDER))


def _load_vae(folder: str) -> AutoencoderKL:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"method.vae is {folder!r}, which holds no auto-encoder; run `trimtab train pretrain-micro-vae`."
        )
    return AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
