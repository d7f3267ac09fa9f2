"""The house of the design: who may import whom, how large things may grow, and a README that names every file."""

import ast
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "trimtab"
FILES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Our own modules that a file names in an import anywhere, as `methods.crd`; those only for type checkers aside."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "trimtab":
            module = node.module.removeprefix("trimtab").lstrip(".")
            names |= {f"{module}.{alias.name}".lstrip(".") for alias in node.names} if node.names else {module}
        if isinstance(node, ast.Import):
            names |= {a.name.removeprefix("trimtab.") for a in node.names if a.name.startswith("trimtab.")}
    return names


def tree_of_readme() -> list[str]:
    """Paths in the README's file tree: two spaces an indent, a folder ends in a slash."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```\n(src/trimtab/\n.*?)```", text, re.DOTALL).group(1)
    stack, paths = [], []
    for line in filter(str.strip, block.splitlines()):
        indent, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        stack = [*stack[:indent], name.rstrip("/")]
        if not name.endswith("/"):
            paths.append("/".join(stack))
    return paths


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_from_those_that_the_readme_lists_above_it(path):
    rooms = [name.split("/")[2].removesuffix(".py") for name in tree_of_readme() if name.startswith("src/trimtab/")]
    rank = {name: place for place, name in enumerate(dict.fromkeys(rooms))}
    if room(path) in ("__init__", "__main__"):
        return
    below = {name for name in imported(path) if rank.get(name.split(".")[0], -1) > rank[room(path)]}
    assert not below


@pytest.mark.parametrize("path", sorted((SOURCE / "methods").glob("*.py")), ids=lambda p: p.name)
def test_a_method_imports_no_other_method(path):
    assert not {name for name in imported(path) if name.split(".")[0] == "methods"}


def test_learner_and_checkpoint_know_no_method():
    for name in ("learner", "checkpoint"):
        assert not {n for n in imported(SOURCE / f"{name}.py") if n.split(".")[0] == "methods"}


def functions() -> list[tuple[int, str]]:
    return [
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(SOURCE)}:{node.name}")
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_functions_are_short():
    lengths = functions()
    assert statistics.mean(n for n, _ in lengths) <= 15
    assert not [name for n, name in lengths if n > 60]


def test_files_are_short():
    assert not [str(path) for path in FILES if len(path.read_text().splitlines()) > 400]


def depth(node: ast.AST, above: int = 0) -> int:
    """How deep loops, conditions and the like nest; an `elif` is no deeper than its `if`."""
    deepest = above
    for child in ast.iter_child_nodes(node):
        nests = isinstance(child, ast.For | ast.While | ast.If | ast.With | ast.Try)
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        if not isinstance(child, ast.FunctionDef | ast.ClassDef):
            deepest = max(deepest, depth(child, above + (nests and not is_elif)))
    return deepest


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nesting_is_shallow(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert depth(node) <= 3, node.name


def test_no_pickle_and_no_bare_assert():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Assert)], path
        assert not re.search(r"torch\.(load|save)\(|import pickle", path.read_text()), path


def test_the_tree_in_the_readme_is_the_tree():
    kept = [SOURCE, ROOT / "benchmarks", ROOT / "docs"]
    here = {
        str(path.relative_to(ROOT))
        for folder in kept
        for path in folder.rglob("*")
        if path.suffix in (".py", ".yaml", ".html", ".css", ".md") and "results" not in path.parts
    }
    here -= {str(path.relative_to(ROOT)) for path in FILES if path.name in ("__init__.py", "__main__.py")}
    shown = {path for path in tree_of_readme() if not path.endswith("__init__.py")}
    assert shown == here


def test_every_room_with_a_test_file_tests_something_that_exists():
    names = (
        {path.stem for path in FILES}
        | {path.parent.name for path in FILES}
        | {"house", "cli_errors", "resume", "distillation", "one_step"}
    )
    for test in (ROOT / "tests").glob("test_*.py"):
        assert test.stem.removeprefix("test_") in names, test
