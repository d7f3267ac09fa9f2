"""The cache on disk: what comes back is what was written, and whatever is damaged or made otherwise is not there."""

import pytest
import torch
from torch import nn

from trimtab.cache import Cache, Entry, fingerprint
from trimtab.errors import UserError

SHAPES = {"mean": (2, 3)}


def test_what_was_written_comes_back_bit_for_bit(tmp_path):
    cache = Cache(tmp_path, "encoder", SHAPES)
    for value in (torch.randn(2, 3), torch.randn(2, 3).bfloat16().float()):
        entry = Entry(cache.key(value.numpy().tobytes()), {"mean": value})
        assert cache.find(entry.key).tensors is None
        cache.write(entry)
        assert torch.equal(cache.find(entry.key).tensors["mean"], value)


def test_what_bf16_can_say_takes_half_the_bytes(tmp_path):
    cache = Cache(tmp_path, "encoder", {"mean": (64, 64)})
    exact = torch.randn(64, 64)
    for key, value in (("aa", exact), ("bb", exact.bfloat16().float())):
        cache.write(Entry(key, {"mean": value}))
    sizes = sorted(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert sizes[1] - sizes[0] == 64 * 64 * 2


def test_keys_differ_by_content_and_by_maker(tmp_path):
    keys = [Cache(tmp_path, maker, SHAPES).key(content) for maker in ("a", "b") for content in (b"x", b"y")]
    assert len(set(keys)) == 4


def test_files_that_are_damaged_or_of_another_shape_are_not_there(tmp_path):
    cache = Cache(tmp_path, "encoder", SHAPES)
    key = cache.key(b"x")
    cache.write(Entry(key, {"mean": torch.zeros(2, 3)}))
    assert Cache(tmp_path, "encoder", {"mean": (3, 2)}).find(key).tensors is None
    assert Cache(tmp_path, "encoder", SHAPES | {"std": (2, 3)}).find(key).tensors is None
    file = next(tmp_path.rglob("*.safetensors"))
    whole = file.read_bytes()
    for torn in (whole[:-1], whole[:20], whole[:4], b"", bytes(len(whole))):  # as a power cut may leave it
        file.write_bytes(torn)
        assert cache.find(key).tensors is None
    cache.write(Entry(key, {"mean": torch.zeros(2, 3)}))
    assert cache.find(key).tensors is not None


def test_nobody_waits_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: pytest.fail("waited for the disk"))
    Cache(tmp_path, "encoder", SHAPES).write(Entry("key", {"mean": torch.zeros(2, 3)}))


def test_without_a_folder_nothing_is_kept():
    cache = Cache(None, "", {})
    cache.write(Entry("key", {"mean": torch.zeros(2, 3)}))
    assert cache.find("key").tensors is None


def test_a_folder_that_cannot_be_written_is_said_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file", "encoder", SHAPES)
    with pytest.raises(UserError, match=r"cannot be written .*; make room, or set data\.cache=false"):
        cache.write(Entry("key", {"mean": torch.zeros(2, 3)}))


def test_a_fingerprint_is_of_weights_and_config():
    class Part(nn.Linear):
        def __init__(self, **config):
            super().__init__(2, 2)
            self.config = {"_name_or_path": "here", **config}
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    moved, changed = Part(scale=1), Part(scale=1)
    moved.config["_name_or_path"] = "elsewhere"
    changed.weight.data[0, 0] = 1e-9
    whole = fingerprint({"vae": Part(scale=1)})
    assert fingerprint({"vae": moved}) == whole
    assert len({whole, fingerprint({"vae": changed}), fingerprint({"vae": Part(scale=2)})}) == 3
