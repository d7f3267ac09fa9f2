import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.groups import centred, frac_zero_std, leave_one_out, means, normalised, ranked, softmax_weights

# Two interleaved groups with ids that are neither contiguous nor sorted, and a lone sample.
GROUP = torch.tensor([70, -3, 70, -3, 70, 12])
X = torch.tensor([1.0, 10.0, 2.0, 30.0, 6.0, 5.0], dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    return (a - torch.as_tensor(b, dtype=a.dtype)).abs().max().item() < tolerance


def test_means_and_centred_by_hand():
    # (1 + 2 + 6) / 3 = 3, (10 + 30) / 2 = 20, 5.
    assert close(means(X, GROUP), [3, 20, 3, 20, 3, 5])
    assert close(centred(X, GROUP), [-2, -10, -1, 10, 3, 0])


def test_weighted_means_by_hand_whatever_the_scale_of_the_weights():
    # (1 * 1 + 3 * 2 + 0 * 6) / 4 = 7/4; (1 * 10 + 1 * 30) / 2 = 20; 5.
    weights = torch.tensor([1.0, 1.0, 3.0, 1.0, 0.0, 7.0])
    assert close(means(X, GROUP, weights), [1.75, 20, 1.75, 20, 1.75, 5])
    assert close(centred(X, GROUP, weights), [-0.75, -10, 0.25, 10, 4.25, 0])
    assert close(means(X, GROUP, 100 * weights), means(X, GROUP, weights))


def test_normalised_by_hand():
    # Population variances: group 70 (4 + 1 + 9) / 3 = 14/3; group -3: 100; alone: 0.
    std = torch.tensor([14 / 3, 100, 14 / 3, 100, 14 / 3, 0], dtype=torch.float64).sqrt()
    expected = torch.tensor([-2, -10, -1, 10, 3, 0]) / (std + 0.1)
    assert close(normalised(X, GROUP, eps=0.1), expected)
    # All of X: mean 9, squares 64 + 1 + 49 + 441 + 9 + 16 = 580, variance 580 / 6.
    expected = torch.tensor([-2, -10, -1, 10, 3, 0], dtype=torch.float64) / ((580 / 6) ** 0.5 + 0.1)
    assert close(normalised(X, GROUP, eps=0.1, std="global"), expected)
    with pytest.raises(ValueError, match="'batch' is neither"):
        normalised(X, GROUP, std="batch")


def test_ranked_by_hand_with_ties():
    # Values 3, 1, 1, 9: the two ones share places 0 and 1, so .5; then 2 and 3; divided by 3.
    x = torch.tensor([3.0, 5.0, 1.0, 5.0, 1.0, 9.0, 7.0])
    group = torch.tensor([1, 0, 1, 0, 1, 1, 4])
    assert close(ranked(x, group), [2 / 3, 0.5, 1 / 6, 0.5, 1 / 6, 1, 0.5], 1e-6)


def test_softmax_weights_by_hand_and_stable():
    # exp(x / 2) of x = 0, 2 log 3: 1 and 3.
    x = torch.tensor([0.0, 2 * torch.log(torch.tensor(3.0)), 5.0])
    assert close(softmax_weights(x, torch.tensor([0, 0, 1]), 2.0), [0.25, 0.75, 1], 1e-6)
    huge = torch.tensor([1e4, 1e4 - 1, -1e4, -1e4])
    expected = torch.tensor([1 / (1 + torch.exp(torch.tensor(-1.0))), 0.268941, 0.5, 0.5])
    assert close(softmax_weights(huge, torch.tensor([0, 0, 1, 1]), 1.0), expected, 1e-6)
    assert close(softmax_weights(X, GROUP, -2.0), softmax_weights(-X, GROUP, 2.0))


def test_leave_one_out_by_hand():
    # 1 - (2 + 6) / 2 = -3, 2 - 7/2 = -1.5, 6 - 1.5 = 4.5; 10 - 30; 30 - 10; nobody to compare with.
    assert close(leave_one_out(X, GROUP), [-3, -20, -1.5, 20, 4.5, 0])


def test_frac_zero_std_counts_groups_not_samples():
    x = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.3])
    assert frac_zero_std(x, torch.tensor([5, 5, 5, 6, 6])).item() == 0.5
    assert frac_zero_std(x, torch.tensor([0, 0, 0, 0, 0])).item() == 0


values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20)
every = pytest.mark.parametrize("statistic", [centred, normalised, ranked, leave_one_out, means])


@every
@settings(max_examples=30, deadline=None)
@given(x=values, data=st.data())
def test_groups_do_not_see_each_other_nor_their_order_nor_their_names(statistic, x, data):
    x = torch.tensor(x, dtype=torch.float64)
    group = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=len(x), max_size=len(x))))
    together = statistic(x, group)
    for one in group.unique():
        assert close(together[group == one], statistic(x[group == one], group[group == one]), 1e-9)
    order = torch.tensor(data.draw(st.permutations(range(len(x)))))
    assert close(together[order], statistic(x[order], 1000 - 7 * group[order]), 1e-9)


@pytest.mark.parametrize("statistic", [centred, normalised, ranked, leave_one_out])
def test_a_constant_added_to_a_group_changes_nothing(statistic):
    offset = torch.tensor([1e3, -7.0, 1e3, -7.0, 1e3, 0.5], dtype=torch.float64)
    assert close(statistic(X + offset, GROUP), statistic(X, GROUP), 1e-10)
    assert close(softmax_weights(X + offset, GROUP, 0.5), softmax_weights(X, GROUP, 0.5), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("statistic", [centred, normalised, leave_one_out])
def test_equal_values_give_exactly_nothing(statistic, dtype):
    # In float32 the mean of 24 times .1 is not .1; the error over a small eps would pass for an advantage.
    x, group = torch.full((24,), 0.1, dtype=dtype), torch.zeros(24, dtype=torch.long)
    assert (statistic(x, group) == 0).all()


def test_centred_keeps_small_differences_on_a_large_offset():
    x = torch.tensor([1e8, 1e8 + 1, 1e8 + 2], dtype=torch.float64)
    assert torch.equal(centred(x, torch.zeros(3)), torch.tensor([-1.0, 0, 1], dtype=torch.float64))


def test_half_precision_is_computed_in_float32_and_float64_stays():
    assert centred(X.bfloat16(), GROUP).dtype == torch.float32
    assert centred(X, GROUP).dtype == torch.float64


@pytest.mark.parametrize("statistic", [centred, normalised, ranked, leave_one_out, means])
def test_nan_spoils_its_own_group_only(statistic):
    x = X.clone()
    x[2] = torch.nan
    result = statistic(x, GROUP)
    assert torch.equal(result.isnan(), GROUP == 70)
    assert close(result[GROUP != 70], statistic(X, GROUP)[GROUP != 70])


def test_gradient_of_centred_is_the_centring_projection():
    # d/dx_i sum_j c_j (x_j - mean) = c_i - mean(c) in each group.
    torch.manual_seed(0)
    x, c = X.clone().requires_grad_(), torch.randn(6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((c * centred(x, GROUP)).sum(), x)
    assert close(gradient, centred(c, GROUP))


def test_shapes_that_do_not_fit_are_refused():
    for x, group in ((torch.zeros(3), torch.zeros(4)), (torch.zeros(2, 2), torch.zeros(2, 2))):
        with pytest.raises(ValueError, match=r"must both be \(B,\)"):
            centred(x, group)


def tilts(anchored, num_rounds):
    """Maximise E[r] - KL(p, p_k) / e1 - KL(p, p_0) / e0 over and over: p_{k+1} ~ p_k^w p_0^(1 - w) exp(l r)."""
    p0 = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reward = torch.tensor([0, 0.3, 0.6, 1], dtype=torch.float64)
    e1, e0 = 2.0, 4.0
    w, strength = (e0 / (e0 + e1), e0 * e1 / (e0 + e1)) if anchored else (1.0, e1)
    p = p0
    for _ in range(num_rounds):
        logits = w * p.log() + (1 - w) * p0.log() + strength * reward
        p = softmax_weights(logits, torch.zeros(4, dtype=torch.long), 1.0)
    return p0, reward, p


def test_repeated_anchored_tilts_end_at_the_anchors_temperature():
    # The fixed point is p_0 exp(e0 r) / Z with e0 = 4; distance to it falls by 2/3 a round, (2/3)^40 = 9e-8.
    p0, reward, p = tilts(anchored=True, num_rounds=40)
    limit = p0 * (4 * reward).exp()
    assert (p - limit / limit.sum()).abs().max() < 6e-8


def test_without_an_anchor_the_tilt_grows_with_every_round():
    # log p / p_0 = k e1 r + constant with e1 = 2.
    for k in (1, 3, 6):
        p0, _, p = tilts(anchored=False, num_rounds=k)
        log_ratio = (p / p0).log()
        assert abs((log_ratio[3] - log_ratio[0]).item() - 2 * k) < 1e-9
