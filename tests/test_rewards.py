"""From the names in a recipe to rewards, and prompts that a reward cannot judge."""

import pytest
import torch

from trimtab import rewards
from trimtab.batch import Prompts
from trimtab.errors import UserError
from trimtab.rewards.composite import AT_ONCE
from trimtab.worlds import blocks


def prompts(*lines):
    """Prompts of metadata lines, each as from a file."""
    lines = [{"prompt": "a thing"} | line for line in lines]
    places = tuple(f"p.jsonl, line {i + 1}" for i in range(len(lines)))
    return Prompts(tuple(line["prompt"] for line in lines), tuple(lines), tuple(range(len(lines))), places)


GOOD = blocks.contents("colors")[0] | {"prompt": "a red circle"}


def ask(**clause):
    return {"tag": "colors", "include": [{"class": "circle", "count": 1} | clause]}


def test_an_unknown_reward_is_told_the_nearest():
    with pytest.raises(
        UserError, match=r"'genevl' is unknown; did you mean 'geneval'\? Built in are geneval, .*recognizer"
    ):
        rewards.build({"genevl": 1.0}, prompts(GOOD))
    with pytest.raises(UserError, match=r"'xyz' is unknown; built in are .*; your own is 'path/to/file\.py:function'"):
        rewards.build({"xyz": 1.0}, prompts(GOOD))


@pytest.mark.parametrize("name", rewards.BUILT_IN)
def test_a_prompt_without_facts_is_named_by_its_line(name):
    with pytest.raises(UserError, match=rf"'{name}' needs facts, and 'a cat' \(p\.jsonl, line 2\) has none"):
        rewards.build({name: 1.0}, prompts(GOOD, {"prompt": "a cat"}))


@pytest.mark.parametrize(("clause", "word"), [({"class": "dog"}, "dog"), ({"color": "brown"}, "brown")])
def test_a_shape_or_colour_of_another_world_is_named_by_its_line(clause, word):
    with pytest.raises(
        UserError, match=rf"reads blocks and knows no '{word}' \(p\.jsonl, line 1\); use circle, .*black"
    ):
        rewards.build({"geneval": 1.0}, prompts(ask(**clause)))


def test_a_null_colour_is_no_colour():
    built = rewards.build({"geneval": 1.0, "recognizer": 0.0}, prompts(ask(color=None)))
    assert set(built.rewards) == {"geneval", "recognizer"}


def test_rules_that_judge_the_same_pictures_share_one_reading(monkeypatch):
    read, readings = rewards.read_blocks, []
    monkeypatch.setattr(rewards, "read_blocks", lambda images: readings.append(len(images)) or read(images))
    built = rewards.build(dict.fromkeys(rewards.GENEVAL, 1.0), prompts(GOOD))
    picture = torch.ones(2, 3, 64, 64)
    scored = built.score(picture, ["a red circle"] * 2, [GOOD] * 2, torch.tensor([0, 0]))
    assert readings == [2]
    # Softly a third: nothing else is there, as asked, and count and colour are wrong.
    expected = {"geneval": 1 / 3, "geneval-strict": 0.0, "geneval-official": 0.0, "geneval-flow-grpo": 0.0}
    assert {name: raw.unique().item() for name, raw in scored.raw.items()} == pytest.approx(expected)
    built.score(picture.clone(), ["a red circle"] * 2, [GOOD] * 2, torch.tensor([0, 0]))
    assert readings == [2, 2]
    many = AT_ONCE + 1
    built.score(torch.ones(many, 3, 64, 64), ["a red circle"] * many, [GOOD] * many, torch.zeros(many).long())
    assert readings == [2, 2, AT_ONCE, 1]
