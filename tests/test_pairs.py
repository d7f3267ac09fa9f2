"""Preference pairs: JSONL and Pick-a-Pic's parquet, and what is said of lines that can't be used."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trimtab.errors import UserError
from trimtab.worlds.pairs import load_pairs
from trimtab.worlds.pictures import Unusable


def picture(color):
    file = io.BytesIO()
    Image.new("RGB", (40, 32), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, color in (("a", "red"), ("sub/b", "blue"), ("c", "lime")):
        (tmp_path / f"{name}.png").write_bytes(picture(color))
    return tmp_path


def jsonl(folder, *lines):
    (folder / "pairs.jsonl").write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return str(folder / "pairs.jsonl")


def line(**changes):
    return {"prompt": "a cat", "chosen": "a.png", "rejected": "sub/b.png"} | changes


def color(pairs, number):
    return pairs.read(number, 16)[:, 8, 8].tolist()


def test_comparisons_of_one_prompt_stand_together_and_a_picture_has_one_number(folder):
    more = [line(), line(prompt="a dog", chosen=["c.png", "a.png"]), "", line(prompt=" a cat ", rejected=["c.png"])]
    pairs = load_pairs(jsonl(folder, *more), "stop")
    assert pairs.prompts.text == ("a cat", "a dog")
    assert pairs.prompts.index == (0, 1)
    (a, again), (c, a_too) = pairs.chosen
    assert a == again == a_too
    assert [color(pairs, n) for n in (a, c, pairs.rejected[0][0])] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert pairs.rejected[0][1] == c
    assert len(pairs.sources) == 3


def test_comparisons_that_reverse_each_other_teach_nothing_and_a_chain_stays(folder):
    both = [line(), line(chosen="sub/b.png", rejected="a.png")]
    with pytest.raises(UserError, match=r"that can be used .'a cat' has comparisons that reverse"):
        load_pairs(jsonl(folder, *both), "stop")
    pairs = load_pairs(jsonl(folder, *both, line(rejected="c.png"), line(chosen="c.png", rejected="sub/b.png")), "stop")
    named = lambda column: [pairs.sources[n][0].removeprefix(f"{folder}/") for n in column[0]]  # noqa: E731
    assert named(pairs.chosen) == ["a.png", "c.png"]
    assert named(pairs.rejected) == ["c.png", "sub/b.png"]
    pairs = load_pairs(jsonl(folder, line(chosen=["a.png", "c.png"]), both[1]), "stop")
    assert (named(pairs.chosen), named(pairs.rejected)) == (["c.png"], ["sub/b.png"])  # nobody reversed these two
    pairs = load_pairs(jsonl(folder, line(rejected=["sub/b.png", "c.png"]), both[1]), "stop")
    assert (named(pairs.chosen), named(pairs.rejected)) == (["a.png"], ["c.png"])


def test_the_hash_of_pairs_tells_sides_and_not_folders(folder, tmp_path_factory):
    hashes = [load_pairs(jsonl(folder, line(**change)), "stop").sha256() for change in ({}, {"prompt": "a dog"})]
    hashes += [load_pairs(jsonl(folder, line(chosen="sub/b.png", rejected="a.png")), "stop").sha256()]
    assert len(set(hashes)) == 3
    (folder / "b.png").write_bytes(picture("blue"))  # of one name in two folders
    same = [line(chosen="b.png"), line(chosen="sub/b.png", rejected="b.png")]
    assert len({load_pairs(jsonl(folder, each), "stop").sha256() for each in same}) == 2
    elsewhere = folder.rename(tmp_path_factory.mktemp("other") / "place")
    assert load_pairs(jsonl(elsewhere, line()), "stop").sha256() == hashes[0]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", r"line 2 is not JSON"),
        ("[1]", r"line 2 has no text under 'prompt'"),
        (line(prompt=" "), r"line 2 has no text under 'prompt'"),
        (line(chosen=[]), r"line 2 has no picture under 'chosen'"),
        (line(rejected=None), r"line 2 has no picture under 'rejected'"),
        (line(rejected=["a.png", 3]), r"line 2 has no picture under 'rejected'"),
        (line(rejected=["sub/../a.png"]), r"line 2 has .*a\.png on both sides"),
        (line(prompt="a \ud800"), r"line 2 has a prompt that is no text"),
        ("[" * 100_000, r"line 2 is not JSON"),
        (line(chosen="gone.png"), r"line 2 names .*gone\.png, which does not exist"),
        (line(chosen="text.png"), r"line 2: .*text\.png is no picture that can be read"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_or_left_out(folder, bad, words, caplog):
    (folder / "text.png").write_text("no picture")
    path = jsonl(folder, line(), bad)
    with pytest.raises(UserError, match=words):
        load_pairs(path, "stop")
    pairs = load_pairs(path, "skip")
    assert (len(pairs.prompts), len(pairs.skipped)) == (1, 1)
    assert "1 comparisons in" in caplog.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing.jsonl", r"there is no file '.*nothing\.jsonl' of pairs; `trimtab pairs RUN` writes one"),
        ("sub", r"there is no file '.*sub' of pairs; `trimtab pairs RUN` writes one"),
        ("pairs.csv", r"pairs\.csv' are no \.jsonl or \.parquet file; `trimtab pairs RUN` writes one"),
    ],
)
def test_what_is_no_file_of_pairs_is_refused(folder, name, words):
    (folder / "pairs.csv").write_text("prompt,chosen\n")
    with pytest.raises(UserError, match=words):
        load_pairs(str(folder / name), "stop")


def test_nothing_usable_is_refused_with_the_first_reason(folder):
    with pytest.raises(UserError, match=r"holds no comparison that can be used \(.*line 1 has no picture"):
        load_pairs(jsonl(folder, line(chosen=None)), "skip")
    with pytest.raises(UserError, match="holds no comparison that can be used"):
        load_pairs(jsonl(folder), "stop")


def test_a_picture_that_goes_away_afterwards_is_unusable(folder):
    pairs = load_pairs(jsonl(folder, line()), "stop")
    (folder / "a.png").unlink()
    with pytest.raises(Unusable, match=r"a\.png cannot be read"):
        pairs.read(pairs.chosen[0][0], 16)


def parquet(folder, **changes):
    columns = {
        "caption": ["a cat", "a cat", "a dog", "a dog"],
        "jpg_0": [picture("red"), picture("lime"), picture("black"), picture("white")],
        "jpg_1": [picture("blue")] * 4,
        "label_0": [1.0, 0.0, 0.5, 0.0],
    } | changes
    columns = {name: column for name, column in columns.items() if column is not None}
    pq.write_table(pa.table(columns), folder / "pairs.parquet", row_group_size=2)
    return str(folder / "pairs.parquet")


def test_pick_a_pic_says_which_of_two_is_better(folder):
    pairs = load_pairs(parquet(folder), "stop")
    assert pairs.prompts.text == ("a cat", "a dog")
    assert [color(pairs, n) for n in pairs.chosen[0]] == [[255, 0, 0], [0, 0, 255]]
    assert [color(pairs, n) for n in pairs.rejected[0]] == [[0, 0, 255], [0, 255, 0]]
    assert [color(pairs, n) for n in pairs.rejected[1]] == [[255, 255, 255]]  # the draw taught nothing


def test_a_row_of_any_group_of_a_table_has_its_own_picture(folder):
    pairs = load_pairs(parquet(folder, caption=list("abcd"), label_0=[1.0] * 4), "stop")  # two groups of two rows
    assert [color(pairs, n) for (n,) in pairs.chosen] == [[255, 0, 0], [0, 255, 0], [0, 0, 0], [255, 255, 255]]


def test_pictures_as_the_datasets_library_stores_them(folder):
    stored = [{"bytes": picture("red"), "path": None}] * 4
    pairs = load_pairs(parquet(folder, jpg_0=stored), "stop")
    assert color(pairs, pairs.chosen[0][0]) == [255, 0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_0": None}, "has no column 'label_0'"),
        ({"label_0": [1.0, 2.0, 1.0, 1.0]}, "row 1 has label_0 2.0"),
        ({"caption": ["a", "b", " ", "d"]}, "row 2 has an empty caption"),
        ({"label_0": [0.5] * 4}, "holds no comparison that can be used"),
    ],
)
def test_a_table_that_is_no_such_thing_is_refused(folder, changes, words):
    with pytest.raises(UserError, match=words):
        load_pairs(parquet(folder, **changes), "stop")


def test_a_damaged_table_and_a_missing_picture_are_told(folder):
    pairs = load_pairs(parquet(folder, jpg_0=[None] * 4), "stop")
    with pytest.raises(Unusable, match=r"row 0, jpg_0 cannot be read"):
        pairs.read(pairs.chosen[0][0], 16)
    (folder / "pairs.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="is no table that can be read"):
        load_pairs(str(folder / "pairs.parquet"), "stop")
