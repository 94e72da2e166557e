"""What torch.save writes: a zip archive of a pickle and plain records, or, before torch 1.6,
pickles and then plain bytes. The pickle is interpreted without running anything (see `unpickle`);
tensors are mapped where their bytes lie."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .mapped import (
    CandidateError,
    MappedFile,
    Stored,
    TensorInfo,
    are_sizes,
    check_name,
    first_line,
    span,
)
from .unpickle import INERT, MAX_PICKLE, Made, Name, Refused, checked_key, unpickle

# elements of a tensor that has fewer of its own: an expanded one may claim any shape
MAX_EXPANDED = 1 << 24
MAX_DEPTH = 16  # of dicts
DIRECTORY = 0x10  # attribute of a zip archive's entry, for which PyTorch gives uninitialised memory
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6


class Window(io.RawIOBase):
    """Some bytes of an open file as a file."""

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
            raise ValueError(f"seek before the begin: {at}")
        self.at = at
        return at

    def readinto(self, buffer: memoryview) -> int:
        count = max(0, min(len(buffer), self.length - self.at))
        self.file.seek(self.begin + self.at)
        data = self.file.read(count)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


# What the pickles of torch.save ask for ----------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """key: of its bytes in the file;  count: elements of this dtype"""

    dtype: torch.dtype
    key: object
    count: int


@dataclass(frozen=True, eq=False)
class Described:
    """A tensor as a pickle describes it: nothing of it is checked but its dtype."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negated: bool


@dataclass(frozen=True, eq=False)
class NotDense:
    """A sparse, quantised or nested tensor, or one of a subclass."""

    kind: str


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple) -> Described:
    return _tensor_v3(storage, offset, shape, strides, False, None, storage.dtype)


def _tensor_v2(
    storage: Storage,
    offset: int,
    shape: tuple,
    strides: tuple,
    requires_grad: bool,
    hooks: object,
    metadata=None,
) -> Described:
    return _tensor_v3(
        storage, offset, shape, strides, requires_grad, hooks, storage.dtype, metadata
    )


def _tensor_v3(
    storage: Storage,
    offset: int,
    shape: tuple,
    strides: tuple,
    requires_grad: bool,
    hooks: object,
    dtype: torch.dtype,
    metadata: object = None,
) -> Described:
    if (
        type(storage) is not Storage
        or type(dtype) is not torch.dtype
        or type(requires_grad) is not bool
    ):
        raise ValueError("expected a tensor's storage and dtype")
    if metadata and (
        type(metadata) is not dict
        or not {"neg": True, "conj": False}.items() >= metadata.items()
        or not dtype.is_floating_point
    ):
        raise ValueError("expected a plain tensor, or one that is negated when it is read")
    if not (
        type(shape) is type(strides) is tuple
        and are_sizes((offset, *shape))
        and are_sizes(strides)
        and len(shape) == len(strides)
    ):
        raise ValueError("expected a tensor's sizes and strides")
    return Described(storage, dtype, offset, shape, strides, bool(metadata) and "neg" in metadata)


def _parameter(data: object, *_: object) -> object:
    if type(data) not in (Described, NotDense):
        raise ValueError("expected the tensor of a parameter")
    return data


def _of_type(rebuild: object, kind: object, arguments: tuple, state: object) -> object:
    """A tensor with attributes of its own, which are left out."""
    if (
        type(rebuild) is not Name
        or type(arguments) is not tuple
        or kind not in (_TENSOR, _PARAMETER)
    ):
        raise Refused("it makes a tensor of another class")
    return _parameter(rebuild.make(*arguments))


def ordered(pairs: list = ()) -> dict:
    """An OrderedDict's."""
    return {checked_key(key): value for key, value in pairs}


def _latin(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise ValueError("expected bytes as latin1")
    return text.encode("latin1")


_TENSOR, _PARAMETER = (
    Name(Made),
    Name(
        lambda *arguments: (
            arguments[0] if arguments and type(arguments[0]) is Described else Made(*arguments)
        )
    ),
)
_DENSE = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
)
_DENSE += (
    "complex128",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
_NOT_DENSE = {
    "_rebuild_sparse_tensor": "a sparse one",
    "_rebuild_qtensor": "a quantised one",
    "_rebuild_nested_tensor": "a nested one",
    "_rebuild_meta_tensor_no_storage": "one without data",
    "_rebuild_wrapper_subclass": "one of a subclass",
    "_rebuild_device_tensor_from_numpy": "one of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "one of another device",
}
NAMES: dict[str, object] = {
    "torch._utils._rebuild_tensor": Name(_tensor),
    "torch._utils._rebuild_tensor_v2": Name(_tensor_v2),
    "torch._utils._rebuild_tensor_v3": Name(_tensor_v3),
    "torch._utils._rebuild_parameter": Name(_parameter),
    "torch._utils._rebuild_parameter_with_state": Name(_parameter),
    "torch._tensor._rebuild_from_type_v2": Name(_of_type),
    "torch.Tensor": _TENSOR,
    "torch.nn.parameter.Parameter": _PARAMETER,
    "torch.Size": Name(tuple),
    "collections.OrderedDict": Name(ordered),
    "_codecs.encode": Name(_latin),
    "argparse.Namespace": INERT,  # timm and many scripts store their arguments
    "collections.Counter": INERT,  # of learning-rate schedulers
    "builtins.bytearray": INERT,
    "builtins.complex": INERT,
    "builtins.set": INERT,
    "torch.device": INERT,
    "torch.serialization._get_layout": INERT,
}
NAMES |= {
    f"torch._utils.{name}": Name(lambda *_, kind=kind: NotDense(kind))
    for name, kind in _NOT_DENSE.items()
}
NAMES |= {
    f"{module}.{name}": Storage(dtype, None, 0)
    for module in ("torch", "torch.cuda", "torch.storage")
    for name, dtype in _STORAGES.items()
}
# of quantised tensors
NAMES |= {
    f"torch.{name}": Storage(torch.uint8, None, 0)
    for name in ("QInt8Storage", "QUInt8Storage", "QInt32Storage")
}
NAMES |= {
    f"torch.{name}": INERT
    for name in (
        "per_tensor_affine",
        "per_tensor_symmetric",
        "per_channel_affine",
        "per_channel_symmetric",
    )
}
NAMES |= {f"torch.{name}": getattr(torch, name) for name in _DENSE if hasattr(torch, name)}


def _storage(id_: object) -> Storage:
    """("storage", type, key, device, elements), and in old files what part of it"""
    if (
        type(id_) is not tuple
        or len(id_) not in (5, 6)
        or id_[0] != "storage"
        or type(id_[1]) is not Storage
        or id_[5:] not in ((), (None,))
    ):
        raise ValueError("expected a storage")
    if type(id_[2]) not in (str, int) or not are_sizes((id_[4],)):
        raise ValueError("expected the key and the size of a storage")
    return Storage(id_[1].dtype, str(id_[2]), id_[4])


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """CandidateError for whatever a damaged or malicious pickle sets off."""
    try:
        yield
    except CandidateError:
        raise
    except Refused as error:
        raise CandidateError(
            f"{where}: refused: loading it would run code from the file; save the state_dict alone,"
            f" for example as safetensors ({error})"
        ) from error
    except Exception as error:
        raise CandidateError(
            f"{where}: not a complete torch checkpoint ({type(error).__name__}:"
            f" {first_line(error)})"
        ) from error


# Where their tensors lie -------------------------------------------------------------------------


class Archive:
    """A zip archive in `length` bytes of a file.

    content  of its pickle, with a Described for each tensor
    """

    def __init__(self, file: MappedFile, begin: int, length: int, where: str) -> None:
        self.file, self.where = file, where
        self.records = zip_records(file.path, begin, length, where)
        order = (
            bytes_of(file.path, *self.records["byteorder"])[:8]
            if "byteorder" in self.records
            else b"little"
        )
        if order not in (b"little", b"big") or "data.pkl" not in self.records:
            raise CandidateError(
                f"{where}: not a complete torch checkpoint: expected records data.pkl and byteorder"
                " as torch.save writes them"
            )
        self.swapped = order != sys.byteorder.encode()
        if self.records["data.pkl"][1] > MAX_PICKLE:
            raise CandidateError(
                f"{where}: expected at most {MAX_PICKLE} bytes in data.pkl, found"
                f" {self.records['data.pkl'][1]}"
            )
        with explained(where):
            self.content, _ = unpickle(
                bytes_of(file.path, *self.records["data.pkl"]), NAMES, _storage
            )

    def place(self, t: Described) -> Stored:
        at = self.records.get(f"data/{t.storage.key}")
        if at is None:
            raise CandidateError(
                f"{self.where}: not a complete torch checkpoint: it has no record"
                f" {t.storage.key[:100]!r} for a tensor"
            )
        return stored(t, self.file, *at, self.swapped, self.where)


def stored(
    t: Described, file: MappedFile, begin: int, size: int, swapped: bool, where: str
) -> Stored:
    """A tensor whose storage has `size` bytes from `begin` on."""
    info = TensorInfo(t.shape, t.dtype)
    if math.prod(t.shape) == 0:
        return Stored(file, info, 0)
    own = span(t.shape, t.strides)
    needed = (t.offset + own) * t.dtype.itemsize
    if needed > size or t.storage.count * t.storage.dtype.itemsize != size:
        raise CandidateError(
            f"{where}: not a complete torch checkpoint: a tensor {info} needs {needed} bytes of its"
            f" record, found {size}"
        )
    if math.prod(t.shape) > max(own, MAX_EXPANDED):
        raise CandidateError(
            f"{where}: a tensor {info} is expanded from {own} elements: expected at most"
            f" {MAX_EXPANDED} then"
        )
    contiguous = t.strides == tuple(math.prod(t.shape[d + 1 :]) for d in range(len(t.shape)))
    return Stored(
        file,
        info,
        begin + t.offset * t.dtype.itemsize,
        None if contiguous else t.strides,
        swapped,
        t.negated,
    )


def _open(path: Path) -> tuple[object, Callable[[Described], Stored]]:
    """The content of a checkpoint with a Described for each tensor, and where these are."""
    file = MappedFile(path)
    if not file.size:
        raise CandidateError(f"{path}: not a complete torch checkpoint: it is empty")
    if bytes_of(path, 0, 4) == b"PK\3\4":
        archive = Archive(file, 0, file.size, str(path))
        return archive.content, archive.place
    with explained(str(path)):
        return _legacy(file)


def _legacy(file: MappedFile) -> tuple[object, Callable[[Described], Stored]]:
    """Before torch 1.6: five pickles, of which the last has the storages' keys, then each storage's
    elements and bytes.
    """
    data, storages = memoryview(file.map)[:MAX_PICKLE], {}

    def seen(id_: object) -> Storage:
        storage = _storage(id_)
        storages.setdefault(storage.key, storage)
        return storage

    magic, at = unpickle(data, {})
    if magic != MAGIC:
        raise ValueError("it is no zip archive, and does not begin as files before torch 1.6 do")
    protocol, at = unpickle(data, {}, at=at)
    if protocol != PROTOCOL:
        raise ValueError("unknown version")
    _, at = unpickle(data, {}, at=at)
    content, at = unpickle(data, NAMES, seen, at)
    keys, at = unpickle(data, {}, at=at)
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        if type(key) is not str or key in places:
            raise ValueError("expected the keys of its storages")
        count, size = int.from_bytes(file.map[at : at + 8], "little"), storages[key].dtype.itemsize
        places[key], at = (at + 8, count * size), at + 8 + count * size
    if at != file.size:
        raise ValueError(f"expected {at} bytes, found {file.size}")

    def place(t: Described) -> Stored:
        if t.storage.key not in places:
            raise CandidateError(
                f"{file.path}: not a complete torch checkpoint: it has no bytes for a tensor"
                f" {list(t.shape)}"
            )
        return stored(t, file, *places[t.storage.key], sys.byteorder != "little", str(file.path))

    return content, place


def read_torch(path: Path) -> object:
    """The nested dicts of a checkpoint with a Source in the place of each tensor; what else is in
    it is left out.
    """
    content, place = _open(path)
    done: dict[int, object] = {}  # a dict may occur many times, even in itself

    def replaced(value: object, depth: int) -> object:
        if isinstance(value, NotDense):
            raise CandidateError(f"{path}: expected dense tensors, found {value.kind}")
        if isinstance(value, Described):
            return place(value)
        if not isinstance(value, dict) or depth == MAX_DEPTH:
            return None
        if id(value) not in done:
            done[id(value)] = out = {}
            for k, v in value.items():
                if (found := replaced(v, depth + 1)) is not None:
                    name = str(k)  # keys are plain values: see unpickle
                    check_name(name, path)
                    if name in out:
                        raise CandidateError(f"{path}: {name!r} occurs twice")
                    out[name] = found
        return done[id(value)]

    return replaced(content, 0)


def read_values(path: Path) -> object:
    """All of a small file of plain values: dicts, lists, tuples, numbers, texts, with its tensors
    in memory.
    """
    content, place = _open(path)
    done: dict[int, tuple[object, object]] = {}
    # tensors may share their bytes, but not to make much out of little
    left = 4 * path.stat().st_size

    def tensor(t: Described) -> Tensor:
        nonlocal left
        source = place(t)
        left -= source.info.nbytes
        if left < 0:
            raise CandidateError(f"{path}: its tensors claim more bytes than it has")
        return source.read().clone()

    def replaced(value: object, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise CandidateError(f"{path}: expected at most {MAX_DEPTH} levels")
        if id(value) in done:
            return done[id(value)][0]
        if isinstance(value, dict):
            found = {k: replaced(v, depth + 1) for k, v in value.items()}
        elif isinstance(value, list | tuple):
            found = type(value)(replaced(v, depth + 1) for v in value)
        else:
            found = tensor(value) if isinstance(value, Described) else value
        done[id(value)] = found, value  # kept, so that its id stays its own
        return found

    return replaced(content, 0)


def bytes_of(path: Path, offset: int, count: int) -> bytes:
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(count)


def zip_records(path: Path, begin: int, length: int, where: str) -> dict[str, tuple[int, int]]:
    """Records of a torch archive in `length` bytes of a file: name without the archive's own ->
    (offset in the file, size). All must be uncompressed, within the file and apart from each other.
    """
    found: dict[str, tuple[int, int]] = {}
    prefix = None
    try:
        with open(path, "rb") as f, zipfile.ZipFile(Window(f, begin, length)) as archive:
            directory = archive.infolist()
            if directory and min(record.header_offset for record in directory):
                raise CandidateError(
                    f"{where}: not a complete torch checkpoint: expected its first record at its"
                    " begin"
                )
            for record in directory:
                if record.is_dir():
                    continue
                if record.volume or record.external_attr & DIRECTORY:
                    raise CandidateError(
                        f"{where}: record {record.filename!r} claims to be in another file or a"
                        " directory"
                    )
                if (
                    record.compress_type != zipfile.ZIP_STORED
                    or record.file_size != record.compress_size
                    or record.flag_bits & 1
                ):
                    raise CandidateError(
                        f"{where}: record {record.filename!r} is compressed or encrypted, as"
                        " torch.save never writes it"
                    )
                f.seek(begin + record.header_offset)
                local = f.read(30)
                if local[:4] != b"PK\3\4":
                    raise CandidateError(
                        f"{where}: record {record.filename!r} is not where the archive's directory"
                        " says"
                    )
                at = (
                    begin
                    + record.header_offset
                    + 30
                    + int.from_bytes(local[26:28], "little")
                    + int.from_bytes(local[28:30], "little")
                )
                if at + record.file_size > begin + length:
                    raise CandidateError(
                        f"{where}: record {record.filename!r} goes beyond the end of the file"
                    )
                folder, _, name = record.filename.partition("/")
                if folder != (prefix := folder if prefix is None else prefix):
                    continue  # what another program has added
                if name in found:
                    raise CandidateError(f"{where}: record {record.filename!r} occurs twice")
                found[name] = (at, record.file_size)
        at = begin
        for offset, size in sorted(found.values()):
            if offset < at and size:
                raise CandidateError(
                    f"{where}: not a complete torch checkpoint: its records overlap"
                )
            at = max(at, offset + size)
    except CandidateError:
        raise
    except Exception as error:  # whatever a damaged directory sets off in zipfile
        raise CandidateError(
            f"{where}: not a complete torch checkpoint ({first_line(error)})"
        ) from error
    return found
