import math

import diffusers
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from trimtab.prediction import Prediction
from trimtab.process import RectifiedFlow, VariancePreserving
from trimtab.solvers import (
    ancestral,
    few_step,
    few_step_grid,
    guided,
    log_prob,
    ode,
    plms,
    sde,
    sde_step,
    time_grid,
    vp_few_step_grid,
    vp_time_grid,
)
from trimtab.worlds.gaussians import Mixture

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
MIXTURE = Mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[-2.0, 0.0], [1.5, 1.5], [1.5, -1.5]], dtype=torch.float64),
    0.5,
)


def gap(a, b):
    return (a - b).abs().max().item()


def exact(process):
    """The perfect network of the mixture under any process."""

    def predict(x, t):
        return Prediction(MIXTURE.denoised(x, process.alpha(t), process.sigma(t)), "x0", x, t, process)

    return predict


def wavy(kind, process):
    """Some smooth nonlinear network, to compare with schedulers; native output of the given kind."""

    def predict(x, t):
        return Prediction(network(x, process.timestep(t)), kind, x, t, process)

    return predict


def network(x, timestep):
    return torch.sin(x.roll(1, -1) + timestep / 300) + 0.3 * x


# Time grids


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0, 6.0])
def test_time_grid_is_the_flow_schedulers_to_the_bit(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    for num_steps in (1, 2, 4, 10, 28, 40, 1000):
        scheduler.set_timesteps(num_steps)
        assert torch.equal(time_grid(num_steps, shift), scheduler.sigmas)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("offset", [0, 1])
def test_vp_time_grid_visits_the_rows_of_ddim(spacing, offset):
    scheduler = diffusers.DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=offset)
    for num_steps in (1, 4, 7, 30, 50, 1000 if offset == 0 else 999):
        scheduler.set_timesteps(num_steps)
        times = vp_time_grid(num_steps, timestep_spacing=spacing, steps_offset=offset)
        assert torch.equal(VariancePreserving().timestep(times[:-1]), scheduler.timesteps.float())
        assert times[-1] == 0


def test_vp_time_grid_can_end_in_the_first_row():
    timestep = VariancePreserving().timestep
    assert timestep(vp_time_grid(5, steps_offset=1, set_alpha_to_one=False)).tolist() == [801, 601, 401, 201, 1, 0]
    assert timestep(vp_time_grid(5, set_alpha_to_one=False)).tolist() == [800, 600, 400, 200, 0]  # and not twice
    for num_steps in (61, 103, 1000):  # of which DDIM makes a row below the table, of the first two
        times = vp_time_grid(num_steps, timestep_spacing="trailing", set_alpha_to_one=False)
        assert (times.diff() < 0).all()
        assert len(times) == num_steps + (num_steps < 1000)


def test_bad_grids_are_refused():
    with pytest.raises(ValueError, match="1001 steps do not fit"):
        vp_time_grid(1001)
    with pytest.raises(ValueError, match="1001 steps do not fit"):
        vp_few_step_grid(1001)
    with pytest.raises(ValueError, match="1000 steps from row 1000 do not fit"):  # which DDIM would look for in vain
        vp_time_grid(1000, steps_offset=1)
    with pytest.raises(ValueError, match="'linspace' is neither"):
        vp_time_grid(10, timestep_spacing="linspace")
    for times in (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5, 0.5]), torch.ones(1, 2)):
        with pytest.raises(ValueError, match="strictly falling"):
            ode(wavy("flow", RectifiedFlow()), torch.zeros(1, 2), times)


# Agreement with diffusers


def run_scheduler(scheduler, x):
    path = [x]
    for timestep in scheduler.timesteps:
        path.append(scheduler.step(network(path[-1], timestep), timestep, path[-1]).prev_sample)
    return path


@pytest.mark.parametrize("num_steps", [1, 4, 10, 28])
def test_first_order_is_flow_match_euler_step_by_step(num_steps):
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    path = run_scheduler(scheduler, torch.randn(2, 4, 3, 3))
    times = time_grid(num_steps, 3.0)
    for i, expected in enumerate(path):
        assert gap(ode(wavy("flow", RectifiedFlow()), path[0], times[: i + 1]), expected) < 2e-6


@pytest.mark.parametrize(("kind", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_first_order_is_ddim_step_by_step(kind, theirs, set_alpha_to_one):
    torch.manual_seed(0)
    options = {"steps_offset": 1, "set_alpha_to_one": set_alpha_to_one}
    scheduler = diffusers.DDIMScheduler(**SD, **options, clip_sample=False, prediction_type=theirs)
    scheduler.set_timesteps(20)
    path = run_scheduler(scheduler, torch.randn(2, 4, 3, 3))
    times = vp_time_grid(20, **options)
    for i, expected in enumerate(path):
        ours = ode(wavy(kind, VariancePreserving()), path[0], times[: i + 1])
        assert gap(ours, expected) < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("num_steps", [2, 3, 8, 25])
def test_second_order_is_dpm_solver_multistep_on_a_table(num_steps):
    torch.manual_seed(0)
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    process = VariancePreserving()
    times = torch.cat([process.time(scheduler.timesteps), torch.zeros(1)])
    x = torch.randn(2, 4, 3, 3)
    expected = run_scheduler(scheduler, x)[-1]
    assert gap(ode(wavy("eps", process), x, times, order=2), expected) < 1e-5 * expected.abs().max()


def test_a_single_step_of_plms_is_one_of_first_order():
    predict, x = wavy("flow", RectifiedFlow()), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert gap(plms(predict, x, time_grid(1)), ode(predict, x, time_grid(1))) < 1e-6


def test_second_order_is_dpm_solver_multistep_on_rectified_flow():
    # The scheduler feeds the network truncated integer timesteps, so here the network does not look at time.
    torch.manual_seed(0)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.set_timesteps(12)
    x = path = torch.randn(2, 4, 3, 3)
    for timestep in scheduler.timesteps:
        path = scheduler.step(network(path, 0), timestep, path).prev_sample

    def predict(x_t, t):
        return Prediction(network(x_t, 0), "flow", x_t, t, RectifiedFlow())

    assert gap(ode(predict, x, scheduler.sigmas, order=2), path) < 1e-5 * path.abs().max()


# Convergence on the exact field


def exact_end(x, t_start, t_end):
    """The rectified-flow ODE of the mixture, by an independent integrator to 1e-11."""

    def field(t, flat):
        points = torch.from_numpy(flat).reshape(x.shape)
        return MIXTURE.velocity(points, torch.tensor(t, dtype=torch.float64)).flatten().numpy()

    solution = solve_ivp(field, (t_start, t_end), x.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-11)
    return torch.from_numpy(solution.y[:, -1]).reshape(x.shape)


def rectified_time(process, t):
    """The rectified-flow time of equal signal-to-noise, and the factor between the two samples."""
    scale = process.alpha(t) + process.sigma(t)
    return process.sigma(t) / scale, scale


COUNTS = np.array([40, 80, 160, 320])


def errors(process, order, t_start, t_end, counts=COUNTS):
    """Root mean square error at t_end (len(counts),) of even grids."""
    torch.manual_seed(0)
    ends = torch.tensor([t_start, t_end], dtype=torch.float64)
    (start, end), (scale_start, scale_end) = rectified_time(process, ends)
    z = torch.randn(64, 2, dtype=torch.float64)
    target = scale_end * exact_end(z, start.item(), end.item())
    found = []
    for count in counts:
        times = torch.linspace(t_start, t_end, count + 1, dtype=torch.float64)
        out = ode(exact(process), scale_start * z, times, order)
        found.append((out - target).square().mean().sqrt().item())
    return np.array(found)


def fitted_order(found):
    return -np.polyfit(np.log(COUNTS), np.log(found), 1)[0]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("process", "t_start", "t_end"),
    [(RectifiedFlow(), 0.9, 0.1), (VariancePreserving(), 0.9, 0.1)],
)
def test_measured_convergence_order_is_the_claimed_one(process, t_start, t_end, order):
    assert abs(fitted_order(errors(process, order, t_start, t_end)) - order) < 0.1


def test_between_the_very_ends_first_order_stays_and_second_order_pays_a_logarithm():
    # log-SNR is infinite at t = 1 and t = 0. Even steps in t grow in log-SNR like 1 / k, k steps from an end, and their
    # errors h^2 / k sum to h^2 log(1 / h).
    assert abs(fitted_order(errors(RectifiedFlow(), 1, 1.0, 0.0)) - 1) < 0.1
    assert abs(fitted_order(errors(RectifiedFlow(), 2, 1.0, 0.0) / np.log(COUNTS)) - 2) < 0.1


def test_second_order_is_far_more_accurate_at_equal_cost():
    first, second = (errors(RectifiedFlow(), order, 1.0, 0.0, [20])[0] for order in (1, 2))
    assert second < first / 3


def test_the_ode_is_exact_in_one_step_for_a_single_point():
    # One point mass at m (std -> 0): every line through it is straight, so x0 = m from anywhere in one step.
    point = Mixture(torch.ones(1), torch.tensor([[3.0, -1.0]]), 1e-6)

    def predict(x, t):
        return Prediction(point.velocity(x, t), "flow", x, t, RectifiedFlow())

    assert gap(ode(predict, torch.randn(5, 2), time_grid(1)), point.means) < 1e-5


@pytest.mark.parametrize("order", [1, 2])
def test_flow_and_table_give_the_same_path_at_equal_signal_to_noise(order):
    torch.manual_seed(0)
    process = VariancePreserving()
    times = torch.linspace(1, 0.05, 9, dtype=torch.float64)
    flow_times, scale = rectified_time(process, times)
    z = torch.randn(16, 2, dtype=torch.float64)
    ours = ode(exact(process), scale[0] * z, times, order) / scale[-1]
    assert gap(ours, ode(exact(RectifiedFlow()), z, flow_times, order)) < 1e-12


# Noise


def by_hand(kind, dt, t=0.8, x=0.5, v=2.0, a=0.7):
    """The three published steps in plain numbers."""
    x0, eps, t_next = x - t * v, x + (1 - t) * v, t + dt
    if kind == "flow":
        rate = a * math.sqrt(t / (1 - t))
        mean = x * (1 + rate**2 / (2 * t) * dt) + v * (1 + rate**2 * (1 - t) / (2 * t)) * dt
        return mean, rate * math.sqrt(-dt)
    if kind == "dance":
        return x + (v + 0.5 * a**2 * (x - (1 - t) * x0) / t**2) * dt, a * math.sqrt(-dt)
    std = t_next * math.sin(a * math.pi / 2)
    return (1 - t_next) * x0 + math.sqrt(t_next**2 - std**2) * eps, std


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_sde_step_by_hand(dynamics):
    full = torch.full((3, 2), 1.0, dtype=torch.float64)
    t = torch.tensor(0.8, dtype=torch.float64)
    prediction = Prediction(2 * full, "flow", 0.5 * full, t, RectifiedFlow())
    mean, std = sde_step(prediction, t - 0.1, 0.7, dynamics)
    expected_mean, expected_std = by_hand(dynamics, -0.1)
    assert gap(mean, expected_mean * full) < 1e-14
    assert gap(std, torch.tensor(expected_std)) < 1e-7
    assert std.shape == (1, 1)


def test_flow_sde_at_t_1_takes_the_next_time_in_the_denominator():
    # a = .7, t = 1, t' = .9: rate = .7 sqrt(1 / (1 - .9)) = 2.213594, std = rate sqrt(.1) = .7.
    one = torch.ones(1, 1, dtype=torch.float64)
    prediction = Prediction(one, "flow", one, torch.tensor(1.0, dtype=torch.float64), RectifiedFlow())
    mean, std = sde_step(prediction, torch.tensor(0.9, dtype=torch.float64), 0.7)
    # mean = 1 (1 - 4.9 / 2 * .1) + 1 (1 + 0) (-.1) = .655
    assert abs(mean.item() - 0.655) < 1e-12
    assert abs(std.item() - 0.7) < 1e-12


def test_sde_steps_take_one_time_per_sample():
    torch.manual_seed(0)
    x, v = torch.randn(2, 3, 4, dtype=torch.float64)
    t, t_next = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.8, 0.3, 0.1]).double()
    for dynamics in ("flow", "dance", "cps"):
        mean, std = sde_step(Prediction(v, "flow", x, t, RectifiedFlow()), t_next, 0.6, dynamics)
        for i in range(3):
            alone = Prediction(v[i : i + 1], "flow", x[i : i + 1], t[i], RectifiedFlow())
            one_mean, one_std = sde_step(alone, t_next[i], 0.6, dynamics)
            assert gap(mean[i], one_mean[0]) < 1e-14
            assert gap(std[i], one_std[0]) < 1e-14


def test_cps_with_a_perfect_prediction_keeps_the_level_of_noise():
    # Knowing x0 and eps, x' = alpha' x0 + (cos eps + sin z) sigma' has variance sigma'^2 about alpha' x0.
    process = VariancePreserving()
    x0, eps = torch.full((1, 1), 2.0).double(), torch.ones(1, 1).double()
    t, t_next = torch.tensor([0.8, 0.6], dtype=torch.float64)
    x_t = process.noised(x0, eps, t)
    mean, std = sde_step(Prediction(x0, "x0", x_t, t, process), t_next, 0.4, "cps")
    of_eps = (mean - process.alpha(t_next) * x0) / eps
    assert gap(of_eps**2 + std**2, process.sigma(t_next) ** 2) < 1e-12


@pytest.mark.parametrize(("dynamics", "level"), [("flow", 0.7), ("dance", 0.7), ("cps", 0.1)])
def test_sampling_with_noise_keeps_the_marginals_of_the_mixture(dynamics, level):
    # 200 steps from t = 1 to t = .2, 20,000 samples. One standard error of a mean is sqrt(var / N) <= .011 and of a
    # variance at most sqrt(2 / N) var <= .024; the time steps add a bias of about the same size.
    generator = torch.Generator().manual_seed(0)
    num, times = 20_000, torch.linspace(1, 0.2, 201)
    noise = torch.randn(200, num, 2, generator=generator)
    x = torch.randn(num, 2, generator=generator)
    out = sde(exact(RectifiedFlow()), x, times, noise, level, dynamics)[0][-1].double()
    mean = MIXTURE.weights @ MIXTURE.means
    spread = (MIXTURE.weights[:, None] * (MIXTURE.means - mean) ** 2).sum(0)
    variance = 0.8**2 * (0.5**2 + spread) + 0.2**2
    assert gap(out.mean(0), 0.8 * mean) < 0.04
    assert gap(out.var(0), variance) < 0.06


def test_log_prob_is_the_mean_gaussian_log_density_and_gives_the_sample_no_gradient():
    torch.manual_seed(0)
    x, mean = torch.randn(2, 3, 4, 5, requires_grad=True).unbind(0)
    std = torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1)
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2))
    ours = log_prob(x, mean, std)
    assert gap(ours, expected) < 1e-6
    by_x, by_mean = torch.autograd.grad(ours.sum(), [x, mean], allow_unused=True)
    assert by_x is None
    assert gap(by_mean, (x - mean) / std**2 / 20) < 1e-6


def test_log_prob_without_std_is_minus_the_mean_square():
    # ((1 - 3)^2 + (2 - 2)^2) / 2 = 2
    x, mean = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])
    assert log_prob(x.bfloat16(), mean.bfloat16(), None).item() == -2


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_sde_returns_the_path_and_what_training_recomputes_from_it(dynamics):
    torch.manual_seed(0)
    times, noise, x = time_grid(5, 3.0), torch.randn(5, 3, 2), torch.randn(3, 2)
    predict = wavy("flow", RectifiedFlow())
    path, log_probs = sde(predict, x, times, noise, 0.7, dynamics)
    assert path.shape == (6, 3, 2)
    assert log_probs.shape == (5, 3)
    assert torch.equal(path[0], x)
    for i in range(5):
        mean, std = sde_step(predict(path[i], times[i]), times[i + 1], 0.7, dynamics)
        assert gap(path[i + 1], mean + std * noise[i]) < 1e-6
        again = log_prob(path[i + 1], mean, None if dynamics == "cps" else std)
        assert torch.equal(log_probs[i], again)


def test_sde_step_refuses_no_noise_and_undefined_dynamics():
    one = torch.ones(1, 1)
    flow = Prediction(one, "flow", one, torch.tensor(0.5), RectifiedFlow())
    table = Prediction(one, "eps", one, torch.tensor(0.5), VariancePreserving())
    with pytest.raises(ValueError, match="noise level above 0, got 0"):
        sde_step(flow, torch.tensor(0.4), 0)
    with pytest.raises(ValueError, match="'flow' is defined for RectifiedFlow"):
        sde_step(table, torch.tensor(0.4), 0.7)


# Few steps and guidance


def test_few_step_predicts_and_noises_again_by_hand():
    # x0_hat = x / 2 by a stand-in network. times 1, .5, 0 from x = 4: x0 = 2; x = .5 * 2 + .5 * 6 = 4; x0 = 2.
    def predict(x, t):
        return Prediction(x / 2, "x0", x, t, RectifiedFlow())

    noise = torch.tensor([6.0, 100.0]).reshape(2, 1, 1)
    times = torch.tensor([1.0, 0.5, 0.0])
    x = torch.full((1, 1), 4.0)
    assert few_step(predict, x, times, noise).flatten().tolist() == [4, 4, 2]  # the network's inputs, and the end
    assert few_step(predict, x, times[:1], noise[:0]).flatten().tolist() == [4]


def test_few_step_is_cps_at_full_noise():
    torch.manual_seed(0)
    times, noise, x = time_grid(4), torch.randn(4, 3, 2), torch.randn(3, 2)
    predict = wavy("flow", RectifiedFlow())
    path, _ = sde(predict, x, times, noise, 1.0, "cps")
    assert gap(few_step(predict, x, times, noise), path) < 1e-6


def test_a_student_is_called_at_the_published_times():
    assert few_step_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert few_step_grid(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])  # SD3's shift
    assert few_step_grid(1, 3.0).tolist() == [1, 0]
    rows = VariancePreserving().timestep(vp_few_step_grid(4)[:-1])
    assert rows.tolist() == [999, 749, 499, 249]  # DMD2's for SDXL
    assert vp_few_step_grid(3)[-1] == 0


def test_an_ancestral_step_by_hand():
    # abar .64, then .9: noise over signal falls from .6 / .8 = 3/4 to sqrt(.1 / .9) = 1/3, so k = 4/9. x0_hat is x / 2.
    process = VariancePreserving(torch.tensor([0.9, 0.64]))

    def predict(x, t):
        return Prediction(x / 2, "x0", x, t, process)

    x, z, times = torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([1.0, 0.5, 0.0])
    eps = (2 - 0.8) / 0.6
    expected = 0.9**0.5 + 0.1**0.5 * (4 / 9 * eps + (1 - 16 / 81) ** 0.5 * 3)
    assert ancestral(predict, x, times[:2], z[None]).item() == pytest.approx(expected, abs=1e-6)
    assert ancestral(predict, x, times[::2], torch.full((1, 1, 1), 1e6)).item() == 1  # the last call's noise is nothing


def test_noise_must_have_one_row_a_step():
    x, times, predict = torch.zeros(1, 2), time_grid(3), wavy("flow", RectifiedFlow())
    for sampler in (few_step, sde, ancestral):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            sampler(predict, x, times, torch.zeros(2, 1, 2))


def test_guidance_by_hand_and_off_at_1():
    # 1 + 3 (2 - 1) = 4
    cond, uncond = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    assert guided(cond, uncond, 3.0).item() == 4
    assert torch.equal(guided(cond, torch.tensor([[torch.nan]]), 1.0), cond)
    assert torch.equal(guided(cond, uncond, 0.0), uncond)


@pytest.mark.parametrize("kind", ["flow", "eps", "v"])
def test_guiding_outputs_guides_every_derived_quantity_alike(kind):
    torch.manual_seed(0)
    cond, uncond, x_t = torch.randn(3, 2, 4, dtype=torch.float64)
    t, process = torch.tensor(0.6, dtype=torch.float64), VariancePreserving()
    of = {name: Prediction(value, kind, x_t, t, process) for name, value in (("cond", cond), ("uncond", uncond))}
    both = Prediction(guided(cond, uncond, 4.5), kind, x_t, t, process)
    assert gap(both.x0, guided(of["cond"].x0, of["uncond"].x0, 4.5)) < 1e-12
    assert gap(both.eps, guided(of["cond"].eps, of["uncond"].eps, 4.5)) < 1e-12


@pytest.mark.parametrize("solver", ["ode", "sde", "few_step", "ancestral"])
def test_state_is_float32_whatever_the_network_computes_in(solver):
    torch.manual_seed(0)
    seen = []

    def predict(x, t):
        seen.append(x.dtype)
        return Prediction(network(x.bfloat16(), 1000 * t), "flow", x, t, RectifiedFlow())

    x, times, noise = torch.randn(2, 3).bfloat16(), time_grid(3), torch.randn(3, 2, 3)
    run = {
        "ode": lambda: ode(predict, x, times),
        "sde": lambda: sde(predict, x, times, noise)[0],
        "few_step": lambda: few_step(predict, x, times, noise),
        "ancestral": lambda: ancestral(predict, x, times[1:], noise[1:]),
    }[solver]
    assert run().dtype == torch.float32
    assert set(seen) == {torch.float32}


def test_an_order_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="order 3"):
        ode(wavy("flow", RectifiedFlow()), torch.zeros(1, 2), time_grid(2), order=3)


def test_no_steps_are_no_grid():
    for grid in (vp_time_grid, vp_few_step_grid):
        with pytest.raises(ValueError, match="0 steps do not fit"):
            grid(0)
