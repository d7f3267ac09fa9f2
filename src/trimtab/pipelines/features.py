"""Frozen feature maps of latents, with gradient to them: the spaces in which DrPO compares samples.

kind         of what                                              keys (tokens, width)
teacher      hidden states of the frozen network, slightly noised down, middle, up or block_<n> (1, 16 c or more)
latents      the auto-encoder's latents themselves                all (1, C h w), mean and std (1, C)
recognizer   the built-in reader of blocks, decoded pictures      objects and evidence (1, 64), cells (1, 512),
                                                                  mean and std (1, 32)
vit-mae      ViT-MAE, decoded pictures (arXiv 2111.06377)         layer<n>_mean, _std and _cls (1, D)
dinov2       DINOv2, decoded pictures (arXiv 2304.07193)          the same after four of its layers

A map gives float32 (B, tokens, width) under each key, and for equal inputs equal features: the teacher's noise belongs
to the sample, and ViT-MAE sees all of its patches (transformers would hide three in four anew at every call).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoConfig, Dinov2Model, ViTMAEModel

from trimtab.batch import Condition
from trimtab.config import Strict
from trimtab.errors import UserError
from trimtab.pipelines import Pipeline
from trimtab.pipelines.hidden import around_the_middle, heard
from trimtab.roles import REFERENCE
from trimtab.worlds.blocks import SIZE_PX

Kind = Literal["teacher", "latents", "recognizer", "vit-mae", "dinov2"]
FeatureMap = Callable[[Tensor, Condition, Tensor], dict[str, Tensor]]  # latents, their conditions, each sample's noise
VITS = {"vit-mae": (ViTMAEModel, "facebook/vit-mae-base"), "dinov2": (Dinov2Model, "facebook/dinov2-base")}
KEYS = {"latents": ("all", "mean", "std"), "recognizer": ("objects", "evidence", "cells", "mean", "std")}
VIT_SIDE = 224  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by which both see
SMALL = 1e-6  # under the root of a variance


class FeaturesConfig(Strict):
    """Which map."""

    kind: Kind = "teacher"
    time: float = Field(0.1, gt=0, lt=1)  # of the noise that the teacher sees; the released code: timestep 100
    pretrained_model_name_or_path: str | None = None  # of vit-mae and dinov2; None: their base models
    keys: tuple[str, ...] | None = Field(None, min_length=1)  # of the map's; None: all


def check(config: FeaturesConfig, network: nn.Module, side_px: int) -> None:
    """UserError unless the map exists and suits a model; `network` may be without weights. Loads none."""
    known: Sequence[str] = KEYS.get(config.kind, ())
    if config.kind == "teacher":
        known = tuple(around_the_middle(network))
    if config.kind == "recognizer" and side_px != SIZE_PX:
        raise UserError(
            f"method.features.kind=recognizer reads pictures of {SIZE_PX} pixels and this model draws "
            f"{side_px}; give teacher, vit-mae or dinov2."
        )
    if config.kind in VITS:
        model, name = VITS[config.kind]
        name = config.pretrained_model_name_or_path or name
        try:
            found = AutoConfig.from_pretrained(name)
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            raise UserError(
                f"method.features: {name!r} is no folder and not to be had from the hub ({type(error).__name__}); "
                "check method.features.pretrained_model_name_or_path."
            ) from error
        if found.model_type != model.config_class.model_type:
            raise UserError(f"method.features: {name!r} is a {found.model_type}, and no {config.kind}.")
        layers = _layers(config.kind, found.num_hidden_layers)
        known = [f"layer{layer}_{name}" for layer in layers for name in ("mean", "std", "cls")]
    strange = [key for key in config.keys or () if key not in known]
    if strange:
        raise UserError(f"method.features.keys has {strange[0]!r}; the keys of {config.kind} are {', '.join(known)}.")


def build(config: FeaturesConfig, pipeline: Pipeline, reader: Callable[[torch.device], nn.Module]) -> FeatureMap:
    """The map of a pipeline's latents. Whatever has weights of its own is loaded strictly, frozen, in float32;
    `reader` gives the recognizer on a device."""
    found = _whole(config, pipeline, reader)
    return found if config.keys is None else partial(_some, found, config.keys)


def _some(whole: FeatureMap, keys: tuple[str, ...], *args: Any) -> dict[str, Tensor]:
    found = whole(*args)
    return {key: found[key] for key in keys}


def _whole(config: FeaturesConfig, pipeline: Pipeline, reader: Callable[[torch.device], nn.Module]) -> FeatureMap:
    if config.kind == "teacher":
        return Teacher(pipeline, config.time)
    if config.kind == "latents":
        return of_latents
    if config.kind == "recognizer":
        return Seen(pipeline, Read(reader(pipeline.device)))
    model, name = VITS[config.kind]
    return Seen(pipeline, Vit(_strictly(model, config.pretrained_model_name_or_path or name), pipeline.device))


class Teacher:
    """Hidden states of the frozen network under the sample's own prompt and noise, pooled.

    The released code adds a tenth of fresh noise and says timestep 100; here latents are noised as in training.
    """

    def __init__(self, pipeline: Pipeline, time: float):
        self.pipeline, self.time = pipeline, torch.tensor(time)
        self.places = around_the_middle(pipeline.roles.module(REFERENCE))

    def __call__(self, latents: Tensor, condition: Condition, eps: Tensor) -> dict[str, Tensor]:
        x_t = self.pipeline.process.noised(latents, eps, self.time.to(latents.device))
        found = heard(
            self.pipeline.roles.module(REFERENCE),
            list(self.places.values()),
            lambda: self.pipeline.predict(x_t, self.time, condition, REFERENCE),
        )
        return {name: _pooled(states) for name, states in zip(self.places, found, strict=True)}


class Seen:
    """Features of the decoded pictures."""

    def __init__(self, pipeline: Pipeline, look: Callable[[Tensor], dict[str, Tensor]]):
        self.pipeline, self.look = pipeline, look

    def __call__(self, latents: Tensor, condition: Condition, eps: Tensor) -> dict[str, Tensor]:
        return self.look(self.pipeline.decode(latents))


class Vit:
    """A vision transformer's patches, mean and deviation, and its class token: ViT-MAE after its last layer, DINOv2
    after each quarter of them, before the final norm."""

    def __init__(self, network: ViTMAEModel | Dinov2Model, device: torch.device):
        self.network = network.requires_grad_(False).eval().to(device)
        kind = "vit-mae" if isinstance(network, ViTMAEModel) else "dinov2"
        self.layers = _layers(kind, network.config.num_hidden_layers)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        images = F.interpolate(images, (VIT_SIDE, VIT_SIDE), mode="bicubic", align_corners=False)
        mean, std = (images.new_tensor(each)[:, None, None] for each in (MEAN, STD))
        order = {}
        if isinstance(self.network, ViTMAEModel):  # it sorts its patches by this noise
            number = (VIT_SIDE // self.network.config.patch_size) ** 2
            order = {"noise": torch.arange(number, device=images.device).float().expand(len(images), -1)}
            order |= {"interpolate_pos_encoding": True}
        states = self.network((images - mean) / std, output_hidden_states=True, **order).hidden_states
        found = {}
        for layer in self.layers:
            patches = states[layer][:, 1:].float()  # (B, N, D)
            found |= {f"layer{layer}_{name}": x for name, x in _moments(patches.mT).items()}
            found[f"layer{layer}_cls"] = states[layer][:, :1].float()
        return found


def _layers(kind: str, depth: int) -> tuple[int, ...]:
    return (depth,) if kind == "vit-mae" else tuple(depth * quarter // 4 for quarter in (1, 2, 3, 4))


def of_latents(latents: Tensor, condition: Condition, eps: Tensor) -> dict[str, Tensor]:
    """Of latents (B, C, h, w) themselves."""
    return {"all": latents.flatten(1)[:, None]} | _moments(latents.flatten(2))


class Read:
    """How many of each shape in each colour the recognizer expects, wherever they stand, and the logarithm of that,
    whose gradient does not fade where it is sure; and the layer that its heads share (B, 32, 8, 8), averaged over cells
    of 2 x 2, and its moments."""

    def __init__(self, network: nn.Module):
        self.network = network

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        states = self.network.trunk(images * 2 - 1)
        shape, color = self.network.shape(states).log_softmax(1)[:, 1:], self.network.color(states).log_softmax(1)
        evidence = (shape[:, :, None] + color[:, None]).flatten(3).logsumexp(3).flatten(1)[:, None]  # of every pair
        found = {"objects": evidence.exp(), "evidence": evidence, "cells": F.avg_pool2d(states, 2).flatten(1)[:, None]}
        return found | _moments(states.flatten(2))


def _moments(x: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation (B, 1, C) of x (B, C, N)."""
    return {"mean": x.mean(2)[:, None], "std": (x.var(2, correction=0) + SMALL).sqrt()[:, None]}


def _pooled(states: Tensor) -> Tensor:
    """Of hidden states (B, C, h, w) averages over 4 x 4 places, as one token; over fewer where there are less than 16
    a side, so that at least 4 x 4 averages are left."""
    window = max(1, min(4, states.shape[-1] // 4))
    return F.avg_pool2d(states.float(), window).flatten(1)[:, None]


def _strictly(model: type[nn.Module], name: str) -> nn.Module:
    """A pre-trained encoder; UserError if any of its weights is not in the file."""
    settings = {"mask_ratio": 0.0} if model is ViTMAEModel else {}
    network, about = model.from_pretrained(name, output_loading_info=True, dtype=torch.float32, **settings)
    if about["missing_keys"] or about["mismatched_keys"]:
        lost = min(about["missing_keys"] or {str(each) for each in about["mismatched_keys"]})
        raise UserError(f"method.features: {name!r} holds no {lost}, which a {model.__name__} needs; fetch it again.")
    return network
