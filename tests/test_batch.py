"""What flows: parts of a rollout keep whole groups, and columns stay in line."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.batch import Condition, Prompts, Rollout, whole_groups

PROMPTS = Prompts(tuple("abcdef"), tuple({"n": n} for n in range(6)), (10, 11, 12, 13, 14, 15))
groups_of_samples = st.lists(st.integers(0, 5), min_size=1, max_size=20)


def rollout(group):
    """Samples whose every column tells their place."""
    place = torch.arange(len(group), dtype=torch.float32)
    group = torch.tensor(group)
    sibling = torch.stack([(group[:i] == g).sum() for i, g in enumerate(group)])
    condition = Condition(torch.zeros(6, 1, 2), torch.zeros(6, 2))
    return Rollout(PROMPTS, condition, place[:, None], group, sibling, place, place, place, seed=7, step=3)


@given(groups_of_samples, st.integers(1, 8))
def test_packs_hold_whole_groups_within_the_size_and_each_sample_once(group, size):
    packs = list(whole_groups(torch.tensor(group, dtype=torch.int64), size))
    assert sorted(torch.cat(packs).tolist()) == list(range(len(group)))
    for pack in packs:
        members = {group[i] for i in pack.tolist()}
        assert len(pack) == sum(g in members for g in group)
        assert len(pack) <= size or len(members) == 1


def test_packs_are_filled():
    assert [len(pack) for pack in whole_groups(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3]), 4)] == [4, 2, 3]


@given(groups_of_samples, st.integers(1, 8))
def test_split_gives_that_many_parts_of_whole_groups_and_nearly_equal_numbers(group, num_parts):
    parts = rollout(group).split(num_parts)
    assert len(parts) == num_parts  # on every process, however few groups it has
    assert all(list(whole_groups(part.group, 4)) == [] for part in parts if not len(part))
    sets = [set(part.group.tolist()) for part in parts]
    assert sum(map(len, sets)) == len(set(group))  # so no group is in two parts
    assert max(map(len, sets)) - min(map(len, sets)) <= 1
    assert sorted(torch.cat([part.reward for part in parts]).tolist()) == list(range(len(group)))


def test_some_of_the_samples_keep_their_columns_in_line():
    part = rollout([0, 1, 0, 1])[torch.tensor([3, 0])]
    assert len(part) == 2
    assert part.group.tolist() == [1, 0]
    assert part.sibling.tolist() == [1, 0]
    assert (
        part.reward.tolist() == part.scaled.tolist() == part.advantage.tolist() == part.latents[:, 0].tolist() == [3, 0]
    )
    assert len(part.prompts) == len(part.condition) == 6


def test_keys_name_the_seed_the_step_the_prompt_of_the_file_and_the_sibling():
    assert rollout([2, 0, 2]).noise_keys() == [(7, 3, 12, 0), (7, 3, 10, 0), (7, 3, 12, 1)]


def test_some_of_the_prompts_keep_their_place_in_the_file():
    part = PROMPTS[[4, 1]]
    assert (part.text, part.metadata, part.index) == (("e", "b"), ({"n": 4}, {"n": 1}), (14, 11))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 256.0])])
@pytest.mark.parametrize("pooled", [None, torch.arange(6.0).view(3, 2)])
def test_a_condition_is_indexed_by_prompt_and_keeps_the_weight_of_its_tokens(weight, pooled):
    tokens = torch.arange(12.0).view(3, 2, 2)
    some = Condition(tokens, pooled, weight)[torch.tensor([2, 0, 2])]
    one = some[torch.tensor([0])].expand(4)
    for picked, place in ((some, [2, 0, 2]), (one, [2] * 4)):
        assert torch.equal(picked.tokens, tokens[place])
        assert picked.pooled is None if pooled is None else torch.equal(picked.pooled, pooled[place])
        assert picked.weight is weight
