"""Feature maps: shapes, gradients, equal features for equal samples, strict loading, refusals."""

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from transformers import Dinov2Config, Dinov2Model, ViTMAEConfig, ViTMAEModel

from trimtab.errors import UserError
from trimtab.pipelines import features
from trimtab.pipelines.features import FeaturesConfig
from trimtab.pipelines.hidden import around_the_middle
from trimtab.rewards import recognizer
from trimtab.worlds import blocks

TEXTS = ("a red circle", "two stars")
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vits")
    torch.manual_seed(0)
    ViTMAEModel(ViTMAEConfig(**SMALL, image_size=224, patch_size=56)).save_pretrained(folder / "vit-mae")
    Dinov2Model(Dinov2Config(**SMALL, image_size=224, patch_size=56)).save_pretrained(folder / "dinov2")
    return folder


def look(face, kind, latents, eps, folder=None):
    name = None if folder is None else str(folder / kind)
    config = FeaturesConfig(kind=kind, pretrained_model_name_or_path=name)
    return features.build(config, face, recognizer.on)(latents, face.encode(TEXTS[: len(latents)]), eps)


def samples(face):
    g = torch.Generator().manual_seed(0)
    shape = (2, *face.latent_shape(face.resolution))
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


KINDS = {
    "teacher": ("block_0", "block_1"),
    "latents": ("all", "mean", "std"),
    "recognizer": ("objects", "evidence", "cells", "mean", "std"),
    "vit-mae": ("layer4_mean", "layer4_std", "layer4_cls"),
    "dinov2": tuple(f"layer{n}_{name}" for n in (1, 2, 3, 4) for name in ("mean", "std", "cls")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_gives_tokens_by_key_with_gradient_and_the_same_each_time(tiny, vits, kind):
    face = tiny()
    latents, eps = samples(face)
    latents.requires_grad_()
    folder = vits if kind in ("vit-mae", "dinov2") else None
    found = look(face, kind, latents, eps, folder)
    assert tuple(found) == KINDS[kind]
    assert all(x.ndim == 3 and x.shape[:2] == (2, 1) and x.dtype == torch.float32 for x in found.values())
    torch.manual_seed(11)  # no map may look at the global generator
    again, alone = look(face, kind, latents, eps, folder), look(face, kind, latents[:1], eps[:1], folder)
    for key, x in found.items():
        assert torch.equal(x, again[key]), key
        (gradient,) = torch.autograd.grad(x.square().sum(), latents, retain_graph=True)
        assert gradient.flatten(1).abs().amax(1).min() > 0, key
        assert (alone[key] - x[:1]).abs().max() < 1e-4 * x.abs().max(), key


@pytest.mark.parametrize("family", ["tiny_sd_folder", "tiny_sdxl_folder", "tiny_flux_folder"])
def test_the_teacher_of_each_family_is_heard_at_three_places(request, build_face, family):
    face = build_face(request.getfixturevalue(family))
    latents, eps = samples(face)
    found = look(face, "teacher", latents, eps)
    assert len(found) >= 2
    for x in found.values():
        assert x.shape[:2] == (2, 1)
        assert (x[0] - x[1]).abs().max() > 0
    assert not any(module._forward_hooks for module in face.roles.network.modules())


def test_the_teacher_is_the_frozen_network_and_sees_prompt_and_noise(tiny):
    face = tiny()
    latents, eps = samples(face)
    plain = look(face, "teacher", latents, eps)["block_1"]
    for key, p in face.roles.parameters("default").items():
        p.data = torch.ones_like(p) if "lora_B" in key else p.data
    assert torch.equal(look(face, "teacher", latents, eps)["block_1"], plain)
    assert not torch.equal(look(face, "teacher", latents, -eps)["block_1"], plain)
    other = features.build(FeaturesConfig(), face, recognizer.on)(latents, face.encode(TEXTS[::-1]), eps)["block_1"]
    assert not torch.equal(other, plain)


def test_pooling_leaves_at_least_four_averages_a_side():
    states = torch.arange(2.0 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    pooled = features._pooled(states)
    assert pooled.shape == (2, 1, 3 * 16)
    assert pooled[0, 0, 0] == states[0, 0, :4, :4].mean()
    assert features._pooled(states[..., :4, :4]).shape == (2, 1, 3 * 16)
    assert features._pooled(states.repeat(1, 1, 2, 2)).shape == (2, 1, 3 * 64)


def test_vit_mae_sees_all_its_patches(tiny, vits):
    network = features._strictly(ViTMAEModel, str(vits / "vit-mae"))
    vit = features.Vit(network, torch.device("cpu"))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(vit(images)["layer4_mean"].square().sum(), images)
    patches = gradient.abs().sum(1).unfold(1, 16, 16).unfold(2, 16, 16).sum((-1, -2))
    assert patches.shape[1:] == (4, 4)
    assert patches.min() > 0  # with transformers' own masking three in four would be 0


def test_moments_are_those_of_the_tokens():
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    found = features._moments(x)
    assert (found["mean"][:, 0] - x.mean(2)).abs().max() < 1e-6
    assert (found["std"][:, 0] - x.std(2, correction=0)).abs().max() < 1e-4


def test_weights_that_are_missing_are_refused(vits, tmp_path):
    bigger = ViTMAEConfig(**SMALL | {"num_hidden_layers": 6}, image_size=224, patch_size=56)
    for file in (vits / "vit-mae").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    bigger.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds no .*layers"):
        features._strictly(ViTMAEModel, str(tmp_path))


@pytest.mark.parametrize(
    ("config", "side", "words"),
    [
        ({"kind": "latents", "keys": ("all", "some")}, 64, "has 'some'; the keys of latents are all, mean, std"),
        ({"kind": "dinov2", "keys": ("x",), "pretrained_model_name_or_path": "{vits}/dinov2"}, 64, "are layer1_mean, "),
        ({"kind": "recognizer"}, 512, "reads pictures of 64 pixels and this model draws 512"),
        ({"kind": "dinov2", "pretrained_model_name_or_path": "/nowhere"}, 64, "'/nowhere' is no folder"),
        ({"kind": "dinov2", "pretrained_model_name_or_path": "{vits}/vit-mae"}, 64, "is a vit_mae, and no dinov2"),
    ],
)
def test_a_map_that_does_not_suit_is_refused_before_weights_load(vits, config, side, words):
    config = {key: value.format(vits=vits) if isinstance(value, str) else value for key, value in config.items()}
    with pytest.raises(UserError, match=words):
        features.check(FeaturesConfig(**config), nn.Linear(1, 1), side)


def test_some_of_the_keys_may_be_asked_for(tiny):
    face = tiny()
    latents, eps = samples(face)
    chosen = features.build(FeaturesConfig(kind="latents", keys=("std",)), face, recognizer.on)
    assert tuple(chosen(latents, face.encode(TEXTS), eps)) == ("std",)


def test_objects_are_counted_by_shape_and_colour():
    rng = np.random.default_rng(0)
    line = {"include": [{"class": "star", "count": 2, "color": "red"}]}
    images = blocks.draw([blocks.scene(line, rng) for _ in range(8)])
    found = features.Read(recognizer.load())(images)["objects"].mean((0, 1)).unflatten(0, (8, 8))
    place = blocks.SHAPES.index("star"), list(blocks.COLORS).index("red")
    assert found[place].item() == pytest.approx(2, abs=0.2)
    assert found.sum().item() == pytest.approx(2, abs=0.3)


def test_evidence_still_has_a_gradient_where_the_recognizer_is_sure():
    rng = np.random.default_rng(0)
    line = {"include": [{"class": "star", "count": 2, "color": "red"}]}
    images = blocks.draw([blocks.scene(line, rng) for _ in range(4)]).requires_grad_()
    found = features.Read(recognizer.load())(images)
    torch.testing.assert_close(found["evidence"].exp(), found["objects"])
    absent = blocks.SHAPES.index("ring") * len(blocks.COLORS) + list(blocks.COLORS).index("blue")
    assert found["objects"][..., absent].max() < 1e-3
    sizes = [
        torch.autograd.grad(found[key][..., absent].sum(), images, retain_graph=True)[0].norm()
        for key in ("objects", "evidence")
    ]
    assert sizes[1] > 1e3 * sizes[0] > 0


def test_a_network_without_known_places_is_refused():
    with pytest.raises(UserError, match="hidden states of a Linear are not known"):
        features.check(FeaturesConfig(kind="teacher"), nn.Linear(1, 1), 64)


def test_three_places_of_a_deep_transformer():
    with torch.device("meta"):
        network = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16
        )
    assert tuple(around_the_middle(network)) == ("block_6", "block_12", "block_18")
