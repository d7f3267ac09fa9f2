"""Methods for generators of one call, on a real tiny pipeline: two passes are one, and nothing moves that must not."""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from trimtab.batch import Prompts
from trimtab.candidates import Anchors, Ranked, ranked
from trimtab.distributed import Processes
from trimtab.learner import Learner
from trimtab.methods.dpo_one_step import DPOOneStep, DPOOneStepConfig, gaps, slope
from trimtab.methods.draft import DRaFT, DRaFTConfig
from trimtab.methods.drpo import DrPO, DrPOConfig, drift
from trimtab.optimizer import OptimizerConfig
from trimtab.pipelines import loading
from trimtab.rewards.composite import Composite
from trimtab.roles import LoraSettings
from trimtab.rollout import RolloutConfig, Rollouts

TEXTS = ("a red circle", "two stars", "a blue square")
PROMPTS = Prompts(TEXTS, tuple({} for _ in TEXTS), (0, 1, 2))
SIZE = 6  # candidates of each prompt


class Contrast:
    """A reward with a gradient: how far the left half is brighter than the right."""

    def __call__(self, images, prompts, metadata):
        return self.with_gradient(images, prompts, metadata)

    def with_gradient(self, images, prompts, metadata):
        half = images.shape[-1] // 2
        return images[..., :half].mean((1, 2, 3)) - images[..., half:].mean((1, 2, 3))


METHODS = {"drpo": (DrPO, DrPOConfig), "dpo-one-step": (DPOOneStep, DPOOneStepConfig), "draft": (DRaFT, DRaFTConfig)}


def one_record(method):
    """What one step of training logs."""
    (record,) = Learner(method, Accelerator(cpu=True), OptimizerConfig(learning_rate=1e-3), 1).run()
    return record.metrics


def build(face, name="drpo", batch_size=64, moved=True, reward=None, **settings):
    """A method over `face`, whose LoRA is away from the base unless told otherwise."""
    if moved:
        for seed, (key, p) in enumerate(sorted(face.roles.parameters("default").items())):
            if "lora_B" in key:
                p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    method, config = METHODS[name]
    sides = {"num_positive": 2, "num_negative": 2} if name != "draft" else {}
    rollout = RolloutConfig(num_prompts=3, group_size=SIZE, num_inference_steps=1, sample_batch_size=5)
    rewards = Composite({"mine": (reward or Contrast(), 1.0)})
    rollouts = Rollouts(face, PROMPTS, rewards, rollout, face.resolution, seed=3)
    return method(config(**(sides | settings)), face, rollouts, batch_size)


def gradients(method, batch=None):
    """The sum of the terms' values, and the gradient of the trained weights."""
    weights = method.pipeline.roles.parameters("default")
    for weight in weights.values():
        weight.grad = None
    total = 0.0
    for each in [batch] if batch is not None else method.collect(0):
        for loss in method.losses(each):
            loss.value.backward(inputs=list(weights.values()))
            total += loss.value.item()
    return total, torch.cat([w.grad.flatten() for w in weights.values() if w.grad is not None])


SETTINGS = [
    {"features": {"kind": "teacher"}},
    {"features": {"kind": "latents"}, "latent_weight": 0.3, "aggregate": "sum"},
    {"features": {"kind": "recognizer"}, "field": "raw", "mask_self_anchor": True},
    {"features": {"kind": "latents"}, "reference_weight": 0.0, "token_mode": "per_location"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["features"]["kind"])
def test_two_passes_have_the_gradient_of_one(tiny, settings):
    face = tiny()
    value, gradient = gradients(build(face, batch_size=64, **settings))
    assert gradient.abs().max() > 1e-4
    for batch_size in (SIZE, SIZE - 1, 1):  # a prompt at a time, then two passes
        again, same = gradients(build(face, batch_size=batch_size, **settings))
        assert again == pytest.approx(value, rel=1e-4)
        assert (same - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max().item())


@pytest.mark.parametrize("name", ["dpo-one-step", "draft"])
def test_baselines_have_one_gradient_at_any_batch_size(tiny, name):
    face = tiny()
    value, gradient = gradients(build(face, name))
    assert gradient.abs().max() > 1e-4
    again, same = gradients(build(face, name, batch_size=4))
    assert again == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert (same - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max().item())


@pytest.mark.parametrize(
    ("name", "settings"), [("draft", {}), ("drpo", {"features": {"kind": "recognizer"}})], ids=["draft", "drpo"]
)
def test_gradient_checkpointing_keeps_less_of_the_auto_encoder_too_and_changes_no_gradient(tiny, name, settings):
    found, kept = {}, {}
    for checkpointing in (False, True):
        face, counted = tiny(), []
        latents = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if checkpointing:
            face.enable_gradient_checkpointing()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=counted: to.append(x.numel()) or x, lambda x: x):
            face.decode(latents)
        found[checkpointing], kept[checkpointing] = gradients(build(face, name, **settings)), sum(counted)
    assert kept[True] < 0.5 * kept[False]
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    assert (found[True][1] - found[False][1]).abs().max() <= 1e-6 * found[False][1].abs().max()


@pytest.mark.parametrize("name", METHODS)
def test_everything_but_the_lora_stays_as_it_was(tiny, name):
    method = build(tiny(), name)
    batch = method.collect(0)[0]
    frozen = [p for p in method.pipeline.roles.network.parameters() if not p.requires_grad]
    for loss in method.losses(batch):
        loss.value.backward()  # into whatever it reaches
    trained = method.pipeline.roles.parameters("default").values()
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is None for p in method.pipeline.pipe.vae.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


def test_the_reward_is_never_differentiated(tiny):
    def reward(images, prompts, metadata):
        assert not images.requires_grad
        return images.mean((1, 2, 3))

    _, gradient = gradients(build(tiny(), reward=reward))
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["drpo", "dpo-one-step"])
def test_only_the_ranking_counts(tiny, name):
    face = tiny()
    bent = lambda images, p, m: (Contrast()(images, p, m) * 50).exp() * 3 - 100  # noqa: E731
    plain, same = (gradients(build(face, name, reward=reward))[1] for reward in (None, bent))
    assert torch.equal(plain, same)


@pytest.mark.parametrize("name", ["drpo", "dpo-one-step"])
def test_equal_scores_teach_nothing(tiny, name):
    method = build(tiny(), name, reward=lambda images, p, m: torch.full((len(images),), 0.5))
    batch = method.collect(0)[0]
    assert list(method.losses(batch)) == []
    assert method.after_step(0)["frac_skipped"] == 1


def test_an_untrained_lora_is_the_reference(tiny):
    method = build(tiny(), moved=False, features={"kind": "latents"})
    batch = method.collect(0)[0]
    (loss,) = method.losses(batch)
    assert loss.metrics["distance"] < 1e-5
    assert loss.metrics["drift/preference"] > 0


def test_the_distance_that_is_logged_knows_nothing_of_what_fits_into_memory(tiny):
    face, found = tiny(), []
    for batch_size in (64, SIZE):
        method = build(face, batch_size=batch_size, features={"kind": "latents"})
        (batch,) = method.collect(0)
        found.append(torch.stack([loss.metrics["distance"] for loss in method.losses(batch)]).mean().item())
    assert found[0] > 1e-3
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_reversed_ranks_turn_the_preference_around(tiny):
    face = tiny()
    forth = gradients(build(face, reference_weight=0.0, features={"kind": "latents"}))[1]
    against = lambda images, p, m: -Contrast()(images, p, m)  # noqa: E731
    back = gradients(build(face, reference_weight=0.0, features={"kind": "latents"}, reward=against))[1]
    assert F.cosine_similarity(forth, back, dim=0) < -0.5


def test_those_that_do_not_learn_are_anchors_only(tiny):
    method = build(tiny(), features={"kind": "latents"})
    batch = method.collect(0)[0]
    some = torch.zeros_like(batch.learns)
    some[batch.better.place] = True
    half = Ranked(batch.rollout, some, batch.better, batch.worse, batch.num_prompts)
    again = []
    method.rollouts.pipeline.predict, predict = counting(method, again), method.rollouts.pipeline.predict
    _, gradient = gradients(method, half)
    method.rollouts.pipeline.predict = predict
    assert gradient.abs().max() > 0
    assert sum(again) == len(batch.better)  # samples drawn with gradient


def counting(method, found):
    predict = method.pipeline.predict

    def counted(x_t, t, condition, role, *args):
        if role == "default" and torch.is_grad_enabled():
            found.append(len(x_t))
        return predict(x_t, t, condition, role, *args)

    return counted


def test_pictures_as_anchors_pull_towards_themselves(tiny):
    # The better anchors are what the candidates are plus one in every latent: latents must want to grow.
    method = build(tiny(), features={"kind": "latents"}, reference_weight=0.0)
    rollout, _ = method.rollouts.collect(0, "default")
    sides = [Anchors(rollout.latents + shift, rollout.group, None) for shift in (1.0, -1.0)]
    batch = Ranked(rollout, torch.ones(len(rollout), dtype=torch.bool), *sides, 3)
    (loss,) = method.losses(batch)
    weights = list(method.pipeline.roles.parameters("default").values())
    gradient = torch.autograd.grad(loss.value, weights)
    with torch.no_grad():
        for weight, slope_ in zip(weights, gradient, strict=True):
            weight -= 1e-2 * slope_
        grown = method.rollouts.again(rollout, "default") - rollout.latents
    assert grown.mean() > 0


def test_loss_and_gradient_are_those_of_both_fields_by_hand(tiny):
    method = build(tiny(), features={"kind": "latents", "keys": ("all",)}, reference_weight=0.3)
    rollout, _ = method.rollouts.collect(0, "default")
    x, itself = method.rollouts.again(rollout, "default").flatten(1), torch.eye(SIZE, dtype=torch.bool)
    with torch.no_grad():
        origin = method.rollouts.again(rollout, "ref").flatten(1)
    expected, along = 0.0, 0.0
    for group in rollout.group.unique():
        rows = (rollout.group == group).nonzero().flatten()
        order = rows[rollout.reward[rows].argsort(descending=True)]
        own = x[rows].detach()[None]
        fields = [
            (1.0, *drift(own, x[order[:2]][None], x[order[-2:]][None], method.config)),
            (0.3, *drift(own, origin[rows][None], own, method.config, worse_self=itself)),
        ]
        for weight, v, unit, _ in fields:
            expected += weight * v.square().mean().item() / 3
            along = along - 2 * weight * (v / unit * x[rows]).mean() / 3
    weights = list(method.pipeline.roles.parameters("default").values())
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(along, weights)])
    value, gradient = gradients(method)
    assert value == pytest.approx(expected, rel=1e-3)
    # The value hardly tells one field from another, for each has unit size; the gradient does.
    assert (gradient - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_the_latents_distance_to_the_reference_is_added(tiny):
    face, settings = tiny(), {"features": {"kind": "latents"}, "reference_weight": 0.0}
    plain, _ = gradients(build(face, **settings))
    held, _ = gradients(build(face, **settings, latent_weight=2.0))
    method = build(face, **settings)
    rollout, _ = method.rollouts.collect(0, "default")
    with torch.no_grad():
        distance = (rollout.latents - method.rollouts.again(rollout, "ref")).square().mean().item()
    assert distance > 1e-3
    assert held - plain == pytest.approx(2 * distance, rel=1e-2)


# DPO by hand


def test_gaps_and_slopes_are_those_of_the_equations():
    g = torch.Generator().manual_seed(0)
    x, better, worse, before = (torch.randn(n, 2, 3, generator=g) for n in (4, 2, 3, 4))
    x.requires_grad_()

    def gap(samples):
        far = sum((a - b).square().mean() for a in samples for b in worse) / (len(samples) * len(worse))
        near = sum((a - b).square().mean() for a in samples for b in better) / (len(samples) * len(better))
        return far - near

    loss = -F.logsigmoid(30.0 * (gap(x) - gap(before)))
    (wanted,) = torch.autograd.grad(loss, x)
    value, factor = slope(gaps(x.detach(), better, worse).mean(), gaps(before, better, worse).mean(), 30.0)
    assert value.item() == pytest.approx(loss.item(), rel=1e-4)
    (found,) = torch.autograd.grad(factor * gaps(x, better, worse).mean(), x)
    assert (found - wanted).abs().max() < 1e-5


def test_dpo_starts_at_log_two_and_falls(tiny):
    method = build(tiny(), "dpo-one-step", moved=False)
    batch = method.collect(0)[0]
    (loss,) = method.losses(batch)
    assert loss.value.item() == pytest.approx(0.693147, abs=1e-4)
    weights = list(method.pipeline.roles.parameters("default").values())
    with torch.no_grad():
        for weight, slope_ in zip(weights, torch.autograd.grad(loss.value, weights), strict=True):
            weight -= 0.1 * slope_ / slope_.norm().clamp_min(1e-8)
    moved = replace(batch.rollout, latents=method.rollouts.again(batch.rollout, "default").detach())
    (after,) = method.losses(replace(batch, rollout=moved))
    assert after.value < 0.6931


def test_a_process_of_draft_divides_by_the_mean_of_all_lengths(tiny):
    method = build(tiny(), "draft")
    (batch,) = method.collect(0)
    alone = sum(loss.value.item() for loss in method.losses(batch))
    more = torch.tensor([3.0 * len(batch)])  # another process has three times as many
    method.rollouts = replace(method.rollouts, processes=Processes(0, 2, lambda x: torch.cat([x, more])))
    assert sum(loss.value.item() for loss in method.losses(batch)) == pytest.approx(alone / 2, rel=1e-4)


class Picky(Contrast):
    """The same, but it raises for pictures below the first brightness, and has no number for those below the second."""

    bounds = 0.0, 0.0

    def with_gradient(self, images, prompts, metadata):
        light, (first, second) = images.mean((1, 2, 3)), self.bounds
        if (light.detach() < first).any():
            raise ValueError("too dark")
        return super().with_gradient(images, prompts, metadata) + 0 * (light - second).sqrt()


def test_pictures_without_a_score_cost_draft_no_more_than_themselves(tiny):
    reward = Picky()
    method = build(tiny(), "draft", batch_size=9, reward=reward)
    (rollout,) = method.collect(0)
    images = method.pipeline.decode(method.rollouts.again(rollout, "default").detach())
    light, order = images.mean((1, 2, 3)).sort()
    kept = order[3:].sort().values
    share = len(kept) / len(rollout)  # the others do not count more for it
    value, gradient = gradients(build(method.pipeline, "draft", moved=False), rollout[kept])
    reward.bounds = light[:2].mean().item(), light[2:4].mean().item()
    found, same = gradients(method, rollout)
    assert found == pytest.approx(value * share, rel=1e-4)
    assert (same - share * gradient).abs().max() < 1e-5 * gradient.abs().max()
    (record,) = list(Learner(method, Accelerator(cpu=True), OptimizerConfig(learning_rate=1e-3), 1).run())
    assert record.metrics["failed/mine"] == 3
    assert record.metrics["skipped_updates"] == 0


def test_a_watched_reward_changes_nothing_of_draft_and_is_logged(tiny):
    """One that fails for some pictures, and whose scores have no siblings to be compared with."""
    plain = build(tiny(), "draft", batch_size=9)
    value, gradient = gradients(plain)
    brightness = []

    def seen(images, prompts, metadata):
        light = images.mean((1, 2, 3))
        brightness.extend(light.tolist() if len(images) > 1 else [])
        if (light > dim).any():
            raise ValueError("too light")
        return light

    dim = 2.0
    method = build(plain.pipeline, "draft", batch_size=9, moved=False)
    rewards = Composite({"mine": (Contrast(), 1.0), "seen": (seen, 0.0)})
    method.rollouts = replace(method.rollouts, rewards=rewards)
    found, same = gradients(method)
    assert found == value
    assert torch.equal(same, gradient)
    assert len(brightness) == 3 * SIZE
    dim = sorted(brightness)[3]
    (record,) = list(Learner(method, Accelerator(cpu=True), OptimizerConfig(learning_rate=1e-3), 1).run())
    assert (record.metrics["failed/seen"], record.metrics["failed/mine"]) == (3 * SIZE - 4, 0)
    assert record.metrics["watched/seen/mean"] < dim


def test_draft_climbs_the_reward_and_is_held_by_the_latents(tiny):
    method = build(tiny(), "draft")
    value, free = gradients(method)
    assert value == pytest.approx(-method.rollouts.collect(0, "default")[0].reward.mean().item(), rel=1e-3)
    _, held = gradients(build(method.pipeline, "draft", moved=False, latent_weight=100.0))
    assert F.cosine_similarity(free, held, dim=0) < 0.9


def test_ranked_is_what_methods_are_given(tiny):
    method = build(tiny())
    rollout, _ = method.rollouts.collect(0, "default")
    batch = method.collect(0)[0]
    assert torch.equal(ranked(rollout, 2, 2).better.place, batch.better.place)


# Several processes


@pytest.mark.parametrize("variant", ["online", "binary"])
def test_processes_that_skip_different_prompts_do_not_wait_for_each_other(tiny_folder, tmp_path, variant):
    torch.multiprocessing.spawn(skip, args=(str(tmp_path), str(tiny_folder), variant), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)  # they stay one model
    assert any(x.abs().max() > 0 for name, x in first.items() if "lora_B" in name)


def skip(rank: int, folder: str, model: str, variant: str) -> None:
    """Two steps; in the first only the second process has a prompt that teaches, in the second neither has."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    accelerator = Accelerator(cpu=True)
    face = loading.load(model, lora=LoraSettings(rank=2, lora_alpha=4))
    asked = []

    def reward(images, prompts, metadata):
        asked.append(len(images))
        teaches = rank == 1 and len(asked) == 1
        return torch.arange(float(len(images))) % 2 if teaches else torch.zeros(len(images))

    rollout = RolloutConfig(num_prompts=2, group_size=4, num_inference_steps=1)
    rewards = Composite({"mine": (reward, 1.0)})
    rollouts = Rollouts(face, PROMPTS[[0, 1]], rewards, rollout, face.resolution, 3, Processes.of(accelerator))
    config = DrPOConfig(variant=variant, num_positive=2, num_negative=2, num_rounds=3, features={"kind": "latents"})
    learner = Learner(DrPO(config, face, rollouts, 8), accelerator, OptimizerConfig(learning_rate=1e-2), 2)
    records = [record.metrics for record in learner.run()]
    assert [r["frac_skipped"] for r in records] == [0.5, 1.0]  # of both processes
    assert records[1]["images"] == {"online": 8, "binary": 24}[variant]
    expected = {"online": 2, "binary": 6 - 2 * rank}[variant]  # rounds differ, too
    assert len(asked) == expected
    save_file({n: p.detach() for n, p in face.roles.parameters("default").items()}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_draft_climbs_the_weighted_sum_of_its_rewards_and_logs_them_unweighted(tiny):
    plain = build(tiny(), "draft", batch_size=9)
    value, gradient = gradients(plain)
    method = build(plain.pipeline, "draft", batch_size=9, moved=False)
    rewards = Composite({"mine": (Contrast(), 4.0), "against": (Contrast(), -1.0)})
    method.rollouts = replace(method.rollouts, rewards=rewards)
    found, slope = gradients(method)
    assert found == pytest.approx(3 * value, rel=1e-5)
    assert (slope - 3 * gradient).abs().max() < 1e-5 * gradient.abs().max()
    _, log = method.rollouts.collect(0, "default")
    metrics = one_record(method)
    assert metrics["images"] == 3 * SIZE
    assert metrics["diversity"] == pytest.approx(log["diversity"], rel=1e-4)
    assert metrics["rewards/mine/mean"] == pytest.approx(metrics["rewards/against/mean"])
    assert metrics["reward"] == pytest.approx(3 * metrics["rewards/mine/mean"], rel=1e-5)


def test_one_picture_a_prompt_has_no_diversity(tiny):
    method = build(tiny(), "draft")
    method.rollouts = replace(method.rollouts, config=method.rollouts.config.model_copy(update={"group_size": 1}))
    assert "diversity" not in one_record(method)


def test_the_reward_that_is_logged_is_the_mean_of_those_that_there_are(tiny):
    reward = Picky()
    method = build(tiny(), "draft", batch_size=9, reward=reward)
    (rollout,) = method.collect(0)
    images = method.pipeline.decode(method.rollouts.again(rollout, "default").detach())
    reward.bounds = images.mean((1, 2, 3)).sort().values[2].item(), 0.0
    loss, metrics = None, []
    for loss in method.losses(rollout):
        metrics.append(loss.metrics)
    for each in metrics:
        assert each["reward"].item() == pytest.approx(each["rewards/mine/mean"].item(), rel=1e-5)


def test_a_watched_reward_that_fails_for_one_picture_costs_draft_that_alone_at_any_batch_size(tiny):
    method = build(tiny(), "draft", batch_size=1)
    numbers = iter(range(1000))

    def seen(images, prompts, metadata):
        if next(numbers) < 2:  # the first picture, by itself and asked again
            raise ValueError("not this one")
        return images.mean((1, 2, 3))

    method.rollouts = replace(method.rollouts, rewards=Composite({"mine": (Contrast(), 1.0), "seen": (seen, 0.0)}))
    assert one_record(method)["failed/seen"] == 1


def test_a_watched_reward_may_have_a_network_of_its_own(tiny):
    method, network = build(tiny(), "draft", batch_size=9), torch.nn.Linear(3, 1)

    def seen(images, prompts, metadata):
        return torch.from_numpy(network(images.mean((2, 3)))[:, 0].numpy())

    method.rollouts = replace(method.rollouts, rewards=Composite({"mine": (Contrast(), 1.0), "seen": (seen, 0.0)}))
    assert one_record(method)["failed/seen"] == 0


def test_a_process_of_draft_divides_the_latents_distance_too(tiny):
    method = build(tiny(), "draft", latent_weight=0.5)
    (batch,) = method.collect(0)
    alone = sum(loss.value.item() for loss in method.losses(batch))
    more = torch.tensor([3.0 * len(batch)])
    method.rollouts = replace(method.rollouts, processes=Processes(0, 2, lambda x: torch.cat([x, more])))
    assert sum(loss.value.item() for loss in method.losses(batch)) == pytest.approx(alone / 2, rel=1e-4)
