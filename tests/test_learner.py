"""The loop: where gradients land, how terms add up, what is skipped, and that a resume is exact."""

import copy
import math
import os
import time
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from trimtab.distributed import launched
from trimtab.errors import UserError
from trimtab.learner import Learner, _buckets, _of_all
from trimtab.method import Loss
from trimtab.optimizer import OptimizerConfig, lr_factor


def line(seed):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


@dataclass
class Toy:
    """Two networks; `terms(networks, batch)` says what a batch, (8, 3) numbers seeded by its place, is worth."""

    terms: object
    networks: dict = field(default_factory=lambda: {"a": line(0), "b": line(1)})
    batches_per_step: int = 2
    average: nn.Module = field(default_factory=lambda: line(2))  # a slow copy of network a

    def trained(self):
        return {name: dict(network.named_parameters()) for name, network in self.networks.items()}

    def state(self):
        return {"average": self.average}

    def collect(self, step):
        for number in range(self.batches_per_step):
            yield torch.randn(8, 3, generator=torch.Generator().manual_seed(10 * step + number))

    def losses(self, batch):
        yield from self.terms(self.networks, batch)

    @torch.no_grad()
    def after_step(self, step):
        for slow, fast in zip(self.average.parameters(), self.networks["a"].parameters(), strict=True):
            slow.lerp_(fast, 0.1)
        return {"slow": self.average.bias.sum().item()}


def both(networks, batch):
    """Depends on both networks."""
    return (networks["a"](batch) + 2 * networks["b"](batch)).square().mean()


def learner(terms, num_steps=3, networks=None, **config):
    config = OptimizerConfig(**{"learning_rate": 0.01} | config)
    toy = Toy(terms) if networks is None else Toy(terms, networks)
    return Learner(toy, Accelerator(cpu=True), config, num_steps)


def weights(learner, name):
    return torch.cat([p.detach().flatten().clone() for p in learner.parameters[name].values()])


def gap(a, b):
    return (a - b).abs().max().item()


# Gradients


def test_a_loss_changes_only_the_network_that_it_names():
    trainer = learner(lambda networks, batch: [Loss("a", both(networks, batch))])
    before = {name: weights(trainer, name) for name in ("a", "b")}
    list(trainer.run())
    assert (weights(trainer, "a") != before["a"]).all()
    assert torch.equal(weights(trainer, "b"), before["b"])
    assert all(p.grad is None for p in trainer.parameters["b"].values())


def test_two_networks_each_follow_their_own_loss():
    def terms(networks, batch):
        yield Loss("a", both(networks, batch))
        yield Loss("b", networks["b"](batch).square().mean() + 0 * both(networks, batch))

    def only_b(networks, batch):
        yield Loss("b", networks["b"](batch).square().mean())

    together, alone = learner(terms), learner(only_b)
    list(together.run())
    list(alone.run())
    assert gap(weights(together, "b"), weights(alone, "b")) < 1e-7


def test_the_terms_of_a_batch_add_up_to_the_whole():
    def whole(networks, batch):
        yield Loss("a", both(networks, batch))

    def parts(networks, batch):
        for part in batch.split([3, 3, 2]):
            yield Loss("a", both(networks, part) * len(part) / len(batch))

    one, many = learner(whole), learner(parts)
    records = [list(trainer.run()) for trainer in (one, many)]
    assert gap(weights(one, "a"), weights(many, "a")) < 1e-6
    for key in ("loss/a", "grad_norm/a"):
        first, second = ([record.metrics[key] for record in each] for each in records)
        assert first == pytest.approx(second, rel=1e-5)


def test_metrics_are_means_over_the_samples_of_their_terms():
    def terms(networks, batch):
        for value, part in zip((1.0, 5.0), batch.split([6, 2]), strict=True):
            yield Loss("a", both(networks, part), {"gap": torch.tensor(value)}, len(part))

    assert [record.metrics["gap"] for record in learner(terms).run()] == [2.0, 2.0, 2.0]


def test_a_reward_is_averaged_over_the_terms_that_it_applies_to():
    seen = iter([math.nan, 2.0, 4.0])

    def terms(networks, batch):
        for part in batch.split([3, 3, 2]):
            said = torch.tensor(next(seen, math.nan))
            yield Loss("a", both(networks, part), {"rewards/mine/mean": said, "watched/other/mean": said, "gap": said})

    trainer = learner(terms, num_steps=2)
    trainer.method.batches_per_step = 1
    first, second = (record.metrics for record in trainer.run())
    assert first["rewards/mine/mean"] == first["watched/other/mean"] == 3.0
    assert math.isnan(first["gap"])  # nothing else may hide that it is no number
    assert math.isnan(second["rewards/mine/mean"])


def test_the_first_update_of_adam_by_hand():
    # Without weight decay Adam's first step is the learning rate against the sign of the gradient, clipped or not.
    trainer = learner(lambda n, batch: [Loss("a", both(n, batch))], num_steps=1, adam_weight_decay=0.0)
    trainer.method.batches_per_step = 1
    before = weights(trainer, "a")
    loss = both(trainer.method.networks, next(iter(trainer.method.collect(0))))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainer.parameters["a"].values())])
    (record,) = trainer.run()
    assert gap(weights(trainer, "a"), before - 0.01 * gradient.sign()) < 1e-6
    assert record.metrics["grad_norm/a"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert record.metrics["loss/a"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad):
    calls = []

    def terms(networks, batch):
        calls.append(None)
        yield Loss("a", both(networks, batch) * (bad if len(calls) == 2 else 1.0))

    trainer, seen = learner(terms), []
    for record in trainer.run():
        seen.append(record.metrics["skipped_updates/a"])
        assert weights(trainer, "a").isfinite().all()
    assert seen == [1, 0, 0]
    assert record.metrics["updates"] == 6


def test_a_skipped_update_leaves_the_weights_as_they_were():
    trainer = learner(lambda networks, batch: [Loss("a", both(networks, batch) * float("nan"))])
    before = weights(trainer, "a")
    list(trainer.run())
    assert torch.equal(weights(trainer, "a"), before)


# The learning rate


def test_the_learning_rate_by_hand():
    warm = OptimizerConfig(lr_warmup_steps=3)
    assert [lr_factor(warm, step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = OptimizerConfig(lr_scheduler="cosine")
    assert [lr_factor(cosine, step, 4) for step in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    assert lr_factor(cosine, 1, 4) == pytest.approx((1 + 0.5**0.5) / 2)
    late = OptimizerConfig(lr_scheduler="cosine", lr_warmup_steps=2)
    # a third and two thirds of the way up, then a half cosine over the six steps that are left
    assert [lr_factor(late, step, 8) for step in (0, 1, 2, 5, 8)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5, 0.0])
    assert [lr_factor(OptimizerConfig(), step, 10) for step in (0, 9)] == [1.0, 1.0]


def test_the_optimizers_use_that_learning_rate():
    trainer = learner(lambda n, batch: [Loss("a", both(n, batch))], num_steps=4, lr_warmup_steps=3)
    assert [record.metrics["lr/a"] for record in trainer.run()] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert trainer.optimizers["a"].param_groups[0]["lr"] == pytest.approx(0.01)


# The record and the state


def test_a_network_may_have_a_learning_rate_of_its_own():
    def apart(networks, batch):
        for name in ("a", "b"):
            yield Loss(name, networks[name](batch).square().mean())

    trainer = learner(apart, num_steps=1, learning_rates={"b": 0.03})
    (record,) = trainer.run()
    assert (record.metrics["lr/a"], record.metrics["lr/b"]) == (0.01, 0.03)
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers.values()] == [0.01, 0.03]


@pytest.mark.parametrize(("fails_at", "half_done"), [(0, False), (1, True)])
def test_it_knows_whether_a_step_that_fails_is_half_done(fails_at, half_done):
    trainer = learner(lambda networks, batch: [Loss("a", networks["a"](batch).square().mean())])
    steps = trainer.run()
    next(steps)
    assert not trainer.moved
    collect = trainer.method.collect

    def failing(step):
        for number, batch in enumerate(collect(step)):
            if number == fails_at:
                raise RuntimeError
            yield batch

    trainer.method.collect = failing
    with pytest.raises(RuntimeError):
        next(steps)
    assert trainer.moved is half_done


def test_a_record_averages_metrics_over_the_terms_and_counts_updates():
    def terms(networks, batch):
        for value in (1.0, 4.0):
            yield Loss("a", both(networks, batch) / 2, {"kl": torch.tensor(value)})

    records = list(learner(terms).run())
    assert [record.step for record in records] == [1, 2, 3]
    assert [record.metrics["updates"] for record in records] == [2, 4, 6]
    assert all(record.metrics["kl"] == 2.5 for record in records)
    assert all(isinstance(value, int | float) for value in records[0].metrics.values())
    assert {"slow", "seconds/collect", "seconds/forward", "seconds/backward", "seconds/step"} <= set(records[0].metrics)


@pytest.mark.parametrize("whole", [False, True])
def test_the_seconds_of_collecting_are_counted_whether_batches_come_one_by_one_or_as_a_list(whole):
    def slowly(step):
        for _ in range(2):
            time.sleep(0.05)
            yield torch.zeros(8, 3)

    trainer = learner(lambda networks, batch: [Loss("a", both(networks, batch)), Loss("b", both(networks, batch))])
    trainer.method.collect = (lambda step: list(slowly(step))) if whole else slowly
    for record in trainer.run():
        assert 0.1 < record.metrics["seconds/collect"] < record.metrics["seconds/step"]


def test_a_single_network_needs_no_suffix():
    trainer = learner(lambda n, batch: [Loss("only", n["only"](batch).square().mean())], networks={"only": line(0)})
    trainer.method.after_step = lambda step: {}
    (record, *_) = trainer.run()
    assert {"loss", "grad_norm", "lr", "skipped_updates"} <= set(record.metrics)


def alternating(networks, batch):
    yield Loss("a", both(networks, batch))
    yield Loss("b", networks["b"](batch).exp().mean())


def test_a_resumed_run_ends_in_the_same_bits():
    how = {"num_steps": 6, "lr_scheduler": "cosine", "lr_warmup_steps": 2}
    straight = learner(alternating, **how)
    expected = [record.metrics for record in straight.run()]
    interrupted = learner(alternating, **how)
    steps = interrupted.run()
    for _ in range(3):
        next(steps)
    state = copy.deepcopy(interrupted.state())
    resumed = learner(alternating, **how, networks={"a": line(8), "b": line(9)})
    resumed.load_state(state)
    metrics = [record.metrics for record in resumed.run()]
    for name in ("a", "b"):
        assert torch.equal(weights(resumed, name), weights(straight, name))
    assert torch.equal(resumed.method.average.weight, straight.method.average.weight)
    assert (resumed.step, resumed.updates) == (6, 12)
    same = [{k: v for k, v in each.items() if not k.startswith("seconds/")} for each in (*expected[3:], *metrics)]
    assert same[:3] == same[3:]


def test_only_parameters_that_want_a_gradient_are_trained_and_there_must_be_one():
    partly = line(0)
    partly.bias.requires_grad_(False)
    assert set(learner(both, networks={"a": partly}).parameters["a"]) == {"weight"}
    with pytest.raises(ValueError, match="nothing to train: no parameter of 'a' requires grad"):
        learner(both, networks={"a": line(0).requires_grad_(False)})


# Several processes


def test_two_processes_average_their_gradients_although_one_has_fewer_terms_or_none(tmp_path):
    torch.multiprocessing.spawn(train_together, args=(str(tmp_path),), nprocs=2)


def uneven(rank):
    """What a rank is worth: three terms on one and two on the other for `a`, and `b` on the second rank alone."""

    def terms(networks, batch):
        rows = batch.split([2, 1, 1, 2, 2])
        for part in rows[:3] if rank == 0 else rows[3:]:
            yield Loss("a", networks["a"](part).square().mean() * len(part) / 4)
        if rank == 1 and batch[0, 0] > -0.5:
            yield Loss("b", networks["b"](batch).square().mean())

    return terms


def as_one(networks, batch):
    yield Loss("a", networks["a"](batch).square().mean())
    if batch[0, 0] > -0.5:
        yield Loss("b", networks["b"](batch).square().mean() / 2)


def train_together(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    alone = learner(as_one, num_steps=6)
    expected = [record.metrics for record in alone.run()]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    together = learner(uneven(rank), num_steps=6)
    assert together.accelerator.num_processes == 2
    seen = [record.metrics for record in together.run()]
    for name in ("a", "b"):
        assert gap(weights(alone, name), weights(together, name)) < 1e-5
    for mine, theirs in zip(seen, expected, strict=True):
        for key in ("loss/a", "loss/b", "grad_norm/a", "grad_norm/b"):
            assert (key in mine) == (key in theirs)
            assert key not in mine or mine[key] == pytest.approx(theirs[key], rel=1e-3)
    torch.distributed.destroy_process_group()


def test_what_processes_log_is_joined():
    first = {"images": 8.0, "reward": 0.5, "failed/mine": 1.0, "seconds/step": 2.0, "odd": math.nan}
    other = {"images": 4.0, "reward": 0.7, "failed/mine": 2.0, "seconds/step": 5.0, "gate": 1.0}
    joined = _of_all([first, other])
    assert joined.pop("reward") == pytest.approx(0.6)
    assert math.isnan(joined.pop("odd"))
    assert joined == {"images": 12.0, "failed/mine": 3.0, "seconds/step": 5.0, "gate": 1.0}
    assert _of_all([{"odd": math.nan}, {"odd": 2.0}]) == {"odd": 2.0}


def test_gradients_go_over_the_wire_in_buckets_of_one_type(monkeypatch):
    monkeypatch.setattr("trimtab.learner.BUCKET", 10)
    sizes, types = (4, 7, 3, 9, 30), (torch.float32,) * 3 + (torch.bfloat16,) * 2
    parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in zip(sizes, types, strict=True)]
    assert [[p.numel() for p in bucket] for bucket in _buckets(parameters)] == [[4, 7], [3], [9, 30]]


def test_a_step_without_a_term_is_no_update_and_is_told_once(caplog):
    trainer = learner(lambda networks, batch: [])
    before = weights(trainer, "a")
    assert [record.metrics["updates"] for record in trainer.run()] == [0, 0, 0]
    assert not trainer.moved
    assert torch.equal(weights(trainer, "a"), before)
    assert len([text for text in caplog.messages if "nothing to learn from" in text]) == 1


def test_precision_and_accumulation_of_the_users_accelerate_config_change_nothing(monkeypatch):
    def terms(networks, batch):
        yield Loss("a", both(networks, batch))

    expected = learner(terms, num_steps=1)
    list(expected.run())
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    found = launched()
    settings = found.mixed_precision, found.scaler
    trainer = Learner(Toy(terms), found, OptimizerConfig(learning_rate=0.01), 1)
    list(trainer.run())
    AcceleratorState._reset_state(reset_partial_state=True)
    assert settings == ("no", None)
    assert torch.equal(weights(trainer, "a"), weights(expected, "a"))


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_a_launch_that_shares_the_model_out_is_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"asked for {name}, and here every process holds the whole model"):
        launched()
