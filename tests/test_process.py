import diffusers
import pytest
import torch

from trimtab.process import (
    RectifiedFlow,
    VariancePreserving,
    logit_normal,
    over,
    shifted,
    stable_diffusion_table,
    stratified,
    widened,
)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def gap(a, b):
    return (a - b).abs().max().item()


def test_the_table_is_stable_diffusions_to_the_bit():
    assert torch.equal(stable_diffusion_table(), diffusers.DDPMScheduler(**SD).alphas_cumprod)


def test_every_row_of_the_table_is_hit_exactly_from_float32_times():
    process = VariancePreserving()
    table = stable_diffusion_table().double()
    rows = torch.arange(1000)
    for t in (process.time(rows), torch.linspace(0, 1, 1001)[1:]):
        assert t.dtype == torch.float32
        assert torch.equal(process.timestep(t), rows.float())
        assert torch.equal(process.alpha(t), table.sqrt().float())
        assert torch.equal(process.sigma(t), (1 - table).sqrt().float())


def test_vp_noised_is_ddpm_add_noise():
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 5, 4, 3, 3)
    rows = torch.tensor([0, 1, 500, 998, 999])
    process = VariancePreserving()
    expected = diffusers.DDPMScheduler(**SD).add_noise(x0, eps, rows)
    assert gap(process.noised(x0, eps, process.time(rows)), expected) < 1e-6


def test_flow_noised_and_timestep_are_those_of_the_flow_scheduler():
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    x0, eps = torch.randn(2, 4, 4, 3, 3)
    t = scheduler.sigmas[:-1]
    assert torch.equal(RectifiedFlow().timestep(t), scheduler.timesteps)
    expected = scheduler.scale_noise(x0, scheduler.timesteps, eps)
    assert gap(RectifiedFlow().noised(x0, eps, t), expected) < 1e-6


def test_between_rows_the_table_is_linear_in_abar():
    # Half way between rows 499 (t = .5) and 500 (t = .501); and half way between clean data (t = 0) and row 0.
    process = VariancePreserving()
    table = stable_diffusion_table().double()
    t = torch.tensor([0.5005, 0.0005], dtype=torch.float64)
    expected = torch.stack([(table[499] + table[500]) / 2, (1 + table[0]) / 2])
    assert gap(process.alpha(t) ** 2, expected) < 1e-15
    assert gap(process.timestep(t), torch.tensor([499.5, -0.5])) < 1e-6


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving()])
def test_t_0_is_data_noise_rises_and_timesteps_invert(process):
    t = torch.linspace(0, 1, 1234, dtype=torch.float64)
    assert process.alpha(t[0]) == 1
    assert process.sigma(t[0]) == 0
    assert (process.alpha(t).diff() < 0).all()
    assert (process.sigma(t).diff() > 0).all()
    assert gap(process.time(process.timestep(t)), t) < 1e-6


def test_vp_keeps_the_variance_and_flow_keeps_the_sum():
    t = torch.linspace(0, 1, 777, dtype=torch.float64)
    vp, flow = VariancePreserving(), RectifiedFlow()
    assert gap(vp.alpha(t) ** 2 + vp.sigma(t) ** 2, torch.ones_like(t)) < 1e-15
    assert gap(flow.alpha(t) + flow.sigma(t), torch.ones_like(t)) < 1e-15


def test_a_table_of_zero_terminal_snr_ends_in_pure_noise():
    table = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True).alphas_cumprod
    process = VariancePreserving(table)
    assert process.alpha(torch.tensor(1.0)) == 0
    assert process.sigma(torch.tensor(1.0)) == 1
    assert process.alpha(torch.tensor(0.99995)).isfinite()


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving()])
def test_scalar_and_batched_times_agree_and_half_precision_data_is_computed_in_float32(process):
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 2, 2).bfloat16()
    t = torch.tensor(0.3)
    together = process.noised(x0, eps, t)
    assert together.dtype == torch.float32
    assert torch.equal(together, process.noised(x0, eps, t.expand(3)))
    exact = process.noised(x0.double(), eps.double(), t.double())
    assert gap(together, exact) < 1e-6  # bfloat16 arithmetic would be off by 1e-2


def test_over_refuses_times_that_fit_no_sample():
    with pytest.raises(ValueError, match=r"\(2,\) does not fit x of shape \(3, 4\)"):
        over(torch.zeros(2), torch.zeros(3, 4))


def test_widened_raises_half_precision_only():
    dtypes = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert all(widened(torch.zeros(1, dtype=given)).dtype == wanted for given, wanted in dtypes.items())


@pytest.mark.parametrize("table", [torch.tensor([0.5, 0.6]), torch.tensor([1.0, 0.5]), torch.full((2, 2), 0.5)])
def test_a_table_that_does_not_fall_from_below_1_is_refused(table):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        VariancePreserving(table)


def test_shifted_by_hand():
    # Golden numbers to three digits. By hand: 3 * .5 / (1 + 2 * .5) = .75; shift 1 changes nothing; ends stay.
    s = torch.tensor([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0])
    expected = torch.tensor([1, 0.964, 0.923, 0.875, 0.818, 0.75, 0.667, 0.5625, 0.4286, 0.25, 0])
    assert gap(shifted(s, 3.0), expected) < 6e-4
    assert torch.equal(shifted(s, 1.0), s)


def test_stratified_puts_one_time_in_each_stratum():
    # Four strata of [.2, 1] are .2 wide: u = 0, .5, .25, .75 gives .2 + 0, .4 + .1, .6 + .05, .8 + .15.
    u = torch.tensor([0, 0.5, 0.25, 0.75], dtype=torch.float64)
    expected = torch.tensor([0.2, 0.5, 0.65, 0.95], dtype=torch.float64)
    assert gap(stratified(u, 0.2, 1.0), expected) < 1e-15
    assert gap(stratified(u.expand(3, 4), 0.2, 1.0), expected) < 1e-15


def test_logit_normal_by_hand():
    # sigmoid(1 + 2 z) at z = -.5, 0 and .5: sigmoid of 0, 1 and 2.
    t = logit_normal(torch.tensor([-0.5, 0.0, 0.5]), mean=1.0, std=2.0)
    assert gap(t, torch.tensor([0.5, 0.731059, 0.880797])) < 1e-6
