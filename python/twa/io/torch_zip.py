"""What torch.save writes: a zip archive of a pickle and plain records.

The pickle is interpreted without running anything (see `unpickle`); tensors are mapped where their
bytes lie. Files from before torch 1.6 are not read.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import MAX_NAME, first_line, is_unicode
from .errors import CandidateError, NoWeights, TwaError
from .foreign import foreign, foreign_archive, is_tar
from .mapped import MappedFile, Stored, TensorInfo, contiguous_strides, span
from .torch_pickle import NAMES, Described, NotDense, Odd, odd, parse_storage, runs
from .unpickle import MAX_PICKLE, Made, Ordered, Refused, unpickle

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: elements of a tensor that has fewer of its own: an expanded one may claim any shape
MAX_EXPANDED = 1 << 24
MAX_DEPTH = 16  # of dicts in dicts
MAX_DIRECTORY = 32 << 20  # bytes of an archive's directory: some 300,000 records
MAX_METADATA = 64  # entries of a module's own, in the _metadata of a state_dict
FEW_VALUES = 1 << 20  # plain values that any file may have
EXTRA_STATE = "_extra_state"  # how keys end under which modules store what is no tensor
#: attribute of a zip archive's entry, for which PyTorch gives uninitialised memory
DIRECTORY = 0x10
LOCAL_HEADER, LOCAL_HEADER_BYTES = b"PK\3\4", 30  # before each record of a zip archive
#: names in a pickle, one of which it has if it has a tensor of floating-point numbers
FLOAT_STORAGES = (b"FloatStorage", b"DoubleStorage", b"HalfStorage", b"BFloat16Storage", b"Untyped")


class Window(io.RawIOBase):
    """Some bytes of an open file, as a file of which not much is read at once."""

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
            if len(view) > MAX_DIRECTORY:
                raise TwaError(f"its directory is {len(view)} bytes: expected {MAX_DIRECTORY}")
            count = max(0, min(len(view), self.length - self.at))
            self.file.seek(self.begin + self.at)
            data = self.file.read(count)
            view[: len(data)] = data
        self.at += len(data)
        return len(data)


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """CandidateError for whatever a damaged or malicious pickle sets off."""
    try:
        yield
    except CandidateError:
        raise
    except Refused as error:
        raise CandidateError(
            f"refused: loading it would run code from the file ({error})", where
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
        strict: whether its pickle may name only what tensors and plain values need

    Attributes:
        records: name of each record -> (first byte in the file, bytes)
        content: what its pickle describes, with a Described for each tensor
        hostile: functions that it would have called and that no data need
        has_floats: whether it may have tensors of floating-point numbers
    """

    def __init__(
        self, file: MappedFile, begin: int, length: int, where: str, *, strict: bool = False
    ) -> None:
        self.file, self.where = file, where
        self.hostile: list[str] = []
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
        self.has_floats = any(name in pickle for name in FLOAT_STORAGES)
        with explained(where):
            self.content = unpickle(
                pickle, NAMES, parse_storage, unknown=None if strict else self._stand_in
            )

    def _stand_in(self, name: str) -> Made:
        """What stands for a class or function that its pickle names."""
        if runs(name) and len(self.hostile) < 3:
            self.hostile.append(name)
        return Made(name)

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
    contiguous = t.strides == contiguous_strides(t.shape)
    at = begin + t.offset * t.dtype.itemsize
    return Stored(file, info, at, None if contiguous else t.strides, t.negated)


def _open(path: Path, *, strict: bool = False) -> Archive:
    """The archive that is a whole file."""
    file = MappedFile(path)
    if not file.size:
        raise CandidateError("not a complete torch checkpoint: it is empty", path)
    if bytes_of(path, 0, 4) != LOCAL_HEADER:
        if what := foreign(path):
            kind = NoWeights if is_tar(path) else CandidateError
            raise kind(f"not a torch checkpoint: {what}", path)
        old = bytes_of(path, 0, 2) == b"\x80\x02"  # a pickle of protocol 2
        raise CandidateError(
            "not a torch checkpoint: expected a zip archive as torch.save writes it"
            + "; a file from before PyTorch 1.6 must be loaded with torch.load(weights_only=True)"
            " and saved again" * old,
            path,
        )
    return Archive(file, 0, file.size, str(path), strict=strict)


# What is in them ---------------------------------------------------------------------------------


class Entries(dict[str, object]):
    """A dict of a checkpoint, with a Source for each tensor and Entries for each dict in it.

    Attributes:
        metadata: the `_metadata` of a saved state_dict; {} if there is none, or it is not plain
        extra: name -> plain value, with tensors in memory, where a name ends in `_extra_state` and
            the value is no tensor; a Made of the class's name, if the value is not plain
        odd: name -> what stands there that may be meant for a weight and is not read
        others: names of plain values, which are left out
        numbers: those of them that are numbers
        has_floats: whether there may be floating-point tensors anywhere in the file
    """

    def __init__(self) -> None:
        super().__init__()
        self.metadata: dict[str, dict[str, object]] = {}
        self.extra: dict[str, object] = {}
        self.odd: dict[str, Odd] = {}
        self.has_floats = False
        self.others: list[str] = []
        self.numbers: dict[str, object] = {}

    def put(self, name: str, value: object) -> None:
        """Adds a tensor or dict; what cannot be told from others by its name is odd."""
        if len(name) > MAX_NAME:
            self.odd[f"{name[:100]}..."] = Odd(f"one with a name of {len(name)} characters")
        elif not is_unicode(name):
            self.odd[ascii(name)] = Odd("one with a name that is no text")
        elif name in self:
            self.odd[name] = Odd("two of one name")
        else:
            self[name] = value


def described(path: Path) -> object:
    """What the pickle of a file describes, with a Made for each object; tensors are not looked up.

    Raises:
        CandidateError: the file is damaged, or no torch checkpoint
    """
    return _open(path).content


def read_torch(path: Path) -> object:
    """The Entries of a checkpoint; None if it is no kind of dict.

    Raises:
        CandidateError: the file is damaged, no torch checkpoint, or all of it is one object
    """
    archive = _open(path)
    if archive.hostile:
        warnings.warn(
            f"{path}: torch.load(weights_only=False) of it would call"
            f" {', '.join(archive.hostile)}, which no data need; nothing was run here",
            stacklevel=2,
        )
    content = archive.content
    if isinstance(content, Made) and content.items is not None:
        content = content.items
    if found := odd(content):
        error = found.error(path)
        if found.is_weights or archive.has_floats:
            raise error
        raise NoWeights(error.problem, path)
    values = Values(archive)
    done: dict[int, Entries] = {}  # a dict may occur many times, even in itself

    def entries_of(items: dict[object, object], depth: int) -> Entries:
        if id(items) in done:
            return done[id(items)]
        out = done[id(items)] = Entries()
        out.metadata, out.has_floats = metadata_of(items), archive.has_floats
        for key, value in items.items():
            name = named(key)
            inner = value.items if isinstance(value, Made) else value
            if isinstance(value, Described):
                out.put(name, archive.place(value))
            elif name.endswith(EXTRA_STATE) and not isinstance(value, NotDense):
                out.extra[name] = values.or_made(value)
            elif isinstance(inner, dict):
                if depth < MAX_DEPTH:
                    out.put(name, entries_of(inner, depth + 1))
            elif found := odd(value):
                out.odd[name] = found
            else:
                out.others.append(name)
                if isinstance(value, int | float):
                    out.numbers[name] = value
        return out

    if isinstance(content, dict):
        return entries_of(content, 1)
    if isinstance(content, list | tuple) and archive.has_floats:
        raise CandidateError(
            f"expected a dict of tensors (a state_dict), found a {type(content).__name__}: save the"
            " one that is meant",
            path,
        )
    return None


def named(key: object) -> str:
    """A key as the name of a tensor. Keys are plain values, tuples of them, or a Made."""
    if isinstance(key, str):
        return key
    if isinstance(key, tuple):
        return str(tuple(k[: MAX_NAME + 1] if isinstance(k, str | bytes) else k for k in key))
    return str(key[: MAX_NAME + 1] if isinstance(key, bytes) else key)


def metadata_of(items: dict[object, object]) -> dict[str, dict[str, object]]:
    """The `_metadata` attribute of a saved state_dict, if it is plain, else {}."""
    state = items.state if isinstance(items, Ordered) else None
    found = state.get("_metadata") if isinstance(state, dict) else None
    if not isinstance(found, dict):
        return {}
    out: dict[str, dict[str, object]] = {}
    for name, entries in found.items():
        if not isinstance(name, str) or not isinstance(entries, dict):
            return {}
        if len(entries) > MAX_METADATA or not all(map(_is_fact, entries.items())):
            return {}
        out[name] = {str(key): value for key, value in entries.items()}
    return out


def _is_fact(item: tuple[object, object]) -> bool:
    """Whether this is a name and a plain number, text or None."""
    return isinstance(item[0], str) and isinstance(item[1], int | float | str | bool | None)


class NotPlain(ValueError):
    """A value is, or holds, something that is no plain value."""

    def __init__(self, made: Made) -> None:
        super().__init__(repr(made))
        self.made = made


class Values:
    """Plain values of an archive: dicts, lists, tuples, numbers, texts; and tensors, in memory."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        # tensors may share their bytes, and values be the same, but not to make much out of little
        self.left = 4 * archive.file.size
        self.values_left = max(4 * archive.file.size, FEW_VALUES)
        self.done: dict[int, tuple[object, int, object]] = {}

    def tensor(self, t: Described) -> Tensor:
        """A tensor, in memory."""
        source = self.archive.place(t)
        self.left -= source.info.nbytes
        if self.left < 0:
            raise CandidateError("its tensors claim more bytes than it has", self.archive.where)
        return source.read().clone()

    def of(self, value: object) -> object:
        """A value; NotPlain if there is anything else in it, too many levels, or too many values.

        Each counts as often as who walks through it would meet it.
        """
        found, count = self._counted(value, 0)
        self._check(count)
        self.values_left -= count
        return found

    def _check(self, count: int) -> None:
        """NotPlain for more values than are left."""
        if count > self.values_left:
            raise NotPlain(Made("more values than it has bytes"))

    def _counted(self, value: object, depth: int) -> tuple[object, int]:
        """A value, and how many it is."""
        if depth > MAX_DEPTH:
            raise NotPlain(Made(f"more than {MAX_DEPTH} levels"))
        if id(value) in self.done:
            return self.done[id(value)][:2]
        found: object
        inside: list[tuple[object, int]] = []
        if isinstance(value, dict):
            inside = [self._counted(v, depth + 1) for v in itertools.chain(value, value.values())]
            plain = [v for v, _ in inside]
            found = dict(zip(plain, plain[len(value) :], strict=False))
        elif isinstance(value, list | tuple):
            inside = [self._counted(v, depth + 1) for v in value]
            found = type(value)(v for v, _ in inside)
        elif isinstance(value, Described):
            found = self.tensor(value)
        elif isinstance(value, int | float | str | bytes | torch.dtype | None):
            found = value
        else:
            raise NotPlain(value if isinstance(value, Made) else Made(type(value).__name__))
        count = 1 + sum(count for _, count in inside)
        self._check(count)
        self.done[id(value)] = found, count, value  # kept, so that its id stays its own
        return found, count

    def or_made(self, value: object) -> object:
        """A value; the Made that is in it, if it is not plain."""
        try:
            return self.of(value)
        except NotPlain as error:
            return error.made


def read_values(path: Path) -> object:
    """The content of a small file of plain values, with its tensors in memory.

    Plain are dicts, lists, tuples, numbers and texts.
    """
    archive = _open(path, strict=True)
    try:
        return Values(archive).of(archive.content)
    except NotPlain as error:
        raise CandidateError(f"expected plain values, found {error}", path) from error


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
            if what := foreign_archive(archive.namelist()):
                raise CandidateError(f"not a torch checkpoint: {what}", where)
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
