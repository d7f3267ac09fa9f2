"""Files that are whole or absent whatever happens to the process, and the lock of a run folder.

A file is written beside its final name, forced to disk, and renamed: POSIX makes the rename atomic, so that a reader
(or the next run after SIGKILL) sees the old file or the new one, never half of one. The lock is the kernel's `flock`,
which dies with its process: nothing to clean up after a kill.
"""

import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trimtab.errors import UserError


def atomic_write(path: str | Path, data: bytes | str, *, durable: bool = True) -> None:
    """Write `data` (text as UTF-8) to `path` in one piece, making its folder where missing. If it is not `durable`, a
    power cut may leave it torn: for what is checked when it is read, or made again, and comes by the thousand."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")  # two writers never share one
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        if durable:
            to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # still there only if the disk was full or the like
    if durable:
        to_disk(path.parent)


def to_disk(path: Path) -> None:
    """fsync: the content of a file, or the names in a folder, survive a power cut after this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_umask(file: Path) -> None:
    """Let those read a file who may read its folder: safetensors lets only the owner."""
    os.chmod(file, file.parent.stat().st_mode & 0o666)


def check_folder(path: str | Path) -> None:
    """UserError unless `path` is a folder that can be written to, or can be made; before the work that fills it."""
    path = Path(path).absolute()
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not there.is_dir():
        raise UserError(f"{there} is a file; give --output the name of a folder.")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:  # permissions alone don't tell: of read-only file systems, say, or root in /proc
        raise UserError(f"folder {there} cannot be written to; give --output another one.") from error


@contextmanager
def lock(run_folder: str | Path) -> Iterator[None]:
    """Hold `run_folder`, made where missing, for the length of a `with` block.

    Raises UserError while another process, or another block of this one, holds it. With several processes per run,
    only the one that writes takes the lock.
    """
    run_folder = Path(run_folder)
    with _open_lock_file(run_folder) as file:
        _acquire(file, run_folder)
        os.register_at_fork(after_in_child=file.close)  # data workers outlive a killed parent by seconds
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _open_lock_file(run_folder: Path) -> TextIO:
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        return open(run_folder / ".lock", "a+")
    except OSError as error:
        cure = "free the name, mend its permissions or choose another folder"
        raise UserError(f"run folder {run_folder} cannot be written ({error.strerror}); {cure}") from error


def _acquire(file: TextIO, run_folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read() or "(unknown)"  # it takes the lock first and writes its number a moment later
        cure = "wait for it to end, stop it, or choose another run folder"
        raise UserError(f"run folder {run_folder} is in use by process {owner}; {cure}") from None
    except OSError as error:
        cure = "choose a run folder on a file system with locks"
        raise UserError(f"run folder {run_folder} cannot be locked ({error.strerror}); {cure}") from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
