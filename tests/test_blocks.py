"""The world of blocks: pictures show what their facts say, words say it too, and the splits do not touch."""

import zlib

import numpy as np
import pytest
import torch

from trimtab.rewards.detectors import read_blocks
from trimtab.rewards.geneval import judge
from trimtab.worlds import blocks
from trimtab.worlds.blocks import COLORS, SHAPES, TAGS, Block, Scene
from trimtab.worlds.facts import validate_metadata

MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def meaning(content):
    """The facts as a set of statements, written out on its own, that a content and its mirror image share."""
    statements = [(c["count"], c.get("color"), c["class"]) for c in content["include"]]
    if content["tag"] == "position":
        target, placed = content["include"]
        relation = placed["position"][0]
        statements += [(placed["class"], relation, target["class"])]
        statements += [(target["class"], MIRROR[relation], placed["class"])]
    return frozenset((statement, statements.count(statement)) for statement in statements)


TEST_PROMPTS = 1410996580  # CRC-32 of the prompts of `trimtab evaluate --suite blocks`


def lines(split):
    """All the lines of a split, for there are at most 12544 of a tag."""
    return blocks.prompts(split, 13000)


@pytest.mark.parametrize("tag", TAGS)
def test_drawn_scenes_are_judged_right_by_the_official_and_the_strict_rules(tag):
    rng = np.random.default_rng(5)
    contents = [blocks.contents(tag)[i] for i in rng.integers(len(blocks.contents(tag)), size=60)]
    pictures = blocks.draw([blocks.scene(content, rng) for content in contents])
    assert pictures.shape == (60, 3, 64, 64)
    assert pictures.dtype == torch.float32
    assert 0 <= pictures.min() <= pictures.max() <= 1
    for content, found in zip(contents, read_blocks(pictures), strict=True):
        for mode in ("official", "strict", "soft"):
            verdict = judge(found, content, mode)
            assert verdict.correct, (content, verdict.reason)
            assert verdict.score == 1


def test_a_scene_of_something_else_is_judged_wrong():
    rng = np.random.default_rng(6)
    for tag in TAGS:
        contents = blocks.contents(tag)
        for i in rng.integers(len(contents), size=10):
            other = contents[(i + 1) % len(contents)]
            (found,) = read_blocks(blocks.draw([blocks.scene(contents[i], rng)]))
            assert not judge(found, other, "strict").correct, (contents[i], other)


def test_the_same_seed_draws_the_same_scene():
    content = blocks.contents("color_attr")[7]
    a, b, c = (blocks.scene(content, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert a == b != c


def test_a_picture_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    scenes = [blocks.scene(blocks.contents(tag)[0], rng) for tag in TAGS]
    together = blocks.draw(scenes)
    assert max((blocks.draw([s])[0] - picture).abs().max() for s, picture in zip(scenes, together, strict=True)) < 1e-6


def test_a_square_covers_the_pixels_worked_out_by_hand():
    # Corners at 1.08 radii on the diagonals, so the half side is 1.08 * 10 / sqrt 2 = 7.64 px around 32: from 24.36 to
    # 39.64. Pixels 25 ... 38 are covered in full, 24 and 39 by 64 %. Black is 44 / 255, at the rim 0.78 of that.
    white = (1.0, 1.0, 1.0)
    picture = blocks.draw([Scene((Block("square", "black", 32, 32, 10.0),), white, white)])[0]
    dark = 1 - picture[0, 32]  # a row through the middle
    assert dark.nonzero().flatten().tolist() == list(range(24, 40))
    assert (dark[28:36] - (1 - 44 / 255)).abs().max() < 0.01
    assert (dark[[24, 39]] - 0.64 * (1 - 0.78 * 44 / 255)).abs().max() < 0.06


# Prompts


@pytest.mark.parametrize("tag", TAGS)
def test_facts_inverts_phrase_for_every_content_and_opening(tag):
    for number, content in enumerate(blocks.contents(tag)):
        opening = blocks.OPENINGS[number % 4]
        assert blocks.facts(f"{opening} {blocks.phrase(content)}") == content
        validate_metadata(content, "here")


def test_a_sentence_may_begin_anyhow_and_end_with_a_full_stop():
    assert blocks.facts("Please, A Photo of two Crosses.")["include"] == [{"class": "cross", "count": 2}]
    assert blocks.facts("an orange heart above of a cat") is None
    assert blocks.facts("a photo of five stars") is None
    assert blocks.facts("") is None


@pytest.mark.parametrize(
    "text",
    [
        "a red circle and a blue star and a green heart",
        "four stars and two hearts",
        "a heart left of a star and a red ring",
        "a dog left of a circle",
        "not a red circle",
        "a picture without a red circle",
        "two circles, a star",
    ],
)
def test_a_sentence_that_asks_for_more_than_its_last_words_has_no_facts(text):
    assert blocks.facts(text) is None


def clause(shape, count=1, **more):
    return {"class": shape, "count": count, **more}


LEFT = {"position": ["left of", 0]}


@pytest.mark.parametrize(
    "include",
    [
        [clause("circle", 4)],
        [clause("circle", color=None, position=None)],
        [clause("circle"), clause("star", **LEFT), clause("ring", 2)],
    ],
)
def test_what_can_be_drawn_is_true_of_its_scenes(include):
    content, rng = {"tag": "position", "include": include}, np.random.default_rng(7)
    assert blocks.can_draw(content)
    for found in read_blocks(blocks.draw([blocks.scene(content, rng) for _ in range(20)])):
        assert judge(found, content, "strict").correct


@pytest.mark.parametrize(
    "include",
    [
        [clause("circle", 5)],
        [clause("circle", 2), clause("star", **LEFT)],
        [clause("circle"), clause("star"), clause("ring", position=["left of", 1])],
        [clause("circle"), clause("star", position=["left of", 1])],
    ],
)
def test_what_scenes_cannot_show_is_said_to_be_so(include):
    assert not blocks.can_draw({"include": include})


def test_phrases_are_those_of_geneval():
    position = {"class": "ring", "count": 1, "position": ["left of", 0]}
    assert blocks.phrase({"tag": "position", "include": [{"class": "star", "count": 1}, position]}) == (
        "a ring left of a star"
    )
    assert blocks.facts("an orange star and a red ring")["include"] == [
        {"class": "star", "count": 1, "color": "orange"},
        {"class": "ring", "count": 1, "color": "red"},
    ]


@pytest.mark.parametrize("tag", TAGS)
def test_train_and_test_share_no_content_and_no_mirror_image_of_one(tag):
    train, test = ([line for line in lines(split) if line["tag"] == tag] for split in ("train", "test"))
    seen, unseen = {meaning(line) for line in train}, {meaning(line) for line in test}
    assert not seen & unseen
    assert seen | unseen == {meaning(content) for content in blocks.contents(tag)}  # and nothing is lost
    assert 0.2 < len(unseen) / len(seen | unseen) <= 0.5


def test_prompts_are_the_same_at_every_call_and_in_every_version():
    # The built-in model was trained on the other split: where this number changes, it has seen test prompts.
    texts = [line["prompt"] for line in blocks.prompts("test", 24)]
    assert texts == [line["prompt"] for line in blocks.prompts("test", 24)]
    assert zlib.crc32("\n".join(texts).encode()) == TEST_PROMPTS


def test_the_test_split_repeats_nothing_and_the_train_split_weighs_tags_alike():
    test = [line["prompt"] for line in lines("test")]
    assert len(set(test)) == len(test)
    train = [line["tag"] for line in blocks.prompts("train", 240)]
    assert {tag: train.count(tag) for tag in TAGS} == dict.fromkeys(TAGS, 240)
    single = {line["prompt"] for line in blocks.prompts("train", 240) if line["tag"] == "single_object"}
    assert len(single) == 16  # 4 of the 8 shapes, 4 openings


def test_an_unknown_tag_or_split_is_refused():
    with pytest.raises(ValueError, match="'test2' is not 'train' or 'test'"):
        blocks.prompts("test2", 1)
    with pytest.raises(ValueError, match="'colour' is not one of single_object"):
        blocks.contents("colour")


# Shapes


def test_every_outline_fits_the_field_and_no_two_are_alike():
    inside = blocks.distance_fields()[:, 0] < 0  # (shapes, F, F)
    assert not inside[:, [0, -1]].any()
    assert not inside[:, :, [0, -1]].any()
    for i in range(len(SHAPES)):
        for j in range(i):
            union, common = (inside[i] | inside[j]).sum(), (inside[i] & inside[j]).sum()
            assert common / union < 0.9, (SHAPES[i], SHAPES[j])


def test_distances_are_those_of_a_circle():
    # A circle of radius 0.95 of the field's unit: |p| - 0.95.
    at = (torch.arange(blocks.FIELD_PX) + 0.5) / blocks.FIELD_PX * 2 * blocks.FIELD_EXTENT - blocks.FIELD_EXTENT
    expected = torch.hypot(at[:, None], at[None, :]) - 0.95
    assert (blocks.distance_fields()[SHAPES.index("circle"), 0] - expected).abs().max() < 0.02


def test_the_palette_is_far_apart():
    palette = torch.tensor(list(COLORS.values())) / 255
    assert torch.pdist(palette).min() > 0.25
