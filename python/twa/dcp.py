"""torch.distributed.checkpoint directories, read without running anything in them: `.metadata` is a pickle, of which only plain records are
accepted."""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import torch

from .mapped import CandidateError, MappedFile, Pieces, Source, Stored, TensorInfo, covered
from .torch_files import Window, bytes_of, load, stored, zip_records

METADATA = ".metadata"
MAX_METADATA = 256 << 20


class _Record:
    """Stands for any class of the metadata: keeps what was stored, does nothing."""

    fields: object = ()  # of one that is made without a call

    def __init__(self, *arguments: object) -> None:
        self.fields = arguments

    def __setstate__(self, state: object) -> None:
        self.fields = state

    def get(self, name: str) -> object:
        return self.fields.get(name) if isinstance(self.fields, dict) else None


_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath"),
    "torch.storage": ("_LegacyStorage",),
}


class _Properties(_Record):
    """TensorProperties stores itself as a tuple: dtype first."""

    @property
    def dtype(self) -> object:
        return self.fields[0] if isinstance(self.fields, tuple) and self.fields else self.get("dtype")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if name == "TensorProperties" and name in _RECORDS.get(module, ()):
            return _Properties
        if name in _RECORDS.get(module, ()):
            return _Record
        raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}")


def read(folder: Path) -> tuple[dict[str, object], tuple[Path, ...]]:
    """Nested dicts with a Source for each tensor, as they were given to torch.distributed.checkpoint.save; and the files."""
    path = folder / METADATA
    if path.stat().st_size > MAX_METADATA:
        raise CandidateError(f"{path}: expected at most {MAX_METADATA} bytes, found {path.stat().st_size}")
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # whatever a damaged pickle sets off
        raise CandidateError(f"{path}: not the metadata of a torch.distributed.checkpoint ({type(error).__name__}: {str(error)[:200]})") from error
    tensors, storage, plan = (
        metadata.get(k) if isinstance(metadata, _Record) else None for k in ("state_dict_metadata", "storage_data", "planner_data")
    )
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        raise CandidateError(f"{path}: expected the metadata of a torch.distributed.checkpoint, found {type(metadata).__name__}")
    return _Reader(folder, storage).nested(tensors, plan if isinstance(plan, dict) else {})


class _Reader:
    def __init__(self, folder: Path, storage: Mapping[object, object]) -> None:
        self.folder = folder
        self.files: dict[str, MappedFile] = {}
        self.places: dict[tuple[object, object], _Record] = {}
        for index, place in storage.items():
            if isinstance(index, _Record) and isinstance(place, _Record):
                self.places[index.get("fqn"), index.get("offset")] = place

    def nested(self, tensors: Mapping[object, object], plan: Mapping[object, object]) -> tuple[dict[str, object], tuple[Path, ...]]:
        out: dict[str, object] = {}
        for name, description in tensors.items():
            if not isinstance(name, str) or not isinstance(description, _Record) or not isinstance(description.get("chunks"), list):
                continue  # bytes: counters, learning rates, ...
            steps = plan.get(name)
            if not isinstance(steps, tuple) or not steps or not all(isinstance(s, str | int) for s in steps):
                steps = (name,)
            at = out
            for step in steps[:-1]:
                at = at.setdefault(str(step), {})
                if not isinstance(at, dict):
                    raise CandidateError(f"{self.folder}: {name!r} is inside a tensor")
            if str(steps[-1]) in at:
                raise CandidateError(f"{self.folder}: {name!r} occurs twice")
            at[str(steps[-1])] = self.tensor(name, description)
        return out, (self.folder / METADATA, *(self.folder / name for name in self.files))

    def tensor(self, name: str, description: _Record) -> Source:
        where = f"{self.folder}: tensor {name!r}"
        shape, properties = description.get("size"), description.get("properties")
        dtype = properties.dtype if isinstance(properties, _Properties) else None
        if not _is_sizes(shape) or not isinstance(dtype, torch.dtype):
            raise CandidateError(f"{where}: expected a shape and a dtype")
        blocks = []
        for chunk in description.get("chunks"):
            offsets, sizes = (chunk.get(k) if isinstance(chunk, _Record) else None for k in ("offsets", "sizes"))
            if not _is_sizes(offsets) or not _is_sizes(sizes):
                raise CandidateError(f"{where}: expected offsets and sizes of each block")
            blocks.append((offsets, sizes))
        if not covered(shape, blocks):
            raise CandidateError(f"{where}: its blocks do not cover its shape {list(shape)} once")
        pieces = tuple((offsets, self.block(name, offsets, TensorInfo(sizes, dtype), where)) for offsets, sizes in blocks)
        if len(pieces) == 1:
            return pieces[0][1]
        return Pieces(TensorInfo(shape, dtype), pieces)

    def block(self, name: str, offsets: tuple[int, ...], info: TensorInfo, where: str) -> Stored:
        """One record: a tensor written by torch.save at some bytes of a file."""
        place = self.places.get((name, offsets)) or self.places.get((name, None))
        file, begin, length = (place.get(k) if place else None for k in ("relative_path", "offset", "length"))
        if (
            not isinstance(file, str)
            or not _is_sizes((begin, length))
            or file != PurePosixPath(file).name
            or "\\" in file
            or "\0" in file
            or file in ("", "..")
        ):
            raise CandidateError(f"{where}: expected the name of a file in the directory, found {file!r}")
        if place.get("transform_descriptors"):
            raise CandidateError(f"{where}: it is compressed or otherwise transformed, which is not supported: save it without extensions")
        path = self.folder / file
        if file not in self.files:
            if not path.is_file():
                raise CandidateError(f"{path}: no such file, but {METADATA} names it")
            self.files[file] = MappedFile(path)
        if begin + length > self.files[file].size:
            raise CandidateError(f"{path}: not complete: {where} needs bytes {begin} to {begin + length} of {self.files[file].size}")
        records = zip_records(path, begin, length, f"{path} ({name!r})")
        if "byteorder" in records and bytes_of(path, *records["byteorder"]) != sys.byteorder.encode():
            raise CandidateError(f"{path}: written on a machine of the other byte order, which is not supported")
        with open(path, "rb") as f:
            t = load(io.BufferedReader(Window(f, begin, length)), path, map_location="meta")
        if not isinstance(t, torch.Tensor):
            raise CandidateError(f"{where}: expected a tensor, found {type(t).__name__}")
        source = stored(t, self.files[file], begin, dict(records.values()), where)
        if source.info != info or not isinstance(source, Stored):
            raise CandidateError(f"{where}: expected a block {info}, found {source.info}")
        return source


def _is_sizes(value: object) -> bool:
    return isinstance(value, tuple) and all(type(v) is int and 0 <= v < 1 << 60 for v in value)
