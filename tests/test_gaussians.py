import numpy as np
import pytest
import torch

from trimtab.worlds.gaussians import Mixture

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-2.0, 0.0], [1.5, 1.5], [1.5, -1.5]], dtype=torch.float64)
OLD = Mixture(WEIGHTS, MEANS, 0.5)
DIRECTION, STRENGTH = torch.tensor([1.0, 0.5], dtype=torch.float64), 0.8


def gap(a, b):
    return (a - b).abs().max().item()


def points(num=6):
    return OLD.sample(num, torch.Generator().manual_seed(0))


def written_out_velocity(x, t):
    """The field written out, sample by sample and component by component."""
    out = torch.zeros_like(x)
    for i in range(len(x)):
        spread = (1 - t[i]) ** 2 * OLD.std**2 + t[i] ** 2
        residual = x[i] - (1 - t[i]) * MEANS  # (K, D)
        responsibility = (WEIGHTS * torch.exp(-residual.square().sum(1) / (2 * spread))).numpy()
        for k, share in enumerate(responsibility / responsibility.sum()):
            e = residual[k]
            out[i] += share * (t[i] / spread * e - MEANS[k] - (1 - t[i]) * OLD.std**2 / spread * e)
    return out


def test_velocity_is_its_formula_written_out():
    x, t = points(), torch.tensor([0.0, 0.1, 0.3, 0.6, 0.9, 1.0], dtype=torch.float64)
    assert gap(OLD.velocity(x, t), written_out_velocity(x, t)) < 1e-12


def test_log_prob_is_torch_distributions_mixture():
    components = torch.distributions.Independent(torch.distributions.Normal(MEANS, 0.5), 1)
    expected = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(WEIGHTS), components)
    x = torch.cat([points(), torch.tensor([[30.0, -40.0]], dtype=torch.float64)])  # far out too
    assert gap(OLD.log_prob(x), expected.log_prob(x)) < 1e-10


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_score_is_the_gradient_of_the_marginals_log_density(t):
    x = points().requires_grad_()
    (gradient,) = torch.autograd.grad(OLD.marginal(t).log_prob(x).sum(), x)
    assert gap(OLD.score(x, torch.tensor(t, dtype=torch.float64)), gradient) < 1e-12


def test_score_velocity_and_posterior_mean_are_one_thing():
    # score = -(x_t + (1 - t) v) / t; and x0 = x_t - t v.
    x, t = points(), torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    v = OLD.velocity(x, t)
    assert gap(OLD.score(x, t), -(x + (1 - t)[:, None] * v) / t[:, None]) < 1e-10
    assert gap(OLD.denoised(x, 1 - t, t), x - t[:, None] * v) < 1e-12


def test_posterior_mean_is_that_of_bayes_rule_on_a_grid():
    # E[x0 | x_t] = int x0 p(x0) N(x_t; alpha x0, sigma^2) / int p(x0) N(...), on a grid of 400 x 400.
    axis = torch.linspace(-5, 5, 400, dtype=torch.float64)
    x0 = torch.cartesian_prod(axis, axis)
    alpha, sigma = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    x_t = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
    log_weights = OLD.log_prob(x0) - (x_t - alpha * x0).square().sum(1) / (2 * sigma**2)
    assert gap(OLD.denoised(x_t, alpha, sigma)[0], log_weights.softmax(0) @ x0) < 1e-6


def test_scalar_and_batched_times_agree_and_ends_are_finite():
    x = points()
    for t in (0.0, 0.5, 1.0):
        t = torch.tensor(t, dtype=torch.float64)
        assert gap(OLD.velocity(x, t), OLD.velocity(x, t.expand(6))) < 1e-15
        assert OLD.velocity(x, t).isfinite().all()


def test_sample_has_the_mixtures_mean_and_covariance_and_repeats_with_its_seed():
    # N = 100,000: one standard error of a mean is sqrt(3.3 / N) = .006, of a covariance at most .015.
    x = points(100_000)
    mean = WEIGHTS @ MEANS
    covariance = (WEIGHTS[:, None] * (MEANS - mean)).T @ (MEANS - mean) + 0.25 * torch.eye(2)
    assert gap(x.mean(0), mean) < 0.025
    assert gap(x.T.cov(), covariance) < 0.06
    assert torch.equal(x, points(100_000))


def test_marginal_is_the_law_of_noised_samples():
    # By characteristic function at two frequencies: mean cos and sin of f . x_t; standard error 1 / sqrt(N) = .003.
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(100_000, 2, generator=generator, dtype=torch.float64)
    x_t = 0.6 * OLD.sample(100_000, generator) + 0.4 * noise
    drawn = OLD.marginal(0.4).sample(100_000, generator)
    for frequency in ([1.0, 0.0], [0.5, -2.0]):
        phase = torch.tensor(frequency, dtype=torch.float64)
        for wave in (torch.cos, torch.sin):
            assert gap(wave(x_t @ phase).mean(), wave(drawn @ phase).mean()) < 0.02


def test_tilt_is_exact_up_to_log_z_everywhere():
    tilted, log_z = OLD.tilted(DIRECTION, STRENGTH)
    x = points(50)
    expected = OLD.log_prob(x) + STRENGTH * x @ DIRECTION - log_z
    assert gap(tilted.log_prob(x), expected) < 1e-11


def test_log_z_is_the_normaliser_by_quadrature():
    axis = torch.linspace(-6, 6, 400, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    area = (axis[1] - axis[0]).item() ** 2
    integral = ((OLD.log_prob(x) + STRENGTH * x @ DIRECTION).exp() * area).sum()
    assert gap(OLD.tilted(DIRECTION, STRENGTH)[1], integral.log()) < 1e-8


def test_tilts_add_up():
    once, log_z_once = OLD.tilted(DIRECTION, 0.3)
    twice, log_z_twice = once.tilted(DIRECTION, 0.5)
    direct, log_z = OLD.tilted(DIRECTION, 0.8)
    assert gap(twice.weights, direct.weights) < 1e-14
    assert gap(twice.means, direct.means) < 1e-14
    assert gap(log_z_once + log_z_twice, log_z) < 1e-13


def test_tilt_in_one_dimension_has_the_golden_weights_and_mean():
    # pi = (.5, .3, .2), mu = (-2, .5, 2.5), s = .5, lam = .5.
    means = torch.tensor([[-2.0], [0.5], [2.5]], dtype=torch.float64)
    old = Mixture(WEIGHTS, means, 0.5)
    tilted, _ = old.tilted(torch.ones(1, dtype=torch.float64), 0.5)
    assert gap(tilted.weights, torch.tensor([0.145, 0.304, 0.551])) < 5e-4
    assert abs((tilted.weights @ tilted.means).item() - 1.364) < 5e-4
    assert abs((old.weights @ old.means).item() + 0.350) < 5e-4


def elbo_integrand(x0, times, eps, shares):
    """E_eps of |v_tilted - u|^2 - |v_old - u|^2 (B, T) on given noise (N, 2) of given shares (N,)."""
    tilted, _ = OLD.tilted(DIRECTION, STRENGTH)
    out = torch.empty(len(x0), len(times), dtype=torch.float64)
    for i, x in enumerate(x0):
        for j, t in enumerate(times):
            x_t, target = (1 - t) * x + t * eps, eps - x
            gain = (tilted.velocity(x_t, t) - target).square() - (OLD.velocity(x_t, t) - target).square()
            out[i, j] = shares @ gain.sum(1)
    return out


def quadrature():
    """Times with weights (T,), and noise (N, 2) with shares (N,): Gauss-Legendre and Gauss-Hermite."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    times, dt = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    eps = torch.cartesian_prod(torch.from_numpy(nodes), torch.from_numpy(nodes))
    shares = torch.cartesian_prod(torch.from_numpy(weights), torch.from_numpy(weights)).prod(1) / (2 * np.pi)
    return times, dt, eps, shares


def test_difference_of_denoising_errors_is_the_log_ratio():
    # log p_tilted / p_old = -Int (1 - t) / t E_eps(|v_tilted - u|^2 - |v_old - u|^2) dt. Golden: exact values, and
    # those of an independent Monte-Carlo program, at six draws. The ratio depends on a . x alone, so any six points of
    # these values will do. Centring leaves lam (r - mean r). With weight 1 for (1 - t) / t only the scale changes.
    golden = torch.tensor([0.0047, 0.5073, -2.7265, -0.4468, 0.4718, 0.7238], dtype=torch.float64)
    golden_monte_carlo = torch.tensor([0.0073, 0.5088, -2.7260, -0.4489, 0.4706, 0.7249], dtype=torch.float64)
    log_z = OLD.tilted(DIRECTION, STRENGTH)[1]
    along = (golden + log_z) / (STRENGTH * DIRECTION.square().sum())  # (6,) a . x / |a|^2
    across = torch.linspace(-1, 1, 6, dtype=torch.float64)
    x0 = along[:, None] * DIRECTION + across[:, None] * torch.tensor([-0.5, 1.0])  # (6, 2)
    times, dt, eps, shares = quadrature()
    integrand = elbo_integrand(x0, times, eps, shares)

    log_ratio = -integrand @ (dt * (1 - times) / times)
    assert gap(log_ratio, golden) < 2e-4
    assert gap(log_ratio, golden_monte_carlo) < 3e-3
    reward = STRENGTH * x0 @ DIRECTION
    assert gap(log_ratio - log_ratio.mean(), reward - reward.mean()) < 2e-4

    unweighted = -integrand @ dt
    slope, _ = np.polyfit(golden.numpy(), unweighted.numpy(), 1)
    assert abs(slope - 2.7) < 0.2
    assert np.corrcoef(golden.numpy(), unweighted.numpy())[0, 1] > 0.997


def test_unfit_mixtures_are_refused():
    with pytest.raises(ValueError, match=r"give \(K,\), \(K, D\)"):
        Mixture(WEIGHTS, MEANS[:2], 0.5)
    with pytest.raises(ValueError, match="must sum to 1"):
        Mixture(2 * WEIGHTS, MEANS, 0.5)
    with pytest.raises(ValueError, match="std be above 0"):
        Mixture(WEIGHTS, MEANS, 0.0)
