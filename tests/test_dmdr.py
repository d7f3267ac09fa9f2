"""DMDR's own parts: a teacher that walks back to the base, and times that start at high noise."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from trimtab.batch import Prompts
from trimtab.errors import UserError
from trimtab.learner import Learner
from trimtab.methods.dmdr import DMDR, DMDRConfig, dynamic_times, progress
from trimtab.optimizer import OptimizerConfig
from trimtab.pipelines.loading import load
from trimtab.rewards.composite import Composite
from trimtab.roles import LoraSettings
from trimtab.rollout import RolloutConfig
from trimtab.student import FAKE, STUDENT, Student

TEXTS = ("a photo of a red circle", "a photo of two stars")
PROMPTS = Prompts(TEXTS, tuple({} for _ in TEXTS), (0, 1))
LEVELS = (torch.arange(10_000) + 0.5) / 10_000


def gap(a, b):
    return (a - b).abs().max().item()


class Light:
    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))

    def with_gradient(self, images, prompts, metadata):
        return 3 * images.mean((1, 2, 3))


def built(folder, reward=None, weight=1.0, **config):
    face = load(str(folder), lora=LoraSettings(rank=4, lora_alpha=16), trained=(STUDENT, FAKE))
    rollout = RolloutConfig(num_prompts=2, group_size=4, num_inference_steps=2, sample_batch_size=8)
    student = Student(face, PROMPTS, rollout, face.resolution, 8, seed=3)
    rewards = None if reward is None else Composite({"light": (reward, weight)})
    settings = {"fake_updates": 1, "real_guidance_scale": 1.0} | config
    return face, student, DMDR(DMDRConfig(**settings), face, student, rewards)


def test_progress_falls_along_half_a_cosine_and_stays():
    assert [progress(i, 100) for i in (0, 50, 100, 500)] == pytest.approx([1, 0.5, 0, 0])
    assert progress(0, 0) == 0


def test_times_start_at_high_noise_and_become_uniform():
    config = DMDRConfig(min_time=0.0, max_time=1.0)
    early, late = dynamic_times(LEVELS, config, 1.0), dynamic_times(LEVELS, config, 0.0)
    assert early.mean().item() == pytest.approx(4 / 5.5, abs=1e-3)  # of Beta(4, 1.5)
    assert early.var().item() == pytest.approx(4 * 1.5 / (5.5**2 * 6.5), abs=1e-3)
    assert gap(late, LEVELS) < 1e-6


def test_the_teacher_of_the_moment_is_the_base_and_a_part_of_the_fakes_lora(tiny_folder):
    face, student, _ = built(tiny_folder)
    with torch.no_grad():
        for parameter in face.roles.parameters(FAKE).values():
            parameter += 0.1
    call = student.call(STUDENT, student.draw(0, 0, 2))
    x = student.x0(call).detach()
    config = DMDRConfig(real_guidance_scale=1.0)
    base, none, half, whole = (
        student.direction(x, call, config, real_share=share)[0] for share in (None, 0.0, 0.5, 1.0)
    )
    assert gap(base, none) < 1e-6
    assert gap(whole, torch.zeros_like(whole)) < 1e-6  # the teacher would be the fake
    assert 1e-4 < half.abs().mean() < base.abs().mean()


def test_the_rewards_gradient_is_added_as_a_loss_of_its_own(tiny_folder):
    # push / (B D) is minus the gradient of the loss with respect to x; the reward's part is weight * grad R / B.
    face, student, plain = built(tiny_folder, dynamic_steps=0)
    _, _, rewarded = built(tiny_folder, Light(), 0.5, dynamic_steps=0, reward_start=0)
    rewarded.pipeline, rewarded.student = face, student
    call = student.call(STUDENT, student.draw(0, 0, 2))
    x = student.x0(call).detach()
    gradient, log = student.reward_gradient("light", Light(), x, call)
    leaf = x.clone().requires_grad_()
    (3 * face.decode(leaf).mean((1, 2, 3))).sum().backward()
    assert gap(gradient, leaf.grad) < 1e-8
    assert log["failed/light"] == 0
    assert log["rewards/light/mean"].item() == pytest.approx(3 * face.decode(x).mean().item(), abs=1e-4)
    difference = (rewarded._update(x, call)[0] - plain._update(x, call)[0]) / x[0].numel()
    assert gap(difference, 0.5 * gradient) < 1e-6 + 1e-3 * gradient.abs().max().item()
    later = DMDR(DMDRConfig(real_guidance_scale=1.0, dynamic_steps=0, reward_start=1), face, student, rewarded.rewards)
    assert torch.equal(later._update(x, call)[0], plain._update(x, call)[0])


class Gappy(Light):
    """The same, without a number for the first of several."""

    def with_gradient(self, images, prompts, metadata):
        scores = super().with_gradient(images, prompts, metadata)
        return scores if len(scores) == 1 else torch.cat([scores[:1] * torch.nan, scores[1:]])


def test_a_missing_score_is_counted_once_however_many_passes_a_group_takes(tiny_folder):
    _, student, method = built(tiny_folder, Gappy(), dynamic_steps=0, reward_start=0)
    method.student = replace(student, batch_size=3)  # groups of four: three and one, in two passes
    (record,) = list(Learner(method, Accelerator(cpu=True), OptimizerConfig(learning_rate=1e-3), 1).run())
    assert record.metrics["failed/light"] == 2  # one of each group


def test_it_trains_and_goes_on_where_it_was(tiny_folder):
    _, _, method = built(tiny_folder, Light(), dynamic_steps=4, reward_start=1)
    records = list(Learner(method, Accelerator(cpu=True), OptimizerConfig(learning_rate=1e-3), 3).run())
    assert [round(r.metrics["teachers_lora"], 4) for r in records] == [0.6402, 0.375, 0.1098]
    assert "rewards/light/mean" in records[2].metrics
    assert method.state_dict() == {"update": 3}


def test_a_reward_without_a_gradient_is_refused():
    with pytest.raises(UserError, match="'dark' has none"):
        DMDR.check_rewards(DMDRConfig(reward_start=0), Composite({"dark": (lambda *_: None, 1.0)}), 4, 8, 9)
    with pytest.raises(UserError, match="the reward would never count"):
        DMDR.check_rewards(DMDRConfig(), Composite({"light": (Light(), 1.0)}), 4, 8, 9)
    DMDR.check_rewards(DMDRConfig(reward_start=0), Composite({"light": (Light(), 1.0)}), 1, 1, 9)


def test_dmdr_watches_nothing():
    rewards = Composite({"light": (Light(), 1.0), "seen": (Light(), 0.0)})
    with pytest.raises(UserError, match="'seen' has none, or no weight"):
        DMDR.check_rewards(DMDRConfig(reward_start=0), rewards, 4, 8, 9)
