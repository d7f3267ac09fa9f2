"""DiffusionNFT: its errors and loss by hand, the closed form of its gradient, and its glue."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from trimtab.batch import Prompts, Rollout
from trimtab.forward import Points, points, times_of
from trimtab.matching import adaptive_error
from trimtab.methods.diffusion_nft import DiffusionNFT, DiffusionNFTConfig, nft_errors, nft_loss
from trimtab.process import RectifiedFlow, VariancePreserving
from trimtab.rewards.composite import Composite
from trimtab.rollout import RolloutConfig, Rollouts

CLIP = 5.0


def gap(a, b):
    return (a - b).abs().max().item()


def fields():
    """v, v_old, x_0, eps (6, 2, 3) in float64, t (6,), x_t, and advantages within the clip."""
    torch.manual_seed(0)
    v, v_old, x0, eps = torch.randn(4, 6, 2, 3, dtype=torch.float64)
    t = torch.linspace(0.15, 0.95, 6, dtype=torch.float64)
    over = t.view(6, 1, 1)
    return v, v_old, x0, eps, t, (1 - over) * x0 + over * eps, torch.randn(6, dtype=torch.float64)


def gradient(v, v_old, x_t, x0, t, advantage, nft_beta):
    v = v.clone().requires_grad_()
    plus, minus = nft_errors(v, v_old, x_t, x0, t, nft_beta)
    signal = advantage / (2 * CLIP) + 0.5
    return torch.autograd.grad(nft_loss(plus, minus, signal, nft_beta=nft_beta, clip=CLIP), v)[0]


def test_errors_by_hand():
    # t = 1/2, x_t = (1, 1), x_0 = 0. b = 2: v+ = 2 v - v_old = (2, -2) and v- = 3 v_old - 2 v = (-2, 6).
    # x+ = x_t - t v+ = (0, 2): mean square 2 over mean absolute 1. x- = (2, -2): 4 over 2.
    v, v_old = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    plus, minus = nft_errors(v, v_old, torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([0.5]), 2.0)
    assert (plus.item(), minus.item()) == (2.0, 2.0)


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving()])
def test_a_field_that_is_right_has_no_error_in_any_process(process):
    _, _, x0, eps, t, *_ = fields()
    right, x_t = eps - x0, process.noised(x0, eps, t)
    for errors in (nft_errors(right, right, x_t, x0, t, b, process) for b in (0.5, 2.0)):
        assert torch.cat(errors).max() < 1e-9
    assert nft_errors(right + 1, right, x_t, x0, t, 1.0, process)[0].min() > 1e-3


def test_the_loss_by_hand():
    # C / b * mean(R l+ + (1 - R) l-) = 5 / 2 * mean(0.75 * 1 + 0.25 * 3, 0 * 2 + 1 * 4) = 5 / 2 * 2.75
    plus, minus, signal = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.75, 0.0]])
    assert nft_loss(plus, minus, signal, nft_beta=2.0, clip=5.0).item() == 6.875
    assert nft_loss(plus, minus, signal, nft_beta=2.0, clip=5.0, num_terms=20).item() == 0.6875


@pytest.mark.parametrize("nft_beta", [0.1, 1.0, 10.0])
def test_at_the_old_field_the_gradient_is_the_advantage_times_t_of_the_flow_matching_error(nft_beta):
    # There x+ - x_0 = t (u - v), so l+ is t times l_i = mean (v - u)^2 / m, and grad l+- = +-b t grad l_i. The weights
    # C ((R - (1 - R)) b / b = 2 C R - C are the advantage: mean_i A_i t_i grad l_i, whatever b is.
    _, v_old, x0, eps, t, x_t, advantage = fields()
    v = v_old.clone().requires_grad_()
    error = (advantage * t * adaptive_error(v, eps - x0)).mean()
    expected = torch.autograd.grad(error, v)[0]
    assert gap(gradient(v_old, v_old, x_t, x0, t, advantage, nft_beta), expected) < 1e-12


def test_the_negative_field_is_the_positive_one_mirrored_at_the_old_field():
    v, v_old, x0, _, t, x_t, _ = fields()
    plus, minus = nft_errors(v, v_old, x_t, x0, t, 0.7)
    mirrored_plus, mirrored_minus = nft_errors(2 * v_old - v, v_old, x_t, x0, t, 0.7)
    assert gap(plus, mirrored_minus) < 1e-12
    assert gap(minus, mirrored_plus) < 1e-12


def test_without_an_advantage_the_gradient_vanishes_at_the_old_field_and_pulls_back_elsewhere():
    v, v_old, x0, _, t, x_t, _ = fields()
    none = torch.zeros(6, dtype=torch.float64)
    assert gap(gradient(v_old, v_old, x_t, x0, t, none, 1.0), torch.zeros(1)) < 1e-12
    near = v_old + 1e-3 * v
    assert (gradient(near, v_old, x_t, x0, t, none, 1.0) * (near - v_old)).sum() > 0


def test_the_old_field_gets_no_gradient():
    v, v_old, x0, _, t, x_t, _ = fields()
    v_old.requires_grad_()
    plus, minus = nft_errors(v.requires_grad_(), v_old, x_t, x0, t, 1.0)
    (plus + minus).sum().backward()
    assert v.grad is not None
    assert v_old.grad is None


# The glue


def method(face, batch_size, **config):
    rollouts = SimpleNamespace(
        config=RolloutConfig(num_inference_steps=4),
        time_grid=lambda: face.time_grid(4),
        mean_length=len,
        training_scale=1.0,
    )
    return DiffusionNFT(DiffusionNFTConfig(num_train_times=2, **config), face, rollouts, batch_size)


def rollout(face, advantage):
    texts, noise = ("a red circle", "two stars"), torch.Generator().manual_seed(3)
    columns = {"group": torch.tensor([0, 0, 0, 1, 1]), "sibling": torch.tensor([0, 1, 2, 0, 1])}
    columns |= {"reward": torch.zeros(5), "scaled": torch.zeros(5), "advantage": advantage}
    latents, prompts = torch.randn(5, 8, 8, 8, generator=noise), Prompts(texts, ({}, {}), (0, 1))
    return Rollout(prompts, face.encode(texts), latents, **columns, seed=0, step=0)


def shaken(face):
    """Each role gets a LoRA of its own, far from the others and from the reference."""
    for seed, role in enumerate(face.roles.names):
        generator = torch.Generator().manual_seed(seed)
        for parameter in face.roles.parameters(role).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return face


def whole_update(face, batch_size, advantage, **config):
    """The sum of the terms' values, and the gradient of the trained weights."""
    inputs, value = list(face.roles.parameters("default").values()), 0.0
    for loss in method(face, batch_size, **config).losses(rollout(face, advantage)):
        assert loss.network == "default"
        loss.value.backward(inputs=inputs)
        value += loss.value.item()
    return value, torch.cat([p.grad.flatten() for p in inputs])


def update_by_hand(face, advantage, b, clip, kl_beta):
    """Eq. 1 to 5 of all samples at once, averaged over samples and times."""
    samples, glue, total = rollout(face, advantage), method(face, 100), 0.0
    times = times_of(samples, glue.config, glue.rollouts.time_grid())
    for number in (0, 1):
        at = points(face, samples, times[:, number], number)
        v, v_old, v_ref = (face.predict(at.x_t, at.t, at.condition, role).flow for role in ("default", "old", "ref"))
        v_old, v_ref = v_old.detach(), v_ref.detach()
        signal = advantage.clamp(-clip, clip) / (2 * clip) + 0.5
        for share, flow in ((signal, b * v + (1 - b) * v_old), (1 - signal, (1 + b) * v_old - b * v)):
            miss = (at.x_t - at.t[:, None, None, None] * flow - at.x0).flatten(1)
            total = total + clip * (share * miss.square().mean(1) / miss.detach().abs().mean(1) / b).mean()
        total = total + kl_beta * (v - v_ref).square().mean()
    return total / 2


@pytest.mark.parametrize(("nft_beta", "clip", "kl_beta"), [(1.0, 5.0, 0.0), (0.4, 2.0, 0.5)])
def test_loss_and_gradient_of_an_update_are_the_equations_in_parts_of_groups(tiny, nft_beta, clip, kl_beta):
    face, advantage = shaken(tiny(frozen=("old",))), torch.tensor([1.0, -2.0, 0.5, 7.0, -1.0])
    expected = update_by_hand(face, advantage, nft_beta, clip, kl_beta)
    slopes = torch.autograd.grad(expected, face.roles.parameters("default").values())
    wanted = torch.cat([slope.flatten() for slope in slopes])
    settings = {"nft_beta": nft_beta, "adv_clip_range": clip, "kl_beta": kl_beta}
    value, gradient = whole_update(face, 2, advantage, **settings)
    assert value == pytest.approx(expected.item(), rel=1e-4)
    assert gap(gradient, wanted) < 1e-4 * wanted.abs().max()


def test_advantages_beyond_the_clip_count_as_the_clip(tiny):
    face = tiny(frozen=("old",))
    within, beyond = torch.tensor([5.0, -5.0, 0.0, 5.0, -5.0]), torch.tensor([50.0, -6.0, 0.0, 5.0, -500.0])
    gradients = []
    for advantage in (within, beyond):
        gradients.append(whole_update(face, 100, advantage)[1])
        for parameter in face.roles.parameters("default").values():
            parameter.grad = None
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


@torch.no_grad()
def test_a_process_divides_by_the_mean_of_all_lengths(tiny):
    glue = method(tiny(frozen=("old",)), 100, kl_beta=0.5)
    samples = rollout(glue.pipeline, torch.ones(5))
    alone = sum(loss.value.item() for loss in glue.losses(samples))
    glue.rollouts.mean_length = lambda part: 2 * len(part)
    assert sum(loss.value.item() for loss in glue.losses(samples)) == pytest.approx(alone / 2, rel=1e-4)


def test_the_old_policy_draws_the_rollouts(tiny):
    glue = method(shaken(tiny(frozen=("old",))), 100, updates_per_step=2)
    rewards = Composite({"bright": (lambda images, prompts, metadata: images.mean((1, 2, 3)), 1.0)})
    prompts = Prompts(("a red circle", "two stars"), ({}, {}), (0, 1))
    settings = RolloutConfig(num_prompts=2, group_size=2, num_inference_steps=2)
    glue.rollouts = Rollouts(glue.pipeline, prompts, rewards, settings, glue.pipeline.resolution, seed=3)
    parts = glue.collect(4)
    assert [(part.step, part.group.unique().tolist()) for part in parts] == [(4, [0]), (4, [1])]
    for part in parts:
        assert gap(part.latents, glue.rollouts.again(part, "old")) < 1e-5
        assert gap(part.latents, glue.rollouts.again(part, "default")) > 0.1
    assert 0 < glue.after_step(4)["reward"] < 1


def test_the_old_policy_follows_by_the_schedule(tiny):
    # d(n) = min(0.1 n, 0.25): 0.1 after one update, 0.25 after three.
    face = shaken(tiny(frozen=("old",)))
    glue = method(face, 100, decay_slope=0.1, decay_end=0.25)
    for updates, decay in ((1, 0.1), (3, 0.25)):
        glue.updates = updates
        new, old = ([p.clone() for p in face.roles.parameters(role).values()] for role in ("default", "old"))
        assert glue.after_step(0)["decay/old"] == pytest.approx(decay)
        for after, a, b in zip(face.roles.parameters("old").values(), old, new, strict=True):
            assert gap(after, decay * a + (1 - decay) * b) < 1e-6


def test_updates_are_counted_and_are_part_of_the_state(tiny):
    face = tiny(frozen=("old",))
    glue = method(face, 100)
    list(glue.losses(rollout(face, torch.ones(5))))
    assert glue.state_dict() == {"updates": 1}
    other = method(face, 100)
    other.load_state_dict({"updates": 7})
    assert other.updates == 7


@pytest.mark.parametrize("folder", ["tiny_sd_folder", "tiny_folder"])
def test_the_anchor_compares_what_networks_say_and_not_the_flow_that_noise_means(folder, request, build_face):
    face = build_face(request.getfixturevalue(folder), frozen=("old",))
    with torch.no_grad():
        for p in face.roles.parameters("default").values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    texts = ("a red circle", "two stars")
    x_t = torch.randn(2, *face.latent_shape(face.resolution), generator=torch.Generator().manual_seed(0))
    at = Points(x_t, x_t, torch.tensor([0.5, 0.99]), x_t, face.encode(texts), torch.arange(2))
    assert "kl" not in method(face, 100, kl_beta=0.0)._loss(at, torch.zeros(2), 2).metrics  # it is not asked for
    loss = method(face, 100, kl_beta=0.1)._loss(at, torch.zeros(2), 2)
    with torch.no_grad():
        now, ref = (face.predict(x_t, at.t, at.condition, role).value for role in ("default", "ref"))
    assert loss.metrics["kl"].item() == pytest.approx((now - ref).square().mean().item(), rel=1e-4)


def test_the_trained_role_is_exported(tiny, tmp_path):
    face = shaken(tiny(frozen=("old",)))
    method(face, 100).export(tmp_path)
    exported = load_file(tmp_path / "adapter_model.safetensors")
    weights = face.roles.parameters("default")
    assert len(exported) == len(weights)
    assert all(torch.equal(exported[f"base_model.model.{name}"], p) for name, p in weights.items())
