"""torch.distributed.checkpoint directories, read without running anything in them.

`.metadata` is a pickle, of which only plain records are accepted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch

from .checks import are_sizes, bytes_of_file, check_name, first_line, is_file_name, is_shape
from .errors import CandidateError
from .foreign import foreign
from .mapped import MappedFile, Pieces, Source, Stored, TensorInfo, covered
from .torch_pickle import Described, odd, ordered
from .torch_zip import MAX_DEPTH, Archive
from .unpickle import INERT, MAX_PICKLE, Made, Name, Refused, unpickle

METADATA = ".metadata"
_CLASSES = {
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
_NAMES: dict[str, object] = {
    f"{module}.{name}": INERT for module, names in _CLASSES.items() for name in names
}
_NAMES |= {
    f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_NAMES |= {"torch.Size": Name(tuple), "collections.OrderedDict": Name(ordered)}


def is_unfinished(folder: Path) -> bool:
    """Whether a directory has parts of a checkpoint without the metadata, which are written last.

    Its save goes on, as after `async_save`, or was interrupted.
    """
    return not (folder / METADATA).is_file() and any(folder.glob("*.distcp"))


def read(folder: Path) -> tuple[dict[str, object], tuple[Path, ...]]:
    """The content of a torch.distributed.checkpoint directory.

    Returns:
        nested dicts with a Source for each tensor, as they were given to
        torch.distributed.checkpoint.save; and the files

    Raises:
        CandidateError: it is damaged, or asks for something that is not data
    """
    path = folder / METADATA
    if path.stat().st_size > MAX_PICKLE:
        raise CandidateError(
            f"expected at most {MAX_PICKLE} bytes, found {path.stat().st_size}", path
        )
    try:
        metadata = unpickle(bytes_of_file(path, MAX_PICKLE), _NAMES)
    except Refused as error:
        raise CandidateError(
            f"refused: {error}, which the metadata of a torch.distributed.checkpoint never do", path
        ) from error
    except Exception as error:  # whatever a damaged pickle sets off
        if what := foreign(path):
            raise CandidateError(
                f"not the metadata of a torch.distributed.checkpoint: {what}", path
            ) from error
        raise CandidateError(
            f"not the metadata of a torch.distributed.checkpoint ({type(error).__name__}:"
            f" {first_line(error)})",
            path,
        ) from error
    tensors, storage, plan = (
        metadata.get(k) if isinstance(metadata, Made) else None
        for k in ("state_dict_metadata", "storage_data", "planner_data")
    )
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        raise CandidateError(
            f"expected the metadata of a torch.distributed.checkpoint, found"
            f" {type(metadata).__name__}",
            path,
        )
    return _Reader(folder, storage).nested(tensors, plan if isinstance(plan, dict) else {})


class _Place(NamedTuple):
    """Where a record lies: bytes begin to begin + length of a file of the directory."""

    file: str
    begin: int
    length: int
    transformed: bool  # compressed, for example


class _Reader:
    """The tensors of a directory, given what its metadata say of where blocks lie."""

    def __init__(self, folder: Path, storage: Mapping[object, object]) -> None:
        self.folder = folder
        self.files: dict[str, MappedFile] = {}
        # (tensor, offsets of the block, or None for all of it); a place of None is none to read
        self.places: dict[tuple[str, tuple[int, ...] | None], _Place | None] = {}
        for index, place in storage.items():
            if isinstance(index, Made) and isinstance(place, Made):
                name, offset = index.get("fqn"), index.get("offset")
                if isinstance(name, str) and (offset is None or _are_sizes(offset)):
                    self.places[name, offset] = _parse_place(place)
        self.archives: dict[tuple[str, int, int], Archive] = {}
        self._check_apart()

    def _check_apart(self) -> None:
        """CandidateError unless each record has bytes of its own.

        All of them are then read in the time that the files take.
        """
        spans = {place[:3] for place in self.places.values() if place is not None}
        for (file, begin, length), (other, after, _) in itertools.pairwise(sorted(spans)):
            if file == other and begin + length > after:
                raise CandidateError("its records overlap", self.folder / METADATA)

    def nested(
        self, tensors: Mapping[object, object], plan: Mapping[object, object]
    ) -> tuple[dict[str, object], tuple[Path, ...]]:
        """Nested dicts of tensors, and the files.

        Args:
            tensors: name of each tensor -> its description
            plan: name of each tensor -> the keys that lead to it
        """
        out: dict[str, object] = {}
        for name, description in tensors.items():
            if not isinstance(name, str) or not isinstance(description, Made):
                continue
            chunks = description.get("chunks")
            if not isinstance(chunks, list):
                continue  # bytes: counters, learning rates, ...
            *outer, last = steps = _steps(plan.get(name), name)
            for step in (name, *steps):
                check_name(step, self.folder)
            at = out
            for step in outer:
                inner = at.setdefault(step, {})
                if not isinstance(inner, dict):
                    raise CandidateError(f"{name!r} is inside a tensor", self.folder)
                at = inner
            if last in at:
                raise CandidateError(f"{name!r} occurs twice", self.folder)
            at[last] = self.tensor(name, description, chunks)
        return out, (self.folder / METADATA, *(self.folder / name for name in self.files))

    def tensor(self, name: str, description: Made, chunks: list[object]) -> Source:
        """One tensor, of which each chunk is a record of its own."""
        where = f"{self.folder}: tensor {name!r}"
        shape, dtype = description.get("size"), _dtype(description.get("properties"))
        if not _is_shape(shape) or not isinstance(dtype, torch.dtype):
            raise CandidateError("expected a shape and a dtype", where)
        blocks = []
        for chunk in chunks:
            offsets = chunk.get("offsets") if isinstance(chunk, Made) else None
            sizes = chunk.get("sizes") if isinstance(chunk, Made) else None
            if not _are_sizes(offsets) or not _is_shape(sizes):
                raise CandidateError("expected offsets and sizes of each block", where)
            blocks.append((offsets, sizes))
        if not covered(shape, blocks):
            raise CandidateError(f"its blocks do not cover its shape {list(shape)} once", where)
        pieces = tuple(
            (offsets, self.block(name, offsets, TensorInfo(sizes, dtype), where))
            for offsets, sizes in blocks
        )
        if len(pieces) == 1 and pieces[0][1].info.shape == shape:
            return pieces[0][1]
        return Pieces(TensorInfo(shape, dtype), pieces)

    def block(self, name: str, offsets: tuple[int, ...], info: TensorInfo, where: str) -> Stored:
        """One record: a tensor written by torch.save at some bytes of a file."""
        own = (name, offsets)
        place = self.places[own] if own in self.places else self.places.get((name, None))
        if place is None:
            raise CandidateError(
                "expected the name of a file, and where in it the tensor is", where
            )
        file, begin, length, transformed = place
        if not is_file_name(file):
            raise CandidateError(
                f"expected the name of a file in the directory, found {file[:200]!r}", where
            )
        if transformed:
            raise CandidateError(
                "it is compressed or otherwise transformed, which is not supported: save"
                " it without extensions",
                where,
            )
        path = self.folder / file
        if file not in self.files:
            if not path.is_file():
                raise CandidateError(f"no such file, but {METADATA} names it", path)
            self.files[file] = MappedFile(path)
        if begin + length > self.files[file].size:
            if what := foreign(path):
                raise CandidateError(f"not complete: {what}", path)
            raise CandidateError(
                f"not complete: {where} needs bytes {begin} to {begin + length} of"
                f" {self.files[file].size}",
                path,
            )
        if (file, begin, length) not in self.archives:
            self.archives[file, begin, length] = Archive(
                self.files[file], begin, length, f"{path} ({name!r})"
            )
        archive = self.archives[file, begin, length]
        if not isinstance(archive.content, Described):
            if found := odd(archive.content):
                raise found.error(where)
            raise CandidateError(
                f"expected a tensor, found {type(archive.content).__name__}", where
            )
        source = archive.place(archive.content)
        if source.info != info:
            raise CandidateError(f"expected a block {info}, found {source.info}", where)
        return source


def _parse_place(place: Made) -> _Place | None:
    """A record's place; None if it is none."""
    file, numbers = place.get("relative_path"), (place.get("offset"), place.get("length"))
    if not isinstance(file, str) or not are_sizes(numbers):
        return None
    begin, length = numbers
    return _Place(file, begin, length, bool(place.get("transform_descriptors")))


def _steps(planned: object, name: str) -> tuple[str, ...]:
    """The keys that lead to a tensor: those that are planned, else its name."""
    if not isinstance(planned, tuple) or not 0 < len(planned) <= MAX_DEPTH:
        return (name,)
    if not all(isinstance(step, str | int) for step in planned):
        return (name,)
    return tuple(map(str, planned))


def _dtype(properties: object) -> object:
    """The dtype of TensorProperties, which stores itself as a tuple, dtype first."""
    state = properties.state if isinstance(properties, Made) else None
    if isinstance(state, tuple) and state:
        return state[0]
    return state.get("dtype") if isinstance(state, dict) else None


def _are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    """Whether this is a tuple of sizes, as torch.Size is stored."""
    return isinstance(value, tuple) and are_sizes(value)


def _is_shape(value: object) -> TypeGuard[tuple[int, ...]]:
    """Whether this is a tuple of sizes that a tensor can have together."""
    return isinstance(value, tuple) and is_shape(value)
