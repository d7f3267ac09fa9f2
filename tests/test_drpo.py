"""DrPO: its field against golden vectors, the properties that they imply, and the toy with its acceptance numbers."""

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from trimtab.candidates import best_and_worst
from trimtab.methods.drpo import DrPOConfig, FieldConfig, Goal, drift, moved, regression

# The golden numbers of the fields that meet R were computed with distances to oneself of about 3e-4 in place of the
# floor's 1e-4, which is float32's rounding on one machine; computed exactly they are up to 2e-5 away.
ROUNDING = 2.5e-5

PLACES = torch.arange(18.0)
X = (torch.sin(1.3 * PLACES) + 0.05 * PLACES).reshape(6, 3)
R = (torch.cos(0.9 * PLACES) - 0.02 * PLACES).reshape(6, 3)
SCORES = torch.tensor([0.1, 0.9, -0.3, 0.4, 0.0, 0.6])
BETTER, WORSE = X[[1, 5]], X[[4, 2]]
SELF = torch.eye(6, dtype=torch.bool)


def field(x, better, worse, **settings):
    """V (n, D), c and s of one set."""
    masks = {name: settings.pop(name) for name in ("better_self", "worse_self") if name in settings}
    v, unit, _ = drift(x[None], better[None], worse[None], FieldConfig(**settings), **masks)
    return v[0], unit.item(), unit.item() * math.sqrt(x.shape[1])


def test_the_preference_field_is_the_golden_one():
    v, unit, scale = field(X, BETTER, WORSE)
    assert scale == pytest.approx(1.627081, abs=1e-5)
    assert unit == pytest.approx(0.939396, abs=1e-5)
    assert v.square().mean().item() == pytest.approx(8.026637, abs=1e-5)
    golden = {
        0: (-0.040992, 0.183956, 0.163852), 1: (-6.663853, -3.282556, 2.497863), 2: (-2.582082, 0.435042, 3.982415),
        3: (-0.011437, 0.008465, 0.014057), 4: (-2.943146, 1.694520, 2.141732), 5: (1.098987, 5.439278, 3.655843),
    }  # fmt: skip
    for row, values in golden.items():
        assert (v[row] - torch.tensor(values)).abs().max() < 1e-5, row


@pytest.mark.parametrize(("kernel", "loss"), [("rbf", 8.999999), ("cosine", 7.577688)])
def test_other_kernels_have_the_golden_loss(kernel, loss):
    v, _, _ = field(X, BETTER, WORSE, kernel=kernel)
    assert v.square().mean().item() == pytest.approx(loss, abs=1e-5)


def test_the_reference_field_is_the_golden_one():
    v, unit, scale = field(X, R, X, worse_self=SELF)
    assert scale == pytest.approx(1.743596, abs=ROUNDING)
    assert unit == pytest.approx(1.006665, abs=ROUNDING)
    assert v.square().mean().item() == pytest.approx(7.104252, abs=ROUNDING)
    golden = {
        0: (1.784596, -0.662118, -5.024537),
        3: (-2.715810, -4.728183, -0.137065),
        5: (-0.028356, -0.009043, 0.034369),
    }
    for row, values in golden.items():
        assert (v[row] - torch.tensor(values)).abs().max() < ROUNDING, row


def test_plain_drifting_is_the_golden_one():
    v, _, scale = field(X, R, X[:0], positive_weight=1.0)
    assert scale == pytest.approx(1.743626, abs=ROUNDING)
    assert v.square().mean().item() == pytest.approx(7.035623, abs=ROUNDING)
    assert (v[0] - torch.tensor((1.558203, -0.678801, -4.658319))).abs().max() < ROUNDING


def goal(x, *sets, weight=1.0, **settings):
    target, unit, _ = moved(x[:, None], *(s[:, None] for s in sets[:2]), *sets[2:], DrPOConfig(**settings))
    return Goal(target, unit, torch.full((len(x),), weight / len(x)))


def test_loss_and_gradient_are_the_golden_ones():
    x = X.clone().requires_grad_()
    goals = [goal(X, BETTER, WORSE, None, None), goal(X, R, X, None, SELF, weight=0.2)]
    loss = regression({"": x[:, None]}, {"": goals})
    assert loss.item() == pytest.approx(9.447487, abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, x)
    golden = {
        0: (-0.034547, -0.007142, 0.091537),
        1: (0.911019, 0.481004, -0.236424),
        5: (-0.129362, -0.643155, -0.433169),
    }
    for row, values in golden.items():
        assert (gradient[row] - torch.tensor(values)).abs().max() < 1e-5, row
    parts = [(field(X, BETTER, WORSE)[:2], 1.0), (field(X, R, X, worse_self=SELF)[:2], 0.2)]
    closed = -2 / 18 * sum(weight * v / unit for (v, unit), weight in parts)
    assert (gradient - closed).abs().max() < 1e-6


# What follows from the equations


def random_sets(seed=0, n=12, p=4, m=4, width=16):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=g) for size in (n, p, m)]


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_the_weight_of_positives_is_no_step_size():
    x, better, worse = random_sets()
    less, more = (field(x, better, worse, positive_weight=w)[0] for w in (30.0, 3000.0))
    assert cosine(less, more) > 0.9999
    less, more = (field(x, better, worse, negative_weight=w)[0] for w in (1.0, 3000.0))
    assert cosine(less, more) < 0.99  # that of negatives counts, beside the candidates' own 1


@pytest.mark.parametrize("change", [lambda x: x + 3.0, lambda x: 7.0 * x], ids=["moved", "scaled"])
def test_all_features_moved_or_scaled_together_change_nothing(change):
    sets = random_sets()
    plain, changed = (field(*each)[0] for each in (sets, [change(x) for x in sets]))
    assert (plain - changed).abs().max() < 2e-3


@pytest.mark.parametrize("kernel", ["laplacian", "rbf", "cosine"])
def test_the_order_of_candidates_and_of_anchors_is_nothing(kernel):
    x, better, worse = random_sets()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    plain = field(x, better, worse, kernel=kernel)[0]
    assert (field(x[order], better.flip(0), worse.flip(0), kernel=kernel)[0] - plain[order]).abs().max() < 1e-5


def test_swapping_the_sides_turns_the_field_around_where_nobody_is_an_anchor():
    # Without the candidates' own repulsion, which the weight of the anchors drowns, F is antisymmetric in the two.
    x, better, worse = random_sets()
    settings = {"positive_weight": 1e6, "negative_weight": 1e6}
    there, back = field(x, better, worse, **settings)[0], field(x, worse, better, **settings)[0]
    assert (there + back).abs().max() < 1e-2 * there.abs().max()


def test_the_raw_field_vanishes_where_the_sides_agree_and_the_normalised_one_never():
    # but for the candidates' own repulsion, which the weight of the anchors drowns
    x, better, _ = random_sets()
    config = FieldConfig(field="raw", positive_weight=1e6, negative_weight=1e6)
    apart, agreed = (drift(x[None], better[None], w[None], config) for w in (better + 1, better))
    assert agreed[0].abs().max() < 0.01 * apart[0].abs().max()
    assert agreed[2] < 0.01 * apart[2]
    assert 3 < field(x, better, better)[0].square().mean() < 9.01


def test_a_masked_anchor_does_not_meet_itself():
    eye = torch.eye(24, dtype=torch.bool)
    middle, along = {True: [], False: []}, {True: [], False: []}
    for seed in range(4):
        x, _, _ = random_sets(seed, width=64, n=24)
        better, worse = x[:8], x[16:]
        wanted = (better.mean(0) - worse.mean(0)).expand_as(x)
        for masked in (True, False):
            masks = {"better_self": eye[:, :8], "worse_self": eye[:, 16:]} if masked else {}
            v = field(x, better, worse, **masks)[0]
            middle[masked].append((v[8:16].square().sum() / v.square().sum()).item())
            along[masked].append(cosine(v, wanted))
    assert max(middle[False]) < 0.02  # those between the sides hardly move
    assert sum(middle[True]) / 4 > 0.2
    assert all(a > b + 0.1 for a, b in zip(along[True], along[False], strict=True))


def test_the_candidates_step_along_the_field_by_the_step_size():
    one = goal(X, BETTER, WORSE, None, None)
    three = goal(X, BETTER, WORSE, None, None, step_size=3.0)
    here = X[:, None] / one.unit
    assert ((three.target - here) - 3 * (one.target - here)).abs().max() < 1e-5


def test_tokens_merge_into_one_set_or_stay_with_their_place():
    g = torch.Generator().manual_seed(3)
    x, better, worse = (torch.randn(n, 3, 5, generator=g) for n in (6, 2, 2))
    settings = DrPOConfig(token_mode="per_location", mask_self_anchor=True)
    masks = (torch.eye(6, dtype=torch.bool)[:, :2], torch.eye(6, dtype=torch.bool)[:, 4:])
    apart = moved(x, better, worse, *masks, settings)
    for place in range(3):
        alone = moved(*(each[:, place : place + 1] for each in (x, better, worse)), *masks, settings)
        assert (apart[0][:, place] - alone[0][:, 0]).abs().max() < 1e-5
        assert (apart[1][:, place] - alone[1][:, 0]).abs().max() < 1e-6
    merged = moved(x, better, worse, *masks, DrPOConfig(mask_self_anchor=True))
    rows = [each.flatten(0, 1)[:, None] for each in (x, better, worse)]
    same = torch.eye(18, dtype=torch.bool)
    flat = moved(*rows, same[:, :6], same[:, 12:], DrPOConfig(mask_self_anchor=True))
    assert (merged[0].flatten(0, 1) - flat[0][:, 0]).abs().max() < 1e-5


# The toy: one prompt, the plane, candidates that are their own features


ANGLES = torch.arange(8) * math.pi / 4
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def drawn(net):
    with torch.no_grad():
        return net(torch.randn(4096, 8, generator=torch.Generator().manual_seed(9)))


@pytest.fixture(scope="module")
def eight_modes():
    """A generator of eight Gaussians, trained by plain drifting as in its authors' demonstration."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2)]
    net, g = nn.Sequential(*layers), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(1500):
        x = net(torch.randn(192, 8, generator=g))
        y = CENTRES[torch.randint(8, (192,), generator=g)] + 0.1 * torch.randn(192, 2, generator=g)
        with torch.no_grad():
            kernel = (-torch.cdist(x, torch.cat([y, x])) / 0.3).exp()
            kernel[:, 192:].fill_diagonal_(0)
            kernel /= (kernel.sum(1, keepdim=True) * kernel.sum(0, keepdim=True)).clamp_min(1e-12).sqrt()
            plus, minus = kernel.split(192, 1)
            v = (plus * minus.sum(1, keepdim=True)) @ y - (minus * plus.sum(1, keepdim=True)) @ x
        loss = (x - (x.detach() + v)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def near(x):
    return -(x - torch.tensor([2.0, 0.0])).norm(dim=1)


def off_manifold(x):
    return torch.cdist(x, CENTRES).min(1).values.mean().item()


def aligned(base, score, **settings):
    """The generator after 200 updates of eight groups of 24 candidates each."""
    config, net = DrPOConfig(**settings), copy.deepcopy(base)
    g, optimizer = torch.Generator().manual_seed(2), torch.optim.AdamW(net.parameters(), 3e-4)
    own = torch.eye(24, dtype=torch.bool)
    for _ in range(200):
        z = torch.randn(8, 24, 8, generator=g)
        loss = torch.zeros(())
        with torch.no_grad():
            before = base(z)
        for x, reference in zip(net(z), before, strict=True):
            best, worst = best_and_worst(score(x.detach()), torch.zeros(24, dtype=torch.int64), 8, 8)
            goals = [goal_of(x, x[best], x[worst], None, None, config, 1.0)]
            if config.reference_weight:
                goals.append(goal_of(x, reference, x, None, own, config, config.reference_weight))
            loss = loss + regression({"": x[:, None]}, {"": goals}) / 8
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return drawn(net)


def goal_of(x, better, worse, better_self, worse_self, config, weight):
    sets = [each.detach()[:, None] for each in (x, better, worse)]
    target, unit, _ = moved(*sets, better_self, worse_self, config)
    return Goal(target, unit, torch.full((len(x),), weight / len(x)))


def test_the_toy_starts_where_it_should(eight_modes):
    x = drawn(eight_modes)
    assert near(x).mean() == pytest.approx(-2.55, abs=0.1)
    assert off_manifold(x) < 0.3


def test_ranking_moves_the_generator_towards_the_reward(eight_modes):
    assert near(aligned(eight_modes, near)).mean() > -0.9


def test_a_random_ranking_does_not(eight_modes):
    g = torch.Generator().manual_seed(5)
    assert near(aligned(eight_modes, lambda x: torch.rand(len(x), generator=g))).mean() < -2.4


def test_a_strong_reference_holds_it(eight_modes):
    assert near(aligned(eight_modes, near, reference_weight=3.0)).mean() < -2.4


def test_reversed_scores_drive_it_the_other_way(eight_modes):
    assert aligned(eight_modes, lambda x: -x[:, 0])[:, 0].mean() < -5


def test_the_raw_field_comes_to_rest_where_the_normalised_one_runs_away(eight_modes):
    x = aligned(eight_modes, lambda x: x[:, 0], field="raw", reference_weight=3.0)
    assert 0.3 < x[:, 0].mean() < 3
    assert off_manifold(x) < 1
    assert aligned(eight_modes, lambda x: x[:, 0])[:, 0].mean() > 15


@pytest.mark.parametrize("n", [1, 8])
def test_where_nothing_differs_nothing_moves(n):
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(n, -1)
    assert field(x, x, x, worse_self=torch.eye(n, dtype=torch.bool))[0].abs().max() == 0
    assert field(x, x, x)[0].abs().max() == 0


def test_the_field_far_from_the_origin_is_the_one_near_it():
    near, far = field(X, BETTER, WORSE)[0], field(X + 500, BETTER + 500, WORSE + 500)[0]
    assert (far - near).abs().max() < 2e-2  # what float32 keeps of X there is 3e-5 of it


def test_binary_needs_two_of_each_for_the_unit_is_their_distance():
    with pytest.raises(ValidationError, match="give 2 or more of each"):
        DrPOConfig(variant="binary", num_positive=1, num_negative=1)
