"""Checkpoints that are whole or absent: `checkpoint-<step>/` with `state.safetensors` and `state.json`, no pickle.

The state is a tree of dicts, lists and tuples with tensors and JSON scalars as leaves. Tensors go into the safetensors
file; the JSON file holds the tree, with what JSON lacks marked by a key that starts with `$`:

    {"$tensor": name}   a tensor, by its name in state.safetensors
    {"$items": [[k, v]]}  a dict with integer keys (torch's optimizer state has them) or with keys that start with `$`
    {"$tuple": [...]}   a tuple (Adam's betas)
    {"$float": "nan"}   a float that is not finite; all others round-trip as they are

A folder named `checkpoint-7` or `checkpoint-7.old` is always whole: it got its name by a rename after all was on disk.
A name in `.tmp` is always rubbish. `.old` exists only while `checkpoint-7` is being replaced.
"""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from trimtab.errors import RunStopped, UserError
from trimtab.files import as_umask, atomic_write, to_disk

_TENSORS, _TREE = "state.safetensors", "state.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(?P<step>0|[1-9][0-9]*)(\.old)?(?P<rubbish>\.tmp)?")
_UNSIGNED = {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
_OTHER_DTYPES = _UNSIGNED | {torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64}


class NotSaved(RunStopped):
    """A checkpoint that could not be written; those before it are whole."""


def save(folder: str | Path, state: dict) -> None:
    """Write `state` as `folder`, in place of what may be there; killed at any instant it leaves whole checkpoints only.

    Keys are str or int. Tensors may live on any device and share memory: what is the same tensor at several places is
    written once and comes back as one, other views of one memory come back apart. A ValueError names the place in
    `state` of what cannot be stored: complex128, sparse, meta or sharded tensors (gather those first). NotSaved, and
    nothing left of it, where the disk does not take it.
    """
    folder = Path(folder)
    tensors = _Tensors()
    tree = _encode(state, "", tensors)
    temporary = _sibling(folder, ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(temporary, tree, tensors.by_name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = latest(folder.parent)
        last = "there is none before it" if kept is None else f"{kept.name} is the last whole one"
        raise NotSaved(f"{folder} could not be written ({error}); {last}: make room, and --resume.") from error
    _put_in_place(temporary, folder)


def load(folder: str | Path) -> dict:
    """The state that `save` wrote, tensors on the CPU. UserError names the file that is missing or damaged."""
    folder = Path(folder)
    tree, digest = _read_tree(folder / _TREE)
    return _decode(tree, _read_tensors(folder / _TENSORS, digest))


def latest(run_folder: str | Path) -> Path | None:
    """The checkpoint with the highest step. It is `checkpoint-<step>.old` if replacing that one was cut short."""
    found = _checkpoints(Path(run_folder))
    return found[max(found)] if found else None


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(_NAME.fullmatch(folder.name)["step"])


def prune(run_folder: str | Path, keep: int | None) -> None:
    """Delete all but the `keep` checkpoints of the highest steps (None: keep all) and what interrupted saves left."""
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1 or None, got {keep}")
    found = _checkpoints(Path(run_folder))
    kept = [found[step] for step in (sorted(found)[-keep:] if keep else found)]
    for path, match in _named(Path(run_folder)):
        if match["rubbish"]:
            shutil.rmtree(path, ignore_errors=True)  # it may have gone with the checkpoint of that name
        elif path not in kept:
            _discard(path)


def _checkpoints(run_folder: Path) -> dict[int, Path]:
    """Whole checkpoints by step; `checkpoint-7.old` counts where there is no `checkpoint-7`."""
    found: dict[int, Path] = {}
    for path, match in _named(run_folder):
        if not match["rubbish"]:
            found.setdefault(int(match["step"]), path)
    return found


def _named(run_folder: Path) -> list[tuple[Path, re.Match]]:
    """The folders with names of ours, sorted: `checkpoint-7` comes before `checkpoint-7.old`."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in sorted(run_folder.glob("checkpoint-*")) if path.is_dir()]
    return [(path, match) for path, match in matches if match]


# --- folders


def _sibling(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name. POSIX cannot swap two folders at once, so the one before steps aside as .old."""
    old = _sibling(folder, ".old")
    if folder.exists():
        if old.exists():
            _discard(old)
        os.rename(folder, old)
    os.rename(temporary, folder)
    to_disk(folder.parent)
    if old.exists():
        _discard(old)


def _discard(folder: Path) -> None:
    """Delete a checkpoint. It loses its name first, lest a kill half-way leave a torn folder that looks whole."""
    rubbish = _sibling(folder, ".tmp")
    shutil.rmtree(rubbish, ignore_errors=True)
    os.rename(folder, rubbish)
    shutil.rmtree(rubbish)


# --- files


def _write(folder: Path, tree: Any, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(_apart(tensors), folder / _TENSORS)
    as_umask(folder / _TENSORS)
    to_disk(folder / _TENSORS)
    digests = {"state": _digest_of_tree(tree), _TENSORS: _digest_of_file(folder / _TENSORS)}
    atomic_write(folder / _TREE, json.dumps({"format": _FORMAT, "sha256": digests, "state": tree}, allow_nan=False))


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, none sharing memory with another: safetensors refuses those that do."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return apart


def _digest_of_tree(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_tree(path: Path) -> tuple[Any, str]:
    """(the tree, the digest that the tensor file must have)"""
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != _FORMAT:
            raise _refusal(path, f"has format {document['format']}, this version reads {_FORMAT}")
        if document["sha256"]["state"] != _digest_of_tree(document["state"]):
            raise _refusal(path, "is damaged (its checksum differs)")
        return document["state"], document["sha256"][_TENSORS]
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _refusal(path, "is damaged (it is not what a checkpoint holds)") from error


def _read_tensors(path: Path, digest: str) -> dict[str, torch.Tensor]:
    try:
        if _digest_of_file(path) != digest:
            raise _refusal(path, "is damaged (its checksum differs)")
        # Copies, since safetensors maps the file into memory and `prune` may delete it while the tensors are in use.
        return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror})") from error
    except SafetensorError as error:
        raise _refusal(path, f"is damaged ({error})") from error


def _refusal(path: Path, what: str) -> UserError:
    return UserError(f"checkpoint file {path} {what}; delete {path.parent} and resume from the checkpoint before it")


# --- the tree


class _Tensors:
    """The tensors of a state by the name that each has in the file, one name for what is the same tensor."""

    def __init__(self):
        self.by_name: dict[str, torch.Tensor] = {}
        self._names: dict[tuple, str] = {}  # what tells tensors apart -> name

    def name(self, tensor: torch.Tensor, place: str) -> str:
        """The name of this tensor, near the first place where it was found; from now on it is on the CPU, too."""
        tensor = tensor.detach()
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_meta
        if not plain or not (tensor.is_floating_point() or tensor.dtype in _OTHER_DTYPES):
            kind = f"{type(tensor).__name__} of {tensor.layout}, {tensor.dtype}, {tensor.device}"
            raise ValueError(f"checkpoint state holds a {kind} at {place!r}; expected a dense tensor of a common dtype")
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        same = (*memory, tensor.is_conj(), tensor.is_neg())
        if same not in self._names:
            name = self._names[same] = self._free(place)
            self.by_name[name] = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        return self._names[same]

    def _free(self, place: str) -> str:
        name = place.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no UTF-8
        while name in self.by_name or name == "__metadata__":  # keys 1 and "1", or "a/b" and a -> b; safetensors' own
            name += "'"
        return name


def _encode(value: Any, place: str, tensors: _Tensors) -> Any:
    """`value` in JSON's types; its tensors are put into `tensors`, named after their place."""
    if isinstance(value, torch.Tensor):
        return {"$tensor": tensors.name(value, place)}
    if isinstance(value, dict):
        return _encode_dict(value, place, tensors)
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"checkpoint state holds a {type(value).__name__} at {place!r}; expected tensors and JSON scalars")


def _encode_dict(value: dict, place: str, tensors: _Tensors) -> dict:
    for key in value:
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise ValueError(f"checkpoint state has the key {key!r} at {place!r}; expected str or int")
    items = {key: _encode(item, f"{place}/{key}".lstrip("/"), tensors) for key, item in value.items()}
    plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
    return items if plain else {"$items": [[key, item] for key, item in items.items()]}


def _decode(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    match tree:
        case {"$tensor": name}:
            return tensors[name]
        case {"$items": items}:
            return {key: _decode(item, tensors) for key, item in items}
        case {"$tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case {"$float": text}:
            return float(text)
        case dict():
            return {key: _decode(item, tensors) for key, item in tree.items()}
        case list():
            return [_decode(item, tensors) for item in tree]
    return tree
