"""Candidates: who is among the best and the worst, rounds until there are enough of both, and pairs of pictures."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trimtab.batch import Prompts
from trimtab.candidates import (
    Offline,
    Ranked,
    Space,
    _numbered,
    best_and_worst,
    in_units_of_siblings,
    ranked,
    successes_and_failures,
)
from trimtab.errors import UserError
from trimtab.rewards.composite import Composite, RewardFailed, Scored
from trimtab.rollout import RolloutConfig, Rollouts
from trimtab.worlds.pairs import load_pairs

TEXTS = ("a red circle", "two stars", "a blue square")
PROMPTS = Prompts(TEXTS, tuple({} for _ in TEXTS), (0, 1, 2))


def rollouts(face, reward=None, prompts=PROMPTS, **config):
    config = RolloutConfig(
        **{"num_prompts": 3, "group_size": 4, "num_inference_steps": 1, "sample_batch_size": 5} | config
    )
    rewards = None if reward is None else Composite({"mine": (reward, 1.0)})
    return Rollouts(face, prompts, rewards, config, face.resolution, seed=3)


def marks(reward, num_best, num_worst):
    reward = torch.tensor(reward)
    best, worst = best_and_worst(reward, torch.zeros(len(reward), dtype=torch.int64), num_best, num_worst)
    return best.nonzero().flatten().tolist(), worst.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("reward", "num_best", "num_worst", "expected"),
    [
        ([0.1, 0.9, -0.3, 0.4, 0.0, 0.6], 2, 2, ([1, 5], [2, 4])),
        ([0.0, 0.0, 0.0, 0.0], 2, 2, ([], [])),  # nothing to learn
        ([0.0, 1.0, 0.0, 0.0], 2, 2, ([1], [2, 3])),  # a 0 is not among the best beside 0s among the worst
        ([1.0, 0.0, 1.0, 1.0], 2, 2, ([0, 2], [1])),  # and a 1 not among the worst
        ([3.0, 2.0, 2.0, 1.0], 2, 2, ([0], [3])),  # 2 stands on both sides, and leaves both
        ([3.0, 2.0, 2.0, 2.0, 1.0], 1, 1, ([0], [4])),
        ([1.0, 2.0, 3.0], 2, 2, ([], [])),  # too few
    ],
)
def test_the_best_and_the_worst_never_share_a_score(reward, num_best, num_worst, expected):
    assert marks(reward, num_best, num_worst) == expected


@given(reward=st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), min_size=6, max_size=12), number=st.integers(1, 3))
def test_the_best_are_better_than_the_worst_and_as_many_as_asked_unless_scores_are_shared(reward, number):
    best, worst = marks(reward, number, number)
    assert not set(best) & set(worst)
    assert bool(best) == bool(worst) == (len(set(reward)) > 1 and bool(best))
    if best:
        assert min(reward[i] for i in best) > max(reward[i] for i in worst)
        assert all(reward[i] <= min(reward[j] for j in best) for i in set(range(len(reward))) - set(best))
    ordered = sorted(reward)
    if ordered[number - 1] != ordered[-number]:
        assert len(best) == len(worst) == number


def test_ranking_knows_nothing_of_the_size_of_a_reward():
    reward = torch.randn(24, generator=torch.Generator().manual_seed(0))
    group = torch.arange(3).repeat_interleave(8)
    plain, bent = best_and_worst(reward, group, 3, 2), best_and_worst(reward.exp() * 7 - 100, group, 3, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, bent, strict=True))
    assert torch.bincount(group[plain[0]]).tolist() == [3, 3, 3]
    assert torch.bincount(group[plain[1]]).tolist() == [2, 2, 2]


def test_a_group_without_a_winner_is_left_out_and_counted(tiny):
    values = {0: [1.0, 2.0, 3.0, 4.0], 1: [5.0] * 4, 2: [0.0, 1.0, 0.0, 0.0]}
    made = rollouts(tiny(), lambda images, prompts, metadata: torch.tensor([v for p in ORDER for v in values[p]]))
    ORDER = made.prompts_of(0).index
    rollout, _ = made.collect(0, "default")
    batch = ranked(rollout, 1, 1)
    assert {rollout.prompts.index[g] for g in batch.rollout.group.tolist()} == {0, 2}
    assert batch.num_prompts == 3
    assert batch.frac_skipped() == pytest.approx(1 / 3)
    share = batch.share()
    assert share.sum().item() == pytest.approx(2 / 3)  # the third that teaches nothing weighs nothing
    for side in (batch.better, batch.worse):
        assert torch.equal(side.latents, batch.rollout.latents[side.place])
        assert torch.equal(side.group, batch.rollout.group[side.place])


def test_a_part_of_the_candidates_keeps_its_own_anchors(tiny):
    rollout, _ = rollouts(tiny(), lambda i, p, m: torch.arange(float(len(i)))).collect(0, "default")
    batch = ranked(rollout, 1, 2)
    part = batch[(batch.rollout.group == 2).nonzero().flatten()]
    assert isinstance(part, Ranked)
    assert (part.better.place.tolist(), part.worse.place.tolist()) == ([3], [0, 1])
    assert torch.equal(part.worse.latents, part.rollout.latents[:2])
    rows, group = torch.arange(4), int(part.rollout.group[0])
    better, worse = part.met_themselves(rows, group)
    assert better.nonzero().tolist() == [[3, 0]]
    assert worse.nonzero().tolist() == [[0, 0], [1, 1]]


def test_what_is_sampled_again_is_what_was_sampled(tiny):
    made = rollouts(tiny())
    drawn, images = made.draw(made.prompts_of(0), 0, "default")
    assert images.shape == (12, 3, 64, 64)
    again = made.again(drawn[torch.tensor([7, 2])], "default")
    assert (again - drawn.latents[[7, 2]]).abs().max() < 1e-5
    assert again.requires_grad
    more, _ = made.draw(made.prompts_of(0), 0, "default", first=4, decoded=False)
    assert more.sibling[:4].tolist() == [4, 5, 6, 7]
    assert (more.latents - drawn.latents).abs().min(0).values.max() > 1e-3  # other noise


# Yes or no


def rounds(face, answers, num_each=2, num_rounds=3):
    """Candidates of one prompt whose rewards are `answers`, four a round."""
    asked = iter(answers)
    made = rollouts(face, lambda images, p, m: torch.tensor([next(asked) for _ in images]), PROMPTS[[0]], num_prompts=1)
    return successes_and_failures(made, 0, "default", 0.5, num_each, num_rounds)


def test_rounds_go_on_until_there_are_enough_of_both(tiny):
    batch, log = rounds(tiny(), [0, 0, 1, 0, 0, 0, 0, 1, 9, 9, 9, 9])
    assert log["images"] == 8  # the third round was not needed
    assert log["success_rate"] == pytest.approx(2 / 8)
    assert batch.rollout.sibling[batch.better.place].tolist() == [2, 7]
    assert batch.rollout.sibling[batch.worse.place].tolist() == [0, 1]
    assert batch.learns.tolist() == [s in (2, 7) for s in batch.rollout.sibling.tolist()]
    assert batch.share().sum().item() == pytest.approx(1)


def test_a_prompt_that_never_has_enough_teaches_nothing(tiny):
    batch, log = rounds(tiny(), [0] * 11 + [1])
    assert log["images"] == 12
    assert len(batch) == 0
    assert batch.frac_skipped() == 1


def test_a_reward_at_the_threshold_is_a_failure(tiny):
    batch, log = rounds(tiny(), [0.5, 0.5, 1, 1])
    assert log["success_rate"] == 0.5
    assert batch.rollout.sibling[batch.worse.place].tolist() == [0, 1]


def test_what_could_not_be_scored_is_neither(tiny):
    nan = float("nan")
    batch, _ = rounds(tiny(), [nan, 1, 0, nan, 1, 0, nan, nan])
    assert batch.rollout.sibling.tolist() == [1, 2, 4, 5]
    with pytest.raises(RewardFailed):
        rounds(tiny(), [nan] * 12)


# Pictures


@pytest.fixture
def folder(tmp_path):
    for name, color in (("good", "red"), ("bad", "blue"), ("worse", "black")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{name}.png")
    lines = [
        {"prompt": "a red circle", "chosen": "good.png", "rejected": ["bad.png", "worse.png"]},
        {"prompt": "two stars", "chosen": "bad.png", "rejected": "worse.png"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def offline(face, folder, on_error="stop"):
    pairs = load_pairs(str(folder / "pairs.jsonl"), on_error)
    return Offline(rollouts(face, prompts=pairs.prompts, num_prompts=2), pairs)


def test_pictures_of_a_prompt_are_its_anchors(tiny, folder):
    face = tiny()
    batch, log = offline(face, folder).collect(0, "default")
    red = face.encode_images(torch.tensor([1.0, 0, 0])[:, None, None].expand(1, 3, 64, 64))
    first = batch.rollout.prompts.text.index("a red circle")
    assert (batch.better.latents[batch.better.of(first)] - red).abs().max() < 1e-4
    assert len(batch.worse.of(first)) == 2
    assert len(batch.worse) == 3
    assert (len(batch), batch.frac_skipped(), batch.better.place) == (8, 0, None)
    assert log["images"] == 8
    assert batch.met_themselves(torch.arange(4), first) == (None, None)


def test_a_picture_that_proves_broken_is_named_or_left_out(tiny, folder):
    whole = (folder / "bad.png").read_bytes()
    (folder / "bad.png").write_bytes(whole[: len(whole) - 30])
    with pytest.raises(UserError, match=r"bad\.png cannot be read .*data\.on_error=skip"):
        offline(tiny(), folder).collect(0, "default")
    batch, log = offline(tiny(), folder, "skip").collect(0, "default")
    assert [batch.rollout.prompts.text[g] for g in batch.rollout.group.unique()] == ["a red circle"]
    assert (len(batch.worse), log["pictures_left_out"], batch.frac_skipped()) == (1, 1, 0.5)


def test_several_rewards_are_weighed_in_units_of_the_siblings():
    group = torch.arange(2).repeat_interleave(4)
    small, large = torch.tensor([0.1, 0.2, 0.3, 0.4] * 2), torch.tensor([400.0, 300, 200, 100, 1, 1, 1, 1])
    scored = Scored(small + large, {"small": small, "large": large}, {})
    rewards = Composite({"small": (None, 3.0), "large": (None, 1.0), "watched": (None, 0.0)})
    worth = in_units_of_siblings(scored, rewards, group)
    z = torch.tensor([-1.5, -0.5, 0.5, 1.5]) / torch.tensor([1.25]).sqrt()
    assert (worth[:4] - (3 * z - z) / 4).abs().max() < 1e-4  # the larger number would win a plain sum
    assert (worth[4:] - 3 * z / 4).abs().max() < 1e-4  # equal scores say nothing
    against = Composite({"small": (None, 3.0), "large": (None, -1.0)})
    worth = in_units_of_siblings(scored, against, group)
    assert (worth[:4] - (3 * z + z) / 4).abs().max() < 1e-4  # what counts against is still one part in four
    alone = Composite({"small": (None, 3.0), "watched": (None, 0.0)})
    assert torch.equal(in_units_of_siblings(scored, alone, group), scored.total)


def test_what_does_not_apply_to_a_prompt_is_left_out_and_a_missing_score_is_missing():
    nan = float("nan")
    group = torch.arange(2).repeat_interleave(3)
    a, b = torch.tensor([1.0, 2, 3, 4, 5, nan]), torch.tensor([nan, nan, nan, 1, 2, 3])
    rewards = Composite({"a": (None, 1.0), "b": (None, 1.0)})
    total = torch.tensor([1.0, 2, 3, 5, 7, nan])
    worth = in_units_of_siblings(Scored(total, {"a": a, "b": b}, {}), rewards, group)
    assert worth[:3].diff().min() > 0
    assert worth[4] > worth[3]
    assert worth[5].isnan()


def test_a_prompt_that_cannot_be_scored_is_not_drawn_again(tiny):
    """Of two prompts, one whose pictures are never scored and one that needs two rounds."""
    asked = []

    def reward(images, prompts, metadata):
        asked.append(len(images))
        if len(asked) == 1:
            return torch.tensor([float("nan") if p == bad else 0.0 for p in prompts])
        return torch.tensor([1.0, 1.0, 0.0, 0.0])[: len(images)]

    made = rollouts(tiny(), reward, num_prompts=2)
    bad = made.prompts_of(0).text[0]
    batch, log = successes_and_failures(made, 0, "default", 0.5, 2, 3)
    assert asked == [8, 4]
    assert len(batch.rollout.group.unique()) == 1
    assert batch.frac_skipped() == 0.5
    assert log["images"] == 12  # scored or not
    assert log["failed/mine"] == 0


def test_pictures_whose_reward_fails_are_counted_in_every_round(tiny):
    def reward(images, prompts, metadata):
        if bad in prompts:
            raise ValueError("not this one")
        return torch.ones(len(images))  # and so there is a second round

    made = rollouts(tiny(), lambda *args: reward(*args), num_prompts=2)
    bad = made.prompts_of(0).text[0]
    _, log = successes_and_failures(made, 0, "default", 0.5, 2, 2)
    assert (log["images"], log["failed/mine"]) == (12, 4)


def test_what_rewards_say_in_every_round_is_logged_of_trained_and_watched_ones(tiny):
    """Eight pictures of two prompts, all too dark but for the last; then four of each that still waits."""
    numbers = iter(range(100))
    made = rollouts(tiny(), num_prompts=2)

    def counted(images, prompts, metadata):
        return torch.tensor([float(next(numbers)) for _ in images])

    rewards = Composite({"mine": (lambda images, *_: torch.zeros(len(images)), 1.0), "seen": (counted, 0.0)})
    _, log = successes_and_failures(replace(made, rewards=rewards), 0, "default", 0.5, 2, 2)
    assert log["images"] == 16
    assert log["watched/seen/mean"] == 7.5  # of 0 to 15
    assert log["watched/seen/std"] == pytest.approx((255 / 12) ** 0.5)
    assert (log["rewards/mine/mean"], log["failed/seen"]) == (0.0, 0.0)


def test_noise_of_pictures_belongs_to_them_whatever_is_beside_them(tiny, folder):
    made = offline(tiny(), folder)
    batch, _ = made.collect(0, "default")
    space = Space(made.rollouts, lambda latents, condition, eps: {"eps": eps.flatten(1)[:, None]}, 1)
    whole = space.of_anchors(batch.worse, batch.rollout, {})["eps"]
    for group in batch.rollout.group.unique():
        alone = batch[(batch.rollout.group == group).nonzero().flatten()]
        assert torch.equal(space.of_anchors(alone.worse, alone.rollout, {})["eps"], whole[batch.worse.group == group])
    own = space.in_parts(batch.rollout, batch.rollout.latents)["eps"]
    assert len({x.sum().item() for x in (*whole, *own)}) == 3 + 8  # candidates of the same numbers have other noise


def test_a_later_round_that_is_not_scored_costs_no_more_than_itself(tiny, caplog):
    answers = iter([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # the first prompt has both, the second waits for a 1

    def reward(images, prompts, metadata):
        return torch.tensor([next(answers) for _ in images])

    batch, log = successes_and_failures(rollouts(tiny(), reward, num_prompts=2), 0, "default", 0.5, 1, 2)
    assert len(batch.rollout.group.unique()) == 1
    assert (log["images"], log["failed/mine"]) == (12, 0)
    assert "round 2: reward 'mine' failed for all 4 images" in caplog.text


def test_pictures_are_numbered_within_their_group():
    assert _numbered([4, 1, 4, 4, 1]) == [0, 0, 1, 2, 1]


def test_a_sample_without_a_total_counts_in_no_mean_of_its_siblings():
    nan = float("nan")
    a, b = torch.tensor([1.0, 2, 3, 100]), torch.tensor([1.0, 2, 3, nan])  # the last has a, and no b
    rewards, group = Composite({"a": (None, 1.0), "b": (None, 1.0)}), torch.zeros(4, dtype=torch.int64)
    worth = in_units_of_siblings(Scored(torch.tensor([2.0, 4, 6, nan]), {"a": a, "b": b}, {}), rewards, group)
    assert worth[:3].tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert worth[3].isnan()


def test_the_log_is_of_all_candidates_whether_they_teach_or_not(tiny):
    answers = iter([0.0, 0.0, 1.0, 3.0])
    made = rollouts(tiny(), lambda images, *_: torch.tensor([next(answers) for _ in images]), num_prompts=1)
    _, log = successes_and_failures(made, 0, "default", 2.0, 1, 1)
    assert (log["success_rate"], log["reward"]) == (0.25, 1.0)
    answers = iter([0.0, 3.0, 3.0, 3.0])
    _, log = successes_and_failures(made, 0, "default", 2.0, 1, 1)
    assert (log["success_rate"], log["reward"]) == (0.75, 2.25)  # one of each teaches


def test_how_small_a_rewards_unit_is_does_not_matter():
    group, z = torch.zeros(4, dtype=torch.int64), torch.tensor([1.0, 2, 4, 3])
    rewards = Composite({"a": (None, 1.0), "b": (None, 1.0)})
    worth = [
        in_units_of_siblings(Scored(z, {"a": scale * z, "b": z.flip(0)}, {}), rewards, group) for scale in (1.0, 1e-4)
    ]
    assert (worth[0] - worth[1]).abs().max() < 1e-4
