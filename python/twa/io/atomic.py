"""Output files that appear whole or not at all.

They are written beside their place under a temporary name, synced, renamed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import io
import json
import os
import secrets
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from .errors import OutputError

#: what a run locks in the directory that it writes
LOCK = ".run.lock"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux
_LOCKED: weakref.WeakSet[BinaryIO] = weakref.WeakSet()  # by this process


def sync_folder(folder: Path) -> None:
    """Makes renames in a directory last; where directories cannot be synced, nothing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_lock(path: Path) -> BinaryIO:
    """Opens a file to be locked, which is made if need be; that of another user to read only."""
    try:
        return open(path, "ab")
    except PermissionError:
        return open(path, "rb")


def lock(file: BinaryIO, shared: bool = False) -> bool:
    """Makes this process the only one that writes the open file.

    It is so until the process closes the file or is killed. Processes that it forks, such as a
    DataLoader's, may outlive it by seconds, and do not keep the file open.

    Args:
        file: the file
        shared: let others write it that ask for the same, and nobody else

    Returns:
        False if another process writes it; True also where the file system has no locks
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    _LOCKED.add(file)
    return True


def _forget_locked() -> None:
    """Lets go of the files that the parent of this process has locked."""
    for file in list(_LOCKED):
        if not file.closed:
            # Not closed: what the parent has yet to write is not this process's to write.
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, file.fileno(), inheritable=False)
            os.close(nothing)


os.register_at_fork(after_in_child=_forget_locked)


def unlock(file: BinaryIO) -> None:
    """Ends `lock`, also for processes that were forked meanwhile and have the file open."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Makes this process the only one that works in a directory, which is made if need be.

    It is so in this context, and ends with the process, however that ends. The file that is locked,
    `LOCK`, is empty, and gone afterwards. Where none can be made or locked, nothing is locked.

    Raises:
        OutputError: another process works there
    """
    is_new, path = not os.path.exists(folder), folder / LOCK
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open_lock(path))
            # One that was opened before the other process removed it is locked by nobody.
            if not (lock(file) and is_at(file, path)):
                raise OutputError("another run is at work in this directory", folder)
            stack.callback(_unlock_folder, path, is_new)
        yield


def _unlock_folder(path: Path, is_new: bool) -> None:
    """Removes the locked file, and its directory if that is new and nothing else is in it."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        if is_new:
            path.parent.rmdir()


def is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the file of this path is the open one."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def temporary_of(path: Path) -> Path:
    """Where this process writes what will be put at `path`; it locks the file meanwhile.

    What killed processes have left there is removed. No two writers have the same name: in
    containers that share a directory, processes may have the same number.
    """
    for file in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = file.name.split(".")[-2].partition("-")[0]
        if pid.isdecimal() and _is_abandoned(file, int(pid)):
            file.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _is_abandoned(file: Path, pid: int) -> bool:
    """Whether nobody writes a temporary file; the process may be one of another container."""
    if pid != os.getpid() and _is_running(pid):
        return False
    try:
        with open(file, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError, PermissionError):
        return False
    except OSError:  # no locks here
        return pid != os.getpid()
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from inside names at least this path: a write that fails does not say where."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Puts a file at `path`, in the place of an older one, when `write` has written it whole.

    Args:
        path: where the file goes
        write: called with the temporary path to write to
    """
    temporary = temporary_of(path)
    try:
        with naming(path), open(temporary, "xb") as f:
            lock(f)
            write(temporary)
            os.fsync(f.fileno())
            os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def clear_unfinished(folder: Path, names: Iterable[str]) -> None:
    """Removes what a killed process was writing under these names in `folder`.

    A directory that it was replacing is put back.
    """
    for name in names:
        for path in [*folder.glob(f".{name}.*.tmp"), folder / f".{name}.tmp"]:
            remove(path)
        aside, target = folder / f".{name}.old", folder / name
        if aside.exists():
            remove(aside) if target.exists() else os.rename(aside, target)


def remove(path: Path) -> None:
    """Removes a file, a link, or a directory and all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Puts a complete directory in the place of an older one.

    That is one step where the system can swap two paths. Elsewhere the older one is moved aside
    first and removed last.
    """
    for path in (*temporary.rglob("*"), temporary):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with naming(path), open(path, "rb+") as f:
                os.fsync(f.fileno())
    aside = folder.with_name(f".{folder.name}.old")
    if not folder.exists():
        os.rename(temporary, folder)
    elif not _swap(temporary, folder):
        remove(aside)
        os.rename(folder, aside)
        os.rename(temporary, folder)
    sync_folder(folder.parent)
    with contextlib.suppress(OSError):  # the next run removes it
        remove(aside)
        remove(temporary)  # after a swap the older one


def _swap(a: Path, b: Path) -> bool:
    """Exchanges two paths, so that each is there at any time.

    Returns:
        False where the system or the file system cannot
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def write_torch(path: Path, value: object) -> None:
    """Writes tensors and plain Python values for torch.load(weights_only=True)."""
    buffer = io.BytesIO()  # a file that cannot be written is then an OSError
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON, one item a line."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8; bytes of paths that are none are escaped."""
    replace(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes bytes."""
    replace(path, lambda p: p.write_bytes(data))
