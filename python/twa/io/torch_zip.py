"""What torch.save writes: a zip archive of a pickle and plain records.

The pickle is interpreted without running anything (see `unpickle`); tensors are mapped where their
bytes lie. Files from before torch 1.6 are not read.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .checks import check_name, first_line
from .errors import CandidateError, NoWeights, TwaError
from .mapped import MappedFile, Stored, TensorInfo, span
from .torch_pickle import NAMES, Described, NotDense, parse_storage
from .unpickle import MAX_PICKLE, Refused, unpickle

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: elements of a tensor that has fewer of its own: an expanded one may claim any shape
MAX_EXPANDED = 1 << 24
MAX_DEPTH = 16  # of dicts in dicts
#: attribute of a zip archive's entry, for which PyTorch gives uninitialised memory
DIRECTORY = 0x10
LOCAL_HEADER, LOCAL_HEADER_BYTES = b"PK\3\4", 30  # before each record of a zip archive
TAR, TAR_AT = b"ustar", 257  # in every tar archive
#: names in a pickle, one of which it has if it has a tensor of floating-point numbers
FLOAT_STORAGES = (b"FloatStorage", b"DoubleStorage", b"HalfStorage", b"BFloat16Storage", b"Untyped")


class Window(io.RawIOBase):
    """Some bytes of an open file, as a file."""

    def __init__(self, file: io.BufferedReader, begin: int, length: int) -> None:
        self.file, self.begin, self.length, self.at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self.at, self.length)[whence]
        if at < 0:
            raise TwaError(f"seek before the begin: {at}")
        self.at = at
        return at

    def readinto(self, buffer: Buffer) -> int:
        with memoryview(buffer) as view:
            count = max(0, min(len(view), self.length - self.at))
            self.file.seek(self.begin + self.at)
            data = self.file.read(count)
            view[: len(data)] = data
        self.at += len(data)
        return len(data)


@contextlib.contextmanager
def explained(where: str, has_floats: bool) -> Iterator[None]:
    """CandidateError for whatever a damaged or malicious pickle sets off.

    Args:
        where: how messages name it
        has_floats: whether it may have tensors of floating-point numbers
    """
    try:
        yield
    except CandidateError:
        raise
    except Refused as error:
        raise (CandidateError if has_floats else NoWeights)(
            f"refused: loading it would run code from the file; save the state_dict alone,"
            f" for example as safetensors ({error})",
            where,
        ) from error
    except Exception as error:
        raise CandidateError(
            f"not a complete torch checkpoint ({type(error).__name__}: {first_line(error)})", where
        ) from error


# Where their tensors lie -------------------------------------------------------------------------


class Archive:
    """A zip archive in some bytes of a file.

    Args:
        file: the file
        begin: first byte of the archive
        length: bytes of the archive
        where: how messages name it

    Attributes:
        records: name of each record -> (first byte in the file, bytes)
        content: what its pickle describes, with a Described for each tensor
    """

    def __init__(self, file: MappedFile, begin: int, length: int, where: str) -> None:
        self.file, self.where = file, where
        self.records = zip_records(file.path, begin, length, where)
        order = bytes_of(file.path, *self.records.get("byteorder", (0, 0)))[:8] or b"little"
        if order not in (b"little", b"big") or "data.pkl" not in self.records:
            raise CandidateError(
                "not a complete torch checkpoint: expected records data.pkl and byteorder"
                " as torch.save writes them",
                where,
            )
        if order != sys.byteorder.encode():
            raise CandidateError(
                f"written on a machine of the other byte order ({order.decode()}-endian); load it"
                " with torch.load(weights_only=True) and save it again",
                where,
            )
        at, size = self.records["data.pkl"]
        if size > MAX_PICKLE:
            raise CandidateError(
                f"expected at most {MAX_PICKLE} bytes in data.pkl, found {size}", where
            )
        pickle = bytes_of(file.path, at, size)
        with explained(where, any(name in pickle for name in FLOAT_STORAGES)):
            self.content = unpickle(pickle, NAMES, parse_storage)

    def place(self, t: Described) -> Stored:
        """Where a tensor lies; CandidateError if it is not in the archive."""
        at = self.records.get(f"data/{t.storage.key}")
        if at is None:
            raise CandidateError(
                f"not a complete torch checkpoint: it has no record"
                f" {t.storage.key[:100]!r} for a tensor",
                self.where,
            )
        return stored(t, self.file, *at, self.where)


def stored(t: Described, file: MappedFile, begin: int, size: int, where: str) -> Stored:
    """Where a tensor lies whose storage is `size` bytes of the file from `begin` on."""
    info = TensorInfo(t.shape, t.dtype)
    if math.prod(t.shape) == 0:
        return Stored(file, info, 0)
    own = span(t.shape, t.strides)
    needed = (t.offset + own) * t.dtype.itemsize
    if needed > size or t.storage.count * t.storage.dtype.itemsize != size:
        raise CandidateError(
            f"not a complete torch checkpoint: a tensor {info} needs {needed} bytes of its"
            f" record, found {size}",
            where,
        )
    if math.prod(t.shape) > max(own, MAX_EXPANDED):
        raise CandidateError(
            f"a tensor {info} is expanded from {own} elements: expected at most"
            f" {MAX_EXPANDED} then",
            where,
        )
    contiguous = t.strides == tuple(math.prod(t.shape[d + 1 :]) for d in range(len(t.shape)))
    at = begin + t.offset * t.dtype.itemsize
    return Stored(file, info, at, None if contiguous else t.strides, t.negated)


def _open(path: Path) -> Archive:
    """The archive that is a whole file."""
    file = MappedFile(path)
    if not file.size:
        raise CandidateError("not a complete torch checkpoint: it is empty", path)
    if bytes_of(path, 0, 4) != LOCAL_HEADER:
        if bytes_of(path, TAR_AT, len(TAR)) == TAR:
            raise NoWeights("not a torch checkpoint: a tar archive; unpack it first", path)
        raise CandidateError(
            "not a torch checkpoint: expected a zip archive as torch.save writes it; a file from"
            " before PyTorch 1.6 must be loaded with torch.load(weights_only=True) and saved again",
            path,
        )
    return Archive(file, 0, file.size, str(path))


def read_torch(path: Path) -> object:
    """The nested dicts of a checkpoint, with a Source in the place of each tensor.

    What else is in it is left out.
    """
    archive = _open(path)
    done: dict[int, dict[str, object]] = {}  # a dict may occur many times, even in itself

    def replaced(value: object, depth: int) -> object:
        if isinstance(value, NotDense):
            raise CandidateError(f"expected dense tensors, found {value.kind}", path)
        if isinstance(value, Described):
            return archive.place(value)
        if not isinstance(value, dict) or depth == MAX_DEPTH:
            return None
        if id(value) not in done:
            out: dict[str, object] = {}
            done[id(value)] = out
            for k, v in value.items():
                if (found := replaced(v, depth + 1)) is not None:
                    name = str(k)  # keys are plain values: see unpickle
                    check_name(name, path)
                    if name in out:
                        raise CandidateError(f"{name!r} occurs twice", path)
                    out[name] = found
        return done[id(value)]

    return replaced(archive.content, 0)


def read_values(path: Path) -> object:
    """The content of a small file of plain values, with its tensors in memory.

    Plain are dicts, lists, tuples, numbers and texts.
    """
    archive = _open(path)
    done: dict[int, tuple[object, object]] = {}
    # tensors may share their bytes, but not to make much out of little
    left = 4 * path.stat().st_size

    def tensor(t: Described) -> Tensor:
        nonlocal left
        source = archive.place(t)
        left -= source.info.nbytes
        if left < 0:
            raise CandidateError("its tensors claim more bytes than it has", path)
        return source.read().clone()

    def replaced(value: object, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise CandidateError(f"expected at most {MAX_DEPTH} levels", path)
        if id(value) in done:
            return done[id(value)][0]
        found: object
        if isinstance(value, dict):
            found = {k: replaced(v, depth + 1) for k, v in value.items()}
        elif isinstance(value, list | tuple):
            found = type(value)(replaced(v, depth + 1) for v in value)
        else:
            found = tensor(value) if isinstance(value, Described) else value
        done[id(value)] = found, value  # kept, so that its id stays its own
        return found

    return replaced(archive.content, 0)


def bytes_of(path: Path, offset: int, count: int) -> bytes:
    """Some bytes of a file."""
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(count)


def zip_records(path: Path, begin: int, length: int, where: str) -> dict[str, tuple[int, int]]:
    """The records of a torch archive in some bytes of a file.

    All must be uncompressed, within the file and apart from each other.

    Args:
        path: the file
        begin: first byte of the archive
        length: bytes of the archive
        where: how messages name it

    Returns:
        name without the archive's own -> (first byte in the file, bytes)

    Raises:
        CandidateError: it is no such archive
    """
    try:
        with open(path, "rb") as f, zipfile.ZipFile(Window(f, begin, length)) as archive:
            found = _records(f, archive.infolist(), begin, begin + length, where)
        end = begin
        for at, size in sorted(found.values()):
            if at < end and size:
                raise CandidateError("not a complete torch checkpoint: its records overlap", where)
            end = max(end, at + size)
    except CandidateError:
        raise
    except Exception as error:  # whatever a damaged directory sets off in zipfile
        raise CandidateError(
            f"not a complete torch checkpoint ({first_line(error)})", where
        ) from error
    return found


def _records(
    file: io.BufferedReader, directory: list[zipfile.ZipInfo], begin: int, end: int, where: str
) -> dict[str, tuple[int, int]]:
    """What `zip_records` returns, for the entries of an archive's directory.

    Records are in the folder of the first of them; those elsewhere are what another program has
    added.
    """
    if directory and min(record.header_offset for record in directory) != 0:
        raise CandidateError(
            "not a complete torch checkpoint: expected its first record at its begin", where
        )
    found: dict[str, tuple[int, int]] = {}
    own_folder: str | None = None
    for record in directory:
        if record.is_dir():
            continue
        at = _begin_of(file, record, begin, end, where)
        folder, _, name = record.filename.partition("/")
        own_folder = folder if own_folder is None else own_folder
        if folder != own_folder:
            continue
        if name in found:
            raise CandidateError(f"record {record.filename!r} occurs twice", where)
        found[name] = (at, record.file_size)
    return found


def _begin_of(
    file: io.BufferedReader, record: zipfile.ZipInfo, begin: int, end: int, where: str
) -> int:
    """First byte in the file of a record of the archive in bytes [begin, end).

    CandidateError if the record is not plain bytes there.
    """
    if record.volume or record.external_attr & DIRECTORY:
        raise CandidateError(
            f"record {record.filename!r} claims to be in another file or a directory", where
        )
    encrypted = record.flag_bits & 1
    if (
        record.compress_type != zipfile.ZIP_STORED
        or record.file_size != record.compress_size
        or encrypted
    ):
        raise CandidateError(
            f"record {record.filename!r} is compressed or encrypted, as torch.save never writes it",
            where,
        )
    file.seek(begin + record.header_offset)
    local = file.read(LOCAL_HEADER_BYTES)
    if local[:4] != LOCAL_HEADER:
        raise CandidateError(
            f"record {record.filename!r} is not where the archive's directory says", where
        )
    name_length = int.from_bytes(local[26:28], "little")
    extra_length = int.from_bytes(local[28:30], "little")
    at = begin + record.header_offset + LOCAL_HEADER_BYTES + name_length + extra_length
    if at + record.file_size > end:
        raise CandidateError(f"record {record.filename!r} goes beyond the end of the file", where)
    return at
