"""AGSM: its identities, the exact scalar toy, and its glue on micro's tiny sister."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from trimtab import noise
from trimtab.batch import Captions
from trimtab.grid import grid_noise
from trimtab.methods.agsm import AGSM, AGSMConfig, alignment_weights, guidance, guided_targets, score_matching_loss
from trimtab.methods.softrepa import contrastive_loss
from trimtab.pipelines.loading import load_with_tokens
from trimtab.pipelines.soft_tokens import NEGATIVE, POSITIVE, TokenSettings
from trimtab.process import VariancePreserving
from trimtab.worlds.gaussians import Mixture


def grid(num_rows=4, num_captions=4, dims=(2, 3)):
    """Averaged predictions (R, B, ...), targets (R, ...), and which pair is matched (R, B)."""
    torch.manual_seed(0)
    average, target = torch.randn(num_rows, num_captions, *dims), torch.randn(num_rows, *dims)
    return average, target, torch.arange(num_rows)[:, None] == torch.arange(num_captions)


def test_the_weighted_guidance_of_a_row_is_zero():
    average, target, _ = grid()
    weights = alignment_weights(average, target, temperature=0.5)
    assert torch.einsum("rb,rb...->r...", weights, guidance(average, weights)).abs().max() < 1e-6


def test_weights_by_hand_and_along_captions():
    # Errors of picture 0: 0 and 1 as means of two squares, so that w = softmax(0, -1 / 0.5); of picture 1 both 4.
    average = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[2.0, 2.0], [-2.0, -2.0]]])
    weights = alignment_weights(average, torch.zeros(2, 2), temperature=0.5)
    own = 1 / (1 + math.exp(-2))
    assert torch.allclose(weights, torch.tensor([[own, 1 - own], [0.5, 0.5]]))
    summed = alignment_weights(average, torch.zeros(2, 2), temperature=0.5, distance="sum")
    assert summed[0, 0].item() == pytest.approx(1 / (1 + math.exp(-4)))


def test_an_exact_matched_prediction_wins_and_has_no_guidance():
    average, target, matched = grid()
    average[matched] = target
    weights = alignment_weights(average, target, temperature=1e-4)
    assert torch.equal(weights[matched], torch.ones(4))
    assert guidance(average, weights)[matched].abs().max() == 0
    assert torch.allclose(guidance(average, weights), average - target[:, None], atol=1e-6)


@pytest.mark.parametrize("gammas", [(0.0, 0.0), (1.0, 0.1)])
def test_one_caption_is_plain_score_matching(gammas):
    average, target, matched = grid(1, 1)
    weights = alignment_weights(average, target)
    assert torch.equal(guided_targets(average, target, matched, weights, *gammas), target[:, None])


def test_without_gamma_every_target_is_the_truth():
    average, target, matched = grid()
    targets = guided_targets(average, target, matched, alignment_weights(average, target), 0.0, 0.0)
    assert torch.equal(targets, target[:, None].expand_as(targets))


def test_equal_captions_in_one_bank_give_uniform_weights_and_no_guidance():
    average, target, _ = grid()
    average = average[:, :1].expand_as(average)
    weights = alignment_weights(average, target)
    assert torch.allclose(weights, torch.full((4, 4), 0.25))
    assert guidance(average, weights).abs().max() < 1e-6


def test_two_captions_are_bradley_terry():
    average, target, _ = grid(2, 2)
    error = (average - target[:, None]).square().flatten(2).mean(2)
    weights = alignment_weights(average, target, temperature=0.1)
    assert torch.allclose(weights[0, 0], torch.sigmoid((error[0, 1] - error[0, 0]) / 0.1), atol=2e-7)


def test_targets_move_towards_the_own_caption_and_away_from_the_others():
    average, target, matched = grid()
    weights = alignment_weights(average, target)
    moved = guided_targets(average.requires_grad_(), target, matched, weights, 2.0, 0.5) - target[:, None]
    difference = guidance(average, weights)
    assert not moved.requires_grad
    assert torch.allclose(moved[matched], 2.0 * difference[matched], atol=1e-6)
    assert torch.allclose(moved[~matched], -0.5 * difference[~matched], atol=1e-6)


def test_both_kinds_of_pair_weigh_the_same_and_rows_add_up():
    error, matched = torch.rand(4, 4), torch.eye(4).bool()
    whole = score_matching_loss(error, matched, 4, 4)
    assert whole.item() == pytest.approx(error[matched].mean().item() + error[~matched].mean().item())
    parts = [score_matching_loss(error[rows], matched[rows], 4, 4) for rows in torch.arange(4).split(3)]
    assert torch.allclose(sum(parts), whole)
    assert score_matching_loss(error[matched], matched[matched], 4, 4) == error[matched].mean()
    assert torch.equal(score_matching_loss(torch.ones(1, 1), torch.ones(1, 1).bool(), 1, 1), torch.tensor(1.0))


# ---- the glue, on a small random SD3


@pytest.mark.parametrize(
    "settings", [{}, {"shared_bank": True}, {"gamma_neg": 0.0}, {"distance": "sum", "temperature": 5.0}]
)
def test_loss_and_gradient_are_those_of_every_pair_by_hand(tokens_of, settings):
    config = AGSMConfig(**{"gamma_pos": 0.7, "gamma_neg": 0.4, "temperature": 0.01, "rows": 3} | settings)
    agsm = tokens_of(config)
    face, batch, banks = agsm.pipeline, agsm.batch, agsm.pipeline.roles.banks
    for parameter in banks["average"].parameters():
        parameter.data = -0.5 * parameter.data.flip(-1)
    t, eps = grid_noise(face, batch)
    x_t, e = (1 - t) * batch.x0 + t * eps, eps - batch.x0

    def says(role, i, j):
        sign = POSITIVE if i == j or config.shared_bank else NEGATIVE
        with face.roles.signs(torch.tensor(sign)):
            return face.predict(x_t[i : i + 1], t, batch.condition[j : j + 1], role).value[0]

    expected = 0.0
    for i in range(4):
        average = torch.stack([says("average", i, j) for j in range(4)]).detach()
        error = (average - e[i]).flatten(1).square()
        error = error.sum(1) if config.distance == "sum" else error.mean(1)
        w = torch.softmax(-error / config.temperature, 0)
        mixture = sum(w[k] * average[k] for k in range(4))
        for j in range(4) if config.gamma_neg else [i]:
            step = 0.7 if i == j else -0.4
            error = (says("default", i, j) - e[i] - step * (average[j] - mixture)).square().mean()
            expected = expected + error / (4 if i == j else 12)
    wanted = torch.autograd.grad(expected, list(agsm.method.trained()["default"].values()))
    assert agsm.loss().item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, want in zip(agsm.gradients(), wanted, strict=True):
        assert (gradient - want).abs().max() < 1e-4 * want.abs().max()
    assert all(parameter.grad is None for parameter in banks["average"].parameters())


def test_every_step_has_a_time_and_a_noise_of_its_own(tokens_of):
    agsm = tokens_of(AGSMConfig())
    (t, eps), (later, other) = (grid_noise(agsm.pipeline, replace(agsm.batch, step=step)) for step in (0, 1))
    assert t != later
    assert (eps - other).abs().max() > 0.1


def test_the_time_of_a_step_is_that_of_a_timestep():
    # Row k of Stable Diffusion's table lies at (k + 1) / 1000.
    batch = Captions(torch.zeros(1, 4, 8, 8), condition=None, text=("a cat",), index=(5,), seed=0, step=3)
    t, _ = grid_noise(SimpleNamespace(process=VariancePreserving()), batch)
    k = torch.randint(1000, (), generator=noise.generator(0, 3, 5, noise.TRAINING)).item()
    assert t.item() == pytest.approx((k + 1) / 1000, abs=1e-6)


def test_rows_change_no_gradient(tokens_of):
    expected = tokens_of(AGSMConfig(rows=4)).gradients()
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for rows in (1, 3):
        for gradient, want in zip(tokens_of(AGSMConfig(rows=rows)).gradients(), expected, strict=True):
            assert (gradient - want).abs().max() < 1e-5 * want.abs().max()


def test_without_gamma_neg_mismatched_pairs_are_neither_computed_with_gradient_nor_trained(tokens_of):
    agsm = tokens_of(AGSMConfig(gamma_neg=0.0))
    base, time = agsm.gradients()
    assert base[NEGATIVE].abs().max() == 0
    assert base[POSITIVE].abs().max() > 0
    assert time.abs().max() > 0
    assert agsm.rows_with_gradient() == 4


def test_a_shared_bank_learns_from_both_kinds_of_pair(tokens_of):
    agsm = tokens_of(AGSMConfig(shared_bank=True))
    assert agsm.pipeline.roles.banks["default"].base.shape[0] == 1
    assert agsm.gradients()[0].abs().max() > 0
    assert agsm.rows_with_gradient() == 16


def test_targets_are_made_by_the_average_and_their_gradient_goes_to_the_trained_tokens_alone(tokens_of):
    agsm = tokens_of(AGSMConfig())
    expected = agsm.loss().item()
    assert agsm.loss().item() == expected
    agsm.pipeline.roles.banks["average"].base.data *= -1
    assert agsm.loss().item() != expected
    agsm.loss().backward()
    assert all(parameter.grad is None for parameter in agsm.pipeline.roles.banks["average"].parameters())


def test_the_average_follows_by_its_decay(tokens_of):
    agsm = tokens_of(AGSMConfig(ema_decay=0.75))
    banks = agsm.pipeline.roles.banks
    before = banks["average"].base.clone()
    banks["default"].base.data += 1
    agsm.method.after_step(0)
    assert torch.allclose(banks["average"].base, before + 0.25)


def test_a_random_average_is_drawn_apart_from_the_trained_tokens(tiny_folder):
    config = AGSMConfig(ema_start="random")
    face = load_with_tokens(str(tiny_folder), TokenSettings(num_layers=2), num_signs=2, roles=config.roles)
    average, trained = (face.roles.banks[name].base for name in ("average", "default"))
    assert torch.equal(average, trained)
    AGSM(config, face, SimpleNamespace(seed=0))
    assert (average - trained).abs().max() > 0


def test_training_leaves_the_backbone_as_it_was(tokens_of):
    agsm = tokens_of(AGSMConfig())
    network = agsm.pipeline.roles.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW(agsm.pipeline.roles.banks["default"].parameters(), 1e-2)
    for step in range(3):
        agsm.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        agsm.method.after_step(step)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# ---- the scalar toy: an analytic model whose "bank" is one number a sign, v_z = v_u + g_z (v_c - v_u)

NUM_CLASSES, NUM_GROUPS, NUM_STEPS = 8, 256, 2500
ANGLE = 2 * math.pi * torch.arange(NUM_CLASSES) / NUM_CLASSES
WORLD = Mixture(torch.full((8,), 1 / 8), 2 * torch.stack([ANGLE.cos(), ANGLE.sin()], 1), 0.15)
BLUR = 0.5 * torch.eye(NUM_CLASSES) + 0.5 / NUM_CLASSES  # what a caption knows of the class, (8, 8)

RUNS = {  # name -> gamma+, gamma-, temperature, captions a group, decay of the average; and g+ where it ends
    "plain regression": ((0.0, 0.0, 1e9, 4, 0.99), 1.791),
    "AGSM (1, 0)": ((1.0, 0.0, 1e9, 4, 0.99), 6.95),
    "AGSM (1, 0.1)": ((1.0, 0.1, 1e9, 4, 0.99), 6.95),
    "AGSM (1, 1)": ((1.0, 1.0, 1e9, 4, 0.99), 6.93),
    "two captions": ((1.0, 0.1, 1e9, 2, 0.99), 3.53),
    "AGSM (0.5, 0.1)": ((0.5, 0.1, 1e9, 4, 0.99), 2.83),
    "frozen average": ((1.0, 0.1, 1e9, 4, 1.0), 2.66),
    "tau = 0.1": ((1.0, 0.1, 0.1, 4, 0.99), 1.90),
    "tau = 0.5": ((1.0, 0.1, 0.5, 4, 0.99), 2.19),
    "unstable": ((1.5, 0.0, 1e9, 4, 0.99), None),
    # Here mismatched pairs are left out, as AGSM does for gamma- = 0; in the rows above they still learn the truth, and
    # g- falls to 0. At its start of 1 other captions point away from the own one, which adds to the guidance.
    "mismatched left out": ((1.0, 0.0, 1e9, 4, 0.99), 7.61),
}


def toy_batch(generator):
    """v_u (N, 1, 2), v_c (N, B, 2), e (N, 2) for N = groups x B pictures; a group shares its time and its noise."""
    order = torch.rand(NUM_GROUPS, NUM_CLASSES, generator=generator).argsort(1)[:, :4]  # four different captions
    x0 = WORLD.means[order] + WORLD.std * torch.randn(NUM_GROUPS, 4, 2, generator=generator)
    eps = torch.randn(NUM_GROUPS, 1, 2, generator=generator).expand_as(x0)
    t = torch.rand(NUM_GROUPS, 1, 1, generator=generator).expand(-1, 4, 1).clamp_min(1e-3)
    x_t = (1 - t) * x0 + t * eps
    variance = ((1 - t) * WORLD.std) ** 2 + t**2  # (groups, 4, 1)
    away = x_t[:, :, None] - (1 - t)[:, :, None] * WORLD.means  # (groups, 4, 8, 2)
    likelihood = torch.softmax(-away.square().sum(-1) / (2 * variance), -1)  # (groups, 4, 8)
    slope = (t - (1 - t) * WORLD.std**2) / variance
    velocity = slope[:, :, None] * away - WORLD.means  # E[eps - x_0 | x_t, class]
    known = likelihood[:, :, None] * BLUR[order][:, None]  # (groups, 4 pictures, 4 captions, 8)
    cond = torch.einsum("gick,gikd->gicd", known / known.sum(-1, keepdim=True), velocity)
    uncond = torch.einsum("gik,gikd->gid", likelihood, velocity)[:, :, None]
    return uncond, cond, eps - x0


@pytest.fixture(scope="module")
def toy():
    """g+ of every run after each 100 steps, (25,), all on the same batches; SoftREPA has one bank."""
    generator = torch.Generator().manual_seed(0)
    banks = {name: torch.ones(2, requires_grad=True) for name in (*RUNS, "SoftREPA")}
    averages = {name: torch.ones(2) for name in RUNS}
    optimizer = torch.optim.Adam(banks.values(), lr=0.02)
    path = {name: [] for name in banks}
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / NUM_STEPS)
        uncond, cond, e = toy_batch(generator)
        sum(toy_loss(name, bank, averages, uncond, cond, e) for name, bank in banks.items()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, average in averages.items():
            average.lerp_(banks[name].detach(), 1 - RUNS[name][0][4])
        if step % 100 == 99:
            for name, bank in banks.items():
                path[name].append(bank[0].item())
    return path


def toy_loss(name, bank, averages, uncond, cond, e):
    size = 4 if name == "SoftREPA" else RUNS[name][0][3]
    uncond, cond, e = uncond[:, :size], cond[:, :size, :size], e[:, :size].flatten(0, 1)
    matched = torch.eye(size).bool().repeat(NUM_GROUPS, 1)  # (N, B)
    uncond, difference = uncond.flatten(0, 1), (cond - uncond).flatten(0, 1)
    if name == "SoftREPA":
        error = (uncond + bank[0] * difference - e[:, None]).square().mean(-1)
        return contrastive_loss(error, torch.arange(size).repeat(NUM_GROUPS)).mean()
    gamma_pos, gamma_neg, temperature, _, _ = RUNS[name][0]
    average = uncond + torch.where(matched, *averages[name])[..., None] * difference
    weights = alignment_weights(average, e, temperature)
    target = guided_targets(average, e, matched, weights, gamma_pos, gamma_neg)
    predicted = uncond + torch.where(matched, *bank)[..., None] * difference
    error = (predicted - target).square().mean(-1)
    if name == "mismatched left out":
        error, matched = error[matched], matched[matched]
    return score_matching_loss(error, matched, len(e), size)


@pytest.mark.parametrize("name", [name for name, (_, where) in RUNS.items() if where])
def test_the_toy_ends_where_it_should(toy, name):
    tolerance = 0.02 if name == "plain regression" else 0.05
    assert toy[name][-1] == pytest.approx(RUNS[name][1], rel=tolerance)


def test_softrepa_ends_below_plain_regression_in_the_toy(toy):
    assert toy["SoftREPA"][-1] == pytest.approx(1.721, rel=0.02)


def test_feedback_through_the_average_is_unstable_where_theory_says_so(toy):
    # den = 1 - gamma+ (1 - a) = 1 - 1.5 * 3/4 < 0: it keeps growing, while gamma+ = 1 has come to rest.
    unstable, stable = toy["unstable"], toy["AGSM (1, 0)"]
    assert unstable[-1] > 2 * stable[-1]
    assert all(later > earlier for earlier, later in pairwise(unstable[:-4]))
