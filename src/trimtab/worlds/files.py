"""Prompts from the user's own files: plain text, one a line, or JSONL with `prompt` and what a reward wants to know.

A folder holds `train.txt` or `train.jsonl`, and `test.*` beside it, as in Flow-GRPO. A sentence that the world blocks
can say gets its facts from there, so that the built-in rewards work on plain text as well.
"""

import json
from pathlib import Path
from typing import Any

from trimtab.batch import Prompts
from trimtab.errors import UserError
from trimtab.worlds import blocks
from trimtab.worlds.facts import validate_metadata

NUM_PER_TAG = {"train": 240, "test": 24}  # of the world blocks
FACTS = ("tag", "include", "exclude")  # GenEval's keys; null is as good as none, which tables with fixed columns write


def load_prompts(source: str, split: str = "train") -> Prompts:
    """The prompts of a split, "train" or "test", of `blocks`, a `.txt` or `.jsonl` file, or a folder of such files.

    A single file is both splits. Raises UserError, with the line, for whatever can't be used.
    """
    if source == "blocks":
        return _prompts([(line, "") for line in blocks.prompts(split, NUM_PER_TAG[split])])
    if not source.strip():
        raise UserError(f"prompts {source!r} name nothing; give 'blocks', a .txt or .jsonl file, or a folder of them.")
    path = _file(Path(source), split)
    lines = [(text, f"{path}, line {i}") for i, text in enumerate(_text(path).split("\n"), 1) if text.strip()]
    if not lines:
        raise UserError(f"prompt file {path} is empty; write one prompt a line.")
    read = _json_line if path.suffix == ".jsonl" else _text_line
    return _prompts([(read(text, where), where) for text, where in lines])


def _prompts(lines: list[tuple[dict[str, Any], str]]) -> Prompts:
    """Lines, and where each stands, or "" of blocks."""
    metadata, places = zip(*lines, strict=True)
    text = tuple(line["prompt"] for line in metadata)
    return Prompts(text, metadata, tuple(range(len(lines))), places if any(places) else ())


def _file(path: Path, split: str) -> Path:
    if path.is_dir():
        found = [path / f"{split}{ending}" for ending in ("_metadata.jsonl", ".jsonl", ".txt")]
        path = next((candidate for candidate in found if candidate.is_file()), found[-1])
    if not path.is_file():
        raise UserError(
            f"prompts {str(path)!r} do not exist; give 'blocks', a .txt or .jsonl file, or a folder of them."
        )
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompt file {path} ends in {path.suffix!r}; .txt (one prompt a line) and .jsonl can be read.")
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read ({error}); save it as UTF-8 text.") from error


def _text_line(text: str, where: str) -> dict[str, Any]:
    return _with_facts({"prompt": text.strip()})


def _json_line(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers and nesting without end are refused as well
        why = getattr(error, "msg", error)
        raise UserError(f"{where} is not JSON ({why}): {text[:60]!r}; write one JSON object a line.") from error
    if not isinstance(line, dict) or not isinstance(line.get("prompt"), str) or not line["prompt"].strip():
        raise UserError(f"{where} has no text under 'prompt': {text[:60]!r}; write an object with at least that key.")
    try:
        line["prompt"].encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has a prompt that is no text ({error.reason}); write it as UTF-8.") from error
    line = _with_facts({key: value for key, value in line.items() if value is not None or key not in FACTS})
    if "include" in line:
        validate_metadata(line, where)
    elif not isinstance(line.get("tag", ""), str):
        raise UserError(f"{where}: tag is {line['tag']!r}; expected a name, by which scores are told apart.")
    return line


def _with_facts(line: dict[str, Any]) -> dict[str, Any]:
    return line if "include" in line else (blocks.facts(line["prompt"]) or {}) | line
