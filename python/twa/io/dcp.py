"""torch.distributed.checkpoint directories, read without running anything in them:

`.metadata` is a pickle, of which only plain records are accepted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch

from .mapped import (
    CandidateError,
    MappedFile,
    Pieces,
    Source,
    Stored,
    TensorInfo,
    are_sizes,
    check_name,
    covered,
    first_line,
    is_file_name,
)
from .torch_zip import MAX_DEPTH, Archive, Described, ordered
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
_NAMES = {f"{module}.{name}": INERT for module, names in _CLASSES.items() for name in names}
_NAMES |= {
    f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_NAMES |= {"torch.Size": Name(tuple), "collections.OrderedDict": Name(ordered)}


def read(folder: Path) -> tuple[dict[str, object], tuple[Path, ...]]:
    """Nested dicts with a Source for each tensor, as they were given to
    torch.distributed.checkpoint.save; and the files.
    """
    path = folder / METADATA
    if path.stat().st_size > MAX_PICKLE:
        raise CandidateError(
            f"{path}: expected at most {MAX_PICKLE} bytes, found {path.stat().st_size}"
        )
    try:
        metadata, _ = unpickle(path.read_bytes(), _NAMES)
    except Refused as error:
        raise CandidateError(
            f"{path}: refused: {error}, which the metadata of a torch.distributed.checkpoint"
            " never do"
        ) from error
    except Exception as error:  # whatever a damaged pickle sets off
        raise CandidateError(
            f"{path}: not the metadata of a torch.distributed.checkpoint ({type(error).__name__}:"
            f" {first_line(error)})"
        ) from error
    tensors, storage, plan = (
        metadata.get(k) if isinstance(metadata, Made) else None
        for k in ("state_dict_metadata", "storage_data", "planner_data")
    )
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        raise CandidateError(
            f"{path}: expected the metadata of a torch.distributed.checkpoint, found"
            f" {type(metadata).__name__}"
        )
    return _Reader(folder, storage).nested(tensors, plan if isinstance(plan, dict) else {})


class _Reader:
    def __init__(self, folder: Path, storage: Mapping[object, object]) -> None:
        self.folder = folder
        self.files: dict[str, MappedFile] = {}
        self.places: dict[tuple[object, object], Made] = {}
        for index, place in storage.items():
            if isinstance(index, Made) and isinstance(place, Made):
                name, offset = index.get("fqn"), index.get("offset")
                if isinstance(name, str) and (offset is None or _sizes(offset)):
                    self.places[name, offset] = place
        self.archives: dict[tuple[object, object, object], Archive] = {}
        self._check_apart()

    def _check_apart(self) -> None:
        """Records of their own bytes each: all of them are then read in the time that the files
        take.
        """
        spans = {
            tuple(place.get(k) for k in _PLACE)
            for place in self.places.values()
            if _is_place(place)
        }
        for (file, begin, length), (other, after, _) in itertools.pairwise(sorted(spans)):
            if file == other and begin + length > after:
                raise CandidateError(f"{self.folder / METADATA}: its records overlap")

    def nested(
        self, tensors: Mapping[object, object], plan: Mapping[object, object]
    ) -> tuple[dict[str, object], tuple[Path, ...]]:
        out: dict[str, object] = {}
        for name, description in tensors.items():
            if (
                not isinstance(name, str)
                or not isinstance(description, Made)
                or not isinstance(description.get("chunks"), list)
            ):
                continue  # bytes: counters, learning rates, ...
            check_name(name, self.folder)
            steps = plan.get(name)
            if (
                not isinstance(steps, tuple)
                or not 0 < len(steps) <= MAX_DEPTH
                or not all(isinstance(s, str | int) for s in steps)
            ):
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

    def tensor(self, name: str, description: Made) -> Source:
        where = f"{self.folder}: tensor {name!r}"
        shape, properties = description.get("size"), description.get("properties")
        dtype = _dtype(properties)
        if not _sizes(shape) or not isinstance(dtype, torch.dtype):
            raise CandidateError(f"{where}: expected a shape and a dtype")
        blocks = []
        for chunk in description.get("chunks"):
            offsets, sizes = (
                chunk.get(k) if isinstance(chunk, Made) else None for k in ("offsets", "sizes")
            )
            if not _sizes(offsets) or not _sizes(sizes):
                raise CandidateError(f"{where}: expected offsets and sizes of each block")
            blocks.append((offsets, sizes))
        if not covered(shape, blocks):
            raise CandidateError(f"{where}: its blocks do not cover its shape {list(shape)} once")
        pieces = tuple(
            (offsets, self.block(name, offsets, TensorInfo(sizes, dtype), where))
            for offsets, sizes in blocks
        )
        if len(pieces) == 1:
            return pieces[0][1]
        return Pieces(TensorInfo(shape, dtype), pieces)

    def block(self, name: str, offsets: tuple[int, ...], info: TensorInfo, where: str) -> Stored:
        """One record: a tensor written by torch.save at some bytes of a file."""
        place = self.places.get((name, offsets)) or self.places.get((name, None))
        if place is None or not _is_place(place):
            raise CandidateError(
                f"{where}: expected the name of a file, and where in it the tensor is"
            )
        file, begin, length = (place.get(k) for k in _PLACE)
        if not is_file_name(file):
            raise CandidateError(
                f"{where}: expected the name of a file in the directory, found {file[:200]!r}"
            )
        if place.get("transform_descriptors"):
            raise CandidateError(
                f"{where}: it is compressed or otherwise transformed, which is not supported: save"
                " it without extensions"
            )
        path = self.folder / file
        if file not in self.files:
            if not path.is_file():
                raise CandidateError(f"{path}: no such file, but {METADATA} names it")
            self.files[file] = MappedFile(path)
        if begin + length > self.files[file].size:
            raise CandidateError(
                f"{path}: not complete: {where} needs bytes {begin} to {begin + length} of"
                f" {self.files[file].size}"
            )
        if (file, begin, length) not in self.archives:
            self.archives[file, begin, length] = Archive(
                self.files[file], begin, length, f"{path} ({name!r})"
            )
        archive = self.archives[file, begin, length]
        if not isinstance(archive.content, Described):
            raise CandidateError(
                f"{where}: expected a tensor, found {type(archive.content).__name__}"
            )
        source = archive.place(archive.content)
        if source.info != info:
            raise CandidateError(f"{where}: expected a block {info}, found {source.info}")
        return source


_PLACE = ("relative_path", "offset", "length")


def _is_place(place: Made) -> bool:
    file, *numbers = (place.get(k) for k in _PLACE)
    return isinstance(file, str) and are_sizes(numbers)


def _dtype(properties: object) -> object:
    """TensorProperties stores itself as a tuple: dtype first."""
    state = properties.state if isinstance(properties, Made) else None
    return (
        state[0]
        if isinstance(state, tuple) and state
        else state.get("dtype")
        if isinstance(state, dict)
        else None
    )


def _sizes(value: object) -> bool:
    return isinstance(value, tuple) and are_sizes(value)
