"""Facts about a prompt in GenEval's own JSONL schema: what must be seen and what must not.

A line has a `tag`, a list of `include` clauses that must all hold (`class`, `count`, maybe `color`, maybe
`position: [relation, number of an earlier clause]`), and maybe a list of `exclude` clauses (`class`, `count`).
"""

from collections import Counter

from trimtab.errors import UserError

RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 16  # of one class
_EXAMPLE = '{"class": "dog", "count": 1}'


def number_of_each(include: list[dict]) -> Counter:
    """How many objects of each class the clauses ask for together."""
    asked = Counter()
    for clause in include:
        asked[clause["class"]] += clause["count"]
    return asked


def validate_metadata(metadata: dict, where: str) -> None:
    """Checks one GenEval line before anything is loaded; `where` ('prompts.jsonl, line 3') begins the UserError.

    Rejected as well: lines that no image can satisfy, and keys nobody reads inside a clause (mostly misspelt ones).
    """
    if not isinstance(metadata.get("tag"), str) or not metadata["tag"]:
        raise UserError(f"{where}: tag is {metadata.get('tag')!r}; expected a name such as 'counting' or 'colors'.")
    include, exclude = _clauses(metadata, "include", where), _clauses(metadata, "exclude", where)
    if not include:
        raise UserError(f"{where}: include is missing or empty; list at least one clause, as {_EXAMPLE}.")
    for number, clause in enumerate(include):
        _validate_clause(clause, {"class", "count", "color", "position"}, f"{where}: include[{number}]")
        _validate_attributes(clause, number, f"{where}: include[{number}]")
    for number, clause in enumerate(exclude):
        _validate_clause(clause, {"class", "count"}, f"{where}: exclude[{number}]")
    _validate_together(include, exclude, where)


def _clauses(metadata: dict, key: str, where: str) -> list:
    clauses = metadata.get(key) or []
    if not isinstance(clauses, list):
        raise UserError(f"{where}: {key} is {clauses!r}; expected a list of clauses, as [{_EXAMPLE}].")
    return clauses


def _validate_clause(clause: object, keys: set[str], where: str) -> None:
    if not isinstance(clause, dict) or not keys >= set(clause):
        raise UserError(f"{where} is {clause!r}; expected an object with no other keys than {', '.join(sorted(keys))}.")
    name, count = clause.get("class"), clause.get("count")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}.class is {name!r}; expected the name of an object, as in {_EXAMPLE}.")
    if type(count) is not int or count < 1:
        raise UserError(f"{where}.count is {count!r}; expected a whole number of at least 1, as in {_EXAMPLE}.")


def _validate_attributes(clause: dict, number: int, where: str) -> None:
    """An absent `color` or `position` and a null one mean the same: tables with fixed columns write the latter."""
    colour, position = clause.get("color"), clause.get("position")
    if colour is not None and (not isinstance(colour, str) or not colour):
        raise UserError(f"{where}.color is {colour!r}; expected the name of a colour, or leave it out.")
    match position:
        case None:
            return
        case [relation, int(target)] if relation in RELATIONS and 0 <= target < number:
            return
    expected = f"[relation, number of an earlier clause from 0], the relation one of: {', '.join(RELATIONS)}"
    raise UserError(f"{where}.position is {position!r}; expected {expected}.")


def _validate_together(include: list[dict], exclude: list[dict], where: str) -> None:
    asked = number_of_each(include)
    for name, count in asked.items():
        if count >= MAX_OBJECTS:
            most = MAX_OBJECTS - 1  # reading stops at MAX_OBJECTS, which may then be more
            raise UserError(f"{where}: asks for {count} {name!r}; no more than {most} of a class can be counted.")
    for clause in exclude:
        if clause["count"] <= asked[clause["class"]]:
            both = f"asks for {asked[clause['class']]} {clause['class']!r} and excludes {clause['count']} or more"
            raise UserError(f"{where}: {both}, which no image satisfies; change one of the two.")
    placed = {i for n, clause in enumerate(include) if clause.get("position") for i in (n, clause["position"][1])}
    for name in {include[i]["class"] for i in placed}:
        colours = [clause.get("color") for clause in include if clause["class"] == name]
        if len(colours) > 1 and len({*colours} - {None}) < len(colours):
            what = f"a position involves {name!r}, which {len(colours)} clauses name"
            raise UserError(f"{where}: {what}; give each of them its own color so that they can be told apart.")
