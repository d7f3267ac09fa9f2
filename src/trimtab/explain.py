"""What is wrong with a config, in one sentence: the key, what it holds, what it may hold, what to do.

pydantic says where an error is (a path of keys, list indices and labels of union members) and of which kind. The rest
is read off the model: the annotation at that place gives the type, the range and the choices in words, and the names
of all sections give the nearest known key, here or elsewhere. Nothing in this file knows a concrete section.
"""

import difflib
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError

_ABSENT = object()  # the value of a key that the data do not have


class _Place(NamedTuple):
    keys: tuple[str | int, ...]
    kind: Any  # the annotation there; None for an unknown key
    value: Any


def explain(model: type[BaseModel], data: dict, error: ValidationError) -> str:
    """The first error as a sentence, and the keys of the others. `data` is what `model` refused, as JSON types.

    Unknown keys come first: a misspelt key also makes the right one missing.
    """
    errors = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    places = [_place(model, data, _location(each)) for each in errors]
    names = list(dict.fromkeys(_dotted(place.keys) for place in places))  # a union errs once per member at one place
    others = f" (also wrong: {len(names) - 1} more, {', '.join(names[1:])})" if names[1:] else ""
    return _sentence(model, data, errors[0], places[0]) + others


def show(value: Any) -> str:
    """A value as one writes it in YAML or JSON, cut after 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _sentence(model: type[BaseModel], data: dict, error: dict, place: _Place) -> str:
    name = _dotted(place.keys)
    if place.value is _ABSENT:
        return f"key {name} is missing; add it, expected {_words(place.kind)}"
    given = show(place.value)
    if error["type"] == "extra_forbidden":
        return f"unknown key {name} (given {given}); {_spaced(place) or _nearest_key(model, data, place.keys)}"
    if error["type"] == "value_error":  # raised by a validator of ours, whose message is a whole sentence
        subject = f"{name} is {given}" if not isinstance(place.value, dict) else name
        return f"{subject}: {error['ctx']['error']}"
    if error["loc"][-1:] == ("[key]",):
        return f"{name} has a wrong name; {_lower(error['msg'])}, rename it"
    tag, tags = _tags(place.kind)
    if isinstance(place.value, str) and place.value in tags:
        return f"{name} is {given} and should be a section; write {name}='{{{tag}: {place.value}}}'"
    cure = _cure(error, place) or _joined(model, data, place)
    return f"{name} is {given}; expected {_expected(error, place.kind)}{cure}"


def _dotted(keys: tuple[str | int, ...]) -> str:
    return ".".join(map(str, keys)) or "the config"


def _expected(error: dict, kind: Any) -> str:
    """What the key may hold; for the rarer rules (length, pattern) in pydantic's words too."""
    words = _words(kind)
    if error["type"] == "finite_number":
        return words.replace("a number", "a finite number")
    rare = error["type"].startswith(("too_", "string_too", "string_pattern", "json_"))
    return f"{words} ({_lower(error['msg'])})" if rare else words


def _cure(error: dict, place: _Place) -> str:
    """The way out of the usual slips: quotes too many or too few, no space after a colon, a misspelt choice."""
    wanted, value = error["type"], place.value
    if wanted in ("int_type", "float_type") and type(_unquoted(_after_colon(place))) in (int, float):
        return f"; {_spaced(place)}"
    if wanted == "string_type" and isinstance(value, int | float):
        return f', put it in quotes: "{show(value)}"'
    if wanted == "int_type" and isinstance(value, float) and value.is_integer():
        return f", write {int(value)}"
    if not isinstance(value, str):
        return ""
    if type(_unquoted(value)) in {"int_type": (int,), "float_type": (int, float), "bool_type": (bool,)}.get(wanted, ()):
        return f", write {value} without quotes"
    choices = _choices(place.kind) or _tags(place.kind)[1]
    near = difflib.get_close_matches(value, [choice for choice in choices if isinstance(choice, str)], n=1)
    return f"; did you mean {show(near[0])}?" if near else ""


def _after_colon(place: _Place) -> str:
    """What stands after the last colon of a key without a value: YAML reads `{name:1}` as a name `name:1`."""
    return str(place.keys[-1]).rpartition(":")[2] if place.value is None and ":" in str(place.keys[-1]) else ""


def _spaced(place: _Place) -> str:
    """The cure of `{name:1}`; "" if that is not the matter."""
    value = _after_colon(place)
    entry = f"{str(place.keys[-1]).removesuffix(f':{value}')}: {value}"
    whole = f"{_dotted(place.keys[:-1])}='{{{entry}}}'" if place.keys[1:] else entry
    return f"put a space after the colon, as in {whole}" if value else ""


def _joined(model: type[BaseModel], data: dict, place: _Place) -> str:
    """The cure of `section.file.py:name=1`, whose dots open sections where one name was meant; "" if it is not that."""
    *parents, name = place.keys or ("",)
    in_mapping = any(get_origin(member) is dict for member in _members(_place(model, data, tuple(parents)).kind))
    value = place.value
    if not in_mapping or not isinstance(value, dict) or not value:
        return ""
    while isinstance(value, dict) and value:
        key, value = next(iter(value.items()))
        name = f"{name}.{key}"
    return f"; for a name with dots write it whole, as in {_dotted(tuple(parents))}='{{{name}: {show(value)}}}'"


def _unquoted(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


# --- the nearest known key


def _nearest_key(model: type[BaseModel], data: dict, keys: tuple[str | int, ...]) -> str:
    """Where an unknown key may belong: the same name in another section, a like name here or elsewhere."""
    *parents, name = keys
    known = list(dict.fromkeys(_all_keys(model, data)))
    if "." in name and name in known:
        return f"a dot opens no section in a file, write {name.replace('.', ': {')}: ...{'}' * name.count('.')}"
    section = _place(model, data, tuple(parents))
    here = [field for member in _models(section.kind, section.value) for field in member.model_fields]
    best_here = difflib.get_close_matches(name, here, n=1)
    best = difflib.get_close_matches(name, [_leaf(key) for key in known] + here, n=1)
    near = [key for key in known if _leaf(key) in best] if best != best_here else []
    near += [_dotted((*parents, field)) for field in best_here]
    return f"did you mean {' or '.join(near[:3])}?" if near else f"expected one of {', '.join(here) or 'no keys'}"


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _all_keys(model: type[BaseModel], data: Any, prefix: str = "", above: tuple[type, ...] = ()) -> Iterator[str]:
    """The dotted name of every key that `model` knows, sections included. `above` stops a model that holds itself."""
    for name in model.model_fields:
        yield prefix + name
        value = data.get(name) if isinstance(data, dict) else None
        for member in _models(_field_kind(model, name), value):
            if member not in (*above, model):
                yield from _all_keys(member, value, f"{prefix}{name}.", (*above, model))


# --- where an error is


def _place(model: type[BaseModel], data: Any, location: tuple[str | int, ...]) -> _Place:
    """Follows a location of pydantic through model and data, leaving out its labels of union members and the like."""
    keys, kind, value = [], model, data
    for part in location:
        given = (isinstance(value, dict) and part in value) or (isinstance(value, list) and part in range(len(value)))
        known = isinstance(part, int) or any(part in member.model_fields for member in _models(kind, value))
        if given or known:
            keys.append(part)
            kind, value = _child_kind(kind, part, value), value[part] if given else _ABSENT
    return _Place(tuple(keys), kind, value)


def _location(error: dict) -> tuple[str | int, ...]:
    """pydantic's location; where the tag of a union is wrong or missing, that of the key which holds the tag."""
    if error["type"].startswith("union_tag"):
        return (*error["loc"], error["ctx"]["discriminator"].strip("'"))
    return error["loc"]


def _child_kind(kind: Any, part: str | int, value: Any) -> Any:
    """The annotation of one key or item under `kind`, None if it has none."""
    kinds = [_field_kind(member, part) for member in _models(kind, value) if part in member.model_fields]
    for member in _members(kind):
        origin, args = get_origin(member), get_args(member)
        if origin is dict:
            kinds.append(args[1])
        elif origin is tuple and isinstance(part, int) and args[-1] is not Ellipsis:
            kinds.append(args[min(part, len(args) - 1)])
        elif origin in (list, tuple, set, frozenset):
            kinds.append(args[0])
    return _union(kinds) if kinds else None


def _field_kind(model: type[BaseModel], name: str) -> Any:
    field = model.model_fields[name]
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _union(kinds: list) -> Any:
    return Union[tuple(kinds)]  # noqa: UP007 (there is no X | Y over a list)


def _members(kind: Any) -> list:
    """The alternatives of an annotation, the metadata of the whole left off."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [member for part in get_args(kind) for member in _members(part)]
    return [kind]


def _models(kind: Any, value: Any) -> list[type[BaseModel]]:
    """The models among the alternatives; where some agree with the tags that `value` gives, only those."""
    found = [member for member in _members(kind) if isinstance(member, type) and issubclass(member, BaseModel)]
    return [member for member in found if _tags_agree(member, value)] or found


def _tags_agree(model: type[BaseModel], value: Any) -> bool:
    if not isinstance(value, dict):
        return True
    tags = {name: _choices(_field_kind(model, name)) for name in model.model_fields if name in value}
    return all(value[name] in choices for name, choices in tags.items() if choices)


def _tags(kind: Any) -> tuple[str, list]:
    """The key that tells the models of a union apart, and what it holds in each; "" and none if there is no such."""
    models = [] if kind is None else _models(kind, None)
    for name in models[0].model_fields if len(models) > 1 else ():
        choices = [_choices(_field_kind(model, name)) if name in model.model_fields else [] for model in models]
        if all(len(each) == 1 for each in choices):
            return name, [each[0] for each in choices]
    return "", []


def _choices(kind: Any) -> list:
    return [choice for member in _members(kind) if get_origin(member) is Literal for choice in get_args(member)]


# --- an annotation in words

_SCALARS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    type(None): "null",
}
_BOUNDS = {
    annotated_types.Gt: (">", "gt"),
    annotated_types.Ge: (">=", "ge"),
    annotated_types.Lt: ("<", "lt"),
    annotated_types.Le: ("<=", "le"),
    annotated_types.MultipleOf: ("divisible by", "multiple_of"),
}


def _words(kind: Any) -> str:
    """`Annotated[int, Ge(2)] | None` is 'an integer >= 2 or null'."""
    if get_origin(kind) is Annotated:
        return _bounded_words(*get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        tag, tags = _tags(kind)
        if tags:
            return f"a section whose {tag} is one of {', '.join(map(show, tags))}"
        literals = [part for part in get_args(kind) if get_origin(part) is Literal]
        merged = [Literal[tuple(_choices(_union(literals)))]] if literals else []
        return " or ".join(_words(part) for part in merged + [part for part in get_args(kind) if part not in literals])
    return _SCALARS.get(kind) or _container_words(kind)


def _bounded_words(kind: Any, *metadata: Any) -> str:
    rules = [rule for item in metadata for rule in getattr(item, "metadata", [item])]  # a Field(...) holds a list
    bounds = [
        f"{_BOUNDS[type(rule)][0]} {getattr(rule, _BOUNDS[type(rule)][1])}" for rule in rules if type(rule) in _BOUNDS
    ]
    bare = [member for member in _members(kind) if member is not type(None)]
    words = " ".join([_words(_union(bare)), " and ".join(bounds)]).rstrip()
    return words if type(None) not in _members(kind) else f"{words} or null"


def _container_words(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(show(choice) for choice in args)}"
    if origin is dict:
        return f"a mapping from names to {_words(args[1])}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list [{', '.join(_words(arg) for arg in args)}]"
    if origin in (list, tuple, set, frozenset):
        return f"a list, each item {_words(args[0])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a section (keys: {', '.join(kind.model_fields)})"
    return f"a value of type {getattr(kind, '__name__', kind)}"
