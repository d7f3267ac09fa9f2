"""SoftREPA: what its contrast pushes where, the values of its loss, and its glue on a small random SD3."""

import math

import pytest
import torch

from trimtab.methods.softrepa import SoftREPAConfig, contrastive_loss


def test_every_wrong_caption_is_pushed_up_and_the_right_one_down():
    error = (0.3 * torch.rand(4, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    contrastive_loss(error, torch.arange(4)).sum().backward()
    own = torch.eye(4).bool()
    assert (error.grad[own] > 0).all()
    assert (error.grad[~own] < 0).all()


@pytest.mark.parametrize("size", [4, 8])
def test_chance_and_the_floor(size):
    own = torch.arange(size)
    chance = contrastive_loss(torch.full((size, size), 50.0), own)
    assert torch.allclose(chance, torch.full((size,), math.log(size)))
    perfect = torch.where(torch.eye(size).bool(), 0.0, 50.0)
    floor = math.log(1 + (size - 1) * math.exp(-4))
    assert floor == pytest.approx({4: 0.0535, 8: 0.1206}[size], abs=5e-5)
    assert torch.allclose(contrastive_loss(perfect, own), torch.full((size,), floor))


def test_large_errors_switch_the_gradient_off():
    sizes = {}
    for level in (0.1, 0.3, 0.5, 1.0):
        error = torch.full((1, 2), level, requires_grad=True)
        contrastive_loss(error, torch.tensor([0])).sum().backward()
        sizes[level] = 2 * error.grad[0, 0].item()  # p = 1/2
    assert sizes == {
        0.1: pytest.approx(13.7, rel=0.01),
        0.3: pytest.approx(0.79, rel=0.01),
        0.5: pytest.approx(0.045, rel=0.02),
        1.0: pytest.approx(3.6e-5, rel=0.02),
    }


def test_the_denoising_weight_adds_the_own_error():
    error, own = torch.rand(3, 3), torch.tensor([2, 0, 1])
    added = contrastive_loss(error, own, denoising_weight=10.0) - contrastive_loss(error, own)
    assert torch.allclose(added, 10 * error[torch.arange(3), own], atol=1e-5)


def test_rows_change_no_gradient(tokens_of):
    expected = tokens_of(SoftREPAConfig(rows=4)).gradients()
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for rows in (1, 3):
        for gradient, want in zip(tokens_of(SoftREPAConfig(rows=rows)).gradients(), expected, strict=True):
            assert (gradient - want).abs().max() < 1e-4 * want.abs().max()  # they are 1e-19 here, and rounding shows


def test_all_pairs_get_a_gradient_and_there_is_one_bank(tokens_of):
    softrepa = tokens_of(SoftREPAConfig())
    assert softrepa.rows_with_gradient() == 16
    assert list(softrepa.pipeline.roles.banks) == ["default"]
    assert softrepa.pipeline.roles.banks["default"].base.shape[0] == 1
