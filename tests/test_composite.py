"""Weighted sums of rewards, and what becomes of scores that are missing."""

import logging
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UserError
from trimtab.rewards.composite import AT_ONCE, Composite, RewardFailed, with_gradient

NAN, INF = float("nan"), float("inf")
BAD = ValueError("bad image")


def fixed(*scores):
    """A reward that knows the score of each image: the first pixel holds the image's number."""
    return lambda images, prompts, metadata: torch.tensor(scores)[images[:, 0, 0, 0].long()]


BAD_REWARD = fixed(0.0)


def raising(*guilty, error=BAD, scores=(1.0, 2.0, 3.0, 4.0)):
    """Like `fixed`, but raises as soon as a guilty image is in the batch."""

    def reward(images, prompts, metadata):
        if set(images[:, 0, 0, 0].long().tolist()) & set(guilty):
            raise error
        return fixed(*scores)(images, prompts, metadata)

    return reward


def score(rewards, group=(0, 0, 1, 1)):
    number = torch.arange(len(group), dtype=torch.float32).view(-1, 1, 1, 1)
    images = number.expand(-1, 3, 2, 2)
    return Composite(rewards).score(images, ["p"] * len(group), [{}] * len(group), torch.tensor(group))


def listed(tensor):
    """As a list with None for NaN, so that it can be compared."""
    return [None if math.isnan(value) else value for value in tensor.tolist()]


def test_the_total_is_the_weighted_sum_and_raw_scores_stay_unweighted():
    scored = score({"a": (fixed(1.0, 2.0, 3.0, 4.0), 2.0), "b": (fixed(0.0, 1.0, 0.0, 1.0), -0.5)})
    assert scored.total.tolist() == [2.0, 3.5, 6.0, 7.5]
    assert scored.total.dtype == torch.float32
    assert scored.raw["a"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert scored.raw["b"].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert scored.failed == {"a": 0, "b": 0}


def test_a_reward_that_changes_its_lists_changes_them_for_nobody_else():
    def greedy(images, prompts, metadata):
        prompts.clear()
        for line in metadata:
            line.pop("tag")["name"] = "another"
        metadata.clear()
        return torch.zeros(len(images))

    def tags(images, prompts, metadata):
        return torch.tensor([float(line["tag"]["name"] == "own") + len(prompts) for line in metadata])

    prompts, metadata = ["p", "q"], [{"tag": {"name": "own"}} for _ in range(2)]
    composite = Composite({"greedy": (greedy, 1.0), "tags": (tags, 1.0)})
    for _ in range(2):
        assert composite.score(torch.zeros(2, 3, 2, 2), prompts, metadata, torch.tensor([0, 1])).total.tolist() == [
            3,
            3,
        ]
    assert (prompts, metadata) == (["p", "q"], [{"tag": {"name": "own"}}] * 2)


def test_rewards_are_known_by_their_weight_and_their_gradient():
    root = Root()
    composite = Composite(
        {"root": (root, -2.0), "seen": (Root(), 0.0), "hard": (BAD_REWARD, 1.0), "idle": (BAD_REWARD, 0)}
    )
    assert composite.weights == {"root": -2.0, "hard": 1.0}
    assert composite.smooth == {"root": root}
    assert composite.black_box == {"hard": BAD_REWARD}
    assert list(composite.watched) == ["seen", "idle"]


def test_what_is_logged_of_rewards_is_of_the_scores_that_there_are():
    composite = Composite({"a": (BAD_REWARD, 1.0), "b": (BAD_REWARD, 0.0)})
    log = composite.log({"a": torch.tensor([1.0, NAN, 4.0]), "b": torch.tensor([NAN, INF])}, {"a": 1, "b": 0})
    assert log.pop("watched/b/mean") != log.pop("watched/b/std")  # both NaN
    assert log == {"rewards/a/mean": 2.5, "rewards/a/std": 1.5, "failed/a": 1.0, "failed/b": 0.0}


def test_a_reward_that_is_nan_for_a_whole_group_is_left_out_of_its_sum():
    scored = score({"a": (fixed(1.0, 2.0, 3.0, 4.0), 1.0), "b": (fixed(NAN, NAN, 10.0, 20.0), 1.0)})
    assert scored.total.tolist() == [1.0, 2.0, 13.0, 24.0]
    assert scored.failed == {"a": 0, "b": 0}


def test_a_reward_that_is_nan_for_some_members_masks_those():
    scored = score({"a": (fixed(1.0, 2.0, 3.0, 4.0), 1.0), "b": (fixed(NAN, 5.0, 5.0, 5.0), 1.0)})
    assert listed(scored.total) == [None, 7.0, 8.0, 9.0]
    assert scored.failed == {"a": 0, "b": 1}


def test_a_group_that_no_reward_applies_to_has_no_total():
    assert listed(score({"a": (fixed(NAN, NAN, 0.0, 1.0), 1.0)}).total) == [None, None, 0.0, 1.0]


def test_groups_are_told_by_id_whatever_their_order_size_and_value():
    # Group 7 is images 0, 2, 3; group -1 is image 1, to which b does not apply.
    scored = score({"a": (fixed(1.0, 2.0, 3.0, 4.0), 1.0), "b": (fixed(1.0, NAN, NAN, 1.0), 1.0)}, group=(7, -1, 7, 7))
    assert listed(scored.total) == [2.0, 2.0, None, 5.0]
    assert scored.failed["b"] == 1


@pytest.mark.parametrize("value", [INF, -INF])
def test_infinite_scores_have_failed_also_where_a_whole_group_has_them(value):
    scored = score({"a": (fixed(1.0, 2.0, 3.0, 4.0), 1.0), "b": (fixed(value, value, 0.0, value), 1.0)})
    assert listed(scored.total) == [None, None, 3.0, None]
    assert listed(scored.raw["b"]) == [None, None, 0.0, None]
    assert scored.failed == {"a": 0, "b": 3}


def test_an_exception_costs_only_the_guilty_images():
    scored = score({"a": (raising(1), 1.0), "b": (fixed(0.0, 0.0, 0.0, 0.5), 1.0)})
    assert listed(scored.total) == [1.0, None, 3.0, 4.5]
    assert listed(scored.raw["a"]) == [1.0, None, 3.0, 4.0]
    assert scored.failed == {"a": 1, "b": 0}


def test_an_exception_for_a_whole_group_masks_it_and_is_not_taken_for_does_not_apply():
    scored = score({"a": (raising(0, 1), 1.0), "b": (fixed(1.0, 1.0, 1.0, 1.0), 1.0)})
    assert listed(scored.total) == [None, None, 4.0, 5.0]
    assert scored.failed == {"a": 2, "b": 0}


def test_one_warning_tells_the_first_error_its_place_and_the_number_of_images(caplog):
    with caplog.at_level(logging.WARNING):
        score({"a": (raising(0, 3), 1.0)})
    (record,) = caplog.records
    assert record.getMessage().startswith("reward 'a' failed for 2 of 4 images: ValueError: bad image (")
    assert "test_composite.py, line " in record.getMessage()


def test_a_healthy_batch_is_asked_once_and_a_failing_one_image_by_image():
    calls = []

    def counted(images, prompts, metadata):
        calls.append((len(images), len(prompts), len(metadata)))
        return raising(*guilty)(images, prompts, metadata)

    guilty = ()
    score({"a": (counted, 1.0)})
    guilty = (2,)
    score({"a": (counted, 1.0)})
    assert calls == [(4, 4, 4), (4, 4, 4), *[(1, 1, 1)] * 4]


def test_a_reward_that_fails_for_all_images_stops_the_run_and_is_named():
    with pytest.raises(RewardFailed, match="'a' failed for all 4 images: ValueError: bad image") as caught:
        score({"b": (fixed(0.0, 0.0, 0.0, 0.0), 1.0), "a": (raising(0, 1, 2, 3), 1.0)})
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_users_mistake_is_told_and_not_asked_again_image_by_image():
    with pytest.raises(UserError, match="needs word"):
        score({"a": (raising(1, error=UserError("needs word")), 1.0)})


@pytest.mark.parametrize(
    ("returned", "found"),
    [(torch.zeros(3), r"\(3,\)"), (torch.zeros(4, 1), r"\(4, 1\)"), (torch.tensor(0.0), r"\(\)"), ([0.0] * 4, "list")],
)
def test_scores_of_a_wrong_shape_are_an_error(returned, found):
    with pytest.raises(ValueError, match=rf"reward 'a' returned {found}; expected a tensor of shape \(4,\)"):
        score({"a": (lambda images, prompts, metadata: returned, 1.0)})


def test_a_reward_of_weight_zero_is_reported_and_changes_no_total():
    watched = fixed(NAN, 1.0, INF, 1.0)
    scored = score({"a": (fixed(1.0, 2.0, 3.0, 4.0), 1.0), "watched": (watched, 0.0)})
    assert scored.total.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert listed(scored.raw["watched"]) == [None, 1.0, None, 1.0]
    assert scored.failed["watched"] == 2


def test_weights_that_make_no_sum_are_refused():
    for rewards in ({}, {"a": (fixed(1.0), 0.0)}):
        with pytest.raises(UserError, match="no reward has a weight other than 0"):
            Composite(rewards)
    with pytest.raises(UserError, match="'a' has weight nan"):
        Composite({"a": (fixed(1.0), NAN)})


def test_arguments_that_do_not_fit_are_refused_with_their_shapes():
    images, composite = torch.zeros(2, 3, 4, 4), Composite({"a": (fixed(1.0, 1.0), 1.0)})
    for group, prompts in [(torch.zeros(3), ["p"] * 2), (torch.zeros(2, 1), ["p"] * 2), (torch.zeros(2), ["p"])]:
        with pytest.raises(ValueError, match=r"images \(2, 3, 4, 4\), \d prompts, 2 metadata, group"):
            composite.score(images, prompts, [{}] * 2, group)


@given(st.permutations(range(6)), st.lists(st.sampled_from([0.0, 1.0, NAN, INF]), min_size=6, max_size=6))
def test_the_order_of_the_images_changes_no_image_score(order, scores):
    group = [0, 0, 0, 1, 1, 2]

    def total(order):
        pixels = torch.tensor(order, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
        composite = Composite({"a": (fixed(*scores), 1.0), "b": (fixed(*range(6)), 0.5)})
        ids = torch.tensor([group[i] for i in order])
        return listed(composite.score(pixels, ["p"] * 6, [{}] * 6, ids).total)

    straight = total(list(range(6)))
    assert total(list(order)) == [straight[i] for i in order]


def counting(reward, seen):
    """The same, which notes how many images it is asked about."""

    def asked(images, prompts, metadata):
        seen.append(len(images))
        return reward(images, prompts, metadata)

    return asked


def test_a_reward_is_asked_about_some_images_at_a_time_and_one_by_one_only_where_it_fails():
    seen, number = [], 2 * AT_ONCE + 2
    scores = tuple(float(i) for i in range(number))
    reward = counting(raising(AT_ONCE + 3, scores=scores), seen)
    scored = score({"a": (reward, 1.0)}, group=(0,) * number)
    assert seen == [AT_ONCE, AT_ONCE, *[1] * AT_ONCE, 2]
    assert listed(scored.total) == [None if i == AT_ONCE + 3 else i for i in range(number)]


def test_what_a_failed_call_made_is_gone_when_images_are_asked_about_one_by_one():
    made, alive = [], []

    def hungry(images, prompts, metadata):
        alive.append(any(reference() is not None for reference in made))
        own = torch.zeros(3)
        made.append(weakref.ref(own))
        if len(images) > 1:
            raise ValueError("out of memory")
        return own[:1].clone()

    score({"a": (hungry, 1.0)})
    assert alive == [False] * 5


def test_a_reward_that_exits_fails_like_any_other_and_is_described_in_one_line():
    with pytest.raises(RewardFailed, match="SystemExit: 3"):
        score({"a": (raising(0, 1, 2, 3, error=SystemExit(3)), 1.0)})
    with pytest.raises(RewardFailed) as caught:
        score({"a": (raising(0, 1, 2, 3, error=ValueError("first\nsecond")), 1.0)})
    assert "ValueError: first second (" in str(caught.value)


class Root:
    """A reward with a gradient: the sum of square roots of the pixels, and an exception above `limit`."""

    def __init__(self, limit=INF):
        self.limit = limit

    def with_gradient(self, images, prompts, metadata):
        if images.max() > self.limit:
            raise BAD
        return images.sqrt().sum((1, 2, 3))


def smooth(reward, *levels, group=None):
    """The scores of images of one brightness each, how many have failed, and the gradient of the scores' sum."""
    images = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone().requires_grad_()
    group = torch.zeros(len(levels)).long() if group is None else torch.tensor(group)
    prompts, metadata = ["p"] * len(levels), [{}] * len(levels)
    scores, failed = with_gradient("root", reward, images, prompts, metadata, group)
    return scores, failed, torch.autograd.grad(scores.nansum(), images)[0][:, 0, 0, 0]


def test_an_image_whose_gradient_is_not_finite_costs_no_other_its_own():
    # Of sqrt: NaN at -1, whose score is missing, too, and infinite at 0, whose score is there.
    scores, failed, gradient = smooth(Root(), -1.0, 0.0, 4.0, 0.25)
    assert listed(scores) == [None, 0.0, 24.0, 6.0]
    assert failed == 1
    assert gradient.tolist() == [0.0, 0.0, 0.25, 1.0]


def test_one_pixel_whose_gradient_is_not_finite_takes_that_of_the_whole_image():
    images = torch.ones(2, 3, 2, 2)
    images[0, 0, 0, 0] = 0
    images.requires_grad_()
    scores, failed = with_gradient("root", Root(), images, ["p"] * 2, [{}] * 2, torch.zeros(2).long())
    gradient = torch.autograd.grad(scores.sum(), images)[0]
    assert failed == 0
    assert gradient[0].abs().max() == 0
    assert torch.equal(gradient[1], torch.full((3, 2, 2), 0.5))


@pytest.mark.parametrize(("group", "failed"), [((0, 0, 1), 2), ((0, 0, 0), 2), ((0, 1, 1), 1)])
def test_a_missing_score_counts_as_failed_where_siblings_have_one_or_where_it_was_raised_for(group, failed, caplog):
    scores, found, gradient = smooth(Root(limit=5), -1.0, 9.0, 4.0, group=group)
    assert listed(scores) == [None, None, 24.0]
    assert gradient.tolist() == [0.0, 0.0, 0.25]
    assert found == failed
    assert "reward 'root' failed for 1 of 3 images: ValueError: bad image" in caplog.text


def test_a_reward_that_raises_for_all_images_stops_the_run_but_not_for_one_alone():
    with pytest.raises(RewardFailed, match="reward 'root' failed for all 2 images"):
        smooth(Root(limit=5), 9.0, 9.0)
    scores, failed, gradient = smooth(Root(limit=5), 9.0)
    assert (listed(scores), failed, gradient.tolist()) == ([None], 1, [0.0])


def test_scores_carry_no_graph():
    images = torch.rand(2, 3, 2, 2, requires_grad=True)
    reward = lambda images, prompts, metadata: images.mean((1, 2, 3))  # noqa: E731
    scored = Composite({"a": (reward, 1.0)}).score(images, ["p"] * 2, [{}] * 2, torch.zeros(2).long())
    assert not scored.total.requires_grad
    assert not scored.raw["a"].requires_grad


def test_a_score_that_is_not_finite_is_not_logged():
    composite = Composite({"a": (BAD_REWARD, 1.0), "b": (BAD_REWARD, 0.0)})
    log = composite.log({"a": torch.tensor([1.0, INF, 4.0]), "b": torch.tensor([NAN, INF])}, {"a": 1, "b": 0})
    assert (log["rewards/a/mean"], log["rewards/a/std"]) == (2.5, 1.5)
    assert math.isnan(log["watched/b/mean"])
    assert math.isnan(log["watched/b/std"])


def test_who_watches_is_given_pictures_without_a_graph_and_nobody_else_is_asked():
    def never(*args):
        pytest.fail("a reward that is trained on was asked")

    composite = Composite({"a": (never, 1.0), "b": (lambda x, *_: torch.from_numpy(x.numpy().mean((1, 2, 3))), 0.0)})
    images = torch.ones(2, 3, 4, 4, requires_grad=True)
    log = composite.watch(images, ["p", "q"], [{}, {}], torch.tensor([0, 1]))
    assert log == {"failed/b": 0.0, "watched/b/mean": 1.0, "watched/b/std": 0.0}
