"""What torch.save writes: a zip archive of a pickle and plain records. The pickle is read by torch.load(weights_only=True), which runs nothing, to
the "meta" device, which reads no tensors; they are then mapped where their records lie."""

from __future__ import annotations

import argparse
import io
import math
import pickle
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .mapped import CandidateError, InMemory, MappedFile, Source, Stored, TensorInfo, first_line, span


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


def load(file: Path | io.IOBase, path: Path, map_location: str) -> object:
    """torch.load of data only; a pickle that wants to run anything is refused. path: for messages."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain attributes; timm and many scripts store their arguments
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if re.search("Unsupported|GLOBAL|weights_only", str(error)):
            raise CandidateError(
                f"{path}: refused: loading it would run code from the file; save the state_dict alone, for example as safetensors "
                f"({first_line(error)})"
            ) from error
        raise CandidateError(f"{path}: not a torch checkpoint ({first_line(error)})") from error
    except MemoryError as error:
        raise CandidateError(f"{path}: not a torch checkpoint: it asks for more memory than there is") from error
    except (Exception, RecursionError) as error:  # whatever a damaged pickle sets off in the unpickler
        raise CandidateError(f"{path}: not a complete torch checkpoint ({type(error).__name__}: {first_line(error)})") from error


def read_torch(path: Path) -> object:
    """The checkpoint's content, with a Source in the place of each tensor."""
    if not zipfile.is_zipfile(path):
        return _legacy(path)
    records = zip_records(path, 0, path.stat().st_size, str(path))
    if "byteorder" in records and bytes_of(path, *records["byteorder"]) != sys.byteorder.encode():
        return _legacy(path)  # on "meta", PyTorch would swap bytes that are not there
    content = load(path, path, map_location="meta")
    file, places = MappedFile(path), dict(records.values())
    return _replaced(content, lambda t: stored(t, file, 0, places, str(path)))


def bytes_of(path: Path, offset: int, count: int) -> bytes:
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(count)


def _legacy(path: Path) -> object:
    """Files that cannot be mapped as they are (before torch 1.6, or of the other byte order) are loaded whole, and mapped from a temporary copy."""
    content = load(path, path, map_location="cpu")
    tensors: list[Tensor] = []
    _replaced(content, lambda t: tensors.append(t))
    copies = _spilled([t for t in tensors if t.layout == torch.strided and not t.is_quantized and t.numel()], path)
    return _replaced(content, lambda t: copies.get(id(t), InMemory(t)))


def _spilled(tensors: list[Tensor], path: Path) -> dict[int, Stored]:
    """Copies in a temporary file that disappears with this process."""
    places, at = {}, 0
    with tempfile.NamedTemporaryFile(prefix="twa-", suffix=path.suffix) as f:
        for t in tensors:
            f.seek(at)
            f.write(memoryview(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
            places[id(t)] = (TensorInfo(tuple(t.shape), t.dtype), at)
            at += -(-t.numel() * t.element_size() // 64) * 64
        f.truncate(max(at, 1))
        f.flush()
        file = MappedFile(Path(f.name))
        _ = file.map  # before the name is gone
    file.path, file.temporary = path, True  # the name of what it is a copy of
    return {key: Stored(file, info, offset) for key, (info, offset) in places.items()}


def zip_records(path: Path, begin: int, length: int, where: str) -> dict[str, tuple[int, int]]:
    """Records of a torch archive in `length` bytes of a file: name without the archive's own -> (offset in the file, size). All must be uncompressed
    and within the file."""
    found: dict[str, tuple[int, int]] = {}
    try:
        with open(path, "rb") as f, zipfile.ZipFile(Window(f, begin, length)) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size or record.flag_bits & 1:
                    raise CandidateError(f"{where}: record {record.filename!r} is compressed or encrypted, as torch.save never writes it")
                f.seek(begin + record.header_offset)
                local = f.read(30)
                if local[:4] != b"PK\3\4":
                    raise CandidateError(f"{where}: record {record.filename!r} is not where the archive's directory says")
                at = begin + record.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                if at + record.file_size > begin + length:
                    raise CandidateError(f"{where}: record {record.filename!r} goes beyond the end of the file")
                name = record.filename.partition("/")[2]
                if name in found:
                    raise CandidateError(f"{where}: record {record.filename!r} occurs twice")
                found[name] = (at, record.file_size)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, UnicodeError) as error:
        if isinstance(error, CandidateError):
            raise
        raise CandidateError(f"{where}: not a complete torch checkpoint ({first_line(error)})") from error
    return found


def stored(t: Tensor, file: MappedFile, begin: int, places: Mapping[int, int], where: str) -> Source:
    """Where a tensor that was loaded to "meta" lies. places: offset in the file -> size of each record; begin: where the archive begins."""
    if t.device.type != "meta":
        return InMemory(t)
    if t.layout != torch.strided or t.is_quantized or t.is_nested:
        raise CandidateError(f"{where}: expected dense tensors, found {'a quantised one' if t.is_quantized else f'layout {t.layout}'}")
    shape, strides = tuple(t.shape), t.stride()
    info = TensorInfo(shape, t.dtype)
    if math.prod(shape) == 0:
        return Stored(file, info, 0)
    relative = getattr(t.untyped_storage(), "_checkpoint_offset", None)
    size = None if relative is None else places.get(begin + relative)
    needed = (t.storage_offset() + span(shape, strides)) * t.dtype.itemsize
    if size is None:
        raise CandidateError(
            f"{where}: its records are not where torch.save puts them; was it packed again by another program? Load and save it again"
        )
    if needed > size:
        raise CandidateError(f"{where}: not a complete torch checkpoint: a tensor {info} needs {needed} bytes of its record, found {size}")
    return Stored(file, info, begin + relative + t.storage_offset() * t.dtype.itemsize, None if t.is_contiguous() else strides)


def _replaced(content: object, of: Callable[[Tensor], object], depth: int = 0) -> object:
    """The nested dicts of a checkpoint with of(tensor) for each tensor; what else is in it is left out."""
    if isinstance(content, Tensor):
        return of(content)
    if isinstance(content, Mapping) and depth < 16:
        return {str(k): v for k, v in ((k, _replaced(v, of, depth + 1)) for k, v in content.items()) if v is not None}
    return None
