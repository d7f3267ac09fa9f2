"""CRD: its equations by hand and in closed form, and its glue on a real tiny pipeline whose roles all differ."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import ndtri
from scipy.stats import norm
from torch.nn import functional

from trimtab.batch import Prompts, Rollout
from trimtab.distributed import Processes
from trimtab.errors import UserError
from trimtab.forward import Points, points, times_of, unit_signal
from trimtab.groups import means
from trimtab.methods.crd import (
    CRD,
    CRDConfig,
    anchor_loss,
    anchor_strength,
    centres,
    decay_at,
    distillation_loss,
    implicit_reward,
    parse_schedule,
    progress_metrics,
)
from trimtab.rewards.composite import Composite
from trimtab.rollout import RolloutConfig, Rollouts
from trimtab.worlds.gaussians import Mixture

# Three prompts, interleaved, of 5, 4 and 3 siblings.
GROUP = torch.tensor([7, 2, 7, 9, 2, 7, 9, 2, 7, 2, 9, 7])
BATCH, DIM = 12, 6
CLIP = 5.0
VARIANTS = [
    {"centring": centring, "weight_temp": temp, "loss_type": loss_type}
    for centring, temp in (("prompt", -1.0), ("prompt", 0.2), ("prompt", 0.0), ("batch", -1.0), ("none", -1.0))
    for loss_type in ("mse", "bce")
]


def gap(a, b):
    return (a - b).abs().max().item()


def fields(at_old=False):
    """A free field v (B, 2, 3) that wants a gradient, the old field, the target, and advantages within the clip."""
    torch.manual_seed(0)
    v, v_old, target = torch.randn(3, BATCH, 2, 3, dtype=torch.float64)
    v = (v_old.clone() if at_old else v).requires_grad_()
    return v, v_old, target, torch.randn(BATCH, dtype=torch.float64)


def loss_of(q, advantage, *, beta=1.0, centring="prompt", weight_temp=-1.0, loss_type="mse"):
    signal = unit_signal(advantage, CLIP)
    centre = centres(q, signal, GROUP, centring=centring, weight_temp=weight_temp)
    return distillation_loss(q, signal, centre, beta=beta, clip=CLIP, loss_type=loss_type)


def gradient(value, v):
    return torch.autograd.grad(value, v, retain_graph=True)[0]


def weighted_error_gradient(weights, v, target, adaptive=True):
    """mean_i w_i grad l_i worked out: l_i = mean_j (v - u)^2 / m_i, so grad l_i = 2 (v - u) / (D m_i)."""
    difference = (v - target).detach()
    scale = difference.abs().mean((1, 2), keepdim=True) if adaptive else 1.0
    return weights[:, None, None] * 2 * difference / (DIM * scale) / BATCH


# Eq. 4: the implicit reward


def test_implicit_reward_by_hand():
    # v - u = 1, -3 and v_old - u = 2, 2: mean squares 5 and 4, mean absolutes 2 and 2. Adaptive: -(2.5 - 2).
    v, v_old, target = torch.tensor([[[2.0, 0.0]], [[3.0, 5.0]], [[1.0, 3.0]]])
    assert implicit_reward(v, v_old, target).item() == -0.5
    assert implicit_reward(v, v_old, target, adaptive=False).item() == -1.0


@pytest.mark.parametrize("adaptive", [True, False])
def test_implicit_reward_is_exactly_0_at_the_old_field_and_positive_for_a_better_one(adaptive):
    v, v_old, target, _ = fields(at_old=True)
    assert (implicit_reward(v, v_old, target, adaptive) == 0).all()
    better = 0.9 * v_old + 0.1 * target
    assert (implicit_reward(better, v_old, target, adaptive) > 0).all()


def test_only_the_trained_field_gets_a_gradient():
    v, v_old, target, advantage = fields()
    v_old, target = v_old.requires_grad_(), target.requires_grad_()
    value = loss_of(implicit_reward(v, v_old, target), advantage)
    by_v, by_old, by_target = torch.autograd.grad(value, [v, v_old, target], allow_unused=True)
    assert by_v.abs().max() > 0
    assert by_old is None
    assert by_target is None


# Eq. 5: the signal


def test_unit_signal_by_hand():
    # clip 5: -9 -> -5 -> 0, 0 -> 1/2, 1 -> 1/10 + 1/2, 5 and 80 -> 1.
    advantage = torch.tensor([-9.0, 0.0, 1.0, 5.0, 80.0])
    assert gap(unit_signal(advantage, 5.0), torch.tensor([0, 0.5, 0.6, 1, 1])) < 1e-7


# Eq. 7 and its gradient


def test_loss_by_hand():
    # One prompt, q = 1, 3 (mean 2), R = .5, .7 (mean .6), beta = 2, C = 5: residuals 2 (-1) + .1 and 2 (1) - .1, so
    # 5 / 2 * 1.9^2 = 9.025.
    q, signal, group = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.7]), torch.zeros(2)
    value = distillation_loss(q, signal, centres(q, signal, group), beta=2.0, clip=5.0)
    assert abs(value.item() - 9.025) < 1e-5


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("adaptive", [True, False])
def test_at_the_old_field_the_gradient_is_advantage_weighted_flow_matching_for_every_beta(beta, adaptive):
    v, v_old, target, advantage = fields(at_old=True)
    value = loss_of(implicit_reward(v, v_old, target, adaptive), advantage, beta=beta)
    expected = weighted_error_gradient(advantage - means(advantage, GROUP), v, target, adaptive)
    assert gap(gradient(value, v), expected) < 1e-12


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("adaptive", [True, False])
def test_anywhere_the_weight_is_the_advantage_not_yet_realised(beta, adaptive):
    v, v_old, target, advantage = fields()
    q = implicit_reward(v, v_old, target, adaptive)
    value = loss_of(q, advantage, beta=beta)
    realised = 2 * CLIP * beta * (q - means(q, GROUP)).detach()
    weights = advantage - means(advantage, GROUP) - realised
    assert gap(gradient(value, v), weighted_error_gradient(weights, v, target, adaptive)) < 1e-12


def test_a_gradient_through_the_uniform_centre_would_change_nothing():
    v, v_old, target, advantage = fields()
    q, signal = implicit_reward(v, v_old, target), unit_signal(advantage, CLIP)
    attached = torch.stack([means(q, GROUP), means(signal, GROUP)])[:, None]
    with_gradient = distillation_loss(q, signal, attached, clip=CLIP)
    without = loss_of(q, advantage)
    assert attached.requires_grad
    assert gap(gradient(with_gradient, v), gradient(without, v)) < 1e-12


def test_loss_is_the_mismatch_of_all_pairs():
    # For one prompt of K, mean_i e_i^2 with e centred is sum_ij (e_i - e_j)^2 / (2 K^2).
    torch.manual_seed(0)
    q, signal = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    value = distillation_loss(q, signal, centres(q, signal, torch.ones(5)), beta=2.0, clip=3.0)
    e = 2.0 * q - signal
    assert abs(value - 3.0 / 2.0 * (e[:, None] - e).square().sum() / 50) < 1e-12


def test_equal_rewards_leave_the_old_field_alone_and_pull_every_other_field_back():
    v, v_old, target, _ = fields(at_old=True)
    equal = means(torch.arange(BATCH, dtype=torch.float64), GROUP)
    value = loss_of(implicit_reward(v, v_old, target), equal)
    assert gradient(value, v).abs().max() < 1e-12
    v, v_old, target, _ = fields()
    q = implicit_reward(v, v_old, target)
    value = loss_of(q, equal)
    pull = weighted_error_gradient(-2 * CLIP * (q - means(q, GROUP)).detach(), v, target)
    assert pull.abs().max() > 0.1
    assert gap(gradient(value, v), pull) < 1e-12


@pytest.mark.parametrize("weight_temp", [-1.0, 0.2])
@pytest.mark.parametrize("loss_type", ["mse", "bce"])
def test_a_constant_per_prompt_in_rewards_or_in_q_changes_nothing(weight_temp, loss_type):
    torch.manual_seed(0)
    q, advantage = torch.randn(2, BATCH, dtype=torch.float64)
    constant = means(torch.randn(BATCH, dtype=torch.float64), GROUP)
    options = {"weight_temp": weight_temp, "loss_type": loss_type}
    value = loss_of(q, advantage, **options)
    assert abs(loss_of(q + constant, advantage, **options) - value) < 1e-12
    assert abs(loss_of(q, advantage + constant, **options) - value) < 1e-12
    mixed = loss_of(q, advantage, centring="batch", **options)
    assert abs(loss_of(q + constant, advantage, centring="batch", **options) - mixed) > 1e-3


# Variants


def written_out(q, advantage, centring, weight_temp, loss_type, beta, group=GROUP, clip=CLIP):
    """Eq. 5 to 7 in loops, q_bar constant."""
    signal = advantage.clamp(-clip, clip) / (2 * clip) + 0.5
    total = 0.0
    signs = [1.0] if weight_temp < 0 else [1.0, -1.0]
    for sign in signs:
        for i in range(len(q)):
            siblings = group[i] == group if centring == "prompt" else torch.ones(len(q), dtype=torch.bool)
            r = signal[siblings]
            p = torch.ones_like(r)
            if weight_temp > 0:
                p = (sign * r / weight_temp).exp()
            if weight_temp == 0:
                pool = (r - 0.5) * sign > 0
                p = pool.to(p) if pool.any() else p
            p = p / p.sum()
            q_bar, r_bar = (0.0, 0.5) if centring == "none" else (p @ q[siblings].detach(), p @ r)
            x, y = beta * (q[i] - q_bar), signal[i] - r_bar
            bce = -(y.sigmoid() * x.sigmoid().log() + (-y).sigmoid() * (-x).sigmoid().log())
            total = total + ((x - y) ** 2 if loss_type == "mse" else bce) / len(signs)
    return clip / beta * total / len(q)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
def test_every_variant_is_its_formula_written_out(variant):
    v, v_old, target, advantage = fields()
    q = implicit_reward(v, v_old, target)
    value = loss_of(q, advantage, beta=0.7, **variant)
    expected = written_out(q, advantage, beta=0.7, **variant)
    assert abs(value - expected) < 1e-12
    assert gap(gradient(value, v), gradient(expected, v)) < 1e-12


def test_pools_by_hand_and_an_empty_pool_stands_for_everybody():
    # Prompt 0: R = .9, .7, .1 with q = 1, 3, 8: positive pool q_bar 2, R_bar .8; negative pool 8, .1.
    # Prompt 1: R = .6, .8, both positive: negative pool empty, so everybody: q_bar 5, R_bar .7 both times.
    q, signal = torch.tensor([1.0, 3.0, 8.0, 4.0, 6.0]), torch.tensor([0.9, 0.7, 0.1, 0.6, 0.8])
    centre = centres(q, signal, torch.tensor([0, 0, 0, 1, 1]), weight_temp=0.0)
    expected_q = torch.tensor([[2.0, 2, 2, 5, 5], [8.0, 8, 8, 5, 5]])
    expected_signal = torch.tensor([[0.8, 0.8, 0.8, 0.7, 0.7], [0.1, 0.1, 0.1, 0.7, 0.7]])
    assert gap(centre, torch.stack([expected_q, expected_signal])) < 1e-6


def test_softmax_centres_tend_to_the_uniform_ones_and_to_best_and_worst():
    torch.manual_seed(0)
    q, signal = torch.rand(2, BATCH, dtype=torch.float64)
    warm = centres(q, signal, GROUP, weight_temp=1e9)
    uniform = centres(q, signal, GROUP)
    assert gap(warm, uniform.expand(2, 2, BATCH)) < 1e-8
    cold = centres(q, signal, GROUP, weight_temp=1e-4)
    for group in GROUP.unique():
        r = signal[group == GROUP]
        assert gap(cold[1, 0, group == GROUP], r.max()) < 1e-8
        assert gap(cold[1, 1, group == GROUP], r.min()) < 1e-8


def test_unknown_variants_are_refused():
    q = torch.zeros(2)
    with pytest.raises(ValueError, match="centring 'global' is none of"):
        centres(q, q, q, centring="global")
    with pytest.raises(ValueError, match="loss_type 'huber' is neither"):
        distillation_loss(q, q, centres(q, q, q), loss_type="huber")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
@pytest.mark.parametrize("size", [1, 5, 7])
def test_two_passes_over_parts_of_groups_give_the_gradient_of_one(variant, size):
    v, v_old, target, advantage = fields()
    signal = unit_signal(advantage, CLIP)
    centring = {name: variant[name] for name in ("centring", "weight_temp")}
    q = implicit_reward(v, v_old, target)
    whole = loss_of(q, advantage, **variant)
    with torch.no_grad():  # first pass: centres from every sample
        parts = [implicit_reward(v[i], v_old[i], target[i]) for i in torch.arange(BATCH).split(size)]
        centre = centres(torch.cat(parts), signal, GROUP, **centring)
    summed = 0.0
    for i in torch.arange(BATCH).split(size):  # second pass: gradients from parts
        part = distillation_loss(
            implicit_reward(v[i], v_old[i], target[i]),
            signal[i],
            centre[..., i],
            clip=CLIP,
            loss_type=variant["loss_type"],
            num_terms=BATCH,
        )
        summed = summed + part
    assert abs(summed - whole) < 1e-12
    assert gap(gradient(summed, v), gradient(whole, v)) < 1e-12


# Metrics


def test_saturation_runs_from_0_at_old_to_1_where_the_gradient_vanishes():
    v, v_old, target, advantage = fields(at_old=True)
    signal = unit_signal(advantage, CLIP)
    q = implicit_reward(v, v_old, target).detach()
    assert progress_metrics(q, signal, centres(q, signal, GROUP), 1.0)["saturation"] == 0
    # beta q = R + constant: all of the advantage is realised. Half of it: 1/2.
    for share in (0.5, 1.0):
        q = (share * signal / 2.0 + 3.0).requires_grad_()
        for weight_temp in (-1.0, 0.2):  # one direction, and two
            metrics = progress_metrics(q, signal, centres(q, signal, GROUP, weight_temp=weight_temp), 2.0)
            assert abs(metrics["saturation"] - share) < 1e-6
    assert gradient(loss_of(q, advantage, beta=2.0), q).abs().max() < 1e-12


def test_implicit_reward_metrics_by_hand():
    q, signal = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])
    metrics = progress_metrics(q, signal, centres(q, signal, torch.zeros(2)), 1.0)
    assert metrics["implicit_reward"] == 2
    assert metrics["implicit_reward_std"] == 1
    assert math.isnan(metrics["saturation"])  # nothing was asked


# Eq. 8: the anchor


def test_anchor_by_hand():
    # Strengths: 1e-4 + s (.1 - 1e-4) = 1e-4, .05005, .1 for s = 0, .5, 1; and nothing for kl_beta = 0.
    s = torch.tensor([0.0, 0.5, 1.0])
    strength = anchor_strength(0.1, s)
    assert gap(strength, torch.tensor([1e-4, 0.05005, 0.1])) < 1e-8
    assert (anchor_strength(0.0, s) == 0).all()
    # Distances mean (v - v_ref)^2: (1 + 9) / 2 = 5, 0, 4. Sum 5e-4 + 0 + .4; over 3, or over 10.
    v = torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, -2.0]])
    assert abs(anchor_loss(v, torch.zeros(3, 2), strength).item() - 0.4005 / 3) < 1e-7
    assert abs(anchor_loss(v, torch.zeros(3, 2), strength, num_terms=10).item() - 0.04005) < 1e-7


def test_anchor_moves_the_trained_field_only():
    v, v_ref, _, _ = fields()
    v_ref, s = v_ref.requires_grad_(), torch.rand(BATCH, dtype=torch.float64).requires_grad_()
    assert not anchor_strength(0.1, s).requires_grad
    value = anchor_loss(v, v_ref, anchor_strength(0.1, s))
    by_v, by_ref, by_s = torch.autograd.grad(value, [v, v_ref, s], allow_unused=True)
    expected = anchor_strength(0.1, s)[:, None, None] * 2 * (v - v_ref) / DIM / BATCH
    assert gap(by_v, expected) < 1e-14
    assert by_ref is None
    assert by_s is None


# Eq. 9: schedules of the slow copies


def test_published_schedules_by_hand():
    # OCR: old min(.25 + .005 n, .999), at .999 from n = 150; sampler 0 until 75, then .0075 (n - 75), .9975 at 208.
    old, sampler = parse_schedule("0-0.25-0.005-0.999"), parse_schedule("75-0-0.0075-0.999")
    found = [decay_at(old, n) for n in (0, 10, 149, 150, 10_000)]
    assert np.abs(np.array(found) - [0.25, 0.3, 0.995, 0.999, 0.999]).max() < 1e-12
    found = [decay_at(sampler, n) for n in (0, 74, 75, 76, 208, 209)]
    assert np.abs(np.array(found) - [0, 0, 0, 0.0075, 0.9975, 0.999]).max() < 1e-12


def test_copying_freezing_and_exponents_can_be_written():
    assert [decay_at(parse_schedule("0-0-0-0"), n) for n in (0, 5)] == [0, 0]
    assert [decay_at(parse_schedule("0-1-0-1"), n) for n in (0, 5)] == [1, 1]
    assert parse_schedule("0-0-1e-3-0.5") == (0, 0, 1e-3, 0.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "75-0-0.0075",
        "0-0-0-0-0",
        "a-0-0-0",
        "0--1-0-0",
        "1.5-0-0-0",
        "0-0-0-2",
        "0-nan-0-1",
        "0-0-nan-1",
        "0-0-inf-1",
    ],
)
def test_malformed_schedules_are_refused_with_an_example(text):
    with pytest.raises(UserError, match=r"75-0-0\.0075-0\.999"):
        parse_schedule(text)


# The population of one prompt in one dimension, where everything is known: r = x, beta = 2, old pi = (.5, .3, .2),
# mu = (-2, .5, 2.5), s = .5. Population averages are plain means over equally likely values of x_0 and of eps.

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-2.0], [0.5], [2.5]], dtype=torch.float64)
OLD = Mixture(WEIGHTS, MEANS, 0.5)
ONE = torch.ones(1, dtype=torch.float64)


def population(num_x0=200, num_eps=100):
    """Quantile midpoints of x_0 and eps, every pair, (N, 1) each."""
    grid = np.linspace(-6, 6, 20_001)
    cdf = sum(w * norm.cdf(grid, m, 0.5) for w, m in zip(WEIGHTS.tolist(), MEANS[:, 0].tolist(), strict=True))
    x0 = torch.from_numpy(np.interp((np.arange(num_x0) + 0.5) / num_x0, cdf, grid))
    eps = torch.from_numpy(ndtri((np.arange(num_eps) + 0.5) / num_eps))
    return torch.cartesian_prod(x0, eps).split(1, dim=1)


def population_loss(v, v_old, x0, eps, beta):
    """Eq. 7 for R = r, with C = beta so that its factor is 1; not self-normalised."""
    q, reward, group = implicit_reward(v, v_old, eps - x0, adaptive=False), x0[:, 0], torch.zeros(len(x0))
    return distillation_loss(q, reward, centres(q, reward, group), beta=beta, clip=beta)


def minimised(basis, v_old, x0, eps, beta):
    """The least loss over fields v_old + basis @ c, and c."""
    c = torch.zeros(basis.shape[1], 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [c], max_iter=60, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = population_loss(v_old + basis @ c, v_old, x0, eps, beta)
        value.backward()
        return value

    optimizer.step(closure)
    return closure().item(), c.detach()[:, 0]


def tents(x, num):
    """Piecewise-linear basis (N, num) over the range of x (N, 1)."""
    nodes = torch.linspace(x.min().item(), x.max().item(), num, dtype=torch.float64)
    return (1 - (x - nodes).abs() / (nodes[1] - nodes[0])).clamp_min(0)


def test_the_squared_loss_has_its_golden_values_and_is_not_minimised_by_the_tilt():
    # Averaged over t, loss at old / exact tilt / optimum: 3.452, 73.1, 2.183 by an independent program.
    x0, eps = population(100, 60)
    tilted, _ = OLD.tilted(ONE, 0.5)
    nodes, weights = np.polynomial.legendre.leggauss(10)
    losses = np.zeros(3)
    for t, weight in zip(torch.from_numpy((nodes + 1) / 2), weights / 2, strict=True):
        x_t = (1 - t) * x0 + t * eps
        v_old = OLD.velocity(x_t, t)
        at_old, at_tilt = (population_loss(v, v_old, x0, eps, 2.0) for v in (v_old, tilted.velocity(x_t, t)))
        least, _ = minimised(tents(x_t, 21), v_old, x0, eps, 2.0)
        losses += weight * np.array([at_old.item(), at_tilt.item(), least])
    assert np.abs(losses / [3.452, 73.1, 2.183] - 1).max() < 0.01


def test_the_tilt_has_no_loss_where_noise_is_averaged_before_the_square_and_a_large_one_after_it():
    # With the bound's weight (1 - t) / t. By an independent, coarser program: 3.452 at old; at the tilt .006 averaged
    # before the square, where 0 is exact, and 15.9 averaged after it, where finer grids tend to 15.6.
    num_x0, num_eps = 100, 60
    x0, eps = population(num_x0, num_eps)
    tilted, _ = OLD.tilted(ONE, 0.5)
    nodes, weights = np.polynomial.legendre.leggauss(10)
    rewards, one_group = x0[::num_eps, 0], torch.zeros(num_x0)
    inside, outside = torch.zeros(num_x0, dtype=torch.float64), 0.0
    for t, weight in zip(torch.from_numpy((nodes + 1) / 2), weights / 2, strict=True):
        x_t, bound = (1 - t) * x0 + t * eps, (1 - t) / t
        v, v_old = tilted.velocity(x_t, t), OLD.velocity(x_t, t)
        q = implicit_reward(v, v_old, eps - x0, adaptive=False)
        inside += weight * bound * q.view(num_x0, num_eps).mean(1)
        outside += weight * population_loss(v, v_old, x0, eps, 2.0 * bound)

    def loss(q):
        return distillation_loss(q, rewards, centres(q, rewards, one_group), beta=2.0, clip=2.0)

    assert abs(loss(torch.zeros_like(inside)) / 3.452 - 1) < 0.01
    assert loss(inside) < 1e-4
    assert abs(outside / 15.6 - 1) < 0.01


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_first_step_goes_along_the_covariance_of_target_and_reward(t):
    # d loss / d v(x_t) at old is -4 beta Cov(u, R | x_t) p(x_t), and Cov(u, R | x_t) = -(t / (1 - t)) grad E[R | x_t].
    t = torch.tensor(t, dtype=torch.float64)
    x0, eps = population(1000, 300)
    x_t = ((1 - t) * x0 + t * eps).requires_grad_()
    (slope,) = torch.autograd.grad(OLD.denoised(x_t, 1 - t, t).sum(), x_t)
    covariance = -(t / (1 - t)) * slope  # (N, 1)
    x_t = x_t.detach()
    basis = torch.cat([torch.ones_like(x_t), x_t, torch.sin(2 * x_t), torch.cos(2 * x_t)], 1)
    c = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    v_old = OLD.velocity(x_t, t)
    found = gradient(population_loss(v_old + basis @ c, v_old, x0, eps, 2.0), c)[:, 0]
    expected = -4 * 2.0 * (basis * covariance).mean(0)
    assert gap(found, expected) < 0.01 * expected.abs().max()


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_weak_rewards_are_fitted_by_the_closed_form_minimiser_of_the_square(t):
    # To first order v - v_old = Cov(u, R | x_t) / (2 beta Var(u | x_t)). Here u = (x_t - x_0) / t, so with R = x_0 the
    # covariance is -Var / t and the variance Var / t^2, Var that of x_0 given x_t: v - v_old = -t / (2 beta).
    # The exact tilt would be -Var / (t beta): 2.7 times t / beta at t = .5, and far from constant.
    beta, t = 500.0, torch.tensor(t, dtype=torch.float64)
    x0, eps = population()
    x_t = (1 - t) * x0 + t * eps
    basis = torch.cat([torch.ones_like(x_t), x_t, torch.sin(2 * x_t)], 1)
    _, c = minimised(basis, OLD.velocity(x_t, t), x0, eps, beta)
    assert gap(c * beta / t, torch.tensor([-0.5, 0.0, 0.0])) < 0.02


def test_bce_is_torchs():
    q, signal = torch.tensor([1.0, -2.0]), torch.tensor([0.9, 0.2])
    centre = torch.zeros(2, 1, 2)
    expected = functional.binary_cross_entropy(torch.sigmoid(q), torch.sigmoid(signal))
    value = distillation_loss(q, signal, centre, clip=1.0, loss_type="bce")
    assert abs(value - expected) < 1e-6


# The glue

SETTINGS = {"num_train_times": 2, "crd_beta": 1.5, "adv_clip_range": 2.0, "kl_beta": 0.5, "kl_cfg": 2.5}
UPDATES = {
    "defaults": {},
    "plain errors to the reference": {"use_old_for_loss": False, "adaptive_logp": False},
    "softmax, anchored by the advantage": {"weight_temp": 0.2, "reward_adaptive_kl": "advantage"},
    "bce, not centred, evenly anchored": {"crd_loss_type": "bce", "centring": "none", "reward_adaptive_kl": "off"},
}
TEXTS = ("a red circle", "two stars", "a blue square")
PROMPTS = Prompts(TEXTS, ({}, {}, {}), (0, 1, 2))


def build(tiny, **settings):
    """CRD over a pipeline whose roles have LoRAs of their own, far from each other and from the reference."""
    config = CRDConfig(**SETTINGS | settings)
    face = tiny(frozen=config.frozen_roles)
    for seed, role in enumerate(face.roles.names):
        generator = torch.Generator().manual_seed(seed)
        for parameter in face.roles.parameters(role).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    rewards = Composite({"bright": (lambda images, prompts, metadata: images.mean((1, 2, 3)), 1.0)})
    rollout = RolloutConfig(num_prompts=3, group_size=2, num_inference_steps=2)
    return CRD(config, face, Rollouts(face, PROMPTS, rewards, rollout, face.resolution, seed=3), batch_size=4)


def rollout_of(face):
    """Groups of 3, 2 and 4, interleaved, with rewards beyond [0, 1] and advantages beyond the clip."""
    generator = torch.Generator().manual_seed(5)
    columns = {
        "latents": torch.randn(9, 8, 8, 8, generator=generator),
        "group": torch.tensor([0, 1, 2, 0, 2, 1, 2, 0, 2]),
        "sibling": torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3]),
        "reward": torch.linspace(-0.3, 1.3, 9),
        "scaled": 1.5 * torch.randn(9, generator=generator),
        "advantage": torch.tensor([1.0, -0.4, 2.6, 0.3, -1.2, 0.4, 0.7, -1.3, -3.1]),
    }
    return Rollout(PROMPTS, face.encode(TEXTS), **columns, seed=3, step=1)


def update_by_hand(method, rollout):
    """Eq. 1 to 8 with the numbers of SETTINGS, of all samples at once, averaged over samples and times."""
    config, face, total = method.config, method.pipeline, 0.0
    times = times_of(rollout, config, method.rollouts.time_grid())
    strengths = {
        "reward": 1e-4 + rollout.reward.clamp(0, 1) * (0.5 - 1e-4),
        "advantage": 1e-4 + (rollout.advantage.clamp(-2, 2) / 4 + 0.5) * (0.5 - 1e-4),
        "off": torch.full((9,), 0.5),
    }
    for number in (0, 1):
        at = points(face, rollout, times[:, number], number)

        def field(role, condition, at=at):
            return face.predict(at.x_t, at.t, condition, role).flow

        with torch.no_grad():
            v_old = field("old" if config.use_old_for_loss else "ref", at.condition)
            unguided = field("ref", face.unconditional.expand(9))
            v_ref = unguided + 2.5 * (field("ref", at.condition) - unguided)
        v = field("default", at.condition)
        errors = []
        for prediction in (v, v_old):
            difference = (prediction - at.target).flatten(1)
            m = difference.detach().abs().mean(1) if config.adaptive_logp else 1.0
            errors.append(difference.square().mean(1) / m)
        total = total + written_out(
            errors[1] - errors[0],
            rollout.scaled if config.centring == "none" else rollout.advantage,
            config.centring,
            config.weight_temp,
            config.crd_loss_type,
            beta=1.5,
            group=rollout.group,
            clip=2.0,
        )
        total = total + (strengths[config.reward_adaptive_kl] * (v - v_ref).square().mean((1, 2, 3))).mean()
    return total / 2


@pytest.mark.parametrize("settings", UPDATES.values(), ids=UPDATES)
def test_loss_and_gradient_of_an_update_are_the_equations_in_packs_and_in_two_passes(tiny, settings):
    method = build(tiny, **settings)
    rollout, weights = rollout_of(method.pipeline), method.trained()["default"].values()
    expected = update_by_hand(method, rollout)
    slopes = torch.autograd.grad(expected, weights)
    wanted = torch.cat([slope.flatten() for slope in slopes])
    for method.batch_size in (5, 3):  # packs of 3 + 2 and 4; 3, 2, and 4 in two passes
        value, found = 0.0, 0.0
        for loss in method.losses(rollout):
            value += loss.value.item()
            found = found + torch.cat([s.flatten() for s in torch.autograd.grad(loss.value, weights)])
        assert value == pytest.approx(expected.item(), rel=1e-4)
        assert gap(found, wanted) < 1e-4 * wanted.abs().max()


@torch.no_grad()
def test_the_anchor_compares_noise_where_networks_predict_noise(tiny_sd_folder, build_face):
    method = build(partial(build_face, tiny_sd_folder), reward_adaptive_kl="off", kl_beta=0.3)
    face = method.pipeline
    x_t = torch.randn(2, *face.latent_shape(face.resolution), generator=torch.Generator().manual_seed(0))
    at = Points(x_t, x_t, torch.tensor([0.5, 0.99]), x_t, face.encode(TEXTS[:2]), torch.arange(2))
    now, anchor, nothing = method._now(at), method._anchor(at), torch.zeros(2)
    loss = method._loss(now, anchor, nothing, nothing, torch.zeros(2, 1, 2), None, 2)
    difference = (now.value - anchor.value).square().mean().item()
    assert loss.metrics["kl"].item() == pytest.approx(difference, rel=1e-5)
    assert loss.value.item() == pytest.approx(0.3 * difference, rel=1e-5)


def test_a_process_divides_by_the_mean_of_all_lengths_and_counts_no_update_where_all_have_lost_everything(tiny):
    method = build(tiny)
    rollout = rollout_of(method.pipeline)
    alone = sum(loss.value.item() for loss in method.losses(rollout))
    more = torch.tensor([3.0 * len(rollout)])  # another process has three times as many
    method.rollouts = replace(method.rollouts, processes=Processes(0, 2, lambda x: torch.cat([x, more])))
    assert sum(loss.value.item() for loss in method.losses(rollout)) == pytest.approx(alone / 2, rel=1e-4)
    nothing = rollout[torch.tensor([], dtype=torch.long)]
    assert not list(method.losses(nothing))
    assert method.updates == 3  # the other process had something
    method.rollouts = replace(method.rollouts, processes=Processes())
    assert not list(method.losses(nothing))
    assert method.updates == 3


@torch.no_grad()
@pytest.mark.parametrize(("decay", "role"), [("75-0-0.0075-0.999", "sampler"), (None, "old")])
def test_rollouts_are_drawn_by_the_sampler_or_where_there_is_none_by_the_old_role(tiny, decay, role):
    method = build(tiny, sampling_model_decay=decay, updates_per_step=3)
    parts = method.collect(4)
    assert [(part.step, part.group.unique().tolist()) for part in parts] == [(4, [0]), (4, [1]), (4, [2])]
    for part in parts:
        for other in method.pipeline.roles.names:
            difference = gap(part.latents, method.rollouts.again(part, other))
            assert difference < 1e-5 if other == role else difference > 0.1


def weights_of(roles, role):
    return torch.cat([p.flatten() for p in roles.parameters(role).values()])


@torch.no_grad()
@pytest.mark.parametrize("sampling", ["1-0-0.6-0.9", None])
def test_after_a_step_each_slow_role_has_moved_by_its_own_schedule(tiny, sampling):
    # old keeps .2 + .05 n; the sampler .6 (n - 1), .9 at most. Two updates a step: n = 2, then 4.
    method = build(tiny, old_model_decay="0-0.2-0.05-0.9", sampling_model_decay=sampling, num_train_times=1)
    roles = method.pipeline.roles
    for step, kept in enumerate(({"old": 0.3, "sampler": 0.6}, {"old": 0.4, "sampler": 0.9})):
        decays = {role: decay for role, decay in kept.items() if role in roles.names}
        for part in method.collect(step):
            list(method.losses(part))
        before = {role: weights_of(roles, role) for role in roles.names}
        log = method.after_step(step)
        assert {name: log[name] for name in log if name.startswith("decay")} == pytest.approx(
            {f"decay/{role}": decay for role, decay in decays.items()}
        )
        assert 0 < log["reward"] < 1
        assert torch.equal(weights_of(roles, "default"), before["default"])
        for role, decay in decays.items():
            assert gap(weights_of(roles, role), decay * before[role] + (1 - decay) * before["default"]) < 1e-6


def test_the_trained_role_is_exported(tiny, tmp_path):
    method = build(tiny)
    method.export(tmp_path)
    exported = load_file(tmp_path / "adapter_model.safetensors")
    weights = method.pipeline.roles.parameters("default")
    assert len(exported) == len(weights)
    assert all(torch.equal(exported[f"base_model.model.{name}"], p) for name, p in weights.items())


def test_rewards_on_another_scale_than_the_anchors_are_told_once(tiny, caplog):
    method = build(tiny)
    method._check_scale(torch.tensor([0.0, 0.4, 1.0]))
    assert not caplog.text
    for _ in range(2):
        method._check_scale(torch.tensor([0.2, 22.5]))
    assert caplog.text.count("rewards of 0.2 to 22.5: the anchor's strength grows with rewards from 0 to 1") == 1
    for settings in ({"reward_adaptive_kl": "advantage"}, {"kl_beta": 0.0}):
        caplog.clear()
        build(tiny, **settings)._check_scale(torch.tensor([-1.0]))
        assert not caplog.text


def test_what_is_logged_of_a_step_is_forgotten_with_it(tiny):
    method = build(tiny)
    list(method.losses(rollout_of(method.pipeline)))
    assert "saturation" in method.after_step(0)
    assert "saturation" not in method.after_step(1)
