from typing import get_args

import pytest
import torch

from trimtab.groups import means
from trimtab.matching import (
    BinnedMean,
    Normaliser,
    adaptive_error,
    denoising_error,
    fake_score_loss,
    misfit,
    normalised_direction,
    push_loss,
)
from trimtab.prediction import Prediction
from trimtab.process import RectifiedFlow, stratified
from trimtab.worlds.gaussians import Mixture


def gap(a, b):
    return (a - b).abs().max().item()


def pair(dtype=torch.float64):
    torch.manual_seed(0)
    value, target = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64).to(dtype)
    return value.requires_grad_(), target


def test_denoising_error_by_hand():
    # Differences 1, -3: (1 + 9) / 2 = 5; then 0, 0.
    value, target = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    assert denoising_error(value, target).tolist() == [5, 0]


def test_adaptive_error_by_hand():
    # Differences 1, -3: 5 over (1 + 3) / 2 = 2.5. The floor .1 takes over from a mean of .01: 1e-4 / .1 = 1e-3.
    value, target = torch.tensor([[2.0, 0.0], [0.01, 0.01]]), torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    expected = torch.tensor([2.5, 1e-3])
    assert (adaptive_error(value, target, floor=0.1) - expected).abs().max() < 1e-8


def test_no_difference_gives_no_error_and_no_gradient():
    value, _ = pair()
    error = adaptive_error(value, value.detach())
    (gradient,) = torch.autograd.grad(error.sum(), value)
    assert (error == 0).all()
    assert (gradient == 0).all()


def test_the_divisor_is_held_constant():
    # Gradient of mean square / m with m constant: 2 (value - target) / (D m), D = 16.
    value, target = pair()
    (gradient,) = torch.autograd.grad(adaptive_error(value, target).sum(), value)
    difference = (value - target).detach()
    scale = difference.abs().mean((1, 2, 3), keepdim=True)
    assert (gradient - 2 * difference / (16 * scale)).abs().max() < 1e-14


def test_adaptive_error_scales_like_the_difference_itself():
    value, target = pair()
    once, thrice = adaptive_error(value, target), adaptive_error(3 * value, 3 * target)
    assert (thrice - 3 * once).abs().max() < 1e-12


@pytest.mark.parametrize("error", [denoising_error, adaptive_error])
def test_half_precision_is_computed_in_float32_and_samples_do_not_mix(error):
    value, target = pair(torch.bfloat16)
    found = error(value, target)
    exact = error(value.double(), target.double())
    assert found.dtype == torch.float32
    assert found.shape == (3,)
    assert (found - exact).abs().max() < 1e-6
    assert (found[1] - error(value[1:2], target[1:2])[0]).abs() < 1e-7


def test_shapes_that_do_not_fit_are_refused():
    for value, target in ((torch.zeros(3), torch.zeros(3)), (torch.zeros(2, 3), torch.zeros(2, 4))):
        with pytest.raises(ValueError, match=r"must be of one shape \(B, \.\.\.\)"):
            denoising_error(value, target)


# Distribution matching. The ladder T1 to T7 of closed forms: a one-dimensional teacher N(1, .7^2), student a + b z.

MU, S, A, B, T = 1.0, 0.7, 0.2, 1.3, 0.5
SIGNS = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)  # z and eps with exact second moments


def gaussian_denoiser(mean, std):
    """E[x0 | y] of data N(mean, std^2) under rectified flow, linear in y."""
    return lambda y, t: mean + (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * (y - (1 - t) * mean)


def student_gradient(a=A, b=B, normaliser="none", group=None):
    """Gradient of the push with respect to the student's a and b, averaged exactly over z and eps."""
    a, b = (
        torch.tensor(a, dtype=torch.float64, requires_grad=True),
        torch.tensor(b, dtype=torch.float64, requires_grad=True),
    )
    x = (a + b * SIGNS[:, 0])[:, None]
    y = (1 - T) * x.detach() + T * SIGNS[:, 1:]
    real, fake = gaussian_denoiser(MU, S)(y, T), gaussian_denoiser(a.item(), b.item())(y, T)
    group = torch.arange(4) if group is None else group
    update = normalised_direction(real - fake, misfit(x, real), group, normaliser)
    return [g.item() for g in torch.autograd.grad(push_loss(x, update), (a, b))]


def test_direction_moves_a_gaussian_student_as_the_closed_form_says():
    # (a - mu) t^2 / ((1 - t)^2 s^2 + t^2), and (1 - t) b (k_fake - k_real)
    assert student_gradient() == pytest.approx([-0.53691, 0.38921], abs=1e-5)
    assert student_gradient(a=MU, b=S) == pytest.approx([0, 0], abs=1e-15)


def test_the_siblings_mean_of_the_direction_is_no_baseline():
    # a is what all siblings share: its gradient is gone; that of b is scaled by 1 - 1 / G in expectation over z.
    torch.manual_seed(0)
    num_groups, size = 40_000, 8
    z, eps = torch.randn(2, num_groups * size, 1, dtype=torch.float64)
    group = torch.arange(num_groups).repeat_interleave(size)
    x = A + B * z
    y = (1 - T) * x + T * eps
    r = gaussian_denoiser(MU, S)(y, T) - gaussian_denoiser(A, B)(y, T)
    centred = r - means(r[:, 0], group)[:, None]
    assert -centred.mean().item() == pytest.approx(0, abs=1e-12)
    assert -(centred * z).mean().item() == pytest.approx(0.38921 * 7 / 8, abs=0.01)
    whitened = normalised_direction(r, misfit(x, r + x), group, "group_elementwise")
    assert whitened.mean().item() == pytest.approx(0, abs=1e-12)
    assert normalised_direction(r, misfit(x, r + x), group, "none").mean().item() == pytest.approx(0.53691, abs=0.02)


def samples(size=12, dim=6, dtype=torch.float64):
    torch.manual_seed(0)
    x, real, fake = torch.randn(3, size, 2, dim // 2, dtype=dtype)
    group = torch.tensor([7, 2, 7, 9, 2, 7, 9, 2, 7, 2, 9, 7])[:size]
    return x, real - fake, misfit(x, real), group


NORMALISERS = [n for n in get_args(Normaliser) if n != "binned"]


def test_push_has_the_update_as_its_gradient_and_gives_none_to_the_networks():
    x, r, n, group = samples()
    x.requires_grad_()
    r.requires_grad_()
    update = normalised_direction(r, n, group)
    gradients = torch.autograd.grad(push_loss(x, update), (x, r), allow_unused=True)
    assert gap(gradients[0], -update / (12 * 6)) < 1e-15
    assert gradients[1] is None


def test_push_of_parts_adds_up():
    x, r, n, group = samples()
    update = normalised_direction(r, n, group)
    whole = push_loss(x, update)
    assert gap(push_loss(x[:5], update[:5], 12) + push_loss(x[5:], update[5:], 12), whole) < 1e-15
    assert whole.item() == pytest.approx(0.5 * update.square().mean().item(), rel=1e-12)


def test_groups_of_one_are_dmd_to_the_bit():
    for dtype in (torch.float32, torch.float64):
        _, r, n, _ = samples(dtype=dtype)
        alone = torch.arange(12)
        assert torch.equal(normalised_direction(r, n, alone, "group_mean"), normalised_direction(r, n, alone, "sample"))
        assert torch.equal(normalised_direction(r, n, alone, "sample"), r / n[:, None, None])


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_order_does_not_matter_and_whole_groups_may_be_taken_apart(normaliser):
    _, r, n, group = samples()
    whole = normalised_direction(r, n, group, normaliser)
    order = torch.randperm(12)
    assert gap(normalised_direction(r[order], n[order], group[order], normaliser), whole[order]) < 1e-14
    for name in group.unique():
        own = group == name
        assert gap(normalised_direction(r[own], n[own], group[own], normaliser), whole[own]) < 1e-14


def test_each_normaliser_by_hand():
    # Two siblings, two elements: r = (4, 0), (0, 8); n = 1, 3, so that the mean is 2.
    r, n, group = torch.tensor([[4.0, 0.0], [0.0, 8.0]]), torch.tensor([1.0, 3.0]), torch.tensor([5, 5])
    by = {name: normalised_direction(r, n, group, name).tolist() for name in NORMALISERS}
    assert by["none"] == r.tolist()
    assert torch.tensor(by["sample"]).flatten().tolist() == pytest.approx([4, 0, 0, 8 / 3])
    assert by["group_mean"] == [[2, 0], [0, 4]]
    # mean 3; (1, -3, -3, 5): mean square 11
    assert torch.tensor(by["group_whiten"]).flatten().tolist() == pytest.approx([v / 11**0.5 for v in (1, -3, -3, 5)])
    assert by["group_elementwise"] == [[1, -1], [-1, 1]]
    typical = normalised_direction(r, n, group, "binned", typical=torch.tensor([2.0, 8.0]))
    assert typical.tolist() == [[2, 0], [0, 1]]
    with pytest.raises(ValueError, match="needs the typical misfit"):
        normalised_direction(r, n, group, "binned")
    with pytest.raises(ValueError, match="'l2' is none of sample, group_mean"):
        normalised_direction(r, n, group, "l2")


def test_what_is_not_finite_moves_nothing():
    r = torch.tensor([[torch.nan, 1.0], [torch.inf, 2.0]])
    assert normalised_direction(r, torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), "sample")[:, 0].tolist() == [0, 0]
    assert normalised_direction(r, torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), "sample")[0, 1].item() == 1e6


def test_a_larger_group_turns_the_update_towards_the_exact_gradient():
    # Sixteen dimensions, three modes; the student N(a, b^2), so the fake is known, too. What is compared is the
    # gradient with respect to a and b, of the normalised update and of the exact one.
    torch.manual_seed(0)
    dim, num, t = 16, 64_000, torch.tensor(0.9)
    teacher = Mixture(torch.tensor([0.5, 0.3, 0.2]), torch.randn(3, dim), 0.4)
    a, b = 0.3 * torch.randn(dim), 0.7
    z, eps = torch.randn(2, num, dim)
    x = a + b * z
    y = (1 - t) * x + t * eps
    real = teacher.denoised(y, 1 - t, t)
    r = real - Mixture(torch.ones(1), a[None], b).denoised(y, 1 - t, t)
    n = misfit(x, real)

    def gradient(update):
        return torch.cat([update.mean(0), (update * z).mean(0)])

    exact = gradient(r)
    cosine = {}
    for size in (1, 8, 64):
        update = normalised_direction(r, n, torch.arange(num // size).repeat_interleave(size))
        cosine[size] = torch.cosine_similarity(gradient(update), exact, dim=0).item()
    assert cosine[1] < cosine[8] < cosine[64]
    assert cosine[8] > 0.9999
    assert cosine[1] < 0.9997


def settled(strength, normaliser, size, num_groups, steps=100):
    """Where a in x = a + .7 z comes to rest under the teacher N(0, .7^2) and a linear reward of that strength.

    One t a group, the groups' evenly spread; z and eps are drawn once and reused, and each group has a mirror image,
    so that what remains is the statistic's own.
    """
    generator = torch.Generator().manual_seed(0)
    t = stratified(torch.full((num_groups,), 0.5, dtype=torch.float64), 0.02, 0.98)
    z, eps = torch.randn(2, num_groups * size, generator=generator, dtype=torch.float64)
    z, eps = torch.cat([z, -z]), torch.cat([eps, -eps])
    t, group = t.repeat_interleave(size).repeat(2), torch.arange(2 * num_groups).repeat_interleave(size)
    a = torch.zeros((), dtype=torch.float64)
    for _ in range(steps):
        x = a + S * z
        y = (1 - t) * x + t * eps
        real = gaussian_denoiser(0.0, S)(y, t)
        r = (real - gaussian_denoiser(a, S)(y, t))[:, None]
        update = normalised_direction(r, misfit(x[:, None], real[:, None]), group, normaliser) + strength
        x = x[:, None].requires_grad_()
        (gradient,) = torch.autograd.grad(push_loss(x, update), x)
        a = a - 0.2 * gradient.sum()
    return a.item()


def test_a_reward_tilts_the_student_as_far_as_the_closed_form_says():
    # a* = lambda / mean c(t), c = t^2 / ((1 - t)^2 s^2 + t^2), whose mean over [.02, .98] is .578
    assert settled(0.1, "none", 16, 256) == pytest.approx(0.1727, abs=0.0005)
    assert settled(0.2, "none", 16, 256) == pytest.approx(2 * 0.1727, abs=0.001)


def test_in_units_of_the_groups_misfit_a_reward_tilts_less_and_small_groups_a_little_less_still():
    large = settled(0.1, "group_mean", 1024, 64)
    assert large == pytest.approx(0.0803, abs=0.001)
    assert settled(0.2, "group_mean", 1024, 64) == pytest.approx(2 * large, rel=0.02)
    assert settled(0.1, "group_mean", 8, 2048) == pytest.approx(0.0745, abs=0.0015)


def test_fake_score_loss_is_flow_matching_on_the_samples_and_trains_only_the_fake():
    torch.manual_seed(0)
    x0, eps, value = torch.randn(3, 4, 2, 3)
    x0.requires_grad_()
    value.requires_grad_()
    t = torch.rand(4)
    said = Prediction(value, "flow", RectifiedFlow().noised(x0, eps, t), t, RectifiedFlow())
    loss = fake_score_loss(said, x0, eps)
    assert loss.item() == pytest.approx((value - (eps - x0)).square().mean().item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, (value, x0), allow_unused=True)
    assert gap(gradients[0], 2 * (value - eps + x0) / value.numel()) < 1e-6
    assert gradients[1] is None


def test_bins_remember_each_noise_level_by_itself():
    bins = BinnedMean(num_bins=2, decay=0.5)
    bins.update(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0.1, 0.2, 0.9]))
    assert bins.at(torch.tensor([0.0, 0.49, 0.51, 1.0])).tolist() == [2, 2, 10, 10]
    bins.update(torch.tensor([6.0]), torch.tensor([0.3]))  # (.5 * 4 + 6) / (.5 * 2 + 1); the other bin saw nothing
    assert bins.at(torch.tensor([0.3, 0.7])).tolist() == [4, 10]
    bins.update(
        torch.tensor([7.0]), torch.tensor([0.7])
    )  # (.5 * 10 + 7) / (.5 * 1 + 1): idle, it had forgotten nothing
    assert bins.at(torch.tensor([0.3, 0.7])).tolist() == [4, 8]
    other = BinnedMean(num_bins=2, decay=0.5)
    other.load_state_dict({name: tensor.clone() for name, tensor in bins.state_dict().items()})
    assert other.at(torch.tensor([0.3])).item() == 4
