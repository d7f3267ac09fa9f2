"""GenEval's rules: scenes worked out by hand, verdicts of the published code, and properties of the modes."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import UserError
from trimtab.rewards.geneval import Detection, GenEval, judge, relations
from trimtab.worlds.facts import RELATIONS, validate_metadata

GOLDEN = json.loads((Path(__file__).parent / "golden" / "geneval.json").read_text())


def seen(name, x=0, y=0, colour=None, score=0.95, side=20):
    """A square detection centred at (x, y)."""
    return Detection(name, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2), colour)


def ask(*include, tag="two_object", exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


# ---- the published benchmark and the reward server made from it


@pytest.mark.parametrize("row", GOLDEN, ids=range(len(GOLDEN)))
def test_verdicts_equal_those_of_the_published_code(row):
    # golden/geneval.json: random scenes judged by djghosh13/geneval (16f1681) and yifan123/reward-server (7131478).
    detections = [Detection(name, score, tuple(box), colour) for name, score, box, colour in row["detections"]]
    assert judge(detections, row["metadata"], "official").correct == row["official"]
    server = judge(detections, row["metadata"], "flow_grpo_soft")
    assert server.correct == row["flow_grpo_strict"]
    assert server.score == pytest.approx(row["flow_grpo_soft"], abs=1e-12)


@pytest.mark.parametrize(("tag", "threshold"), [("colors", 0.3), ("counting", 0.9)])
def test_a_score_equal_to_the_threshold_is_not_enough(tag, threshold):
    above = float(np.nextafter(np.float32(threshold), np.float32(1)))
    for score, expected in [(threshold, False), (float(np.float32(threshold)), False), (above, True)]:
        assert judge([seen("dog", score=score)], ask(clause("dog"), tag=tag), "official").correct is expected


def test_the_counting_threshold_holds_for_every_class_of_a_counting_image():
    # 'cat' is not the class that is counted first, yet 0.5 is too little for it.
    scene = [seen("dog"), seen("cat", score=0.5)]
    wanted = clause("dog"), clause("cat")
    assert judge(scene, ask(*wanted), "official").correct
    assert judge(scene, ask(*wanted, tag="counting"), "official").reason == "expected cat>=1, found 0"


def test_at_most_sixteen_objects_of_a_class_are_read():
    # 17 dogs: as if 16, so `exclude` 17 never fires, and one asked gives the server's worst credit 1 - 15 = -14.
    # A second class has sixteen places of its own.
    scene = [seen("dog", 30 * i) for i in range(17)] + [seen("cat")]
    forbidden = {"class": "dog", "count": 17}
    assert judge(scene, ask(clause("dog"), clause("cat"), exclude=[forbidden]), "official").correct
    assert judge(scene, ask(clause("dog")), "flow_grpo_soft").score == -14.0


def test_the_most_confident_object_is_the_one_that_is_looked_at():
    scene = [seen("dog", colour="blue", score=0.6), seen("dog", colour="red", score=0.8)]
    assert judge(scene, ask(clause("dog", color="red")), "official").correct
    verdict = judge(scene, ask(clause("dog", color="blue")), "official")
    assert verdict.reason == "expected blue dog>=1, found 0 blue; and 1 red"


def test_official_lets_other_objects_be_and_strict_does_not():
    scene = [seen("dog"), seen("dog", 50), seen("cat", 100), seen("blob", 150)]
    wanted = ask(clause("dog"), tag="single_object")
    assert judge(scene, wanted, "official") == judge(scene[:1], wanted, "official")
    assert judge(scene, wanted, "official").score == 1.0
    verdict = judge(scene, wanted, "strict")
    assert (verdict.correct, verdict.score) == (False, 0.0)
    assert verdict.reason == "expected dog==1, found 2\nexpected nothing else, found 1 cat, 1 blob"
    assert not judge([scene[0], scene[3]], wanted, "strict").correct
    assert judge(scene[:1], wanted, "strict").correct


def test_exclude_fires_from_its_count_on():
    wanted = ask(clause("dog", 2), tag="counting", exclude=[{"class": "dog", "count": 3}])
    pack = [seen("dog", 50 * i) for i in range(3)]
    assert judge(pack[:2], wanted, "official").correct
    assert judge(pack, wanted, "official").reason == "expected dog<3, found 3"


def test_all_clauses_must_hold():
    wanted = ask(clause("dog"), clause("cat"))
    for scene, reason in [
        ([seen("dog"), seen("cat")], ""),
        ([seen("dog")], "expected cat>=1, found 0"),
        ([], "expected dog>=1, found 0\nexpected cat>=1, found 0"),
    ]:
        verdict = judge(scene, wanted, "official")
        assert (verdict.correct, verdict.reason) == (not reason, reason)


def test_a_target_that_failed_its_own_clause_is_no_target():
    wanted = ask(clause("cat", color="red"), clause("dog", position=["left of", 0]))
    verdict = judge([seen("dog", 0), seen("cat", 100, colour="blue")], wanted, "official")
    assert verdict.reason.splitlines() == [
        "expected red cat>=1, found 0 red; and 1 blue",
        "no target for dog to be left of",
    ]


def test_a_wrong_colour_hides_the_position():
    wanted = ask(clause("cat"), clause("dog", color="red", position=["left of", 0]))
    verdict = judge([seen("dog", 200, colour="blue"), seen("cat", 100)], wanted, "official")
    assert verdict.reason == "expected red dog>=1, found 0 red; and 1 blue"


def test_every_object_must_stand_in_relation_to_every_target():
    wanted = ask(clause("cat", 2), clause("dog", 2, position=["left of", 0]))
    cats = [seen("cat", 100), seen("cat", 200)]
    assert judge([seen("dog", 0), seen("dog", 50), *cats], wanted, "official").correct
    verdict = judge([seen("dog", 0), seen("dog", 150), *cats], wanted, "official")
    assert verdict.reason == "expected dog left of target, found right of target"


def test_official_clauses_of_one_class_share_its_objects():
    # The one most confident circle answers both clauses; it cannot be red and blue.
    circles = [seen("circle", 0, colour="red", score=0.9), seen("circle", 50, colour="blue", score=0.8)]
    both = ask(clause("circle", color="red"), clause("circle", color="blue"))
    assert judge(circles[:1], ask(clause("circle"), clause("circle")), "official").correct
    assert not judge(circles, both, "official").correct
    assert judge(circles, both, "strict").correct


# ---- positions


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        # Two boxes of side 20: a tenth of both widths is 4. Offset (30, 30), length 42.4: (30 - 4)/42.4 = 0.61.
        (30, 30, {"right of", "below"}),
        (-30, 30, {"left of", "below"}),
        (30, -30, {"right of", "above"}),
        # (16 - 4)/16 = 0.75, the other axis 0.
        (16, 0, {"right of"}),
        # (8 - 4)/8 = 0.5 exactly is not more than a half.
        *[(x, y, set()) for x, y in [(8, 0), (-8, 0), (0, 8), (0, -8)]],
        (8.1, 0, {"right of"}),
        # Within the slack on both axes, or on the same spot.
        (4, 4, set()),
        (0, 0, set()),
        # Short diagonal: (12 - 4)/17.0 = 0.47 on each axis. Dividing by the shortened length (11.3) would give 0.71.
        (12, 12, set()),
        # Offset (40, 20), length 44.7: 36/44.7 = 0.80 and 16/44.7 = 0.36.
        (40, 20, {"right of"}),
    ],
)
def test_relations_worked_out_by_hand(x, y, expected):
    assert set(relations(seen("a", x, y).box, seen("b").box)) == expected


side = st.integers(1, 120).map(float)
corner = st.integers(0, 300).map(float)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, side, side)


@given(boxes, boxes)
def test_seen_from_the_other_object_each_relation_turns_round(a, b):
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {turned[r] for r in relations(a, b)} == set(relations(b, a))


@given(boxes, boxes, st.integers(-500, 500), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_relations_do_not_depend_on_where_the_picture_is_cut_or_its_resolution(a, b, shift, scale):
    moved = [tuple(scale * (value + shift) for value in box) for box in (a, b)]
    assert relations(*moved) == relations(a, b)


# ---- strict and soft


def test_soft_is_the_mean_of_its_partial_credits():
    # Asked: 2 red dogs (count, colour), a cat left of them (count, position), nothing else.
    wanted = ask(clause("dog", 2, color="red"), clause("cat", position=["left of", 0]))
    dogs = [seen("dog", 100, colour="red"), seen("dog", 0, colour="blue")]
    scene = [*dogs, seen("cat", 50), seen("blob", 300)]
    # dogs 2 of 2: 1; red 1 of 2: 1/2; cats 1; left of one dog of two: 1/2; one blob among three asked: 2/3.
    assert judge(scene, wanted, "soft").score == pytest.approx((1 + 1 / 2 + 1 + 1 / 2 + 2 / 3) / 5)
    # No dog: 0, 0; cat 1; no pair stands right: 0; nothing else: 1.
    assert judge([seen("cat")], wanted, "soft").score == pytest.approx(2 / 5)
    # Five cats for one: credit max(0, 1 - 4) = 0, never below.
    assert judge([seen("cat", 50 * i) for i in range(5)], ask(clause("cat")), "soft").score == pytest.approx(1 / 2)
    # One cat for four, and two dogs: 1/4 and 1 - 2/4.
    scene = [seen("cat"), seen("dog", 50), seen("dog", 100)]
    assert judge(scene, ask(clause("cat", 4)), "soft").score == pytest.approx((1 / 4 + 1 / 2) / 2)


def test_a_further_object_costs_its_count_and_not_its_colour():
    # One red and one blue dog where one red is asked: count 0, colour 1, nothing else 1.
    scene = [seen("dog", colour="blue", score=0.99), seen("dog", 50, colour="red", score=0.5)]
    assert judge(scene, ask(clause("dog", color="red")), "soft").score == pytest.approx(2 / 3)


def test_strict_tells_objects_of_one_class_apart_by_colour():
    wanted = ask(clause("circle", color="red"), clause("circle", color="blue", position=["above", 0]))
    red, blue = seen("circle", 0, 100, colour="red", score=0.5), seen("circle", 0, 0, colour="blue")
    assert judge([red, blue], wanted, "strict").correct
    upside_down = [seen("circle", 0, 0, colour="red"), seen("circle", 0, 100, colour="blue", score=0.5)]
    assert judge(upside_down, wanted, "strict").reason == "expected circle above target, found 0 of 1 pairs so"
    assert not judge([red, seen("circle", colour="red")], wanted, "strict").correct
    assert not judge([red], wanted, "strict").correct


@st.composite
def scenes(draw):
    """Validated metadata, and a scene made for it that is then sometimes spoilt."""
    include = []
    for number in range(draw(st.integers(1, 3))):
        asked = clause(draw(st.sampled_from(["circle", "square"])), draw(st.integers(1, 2)))
        if draw(st.booleans()):
            asked["color"] = draw(st.sampled_from(["red", "blue"]))
        if number and draw(st.booleans()):
            asked["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, number - 1))]
        include.append(asked)
    metadata = ask(*include, tag=draw(st.sampled_from(["counting", "position"])))
    place = st.sampled_from([0, 60, 120])
    colour = st.sampled_from(["red", "blue", None])

    def thing(name, colours=colour):
        return seen(name, draw(place), draw(place), draw(colours), draw(st.sampled_from([0.95, 0.97])))

    scene = [thing(c["class"], st.just(c.get("color", "red"))) for c in include for _ in range(c["count"])]
    scene = scene[draw(st.sampled_from([0, 0, 0, 1])) :]
    scene += [
        thing(draw(st.sampled_from(["circle", "square", "blob"]))) for _ in range(draw(st.sampled_from([0, 0, 1])))
    ]
    return draw(st.permutations(scene)), metadata


def valid(metadata):
    try:
        validate_metadata(metadata, "here")
    except UserError:
        return False
    return True


def some_reading_is_right(scene, include):
    """Strict, from its definition: some way to hand out *all* objects, one each, satisfies every clause."""
    slots = [i for i, asked in enumerate(include) for _ in range(asked["count"])]
    if len(slots) != len(scene):
        return False
    return any(_is_right(list(zip(slots, way, strict=True)), include) for way in itertools.permutations(scene))


def _is_right(placed, include):
    for i, thing in placed:
        asked = include[i]
        if thing.name != asked["class"] or thing.colour != asked.get("color", thing.colour):
            return False
        relation, target = asked.get("position", (None, None))
        if not all(relation in relations(thing.box, other.box) for j, other in placed if j == target):
            return False
    return True


@settings(max_examples=300, deadline=None)
@given(scenes().filter(lambda pair: valid(pair[1])))
def test_strict_is_its_definition_and_soft_is_one_just_then(pair):
    scene, metadata = pair
    expected = some_reading_is_right(scene, metadata["include"])
    soft = judge(scene, metadata, "soft")
    assert judge(scene, metadata, "strict").correct is expected
    assert soft.correct is expected
    assert (soft.score == 1.0) is expected
    assert 0.0 <= soft.score <= 1.0
    assert (soft.reason == "") is expected


def test_the_scenes_of_the_property_test_are_of_both_kinds():
    # Otherwise the test above would prove little.
    verdicts = []

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(scenes().filter(lambda pair: valid(pair[1])))
    def collect(pair):
        verdicts.append(judge(*pair, "strict").correct)

    collect()
    assert 0.1 < np.mean(verdicts) < 0.9


@settings(max_examples=200, deadline=None)
@given(scenes().filter(lambda pair: valid(pair[1])))
def test_what_is_strictly_right_is_officially_right_where_no_two_clauses_share_a_class(pair):
    scene, metadata = pair
    names = [asked["class"] for asked in metadata["include"]]
    if len(set(names)) == len(names) and judge(scene, metadata, "strict").correct:
        assert judge(scene, metadata, "official").correct


# ---- Flow-GRPO's score


def test_flow_grpo_soft_worked_out_by_hand():
    def score(scene, *include):
        return judge(scene, ask(*include), "flow_grpo_soft").score

    dog, cat = seen("dog", 0, colour="red"), seen("cat", 100)
    left, right = (clause("dog", position=[side, 0]) for side in ("left of", "right of"))
    # Five for one: 1 - 4.
    assert score([dog] * 5, clause("dog")) == -3.0
    # A wrong number with colour *and* position asked: (cat 1, dog 1 - 1/1, one zero) / 3.
    both = clause("dog", color="red", position=["left of", 0])
    assert score([dog, dog, cat], clause("cat"), both) == pytest.approx(1 / 3)
    # The position's slip: right 1, 1, 1; wrong 1, 1, 0 and then 1 all the same.
    assert score([dog, cat], clause("cat"), left) == 1.0
    assert score([dog, cat], clause("cat"), right) == pytest.approx(3 / 4)
    # No target: cat 0, dog 1, position 0.
    assert score([dog], clause("cat"), left) == pytest.approx(1 / 3)
    # A wrong colour: count 1, colour 0, and no word about the position.
    assert score([dog, cat], clause("cat"), clause("dog", color="blue", position=["left of", 0])) == pytest.approx(
        2 / 3
    )


def test_flow_grpo_soft_ignores_exclude_and_other_classes_but_counts_exactly():
    wanted = ask(clause("dog"), exclude=[{"class": "cat", "count": 1}])
    verdict = judge([seen("dog"), seen("cat"), seen("blob")], wanted, "flow_grpo_soft")
    assert (verdict.correct, verdict.score) == (True, 1.0)
    assert judge([seen("dog"), seen("dog", 50)], wanted, "flow_grpo_soft").reason == "expected dog==1, found 2"


def test_clamp_keeps_the_score_in_the_unit_interval_and_the_verdict_as_it_is():
    crowd = [seen("dog", 50 * i) for i in range(5)]
    clamped = judge(crowd, ask(clause("dog")), "flow_grpo_soft", clamp=True)
    assert (clamped.correct, clamped.score, clamped.reason) == (False, 0.0, "expected dog==1, found 5")
    assert judge(crowd[:1], ask(clause("dog")), "flow_grpo_soft", clamp=True).score == 1.0


# ---- the reward


def test_the_reward_scores_each_image_by_its_own_metadata_and_skips_those_without():
    read = []

    def reader(images):
        read.append(len(images))
        return [[seen("dog")] if image.mean() > 0.5 else [] for image in images]

    images = torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    metadata = [ask(clause("dog")), {"style": "oil"}, ask(clause("dog"))]
    scores = GenEval(reader, "official")(images, ["p"] * 3, metadata)
    assert scores.dtype == torch.float32
    assert scores[[0, 2]].tolist() == [1.0, 0.0]
    assert math.isnan(scores[1])
    assert read == [2]


def test_the_reward_without_any_fitting_prompt_reads_nothing():
    scores = GenEval(pytest.fail)(torch.zeros(2, 3, 4, 4), ["p"] * 2, [{}, {"include": None}])
    assert scores.isnan().all()


def test_the_reward_clamps_when_told_to():
    def reader(images):
        return [[seen("dog", 50 * i) for i in range(5)]] * len(images)

    arguments = torch.zeros(1, 3, 4, 4), ["p"], [ask(clause("dog"))]
    assert GenEval(reader, "flow_grpo_soft")(*arguments).item() == -3.0
    assert GenEval(reader, "flow_grpo_soft", clamp=True)(*arguments).item() == 0.0


def test_the_reward_refuses_an_unknown_mode_and_images_that_do_not_fit():
    with pytest.raises(UserError, match="'lenient' is unknown; choose one of official, strict, soft, flow_grpo_soft"):
        GenEval(list, "lenient")
    with pytest.raises(ValueError, match=r"images \(2, 3, 4, 4\) for 1 metadata"):
        GenEval(list)(torch.zeros(2, 3, 4, 4), ["p"] * 2, [{}])
