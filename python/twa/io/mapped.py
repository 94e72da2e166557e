"""Files mapped into memory, read only, and where in them tensors lie.

Every checkpoint format comes down to this.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import mmap
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from twa_kernels.guard import GuardedMap, torn_maps

from .errors import CandidateError, TwaError

if sys.platform != "win32":
    import resource

#: one slice per dimension of a tensor
Part = tuple[slice, ...]


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class MappedFile:
    """A file whose bytes are read when they are touched.

    It is mapped at the first use; `drop` gives the memory of what was touched back. Bytes that are
    gone when they are touched are zeros: `check` follows on reading, before anything is made of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: GuardedMap | None = None
        status = os.stat(path)
        self.size, self._stamp = status.st_size, (status.st_ino, status.st_mtime_ns)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_map": None}  # a copy maps the file again

    @property
    def map(self) -> GuardedMap:
        """The mapping, made at the first use; CandidateError if the file has changed since."""
        if self._map is None:
            try:
                self._map = _map(self.path)
            except (OSError, ValueError) as error:
                raise CandidateError(f"cannot be mapped ({error})", self.path) from error
            status = os.stat(self.path)
            if (status.st_size, status.st_ino, status.st_mtime_ns) != (self.size, *self._stamp):
                raise CandidateError(
                    "changed since its header was read; is it still being written?", self.path
                )
        return self._map

    def check(self, error: type[TwaError] = CandidateError) -> None:
        """Raises an error if the file is not what it was when its header was read.

        A file that was removed or replaced by another is still there for the mapping.
        """
        try:
            status = os.stat(self.path)
            rewritten = status.st_ino == self._stamp[0] and status.st_mtime_ns != self._stamp[1]
        except OSError:
            rewritten = False
        found = self.map.size()
        if found < self.size:
            raise error(
                f"became shorter while it was being read: expected {self.size} bytes as at first,"
                f" found {found}; is it still being written, or was another written over it?",
                self.path,
            )
        if rewritten or found != self.size:
            raise error(
                f"changed while it was being read: expected {self.size} bytes as at"
                " first; is it still being written?",
                self.path,
            )
        if self.map.torn:
            raise error(
                "a part of it could not be read: was it shorter, or is it the disk?", self.path
            )

    def tensor(self, dtype: torch.dtype, offset: int, count: int) -> Tensor:
        """Elements from a byte of the file on, (count,).

        They are the file's own memory if they are aligned, else a copy.

        Args:
            dtype: of the elements
            offset: first byte
            count: number of elements
        """
        if count == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        if offset % dtype.itemsize == 0:
            return torch.frombuffer(self.map, dtype=dtype, offset=offset, count=count)
        nbytes = count * dtype.itemsize
        plain = torch.frombuffer(self.map, dtype=torch.uint8, offset=offset, count=nbytes)
        return plain.clone().view(dtype)

    @property
    def is_mapped(self) -> bool:
        """Whether it was mapped, in this copy of it."""
        return self._map is not None

    @property
    def is_shorter(self) -> bool:
        """Whether it was mapped and has lost bytes since, be they touched or not."""
        return self._map is not None and self._map.size() < self.size

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor is the file's own memory."""
        if self._map is None or not t.nbytes or t.device.type != "cpu":
            return False
        begin = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
        return begin <= t.data_ptr() < begin + self.size

    def drop(self) -> None:
        """Gives the memory of all touched pages back.

        Tensors over them stay valid, and are read again when they are touched.
        """
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def prefetch(self, offset: int, count: int) -> None:
        """Asks the system to read `count` bytes from `offset` on soon.

        Other threads go on meanwhile, which they would not with a call on the mapping.
        """
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                file = os.open(self.path, os.O_RDONLY)
                try:
                    os.posix_fadvise(file, offset, count, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(file)


def check_torn(files: Iterable[MappedFile]) -> None:
    """CandidateError if bytes of one of these files were gone when they were read.

    Bytes of the last page that are gone are zeros without a fault: so sizes are compared, too.
    """
    any_torn = torn_maps() > 0
    for file in files:
        if file.is_mapped and (any_torn or file.is_shorter):
            file.check()


def _map(path: Path) -> GuardedMap:
    """A mapping of a whole file; the limit on open files is raised if it is reached."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        if error.errno != errno.EMFILE or not _raise_file_limit():
            raise
        file = open(path, "rb")  # noqa: SIM115
    with file:
        try:
            # what a caller may write stays in this process
            return GuardedMap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            if error.errno == errno.EMFILE and _raise_file_limit():
                return GuardedMap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if error.errno != errno.ENOMEM:
                raise
            # a file larger than memory
            _expect_read_only_memory()
            return GuardedMap(file.fileno(), 0, access=mmap.ACCESS_READ)


@functools.cache
def _expect_read_only_memory() -> None:
    """Has PyTorch's warning of memory that may not be written, which it gives once, said to nobody.

    Nothing here writes to tensors over such memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(bytes(1), dtype=torch.uint8)


def _raise_file_limit() -> bool:
    """Lets this process open as many files as the system allows it; False if it does already."""
    if sys.platform == "win32":
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


class Source(Protocol):
    """Where a tensor of a checkpoint lies, or how it is made of what lies there."""

    @property
    def info(self) -> TensorInfo:
        """Shape and dtype."""

    def read(self, part: Part | None = None) -> Tensor:
        """The tensor, or a part of it, to be read only; a view of the file where that can be."""

    def prefetch(self, part: Part | None) -> None:
        """Asks the system to read what `read` will."""

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Source:
        """A view of the tensor, which counts as contiguous: where its elements lie."""

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files that it lies in."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: where it lies
        info: shape and dtype
        offset: byte of its first element
        strides: of the shape, in elements; None: contiguous
        negated: whether the elements are those in the file times -1
    """

    file: MappedFile
    info: TensorInfo
    offset: int
    strides: tuple[int, ...] | None = None
    negated: bool = False

    def _within(self, part: Part | None) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Shape and strides of the part, and the byte of the file where it begins."""
        shape, first = self.info.shape, 0
        strides = self.strides or contiguous_strides(shape)
        if part is not None:
            bounds = [s.indices(size)[:2] for s, size in zip(part, shape, strict=True)]
            shape = tuple(max(0, end - begin) for begin, end in bounds)
            first = sum(begin * stride for (begin, _), stride in zip(bounds, strides, strict=True))
        return shape, strides, self.offset + first * self.info.dtype.itemsize

    def read(self, part: Part | None = None) -> Tensor:
        """The tensor, or a part of it; a view of the file where that can be."""
        shape, strides, at = self._within(part)
        flat = self.file.tensor(self.info.dtype, at, span(shape, strides))
        t = flat.as_strided(shape, strides)
        return -t if self.negated else t

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Source:
        """A view of the tensor, which counts as contiguous: where its elements lie."""
        if self.strides is not None:
            return Viewed(self, TensorInfo(shape, self.info.dtype), strides, offset)
        at = self.offset + offset * self.info.dtype.itemsize
        info = TensorInfo(shape, self.info.dtype)
        own = None if strides == contiguous_strides(shape) else strides
        return Stored(self.file, info, at, own, self.negated)

    def prefetch(self, part: Part | None) -> None:
        """Asks the system to read what `read` will."""
        shape, strides, at = self._within(part)
        if count := span(shape, strides):
            self.file.prefetch(at, count * self.info.dtype.itemsize)

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files that it lies in."""
        return (self.file,)


@dataclass(frozen=True)
class Pieces:
    """A tensor in blocks: what ranks have written of their shards, or a model's loading joins.

    Attributes:
        info: shape and dtype of the whole
        blocks: (offsets in the whole, block); they cover it, without overlap
    """

    info: TensorInfo
    blocks: tuple[tuple[tuple[int, ...], Source], ...]

    def _within(self, part: Part | None) -> list[tuple[Part, Part, Source]]:
        """(slices of the result, slices of the block, block) for each block that `part` needs."""
        part = part or (slice(None),) * len(self.info.shape)
        wanted = [s.indices(size)[:2] for s, size in zip(part, self.info.shape, strict=True)]
        starts = [start for start, _ in wanted]
        found = []
        for offsets, block in self.blocks:
            common = [
                (max(a, o), min(b, o + size))
                for (a, b), o, size in zip(wanted, offsets, block.info.shape, strict=True)
            ]
            if all(a < b for a, b in common):
                found.append((_relative(common, starts), _relative(common, offsets), block))
        return found

    def read(self, part: Part | None = None) -> Tensor:
        """The tensor, or a part of it: a view of the file if one block has it all, else a copy."""
        shape = shape_of(self.info.shape, part)
        needed = self._within(part)
        if len(needed) == 1:
            return needed[0][2].read(needed[0][1])
        out = torch.empty(shape, dtype=self.info.dtype, device="cpu")
        for to, of_block, block in needed:
            out[to] = block.read(of_block)
        return out

    def prefetch(self, part: Part | None) -> None:
        """Asks the system to read what `read` will."""
        for _, of_block, block in self._within(part):
            block.prefetch(of_block or None)

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Source:
        """A view of the tensor, which counts as contiguous; blocks stay if dimensions move."""
        info = TensorInfo(shape, self.info.dtype)
        axes = _axes_of(self.info.shape, shape, strides)
        if axes is None or offset:
            return Viewed(self, info, strides, offset)
        blocks = []
        for offsets, block in self.blocks:
            inner = contiguous_strides(block.info.shape)
            sizes = tuple(block.info.shape[a] for a in axes)
            moved = view_of(block, sizes, tuple(inner[a] for a in axes), 0)
            blocks.append((tuple(offsets[a] for a in axes), moved))
        return Pieces(info, tuple(blocks))

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files that it lies in."""
        return tuple(file for _, block in self.blocks for file in block.files)


@dataclass(frozen=True, eq=False)
class Viewed:
    """A view that only the whole tensor gives: all of it is read for any part.

    Attributes:
        whole: the tensor that it is a view of, as if that lay contiguous
        info: shape and dtype of the view
        strides, offset: in elements of the whole
    """

    whole: Source
    info: TensorInfo
    strides: tuple[int, ...]
    offset: int

    def read(self, part: Part | None = None) -> Tensor:
        """The view, or a part of it."""
        found = _strided(self.whole.read().contiguous(), self.info.shape, self.strides, self.offset)
        return found if part is None else found[part]

    def prefetch(self, part: Part | None) -> None:
        """Asks the system to read what `read` will."""
        self.whole.prefetch(None)

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Source:
        """A view of the view, which counts as contiguous."""
        return Viewed(self, TensorInfo(shape, self.info.dtype), strides, offset)

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files that it lies in."""
        return self.whole.files


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor in memory: what a model's loading has computed of a file, or made itself.

    Attributes:
        tensor: on the CPU; nobody writes to it
    """

    tensor: Tensor

    @property
    def info(self) -> TensorInfo:
        """Shape and dtype."""
        return TensorInfo(tuple(self.tensor.shape), self.tensor.dtype)

    def read(self, part: Part | None = None) -> Tensor:
        """The tensor, or a part of it."""
        return self.tensor if part is None else self.tensor[part]

    def prefetch(self, part: Part | None) -> None:
        """It is there."""

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Source:
        """A view of the tensor, which counts as contiguous."""
        return Held(_strided(self.tensor.contiguous(), shape, strides, offset))

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """It lies in none."""
        return ()


def view_of(
    source: Source, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> Source:
    """A view of a tensor, which counts as contiguous: itself, if the view is all of it in order."""
    if (shape, strides, offset) == (source.info.shape, contiguous_strides(shape), 0):
        return source
    return source.view(shape, strides, offset)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements, as torch gives them."""
    return tuple(math.prod(max(1, size) for size in shape[d + 1 :]) for d in range(len(shape)))


def _strided(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
    """A view of a contiguous tensor; `offset` counts from its first element."""
    return t.as_strided(shape, strides, t.storage_offset() + offset)


def _axes_of(
    shape: tuple[int, ...], sizes: tuple[int, ...], strides: tuple[int, ...]
) -> list[int] | None:
    """For each dimension of a view, which of a contiguous tensor's it is.

    None if the view is more than the same dimensions in another order.
    """
    left = dict(enumerate(zip(shape, contiguous_strides(shape), strict=True)))
    axes: list[int | None] = []
    for size, stride in zip(sizes, strides, strict=True):
        same = [d for d, own in left.items() if own == (size, stride) or size == own[0] == 1]
        axes.append(same[0] if same else None)
        if same:
            del left[same[0]]
    return None if left or None in axes else [a for a in axes if a is not None]


def _relative(spans: Sequence[tuple[int, int]], origin: Sequence[int]) -> Part:
    """Slices of these spans, counted from an origin."""
    return tuple(slice(a - o, b - o) for (a, b), o in zip(spans, origin, strict=True))


def shape_of(shape: tuple[int, ...], part: Part | None) -> tuple[int, ...]:
    """Shape of these slices of a tensor, or of all of it."""
    if part is None:
        return shape
    return tuple(len(range(*s.indices(size))) for s, size in zip(part, shape, strict=True))


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of storage from a strided tensor's first to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def covered(shape: Sequence[int], blocks: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether blocks are the cells of a grid over a shape, each once.

    That is what shards are, whatever mesh they were made on.

    Args:
        shape: of the whole
        blocks: (offsets, sizes) of each
    """
    if any(len(o) != len(shape) or len(s) != len(shape) for o, s in blocks):
        return False
    if not math.prod(shape):
        return all(not math.prod(sizes) for _, sizes in blocks)
    cells = {(tuple(o), tuple(s)) for o, s in blocks if math.prod(s)}
    count = 1
    for axis, size in enumerate(shape):
        sides = sorted({(o[axis], o[axis] + s[axis]) for o, s in cells})
        begins, ends = [begin for begin, _ in sides], [end for _, end in sides]
        if [*begins, size] != [0, *ends]:  # a gap, an overlap, or not to the end
            return False
        count *= len(sides)
    return len(cells) == count == sum(1 for _, s in blocks if math.prod(s))
