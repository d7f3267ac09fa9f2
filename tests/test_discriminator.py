"""The GAN of DMD2: features from the middle of three families, the head, and what it pushes."""

from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from torch import nn

from trimtab import noise
from trimtab.batch import Captions, Prompts
from trimtab.errors import UserError
from trimtab.learner import Learner
from trimtab.methods.dmd2 import DMD2, DMD2Config, judge_loss
from trimtab.optimizer import OptimizerConfig
from trimtab.pipelines.discriminator import Head
from trimtab.pipelines.hidden import around_the_middle, as_picture, heard, middle
from trimtab.pipelines.loading import load
from trimtab.roles import LoraSettings
from trimtab.rollout import RolloutConfig
from trimtab.student import FAKE, STUDENT, Student

TEXTS = ("a photo of a red circle", "a photo of two stars")
PROMPTS = Prompts(TEXTS, tuple({} for _ in TEXTS), (0, 1))


def gap(a, b):
    return (a - b).abs().max().item()


@dataclass
class Pictures:
    """Two real pictures, whose latents are all one number; counts what it was asked for."""

    face: object
    level: float = 2.0

    def __post_init__(self):
        self.steps = []

    def collect(self, step):
        self.steps.append(step)
        shape = self.face.latent_shape(self.face.resolution)
        return Captions(torch.full((2, *shape), self.level), self.face.encode(TEXTS), TEXTS, (0, 1), 0, step)

    def state_dict(self):
        return {}


def built(folder, lora=LoraSettings(rank=4, lora_alpha=16), **config):  # noqa: B008
    face = load(str(folder), lora=lora, trained=(STUDENT, FAKE))
    rollout = RolloutConfig(num_prompts=2, group_size=2, num_inference_steps=2, sample_batch_size=4)
    student = Student(face, PROMPTS, rollout, face.resolution, 4, seed=3)
    pictures = Pictures(face)
    settings = {"fake_updates": 2, "real_guidance_scale": 1.0, "gan_weight": 1.0, "gan_fake_weight": 1.0} | config
    return face, student, DMD2(DMD2Config(**settings), face, student, None, pictures)


@pytest.mark.parametrize(
    ("family", "channels", "side"), [("tiny_folder", 32, 4), ("tiny_sd_folder", 32, 4), ("tiny_sdxl_folder", 32, 4)]
)
def test_the_middle_of_each_family_is_a_picture_of_features(request, family, channels, side):
    face = load(str(request.getfixturevalue(family)), lora=None)
    network, x_t = face.roles.network, torch.randn(2, *face.latent_shape(face.resolution))

    def call():
        with torch.no_grad():
            return face.predict(x_t, torch.tensor(0.5), face.encode(TEXTS), "default").value

    (features,) = heard(network, [middle(network)], call)
    assert features.shape[0] == 2
    assert features.shape[2] == features.shape[3]
    assert gap(features[0], features[1]) > 1e-3
    assert (features.shape[1], features.shape[2]) == (channels, side)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    said, whole = [], middle(network).register_forward_hook(lambda _, inputs, output: said.append(as_picture(output)))
    call()
    whole.remove()
    assert torch.equal(features, said[0])


@pytest.mark.parametrize("family", ["tiny_folder", "tiny_sd_folder", "tiny_sdxl_folder", "tiny_flux_folder"])
def test_a_network_is_left_where_the_last_has_been_heard(request, family):
    face = load(str(request.getfixturevalue(family)), lora=LoraSettings(rank=4, lora_alpha=16))
    network, condition = face.roles.network, face.encode(TEXTS)
    x_t = torch.randn(2, *face.latent_shape(face.resolution), requires_grad=True)
    ends = []
    (network.proj_out if hasattr(network, "proj_out") else network.conv_out).register_forward_hook(
        lambda *_: ends.append("reached")
    )
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            face.enable_gradient_checkpointing()
        (features,) = heard(
            network, [middle(network)], lambda: face.predict(x_t, torch.tensor(0.5), condition, "default")
        )
        assert bool(ends) == (checkpointed and family in ("tiny_folder", "tiny_flux_folder"))
        gradients.append(torch.autograd.grad(features.square().sum(), x_t)[0])
    assert gradients[0].abs().max() > 0
    assert gap(*gradients) < 1e-5 * gradients[0].abs().max()
    ends.clear()
    with torch.no_grad():  # where nothing is checkpointed
        heard(network, [middle(network)], lambda: face.predict(x_t, torch.tensor(0.5), condition, "default"))
    assert not ends
    face.predict(x_t, torch.tensor(0.5), condition, "default").value.sum().backward()  # nothing stays behind
    assert x_t.grad.isfinite().all()


def test_the_middle_of_flux_counts_blocks_of_one_stream_as_well():
    with torch.device("meta"):
        network = FluxTransformer2DModel(
            num_layers=19, num_single_layers=38, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6)
        )
    assert middle(network) is network.single_transformer_blocks[28 - 19]
    places = around_the_middle(network)
    assert list(places) == ["block_14", "block_28", "block_42"]
    assert list(places.values())[2] is network.single_transformer_blocks[42 - 19]


def test_pixels_of_an_mmdit_lie_where_they_are_seen():
    # One patch of the input changes; before attention spreads it, so would only its place.
    tokens = torch.arange(16.0).reshape(1, 16, 1).expand(1, 16, 32)
    assert as_picture((torch.zeros(1, 3, 32), tokens))[0, 0].tolist() == torch.arange(16.0).reshape(4, 4).tolist()


def test_a_network_without_a_known_middle_is_refused():
    with pytest.raises(UserError, match="a Linear has no middle"):
        middle(nn.Linear(1, 1))


@pytest.mark.parametrize(("side", "layers"), [(8, 2), (32, 4), (4, 1), (1, 1)])
def test_the_head_halves_until_four_and_then_sees_all(side, layers):
    head = Head(64, side, seed=0)
    convolutions = [layer for layer in head.layers if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == layers + 1
    assert head(torch.randn(3, 64, side, side)).shape == (3,)
    again = Head(64, side, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def test_the_judges_loss_by_hand():
    # softplus(0) = log 2; softplus(-0) = log 2
    assert judge_loss(torch.zeros(3), torch.zeros(2)).item() == pytest.approx(2 * 0.693147, abs=1e-5)
    made, real = torch.tensor([-20.0]), torch.tensor([20.0])
    assert judge_loss(made, real) < 1e-6
    assert judge_loss(real, made) > 30


def test_the_push_of_the_gan_is_its_gradient_and_leaves_the_judge_alone(tiny_folder):
    face, student, method = built(tiny_folder)
    call = student.call(STUDENT, student.draw(0, 0, 3))
    x = student.x0(call).detach()
    plain = DMD2(DMD2Config(real_guidance_scale=1.0), face, student)._update(x, call)[0]
    gradient, fooled = method._gan_gradient(x, call)
    assert gradient.abs().max() > 1e-6
    assert 0 <= fooled <= 1
    keys, condition = call.draw.keys(noise.GAN), call.draw.conditions()
    with torch.no_grad():  # a step down the gradient makes samples pass for real
        before, after = (method._judged(at, keys, condition) for at in (x, x - 0.1 * gradient / gradient.std()))
    assert (after > before).all()
    assert gap(method._update(x, call)[0], plain - x[0].numel() * gradient) < 1e-5 * x[0].numel()
    (loss,) = method.losses(call)
    assert loss.network == STUDENT
    assert all(parameter.grad is None for parameter in method.trained()[FAKE].values())


@pytest.mark.parametrize("lora", [LoraSettings(rank=4, lora_alpha=16), None], ids=["lora", "full"])
def test_the_judge_learns_to_tell_real_pictures_and_the_fake_learns_with_it(tiny_folder, lora):
    _, _, method = built(tiny_folder, lora)
    assert any(name.startswith("head.") for name in method.trained()[FAKE])
    records = list(Learner(method, Accelerator(cpu=True), OptimizerConfig(learning_rate=3e-3), 12).run())
    assert records[-1].metrics["judge"] < 0.9 * records[0].metrics["judge"]
    assert method.pictures.steps == list(range(24))  # other pictures for every update of the fake
    assert {"fooled", "loss/fake", "loss/default"} <= set(records[0].metrics)


def test_without_a_weight_there_is_no_judge(tiny_folder):
    assert not DMD2Config().wants_pictures
    assert DMD2Config(gan_weight=1e-3).wants_pictures
    face, student, _ = built(tiny_folder)
    assert set(DMD2(DMD2Config(), face, student).trained()[FAKE]) == set(face.roles.parameters(FAKE))
