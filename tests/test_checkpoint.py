import json
import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings

from trimtab import checkpoint
from trimtab.errors import UserError

# Byte patterns are drawn, not numbers: nan payloads, -0.0 and subnormals must come back too.
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
DTYPES += [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    """Equal in structure, types and bits; a nan equals a nan."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bits(a).equal(bits(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and [*map(type, a)] == [*map(type, b)] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)  # tells -0.0 from 0.0 and takes nan for nan


@st.composite
def drawn_tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    size = dtype.itemsize * torch.Size(shape).numel()
    raw = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    return tensor.mT if tensor.ndim > 1 and draw(st.booleans()) else tensor  # .mT is not contiguous


KEYS = st.one_of(st.text(max_size=4), st.integers(-3, 3), st.sampled_from(["$tensor", "a/b", "1", "__metadata__"]))
LEAVES = st.one_of(drawn_tensors(), st.none(), st.booleans(), st.integers(), st.floats(), st.text())
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(KEYS, TREES, max_size=4))
def test_any_state_comes_back_with_the_same_structure_types_and_bits(tmp_path, state):
    checkpoint.save(tmp_path / "checkpoint-1", state)
    assert same(checkpoint.load(tmp_path / "checkpoint-1"), state)


def test_names_that_collide_keep_their_own_tensors(tmp_path):
    one, two, three = (torch.tensor([number]) for number in (1, 2, 3))
    state = {
        "a/b": one,
        "a": {"b": two},
        "m": {1: one, "1": two},
        "__metadata__": three,
        "$tensor": "a/b",
        "\ud800é": one,
    }
    checkpoint.save(tmp_path / "c", state)
    assert same(checkpoint.load(tmp_path / "c"), state)


def test_one_tensor_at_two_places_is_written_once_and_comes_back_as_one(tmp_path):
    weight = torch.nn.Parameter(torch.arange(1000.0).reshape(20, 50))
    checkpoint.save(tmp_path / "c", {"networks": {"w": weight}, "roles": [weight.detach(), weight.data]})
    stored = safetensors.torch.load_file(tmp_path / "c" / "state.safetensors")
    assert [tuple(tensor.shape) for tensor in stored.values()] == [(20, 50)]
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded["networks"]["w"] is loaded["roles"][0] is loaded["roles"][1]
    assert same(loaded["roles"], [weight.detach()] * 2)


def test_other_views_of_one_memory_come_back_equal_and_apart(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"part": weight[0], "turned": weight.T, "all": weight, "same": weight.expand(4, 2, 3)}
    state |= {"bits": weight.view(torch.int32), "square": weight[:, :2], "square turned": weight[:, :2].T}
    checkpoint.save(tmp_path / "c", state)
    loaded = checkpoint.load(tmp_path / "c")
    assert same(loaded, state)
    loaded["all"].zero_()
    assert same({**loaded, "all": weight}, state)


def test_conjugate_and_negative_views_are_stored_by_value(tmp_path):
    number = torch.tensor([1.0 + 2.0j])
    state = {"number": number, "conjugate": number.conj(), "imaginary": number.imag, "negative": number.conj().imag}
    checkpoint.save(tmp_path / "c", state)
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded["number"].item() == 1.0 + 2.0j
    assert loaded["conjugate"].item() == 1.0 - 2.0j
    assert loaded["imaginary"].item() == 2.0
    assert loaded["negative"].item() == -2.0


def test_parameters_come_back_as_plain_tensors(tmp_path):
    checkpoint.save(tmp_path / "c", {"weight": torch.nn.Parameter(torch.ones(2))})
    weight = checkpoint.load(tmp_path / "c")["weight"]
    assert type(weight) is torch.Tensor
    assert not weight.requires_grad


def test_loaded_tensors_outlive_their_file_and_do_not_write_to_it(tmp_path):
    checkpoint.save(tmp_path / "checkpoint-1", {"x": torch.ones(3)})
    loaded = checkpoint.load(tmp_path / "checkpoint-1")
    loaded["x"].zero_()
    assert same(checkpoint.load(tmp_path / "checkpoint-1"), {"x": torch.ones(3)})
    with open(tmp_path / "checkpoint-1" / "state.safetensors", "r+b") as file:
        file.truncate(0)  # a tensor that still lived in the mapped file would end the process with SIGBUS
    assert loaded["x"].sum() == 0


def test_files_are_plain_safetensors_and_json_with_the_mode_of_any_new_file(tmp_path):
    checkpoint.save(tmp_path / "c", {"model": {"w": torch.ones(2)}, "step": 3})
    assert sorted(os.listdir(tmp_path / "c")) == ["state.json", "state.safetensors"]
    assert list(safetensors.torch.load_file(tmp_path / "c" / "state.safetensors")) == ["model/w"]
    assert json.loads((tmp_path / "c" / "state.json").read_text())["state"]["step"] == 3
    (tmp_path / "new").write_text("")
    for name in ("state.json", "state.safetensors"):
        assert (tmp_path / "c" / name).stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (object(), "holds a object at 'a/0'"),
        (torch.float32, "holds a dtype at 'a/0'"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo, torch.float32, cpu at 'a/0'"),
        (torch.empty(2, device="meta"), "torch.float32, meta at 'a/0'"),
        (torch.zeros(1, dtype=torch.complex128), "torch.complex128, cpu at 'a/0'"),
        ({1.5: 0}, "the key 1.5 at 'a/0'"),
        ({True: 0}, "the key True at 'a/0'"),
    ],
)
def test_what_cannot_be_stored_is_named_with_its_place_and_leaves_nothing(tmp_path, value, words):
    with pytest.raises(ValueError, match=words):
        checkpoint.save(tmp_path / "checkpoint-1", {"a": [value]})
    assert os.listdir(tmp_path) == []


# --- exact resume


def trained(model, optimizer, steps):
    """`steps` AdamW steps on data that depend on the step's number alone."""
    for step in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).to(model.weight.dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [*model.state_dict().values(), *(value for s in optimizer.state.values() for value in s.values())]


def new_pair(dtype, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).to(dtype)
    groups = [{"params": [model.weight], "lr": 1e-2}, {"params": [model.bias], "lr": 3e-4, "weight_decay": 0.1}]
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}])
def test_adamw_continues_from_a_checkpoint_bit_for_bit(tmp_path, dtype, options):
    whole = trained(*new_pair(dtype, **options), range(6))

    model, optimizer = new_pair(dtype, **options)
    trained(model, optimizer, range(3))
    checkpoint.save(tmp_path / "c", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    model, optimizer = new_pair(dtype, **options)
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert same(trained(model, optimizer, range(3, 6)), whole)


# --- damage


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "checkpoint-1"
    checkpoint.save(folder, {"x": torch.arange(4.0), "lr": 0.125, "name": "run"})
    return folder


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_one_flipped_bit_anywhere_is_a_user_error(saved, name):
    whole = (saved / name).read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (saved / name).write_bytes(damaged)
        with pytest.raises(UserError, match=r"checkpoint-1/state\..* delete .*checkpoint-1 and resume"):
            checkpoint.load(saved)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("size", [0, 10])
def test_a_file_cut_short_is_named(saved, name, size):
    os.truncate(saved / name, size)
    with pytest.raises(UserError, match=f"checkpoint-1/{name} is damaged"):
        checkpoint.load(saved)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format": 1, "sha256": {}, "state": {}}'])
def test_json_that_is_no_checkpoint_is_named(saved, text):
    (saved / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"checkpoint-1/state\.json is damaged \(it is not what a checkpoint holds\)"):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(UserError, match=rf"checkpoint-1/{name} cannot be read \(No such file or directory\)"):
        checkpoint.load(saved)


def test_another_checkpoints_tensors_are_refused(saved, tmp_path):
    checkpoint.save(tmp_path / "checkpoint-2", {"x": torch.ones(4)})
    (tmp_path / "checkpoint-2" / "state.safetensors").replace(saved / "state.safetensors")
    with pytest.raises(UserError, match=r"state\.safetensors is damaged"):
        checkpoint.load(saved)


# --- which checkpoints there are


def make(run, *names):
    for name in names:
        checkpoint.save(run / "scratch", {"name": name})
        (run / "scratch").rename(run / name)


def names(run):
    return sorted(os.listdir(run))


def test_latest_is_the_highest_number_not_the_last_in_the_alphabet(tmp_path):
    make(tmp_path, "checkpoint-9", "checkpoint-10", "checkpoint-11.tmp", "checkpoint-best", "checkpoint-9.old")
    (tmp_path / "checkpoint-12").write_text("a file")
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-10"


def test_there_is_no_latest_in_an_empty_or_absent_run_folder(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "none") is None
    checkpoint.prune(tmp_path / "none", keep=1)


def test_latest_is_the_old_one_where_its_replacement_was_cut_short(tmp_path):
    make(tmp_path, "checkpoint-3", "checkpoint-7.old", "checkpoint-7.tmp")
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-7.old"
    checkpoint.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-7.old"]
    checkpoint.save(tmp_path / "checkpoint-7", {})
    assert names(tmp_path) == ["checkpoint-7"]


def test_prune_keeps_the_highest_steps_and_what_is_not_ours(tmp_path):
    ours = ["checkpoint-8", "checkpoint-9", "checkpoint-10", "checkpoint-11"]
    leftovers = [
        "checkpoint-12.tmp",
        "checkpoint-9.old",
        "checkpoint-9.old.tmp",
        "checkpoint-8.tmp",
        "checkpoint-11.old",
    ]
    make(tmp_path, *ours, *leftovers, "checkpoint-best.tmp", "export")
    checkpoint.prune(tmp_path, keep=None)
    assert names(tmp_path) == sorted([*ours, "checkpoint-best.tmp", "export"])
    checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11", "checkpoint-best.tmp", "export"]


def test_prune_refuses_to_keep_none(tmp_path):
    with pytest.raises(ValueError, match="at least 1 or None, got 0"):
        checkpoint.prune(tmp_path, keep=0)


def test_saving_again_replaces_the_checkpoint(saved):
    checkpoint.save(saved, {"x": torch.zeros(2)})
    assert same(checkpoint.load(saved), {"x": torch.zeros(2)})
    assert names(saved.parent) == ["checkpoint-1"]


def test_the_name_of_a_new_checkpoint_is_on_disk_before_the_old_one_goes(saved, monkeypatch):
    calls, rename = [], os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), rename(a, b)))
    checkpoint.save(saved, {})
    assert calls[-3:] == ["rename", saved.parent.stat().st_ino, "rename"]


# --- killed while saving. One process imports torch, then forks a child per kill.

KILL_BEFORE_EACH_OPERATION = """
import os, signal, sys
from pathlib import Path
import torch
from trimtab import checkpoint

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}  # audit events of Python

def child(run, fatal):
    count = 0
    def hook(event, _):
        nonlocal count
        if event in CHANGES:
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    checkpoint.save(run / "checkpoint-2", {"new": torch.ones(2)})
    checkpoint.prune(run, keep=1)
    os._exit(0)

def survive(run, fatal, again):
    checkpoint.save(run / "checkpoint-1", {"old": torch.zeros(2)})
    if again:
        checkpoint.save(run / "checkpoint-2", {"old": torch.zeros(2)})
    pid = os.fork() or child(run, fatal)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    found = checkpoint.latest(run)
    print("again" if again else "first", found.name, *checkpoint.load(found))
    for step in (2, 3):  # the next run gets over the leftovers
        checkpoint.save(run / f"checkpoint-{step}", {})
    checkpoint.prune(run, keep=1)
    assert os.listdir(run) == ["checkpoint-3"], os.listdir(run)
    return status == 0

for again in (False, True):
    fatal = 1
    while not survive(Path(sys.argv[1]) / f"{again}-{fatal}", fatal, again):
        fatal += 1
"""

KILL_AT_RANDOM = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from trimtab import checkpoint

run = Path(sys.argv[1])

def child():
    for step in range(10**6):
        checkpoint.save(run / f"checkpoint-{step % 5}", {"step": step, "x": torch.full((20_000,), step)})
        checkpoint.prune(run, keep=2)

draw = random.Random(0)
checkpoint.save(run / "checkpoint-0", {"step": 0, "x": torch.zeros(20_000)})
for _ in range(25):
    pid = os.fork() or child()
    time.sleep(draw.uniform(0.005, 0.06))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    for folder in run.iterdir():
        if not folder.name.endswith(".tmp"):
            state = checkpoint.load(folder)
            assert (state["x"] == state["step"]).all()
    print(checkpoint.latest(run).name, state["step"])
"""


def run_script(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_kill_before_any_file_operation_leaves_the_old_or_the_new_checkpoint(tmp_path):
    seen = run_script(KILL_BEFORE_EACH_OPERATION, tmp_path)
    assert len(seen) > 30
    assert list(dict.fromkeys(seen)) == [  # in this order: once the new one is there, it stays
        "first checkpoint-1 old",
        "first checkpoint-2 new",
        "again checkpoint-2 old",
        "again checkpoint-2.old old",
        "again checkpoint-2 new",
    ]


def test_kills_at_random_moments_leave_whole_checkpoints_only(tmp_path):
    assert len(run_script(KILL_AT_RANDOM, tmp_path)) == 25
