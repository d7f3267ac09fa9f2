import pytest
import torch

from trimtab.prediction import Prediction
from trimtab.process import RectifiedFlow, VariancePreserving

PROCESSES = [RectifiedFlow(), VariancePreserving()]
KINDS = ["flow", "eps", "x0", "v"]


def gap(a, b):
    return (a - b).abs().max().item()


def truth(process, dtype=torch.float64):
    """Known x0 and eps at known times, and the value that a perfect network of each kind would give."""
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    x_t = process.noised(x0, eps, t)
    alpha, sigma = process.alpha(t).reshape(4, 1, 1, 1), process.sigma(t).reshape(4, 1, 1, 1)
    values = {"flow": eps - x0, "eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}
    return x0, eps, {kind: Prediction(values[kind].to(dtype), kind, x_t.to(dtype), t, process) for kind in KINDS}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_recovers_x0_eps_and_flow(process, kind):
    x0, eps, predictions = truth(process)
    prediction = predictions[kind]
    assert gap(prediction.x0, x0) < 1e-13
    assert gap(prediction.eps, eps) < 1e-13
    assert gap(prediction.flow, eps - x0) < 1e-13


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_derived_mixes_back_to_x_t_even_for_a_wrong_network(process, kind):
    torch.manual_seed(1)
    t = torch.tensor([0.2, 0.8], dtype=torch.float64)
    x_t, value = torch.randn(2, 2, 5, dtype=torch.float64)
    p = Prediction(value, kind, x_t, t, process)
    assert gap(process.noised(p.x0, p.eps, t), x_t) < 1e-13
    assert gap(p.eps - p.x0, p.flow) < 1e-13


def test_flow_by_hand():
    # x_t = .25 x0 + .75 eps = 1, flow = eps - x0 = 2: x0 = 1 - .75 * 2 = -.5, eps = 1 + .25 * 2 = 1.5.
    p = Prediction(torch.tensor([[2.0]]), "flow", torch.tensor([[1.0]]), torch.tensor(0.75), RectifiedFlow())
    assert p.x0.item() == -0.5
    assert p.eps.item() == 1.5


def test_eps_by_hand():
    # abar = .64: alpha = .8, sigma = .6. x_t = 1, eps = .5: x0 = (1 - .3) / .8 = .875; flow = .5 - .875.
    process = VariancePreserving(torch.tensor([0.64], dtype=torch.float64))
    p = Prediction(torch.tensor([[0.5]]), "eps", torch.tensor([[1.0]]), torch.tensor(1.0), process)
    assert abs(p.x0.item() - 0.875) < 1e-7
    assert abs(p.flow.item() + 0.375) < 1e-7


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_outputs_are_converted_in_float32(process, kind):
    _, _, predictions = truth(process, torch.bfloat16)
    p = predictions[kind]
    exact = Prediction(p.value.double(), kind, p.x_t.double(), p.t, process)
    rounded = Prediction(p.value, kind, p.x_t, p.t.float(), process)
    for name in ("x0", "eps", "flow"):
        assert getattr(rounded, name).dtype == torch.float32
        assert gap(getattr(rounded, name), getattr(exact, name)) < 1e-4  # bfloat16 arithmetic would be off by .1


def test_a_scalar_time_serves_the_whole_batch():
    torch.manual_seed(0)
    x_t, value = torch.randn(2, 3, 4)
    scalar = Prediction(value, "v", x_t, torch.tensor(0.4), VariancePreserving())
    batched = Prediction(value, "v", x_t, torch.full((3,), 0.4), VariancePreserving())
    assert torch.equal(scalar.x0, batched.x0)


def test_native_output_is_kept():
    value = torch.randn(2, 3).bfloat16()
    p = Prediction(value, "flow", torch.zeros(2, 3), torch.tensor(0.5), RectifiedFlow())
    assert p.value is value
    assert torch.equal(p.flow, value.float())


def test_unknown_kinds_and_unfit_shapes_are_refused():
    with pytest.raises(ValueError, match="'noise' is none of flow, eps, x0, v"):
        Prediction(torch.zeros(2, 3), "noise", torch.zeros(2, 3), torch.tensor(0.5), RectifiedFlow())
    with pytest.raises(ValueError, match=r"\(2, 3\) for x_t of shape \(2, 4\)"):
        Prediction(torch.zeros(2, 3), "eps", torch.zeros(2, 4), torch.tensor(0.5), RectifiedFlow())
