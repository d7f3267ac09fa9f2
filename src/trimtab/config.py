"""Configuration: strict pydantic models, filled from a YAML file and `a.b=c` overrides, refused in plain English.

A run's settings travel one road: `load_yaml` -> `override` -> `validate` -> a frozen model -> `dump`. Validation goes
through pydantic's JSON mode, because there strictness means what a YAML author expects: '3' is not an integer, but a
list fills a tuple. Whatever is wrong becomes one sentence: which key, what it holds, what it may hold, what to do.

YAML is read by the core schema of YAML 1.2: `1e-4` and `1_000` are numbers; `on`, `no`, `12:30` and `2026-01-01` are
words (PyYAML follows YAML 1.1, where 1e-4 is a word, `no` is false and 12:30 is 750). Only JSON's types exist.
"""

import copy
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.errors import UserError
from trimtab.explain import explain, show

ModelT = TypeVar("ModelT", bound=BaseModel)
RECIPES = Path(__file__).parent / "recipes"  # the built-in ones


class Strict(BaseModel):
    """Base of every section of a config: frozen, complete, no conversions, no unknown keys, no nan and no inf.

    Write a path as `str`: pydantic's JSON mode refuses a default that is a `Path`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


# --- YAML in and out

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = [
    (_TAG + "null", re.compile(r"(~|null|Null|NULL|)\Z")),
    (_TAG + "bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")),
    (_TAG + "int", re.compile(r"[-+]?[0-9]+(_[0-9]+)*\Z")),
    (_TAG + "float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")),
    (_TAG + "float", re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")),
]


def _scalar(convert):
    """A constructor that reports text which `convert` refuses (as in `!!int x`) together with its line."""

    def construct(loader: yaml.SafeLoader, node: yaml.ScalarNode):
        text = loader.construct_scalar(node)
        try:
            return convert(text)
        except (ValueError, KeyError):
            problem = f"cannot read {text[:40]!r} as {node.tag.removeprefix(_TAG)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    return construct


def _text(text: str) -> str:
    text.encode()  # half a surrogate pair, as in "\ud800", raises a ValueError here and would fail in JSON later
    return text


def _float(text: str) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    """A dict of a mapping node. A key given twice is an error here; PyYAML lets the last one win in silence."""
    data = loader.construct_mapping(node, deep=True)  # first, since it refuses a node that only claims to be a mapping
    first_line: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in first_line:
            problem = f"key {key.value!r} is given twice, first on line {first_line[key.value]}"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        first_line[key.value] = key.start_mark.line + 1
    return data


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {None: _CORE_SCHEMA}  # noqa: RUF012 (None: tried whatever the first letter is)
    yaml_constructors = {  # noqa: RUF012
        _TAG + "null": lambda loader, node: None,
        _TAG + "bool": _scalar(lambda text: {"true": True, "false": False}[text.lower()]),
        _TAG + "int": _scalar(int),
        _TAG + "float": _scalar(_float),
        _TAG + "str": _scalar(_text),
        _TAG + "seq": lambda loader, node: loader.construct_sequence(node, deep=True),
        _TAG + "map": _mapping,
        None: yaml.SafeLoader.construct_undefined,
    }


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Unicode's own line breaks in double quotes, where they are escaped; elsewhere PyYAML loses them."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style)


class _Dumper(yaml.SafeDumper):
    yaml_representers = {**yaml.SafeDumper.yaml_representers, str: _text_node}  # noqa: RUF012
    # Both schemas: a string that YAML 1.1 or 1.2 would read as something else is quoted, so that any reader agrees.
    yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _CORE_SCHEMA}  # noqa: RUF012


def _problem(error: Exception) -> str:
    """What PyYAML found wrong, without its drawing of the place."""
    return getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"


def _line(error: Exception, text: str) -> int:
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); expected a YAML file, check the name") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; expected a YAML file, save it as UTF-8") from error


def load_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. UserError, with the line, for a file that is missing, empty or not such a mapping."""
    text = _read_text(Path(path))
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:  # nesting without end
        cure = "correct this line (each key once, `key: value`, spaces and no tabs for the indent)"
        raise UserError(f"{path}, line {_line(error, text)}: {_problem(error)}; {cure}") from error
    if data is None:
        raise UserError(f"{path}, line 1: the file is empty; expected lines `key: value`, copy a recipe to start from")
    if not isinstance(data, dict):
        raise UserError(f"{path}, line 1: the file holds {show(data)}; expected a mapping, write lines `key: value`")
    return data


def dump(model: BaseModel) -> str:
    """YAML text with every key of `model`, defaults included; read back and validated it equals `model`."""
    return yaml.dump(model.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# --- overrides and recipes

_OVERRIDE = re.compile(r"(?P<key>[^\s.=-][^\s.=]*(\.[^\s.=]+)*)=(?P<value>.*)", re.DOTALL)


def override(data: dict, overrides: Sequence[str]) -> dict:
    """A copy of `data` with each `a.b=c` written into it, in order; c is read as YAML, and nothing after = is null.

    Missing sections are made, and `validate` judges them. A section that is null counts as missing.
    """
    data = copy.deepcopy(data)
    for item in overrides:
        match = _OVERRIDE.fullmatch(item)
        if match is None:
            raise UserError(f"override {item!r} is not of the form key=value; write it like rollout.group_size=8")
        *parents, last = match["key"].split(".")
        section = data
        for depth, name in enumerate(parents, 1):
            section = _section(section, name, ".".join(parents[:depth]), item)
        section[last] = _override_value(item, match["value"])
    return data


def _section(parent: dict, name: str, key: str, item: str) -> dict:
    if parent.get(name) is None:
        parent[name] = {}
    if not isinstance(parent[name], dict):
        given = show(parent[name])
        raise UserError(f"override {item!r} goes into {key}, which is {given} and not a section; set {key}=... whole")
    return parent[name]


def _override_value(item: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        form = "write key=value with a YAML value, text with special characters in quotes, like prompt='\"a: b\"'"
        raise UserError(f"override {item!r} has an unreadable value ({_problem(error)}); {form}") from error


def find_recipe(name: str, recipe_dir: Path) -> Path:
    """The file of the built-in recipe `name`, or else the YAML file at the path `name`."""
    recipes = {path.stem: path for path in sorted(recipe_dir.glob("*.yaml"))}
    if name in recipes:
        return recipes[name]
    if Path(name).is_file():
        return Path(name)
    stem = Path(name).stem
    longer = [each for each in recipes if stem and each.startswith(stem)]
    near = longer or difflib.get_close_matches(stem, recipes, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"no recipe or YAML file {name!r}; {hint}`trimtab recipes` lists the built-in ones")


# --- validation


def validate(model: type[ModelT], data: dict, where: str = "") -> ModelT:
    """An instance of `model` from `data` as `load_yaml` and `override` return it.

    `where` (a file's name, say) opens the sentence of the UserError.
    """
    text = json.dumps(data)
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        data = json.loads(text)
        sentence = explain(model, data, error)
        if "unknown key" in sentence:  # no help where a section's tag was changed, and the key belongs to another
            sentence = _of_another_choice(model, data) or sentence
        raise UserError(f"{where}: {sentence}" if where else sentence) from error


def _of_another_choice(model: type[BaseModel], data: dict) -> str:
    """What is wrong where a section's tag was changed and its other keys were not; "" if that is not the matter."""
    for section, field in model.model_fields.items():
        tag, given = field.discriminator, data.get(section)
        if not tag or not isinstance(given, dict) or not isinstance(given.get(tag), str):
            continue
        known = [each.model_fields for each in get_args(field.annotation)]
        choices = {get_args(fields[tag].annotation)[0]: fields for fields in known}
        for key in given if given[tag] in choices else ():
            others = [name for name, fields in choices.items() if key in fields]
            if others and given[tag] not in others:
                near = difflib.get_close_matches(key, choices[given[tag]], n=2)
                rename = f"did you mean {' or '.join(f'{section}.{name}' for name in near)}? Else " if near else ""
                return (
                    f"{section}.{key} is a setting of {' and '.join(others)}, and {section}.{tag} is {given[tag]}; "
                    f"{rename}leave it out, or give the section whole, as {section}='{{{tag}: {given[tag]}}}'"
                )
    return ""
