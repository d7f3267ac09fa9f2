"""The exact reader: every shape in every colour, and what it calls a blob."""

import numpy as np
import pytest
import torch

from trimtab.rewards import detectors
from trimtab.rewards.detectors import BLOB, MIN_OVERLAP, read_blocks
from trimtab.worlds.blocks import COLORS, SHAPES, Block, Scene, draw

GREY = (0.93, 0.92, 0.94)


def picture(*blocks):
    return draw([Scene(tuple(blocks), GREY, GREY)])


def read(*blocks):
    (found,) = read_blocks(picture(*blocks))
    return found


def names(*blocks):
    return [detection.name for detection in read(*blocks)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read_in_every_colour(shape):
    for color in COLORS:
        (found,) = read(Block(shape, color, 30, 34, 9.0, 0.1))
        assert (found.name, found.colour, found.score) == (shape, color, 1.0)


@pytest.fixture
def overlaps(monkeypatch):
    """How well a block, as it is cut out of its picture, matches each shape (shapes,)."""
    cut = []
    shape_of = detectors._shape
    monkeypatch.setattr(detectors, "_shape", lambda soft: cut.append(soft) or shape_of(soft))

    def of(block):
        read(block)
        mask, templates = detectors._normalised(cut.pop()), detectors._templates()
        return (np.minimum(templates, mask).sum(-1) / np.maximum(templates, mask).sum(-1)).max(-1)

    return of


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_comes_near_to_being_taken_for_another(shape, overlaps):
    rng = np.random.default_rng(SHAPES.index(shape))
    margins, own = [], []
    for x, y, radius, angle in rng.uniform((24, 24, 7.5, -0.14), (40, 40, 14.5, 0.14), size=(25, 4)).tolist():
        match = overlaps(Block(shape, "black", x, y, radius, angle))
        right = match[SHAPES.index(shape)]
        margins.append(right - np.delete(match, SHAPES.index(shape)).max())
        own.append(right)
    assert min(own) > MIN_OVERLAP + 0.03
    assert min(margins) > 0.05


def test_the_box_is_the_block_s():
    # A circle of radius 0.95 * 10 px around (30, 34): 20.5 ... 39.5 by 24.5 ... 43.5.
    (found,) = read(Block("circle", "blue", 30, 34, 10.0))
    assert np.abs(np.array(found.box) - (20.5, 24.5, 39.5, 43.5)).max() <= 1


def test_blocks_apart_are_read_one_by_one():
    found = read(
        Block("star", "red", 15, 15, 9.0), Block("heart", "pink", 46, 17, 9.0), Block("star", "black", 32, 47, 9.0)
    )
    assert sorted((d.name, d.colour) for d in found) == [("heart", "pink"), ("star", "black"), ("star", "red")]


@pytest.mark.parametrize("color", ["red", "blue"])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_blocks_that_touch_are_one_blob(shape, color):
    assert names(Block(shape, "red", 25, 32, 10.0), Block(shape, color, 38, 32, 10.0)) == [BLOB]


def test_a_block_cut_in_half_by_the_edge_is_no_circle():
    assert "circle" not in names(Block("circle", "red", 32, 0, 12.0))


def test_specks_are_nothing_and_small_pieces_are_blobs():
    blank = picture()
    assert read_blocks(blank) == [[]]
    for side, expected in ((3, []), (5, [BLOB])):  # 9 px is below the least area, 5 px below the least side
        marked = blank.clone()
        marked[..., 20 : 20 + side, 20 : 20 + side] = 0.0
        assert [d.name for d in read_blocks(marked)[0]] == expected


def test_an_unheard_of_colour_has_no_name():
    square = Block("square", "black", 32, 32, 10.0)
    cyan = picture(square)
    cyan[0] = torch.where(cyan[:, :1] < 0.5, torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1), cyan)[0]
    assert read_blocks(cyan)[0][0].colour is None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_piece_whose_median_is_the_background_is_a_blob():
    # A third of it differs in each channel, so that the median differs in none.
    flags = picture()
    for channel in range(3):
        flags[:, channel, 20 + 5 * channel : 25 + 5 * channel, 20:35] = 0.3
    assert [d.name for d in read_blocks(flags)[0]] == [BLOB]


def test_reading_does_not_depend_on_the_batch_or_on_gradients():
    pictures = torch.cat([picture(Block(shape, "green", 32, 32, 10.0)) for shape in SHAPES]).requires_grad_()
    assert read_blocks(pictures) == [read_blocks(one[None])[0] for one in pictures]


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"takes images \(B, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        read_blocks(torch.zeros(1, 3, 32, 32))
