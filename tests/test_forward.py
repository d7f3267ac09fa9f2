"""Training points: whose time and whose noise, and where they lie."""

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from trimtab import forward, noise
from trimtab.batch import Condition, Prompts, Rollout
from trimtab.forward import TimesConfig, draw_times, points, times_of
from trimtab.process import RectifiedFlow

PIPELINE = SimpleNamespace(process=RectifiedFlow())
GRID = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
KEYS = [(0, 0, p, noise.TIMES) for p in range(200)]


def rollout(step=0):
    """Two prompts, of three and two siblings."""
    prompts = Prompts(("a", "b"), ({}, {}), (5, 9))
    condition = Condition(torch.arange(2.0).view(2, 1, 1), torch.arange(2.0).view(2, 1))
    latents = noise.normal([(i,) for i in range(5)], (3, 2, 2))
    columns = {"group": torch.tensor([0, 1, 0, 1, 0]), "sibling": torch.tensor([0, 0, 1, 1, 2])}
    columns |= dict.fromkeys(("reward", "scaled", "advantage"), torch.zeros(5))
    return Rollout(prompts, condition, latents, **columns, seed=1, step=step)


def gap(a, b):
    return (a - b).abs().max().item()


def test_siblings_share_their_times_and_prompts_do_not():
    times = times_of(rollout(), TimesConfig(num_train_times=4), GRID)
    assert times.shape == (5, 4)
    assert torch.equal(times[0], times[2])
    assert torch.equal(times[0], times[4])
    assert torch.equal(times[1], times[3])
    assert (times[0] != times[1]).all()
    assert (times != times_of(rollout(step=1), TimesConfig(num_train_times=4), GRID)).all()


@pytest.mark.parametrize("setting", [{"time_shift": 3.0}, {"min_time": 0.1}, {"max_time": 0.9}])
def test_what_the_solvers_own_times_would_ignore_is_refused(setting):
    TimesConfig(**setting)
    with pytest.raises(ValidationError, match="time_sampling=grid takes the solver's own times; leave time_shift"):
        TimesConfig(time_sampling="grid", **setting)


def test_siblings_have_different_noise_at_every_time():
    t = torch.full((5,), 0.5)
    eps = [at.target + at.x0 for at in (points(PIPELINE, rollout(), t, number) for number in range(2))]
    assert len({tuple(row) for row in torch.cat(eps).flatten(1)[:, :1].tolist()}) == 10


def test_points_lie_between_the_sample_and_noise_that_the_target_tells():
    r, t = rollout(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    at = points(PIPELINE, r, t, 0)
    eps = noise.normal([(*key, noise.TRAINING, 0) for key in r.noise_keys()], (3, 2, 2))
    over = t.view(5, 1, 1, 1)
    assert gap(at.x_t, (1 - over) * r.latents + over * eps) < 1e-6
    assert gap(at.target, eps - r.latents) < 1e-6
    assert torch.equal(at.x0, r.latents)
    assert at.condition.pooled[:, 0].tolist() == [0, 1, 0, 1, 0]  # one for each sample, of its prompt


def test_a_sample_s_point_does_not_depend_on_who_else_is_there():
    some, t = torch.tensor([4, 1]), torch.linspace(0.1, 0.9, 5)
    alone, among = points(PIPELINE, rollout()[some], t[some], 3), points(PIPELINE, rollout(), t, 3)
    for name in ("x0", "x_t", "t", "target"):
        assert torch.equal(getattr(alone, name), getattr(among, name)[some]), name
    assert torch.equal(alone.condition.tokens, among.condition.tokens[some])


def test_stratified_times_are_one_in_each_part_of_the_interval():
    times = draw_times(TimesConfig(num_train_times=5, min_time=0.25, max_time=0.75), GRID, KEYS)
    edges = torch.linspace(0.25, 0.75, 6)
    assert (times >= edges[:-1] - 1e-6).all()
    assert (times <= edges[1:] + 1e-6).all()
    assert (times.amax(0) - times.amin(0) > 0.09).all()  # of parts 0.1 wide


def test_stratified_times_are_shifted_towards_noise():
    # shift 3: t = 3 u / (1 + 2 u)
    plain, shifted = (draw_times(TimesConfig(time_shift=shift), GRID, KEYS) for shift in (1.0, 3.0))
    assert gap(shifted, 3 * plain / (1 + 2 * plain)) < 1e-6


def test_grid_times_are_those_that_the_solver_visits():
    times = draw_times(TimesConfig(num_train_times=4, time_sampling="grid"), GRID, KEYS)
    assert (times == GRID[:-1]).all()  # as many as the grid has: each of them once
    two = draw_times(TimesConfig(num_train_times=2, time_sampling="grid"), GRID, KEYS)
    assert set(two[:, 0].tolist()) == {1.0, 0.75}
    assert set(two[:, 1].tolist()) == {0.5, 0.25}


@pytest.mark.parametrize("num_train_times", [1, 3, 10])
def test_a_uniform_number_just_below_1_is_not_the_time_0_that_the_grid_ends_in(monkeypatch, num_train_times):
    # In float32 9 + (1 - 2^-24) is 10, so the last of ten parts would end one place too far.
    monkeypatch.setattr(forward.noise, "uniform", lambda keys, shape: torch.full((len(keys), *shape), 1 - 2**-24))
    times = draw_times(TimesConfig(num_train_times=num_train_times, time_sampling="grid"), GRID, KEYS[:1])
    assert times.min() == 0.25
