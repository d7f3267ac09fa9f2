"""Tensors kept on disk by content: what an encoder once made of a picture or of a text.

A key says who made the tensors (weights, and all else that they depend on) and of what; so nothing is ever out of date,
and two runs share what they have in common. What comes from disk is bit for bit what was computed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.files import atomic_write

FORMAT = 2  # count on when the same weights come to encode differently


@dataclass(frozen=True)
class Entry:
    """What a cache knows under a key; None: nothing yet."""

    key: str
    tensors: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Cache:
    """One safetensors file for each content, under a folder; None: nothing is kept. What can't be read isn't there."""

    folder: Path | None
    maker: str  # of the tensors: weights, and all else that they depend on beside the content
    shapes: Mapping[str, tuple[int, ...]]

    def key(self, content: bytes) -> str:
        return hashlib.sha256(f"{FORMAT} {self.maker} ".encode() + content).hexdigest()

    def find(self, key: str) -> Entry:
        if self.folder is None:
            return Entry(key, None)
        try:
            tensors = load(self._file(key).read_bytes())
        except (OSError, SafetensorError):
            return Entry(key, None)
        whole = {name: tuple(x.shape) for name, x in tensors.items()} == self.shapes
        return Entry(key, {name: x.float() for name, x in tensors.items()} if whole else None)

    def write(self, entry: Entry) -> None:
        if self.folder is None:
            return
        packed = {name: _packed(tensor.cpu().contiguous()) for name, tensor in entry.tensors.items()}
        try:
            atomic_write(self._file(entry.key), save(packed), durable=False)
        except OSError as error:
            raise UserError(
                f"cache folder {self.folder} cannot be written ({error.strerror}); make room, or set data.cache=false."
            ) from error

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _packed(tensor: Tensor) -> Tensor:
    """In half the bytes, where nothing is lost: text encoders in bf16 say nothing finer."""
    half = tensor.bfloat16()
    return half if torch.equal(half.float(), tensor) else tensor


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Of modules, their configs and weights; of tokenizers, everything."""
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        digest.update(name.encode())
        if not isinstance(part, nn.Module):
            digest.update(part.backend_tokenizer.to_str().encode())
            continue
        config = part.config.to_dict() if hasattr(part.config, "to_dict") else part.config
        known = {key: value for key, value in config.items() if not key.startswith("_")}  # no paths
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
        for key, tensor in part.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
