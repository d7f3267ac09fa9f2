"""Rollouts: who is sampled from which noise, what becomes of missing scores, and advantages by hand."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from trimtab import noise
from trimtab.batch import Condition, Prompts
from trimtab.distributed import Processes
from trimtab.errors import StoppedTogether, UserError
from trimtab.prediction import Prediction
from trimtab.process import RectifiedFlow
from trimtab.rewards.composite import Composite, RewardFailed
from trimtab.rollout import RolloutConfig, Rollouts
from trimtab.solvers import time_grid

NAN = float("nan")
TEXTS = ("a red circle", "two stars", "a ring", "a blue heart", "a cross", "a pink square")
PROMPTS = Prompts(TEXTS, tuple({} for _ in TEXTS), tuple(range(6)))


class Toy:
    """A pipeline whose flow is the prompt's number everywhere: a clean sample is its noise minus that number."""

    process, device, resolution = RectifiedFlow(), torch.device("cpu"), 16

    def latent_shape(self, resolution):
        return 2, resolution // 4, resolution // 4

    def time_grid(self, num_steps, resolution):
        return time_grid(num_steps)

    def start(self, noise):
        return noise

    def encode(self, texts):
        number = torch.tensor([float(TEXTS.index(text)) for text in texts])
        return Condition(number[:, None, None], number[:, None])

    def predict(self, x_t, t, condition, role, guidance_scale=1.0):
        flow = condition.pooled[..., None, None].expand_as(x_t) * guidance_scale
        return Prediction(flow, "flow", x_t, t, self.process)

    def decode(self, latents):
        return latents[:, :1].repeat(1, 3, 1, 1).sigmoid()


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def scores(*values):
    """A reward that gives the pictures of a rollout these scores, in order."""
    return lambda images, prompts, metadata: torch.tensor(values)


def make(reward=brightness, pipeline=None, prompts=PROMPTS, seed=7, rank=0, num_processes=1, gather=None, **config):
    config = RolloutConfig(**{"num_prompts": 2, "group_size": 3, "num_inference_steps": 2} | config)
    pipeline, rewards = pipeline or Toy(), Composite({"mine": (reward, 1.0)})
    processes = Processes(rank, num_processes, gather)
    return Rollouts(pipeline, prompts, rewards, config, pipeline.resolution, seed, processes)


def collect(*args, step=0, **kwargs):
    return make(*args, **kwargs).collect(step, "default")[0]


def by_sample(rollout):
    """{(prompt, sibling): (latents, reward, advantage)}."""
    columns = zip(rollout.noise_keys(), rollout.latents, rollout.reward, rollout.advantage, strict=True)
    return {key[2:]: values for key, *values in columns}


def gap(a, b):
    """The largest difference of any column of two rollouts of the same samples."""
    a, b = by_sample(a), by_sample(b)
    assert a.keys() == b.keys()
    return max((x - y).abs().max().item() for key in a for x, y in zip(a[key], b[key], strict=True))


# Samples


def test_a_sample_is_the_noise_of_its_key_and_its_prompt_s_flow():
    rollout = collect(step=4, guidance_scale=2.0)
    assert rollout.latents.shape == (6, 2, 4, 4)
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert rollout.sibling.tolist() == [0, 1, 2, 0, 1, 2]
    start = noise.normal([(*key, noise.ROLLOUT) for key in rollout.noise_keys()], (2, 4, 4))
    number = torch.tensor(rollout.prompts.index).repeat_interleave(3).view(6, 1, 1, 1)
    assert (rollout.latents - (start - 2 * number)).abs().max() < 1e-5
    assert len({tuple(row) for row in start.flatten(1).tolist()}) == 6


def test_siblings_start_as_near_to_each_other_as_is_asked():
    """Their noise is standard normal and correlates by 1 - s^2, that of prompts and steps by nothing."""
    spread = 0.3
    rollouts = make(noise_spread=spread)
    blank = rollouts.blank(rollouts.prompts_of(0), 0)
    wide = replace(blank, latents=torch.empty(6, 2, 100, 100))
    x = rollouts.noises(wide).flatten(1)
    later = rollouts.noises(replace(wide, step=1)).flatten(1)
    expected = torch.block_diag(*[torch.full((3, 3), 1 - spread**2)] * 2).fill_diagonal_(1)
    assert (x @ x.T / 20_000 - expected).abs().max() < 0.04
    assert (x @ later.T / 20_000).abs().max() < 0.04
    some = torch.tensor([5, 4])
    assert torch.equal(rollouts.noises(wide[some]).flatten(1), x[some])  # in any parts
    drawn, start = collect(noise_spread=spread), rollouts.noises(blank)  # the toy adds its prompt to the noise
    apart = (drawn.latents[:2] - start[:2]) - (drawn.latents[1:3] - start[1:3])
    assert apart.abs().max() < 1e-5


def test_another_step_has_other_noise_and_the_same_step_the_same():
    # With as many prompts as there are, both steps hold the same samples.
    first, again, second = (by_sample(collect(step=step, num_prompts=6)) for step in (0, 0, 1))
    assert all(torch.equal(first[key][0], again[key][0]) for key in first)
    assert first.keys() == second.keys()
    assert all((first[key][0] != second[key][0]).all() for key in first)


def test_a_file_is_gone_through_once_before_a_prompt_comes_again_and_then_in_another_order():
    index = [collect(step=step).prompts.index for step in range(9)]  # three passes of three steps of two prompts
    passes = [sum(index[i : i + 3], ()) for i in (0, 3, 6)]
    assert [sorted(one) for one in passes] == [list(range(6))] * 3
    assert len(set(passes)) == 3
    assert index[0] != collect(step=0, seed=8).prompts.index or index[1] != collect(step=1, seed=8).prompts.index


def test_each_pass_over_a_file_leaves_out_what_does_not_fill_a_step():
    index = [collect(prompts=PROMPTS[range(5)], step=step).prompts.index for step in range(6)]  # three passes
    assert [len({*index[i], *index[i + 1]}) for i in (0, 2, 4)] == [4, 4, 4]


def test_a_file_shorter_than_a_step_is_taken_whole_each_time():
    for step in range(3):
        assert sorted(collect(step=step, num_prompts=48).prompts.index) == list(range(6))


def test_two_ranks_of_two_are_one_process(gathers):
    whole = collect(step=2, num_prompts=5)
    parts = on_two_ranks(gathers, num_prompts=5)
    assert {len(part.prompts) for part in parts} == {3, 2}
    both = {key: values for part in parts for key, values in by_sample(part).items()}
    assert both.keys() == by_sample(whole).keys()
    for key, values in by_sample(whole).items():
        assert all((x - y).abs().max() < 1e-5 for x, y in zip(values, both[key], strict=True)), key


def on_two_ranks(gathers, outcome=lambda rank: rank.result(timeout=120), **kwargs):
    """Step 2 on both of two ranks at once."""
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(collect, step=2, rank=rank, num_processes=2, gather=gather, **kwargs)
            for rank, gather in enumerate(gathers)
        ]
        return [outcome(rank) for rank in ranks]


def test_two_ranks_may_have_lost_different_numbers_of_pictures(gathers):
    whole = collect(first_missing(), step=2, num_prompts=4)
    parts = on_two_ranks(gathers, reward=first_missing(), num_prompts=4)
    assert sorted(map(len, parts)) == [5, 6]
    both = {key: values for part in parts for key, values in by_sample(part).items()}
    assert max((values[2] - both[key][2]).abs().item() for key, values in by_sample(whole).items()) < 1e-5


def test_where_one_rank_is_left_with_nothing_both_stop(gathers):
    first = collect(step=2, num_prompts=2).prompts.text[0]

    def never(images, prompts, metadata):
        return torch.tensor([NAN if prompt == first else 0.5 for prompt in prompts])

    said = on_two_ranks(gathers, outcome=lambda rank: str(rank.exception(timeout=120)), reward=never, num_prompts=2)
    assert said[0] == "only 0 of 3 pictures were scored, no two of them of one prompt"
    assert said[1] == "another process had to stop, and says why"


@pytest.mark.parametrize("error", [RuntimeError("no server"), UserError("the key is missing.")])
def test_a_reward_that_fails_on_one_rank_stops_both(error, gathers):
    first = collect(step=2, num_prompts=2).prompts.text[0]

    def broken(images, prompts, metadata):
        if prompts[0] == first:
            raise error
        return brightness(images, prompts, metadata)

    said = on_two_ranks(gathers, outcome=lambda rank: rank.exception(timeout=120), reward=broken, num_prompts=2)
    assert [type(each) for each in said] == [StoppedTogether, StoppedTogether]
    assert str(error) in str(said[0])
    assert str(said[1]) == "another process had to stop, and says why"


def first_missing():
    """Brightness, but not of the first picture of prompt 0."""

    def reward(images, prompts, metadata):
        values = brightness(images, prompts, metadata)
        if TEXTS[0] in prompts:
            values[prompts.index(TEXTS[0])] = NAN
        return values

    return reward


@pytest.mark.parametrize("sample_batch_size", [1, 4, 100])
def test_the_sample_batch_size_changes_nothing_but_rounding(tiny, sample_batch_size):
    face = tiny()
    how = {"pipeline": face, "guidance_scale": 2.0}
    assert gap(collect(**how, sample_batch_size=sample_batch_size), collect(**how, sample_batch_size=3)) < 1e-3


def test_no_gradient_is_kept(tiny):
    rollout = collect(pipeline=tiny())
    assert not any(x.requires_grad for x in (rollout.latents, rollout.reward, rollout.advantage))


# Scores


def test_a_picture_without_a_score_is_left_out_and_its_siblings_stay():
    rollout = collect(scores(0.0, NAN, 2.0, 1.0, 1.0, 4.0))
    assert rollout.group.tolist() == [0, 0, 1, 1, 1]
    assert rollout.sibling.tolist() == [0, 2, 0, 1, 2]
    assert rollout.reward.tolist() == [0, 2, 1, 1, 4]
    complete = by_sample(collect())
    assert all((latents == complete[key][0]).all() for key, (latents, *_) in by_sample(rollout).items())


def test_a_group_with_a_single_score_is_dropped():
    rollout = collect(scores(0.0, NAN, NAN, 1.0, 1.0, 4.0))
    assert rollout.group.tolist() == [1, 1, 1]
    assert len(rollout.prompts) == 2  # `group` still counts prompts
    assert rollout.noise_keys()[0][2] == rollout.prompts.index[1]


def test_nothing_to_compare_stops_the_run():
    with pytest.raises(RewardFailed, match="only 2 of 6 pictures were scored, no two of them of one prompt"):
        collect(scores(NAN, 1.0, NAN, NAN, NAN, 1.0))


def test_the_advantage_by_hand():
    # Group means 2 and 12; differences -2 0 2 and -1 -1 2, whose variance is (4+0+4+1+1+4)/6 = 7/3. All: mean 7,
    # variance (49+25+9+16+16+49)/6 = 82/3. Variance of the groups: 8/3 and 2. The deviations are raised by 1e-4.
    reward, difference = scores(0.0, 2.0, 4.0, 11.0, 11.0, 14.0), torch.tensor([-2.0, 0, 2, -1, -1, 2])
    expected = {
        "pooled": difference / ((7 / 3) ** 0.5 + 1e-4),
        "global": difference / ((82 / 3) ** 0.5 + 1e-4),
        "group": difference / (torch.tensor([8 / 3] * 3 + [2] * 3).sqrt() + 1e-4),
    }
    for std, advantage in expected.items():
        rollout = collect(reward, advantage_std=std)
        assert (rollout.advantage - advantage).abs().max() < 1e-5
        assert (rollout.scaled * difference - rollout.reward * advantage).abs().max() < 1e-4  # the same unit


def test_equal_rewards_have_no_advantage():
    for std in ("pooled", "global", "group"):
        assert (collect(scores(*[0.7] * 6), advantage_std=std).advantage == 0).all()


def test_the_log_by_hand():
    def watched(images, prompts, metadata):
        return torch.tensor([1.0, NAN, 3.0, NAN, NAN, NAN])

    rollouts = make()
    rewards = Composite({"mine": (scores(0.0, NAN, 2.0, 4.0, 4.0, 4.0), 1.0), "other": (watched, 0.0)})
    _, log = Rollouts(rollouts.pipeline, PROMPTS, rewards, rollouts.config, 16, 0).collect(0, "default")
    assert log["reward"] == pytest.approx(14 / 5)
    assert log["frac_reward_zero_std"] == 0.5
    assert log["rewards/mine/mean"] == pytest.approx(14 / 5)
    assert (log["watched/other/mean"], log["watched/other/std"]) == (2.0, 1.0)
    assert (log["failed/mine"], log["failed/other"], log["images"]) == (1, 1, 6)


def test_diversity_is_the_root_mean_square_distance_of_siblings():
    rollouts = make()
    rollout, log = rollouts.collect(0, "default")
    distances = []
    for members in rollout.latents.split(3):
        pairs = [(members[i] - members[j]).square().mean() for i, j in ((0, 1), (0, 2), (1, 2))]
        distances.append(torch.stack(pairs).mean().sqrt())
    assert log["diversity"] == pytest.approx(torch.stack(distances).mean().item(), rel=1e-5)


def test_processes_divide_by_the_mean_of_their_lengths_so_that_all_samples_weigh_the_same():
    here = make(num_prompts=2, group_size=3)
    rollout = here.blank(here.prompts_of(0), 0)
    assert here.mean_length(rollout) == 6
    there = make(num_prompts=2, group_size=3, num_processes=2, gather=lambda x: torch.cat([x, torch.tensor([2.0])]))
    assert there.mean_length(rollout) == 4  # 6 here and 2 there: a quarter of the sum, each, and the mean of both
