import pytest
import torch

from trimtab.matching import adaptive_error, denoising_error


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
