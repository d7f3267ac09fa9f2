"""GNDM's own mathematics: importance ratios, the score function, and how rewards are weighed beside the teacher."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from trimtab import groups, noise
from trimtab.batch import Prompts
from trimtab.distributed import Processes
from trimtab.errors import StoppedTogether, UserError
from trimtab.learner import Learner
from trimtab.matching import normalised_direction
from trimtab.methods.gndm import (
    GNDM,
    MOVE,
    Balance,
    GNDMConfig,
    importance_weights,
    log_ratio,
    score_direction,
    standardised,
)
from trimtab.optimizer import OptimizerConfig
from trimtab.pipelines.loading import load
from trimtab.process import RectifiedFlow, VariancePreserving
from trimtab.rewards.composite import Composite, RewardFailed
from trimtab.roles import LoraSettings
from trimtab.rollout import RolloutConfig
from trimtab.student import FAKE, STUDENT, Student

FLOW = RectifiedFlow()
NAN = float("nan")


def gap(a, b):
    return (a - b).abs().max().item()


# Importance ratios


@pytest.mark.parametrize("process", [FLOW, VariancePreserving()], ids=["flow", "table"])
def test_the_ratio_is_that_of_two_gaussians(process):
    torch.manual_seed(0)
    old, new, z = torch.randn(3, 4, 6, dtype=torch.float64)
    t = torch.tensor(0.5, dtype=torch.float64)
    x_next = process.noised(old, z, t)
    log_rho, now = log_ratio(new, x_next, z, t, process)
    alpha, sigma = process.alpha(t), process.sigma(t)
    density = [torch.distributions.Normal(alpha * x0, sigma).log_prob(x_next).mean(1) for x0 in (new, old)]
    assert gap(log_rho, density[0] - density[1]) < 1e-12
    assert gap(alpha * new + sigma * now, x_next) < 1e-12
    assert log_ratio(old, x_next, z, t, process)[0].abs().max() < 1e-12


def test_after_a_small_step_the_mean_log_ratio_is_minus_a_divergence_and_falls_with_its_square():
    torch.manual_seed(0)
    old, z = torch.randn(2, 100_000, 1, dtype=torch.float64)
    t = torch.tensor(0.5, dtype=torch.float64)
    z = torch.cat([z, -z])  # so that what is linear in z cancels exactly
    old = torch.cat([old, old])
    x_next = FLOW.noised(old, z, t)
    for step in (0.1, 0.05):
        mean = log_ratio(old + step, x_next, z, t, FLOW)[0].mean().item()
        assert mean == pytest.approx(-(step**2) / 2, rel=1e-9)  # alpha / sigma is 1 here


def test_weights_are_clipped_and_have_mean_one_among_siblings():
    group = torch.tensor([0, 0, 1, 1])
    weights = importance_weights(torch.tensor([0.0, 9.0, -9.0, NAN]), group, 0.2)
    assert weights.tolist() == pytest.approx([1 / 1.1, 1.2 / 1.1, 1, 0])  # what is not known weighs nothing
    assert importance_weights(torch.tensor([NAN, NAN, 0.0, 0.0]), group, 0.2).tolist() == [0, 0, 1, 1]
    assert importance_weights(torch.zeros(4), group, 0.2).tolist() == [1, 1, 1, 1]


# The score function


def test_the_score_direction_is_the_gradient_of_the_expected_reward():
    # Two calls in one dimension: x' = alpha' x + sigma' z, then x'' = .8 x' and reward -(x'' - 1)^2. Its expectation
    # has gradient -2 (.8 alpha' x - 1) .8 alpha' with respect to the first call's x.
    torch.manual_seed(0)
    num, x, t = 100_000, 0.3, torch.tensor(0.6)
    alpha, sigma = FLOW.alpha(t).item(), FLOW.sigma(t).item()
    z = torch.randn(num, 1)
    reward = -((0.8 * (alpha * x + sigma * z[:, 0])) - 1).square()
    found = alpha / sigma * score_direction(reward - reward.mean(), torch.ones(num), 1e-4, z)[:, 0]
    expected = -2 * (0.8 * alpha * x - 1) * 0.8 * alpha
    error = found.std().item() / math.sqrt(num)
    assert error < 0.01
    assert found.mean().item() == pytest.approx(expected, abs=4 * error)
    assert expected > 0.1


def test_a_sample_that_has_moved_enough_in_its_favour_is_left_alone():
    z = torch.ones(6, 2)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, NAN])
    ratio = torch.tensor([1.2, 0.8, 1.2, 0.8, 1.05, 1.0])
    found = score_direction(advantage, ratio, 0.1, z)[:, 0]
    assert found.tolist() == pytest.approx([0, 0.8, -1.2, 0, 1.05, 0])


# The balance


def observed(balance, *misfits, size=2.0, **gradients):
    for misfit in misfits:
        balance.observe({"": size} | gradients, misfit)


def test_sizes_are_averaged_over_the_end_of_the_cold_start_and_then_frozen():
    balance = Balance(GNDMConfig(reward_start=4, calibration=2))
    observed(balance, 1.0, 1.0, size=100.0)  # too early to count
    assert balance.calibrates
    observed(balance, 1.0, size=1.0, mine=10.0)
    observed(balance, 1.0, size=3.0, mine=30.0)
    assert not balance.calibrates
    assert balance.rewards_count
    observed(balance, 1.0, size=50.0, mine=50.0)
    assert (balance.size(MOVE), balance.size("mine")) == (2, 20)


def test_an_update_that_was_not_finite_makes_no_size_smaller():
    balance = Balance(GNDMConfig(reward_start=3, calibration=3))
    for size in (2.0, NAN, 4.0):
        observed(balance, 1.0, size=size)
    assert (balance.size(MOVE), balance.misfit) == (3, 1)


def test_a_ramp_brings_rewards_in():
    balance = Balance(GNDMConfig(reward_start=1, calibration=1, reward_ramp=4, weighting="fixed"))
    shares = []
    for _ in range(6):
        observed(balance, 1.0)
        shares.append(balance.share())
    assert shares == [0.25, 0.5, 0.75, 1, 1, 1]


def test_the_gate_closes_while_the_student_is_further_from_the_teacher_than_allowed_and_opens_after():
    balance = Balance(GNDMConfig(reward_start=1, calibration=1, gate_slack=0.1, gate_rate=0.01))
    observed(balance, 1.0)
    assert balance.limit == pytest.approx(1.1)
    observed(balance, *[2.0] * 50)
    assert balance.gate < 0.7
    closed = balance.gate
    observed(balance, *[0.5] * 100)
    assert balance.gate > closed
    assert Balance(GNDMConfig()).gate == 1


def test_the_gate_settles_where_the_misfit_is_the_one_asked_for():
    # A stand-in student whose misfit grows with the reward's weight: 1 + .5 gate, so that 1.1 is reached at gate .2.
    balance = Balance(GNDMConfig(reward_start=1, calibration=1, gate_slack=0.1, gate_rate=0.01))
    observed(balance, 1.0)
    for _ in range(600):
        observed(balance, 1 + 0.5 * balance.gate)
    assert balance.gate == pytest.approx(0.2, rel=0.15)


def test_a_balance_goes_on_where_it_was():
    config = GNDMConfig(reward_start=2, calibration=1)
    straight = Balance(config)
    observed(straight, 1.0, 1.2, 1.5, 0.9)
    first, second = Balance(config), Balance(config)
    observed(first, 1.0, 1.2)
    second.load_state_dict(first.state_dict())
    observed(second, 1.5, 0.9)
    assert second.state_dict() == straight.state_dict()


# Rewards in the loop


TEXTS = ("a photo of a red circle", "a photo of two stars", "a blue ring", "a cross")
PROMPTS = Prompts(TEXTS, tuple({} for _ in TEXTS), tuple(range(4)))


class Brightness:
    """Mean brightness, with a gradient if asked for one."""

    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))


class Smooth(Brightness):
    def with_gradient(self, images, prompts, metadata):
        return self(images, prompts, metadata)


def built(folder, reward, sign=1.0, **config):
    face = load(str(folder), lora=LoraSettings(rank=4, lora_alpha=16), trained=(STUDENT, FAKE))
    rollout = RolloutConfig(num_prompts=4, group_size=8, num_inference_steps=2, sample_batch_size=32)
    student = Student(face, PROMPTS, rollout, face.resolution, 32, seed=3)
    settings = {"fake_updates": 1, "real_guidance_scale": 1.0, "reward_start": 1, "calibration": 1} | config
    return face, student, GNDM(GNDMConfig(**settings), face, student, Composite({"light": (reward, sign)}))


def brightness(face, student):
    draw = student.draw(99, 0, 2)
    with torch.no_grad():
        return face.decode(student.path(draw, 2)[-1]).mean().item()


def test_a_reward_with_a_gradient_moves_the_student_its_way_and_its_negative_the_other(tiny_folder):
    # Any other reward: test_distillation.py, where there are few enough dimensions for so short a run.
    change = {}
    for sign in (5.0, -5.0):
        face, student, method = built(tiny_folder, Smooth(), sign, weighting="fixed", real_guidance_scale=4.0)
        before = brightness(face, student)
        for _ in Learner(method, Accelerator(cpu=True), OptimizerConfig(learning_rate=1e-2), 6).run():
            pass
        change[sign] = brightness(face, student) - before
    assert change[5.0] > 0.002
    assert change[-5.0] < -0.002


def test_a_reward_whose_gradient_fails_on_one_process_stops_both(tiny_folder, gathers):
    class Broken(Brightness):
        def with_gradient(self, images, prompts, metadata):
            raise RuntimeError("no server")

    methods = []
    for rank, reward in enumerate((Smooth(), Broken())):
        _, student, method = built(tiny_folder, reward)
        methods.append(replace(method, student=replace(student, processes=Processes(rank, 2, gathers[rank]))))

    def update(method):
        call = next(call for call in method.collect(0) if call.network == STUDENT)
        list(method.losses(call))

    with ThreadPoolExecutor(2) as threads:
        updates = [threads.submit(update, method) for method in methods]
        stopped = [each.exception(timeout=120) for each in updates]
    assert [type(each) for each in stopped] == [StoppedTogether, StoppedTogether]
    assert "no server" in str(stopped[1])


def moved(face, seed, size, *roles):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for role in roles:
            for parameter in face.roles.parameters(role).values():
                parameter += size * torch.randn(parameter.shape, generator=generator)


def test_loss_and_gradient_of_a_reused_rollout_are_those_of_the_equations_by_hand(tiny_folder):
    face = load(str(tiny_folder), lora=LoraSettings(rank=4, lora_alpha=16), trained=(STUDENT, FAKE))
    moved(face, 0, 0.1, STUDENT, FAKE)
    rollout = RolloutConfig(num_prompts=2, group_size=4, num_inference_steps=4)
    student = Student(face, PROMPTS, rollout, face.resolution, 4, seed=3)
    config = GNDMConfig(
        fake_updates=1, real_guidance_scale=3.0, reuse=2, importance_clip=0.022, ratio_clip=0.08, max_advantage=1.0,
        reward_start=10, reward_ramp=4, calibration=5,
    )  # fmt: skip
    method = GNDM(config, face, student, Composite({"light": (Brightness(), 2.0), "smooth": (Smooth(), 1.5)}))
    balance, size = method.balance, 4e-4
    balance.update, balance.observed, balance.gate, balance.sizes = 11, 5, 0.8, {"": 5 * 0.3, "smooth": 5 * size}
    step = next(s for s in range(99) if [student.choice(student.draw(s, 0, 3), use) for use in (0, 1)] == [0, 2])
    call = [call for call in method.collect(step) if call.network == STUDENT][1]
    moved(face, 1, 0.1, STUDENT)

    times, z, c, group = student.times(), student.noises(call.draw), call.draw.conditions(), call.draw.group

    def per_group(values):
        return torch.stack([values[group == g].mean() for g in group])

    def wide(values):
        return values[:, None, None, None]

    def log_rho(j):
        x = face.predict(call.path[j], times[j], c, STUDENT).x0
        now = (call.path[j + 1] - (1 - times[j + 1]) * x) / times[j + 1]
        return x, now.detach(), (z[j + 1] ** 2 - now**2).mean((1, 2, 3)).detach() / 2

    x, now, own = log_rho(2)
    (t,) = student.matching_times(call, method.config)
    eps = noise.normal(call.draw.keys(noise.MATCHING, 0, 1), x.shape[1:])
    with torch.no_grad():
        y = (1 - wide(t)) * x + wide(t) * eps
        real = face.predict(y, t, c, "ref", 3.0).x0
        n = (x - real).abs().mean((1, 2, 3))
        a = (real - face.predict(y, t, c, FAKE).x0) / wide(per_group(n))
        omega = (log_rho(0)[2] + log_rho(1)[2]).exp().clamp(0.978, 1.022)
        omega = omega / per_group(omega)
        score = face.decode(call.path[-1]).mean((1, 2, 3))
        score = score - per_group(score)
        advantage = 2.0 * (score / (score.square().mean().sqrt() + 1e-4)).clamp(-1, 1)
        ratio = own.exp()
        done = torch.where(advantage > 0, ratio > 1.08, ratio < 0.92)
        black = 0.3 * wide(torch.where(done, 0.0, advantage * ratio)) * now
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(face.decode(leaf).mean((1, 2, 3)).sum(), leaf)
    limit = (3 * size / gradient.square().mean((1, 2, 3)).sqrt()).clamp_max(1)
    u = wide(omega) * a + 0.8 * 2 / 4 * (1.5 * 0.3 / size * wide(limit) * gradient + black)
    weights = list(method.trained()[STUDENT].values())
    wanted = torch.autograd.grad(-(u * x).sum() / x.numel(), weights)
    value, found = 0.0, [torch.zeros_like(weight) for weight in weights]
    for loss in method.losses(call):
        value += loss.value.item()
        found = [f + g for f, g in zip(found, torch.autograd.grad(loss.value, weights), strict=True)]
    assert value == pytest.approx(u.square().mean().item() / 2, rel=1e-5)
    found, wanted = (torch.cat([g.flatten() for g in parts]) for parts in (found, wanted))
    assert gap(found, wanted) < 1e-5 * wanted.abs().max()


def test_before_the_cold_start_ends_rewards_change_nothing(tiny_folder):
    weights = []
    for reward in (None, Smooth(), Brightness()):
        face, _, method = built(tiny_folder, reward or Smooth(), reward_start=3, calibration=2)
        method = method if reward else replace(method, rewards=None)
        for _ in Learner(method, Accelerator(cpu=True), OptimizerConfig(learning_rate=1e-2), 3).run():
            pass
        weights.append(torch.cat([p.detach().flatten() for p in face.roles.parameters(STUDENT).values()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_scores_are_centred_among_siblings_and_scaled_by_what_was_scored():
    # Siblings 0, 1, 2 | 5, nothing, 3 | a prompt to which the reward does not apply. Within: -1, 0, 1, 1, -1.
    raw = torch.tensor([0.0, 1.0, 2.0, 5.0, NAN, 3.0, NAN, NAN, NAN])
    found = standardised(raw, torch.arange(3).repeat_interleave(3))
    spread = (4 / 5) ** 0.5
    assert found.isnan().tolist() == [False] * 4 + [True, False] + [True] * 3
    assert found[found.isfinite()].tolist() == pytest.approx(
        [-1 / spread, 0, 1 / spread, 1 / spread, -1 / spread], rel=1e-3
    )
    # Another process' groups, at rest, make the deviation smaller and nothing else.
    both = Processes(0, 2, lambda x: torch.cat([x, torch.zeros(15)]))
    shared = standardised(raw, torch.arange(3).repeat_interleave(3), both)
    assert shared[2].item() == pytest.approx(1 / (4 / 20) ** 0.5, rel=1e-3)


def test_a_gradient_that_is_not_finite_leaves_the_gate_alone():
    balance = Balance(GNDMConfig(reward_start=1, calibration=1))
    observed(balance, 1.0)
    observed(balance, NAN)
    assert math.isfinite(balance.misfit)
    assert balance.gate == pytest.approx(1, abs=0.011)


def test_reuse_compares_at_other_times_and_with_other_noise(tiny_folder):
    _, student, method = built(tiny_folder, Smooth(), reuse=2)
    first, again = (call for call in method.collect(0) if call.network == STUDENT)
    assert (first.use, again.use) == (0, 1)
    assert torch.equal(first.path[0], again.path[0])
    assert gap(student.matching_times(first, method.config), student.matching_times(again, method.config)) > 0.01
    x = student.x0(first).detach()
    same_time = [
        student.direction(x, call, method.config, times=torch.full((1, 32), 0.5))[1] for call in (first, again)
    ]
    assert gap(*same_time) > 1e-4


def test_whitening_by_the_siblings_own_deviation_never_rests(tiny_folder):
    # What is left of r near the optimum is noise. In units of the misfit it stays small; whitened it is of size one.
    torch.manual_seed(0)
    r, n, group = 1e-4 * torch.randn(64, 32), torch.full((64,), 0.3), torch.arange(8).repeat_interleave(8)
    assert normalised_direction(r, n, group, "group_mean").square().mean().sqrt() < 1e-3
    assert normalised_direction(r, n, group, "group_whiten").square().mean().sqrt() == pytest.approx(1, abs=0.02)


def test_matching_gradient_sizes_has_no_equilibrium(tiny_folder):
    # In one dimension: x = a, the teacher at 0, so A = -a, and a reward whose gradient is 1. Sizes matched at every
    # update, a reward of weight .9 does nothing at all and one of 1.1 runs away; frozen, each has its own place.
    def rest(weight, weighting):
        _, _, method = built(tiny_folder, Smooth(), weighting=weighting)
        method.balance.sizes, method.balance.observed, a = {"": 1.0, "light": 1.0}, 1, 1.0
        for _ in range(400):
            pull, gradient = torch.full((1, 1), -a), torch.ones(1, 1)
            seen = {"": pull.square().mean().item(), "light": 1.0}
            a += 0.05 * (pull + weight * method._scaled("light", gradient, seen)).item()
        return a

    assert rest(0.9, "grad_norm") == pytest.approx(0, abs=0.2)
    assert rest(1.1, "grad_norm") > 5
    assert rest(0.9, "fixed") == pytest.approx(0.9, abs=0.01)
    assert rest(1.1, "fixed") == pytest.approx(1.1, abs=0.01)


def test_advantages_are_centred_in_groups_scaled_over_all_and_limited(tiny_folder):
    scores = torch.zeros(32)
    scores[:8] = torch.arange(8.0)
    scores[8:16] = 100.0
    scores[16] = NAN
    _, student, method = built(tiny_folder, lambda images, prompts, metadata: scores, 2.0, max_advantage=2.0)
    draw = student.draw(0, 0, 2)
    found = method._advantage(draw, student.path(draw, 2)[-1])
    centred = torch.arange(8.0) - 3.5
    spread = (centred.square().sum() / 31).sqrt()
    assert gap(found[:8], 2 * (centred / spread).clamp(-2, 2)) < 1e-3
    assert found[8:16].tolist() == [0] * 8
    assert found[16].isnan()
    assert found[17:].isfinite().all()


def test_a_rollout_of_which_no_two_siblings_have_a_score_stops_the_run(tiny_folder):
    scores = torch.full((32,), NAN)
    scores[::8] = 1.0
    _, student, method = built(tiny_folder, lambda images, prompts, metadata: scores)
    draw = student.draw(0, 0, 2)
    with pytest.raises(RewardFailed, match="only 4 of 32 pictures were scored, no two of them of one prompt"):
        method._advantage(draw, student.path(draw, 2)[-1])


def test_a_watched_reward_asks_for_no_siblings(tiny_folder):
    face, student, _ = built(tiny_folder, Smooth())
    alone = replace(student, config=student.config.model_copy(update={"num_prompts": 2, "group_size": 1}))
    rewards = Composite({"light": (Smooth(), 1.0), "seen": (Brightness(), 0.0)})
    method = GNDM(GNDMConfig(fake_updates=1, real_guidance_scale=1.0, reward_start=1), face, alone, rewards)
    (record,) = list(Learner(method, Accelerator(cpu=True), OptimizerConfig(learning_rate=1e-3), 1).run())
    assert 0 < record.metrics["watched/seen/mean"] < 1


def test_what_a_reward_needs_is_said_before_anything_loads():
    with pytest.raises(UserError, match="reward_start is 0"):
        GNDM.check_rewards(GNDMConfig(), Composite({"light": (Smooth(), 1.0)}), 4, 8, 9)
    with pytest.raises(UserError, match="'light' has no gradient, and a student of one call"):
        GNDM.check_rewards(GNDMConfig(reward_start=1), Composite({"light": (Brightness(), 1.0)}), 1, 8, 9)
    with pytest.raises(UserError, match="group_size is 1"):
        GNDM.check_rewards(GNDMConfig(reward_start=1), Composite({"light": (Brightness(), 1.0)}), 4, 1, 9)
    with pytest.raises(UserError, match="updated 18 times, so that rewards would never count"):
        GNDM.check_rewards(GNDMConfig(reward_start=18, reuse=2), Composite({"light": (Smooth(), 1.0)}), 4, 8, 9)
    GNDM.check_rewards(GNDMConfig(reward_start=1), Composite({"light": (Smooth(), 1.0)}), 1, 1, 9)


def test_an_update_tells_the_balance_its_sizes_and_the_bins_its_errors_however_it_is_cut(tiny_folder):
    found = []
    for size in (32, 8):
        _, student, method = built(tiny_folder, Smooth(), reward_start=2, calibration=2, normaliser="binned")
        method.student = replace(student, batch_size=size)
        call = method.student.call(STUDENT, student.draw(0, 0, 2))
        x = student.x0(call).detach()
        r, n, _ = student.direction(x, call, method.config)
        for loss in method.losses(call):
            assert loss.network == STUDENT
        # Nothing is in the bins yet, so each sample's own error is its divisor.
        expected = (r / n[:, None, None, None]).square().mean().sqrt().item()
        assert method.balance.sizes[MOVE] == pytest.approx(expected, rel=1e-3)
        found.append((method.balance.sizes["light"], method.balance.misfit, method.bins.sums.clone()))
        assert method.bins.counts.sum() == 32
        assert method.bins.sums.sum().item() == pytest.approx(n.sum().item(), rel=1e-4)
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-3)
    assert gap(found[0][2], found[1][2]) < 1e-4


def test_the_average_follows_the_student_at_every_update_of_a_reused_rollout(tiny_folder):
    face = load(
        str(tiny_folder), lora=LoraSettings(rank=4, lora_alpha=16), trained=(STUDENT, FAKE), frozen=("average",)
    )
    rollout = RolloutConfig(num_prompts=2, group_size=2, num_inference_steps=2, sample_batch_size=4)
    student = Student(face, PROMPTS, rollout, face.resolution, 4, seed=3)
    method = GNDM(GNDMConfig(fake_updates=1, real_guidance_scale=2.0, reuse=2, ema_decay=0.5), face, student)
    path = []
    blend = face.roles.blend

    def noted(target, source, decay):
        path.append({name: p.detach().clone() for name, p in face.roles.parameters(source).items()})
        blend(target, source, decay)

    start = {name: p.detach().clone() for name, p in face.roles.parameters("average").items()}
    face.roles.blend = noted
    for _ in Learner(method, Accelerator(cpu=True), OptimizerConfig(learning_rate=1e-2), 1).run():
        pass
    assert len(path) == 2
    for name, found in face.roles.parameters("average").items():
        expected = 0.25 * start[name] + 0.25 * path[0][name] + 0.5 * path[1][name]
        assert gap(found, expected) < 1e-6
        assert torch.equal(path[1][name], face.roles.parameters(STUDENT)[name])


def test_parts_of_unequal_size_tell_the_balance_the_mean_over_samples(tiny_folder):
    found = []
    for size in (24, 16):  # one pack of three groups, or packs of two and of one
        face, student, _ = built(tiny_folder, Smooth())
        config = student.config.model_copy(update={"num_prompts": 3})
        student = replace(student, config=config, batch_size=size)
        settings = {"fake_updates": 1, "real_guidance_scale": 2.0, "reward_start": 2, "calibration": 2}
        method = GNDM(GNDMConfig(**settings), face, student, Composite({"light": (Smooth(), 1.0)}))
        list(method.losses(student.call(STUDENT, student.draw(0, 0, 2))))
        found.append((method.balance.misfit, *method.balance.sizes.values()))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_one_reward_that_does_not_apply_takes_nothing_from_another(tiny_folder):
    scores, other = torch.arange(32.0), torch.arange(32.0) % 5
    other[:8] = NAN
    face, student, _ = built(tiny_folder, Smooth())
    rewards = Composite(
        {
            "a": (lambda *_: scores, 1.0),
            "b": (lambda *_: other, 1.0),
            "light": (Smooth(), 1.0),
            "w": (lambda *_: scores, 0),
        }
    )
    method = GNDM(GNDMConfig(fake_updates=1, real_guidance_scale=1.0, reward_start=1), face, student, rewards)
    draw = student.draw(0, 0, 2)
    found = method._advantage(draw, student.path(draw, 2)[-1])
    assert found.isfinite().all()
    assert found[:8].diff().min() > 0  # of a alone
    told = {key for key in method.log if key.startswith(("rewards/", "watched/", "failed/")) and "std" not in key}
    assert told == {"rewards/a/mean", "failed/a", "rewards/b/mean", "failed/b", "watched/w/mean", "failed/w"}


def test_the_gate_opens_up_to_ten_and_never_closes_for_good():
    balance = Balance(GNDMConfig(reward_start=1, calibration=1, gate_rate=0.5))
    observed(balance, 1.0)
    observed(balance, *[0.1] * 30)
    assert balance.gate == 10
    observed(balance, *[50.0] * 60)
    assert balance.gate == 1e-4


def test_an_update_that_is_not_finite_says_nothing_also_if_it_is_the_first():
    balance = Balance(GNDMConfig(reward_start=3, calibration=3))
    observed(balance, math.nan)
    assert balance.misfit is None
    observed(balance, 1.0, 1.0)
    assert balance.limit == pytest.approx(1.1)


def test_the_misfit_is_a_running_mean():
    balance = Balance(GNDMConfig())
    observed(balance, 1.0, 2.0, 2.0)
    assert balance.misfit == pytest.approx(1 + 0.05 + 0.95 * 0.05)


def test_the_relative_misfit_is_in_units_of_the_siblings(tiny_folder):
    _, student, method = built(tiny_folder, Smooth(), real_guidance_scale=3.0)
    call = student.call(STUDENT, student.draw(0, 0, 2))
    r, n, _ = student.direction(student.x0(call).detach(), call, method.config)
    list(method.losses(call))
    expected = (r.flatten(1).abs().mean(1) / groups.means(n, call.draw.group)).mean().item()
    assert method.balance.misfit == pytest.approx(expected, rel=1e-5)


def test_a_reward_is_not_asked_for_a_gradient_before_sizes_are_measured(tiny_folder):
    class Never(Smooth):
        def with_gradient(self, images, prompts, metadata):
            pytest.fail("asked in the cold start")

    _, student, method = built(tiny_folder, Never(), reward_start=9, calibration=2)
    list(method.losses(student.call(STUDENT, student.draw(0, 0, 2))))


def test_balance_and_bins_learn_from_all_processes(tiny_folder):
    found = []
    for factor in (1, 3):
        face, student, _ = built(tiny_folder, Smooth())
        both = Processes(0, 2, lambda x, factor=factor: torch.cat([x, factor * x]))
        student = replace(student, processes=both)
        method = GNDM(GNDMConfig(fake_updates=1, real_guidance_scale=3.0), face, student)
        list(method.losses(student.call(STUDENT, student.draw(0, 0, 2))))
        assert method.bins.counts.sum() == 2 * 16
        found.append(method.balance.misfit)
    assert found[1] == pytest.approx(2 * found[0], rel=1e-5)
