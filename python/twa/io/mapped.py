"""Files mapped into memory, read only, and where in them tensors lie: what every checkpoint format
comes down to.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # not on Windows
    resource = None

# Tensors over a mapping that may not be written: nothing here writes them.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

#: one slice per dimension of a tensor
Part = tuple[slice, ...]
MAX_ELEMENTS = 1 << 60  # of a tensor, before its size is multiplied out in fixed-width integers
MAX_DIMENSIONS = 64
MAX_NAME = 1000  # characters of a tensor's name
MAX_CUTS = 8  # of blocks into blocks; shards are cut once in each dimension


class CandidateError(ValueError):
    """Something is wrong with the candidates; the message names file, tensor, what was expected and
    what was found.
    """


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class MappedFile:
    """A file whose bytes are read when they are touched.

    It is mapped at the first use; `drop` gives the memory of what was touched back.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._map = path, None
        status = os.stat(path)
        self.size, self._stamp = status.st_size, (status.st_ino, status.st_mtime_ns)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_map": None}  # a copy maps the file again

    @property
    def map(self) -> mmap.mmap:
        if self._map is None:
            try:
                self._map = _map(self.path)
            except (OSError, ValueError) as error:
                raise CandidateError(f"{self.path}: cannot be mapped ({error})") from error
            status = os.stat(self.path)
            if (status.st_size, status.st_ino, status.st_mtime_ns) != (self.size, *self._stamp):
                raise CandidateError(
                    f"{self.path}: changed since its header was read; is it still being written?"
                )
        return self._map

    def check(self) -> None:
        """Raises CandidateError if the file is not what it was when its header was read: touching
        bytes that are gone would end the process. A file that was removed or replaced by another is
        still there for the mapping."""
        try:
            status = os.stat(self.path)
            rewritten = status.st_ino == self._stamp[0] and status.st_mtime_ns != self._stamp[1]
        except OSError:
            rewritten = False
        if rewritten or self.map.size() != self.size:
            raise CandidateError(
                f"{self.path}: changed while it was being read: expected {self.size} bytes as at"
                " first; is it still being written?"
            )

    def tensor(self, dtype: torch.dtype, offset: int, count: int) -> Tensor:
        """`count` elements from byte `offset` on, (count,); the file's own memory if they are
        aligned, else a copy.
        """
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if offset % dtype.itemsize:
            return (
                torch.frombuffer(
                    self.map, dtype=torch.uint8, offset=offset, count=count * dtype.itemsize
                )
                .clone()
                .view(dtype)
            )
        return torch.frombuffer(self.map, dtype=dtype, offset=offset, count=count)

    def drop(self) -> None:
        """Gives the memory of all touched pages back; tensors over them stay valid and are read
        again when they are touched.
        """
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def prefetch(self, offset: int, count: int) -> None:
        """Asks the system to read these bytes soon.

        Other threads go on meanwhile, which they would not with a call on the mapping.
        """
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                file = os.open(self.path, os.O_RDONLY)
                try:
                    os.posix_fadvise(file, offset, count, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(file)


def _map(path: Path) -> mmap.mmap:
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        if error.errno != errno.EMFILE or not _raise_file_limit():
            raise
        file = open(path, "rb")  # noqa: SIM115
    with file:
        try:
            # what a caller may write stays in this process
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            if error.errno == errno.EMFILE and _raise_file_limit():
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if error.errno != errno.ENOMEM:
                raise
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # a file larger than memory


def _raise_file_limit() -> bool:
    """Lets this process open as many files as the system allows it; False if it does already."""
    if resource is None:
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: elements from byte `offset` on, of which `strides` makes the shape (None:
    contiguous).
    """

    file: MappedFile
    info: TensorInfo
    offset: int
    strides: tuple[int, ...] | None = None
    swapped: bool = False  # of the other byte order
    negated: bool = False

    def _within(self, part: Part | None) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Shape and strides of the part, and the byte of the file where it begins."""
        shape, first = self.info.shape, 0
        strides = self.strides or tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
        if part is not None:
            bounds = [s.indices(size)[:2] for s, size in zip(part, shape, strict=True)]
            shape = tuple(max(0, end - begin) for begin, end in bounds)
            first = sum(begin * stride for (begin, _), stride in zip(bounds, strides, strict=True))
        return shape, strides, self.offset + first * self.info.dtype.itemsize

    def read(self, part: Part | None = None) -> Tensor:
        shape, strides, at = self._within(part)
        flat = self.file.tensor(self.info.dtype, at, span(shape, strides))
        t = (swap_bytes(flat) if self.swapped else flat).as_strided(shape, strides)
        return -t if self.negated else t

    def prefetch(self, part: Part | None) -> None:
        shape, strides, at = self._within(part)
        if count := span(shape, strides):
            self.file.prefetch(at, count * self.info.dtype.itemsize)

    @property
    def files(self) -> tuple[MappedFile, ...]:
        return (self.file,)


@dataclass(frozen=True)
class Pieces:
    """A tensor in blocks, each with its place in the whole: what ranks have written of their
    shards. The blocks cover it, without overlap.
    """

    info: TensorInfo
    blocks: tuple[tuple[tuple[int, ...], Stored], ...]  # (offsets, block)

    def _within(self, part: Part | None) -> list[tuple[Part, Part, Stored]]:
        """(slices of the result, slices of the block, block) for each block that `part` needs."""
        wanted = [
            s.indices(size)[:2]
            for s, size in zip(
                part or (slice(None),) * len(self.info.shape), self.info.shape, strict=True
            )
        ]
        found = []
        for offsets, block in self.blocks:
            common = [
                (max(a, o), min(b, o + size))
                for (a, b), o, size in zip(wanted, offsets, block.info.shape, strict=True)
            ]
            if all(a < b for a, b in common):
                to = tuple(
                    slice(a - w, b - w) for (a, b), (w, _) in zip(common, wanted, strict=True)
                )
                found.append(
                    (
                        to,
                        tuple(
                            slice(a - o, b - o) for (a, b), o in zip(common, offsets, strict=True)
                        ),
                        block,
                    )
                )
        return found

    def read(self, part: Part | None = None) -> Tensor:
        """A view of the file if one block has it all, else a copy."""
        shape = shape_of(self.info.shape, part)
        needed = self._within(part)
        if len(needed) == 1:
            return needed[0][2].read(needed[0][1])
        out = torch.empty(shape, dtype=self.info.dtype)
        for to, of_block, block in needed:
            out[to] = block.read(of_block)
        return out

    def prefetch(self, part: Part | None) -> None:
        for _, of_block, block in self._within(part):
            block.prefetch(of_block or None)

    @property
    def files(self) -> tuple[MappedFile, ...]:
        return tuple(block.file for _, block in self.blocks)


Source = Stored | Pieces


def shape_of(shape: tuple[int, ...], part: Part | None) -> tuple[int, ...]:
    """Of these slices of a tensor, or of all of it."""
    return (
        shape
        if part is None
        else tuple(len(range(*s.indices(size))) for s, size in zip(part, shape, strict=True))
    )


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of storage from a strided tensor's first to its last."""
    return (
        0
        if 0 in shape
        else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    )


def swap_bytes(flat: Tensor) -> Tensor:
    """A copy in the other byte order."""
    width = flat.dtype.itemsize // (2 if flat.dtype.is_complex else 1)
    return flat.view(torch.uint8).view(-1, width).flip(1).reshape(-1).view(flat.dtype)


def are_sizes(value: object) -> bool:
    """Whether a file's value can be the sizes, offsets or strides of a tensor: few enough to be
    multiplied in no time.
    """
    return (
        isinstance(value, list | tuple)
        and len(value) <= MAX_DIMENSIONS
        and all(type(v) is int and 0 <= v < MAX_ELEMENTS for v in value)
    )


def is_file_name(name: str) -> bool:
    """Whether this names a file in a directory, and nothing outside it; and can be printed.

    (The file may be a link: Hugging Face's cache is made of links to ../../blobs, and what a link
    leads to is only read.)"""
    if not name.isprintable() or len(name.encode()) > 255 or name in ("", ".", ".."):
        return False
    return "/" not in name and "\\" not in name and Path(name).name == name


def check_name(name: str, where: Path) -> None:
    """CandidateError for a tensor's name that no message should quote."""
    if len(name) > MAX_NAME:
        raise CandidateError(
            f"{where}: expected names of at most {MAX_NAME} characters, found one of {len(name)}"
        )


def covered(shape: Sequence[int], blocks: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether blocks (offsets, sizes) lie within `shape`, do not overlap and leave nothing out;
    they must be what cuts through all of it make, as shards are."""
    boxes = []
    for offsets, sizes in blocks:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return False
        if any(
            o < 0 or s < 0 or o + s > size for o, s, size in zip(offsets, sizes, shape, strict=True)
        ):
            return False
        if math.prod(sizes):
            boxes.append([(o, o + s) for o, s in zip(offsets, sizes, strict=True)])
    return not math.prod(shape) or _cut([(0, size) for size in shape], boxes, MAX_CUTS)


def _cut(whole: list[tuple[int, int]], boxes: list[list[tuple[int, int]]], cuts: int) -> bool:
    """Whether boxes fill a box, by as many rounds of cuts."""
    if len(boxes) <= 1 or not cuts:
        return boxes == [whole]
    for axis, (at, end) in enumerate(whole):
        groups: list[list] = []
        for box in sorted(boxes, key=lambda b: b[axis]):
            begin, after = box[axis]
            if begin > at:
                return False  # a gap
            if begin == at:
                groups.append([])
            if not groups:
                return False
            groups[-1].append(box)
            at = max(at, after)
        if at != end:
            return False
        if len(groups) > 1:
            sides = [(g[0][axis][0], max(b[axis][1] for b in g)) for g in groups]
            return all(
                _cut([*whole[:axis], side, *whole[axis + 1 :]], g, cuts - 1)
                for g, side in zip(groups, sides, strict=True)
            )
    return False


def shown(value: object) -> str:
    """A file's value for a message: printable, not long, and not looked into deeply."""
    return reprlib.repr(value)


def printable(text: str) -> str:
    """A file's text as a terminal can show it."""
    return text[:200] if text[:200].isprintable() else ascii(text[:200])


def first_line(error: BaseException) -> str:
    """Of its message."""
    return printable((str(error).splitlines() or [""])[0])
