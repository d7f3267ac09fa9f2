"""Pictures that somebody preferred to others for the same prompt, from the user's files.

JSONL, one comparison a line: `prompt`, `chosen` and `rejected`, each a picture's path from where the file lies, or a
list of paths. Parquet as Pick-a-Pic has it: `caption`, `jpg_0` and `jpg_1` (encoded pictures), and `label_0`, 1 where
the first is better, 0 where the second is, and 0.5 where neither, which teaches nothing and is left out.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.batch import Prompts
from trimtab.errors import UserError
from trimtab.worlds.pictures import BROKEN, CURE, OnError, Unusable, check_header, reason_of, some, square, text_of

logger = logging.getLogger(__name__)

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")  # of Pick-a-Pic
Source = tuple[str, Callable[[], bytes]]  # a picture's name, for messages, and how to get its file
Comparison = tuple[str, list[Source], list[Source]]  # prompt, chosen, rejected


@dataclass(frozen=True)
class Pairs:
    """P prompts and, by number, the pictures that are better and worse for each. Nothing is decoded before `read`."""

    prompts: Prompts  # P
    chosen: tuple[tuple[int, ...], ...]  # P of them
    rejected: tuple[tuple[int, ...], ...]  # P of them
    sources: tuple[Source, ...]
    folder: str  # of the file
    on_error: OnError = "stop"
    skipped: tuple[str, ...] = ()  # what was left out, and why

    def sha256(self) -> str:
        """Of the prompts and of which pictures are better and worse for each, by their names from the file's folder."""
        names = [os.path.relpath(name, self.folder) for name, _ in self.sources]
        sides = [[[names[n] for n in side] for side in column] for column in (self.chosen, self.rejected)]
        return hashlib.sha256(json.dumps([self.prompts.sha256(), sides]).encode()).hexdigest()

    def read(self, number: int, resolution: int) -> Tensor:
        """A picture (3, H, W), uint8 RGB, square, `resolution` pixels a side; Unusable if it is broken or gone."""
        name, content = self.sources[number]
        try:
            return square(content(), resolution)
        except BROKEN as error:
            raise Unusable(f"{name} cannot be read ({reason_of(error)})") from error


def load_pairs(source: str, on_error: OnError) -> Pairs:
    """The comparisons in a .jsonl or .parquet file, those of one prompt together.

    A line that can't be used is a UserError that names it, or with on_error="skip" is left out and told once. Of
    pictures in a JSONL file the headers are read, of those in a table nothing yet.
    """
    path = Path(source)
    readers = {".jsonl": _jsonl, ".parquet": _parquet}
    if not path.is_file():
        raise UserError(f"there is no file {source!r} of pairs; `trimtab pairs RUN` writes one.")
    if path.suffix not in readers:
        raise UserError(f"pairs {source!r} are no .jsonl or .parquet file; `trimtab pairs RUN` writes one.")
    comparisons: dict[str, list[tuple[list[Source], list[Source]]]] = {}
    skipped = []
    for line in readers[path.suffix](path):
        try:
            text, chosen, rejected = line()
        except Unusable as error:
            if on_error == "stop":
                raise UserError(f"{error}; {CURE}") from error
            skipped.append(str(error))
            continue
        comparisons.setdefault(text, []).append((chosen, rejected))
    found = {text: _agreeing(each) for text, each in comparisons.items()}
    skipped += [
        f"{text!r} has comparisons that reverse each other"
        for text, sides in found.items()
        if sum(map(len, sides)) < sum(len(side) for each in comparisons[text] for side in each)
    ]
    found = {text: sides for text, sides in found.items() if sides[0]}  # a draw has no side
    if not found:
        raise UserError(f"{path} holds no comparison that can be used{f' ({skipped[0]})' if skipped else ''}.")
    if skipped:
        logger.warning("%d comparisons in %s are left out: %s", len(skipped), path, some(skipped))
    return _numbered(found, str(path.parent), on_error, tuple(skipped))


def _agreeing(comparisons: list[tuple[list[Source], list[Source]]]) -> tuple[list[Source], list[Source]]:
    """Both sides of a prompt, without comparisons that another one reverses: to and fro is no direction."""
    said = {(a, b) for chosen, rejected in comparisons for a, _ in chosen for b, _ in rejected}
    sides: tuple[list[Source], list[Source]] = ([], [])
    for chosen, rejected in comparisons:
        sides[0].extend(a for a in chosen if any((b, a[0]) not in said for b, _ in rejected))
        sides[1].extend(b for b in rejected if any((b[0], a) not in said for a, _ in chosen))
    return sides


def _numbered(
    found: dict[str, tuple[list[Source], list[Source]]], folder: str, on_error: OnError, skipped: tuple[str, ...]
) -> Pairs:
    """A picture that comes twice has one number."""
    sources: dict[str, tuple[int, Source]] = {}
    columns: tuple[list, list] = ([], [])
    for sides in found.values():
        for column, side in zip(columns, sides, strict=True):
            column.append(tuple(sources.setdefault(name, (len(sources), (name, get)))[0] for name, get in side))
    texts = tuple(found)
    prompts = Prompts(texts, tuple({"prompt": text} for text in texts), tuple(range(len(texts))))
    in_order = tuple(source for _, source in sources.values())
    return Pairs(prompts, tuple(columns[0]), tuple(columns[1]), in_order, folder, on_error, skipped)


def usable_text(prompt: str, where: str) -> str:
    """A prompt without what is around it; Unusable for text that no tokenizer could read."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{where} has a prompt that is no text ({error.reason})") from error
    return prompt.strip()


# ---- JSONL


def _jsonl(path: Path) -> Iterator[Callable[[], Comparison]]:
    try:
        lines = text_of(path).split("\n")
    except Unusable as error:
        raise UserError(f"{error}; save it as UTF-8 text.") from error
    for number, text in enumerate(lines, 1):
        if text.strip():
            yield lambda text=text, number=number: _comparison(path, f"{path}, line {number}", text)


def _comparison(path: Path, where: str, text: str) -> Comparison:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{where} is not JSON ({error}): {text[:60]!r}") from error
    if not isinstance(line, dict) or not isinstance(line.get("prompt"), str) or not line["prompt"].strip():
        raise Unusable(f"{where} has no text under 'prompt': {text[:60]!r}")
    chosen, rejected = (_files(path.parent, where, line, side) for side in ("chosen", "rejected"))
    both = {name for name, _ in chosen} & {name for name, _ in rejected}
    if both:
        raise Unusable(f"{where} has {min(both)} on both sides")
    return usable_text(line["prompt"], where), chosen, rejected


def _files(folder: Path, where: str, line: dict[str, Any], side: str) -> list[Source]:
    names = [line[side]] if isinstance(line.get(side), str) else line.get(side)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise Unusable(f"{where} has no picture under {side!r}")
    paths = [os.path.normpath(folder / name) for name in names]
    for path in paths:
        check_header(path, where)
    return [(path, Path(path).read_bytes) for path in paths]


# ---- Parquet


def _parquet(path: Path) -> Iterator[Callable[[], Comparison]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow; install it with `pip install 'trimtab[parquet]'`.") from error
    try:
        file = parquet.ParquetFile(path)
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}; as Pick-a-Pic it has {', '.join(COLUMNS)}.")
        table = file.read(columns=["caption", "label_0"])
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no table that can be read ({error}); fetch it again.") from error
    rows = _Rows(file)
    for number, (caption, label) in enumerate(zip(*(c.to_pylist() for c in table.columns), strict=True)):
        yield lambda n=number, c=caption, first=label: _row(rows, f"{path}, row {n}", n, c, first)


def _row(rows: "_Rows", where: str, number: int, caption: Any, first: Any) -> Comparison:
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable(f"{where} has an empty caption")
    if first not in (0, 0.5, 1):
        raise Unusable(f"{where} has label_0 {first!r}, which is none of 0, 0.5 and 1")
    text = usable_text(caption, where)
    if first == 0.5:
        return text, [], []
    sides = [[(f"{where}, {name}", lambda name=name: rows.picture(number, name))] for name in ("jpg_0", "jpg_1")]
    return text, *(sides if first else reversed(sides))


class _Rows:
    """Pictures of a table by row; a few groups of rows are held, for neighbours are asked for together."""

    def __init__(self, file: Any):
        self.file = file
        self.starts = [0]
        for group in range(file.num_row_groups):
            self.starts.append(self.starts[-1] + file.metadata.row_group(group).num_rows)
        self.column: Callable[[int, str], Any] = lru_cache(maxsize=4)(self._column)

    def picture(self, row: int, name: str) -> bytes:
        group = sum(start <= row for start in self.starts[1:])
        found = self.column(group, name)[row - self.starts[group]].as_py()
        if isinstance(found, dict):  # an image of the datasets library
            found = found.get("bytes")
        if not isinstance(found, bytes):
            raise ValueError("there is none")
        return found

    def _column(self, group: int, name: str) -> Sequence[Any]:
        return self.file.read_row_group(group, columns=[name]).column(0)
