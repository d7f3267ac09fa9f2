"""The recognizer: its credits by hand, its gradient, and that the shipped one reads."""

import math

import numpy as np
import pytest
import torch

from trimtab.rewards.recognizer import CELLS, Recognizer, RecognizerScore, load
from trimtab.worlds import blocks
from trimtab.worlds.blocks import COLORS, SHAPES

CERTAIN = 30.0  # a logit


class Sees(Recognizer):
    """Is certain of what a list of (shape, colour, row, column) says, whatever the picture."""

    def __init__(self, *seen):
        super().__init__()
        self.seen = seen

    def forward(self, images):
        shape, color = torch.zeros(1 + len(SHAPES), CELLS, CELLS), torch.zeros(len(COLORS), CELLS, CELLS)
        shape[0] = CERTAIN
        for name, hue, row, column in self.seen:
            shape[1 + SHAPES.index(name), row, column] = 2 * CERTAIN
            color[list(COLORS).index(hue), row, column] = CERTAIN
        return shape.expand(len(images), -1, -1, -1), color.expand(len(images), -1, -1, -1)


def clause(shape, count=1, **more):
    return {"class": shape, "count": count, **more}


def score(seen, *include):
    return Sees(*seen).score(torch.zeros(1, 3, 64, 64), [{"include": list(include)}]).item()


@pytest.mark.parametrize("tag", blocks.TAGS)
def test_who_is_certain_of_a_true_scene_scores_nearly_1(tag):
    rng = np.random.default_rng(0)
    for i in rng.integers(len(blocks.contents(tag)), size=20):
        content = blocks.contents(tag)[i]
        drawn = blocks.scene(content, rng).blocks
        seen = [(b.shape, b.color, int(b.y / 8), int(b.x / 8)) for b in drawn]
        # A relation of blocks only a cell apart has credit sigmoid(2) = 0.88, one of four.
        assert score(seen, *content["include"]) > (0.96 if tag == "position" else 0.999)


def test_credits_by_hand():
    one = [("star", "red", 2, 1)]
    assert score(one, clause("star")) == pytest.approx(1)  # number 1, nothing else 1
    assert score(one, clause("star", 3)) == pytest.approx((math.exp(-2) + 1) / 2, abs=1e-4)
    assert score(one, clause("ring")) == pytest.approx((math.exp(-1) + math.exp(-1)) / 2, abs=1e-4)
    assert score(one, clause("star", color="blue")) == pytest.approx((1 + 0 + 1) / 3, abs=1e-4)
    assert score(one, clause("star", 2, color="red")) == pytest.approx((math.exp(-1) + 1 / 2 + 1) / 3, abs=1e-4)
    two = [*one, ("star", "red", 5, 5)]  # a red one too many is no more than red
    assert score(two, clause("star", color="red")) == pytest.approx((math.exp(-1) + 1 + 1) / 3, abs=1e-4)


@pytest.mark.parametrize(("relation", "cells"), [("left of", 2), ("right of", -2), ("above", 1), ("below", -1)])
def test_a_relation_is_soft_in_cells(relation, cells):
    # The ring at row 3, column 2 and the star at row 4, column 4: it is 2 cells left of and 1 above the star.
    seen = [("ring", "red", 3, 2), ("star", "red", 4, 4)]
    credit = 1 / (1 + math.exp(-2 * cells))
    include = clause("star"), clause("ring", position=[relation, 0])
    assert score(seen, *include) == pytest.approx((1 + 1 + credit + 1) / 4, abs=1e-3)


def test_an_absent_attribute_and_a_null_one_are_the_same():
    seen = [("ring", "red", 3, 2)]
    assert score(seen, clause("ring", color=None, position=None)) == score(seen, clause("ring"))


@pytest.mark.parametrize("tag", ["counting", "position", "color_attr"])
def test_the_score_has_a_gradient_to_every_picture(tag):
    torch.manual_seed(0)
    images = torch.rand(3, 3, 64, 64, requires_grad=True)
    scores = Recognizer().score(images, blocks.contents(tag)[:3])
    assert scores.shape == (3,)
    scores.sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()


def test_without_facts_there_is_no_score_and_others_keep_theirs():
    images, content = torch.rand(3, 3, 64, 64), blocks.contents("colors")[0]
    some = RecognizerScore()(images, ["", "", ""], [{}, content, {"tag": "mine"}])
    assert some.isnan().tolist() == [True, False, True]
    assert some.dtype == torch.float32
    assert abs(some[1] - RecognizerScore()(images[1:2], [""], [content])[0]) < 1e-5
    assert RecognizerScore()(images[:1], [""], [{}]).isnan().all()


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"reads 64 x 64 pictures, got \(1, 3, 32, 32\)"):
        RecognizerScore()(torch.zeros(1, 3, 32, 32), [""], [{}])


def test_features_are_one_row_a_picture_and_tell_quarters_apart():
    star = blocks.Block("star", "red", 16, 16, 9.0)
    white = (1.0, 1.0, 1.0)
    scenes = [blocks.Scene((blocks.Block("star", "red", x, 16, 9.0),), white, white) for x in (star.x, 48)]
    left, right = load().features(blocks.draw(scenes))
    assert left.shape == (128,)
    assert (left - right).abs().max() > 0.1


@pytest.mark.parametrize("tag", blocks.TAGS)
def test_the_shipped_recognizer_prefers_the_true_scene(tag):
    rng = np.random.default_rng(1)
    contents = blocks.contents(tag)
    asked = [contents[i] for i in rng.integers(len(contents), size=40)]
    other = [contents[i] for i in rng.integers(len(contents), size=40)]
    right = RecognizerScore()(blocks.draw([blocks.scene(c, rng) for c in asked]), [""] * 40, asked)
    wrong = RecognizerScore()(blocks.draw([blocks.scene(c, rng) for c in other]), [""] * 40, asked)
    differ = torch.tensor([a["include"] != b["include"] for a, b in zip(asked, other, strict=True)])
    assert right.mean() > 0.9
    assert (right > wrong)[differ].float().mean() > 0.9
