"""Output files appear whole or not at all: written beside their place under a temporary name,
synced, renamed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


def sync_folder(folder: Path) -> None:
    """Makes renames in a directory last; where directories cannot be synced, nothing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(file: BinaryIO) -> bool:
    """Makes this process the only one that writes the open file, until it closes it or is killed;
    False if another one does. True where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def temporary_of(path: Path) -> Path:
    """Where this process writes what will be put at `path`.

    What killed processes have left there is removed.
    """
    for file in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = file.name.split(".")[-2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            file.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


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


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = temporary_of(path)
    try:
        with naming(path):
            write(temporary)
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_stream(
    path: Path | None,
    info: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """A safetensors file from tensors that come one at a time, in the order of `info`, as
    contiguous CPU tensors. The tensors are read to the end even if writing fails, since other ranks
    may take part in making them. path None: only that."""
    stream = iter(tensors)
    try:
        if path is not None:
            _replace(path, lambda p: _write_stream(p, info, stream))
    finally:
        for _ in stream:
            pass


def _write_stream(
    path: Path,
    info: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    stream: Iterator[tuple[str, Tensor]],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    # so that all are aligned
    for key, (dtype, shape) in sorted(info.items(), key=lambda item: -item[1][0].itemsize):
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[key] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for key, t in stream:
            f.seek(8 + len(text) + header[key]["data_offsets"][0])
            f.write(memoryview(t.reshape(-1).view(torch.uint8).numpy()))
        f.truncate(8 + len(text) + end)


def clear_unfinished(folder: Path, names: Iterable[str]) -> None:
    """Removes what a killed process was writing under these names in `folder`, and puts back a
    directory that it was replacing.
    """
    for name in names:
        for path in [*folder.glob(f".{name}.*.tmp"), folder / f".{name}.tmp"]:
            _remove(path)
        aside, target = folder / f".{name}.old", folder / name
        if aside.exists():
            _remove(aside) if target.exists() else os.rename(aside, target)


def _remove(path: Path) -> None:
    """A file, a link, or a directory and all in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Puts a complete directory in the place of an older one, in one step where the system can swap
    two paths. Elsewhere the older one is moved aside first and removed last."""
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
        _remove(aside)
        os.rename(folder, aside)
        os.rename(temporary, folder)
    sync_folder(folder.parent)
    with contextlib.suppress(OSError):  # the next run removes it
        _remove(aside)
        _remove(temporary)  # after a swap the older one


def _swap(a: Path, b: Path) -> bool:
    """Exchanges two paths, so that each is there at any time; False where the system or the file
    system cannot.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return (
        rename is not None
        and rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0
    )


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    _replace(path, lambda p: save_file(tensors, p, metadata={"format": "pt"}))


def write_torch(path: Path, value: object) -> None:
    """For torch.load(weights_only=True): tensors and plain Python values."""
    buffer = io.BytesIO()  # a file that cannot be written is then an OSError
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    _replace(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    _replace(path, lambda p: p.write_bytes(data))
