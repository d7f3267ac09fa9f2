import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from trimtab.errors import UserError
from trimtab.files import atomic_write, check_folder, lock

HOLD_LOCK = """
import sys, time
from trimtab.files import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("data", ["é\n", b"\x00\xff", ""])
def test_atomic_write_stores_the_very_bytes_and_leaves_nothing_beside_them(tmp_path, data):
    path = tmp_path / "made" / "too" / "file"
    atomic_write(path, "something longer that was there before")
    atomic_write(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert os.listdir(path.parent) == ["file"]


def test_atomic_write_gives_the_mode_that_any_new_file_has(tmp_path):
    (tmp_path / "plain").write_text("")
    atomic_write(tmp_path / "atomic", "")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_no_leftover(tmp_path, monkeypatch, failing):
    atomic_write(tmp_path / "file", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space"):
            atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_content_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    atomic_write(tmp_path / "file", "x")
    assert calls == ["content", "rename", "folder"]
    calls.clear()
    atomic_write(tmp_path / "file", "y", durable=False)
    assert calls == ["rename"]
    assert (tmp_path / "file").read_text() == "y"


def test_two_threads_that_write_one_file_at_once_do_not_mix_their_content(tmp_path, monkeypatch):
    path, replace = tmp_path / "file", os.replace

    def overtaken(temporary, target):  # a second writer runs from start to end just before the first one's rename
        monkeypatch.setattr(os, "replace", replace)
        other = threading.Thread(target=atomic_write, args=(path, "second"))
        other.start()
        other.join()
        assert path.read_text() == "second"
        replace(temporary, target)

    monkeypatch.setattr(os, "replace", overtaken)
    atomic_write(path, "first")
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["file"]


def test_a_locked_run_folder_is_refused_to_a_second_process_by_the_number_of_the_first(tmp_path, holder):
    with pytest.raises(UserError, match=f"in use by process {holder.pid}; wait for it"), lock(tmp_path / "run"):
        pytest.fail("the lock was given twice")


def test_a_kill_frees_the_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


def test_one_process_cannot_hold_a_lock_twice_but_can_take_it_again(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), lock(tmp_path):
        pytest.fail("the lock was given twice")
    with lock(tmp_path):
        pass


def test_an_error_inside_the_block_frees_the_lock(tmp_path):
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    with lock(tmp_path):
        pass


def test_a_forked_child_does_not_keep_the_lock_after_the_block(tmp_path):
    reader, writer = os.pipe()
    with lock(tmp_path):
        child = os.fork()
        if child == 0:  # a data worker, say: it inherits the open file and outlives the block
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    with lock(tmp_path):
        pass
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)


def test_a_run_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\); .* choose another"):
        lock(tmp_path / "file" / "run").__enter__()


@pytest.mark.parametrize("place", ["file", "file/new", "/proc/new"])
def test_a_folder_that_cannot_be_written_to_is_a_user_error(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file; give --output|/proc cannot be written to; give --output"):
        check_folder(tmp_path / place)
    check_folder(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_system_without_locks_is_a_user_error(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(UserError, match=r"cannot be locked \(Operation not supported\); choose"):
        lock(tmp_path).__enter__()
