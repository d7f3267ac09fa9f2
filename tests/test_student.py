"""Students: what they are trained on, and that every gradient lands where it belongs, however a batch is cut."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from scipy.stats import beta

from trimtab import noise
from trimtab.batch import Prompts
from trimtab.distributed import Processes
from trimtab.learner import Learner
from trimtab.methods.dmd2 import DMD2, DMD2Config
from trimtab.methods.dmdr import DMDR, DMDRConfig
from trimtab.methods.gndm import GNDM, GNDMConfig
from trimtab.optimizer import OptimizerConfig
from trimtab.pipelines.loading import load
from trimtab.roles import LoraSettings
from trimtab.rollout import RolloutConfig
from trimtab.student import FAKE, STUDENT, Student, fake_time

TEXTS = ("a photo of a red circle", "a photo of two stars", "a blue ring", "a cross")
PROMPTS = Prompts(TEXTS, tuple({} for _ in TEXTS), tuple(range(10, 14)))
LORA = LoraSettings(rank=4, lora_alpha=16)


def gap(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def face(tiny_folder):
    """Student and fake as LoRAs, apart from each other and from the teacher."""
    face = load(str(tiny_folder), lora=LORA, trained=(STUDENT, FAKE))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for role in (STUDENT, FAKE):
            for parameter in face.roles.parameters(role).values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return face


def student(face, batch_size=8, rank=0, num_processes=1, **config):
    config = RolloutConfig(**{"num_prompts": 4, "group_size": 2, "num_inference_steps": 3} | config)
    return Student(face, PROMPTS, config, face.resolution, batch_size, 7, Processes(rank, num_processes))


def by_sample(draw, values):
    keys = zip(draw.group.tolist(), draw.sibling.tolist(), strict=True)
    return {(draw.prompts.index[g], s): value for (g, s), value in zip(keys, values, strict=True)}


# Samples


def test_a_path_starts_in_pure_noise_and_ends_as_stock_sampling_would(face):
    own = student(face)
    draw = own.draw(0, 0, 3)
    path, noises = own.path(draw, 3), own.noises(draw)
    assert path.shape == (4, 8, *face.latent_shape(face.resolution))
    assert torch.equal(path[0], noises[0])
    times = own.times()
    with torch.no_grad():
        for k in range(2):
            x0 = face.predict(path[k], times[k], draw.conditions(), STUDENT).x0
            assert gap(path[k + 1], face.process.noised(x0, noises[k + 1], times[k + 1])) < 1e-6
        assert gap(path[3], face.predict(path[2], times[2], draw.conditions(), STUDENT).x0) < 1e-6
    assert gap(own.path(draw, 1), path[:2]) == 0


@pytest.mark.parametrize("size", [1, 3, 100])
def test_samples_do_not_depend_on_how_many_are_made_at_once_nor_on_the_process(face, size):
    whole = student(face)
    draw = whole.draw(4, 1, 3)
    expected = by_sample(draw, whole.path(draw, 2)[-1])
    assert len(expected) == 8
    found = {}
    for rank in (0, 1):
        part = student(face, rank=rank, num_processes=2, sample_batch_size=size)
        own = part.draw(4, 1, 3)
        found |= by_sample(own, part.path(own, 2)[-1])
    assert found.keys() == expected.keys()
    assert max(gap(found[key], expected[key]) for key in expected) < 1e-5


def test_batches_differ_and_every_call_is_trained_equally_often(face):
    own = student(face)
    starts = [own.noises(own.draw(step, number, 3))[0] for step in range(2) for number in range(3)]
    assert all(gap(a, b) > 1 for i, a in enumerate(starts) for b in starts[:i])
    calls = torch.tensor([own.choice(own.draw(step, 0, 3)) for step in range(300)])
    assert torch.bincount(calls, minlength=3).min() > 70
    assert calls[:20].tolist() != [own.choice(own.draw(step, 1, 3)) for step in range(20)]  # each batch has its own
    other = student(face, rank=1, num_processes=2)
    assert calls[:20].tolist() == [other.choice(other.draw(step, 0, 3)) for step in range(20)]


@pytest.mark.parametrize("times", ["independent", "stratified", "shared", "shared_stratified"])
def test_times_of_comparison_are_even_where_they_say_and_the_same_on_two_processes(face, times):
    config = GNDMConfig(times=times, min_time=0.25, max_time=0.75, num_renoise=2)
    whole = student(face)
    call = whole.call(STUDENT, whole.draw(0, 0, 3))
    t = whole.matching_times(call, config)
    assert t.shape == (2, 8)
    assert ((t >= 0.25) & (t < 0.75)).all()
    assert gap(t[0], t[1]) > 0
    siblings = t[0].unflatten(0, (4, 2))
    assert bool((siblings[:, 0] == siblings[:, 1]).all()) == times.startswith("shared")
    if times.endswith("stratified"):
        distinct = siblings[:, 0] if times.startswith("shared") else t[0]
        strata = ((distinct - 0.25) / 0.5 * len(distinct)).long()
        assert sorted(strata.tolist()) == list(range(len(distinct)))
    found = {}
    for rank in (0, 1):
        part = student(face, rank=rank, num_processes=2)
        own = part.call(STUDENT, part.draw(0, 0, 3))
        found |= by_sample(own.draw, part.matching_times(own, config)[0].tolist())
    assert found == by_sample(call.draw, t[0].tolist())


@pytest.mark.parametrize(("mode", "number"), [("stratified", 8), ("shared_stratified", 4)])
def test_a_sample_has_another_stratum_in_another_step(face, mode, number):
    own = student(face)
    first = [int(own.levels(own.draw(step, 0, 3), mode, 0)[0] * number) for step in range(8)]
    assert len(set(first)) > 1


def test_the_fake_learns_at_all_times_evenly_or_by_a_logit_normal():
    levels = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(fake_time(GNDMConfig(), levels)[1:], levels[1:])
    assert fake_time(GNDMConfig(), levels)[0] == 0.001
    t = fake_time(GNDMConfig(fake_times="logit_normal"), levels)
    assert t.median().item() == pytest.approx(0.5, abs=1e-3)
    assert torch.logit(t).std().item() == pytest.approx(1, abs=0.02)


# Gradients


def gradients(losses, face):
    """{role: gradient}, of all terms together."""
    total = {}
    for loss in losses:
        parameters = list(face.roles.parameters(loss.network).values())
        parts = torch.autograd.grad(loss.value, parameters, allow_unused=True)
        own = torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(parameters, parts, strict=True)
            ]
        )
        total[loss.network] = total.get(loss.network, 0) + own
    return total


def agrees(found, role, loss, method):
    """The only gradient is that of a loss with respect to what the method trains as this role."""
    wanted = torch.autograd.grad(loss, list(method.trained()[role].values()))
    wanted = torch.cat([g.flatten() for g in wanted])
    assert set(found) == {role}
    assert gap(found[role], wanted) < 1e-4 * wanted.abs().max()


def methods(own, **config):
    return GNDM(GNDMConfig(**config), own.pipeline, own)


@pytest.mark.parametrize("normaliser", ["sample", "group_mean", "group_whiten", "none"])
@pytest.mark.parametrize("network", [STUDENT, FAKE])
def test_the_size_of_a_micro_batch_changes_no_gradient(face, network, normaliser):
    expected = None
    for size in (8, 4, 1):  # all at once; whole groups; groups in parts
        own = student(face, batch_size=size)
        method = methods(own, normaliser=normaliser)
        found = gradients(method.losses(own.call(network, own.draw(0, 0, 3))), face)
        assert set(found) == {network}
        if expected is None:
            expected = found[network]
            assert expected.abs().max() > 1e-6
        assert gap(found[network], expected) < 2e-5 * expected.abs().max()


def normal_times(levels):
    return torch.special.ndtri(levels).sigmoid()


def dmdrs_times(levels):
    remaining = (1 + math.cos(math.pi / 4)) / 2
    return 0.02 + 0.96 * torch.from_numpy(beta.ppf(levels.double().numpy(), 1 + 3 * remaining, 1 + 0.5 * remaining))


@pytest.mark.parametrize(
    ("build", "times"),
    [
        (lambda own: GNDM(GNDMConfig(fake_times="logit_normal"), own.pipeline, own), normal_times),
        (lambda own: DMD2(DMD2Config(fake_times="logit_normal"), own.pipeline, own), normal_times),
        (lambda own: DMD2(DMD2Config(), own.pipeline, own), lambda u: u),
        (lambda own: DMDR(DMDRConfig(dynamic_steps=4), own.pipeline, own, update=1), dmdrs_times),
    ],
    ids=["gndm", "dmd2", "dmd2-uniform", "dmdr"],
)  # fmt: skip
def test_every_methods_fake_learns_to_denoise_the_students_samples_at_its_own_times(face, build, times):
    own = student(face, batch_size=3)
    method, call = build(own), own.call(FAKE, own.draw(0, 1, 3))
    t = times(own.levels(call.draw, "stratified", 0, noise.FAKE)).float()
    with torch.no_grad():
        x0 = face.predict(call.path[call.k], call.t, call.draw.conditions(), STUDENT).x0
    eps, wide = noise.normal(call.draw.keys(noise.FAKE), x0.shape[1:]), t[:, None, None, None]
    said = face.predict((1 - wide) * x0 + wide * eps, t, call.draw.conditions(), FAKE).value
    expected = (said - (eps - x0)).square().mean()
    losses = list(method.losses(call))
    assert sum(loss.value.item() for loss in losses) == pytest.approx(expected.item(), rel=1e-4)
    agrees(gradients(losses, face), FAKE, expected, method)


@pytest.mark.parametrize("name", ["dmd2", "dmdr"])
def test_the_push_leads_from_the_fakes_opinion_to_the_guided_teachers_by_hand(face, name):
    # The teacher of dmdr has half of s of the fake's LoRA, which is B's size, and is compared at dmdr's times.
    own = student(face, batch_size=1)
    if name == "dmd2":
        method = DMD2(DMD2Config(real_guidance_scale=3.0), face, own)
    else:
        method = DMDR(DMDRConfig(real_guidance_scale=3.0, dynamic_guidance=0.6, dynamic_steps=4), face, own, update=1)
    call = own.call(STUDENT, own.draw(0, 0, 3))
    condition, u = call.draw.conditions(), own.levels(call.draw, "stratified", 0)
    x = face.predict(call.path[call.k], call.t, condition, STUDENT).x0
    t = 0.02 + 0.96 * u if name == "dmd2" else dmdrs_times(u).float()
    wide = t[:, None, None, None]
    with torch.no_grad():
        y = (1 - wide) * x + wide * noise.normal(call.draw.keys(noise.MATCHING, 0, 0), x.shape[1:])
        fake = face.predict(y, t, condition, FAKE).x0
        kept = {key: p.clone() for key, p in face.roles.parameters(FAKE).items()}
        share = 0.0 if name == "dmd2" else 0.6 * (1 + math.cos(math.pi / 4)) / 2 / 2
        for key, parameter in face.roles.parameters(FAKE).items():
            parameter.mul_(share if "lora_B" in key else 1.0)
        real = face.predict(y, t, condition, FAKE, 3.0).x0
        for key, parameter in face.roles.parameters(FAKE).items():
            parameter.copy_(kept[key])
        push = (real - fake) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    losses = list(method.losses(call))
    assert sum(loss.value.item() for loss in losses) == pytest.approx(push.square().mean().item() / 2, rel=1e-4)
    agrees(gradients(losses, face), STUDENT, -(push * x).sum() / x.numel(), method)


@pytest.mark.parametrize(("method", "config"), [(DMD2, DMD2Config), (DMDR, DMDRConfig)])
def test_after_a_step_the_average_has_gone_a_part_of_the_way_to_the_student(tiny_folder, method, config):
    face = load(str(tiny_folder), lora=LORA, trained=(STUDENT, FAKE), frozen=("average",))
    before = {name: p.clone() for name, p in face.roles.parameters("average").items()}
    with torch.no_grad():
        for parameter in face.roles.parameters(STUDENT).values():
            parameter += 1
    method(config(ema_decay=0.75), face, student(face)).after_step(0)
    for role, part in ((STUDENT, 1.0), (FAKE, 0.0), ("average", 0.25)):
        assert max(gap(p, before[name] + part) for name, p in face.roles.parameters(role).items()) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("num_renoise", [1, 2])
def test_the_direction_leads_from_the_fakes_opinion_to_the_guided_teachers_on_average(face, num_renoise):
    own, config = student(face), DMD2Config(real_guidance_scale=2.0, num_renoise=num_renoise)
    call = own.call(STUDENT, own.draw(0, 0, 3))
    x, condition = own.x0(call), call.draw.conditions()
    times, directions, misfits = own.matching_times(call, config), [], []
    for number, t in enumerate(times):
        y = face.process.noised(x, noise.normal(call.draw.keys(noise.MATCHING, number, 0), x.shape[1:]), t)
        real, fake = face.predict(y, t, condition, "ref", 2.0).x0, face.predict(y, t, condition, FAKE).x0
        directions.append(real - fake)
        misfits.append((x - real).abs().mean((1, 2, 3)))
    r, n, t = own.direction(x, call, config)
    assert gap(r, sum(directions) / num_renoise) < 1e-5
    assert gap(n, sum(misfits) / num_renoise) < 1e-5
    assert gap(t, sum(times) / num_renoise) < 1e-6


def test_the_teacher_is_guided_and_the_fake_is_not(face):
    own = student(face)
    call = own.call(STUDENT, own.draw(0, 0, 3))
    x = own.x0(call).detach()
    plain, guided = (own.direction(x, call, GNDMConfig(real_guidance_scale=w)) for w in (1.0, 3.0))
    assert gap(plain[0], guided[0]) > 1e-3
    own_fake = {name: p.detach().clone() for name, p in face.roles.parameters(FAKE).items()}
    with torch.no_grad():
        for parameter in face.roles.parameters(FAKE).values():
            parameter.zero_()
    same = own.direction(x, call, GNDMConfig(real_guidance_scale=1.0))  # a fake that is the teacher sees no difference
    with torch.no_grad():
        for name, parameter in face.roles.parameters(FAKE).items():
            parameter.copy_(own_fake[name])
    assert gap(same[0], torch.zeros_like(same[0])) < 1e-5


def test_checkpointing_changes_neither_networks_gradient(tiny_folder):
    found = {}
    for checkpointing in (False, True):
        face = load(str(tiny_folder), lora=LORA, trained=(STUDENT, FAKE))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for role in (STUDENT, FAKE):
                for parameter in face.roles.parameters(role).values():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if checkpointing:
            face.roles.enable_gradient_checkpointing()
            face.roles.network.train()
        own = student(face)
        method = methods(own)
        found[checkpointing] = {
            role: gradients(method.losses(own.call(role, own.draw(0, 0, 3))), face)[role] for role in (STUDENT, FAKE)
        }
    for role in (STUDENT, FAKE):
        assert found[False][role].abs().max() > 1e-6
        assert gap(found[True][role], found[False][role]) < 1e-6 * found[False][role].abs().max() + 1e-9


# Updates


def counting(method):
    """The networks of the batches of two steps."""
    return [[call.network for call in method.collect(step)] for step in (0, 1)]


def test_a_step_is_the_fakes_updates_and_then_the_students_one(face):
    own = student(face)
    assert counting(DMD2(DMD2Config(fake_updates=2, fake_warmup=1), face, own)) == [
        [FAKE, FAKE, FAKE, STUDENT],
        [FAKE, FAKE, STUDENT],
    ]
    assert counting(DMDR(DMDRConfig(fake_updates=1, fake_warmup=1), face, own)) == [
        [FAKE, FAKE, STUDENT],
        [FAKE, STUDENT],
    ]
    assert counting(methods(own, fake_updates=1, fake_warmup=2, reuse=2)) == [
        [FAKE, FAKE, FAKE, STUDENT, FAKE, STUDENT],
        [FAKE, STUDENT, FAKE, STUDENT],
    ]


@pytest.mark.parametrize("reuse", [1, 2])
def test_pictures_are_counted_by_the_draws_that_made_them(face, reuse):
    own = student(face)
    method = methods(own, fake_updates=2, fake_warmup=1, reuse=reuse)
    for step in (0, 1):
        draws = {call.draw.number: len(call) for call in method.collect(step)}
        assert method.after_step(step)["images"] == sum(draws.values())


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_student_and_fake_move_and_the_teacher_does_not(tiny_folder, lora):
    face = load(str(tiny_folder), lora=lora, trained=(STUDENT, FAKE), frozen=("average",))
    own = student(face)
    draw = own.draw(9, 0, 3)
    x, t = own.noises(draw)[0], torch.tensor(0.5)
    roles = ("ref", STUDENT, FAKE, "average")
    with torch.no_grad():
        before = {role: face.predict(x, t, draw.conditions(), role).value for role in roles}
    assert all(torch.equal(before[role], before["ref"]) for role in roles)
    method = DMD2(DMD2Config(fake_updates=1, ema_decay=0.5), face, own)
    records = list(Learner(method, Accelerator(cpu=True), OptimizerConfig(learning_rate=1e-2), 2).run())
    with torch.no_grad():
        after = {role: face.predict(x, t, draw.conditions(), role).value for role in roles}
    assert torch.equal(after["ref"], before["ref"])
    moved = {role: gap(after[role], before[role]) for role in roles}
    assert min(moved[STUDENT], moved[FAKE]) > 1e-3
    assert 0 < moved["average"] < moved[STUDENT]
    assert {"loss/default", "loss/fake", "direction", "misfit"} <= set(records[0].metrics)


def test_gndm_with_groups_of_one_is_dmd2_to_the_bit(tiny_folder):
    shared = {"fake_updates": 2, "real_guidance_scale": 2.0, "times": "stratified"}
    weights = []
    for method, config in ((DMD2, DMD2Config(**shared)), (GNDM, GNDMConfig(**shared))):
        face = load(str(tiny_folder), lora=LORA, trained=(STUDENT, FAKE))
        own = student(face, group_size=1)
        for _ in Learner(
            method(config, face, own), Accelerator(cpu=True), OptimizerConfig(learning_rate=1e-2), 2
        ).run():
            pass
        weights.append([p.detach().clone() for role in (STUDENT, FAKE) for p in face.roles.parameters(role).values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_reused_rollouts_weigh_what_todays_student_would_rarely_do(face):
    # The weights are one on the first use and at the first call, and have mean one among siblings.
    own = student(face, group_size=4)
    method = methods(own, reuse=2)
    draw = own.draw(0, 0, 3)
    path = own.path(draw, 3)
    call = replace(own.call(STUDENT, draw), k=2, t=own.times()[2], path=path)
    assert torch.equal(method._importance(call, draw.group), torch.ones(16))
    assert torch.equal(method._importance(replace(call, k=0, use=1), draw.group), torch.ones(16))
    with torch.no_grad():
        unmoved = method._importance(replace(call, use=1), draw.group)
        assert gap(unmoved, torch.ones(16)) < 1e-3
        for parameter in face.roles.parameters(STUDENT).values():
            parameter += 0.05
        weights = method._importance(replace(call, use=1), draw.group)
        for parameter in face.roles.parameters(STUDENT).values():
            parameter -= 0.05
    assert gap(weights, torch.ones(16)) > 0.01
    assert weights.unflatten(0, (4, 4)).mean(1).tolist() == pytest.approx([1] * 4)
