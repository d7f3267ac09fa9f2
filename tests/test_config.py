import math
from typing import Literal

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from pydantic import Field, ValidationError

from trimtab.config import Strict, dump, find_recipe, load_yaml, override, validate
from trimtab.errors import UserError


class Rollout(Strict):
    group_size: int = Field(8, ge=2)
    betas: tuple[float, float] = (0.9, 0.999)


class Run(Strict):
    lr: float = 3e-4
    steps: int = 10
    name: str = "run"
    resume: bool = False
    clip: float | None = None
    method: Literal["crd", "drpo"] = "crd"
    targets: tuple[str, ...] = ()
    weights: dict[str, float] = Field(default_factory=dict)
    rollout: Rollout = Rollout()


def written(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return path


# --- Strict


def test_an_integer_serves_as_a_float_and_a_list_as_a_tuple():
    run = validate(Run, {"lr": 1, "rollout": {"betas": [0, 0.95]}})
    assert type(run.lr) is float
    assert run.rollout.betas == (0.0, 0.95)


@pytest.mark.parametrize(
    "data",
    [
        {"steps": "3"},
        {"steps": 3.0},
        {"steps": True},
        {"lr": "1e-4"},
        {"lr": True},
        {"lr": math.nan},
        {"lr": math.inf},
        {"weights": {"ocr": -math.inf}},
        {"name": 3},
        {"resume": 1},
        {"resume": "true"},
        {"targets": "q"},
        {"unknown": 1},
    ],
)
def test_no_value_is_converted_and_no_key_ignored(data):
    with pytest.raises(UserError):
        validate(Run, data)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Run().steps = 3


def test_defaults_are_held_to_the_same_rules():
    class Wrong(Strict):
        steps: int = Field(0, ge=1)

    with pytest.raises(ValidationError):
        Wrong()


# --- YAML in


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("010", 10),
        ("+3", 3),
        ("-.inf", -math.inf),
        (".INF", math.inf),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("on", "on"),
        ("no", "no"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("1e", "1e"),
        ("e4", "e4"),
        ("1_", "1_"),
        ("[1e-4, {a: x}]", [1e-4, {"a": "x"}]),
    ],
)
def test_scalars_mean_the_same_in_a_file_and_in_an_override(tmp_path, text, value):
    for read in (load_yaml(written(tmp_path, f"a: {text}"))["a"], override({}, [f"a={text}"])["a"]):
        assert read == value
        assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "empty"),
        ("# only a comment\n", 1, "empty"),
        ("hello\n", 1, 'holds "hello"; expected a mapping'),
        ("- 1\n", 1, "holds [1]; expected a mapping"),
        ("a: 1\nb: 2\na: 3\n", 3, "key 'a' is given twice, first on line 1"),
        ("s:\n  a: 1\n  b: 2\n  a: 3\n", 4, "key 'a' is given twice, first on line 2"),
        ("a: 1\n\tb: 2\n", 2, "tabs"),
        ("a: 1\nb: c: d\n", 2, "mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("a: 1\nb: !python/name:os.system x\n", 2, "could not determine a constructor"),
        ("a: 1\nb: !!int x\n", 2, "cannot read 'x' as int"),
        ("a: 1\nb: !!map x\n", 2, "expected a mapping node"),
        ("a: 1\nb: " + "9" * 5000, 2, "as int"),
        ('a: 1\nb: "\\ud800"\n', 2, "as str"),
        ("a: 1\nb: &b [*b]\n", 2, "recursive"),
        ("a: 1\n? [1]\n: 2\n", 2, "unhashable key"),
        ("a: 1\nb: \x00\n", 2, "special characters"),
        pytest.param("a: " + "[" * 100_000, 1, "cannot be read", id="nesting without end"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_line(tmp_path, text, line, words):
    with pytest.raises(UserError) as refusal:
        load_yaml(written(tmp_path, text))
    assert str(refusal.value).startswith(f"{tmp_path / 'run.yaml'}, line {line}: ")
    assert words in str(refusal.value)


def test_a_file_that_is_not_text_is_refused_with_its_line(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(UserError, match=r"run\.yaml, line 2: not UTF-8 text; .* save it as UTF-8"):
        load_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(("name", "reason"), [("none.yaml", "No such file"), (".", "Is a directory")])
def test_a_path_that_is_no_file_is_refused(tmp_path, name, reason):
    with pytest.raises(UserError, match=reason):
        load_yaml(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert load_yaml(written(tmp_path, "\ufeffa: 1")) == {"a": 1}


# --- YAML out

NASTY = ["a\x85b", "\u2028", "\u2029 ", "\r\n", "\ufeff", "\t# x", " - ", "é: [", "\0\x1b\x7f", "🙂\n\n", "\n a"]
TEXTS = st.one_of(
    st.sampled_from(NASTY),
    st.text(),
    st.sampled_from(["1e-4", "on", "no", "~", "", "12:30", "1_0", "010", "2026-01-01", ".nan"]),
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
RUNS = st.builds(
    Run,
    lr=FLOATS,
    steps=st.integers(),
    name=TEXTS,
    resume=st.booleans(),
    clip=st.none() | FLOATS,
    method=st.sampled_from(["crd", "drpo"]),
    targets=st.lists(TEXTS, max_size=3).map(tuple),
    weights=st.dictionaries(TEXTS, FLOATS, max_size=3),
    rollout=st.builds(Rollout, group_size=st.integers(2), betas=st.tuples(FLOATS, FLOATS)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=RUNS)
def test_what_dump_writes_validates_to_an_equal_config(tmp_path, run):
    path = tmp_path / "config.yaml"
    path.write_text(dump(run))
    assert validate(Run, load_yaml(path)) == run
    assert yaml.safe_load(dump(run)) == load_yaml(path)  # and readers of YAML 1.1 see the same


# --- overrides


def test_overrides_reach_into_sections_in_order_and_leave_the_data_alone():
    data = {"a": {"b": 1, "c": 2}, "n": None}
    items = ["a.b=3", "a.b=1e-4", "x.y.z=[1, 2]", "n.m=q", "a.d=k=v", "a.c="]
    assert override(data, items) == {
        "a": {"b": 1e-4, "c": None, "d": "k=v"},
        "n": {"m": "q"},
        "x": {"y": {"z": [1, 2]}},
    }
    assert data == {"a": {"b": 1, "c": 2}, "n": None}


@pytest.mark.parametrize("item", ["a", "=1", "a.=1", ".a=1", "a..b=1", "--a.b=1", "a b=1", ""])
def test_an_override_of_another_form_is_shown_the_right_one(item):
    with pytest.raises(UserError) as refusal:
        override({}, [item])
    assert repr(item) in str(refusal.value)
    assert "rollout.group_size=8" in str(refusal.value)


@pytest.mark.parametrize("item", ["a=[1", "a=b: c: d", 'a="x', "a=@x", "a={b: 1, b: 2}"])
def test_an_override_with_an_unreadable_value_is_refused(item):
    with pytest.raises(UserError, match=r"unreadable value .* write key=value"):
        override({}, [item])


@pytest.mark.parametrize(("item", "words"), [("a.b.c=1", "a.b, which is 3"), ("l.0=2", r"l, which is \[1\]")])
def test_an_override_into_something_that_is_no_section_is_refused(item, words):
    with pytest.raises(UserError, match=f"{words} and not a section; set .*=... whole"):
        override({"a": {"b": 3}, "l": [1]}, [item])


# --- validation (its sentences: test_explain.py)


def test_the_sentence_of_a_refusal_opens_with_where_the_data_came_from():
    with pytest.raises(UserError, match=r"^my\.yaml: steps is"):
        validate(Run, {"steps": "x"}, where="my.yaml")
    with pytest.raises(UserError, match=r"^steps is"):
        validate(Run, {"steps": "x"})


class Crd(Strict):
    name: Literal["crd"] = "crd"
    beta: float = 0.0
    share: float = 0.0


class Nft(Strict):
    name: Literal["nft"] = "nft"
    beta: float = 0.0


class Dpo(Strict):
    name: Literal["dpo"] = "dpo"


class Near(Strict):
    name: Literal["near"] = "near"
    share_beta: float = 0.5


class Tagged(Strict):
    method: Crd | Nft | Dpo | Near = Field(discriminator="name")
    betas: float = 0.0
    shares: float = 0.0


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            {"name": "nft", "share": 1},
            r"^method\.share is a setting of crd, and method\.name is nft; leave it out, or ",
        ),
        ({"name": "dpo", "beta": 1}, r"beta is a setting of crd and nft, .* section whole, as method='\{name: dpo\}'$"),
        (
            {"name": "near", "share": 1},
            r"^method\.share is a setting of crd, and .* is near; did you mean method\.share_beta\? Else leave",
        ),
        ({"name": "dpo", "shore": 1}, "^unknown key method.shore .* did you mean shares"),
        ({"name": "spo", "beta": 1}, "^method.name is "),
        ({"name": ["crd"], "beta": 1}, "^method.name is "),
        ({"beta": 1}, "^key method.name is missing"),
        (3, "^method is 3"),
    ],
)
def test_a_setting_that_another_name_left_behind_is_told_as_such(method, words):
    with pytest.raises(UserError, match=words):
        validate(Tagged, {"method": method})


# --- recipes


@pytest.fixture
def recipes(tmp_path):
    for name in ("crd_micro", "crd_sd35", "drpo_turbo"):
        (tmp_path / f"{name}.yaml").write_text("")
    return tmp_path


def test_a_recipe_is_found_by_name_even_beside_a_file_of_that_name(recipes, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "crd_micro").write_text("")
    assert find_recipe("crd_micro", recipes) == recipes / "crd_micro.yaml"


def test_a_path_of_a_file_is_taken_as_it_is(recipes, tmp_path):
    mine = tmp_path / "mine.yml"
    mine.write_text("")
    assert find_recipe(str(mine), recipes) == mine


@pytest.mark.parametrize("name", ["crd_micor", "crd_micor.yaml", "some/where/crd_micor.yaml"])
def test_a_recipe_that_is_not_there_brings_up_the_nearest_ones(recipes, name):
    with pytest.raises(UserError, match=f"{name}.*did you mean crd_micro.*`trimtab recipes`"):
        find_recipe(name, recipes)


@pytest.mark.parametrize("name", ["zzz", "", "../secret"])
def test_a_recipe_like_no_other_brings_up_the_list(recipes, name):
    (recipes.parent / "secret.yaml").write_text("")
    with pytest.raises(UserError, match=f"{name}'; `trimtab recipes` lists"):
        find_recipe(name, recipes)
