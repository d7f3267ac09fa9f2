"""Prompt files: what is read from them, and the line that is wrong."""

import json

import pytest

from trimtab.errors import UserError
from trimtab.worlds import blocks
from trimtab.worlds.files import NUM_PER_TAG, load_prompts


@pytest.fixture
def file(tmp_path):
    """Writes a file and returns its path as text."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_text_is_one_prompt_a_line_with_facts_where_the_world_knows_them(file):
    path = file("p.txt", "a photo of two stars\n\n  a cat on a mat  \n")
    prompts = load_prompts(path)
    assert prompts.text == ("a photo of two stars", "a cat on a mat")
    assert prompts.index == (0, 1)
    assert prompts.metadata[0]["include"] == [{"class": "star", "count": 2}]
    assert "include" not in prompts.metadata[1]
    assert prompts.lines == (f"{path}, line 1", f"{path}, line 3")  # blank lines count
    assert prompts[[1]].place(0) == f"{path}, line 3"


def test_jsonl_keeps_its_own_columns_and_facts(file):
    own = {"prompt": "a photo of two stars", "tag": "mine", "include": [{"class": "ring", "count": 1}], "where": "here"}
    path = file("p.jsonl", json.dumps(own) + "\n" + json.dumps({"prompt": "a red ring", "tag": "mine"}))
    first, second = load_prompts(path).metadata
    assert first == own
    assert second["include"] == [{"class": "ring", "count": 1, "color": "red"}]
    assert second["tag"] == "mine"  # and not the world's


def test_a_null_fact_is_none(file):
    path = file("p.jsonl", '{"prompt": "a cat", "tag": null, "include": null, "exclude": null, "target": null}')
    assert load_prompts(path).metadata == ({"prompt": "a cat", "target": None},)
    path = file("p.jsonl", '{"prompt": "two stars", "tag": null, "include": null}')
    assert load_prompts(path).metadata[0]["include"] == [{"class": "star", "count": 2}]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(file):
    assert load_prompts(file("p.txt", b"\xef\xbb\xbfa cat")).text == ("a cat",)


@pytest.mark.parametrize("name", ["{}.txt", "{}.jsonl", "{}_metadata.jsonl"])
def test_a_folder_has_a_file_for_each_split(file, tmp_path, name):
    for split in ("train", "test"):
        text = split if name.endswith("txt") else json.dumps({"prompt": split})
        file(name.format(split), text)
    assert load_prompts(str(tmp_path)).text == ("train",)
    assert load_prompts(str(tmp_path), "test").text == ("test",)


def test_a_folder_with_metadata_beside_the_text_gives_the_metadata(file, tmp_path):
    file("train.txt", "text")
    file("train_metadata.jsonl", '{"prompt": "metadata"}')
    assert load_prompts(str(tmp_path)).text == ("metadata",)


@pytest.mark.parametrize("split", ["train", "test"])
def test_blocks_are_the_world_s_own_lines(split):
    prompts = load_prompts("blocks", split)
    assert list(prompts.metadata) == blocks.prompts(split, NUM_PER_TAG[split])
    assert prompts.text == tuple(line["prompt"] for line in prompts.metadata)


GOOD = '{"prompt": "a cat"}\n'
CIRCLE = {"class": "circle", "count": 1}


def fact(**keys):
    return json.dumps({"prompt": "a red circle", "tag": "mine"} | keys)


BROKEN = {
    "not JSON": (
        "p.jsonl",
        GOOD + '{"prompt": "a',
        r"p\.jsonl, line 2 is not JSON \(.*\): '\{\"prompt\": \"a'; write one",
    ),
    "not an object": ("p.jsonl", GOOD + "\n[1]", r"p\.jsonl, line 3 has no text under 'prompt': '\[1\]'"),
    "no prompt": ("p.jsonl", '{"text": "a cat"}', r"p\.jsonl, line 1 has no text under 'prompt'"),
    "prompt is no text": ("p.jsonl", GOOD + '{"prompt": 3}', r"p\.jsonl, line 2 has no text under 'prompt'"),
    "blank prompt": ("p.jsonl", '{"prompt": " "}', r"p\.jsonl, line 1 has no text under 'prompt'"),
    "endless number": ("p.jsonl", '{"prompt": "a", "n": ' + "9" * 5000 + "}", r"p\.jsonl, line 1 is not JSON"),
    "endless nesting": ("p.jsonl", "[" * 100_000, r"p\.jsonl, line 1 is not JSON"),
    "half a character": ("p.jsonl", GOOD + '{"prompt": "\\ud800"}', r"p\.jsonl, line 2 has a prompt that is no text"),
    "facts that are none": ("p.jsonl", GOOD + fact(include="circle"), "line 2: include is 'circle'; expected"),
    "a clause that is none": ("p.jsonl", fact(include=["circle"]), r"p\.jsonl, line 1: include\[0\] is 'circle'"),
    "several colours": ("p.jsonl", fact(include=[CIRCLE | {"color": ["red"]}]), r"include\[0\]\.color is \['red'\]"),
    "a count in words": ("p.jsonl", fact(include=[CIRCLE | {"count": "two"}]), r"include\[0\]\.count is 'two'"),
    "a number to exclude": ("p.jsonl", fact(exclude=3), "p.jsonl, line 1: exclude is 3; expected a list"),
    "a tag that is no name": ("p.jsonl", fact(tag=7), "p.jsonl, line 1: tag is 7; expected a name"),
    "a tag alone": ("p.jsonl", GOOD + '{"prompt": "a cat", "tag": ["x"]}', r"line 2: tag is \['x'\]; expected a name"),
    "empty": ("p.txt", "\n \n", r"p\.txt is empty; write one prompt a line"),
    "not UTF-8": ("p.txt", b"caf\xe9", r"p\.txt cannot be read .*; save it as UTF-8 text"),
    "another kind": ("p.csv", "a cat", r"p\.csv ends in '\.csv'; \.txt .* and \.jsonl can be read"),
}


def test_a_line_ends_where_it_ends_and_not_at_a_separator_within_it(file):
    assert load_prompts(file("p.jsonl", '{"prompt": "a\u2028cat"}\r\n' + GOOD)).text == ("a\u2028cat", "a cat")


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named_with_the_line(file, what):
    name, content, message = BROKEN[what]
    with pytest.raises(UserError, match=message):
        load_prompts(file(name, content))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"prompts 'blokcs' do not exist; give 'blocks', a \.txt or \.jsonl file"):
        load_prompts("blokcs")
    with pytest.raises(UserError, match=r"prompts '' name nothing; give 'blocks', a \.txt or \.jsonl file"):
        load_prompts("")
    with pytest.raises(UserError, match=r"test\.txt' do not exist"):
        load_prompts(str(tmp_path), "test")
