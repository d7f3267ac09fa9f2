"""Pictures with captions: scenes of the world blocks, drawn when they are asked for, or a folder of the user's own.

A folder, at any depth, has either of two layouts. If there is a `metadata.jsonl`, its lines are the pictures: each
names one (`file_name`, from where the file lies) and says what is in it (`text`, as the datasets library has it, or
else `caption`, or else `prompt`); a list of texts is several captions. Without one, a `.txt` of the same name lies
beside each picture, a caption a line.
"""

import io
import json
import logging
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from trimtab.errors import UserError
from trimtab.worlds import blocks

logger = logging.getLogger(__name__)

OnError = Literal["skip", "stop"]
CURE = "mend it, or leave such pictures out with data.on_error=skip."

NUM_PER_TAG = 4_000  # scenes of the world blocks; the small tags repeat their captions under other scenes
METADATA = "metadata.jsonl"
COLUMNS = ("text", "caption", "prompt")  # the first that a line has
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # as Pillow says it
NUM_SHOWN = 3  # of what was left out


class Unusable(Exception):
    """Which picture can't be used and why; no cure is named."""


@dataclass(frozen=True)
class Pictures:
    """N pictures, each with its captions. Nothing is decoded before `read`."""

    captions: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]  # for messages
    content: Callable[[int], bytes]  # a picture's file
    meaning: Callable[[str], str]  # equal for captions that are not to be told apart
    on_error: OnError = "stop"
    skipped: tuple[str, ...] = ()  # what was left out, and why

    def __len__(self) -> int:
        return len(self.captions)

    def data(self, index: int) -> bytes:
        """The file of a picture; Unusable if there is none any more."""
        try:
            return self.content(index)
        except OSError as error:
            raise Unusable(f"{self.names[index]} cannot be read ({error.strerror})") from error

    def decode(self, index: int, data: bytes, resolution: int) -> Tensor:
        """The picture in a file (3, H, W), uint8 RGB, square, `resolution` pixels a side; Unusable if it is broken."""
        try:
            return square(data, resolution)
        except BROKEN as error:
            raise Unusable(f"{self.names[index]} cannot be decoded ({reason_of(error)})") from error

    def read(self, index: int, resolution: int) -> Tensor:
        """`decode` of `data`."""
        return self.decode(index, self.data(index), resolution)


def square(data: bytes, resolution: int) -> Tensor:
    """An encoded picture as its EXIF turns it, on white, its middle square resized bicubically: (3, H, W) uint8."""
    with _opened(io.BytesIO(data)) as image:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_pictures(source: str, on_error: OnError) -> Pictures:
    """The captioned pictures of `blocks`, drawn from the side of its train prompts, or of a folder.

    A picture that can't be used (broken by its header, missing, named twice, without a caption) is a UserError that
    names it, or with on_error="skip" is left out and told once. Reads headers only: a file may still prove broken.
    """
    if source == "blocks":
        return _blocks()
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"pictures {source!r} are no folder; give 'blocks', or a folder of pictures with captions.")
    entries = _entries(folder)
    found: dict[str, tuple[str, ...]] = {}
    skipped: list[str] = []
    for entry in entries:
        try:
            found |= _checked(found, *entry())
        except Unusable as error:
            if on_error == "stop":
                raise UserError(f"{error}; {CURE}") from error
            skipped.append(str(error))
    if not found:
        raise UserError(f"none of the {len(entries)} pictures in {folder} can be used ({skipped[0]}); mend them.")
    if skipped:
        logger.warning("%d of %d pictures in %s are left out: %s", len(skipped), len(entries), folder, some(skipped))
    paths = tuple(found)
    return Pictures(tuple(found.values()), paths, partial(_file, paths), normalised, on_error, tuple(skipped))


def normalised(caption: str) -> str:
    """A caption's words, whatever their case and spacing."""
    return " ".join(caption.casefold().split())


# ---- the world blocks


def _blocks() -> Pictures:
    lines = blocks.prompts("train", NUM_PER_TAG)
    captions = tuple((line["prompt"],) for line in lines)
    names = tuple(f"scene {i} of blocks" for i in range(len(lines)))
    blocks.distance_fields()  # once, before there are workers
    return Pictures(captions, names, partial(_drawn, lines), _phrase)


def _drawn(lines: Sequence[dict], index: int) -> bytes:
    """The scene of a number as a BMP file, which costs nothing to write."""
    scene = blocks.scene(lines[index], np.random.default_rng([2028, index]))
    pixels = (blocks.draw([scene])[0] * 255).round().to(torch.uint8).permute(1, 2, 0)  # (H, W, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "BMP")
    return file.getvalue()


def _phrase(caption: str) -> str:
    """What a caption of this world says, whatever its opening."""
    return blocks.phrase(blocks.facts(caption))


# ---- folders


def _entries(folder: Path) -> list[partial]:
    """One for each picture that the folder claims to have; called, it gives the path, its place and its captions."""
    files = sorted(path for path in folder.rglob("*") if _is_shown(path.relative_to(folder)))
    tables = [path for path in files if path.name == METADATA]
    pictures = [path for path in files if path.suffix.lower() in ENDINGS and path.is_file()]
    if tables:
        lines = [(table, number, line) for table in tables for number, line in enumerate(_lines(table), 1)]
        entries = [partial(_line, *line) for line in lines if line[2].strip()]
    elif any(path.with_suffix(".txt").is_file() for path in pictures):
        entries = [partial(_beside, path) for path in pictures]
    else:
        found = f"{len(pictures)} pictures, but no captions" if pictures else "no pictures"
        raise UserError(f"folder {folder} has {found}; add {METADATA}, or a .txt beside each picture.")
    if not entries:
        raise UserError(f"{tables[0]} is empty; write a line with file_name and text for each picture.")
    return entries


def _is_shown(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _lines(table: Path) -> list[str]:
    try:
        return text_of(table).split("\n")  # splitlines would also split at signs that JSON has inside a text
    except Unusable as error:
        raise UserError(f"{error}; save it as UTF-8 text.") from error


def _line(table: Path, number: int, text: str) -> tuple[Path, str, tuple[str, ...]]:
    where = f"{table}, line {number}"
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or a number or nesting without end
        raise Unusable(f"{where} is not JSON ({error}): {text[:60]!r}") from error
    if not isinstance(line, dict) or not isinstance(line.get("file_name"), str):
        raise Unusable(f"{where} has no text under 'file_name': {text[:60]!r}")
    said = next((line[column] for column in COLUMNS if line.get(column) is not None), None)
    return table.parent / line["file_name"], where, _captions([said] if isinstance(said, str) else said, where)


def _beside(path: Path) -> tuple[Path, str, tuple[str, ...]]:
    file = path.with_suffix(".txt")
    lines = text_of(file).splitlines() if file.is_file() else []
    return path, str(path), _captions([line for line in lines if line.strip()], str(path))


def _captions(texts: Any, where: str) -> tuple[str, ...]:
    usable = isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
    if not usable:
        raise Unusable(f"{where} has an empty caption or none")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{where} has a caption that is no text ({error.reason})") from error
    return tuple(text.strip() for text in texts)


def _checked(found: dict, path: Path, where: str, captions: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The picture as an entry of `found`, if it is new there and has a header that can be read."""
    path = os.path.normpath(path)
    if path in found:
        raise Unusable(f"{where} names {path} for the second time")
    check_header(path, where)
    return {path: captions}


def check_header(path: str, where: str) -> None:
    """Unusable unless a file is there and begins as a picture does; `where` says who names it."""
    try:
        _opened(path).close()
    except FileNotFoundError as error:
        raise Unusable(f"{where} names {path}, which does not exist") from error
    except BROKEN as error:
        raise Unusable(f"{where}: {path} is no picture that can be read ({reason_of(error)})") from error


def _opened(file: str | io.BytesIO) -> Image.Image:
    """A picture of which only the header is read."""
    image = Image.open(file)
    if image.mode[0] in "IF":  # Pillow would cut what is above 255 off
        image.close()
        raise ValueError(f"mode {image.mode} is not 8 bits a channel")
    return image


def _file(paths: Sequence[str], index: int) -> bytes:
    return Path(paths[index]).read_bytes()


def text_of(path: Path) -> str:
    """A text file; Unusable if it is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{path} cannot be read as text ({error})") from error


def reason_of(error: Exception) -> str:
    """Why Pillow could not read a picture."""
    if isinstance(error, UnidentifiedImageError):
        return "no format that Pillow knows"
    return getattr(error, "strerror", None) or str(error)


def some(problems: Sequence[str]) -> str:
    """The first few of them."""
    more = f"; and {len(problems) - NUM_SHOWN} more" if len(problems) > NUM_SHOWN else ""
    return "; ".join(problems[:NUM_SHOWN]) + more
