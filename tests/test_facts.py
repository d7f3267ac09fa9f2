"""GenEval's schema: lines as published pass, and what no rule could judge is refused."""

import json

import pytest

from trimtab.errors import UserError
from trimtab.worlds.facts import validate_metadata


def ask(*include, tag="two_object", exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def test_metadata_as_published_passes():
    for line in [
        '{"tag": "counting", "include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}], '
        '"prompt": "a photo of three dogs"}',
        '{"tag": "position", "include": [{"class": "cat", "count": 1}, '
        '{"class": "dog", "count": 1, "position": ["left of", 0]}], "prompt": "a photo of a dog left of a cat"}',
        '{"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red", "position": null}], "prompt": "p"}',
    ]:
        validate_metadata(json.loads(line), "here")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"include": [clause("dog")]}, "tag is None"),
        ({"tag": "colors"}, "include is missing or empty"),
        ({"tag": "colors", "include": {"class": "dog"}}, "include is {'class': 'dog'}; expected a list"),
        (ask("dog"), r"include\[0\] is 'dog'"),
        (ask(clause("dog", colour="red")), "no other keys than class, color, count, position"),
        (ask(clause("")), r"include\[0\].class is ''"),
        (ask(clause("dog", 0)), r"include\[0\].count is 0"),
        (ask(clause("dog", 1.0)), r"include\[0\].count is 1.0"),
        (ask(clause("dog", True)), r"include\[0\].count is True"),
        (ask(clause("dog", color=["red"])), r"include\[0\].color is \['red'\]"),
        (ask(clause("dog"), clause("cat", position=["under", 0])), r"include\[1\].position is \['under', 0\]"),
        (ask(clause("dog"), clause("cat", position=["above", 1])), r"include\[1\].position is \['above', 1\]"),
        (ask(clause("dog"), clause("cat", position=["above", -1])), r"include\[1\].position"),
        (ask(clause("dog"), clause("cat", position="above")), r"include\[1\].position is 'above'"),
        (ask(clause("dog"), exclude=[clause("cat", color="red")]), r"exclude\[0\] is .* than class, count"),
        (ask(clause("dog", 2), exclude=[clause("dog", 2)]), "asks for 2 'dog' and excludes 2 or more"),
        (ask(clause("dog", 8), clause("dog", 8)), "asks for 16 'dog'; no more than 15"),
        (ask(clause("dog"), clause("dog", position=["above", 0])), "a position involves 'dog', which 2 clauses name"),
    ],
)
def test_wrong_metadata_is_refused_with_file_and_line(metadata, message):
    with pytest.raises(UserError, match=message) as caught:
        validate_metadata(metadata, "prompts.jsonl, line 3")
    assert str(caught.value).startswith("prompts.jsonl, line 3: ")
